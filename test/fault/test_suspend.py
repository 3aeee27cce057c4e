#!/usr/bin/env python3
"""The daemon is killed at every step of suspend, resume and restore; a suspended process outlives it."""

import shutil

import fault
from fault import Application, Daemon, FaultTest, MANIFEST, wait_for

SUSPEND = ["gate:end", "hand-over:one", "hand-over:end", "copy:end", "guard:end", "evict:one", "evict:end", "driver-lock:one",
           "driver-lock:end", "driver-checkpoint:one", "driver-checkpoint:end", "suspended:begin"]
SUSPENDED = ["suspended:one", "suspended:end"]
# Nothing has been given back yet: it stays suspended.
ALLOCATE = ["allocate:begin", "allocate:end"]
RESUME = ["copy-in:begin", "copy-in:one"] + [f"{step}:{when}" for step in
                                             ("driver-restore", "driver-unlock", "give-back", "open-gate")
                                             for when in ("begin", "one", "end")] + [
    "copy-end:begin", "copy-end:end", "release:begin", "release:end", "forget:begin"]
RESTORE = ["driver-restore:begin", "driver-restore:one", "driver-unlock:one", "give-back:begin", "give-back:one", "give-back:end",
           "copy-end:begin", "copy-end:end", "open-gate:begin", "open-gate:one", "open-gate:end", "forget:end"]


# What differs between the tiers: where the bytes are when all is down, and on the way up.
TIER_SUSPEND = ["copy:end", "guard:end", "driver-checkpoint:end", "suspended:begin"]
TIER_RESUME = ["copy-in:begin", "copy-in:one", "driver-restore:one", "give-back:one", "copy-end:end", "open-gate:one",
               "forget:begin"]


# Memory that the processes create themselves takes the place of what they are given.
BARRED = ["give-back:end", "copy-end:begin", "move-in:one", "copy-end:one", "copy-end:end", "release:begin", "open-gate:one"]


class Suspended(FaultTest):
    program = {}  # of its environment

    def setUp(self):
        super().setUp()
        self.app = Application(self.dir, {**self.env, **self.program})

    def stop(self):
        self.daemon.stop()
        self.daemon = None

    def suspended(self):
        self.wait_state("suspended")
        self.assertIsNone(self.app.trouble())

    def killed_in_resume(self, point, tier="host"):
        self.daemon = Daemon(self, point)
        self.succeeds("suspend", "--to", tier, self.app.pid)
        self.assertNotEqual(self.bennu("resume", self.app.pid).returncode, 0)
        self.daemon.wait_killed()

    def runs_on(self):
        self.wait_state("running", "no agent")
        self.app.go_on()
        self.stop()

    def undoes_suspend(self, point):
        with self.subTest(point):
            self.daemon = Daemon(self, point)
            self.assertNotEqual(self.bennu("suspend", self.app.pid).returncode, 0)
            self.daemon.wait_killed()
            self.runs_on()


class Suspend(Suspended):
    def test_suspend(self):
        for point in SUSPEND:
            self.undoes_suspend(point)
        for point in SUSPENDED:
            with self.subTest(point):
                self.daemon = Daemon(self, point)
                self.assertNotEqual(self.bennu("suspend", self.app.pid).returncode, 0)
                self.daemon.wait_killed()
                self.suspended()
                self.succeeds("resume", self.app.pid)
                self.app.go_on()
                self.stop()
        self.daemon = Daemon(self)
        self.cycle()
        self.stop()

    def test_resume(self):
        for point in ALLOCATE + RESUME:
            with self.subTest(point):
                self.killed_in_resume(point)
                if point in ALLOCATE:
                    self.suspended()
                    self.succeeds("resume", self.app.pid)
                self.runs_on()
        self.daemon = Daemon(self)
        self.cycle()
        self.stop()

    def test_other_tiers(self):
        for tier in ("gpu", "disk"):
            points = [(p, False) for p in TIER_SUSPEND] + [(p, True) for p in SUSPENDED + ALLOCATE + TIER_RESUME]
            for point, down in points:
                with self.subTest(tier=tier, point=point):
                    self.daemon = Daemon(self, point)
                    done = self.bennu("suspend", "--to", tier, self.app.pid)
                    if not down or point in SUSPENDED:
                        self.assertNotEqual(done.returncode, 0)
                    else:
                        self.assertEqual(done.returncode, 0, done.stderr)
                        self.assertNotEqual(self.bennu("resume", self.app.pid).returncode, 0)
                    self.daemon.wait_killed()
                    if point in SUSPENDED + ALLOCATE:
                        self.suspended()
                        self.succeeds("resume", self.app.pid)
                    self.runs_on()
                    self.assertEqual(fault.os.listdir(self.path("run", "spool")) if tier == "disk" else [], [])
        self.daemon = Daemon(self)
        self.cycle()
        self.stop()

    def test_killed_while_suspended_to_other_tiers(self):
        self.daemon = Daemon(self)
        for tier in ("gpu", "disk"):
            self.succeeds("suspend", "--to", tier, self.app.pid)
            for _ in range(2):
                worker = self.daemon.wait_worker()
                fault.os.kill(worker, fault.signal.SIGKILL)
                self.daemon.wait_worker(other_than=worker)
                self.daemon.wait_ready()
                self.suspended()
            self.succeeds("resume", self.app.pid)
            self.app.go_on()
        self.assertEqual(fault.os.listdir(self.path("run", "spool")), [])
        self.cycle()
        self.stop()

    def test_moves(self):
        """Killed while one tree makes room for another: both are whole."""
        fault.os.mkdir(self.path("other"))
        other = Application(self.path("other"), self.env)
        self.addCleanup(fault.vanish, other.pid)
        points = [("gpu", "--gpu-budget", point) for point in ("move:begin", "move:one", "moved:begin", "moved:end")]
        points += [("host", "--host-limit", point) for point in ("move:one", "moved:begin")]
        for tier, budget, point in points:
            with self.subTest(tier=tier, point=point):
                self.daemon = Daemon(self, point, budget, "60M")
                self.succeeds("suspend", "--to", tier, other.pid)
                self.assertNotEqual(self.bennu("suspend", "--to", tier, self.app.pid).returncode, 0)
                self.daemon.wait_killed()
                self.wait_state("running", "no agent")
                self.app.go_on()
                self.succeeds("resume", other.pid)
                other.go_on()
                self.stop()

    def test_killed_after_a_move(self):
        """What has made way is at its new place: others use the old one."""
        fault.os.mkdir(self.path("other"))
        other = Application(self.path("other"), self.env)
        self.addCleanup(fault.vanish, other.pid)
        for tier, budget in (("gpu", "--gpu-budget"), ("host", "--host-limit")):
            with self.subTest(tier=tier):
                self.daemon = Daemon(self, None, budget, "60M")
                self.succeeds("suspend", "--to", tier, other.pid)
                self.succeeds("suspend", "--to", tier, self.app.pid)
                fault.os.kill(self.daemon.first, fault.signal.SIGKILL)
                self.daemon.wait_killed()
                for app in (other, self.app):
                    self.succeeds("resume", app.pid)
                    app.go_on()
                self.stop()

    def test_ends_while_the_daemon_is_down_on_disk(self):
        self.daemon = Daemon(self)
        self.succeeds("suspend", "--to", "disk", self.app.pid)
        self.assertEqual(len(fault.os.listdir(self.path("run", "spool"))), 1)
        fault.os.kill(self.daemon.popen.pid, fault.signal.SIGSTOP)
        fault.os.kill(self.daemon.first, fault.signal.SIGKILL)
        fault.vanish(self.app.pid)
        fault.os.kill(self.daemon.popen.pid, fault.signal.SIGCONT)
        self.daemon.wait_killed()
        self.assertEqual(fault.os.listdir(self.path("run", "spool")), [])
        self.stop()

    def test_killed_while_suspended(self):
        """Twice, and then once more while the last but one worker's host memory is being read."""
        self.daemon = Daemon(self, ",,copy-end:begin")
        self.succeeds("suspend", self.app.pid)
        for _ in range(2):
            worker = self.daemon.wait_worker()
            fault.os.kill(worker, fault.signal.SIGKILL)
            self.daemon.wait_worker(other_than=worker)
            self.daemon.wait_ready()
            self.suspended()
        self.assertNotEqual(self.bennu("resume", self.app.pid).returncode, 0)
        self.wait_state("running", "no agent")
        self.app.go_on()
        self.succeeds("suspend", self.app.pid)
        self.succeeds("resume", self.app.pid)
        self.app.go_on()
        self.cycle()
        self.stop()

    def test_ends_while_the_daemon_is_down(self):
        self.daemon = Daemon(self)
        self.succeeds("suspend", self.app.pid)
        fault.os.kill(self.daemon.popen.pid, fault.signal.SIGSTOP)  # no new worker before the processes are gone
        fault.os.kill(self.daemon.first, fault.signal.SIGKILL)
        fault.vanish(self.app.pid)
        fault.os.kill(self.daemon.popen.pid, fault.signal.SIGCONT)
        self.daemon.wait_killed()
        wait_for(lambda: "brings 3 records" in fault.text_of(self.daemon.log), "three records")
        self.stop()
        self.assertNotIn("cannot", fault.text_of(self.path("bennud.log")))

    def test_sigterm_resumes_first(self):
        self.daemon = Daemon(self)
        self.succeeds("suspend", self.app.pid)
        self.stop()
        self.app.go_on()

    def test_sigterm_after_a_kill(self):
        self.daemon = Daemon(self)
        self.succeeds("suspend", self.app.pid)
        fault.os.kill(self.daemon.first, fault.signal.SIGKILL)
        self.daemon.wait_killed()
        self.stop()
        self.app.go_on()

    def test_restore(self):
        folder, pids = self.new_dir(), self.app.pids()
        self.daemon = Daemon(self)
        self.succeeds("dump", self.app.pid, folder)
        fault.bury(pids)
        self.stop()
        for point in RESTORE:
            with self.subTest(point):
                self.daemon = Daemon(self, point)
                self.app.forget()
                self.assertNotEqual(self.bennu("restore", "--detach", folder).returncode, 0)
                fault.bury(pids)
                self.daemon.wait_killed()
                self.assertIsNone(self.app.trouble())
                self.stop()
        self.assertIn(MANIFEST, fault.os.listdir(folder))
        self.daemon = Daemon(self)
        self.restore(folder)
        self.cycle()
        self.stop()
        shutil.rmtree(folder)


class Barred(Suspended):
    """Programs that a restore has brought to another GPU cannot take memory there from anybody."""
    program = {"BENNU_SIM_FAIL": "cuMemImportFromShareableHandle:1+=3"}

    def test_suspend(self):
        for point in ("evict:end", "driver-checkpoint:end", "suspended:begin"):
            self.undoes_suspend(point)

    def test_resume(self):
        for tier in ("host", "gpu", "disk"):
            for point in BARRED:
                with self.subTest(tier=tier, point=point):
                    self.killed_in_resume(point, tier)
                    self.runs_on()
        self.daemon = Daemon(self)
        self.cycle()
        self.stop()


if __name__ == "__main__":
    fault.main()
