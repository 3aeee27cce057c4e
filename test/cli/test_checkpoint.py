#!/usr/bin/env python3
"""Dump and restore with the real CRIU, a plugin that does nothing and a daemon that pretends: what the command line itself
does is tested here, the GPU elsewhere."""

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import unittest

import common
import fake_bennud
from common import Case, as_root


# Of the golden manifest (test/image/make.h): index and bytes.
PACKS = {0: 8 << 20, 3: (4 << 20) + 4096}


class Checkpoint(Case):
    def setUp(self):
        super().setUp()
        os.mkdir(self.path("plugin"))
        shutil.copy(common.arguments.plugin, self.path("plugin/bennu_plugin.so"))
        self.env["BENNU_PLUGIN_DIR"] = self.path("plugin")
        self.daemon = fake_bennud.FakeBennud(self.rundir, common.arguments.control)
        self.addCleanup(self.daemon.stop)
        self.daemon.plan["CHECK"] = lambda values, fds: b"\1\0\0\0\1\0\0\0" + (1 << 20).to_bytes(8, "little")
        self.daemon.plan["WATCH"] = self.watch
        self.target = self.path("ck")
        self.session_error = None
        self.writes_manifest = True
        program = self.start_ticker()
        self.pid, self.program = program.pid, program

    def start_ticker(self, prefix=()):
        program = subprocess.Popen([*prefix, common.arguments.ticker], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, text=True, bufsize=1, start_new_session=True)
        self.addCleanup(self.end, program)
        return program

    @staticmethod
    def end(program):
        if program.poll() is None:
            program.kill()
        program.wait()
        for stream in (program.stdin, program.stdout, program.stderr):
            if stream:
                stream.close()

    def tick(self, program=None):
        program = program or self.program
        program.stdin.write("\n")
        program.stdin.flush()
        return program.stdout.readline()

    def watch(self, values, fds):
        """As the daemon: says that it watches, then has a session that ends at once."""
        self.daemon.progress("waiting", 0, 0)
        if values[0] != 0 and self.writes_manifest:
            shutil.copy(common.arguments.manifest, os.path.join(self.target, "bennu-manifest.img"))
            for index, length in PACKS.items():
                with open(os.path.join(self.target, f"bennu-pack-{index}.img"), "wb") as f:
                    f.truncate(length)
        self.daemon.progress("copy out", 1, 2)
        if self.session_error:
            raise self.session_error
        return fake_bennud.phases(("copy out", 0, 10_000_000, 50_000_000))

    def without_session(self, values, fds):
        self.daemon.progress("waiting", 0, 0)
        self.daemon.wait_for_hang_up()
        return b""

    def dump(self, *options):
        done = self.bennu("dump", *options, self.pid, self.target)
        self.assertEqual(done.returncode, 0, done.stderr + self.log())
        self.assertEqual(done.stderr, "")
        return done.stdout

    def log(self):
        for path in (os.path.join(self.target, "dump.log"), self.target + ".log"):
            if os.path.exists(path):
                with open(path, encoding="utf-8", errors="replace") as f:
                    return "\n" + f.read()[-3000:]
        return ""

    def restore(self, *options, **kwargs):
        """The golden manifest's processes are not ours: only our own record of process ids counts."""
        program = subprocess.Popen([common.arguments.bennu, "restore", *options, self.target], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1, env=self.env, **kwargs)
        self.addCleanup(self.end, program)
        return program

    def still_runs(self, expected):
        self.assertIsNone(self.program.poll(), "the process ended")
        self.assertEqual(self.tick(), expected)

    def test_dump_kills_and_restore_goes_on(self):
        self.assertEqual([self.tick(), self.tick()], ["1\n", "2\n"])
        table = self.dump()
        self.assertEqual(self.program.wait(60), -signal.SIGKILL)
        self.assertRegex(table, r"copy out +0\.000 s +0\.010 s +50\.0 MB +5\.00\n")
        self.assertRegex(table, r"CRIU, all of it +0\.000 s")
        self.assertRegex(table, rf"process {self.pid} .* is in {self.target}\n$")
        restored = self.restore("--pidfile", self.path("pid"))
        self.assertEqual(self.tick(restored), "3\n")
        while not restored.stderr.readline().startswith("total"):
            self.assertIsNone(restored.poll())
        with open(self.path("pid"), encoding="utf-8") as f:
            self.assertEqual(f.read(), f"{self.pid}\n")
        self.assertEqual(self.daemon.asked[-1], ("WATCH", [0]))
        restored.send_signal(signal.SIGUSR1)
        self.assertEqual(restored.stdout.readline(), "signal\n")
        self.assertEqual(self.tick(restored), "4\n")
        restored.stdin.close()
        self.assertEqual(restored.wait(60), 42, "the program's own exit code")
        # And again from the same checkpoint.
        again = self.restore("--quiet")
        self.assertEqual(self.tick(again), "3\n")
        os.kill(self.pid, signal.SIGTERM)
        self.assertEqual(again.wait(60), 128 + signal.SIGTERM)
        self.assertEqual(again.stderr.read(), "")

    def test_leave_running(self):
        self.tick()
        answer = json.loads(self.dump("--leave-running", "--json"))
        self.assertEqual((answer["ok"], answer["pid"], answer["left_running"]), (True, self.pid, True))
        self.assertEqual([p["name"] for p in answer["phases"]], ["copy out", "CRIU, all of it"])
        self.still_runs("2\n")
        self.fails(1, "restore", self.target, says=(f"needs process id {self.pid}", "ticker"))

    def test_detach(self):
        self.tick()
        self.dump()
        self.program.wait(60)
        restored = self.restore("--detach", "--json")
        answer = json.loads(restored.stdout.readline())
        self.assertEqual((answer["pid"], answer["detached"]), (self.pid, True))
        self.assertEqual(restored.wait(60), 0)
        self.assertEqual(self.tick(restored), "2\n")
        os.kill(self.pid, signal.SIGKILL)

    def test_tree_with_a_pipe_of_its_own(self):
        program = subprocess.Popen(["sh", "-c", f"{common.arguments.ticker} | cat; exit 5"], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
                                   start_new_session=True)
        self.addCleanup(self.end, program)
        self.assertEqual(self.tick(program), "1\n")
        self.pid = program.pid
        self.dump()
        program.wait(60)
        restored = self.restore()
        self.assertEqual(self.tick(restored), "2\n")
        restored.stdin.close()
        self.assertEqual(restored.wait(60), 5)

    def on_terminal(self, *command):
        """Starts `command` as the leader of a session on a terminal of its own. Returns it and the terminal's other end."""
        ours, theirs = pty.openpty()

        def lead():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        program = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=self.env, start_new_session=True,
                                   preexec_fn=lead)
        os.close(theirs)
        self.addCleanup(os.close, ours)
        self.addCleanup(self.end, program)
        return program, ours

    @staticmethod
    def says(terminal, wanted):
        """Reads what is shown on the terminal until it has `wanted`."""
        shown = ""
        while wanted not in shown:
            if not select.select([terminal], [], [], 60)[0]:
                raise AssertionError(f"no {wanted!r} in {shown!r}")
            shown += os.read(terminal, 4096).decode()

    def ticks(self, terminal, count):
        os.write(terminal, b"\n")
        self.says(terminal, f"{count}\r\n")

    def moves_to_another_terminal(self, pid, terminal):
        self.daemon.plan["CHECK"] = lambda values, fds: bytes(16)
        self.daemon.plan["WATCH"] = self.without_session
        self.pid = pid
        self.dump("--allow-no-cuda")
        return self.on_terminal(common.arguments.bennu, "restore", "--quiet", self.target)

    def goes_on_there(self, restored, terminal):
        self.ticks(terminal, 2)
        os.write(terminal, b"\x03")
        self.assertEqual(restored.wait(60), 128 + signal.SIGINT)

    def test_terminal(self):
        program, terminal = self.on_terminal(common.arguments.ticker)
        self.ticks(terminal, 1)
        restored = self.moves_to_another_terminal(program.pid, terminal)
        program.wait(60)
        self.goes_on_there(*restored)
        self.fails(1, "restore", self.target, says="it belongs to a terminal: restore it from one")

    def test_job_of_a_shell_on_a_terminal(self):
        shell, terminal = self.on_terminal("/bin/sh", "-c", f"{common.arguments.ticker}; echo ended $?; read line")
        self.ticks(terminal, 1)
        with open(f"/proc/{shell.pid}/task/{shell.pid}/children", encoding="utf-8") as f:
            job = int(f.read())
        restored = self.moves_to_another_terminal(job, terminal)
        self.says(terminal, "ended 137")
        self.goes_on_there(*restored)

    def nothing_left(self):
        self.assertFalse(os.path.exists(self.target))
        self.assertTrue(os.path.exists(self.target + ".log"))

    def test_plugin_fails(self):
        self.tick()
        self.env["CLI_TEST_PLUGIN_FAILS"] = "1"
        self.daemon.plan["WATCH"] = self.without_session
        self.fails(1, "dump", self.pid, self.target, says=("CRIU cannot save", self.target + ".log"))
        self.nothing_left()
        self.still_runs("2\n")

    def test_session_fails(self):
        self.tick()
        os.mkdir(self.target)
        self.env["CLI_TEST_PLUGIN_FAILS"] = "1"
        self.session_error = fake_bennud.Refusal(110, "the GPU did not come to rest in 5 s", "gate")
        error = self.fails_in_json(1, "dump", self.pid, self.target)
        self.assertEqual(error["stage"], "gate")
        self.assertIn("did not come to rest", error["message"])
        self.assertEqual(os.listdir(self.target), [], "a directory that was there stays, empty")
        self.still_runs("2\n")

    def test_criu_fails(self):
        """A connected Unix socket that leads out of the tree: CRIU says why, so do we."""
        ours, theirs = socket.socketpair()
        program = subprocess.Popen(["sleep", "1000"], stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)
        self.addCleanup(self.end, program)
        theirs.close()
        self.addCleanup(ours.close)
        self.daemon.plan["WATCH"] = self.without_session
        self.fails(1, "dump", program.pid, self.target, says="connected Unix socket to a process outside")
        self.nothing_left()
        self.assertIsNone(program.poll())

    def test_no_manifest_is_no_checkpoint(self):
        self.writes_manifest = False
        self.fails(1, "dump", "--leave-running", self.pid, self.target, says=("wrote no manifest", "no complete checkpoint"))
        self.nothing_left()
        self.still_runs("1\n")
        # Of a process that was ended, CRIU's half stays: it is all there is.
        self.fails(1, "dump", self.pid, self.target, says=("wrote no manifest", "no complete checkpoint"))
        self.program.wait(60)
        self.fails(5, "restore", self.target, says="is not complete")

    def test_without_cuda(self):
        self.daemon.plan["CHECK"] = lambda values, fds: bytes(16)
        self.daemon.plan["WATCH"] = self.without_session
        self.tick()
        self.dump("--allow-no-cuda")
        self.program.wait(60)
        self.assertFalse(os.path.exists(os.path.join(self.target, "bennu-manifest.img")))
        restored = self.restore()
        self.assertEqual(self.tick(restored), "2\n")

    def test_restore_fails(self):
        self.dump()
        self.program.wait(60)
        os.truncate(os.path.join(self.target, "core-%d.img" % self.pid), 10)
        done = self.bennu("restore", self.target)
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertIn("CRIU cannot restore", done.stderr)
        self.assertFalse(os.path.exists(f"/proc/{self.pid}"))

    def test_damaged_packs(self):
        self.dump()
        self.program.wait(60)
        pack = os.path.join(self.target, "bennu-pack-3.img")
        self.fails(5, "inspect", "--verify", self.target, says="")
        os.truncate(pack, 4096)
        self.fails(5, "restore", self.target, says=("bennu-pack-3.img", "4096"))
        self.fails(5, "inspect", "--verify", self.target, says=("bennu-pack-3.img", "4096"))
        os.unlink(pack)
        self.fails(5, "restore", self.target, says="bennu-pack file is missing")

    def test_restore_session_fails(self):
        """Without its GPU memory the program must not go on."""
        self.dump()
        self.program.wait(60)
        self.session_error = fake_bennud.Refusal(12, "GPU 0 has 2 GB free, 3 GB are needed: free some", "load")
        done = self.bennu("restore", self.target)
        self.assertEqual(done.returncode, 1)
        self.assertIn("3 GB are needed", done.stderr)
        self.assertFalse(os.path.exists(f"/proc/{self.pid}"))

    def test_daemon_that_dies_after_a_restore(self):
        """CRIU and the plugin in it know that all went well: the program stays."""
        def silent(values, fds):
            self.daemon.progress("waiting", 0, 0)
            self.daemon.local.peer.shutdown(socket.SHUT_RDWR)
            return b""
        self.tick()
        self.dump()
        self.program.wait(60)
        self.daemon.plan["WATCH"] = silent
        restored = self.restore()
        self.assertEqual(self.tick(restored), "2\n")
        restored.stdin.close()
        self.assertEqual(restored.wait(60), 42)

    def test_interrupted_too_late(self):
        """Ctrl-C reaches CRIU, too: torn from its tasks it would leave them stopped. A plugin that does not hear of it goes on."""
        def interrupt(values, fds):
            self.daemon.progress("waiting", 0, 0)
            os.killpg(dump.pid, signal.SIGINT)
            os.killpg(dump.pid, signal.SIGTERM)
            return self.watch(values, fds)

        self.tick()
        self.daemon.plan["WATCH"] = interrupt
        dump = subprocess.Popen([common.arguments.bennu, "dump", "-R", str(self.pid), self.target], env=self.env,
                                start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.addCleanup(self.end, dump)
        out, err = dump.communicate(timeout=60)
        self.assertEqual((dump.returncode, err), (0, ""), out)
        self.still_runs("2\n")


if __name__ == "__main__":
    rest = common.parse("--plugin", "--ticker", "--manifest")
    if not as_root():
        print("needs root")
        sys.exit(77)
    unittest.main(argv=rest)
