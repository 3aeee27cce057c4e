#!/usr/bin/env python3
"""A daemon for tests of the CRIU plugin: speaks src/wire/control.h, writes down what it is asked, and answers as told.

As a program it is what the plugin starts when no daemon runs:  fake_daemon.py --private FD
Its orders and its record are files named by the environment: FAKE_BENNUD_PLAN (JSON: {"<request>": order}), FAKE_BENNUD_LOG
(one JSON object a line), FAKE_BENNUD_CONTROL (path of control.h).

An order: {"value": N} the u32 of the reply, {"error": [errno, stage, text]}, {"die": true} ends the connection unanswered,
{"delay": seconds} before the reply. Requests by their names in control.h without BN_CTL_. "NAME:PID" is
preferred over "NAME" for requests about one process.
"""

import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time

HEAD = struct.Struct("<IHHIi32s512s")


class Protocol:
    def __init__(self, header):
        with open(header, encoding="utf-8") as f:
            text = f.read()
        self.magic = int(re.search(r"BN_CTL_MAGIC\s+(0x[0-9a-f]+)u", text)[1], 16)
        self.version = int(re.search(r"BN_CTL_VERSION\s+(\d+)u", text)[1])
        self.types = {name: int(number) for name, number in re.findall(r"^\s+BN_CTL_([A-Z_]+)\s*=\s*(\d+),", text, re.M)}
        self.names = {number: name for name, number in self.types.items()}


class Daemon:
    def __init__(self, protocol, plan, record):
        self.protocol, self.plan, self.record = protocol, plan, record

    def serve(self, sock):
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(sock, 65536, 4)
            except OSError:
                break
            if not data:
                break
            if not self.answer(sock, data, fds):
                break
        self.record({"request": "closed"})
        sock.close()

    def answer(self, sock, data, fds):
        magic, version, kind, reply, error, _, _ = HEAD.unpack_from(data)
        body = data[HEAD.size:]
        values = list(struct.unpack(f"<{len(body) // 4}i", body[: len(body) // 4 * 4]))
        name = self.protocol.names.get(kind, str(kind))
        entry = {"request": name, "values": values, "folders": [os.readlink(f"/proc/self/fd/{fd}") for fd in fds]}
        if (magic, version, reply, error) != (self.protocol.magic, self.protocol.version, 0, 0):
            entry["malformed"] = True
        if name in ("DUMP_PROCESS", "DUMP_BEGIN", "DUMP_PURGE", "RESTORE_PROCESS"):
            with open(f"/proc/{values[0]}/status", encoding="utf-8") as f:
                status = dict(line.split(":\t", 1) for line in f.read().splitlines() if ":\t" in line)
            entry["state"], entry["traced"] = status["State"][0], status["TracerPid"] != "0"
        for fd in fds:
            os.close(fd)
        self.record(entry)
        order = self.plan.get(f"{name}:{values[0] if values else ''}", self.plan.get(name, {}))
        if "call" in order:
            order["call"](entry)
        if "delay" in order:
            time.sleep(order["delay"])
        if order.get("die"):
            return False
        code, stage, text = order.get("error", [0, "", ""])
        ends = name in ("DUMP_END", "RESTORE_END")
        reply_body = b"" if code else struct.pack("<I", order.get("value", 0 if ends or name == "DUMP_THREAD" else 1))
        try:
            sock.send(HEAD.pack(self.protocol.magic, self.protocol.version, kind, 1, code, stage.encode(),
                                text.encode()) + reply_body)
        except OSError:
            return False
        if "after" in order:
            order["after"](entry)
        return True


class Listening:
    """The daemon at RUNDIR/bennud.sock, in threads of the calling process."""

    def __init__(self, rundir, header):
        self.records, self.plan, self.connections = [], {}, []
        self.daemon = Daemon(Protocol(header), self.plan, self.records.append)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.bind(os.path.join(rundir, "bennud.sock"))
        self.sock.listen(8)
        self.threads = [threading.Thread(target=self.accept, daemon=True)]
        self.threads[0].start()

    def accept(self):
        while True:
            try:
                connection, _ = self.sock.accept()
            except OSError:
                return
            thread = threading.Thread(target=self.daemon.serve, args=(connection,), daemon=True)
            self.threads.append(thread)
            thread.start()

    def stop(self):
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        for thread in self.threads:
            thread.join(20)


def main():
    if sys.argv[1:2] != ["--private"]:
        sys.exit("usage: fake_daemon.py --private FD")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    with open(os.environ["FAKE_BENNUD_PLAN"], encoding="utf-8") as f:
        plan = json.load(f)
    log = os.environ["FAKE_BENNUD_LOG"]

    def record(entry):
        with open(log, "a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")

    def numbers():
        return sorted(int(n) for n in os.listdir("/proc/self/fd"))

    # The folder being listed takes the lowest free number: 4, if CRIU's descriptors were all closed.
    record({"request": "start", "ppid": os.getppid(), "sid": os.getsid(0), "pid": os.getpid(), "fds": numbers(),
            "blocked": [int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])]})
    Daemon(Protocol(os.environ["FAKE_BENNUD_CONTROL"]), plan, record).serve(socket.socket(fileno=int(sys.argv[2])))


if __name__ == "__main__":
    main()
