"""A daemon for tests of the command line: answers src/wire/control.h's requests as it is told, in threads of the test.

`plan` maps a request's name (CHECK, WATCH, …) to a function (values, fds) -> reply body as bytes, or to a `Refusal`. A WATCH's
function runs when the connection asks; it may send progress with `daemon.progress` before it returns. What was asked is in
`asked`, a list of (name, values).
"""

import os
import re
import socket
import struct
import threading

HEAD = struct.Struct("<IHHIi32s512s")


class Refusal(Exception):
    def __init__(self, code, text, stage="test"):
        super().__init__(text)
        self.code, self.text, self.stage = code, text, stage


def string(text):
    data = text.encode()
    return struct.pack("<H", len(data)) + data


def phases(*rows):
    """(name, start in ns, duration in ns, bytes)…"""
    return struct.pack("<I", len(rows)) + b"".join(string(n) + struct.pack("<QQQ", s, d, b) for n, s, d, b in rows)


def daemon_info(version="0.1.0", driver=13000, gpus=1):
    body = string(version) + string("/fake/libcuda.so.1") + struct.pack("<IBII", driver, 1, os.getpid(), gpus)
    for i in range(gpus):
        body += string(f"Fake {i}") + bytes(16) + struct.pack("<IQQ", 90, 80 << 30, 70 << 30) + string("")
    return body + struct.pack("<QQ", 64 << 30, 1 << 30)


def process(pid, comm, state=0, note=""):
    return (struct.pack("<I", pid) + string(comm) + struct.pack("<IQQQI", state, 3 << 30, 0, 12, 0) + string(note)
            + struct.pack("<QI", 0, 0))


class FakeBennud:
    def __init__(self, rundir, header):
        with open(header, encoding="utf-8") as f:
            text = f.read()
        self.magic = int(re.search(r"BN_CTL_MAGIC\s+(0x[0-9a-f]+)u", text)[1], 16)
        self.version = int(re.search(r"BN_CTL_VERSION\s+(\d+)u", text)[1])
        self.types = {name: int(n) for name, n in re.findall(r"^\s+BN_CTL_([A-Z_]+)\s*=\s*(\d+),", text, re.M)}
        self.names = {n: name for name, n in self.types.items()}
        self.plan, self.asked, self.local = {}, [], threading.local()
        os.makedirs(rundir, exist_ok=True)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.bind(os.path.join(rundir, "bennud.sock"))
        self.sock.listen(8)
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def send(self, kind, reply=0, body=b"", code=0, stage="", text=""):
        self.local.peer.send(HEAD.pack(self.magic, self.version, self.types[kind], reply, code, stage.encode(),
                                       text.encode()) + body)

    def progress(self, phase, done, total):
        self.send("EV_PROGRESS", body=string(phase) + struct.pack("<QQ", done, total))

    def wait_for_hang_up(self):
        """Until the client closes its connection: a session that never begins."""
        try:
            self.local.peer.recv(1)
        except OSError:
            pass

    def accept(self):
        while True:
            try:
                peer, _ = self.sock.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(peer,), daemon=True).start()

    def serve(self, peer):
        self.local.peer = peer
        with peer:
            while True:
                try:
                    data, fds, _, _ = socket.recv_fds(peer, 65536, 4)
                    if not data:
                        return
                    self.answer(data, fds)
                except OSError:
                    return

    def answer(self, data, fds):
        kind = HEAD.unpack_from(data)[2]
        body = data[HEAD.size:]
        values = list(struct.unpack(f"<{len(body) // 4}I", body[: len(body) // 4 * 4]))
        name = self.names[kind]
        self.asked.append((name, values))
        try:
            what = self.plan[name]
            if isinstance(what, Refusal):
                raise what
            self.send(name, reply=1, body=what(values, fds))
        except Refusal as r:
            self.send(name, reply=1, code=r.code, stage=r.stage, text=r.text)
        finally:
            for fd in fds:
                os.close(fd)

    def stop(self):
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self.thread.join(10)
