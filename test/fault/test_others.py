#!/usr/bin/env python3
"""Whoever else can be killed: the keeper, keeper and worker together, CRIU, the command line; and daemons that die again and again."""

import os
import signal

import fault
from fault import Application, Daemon, FaultTest, MANIFEST, alive, text_of, wait_for


class Others(FaultTest):
    def setUp(self):
        super().setUp()
        self.app = Application(self.dir, self.env)

    def stop(self):
        self.daemon.stop()
        self.daemon = None

    # ---- the daemon's two halves

    def test_keeper(self):
        """The worker goes on, says so once, and ends in order."""
        self.daemon = Daemon(self)
        worker = self.daemon.first
        self.daemon.popen.kill()
        self.daemon.popen.wait()
        wait_for(lambda: "the keeper is gone" in text_of(self.daemon.log), "a word about it")
        self.succeeds("suspend", self.app.pid)
        self.wait_state("suspended")
        self.succeeds("resume", self.app.pid)
        self.app.go_on()
        self.cycle()
        self.succeeds("suspend", self.app.pid)
        os.kill(worker, signal.SIGTERM)
        fault.bury([worker])
        self.app.go_on()
        self.assertEqual(text_of(self.daemon.log).count("the keeper is gone"), 1)
        self.daemon = Daemon(self)
        self.cycle()
        self.stop()

    def test_both_with_memory_in_place(self):
        """Nobody is left: the agents notice it and open their gates."""
        for point in ("gate:end", "hand-over:one", "copy:end"):
            with self.subTest(point):
                self.daemon = Daemon(self, point)
                os.kill(self.daemon.popen.pid, signal.SIGSTOP)
                self.assertNotEqual(self.criu("dump", self.new_dir(), "-t", self.app.pid, "--leave-running"), 0)
                self.app.go_on()
                self.daemon.end()
                self.daemon = None
                self.app.go_on()
        self.daemon = Daemon(self)
        self.cycle()
        self.stop()

    def test_both_with_memory_away(self):
        """What only they had is lost. The processes never run without it."""
        self.daemon = Daemon(self)
        self.succeeds("suspend", self.app.pid)
        self.daemon.end()
        self.daemon = Daemon(self)
        self.assertNotIn("running", self.ps().values())
        self.assertNotEqual(self.bennu("resume", self.app.pid).returncode, 0)
        self.assertNotEqual(self.bennu("dump", self.app.pid, self.path("ck")).returncode, 0)
        self.assertNotIn("running", self.ps().values())
        self.assertIsNone(self.app.trouble())
        self.stop()

    def test_both_with_memory_on_the_disk(self):
        """What is on the disk is found there, however often."""
        self.daemon = Daemon(self)
        self.succeeds("suspend", "--to", "disk", self.app.pid)
        spool = self.path("run", "spool")
        folder, = os.listdir(spool)
        for _ in range(2):
            self.daemon.end()
            self.daemon = Daemon(self)
            self.wait_state("suspended")
        os.kill(self.daemon.first, signal.SIGKILL)  # the keeper has it, too
        self.daemon.wait_killed()
        self.wait_state("suspended")
        self.assertEqual(os.listdir(spool), [folder])
        self.succeeds("resume", self.app.pid)
        self.app.go_on()
        self.assertEqual(os.listdir(spool), [])
        self.cycle()
        self.stop()

    def test_both_after_a_move_to_the_disk(self):
        self.daemon = Daemon(self, None, "--gpu-budget", "60M", "--host-limit", "60M")
        self.succeeds("suspend", "--to", "host", self.app.pid)
        os.mkdir(self.path("other"))
        other = Application(self.path("other"), self.env)
        self.addCleanup(fault.vanish, other.pid)
        self.succeeds("suspend", "--to", "host", other.pid)  # whose memory is lost
        self.daemon.end()
        self.daemon = Daemon(self)
        self.wait_state("suspended")
        self.succeeds("resume", self.app.pid)
        self.app.go_on()
        self.stop()

    def test_private_one_leaves_others_alone(self):
        """What rests on the disk is the business of a daemon that stays."""
        os.mkdir(self.path("other"))
        other = Application(self.path("other"), self.env)
        self.addCleanup(fault.vanish, other.pid)
        self.daemon = Daemon(self)
        self.succeeds("suspend", "--to", "disk", self.app.pid)
        self.daemon.end()
        self.daemon = None
        spool, counts = self.path("run", "spool"), self.app.counts()
        folders = os.listdir(spool)
        env = {**self.env, "BENNUD_TEST_KILL": "evict:end"}
        self.assertNotEqual(self.criu("dump", self.new_dir(), "-t", other.pid, "--leave-running", env=env), 0)
        other.go_on()
        wait_for(lambda: not self.privates(), "the end of the private daemon")
        self.assertEqual((os.listdir(spool), self.app.counts()), (folders, counts))
        self.daemon = Daemon(self)
        self.wait_state("suspended")
        open(os.path.join(spool, *folders, ".bennu-suspended.tmp"), "w", encoding="utf-8").close()  # a write that was cut off
        self.succeeds("resume", self.app.pid)
        self.app.go_on()
        self.assertEqual(os.listdir(spool), [])
        self.stop()

    def test_both_with_nobody_left(self):
        """A folder is removed when its processes are gone, and when it does not tell whose it is."""
        spool = self.path("run", "spool")
        os.mkdir(self.path("other"))
        other = Application(self.path("other"), self.env)
        self.addCleanup(fault.vanish, other.pid)
        self.daemon = Daemon(self)
        folders = []
        for app in (self.app, other):
            self.succeeds("suspend", "--to", "disk", app.pid)
            folders += [f for f in os.listdir(spool) if f not in folders]
        self.daemon.end()
        note = os.path.join(spool, folders[0], "bennu-suspended")
        os.truncate(note, os.path.getsize(note) - 1)
        fault.vanish(other.pid)
        self.daemon = Daemon(self)
        self.assertEqual(os.listdir(spool), [])
        self.assertIsNone(self.app.trouble())
        self.stop()

    def test_again_and_again(self):
        """Five deaths in a minute: the next worker waits, and the record with it."""
        self.daemon = Daemon(self)
        self.succeeds("suspend", self.app.pid)
        worker = self.daemon.first
        for _ in range(6):
            os.kill(worker, signal.SIGKILL)
            worker = self.daemon.wait_worker(other_than=worker)
        self.daemon.wait_ready()
        self.wait_state("suspended")
        self.succeeds("resume", self.app.pid)
        self.app.go_on()
        self.stop()

    def test_sigterm_to_the_worker(self):
        self.daemon = Daemon(self)
        self.succeeds("suspend", self.app.pid)
        os.kill(self.daemon.first, signal.SIGTERM)
        self.assertEqual(self.daemon.popen.wait(fault.PATIENCE), 0)
        self.daemon = None
        self.app.go_on()

    def test_cannot_start(self):
        """What goes wrong at the first start is told, not tried again."""
        self.env["BENNU_DRIVER"] = "/nonexistent/libcuda.so.1"
        done = fault.subprocess.run([fault.BENNUD], env=self.env, stderr=fault.subprocess.PIPE, timeout=fault.PATIENCE, text=True,
                                    check=False)
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)

    # ---- CRIU

    def checkpoint_or_none(self, folder, pids):
        """CRIU has ended. The application goes on and there is no checkpoint, or there is one that can be restored."""
        before = self.app.counts()

        def gone():
            return not any(alive(p) for p in pids)

        def goes_on():  # one that CRIU has killed may be seen for a moment, but does not count on
            return (all(len(now) >= len(was) + 2 for now, was in zip(self.app.counts(), before))
                    and set(self.ps().values()) <= {"running", "no agent"})
        wait_for(lambda: gone() or goes_on(), "gone, or going on")
        if not gone():
            self.app.go_on()
            if MANIFEST in os.listdir(folder):
                self.assertIn("inventory.img", os.listdir(folder))
            else:
                wait_for(lambda: not self.packs(folder), f"no packs: {os.listdir(folder)}")
            return "goes on"
        fault.bury(pids)
        self.assertIn(MANIFEST, os.listdir(folder))
        self.restore(folder)
        return "saved"

    def test_criu_at_its_stages(self):
        self.daemon = Daemon(self)
        for stage in ("pre-dump", "post-dump"):
            with self.subTest(stage):
                script, folder = self.path(f"at-{stage}"), self.new_dir()
                with open(script, "w", encoding="utf-8") as f:
                    f.write(f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = {stage} ] && kill -9 $PPID\nexit 0\n')
                os.chmod(script, 0o755)
                pids = self.app.pids()
                result = self.criu("dump", folder, "-t", self.app.pid, "--action-script", script)
                self.assertEqual(result, -signal.SIGKILL, stage)
                self.checkpoint_or_none(folder, pids)
        self.cycle()
        self.stop()

    def test_criu_in_a_restore(self):
        self.daemon = Daemon(self)
        folder, pids = self.new_dir(), self.app.pids()
        self.succeeds("dump", self.app.pid, folder)
        fault.bury(pids)
        for stage in ("pre-restore", "post-restore", "pre-resume"):
            with self.subTest(stage):
                script = self.path(f"at-{stage}")
                with open(script, "w", encoding="utf-8") as f:
                    f.write(f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" = {stage} ] && kill -9 $PPID\nexit 0\n')
                os.chmod(script, 0o755)
                self.assertEqual(self.criu("restore", folder, "-d", "--action-script", script), -signal.SIGKILL)
                for p in pids:  # what CRIU leaves half-made is not ours to run
                    try:
                        os.kill(p, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                fault.bury(pids)
        self.restore(folder)
        self.cycle()
        self.stop()

    # ---- the worker, in a restore

    def test_worker_in_a_restore(self):
        """It ends, with an error, and nothing is left of it but the checkpoint."""
        self.daemon = Daemon(self)
        folder, pids = self.new_dir(), self.app.pids()
        self.succeeds("dump", self.app.pid, folder)
        fault.bury(pids)
        before = {n for n in os.listdir(folder) if not n.endswith(".log")}
        for point in ("driver-restore:begin", "driver-unlock:one", "give-back:one", "open-gate:end", "forget:end"):
            for way in ("criu", "bennu"):
                with self.subTest((point, way)):
                    self.daemon = Daemon(self, point)
                    if way == "criu":
                        self.assertNotEqual(self.criu("restore", folder, "-d"), 0)
                    else:
                        done = self.bennu("restore", "--detach", folder)
                        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
                    fault.bury(pids)
                    self.daemon.wait_killed()
                    self.assertLessEqual(before, set(os.listdir(folder)))
        self.daemon = Daemon(self)
        self.restore(folder)
        self.cycle()
        self.stop()

    # ---- the command line

    def test_bennu_dump(self):
        """CRIU goes on by itself: what is looked at is what it and the daemon have made of it in the end."""
        self.daemon = Daemon(self)
        for step in ("bennu-command.json", "dump.log", "bennu-pack-0.img"):
            with self.subTest(step):
                folder, pids = self.path(f"by-{step}"), self.app.pids()
                bennu = fault.subprocess.Popen([fault.BENNU, "dump", str(self.app.pid), folder], env=self.env,
                                               stdout=fault.subprocess.DEVNULL, stderr=fault.subprocess.DEVNULL)
                wait_for(lambda: os.path.exists(f"{folder}/{step}") or bennu.poll() is not None, step)
                orphans = []
                if bennu.poll() is None:
                    bennu.send_signal(signal.SIGSTOP)  # starts nothing more that would be missed
                    wait_for(lambda: bennu.poll() is not None or fault.stat_of(bennu.pid)[0] in "TZ", "a stop")
                    orphans = fault.descendants(bennu.pid)
                bennu.kill()
                bennu.wait()
                fault.bury([p for p in orphans if p not in pids])
                self.checkpoint_or_none(folder, pids)
        self.cycle()
        self.stop()

    # ---- Ctrl-C

    def interrupt_at(self, stage, sig):
        """CRIU's configuration for a signal to bennu at this stage of its work, twice."""
        script, config = self.path(f"at-{stage}"), self.path("interrupt.conf")
        with open(script, "w", encoding="utf-8") as f:
            f.write('#!/bin/sh\n'
                    f'[ "$CRTOOLS_SCRIPT_ACTION" = {stage} ] || exit 0\n'
                    'read -r _ _ _ bennu _ </proc/$PPID/stat\n'
                    f'kill -{sig.value} $bennu; kill -{sig.value} $bennu\n'
                    # Taken, once it is no longer pending.
                    'while ! grep -q "^ShdPnd:.0*$" /proc/$bennu/status; do :; done\n')
        os.chmod(script, 0o755)
        with open(config, "w", encoding="utf-8") as f:
            f.write(f"action-script {script}\n")
        return config

    def interrupted(self, stage, sig, *command):
        env = {**self.env, "CRIU_CONFIG_FILE": self.interrupt_at(stage, sig)}
        done = fault.subprocess.run([fault.BENNU, *map(str, command)], env=env, stdin=fault.subprocess.DEVNULL, text=True,
                                    stdout=fault.subprocess.PIPE, stderr=fault.subprocess.PIPE, timeout=2 * fault.PATIENCE, check=False,
                                    preexec_fn=lambda: signal.signal(sig, signal.SIG_DFL))
        self.assertEqual(done.returncode, 128 + sig, done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertIn("interrupted", done.stderr)

    def test_interrupted_dump(self):
        self.daemon = Daemon(self)
        for sig in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(sig):
                self.interrupted("pre-dump", sig, "dump", self.app.pid, self.path("ck"))
                self.assertFalse([n for n in os.listdir(self.dir) if n.startswith("ck")])
                self.app.go_on()
                self.wait_state("running", "no agent")
        self.cycle()
        self.stop()

    def test_interrupted_restore(self):
        self.daemon = Daemon(self)
        folder, pids = self.new_dir(), self.app.pids()
        self.succeeds("dump", self.app.pid, folder)
        fault.bury(pids)
        before = sorted(os.listdir(folder))
        for options in ([], ["--detach"]):
            for stage in ("pre-restore", "post-restore"):
                with self.subTest((stage, options)):
                    self.interrupted(stage, signal.SIGINT, "restore", *options, folder)
                    fault.bury(pids)
                    self.assertEqual(sorted(os.listdir(folder)), before)
        self.restore(folder)
        self.cycle()
        self.stop()


if __name__ == "__main__":
    fault.main()
