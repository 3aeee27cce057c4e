#!/usr/bin/env python3
"""The daemon is killed at every step of a dump: either there is no checkpoint or a complete one, and the application goes on."""

import os
import shutil

import fault
from fault import Application, Daemon, FaultTest, MANIFEST, wait_for

DOWN = [f"{step}:{when}" for step, whens in (
    ("find", "be"), ("gate", "be"), ("hand-over", "boe"), ("copy", "be"), ("guard", "be"), ("evict", "boe"), ("driver-lock", "boe"),
    ("driver-checkpoint", "boe"), ("purge", "be"), ("commit", "bo")) for when in
    ({"b": "begin", "o": "one", "e": "end"}[w] for w in whens)]
# The manifest is there, but CRIU never hears that all is well.
TOLD_NOBODY = ["commit:end", "reply:begin"]
# The dump has succeeded; the processes are left running.
UP = ["reply:end"] + [f"{step}:{when}" for step in ("driver-restore", "driver-unlock", "give-back", "open-gate") for when in
                      ("begin", "one", "end")] + ["copy-end:end", "release:begin", "release:end", "forget:begin", "forget:end"]


class Dump(FaultTest):
    def setUp(self):
        super().setUp()
        self.app = Application(self.dir, self.env)

    def at(self, point, *options):
        """A dump by CRIU itself, so that nobody but the daemon cleans up. Returns its result and folder."""
        folder = self.new_dir()
        self.daemon = Daemon(self, point)
        result = self.criu("dump", folder, "-t", self.app.pid, *options)
        self.daemon.wait_killed()
        return result, folder

    def stop(self):
        self.daemon.stop()
        self.daemon = None

    def failed(self, point):
        result, folder = self.at(point, "--leave-running")
        self.assertNotEqual(result, 0)
        self.wait_state("running", "no agent")
        self.app.go_on()
        wait_for(lambda: not self.packs(folder) and MANIFEST not in os.listdir(folder), f"an empty folder: {os.listdir(folder)}")
        self.assertNotIn("inventory.img", os.listdir(folder))
        shutil.rmtree(folder)

    def test_nothing_without_manifest(self):
        for point in DOWN + TOLD_NOBODY:
            with self.subTest(point):
                self.failed(point)
                self.stop()
        self.daemon = Daemon(self)
        self.cycle()
        self.stop()

    def test_complete_and_running(self):
        for point in UP:
            with self.subTest(point):
                result, folder = self.at(point, "--leave-running")
                self.assertEqual(result, 0)
                self.wait_state("running", "no agent")
                self.app.go_on()
                self.assertIn(MANIFEST, os.listdir(folder))
                self.stop()
                last = folder
        self.daemon = Daemon(self)
        fault.vanish(self.app.pid)
        self.restore(last)
        self.cycle()
        self.stop()

    def test_complete_and_gone(self):
        for point in ("reply:end", "driver-restore:begin", "forget:end"):
            with self.subTest(point):
                pids = self.app.pids()
                result, folder = self.at(point)
                self.assertEqual(result, 0)
                fault.bury(pids)
                self.assertIn(MANIFEST, os.listdir(folder))
                self.restore(folder)
                self.stop()

    def test_killed_again_while_it_recovers(self):
        for point in ("driver-checkpoint:end,give-back:one", "driver-checkpoint:end,driver-restore:one,open-gate:one",
                      "evict:one,allocate:end,copy-in:one,copy-end:begin"):
            with self.subTest(point):
                self.failed(point)
                self.stop()

    def test_command_says_so_and_leaves_nothing(self):
        self.daemon = Daemon(self, "driver-checkpoint:end")
        done = self.bennu("dump", self.app.pid, self.path("ck"))
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.daemon.wait_killed()
        self.wait_state("running", "no agent")
        self.app.go_on()
        self.assertFalse(os.path.exists(self.path("ck")))
        self.cycle()
        self.stop()

    def test_after_the_processes_were_let_go(self):
        """With --leave-running the rest is written while they run, and the command waits for it."""
        for point in ("reply:end", "driver-restore:one", "give-back:begin", "open-gate:end", "forget:end", "commit:begin", "commit:one"):
            with self.subTest(point):
                self.daemon = Daemon(self, point)
                done = self.bennu("dump", "--leave-running", self.app.pid, self.path("ck"))
                self.assertEqual(done.returncode, 1)
                self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
                self.daemon.wait_killed()
                self.wait_state("running", "no agent")
                self.app.go_on()
                self.assertFalse(os.path.exists(self.path("ck")))
                self.stop()
        self.daemon = Daemon(self, "commit:end")
        self.succeeds("dump", "--leave-running", self.app.pid, self.path("ck"))
        self.daemon.wait_killed()
        self.wait_state("running", "no agent")
        self.app.go_on()
        self.assertIn(MANIFEST, os.listdir(self.path("ck")))
        fault.vanish(self.app.pid)
        self.restore(self.path("ck"))
        self.stop()

    def test_ahead_of_a_dump(self):
        """What was copied is removed, and nothing else is noticed."""
        for point, *command in (("pre-gate:begin", "pre-dump"), ("pre-gate:one", "pre-dump"), ("pre-gate:end", "pre-dump"),
                                ("pre-copy:one", "pre-dump"), ("pre-copy:one", "dump", "--live", "--leave-running"),
                                ("take-over:one", "dump", "--live", "--leave-running")):
            with self.subTest(point):
                self.daemon = Daemon(self, point)
                into = [self.path("ck")] if command[0] == "dump" else []
                done = self.bennu(*command, self.app.pid, *into)
                self.assertNotEqual(done.returncode, 0)
                self.daemon.wait_killed()
                self.wait_state("running", "no agent")
                self.app.go_on()
                self.assertFalse(os.path.exists(self.path("ck")))
                spool = self.path("run", "spool")
                self.assertEqual(os.listdir(spool) if os.path.isdir(spool) else [], [])
                self.stop()
        self.daemon = Daemon(self)
        self.succeeds("pre-dump", self.app.pid)
        self.cycle()
        self.stop()

    def test_private_daemon(self):
        """No daemon runs: the plugin's own has the same protection."""
        for point in ("hand-over:end", "evict:end", "driver-checkpoint:one", "driver-checkpoint:end", "commit:one", "reply:begin"):
            with self.subTest(point):
                folder = self.new_dir()
                env = {**self.env, "BENNU_RUNDIR": self.path("none"), "BENNUD_TEST_KILL": point}
                self.assertNotEqual(self.criu("dump", folder, "-t", self.app.pid, "--leave-running", env=env), 0)
                self.app.go_on()
                wait_for(lambda: not self.packs(folder) and MANIFEST not in os.listdir(folder), f"an empty folder: {folder}")
                wait_for(lambda: not self.privates(), "the end of the private daemon")
        folder = self.new_dir()
        env = {**self.env, "BENNU_RUNDIR": self.path("none"), "BENNUD_TEST_KILL": "reply:end"}
        self.assertEqual(self.criu("dump", folder, "-t", self.app.pid, "--leave-running", env=env), 0)
        self.app.go_on()
        self.assertIn(MANIFEST, os.listdir(folder))
        wait_for(lambda: not self.privates(), "the end of the private daemon")


if __name__ == "__main__":
    fault.main()
