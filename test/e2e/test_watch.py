"""Periodic checkpoints: bennu watch."""

import json
import os
import re
import shutil
import signal
import subprocess

import harness
from harness import BENNU, BUILD, Case, text_of

CUT = f"{BUILD}/test/cr/cut"
NAME = re.compile(r"\d{8}T\d{6}Z")
LOCK = ".bennu-watch.lock"
MIB = 1 << 20


class Watch(Case):
    sim = {"BENNU_SIM_STATE_MB": "1", "BENNU_SIM_MEMORY": "256M"}

    def cut(self):
        return self.start(CUT, "--hot=4", "--cold=16")

    def store(self, *names):
        return self.path("store", *names)

    def watch(self, program, *args):
        """Returns the process; what it prints is in `self.lines` and `self.said`."""
        n = next(harness._numbers)
        self.stdout, self.stderr = self.path(f"out-watch-{n}"), self.path(f"err-watch-{n}")
        with open(self.stdout, "wb") as out, open(self.stderr, "wb") as err:
            watcher = subprocess.Popen([BENNU, "watch", str(program.pid), self.store(), "--json", *args], env=self.env,
                                       stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
        self.addCleanup(watcher.wait, harness.PATIENCE)
        self.addCleanup(watcher.kill)
        return watcher

    def lines(self):
        """What it has said of each checkpoint, in whole lines."""
        return [json.loads(line) for line in text_of(self.stdout).splitlines(keepends=True) if line.endswith("\n")]

    def made(self):
        return [line for line in self.lines() if line["ok"]]

    def wait_for_made(self, watcher, n):
        harness.wait_for(lambda: len(self.made()) >= n, f"{n} checkpoints",
                         lambda: None if watcher.poll() is None else "it has ended: " + text_of(self.stderr))

    def end(self, watcher):
        """Returns the names of the checkpoints that it has told of, all of them."""
        watcher.send_signal(signal.SIGTERM)
        self.assertEqual(watcher.wait(harness.PATIENCE), 0, text_of(self.stderr))
        return [os.path.basename(line["directory"]) for line in self.made()]

    def entries(self):
        return sorted(set(os.listdir(self.store())) - {LOCK})

    def good(self, name):
        self.assertRegex(name, NAME)
        self.assertIs(self.ok_json("inspect", "--verify", self.store(name))["verified"], True)

    def test_the_newest_are_kept(self):
        self.start_daemon()
        program = self.cut()
        # At rest it changes nothing, so what is new is known, from the first on: of a pack that is used by less than half
        # the rest is copied, and which chunks share a pack is left to the threads.
        program.rest()
        # What somebody else has put there stays: also what is called like a checkpoint of ours, and is none.
        os.mkdir(self.store())
        self.dump(program, "--leave-running", name="store/first")
        os.makedirs(self.store("20200101T000000Z", "notes"))
        with open(self.store("20200102T000000Z"), "wb"):
            pass
        others = self.entries()
        watcher = self.watch(program, "--every=1s", "--keep=2")
        self.wait_for_made(watcher, 3)
        names = self.end(watcher)
        self.assertEqual(text_of(self.stderr), "")
        self.assertEqual(sorted(names), names)
        self.assertEqual(self.entries(), sorted(others + names[-2:]))
        for line in self.made():
            self.assertEqual((line["pid"], line["left_running"]), (program.pid, True))
            self.assertGreaterEqual(line["shared_bytes"], 16 * 2 * MIB)
            self.assertLess(line["own_bytes"], 2 * MIB)
        for name in names[-2:]:
            self.good(name)
        os.kill(program.pid, signal.SIGUSR2)
        program.go_on()
        program.kill()
        shutil.rmtree(self.store(names[-1]))
        program.will_go_back()
        self.restore(program, self.store(names[-2]))
        os.kill(program.pid, signal.SIGUSR2)
        program.go_on()

    def test_it_ends_with_the_process(self):
        self.start_daemon()
        program = self.cut()
        watcher = self.watch(program, "--every=1h")
        self.wait_for_made(watcher, 1)
        self.refused(1, "watch", program.pid, self.store(), says=("another bennu watch", self.store()))
        program.kill()
        self.assertEqual(watcher.wait(harness.PATIENCE), 0)
        self.assertEqual(text_of(self.stderr), "")
        self.good(*self.entries())

    def slow(self, program):
        """So little bandwidth that it would take minutes: one that is copying."""
        watcher = self.watch(program, "--bandwidth=100K")
        harness.wait_for(lambda: os.path.isdir(self.store()) and
                         any(os.path.exists(self.store(name, "bennu-pack-0.img")) for name in self.entries()), "it copies",
                         lambda: None if watcher.poll() is None else text_of(self.stderr))
        return watcher

    def test_a_signal_undoes_what_is_under_way(self):
        self.start_daemon()
        program = self.cut()
        self.assertEqual(self.end(self.slow(program)), [])
        self.assertEqual(text_of(self.stderr), "")
        self.assertEqual(self.entries(), [])
        # Killed, it can do nothing any more: the dump undoes itself.
        watcher = self.slow(program)
        watcher.kill()
        harness.wait_for(lambda: self.entries() == [], "it is undone")
        program.go_on()

    def test_a_failure_leaves_nothing_and_the_next_one_succeeds(self):
        self.start_daemon(BENNUD_TEST_KILL="evict:end")
        program = self.cut()
        watcher = self.watch(program, "--every=1s")
        self.wait_for_made(watcher, 1)
        names = self.end(watcher)
        said = text_of(self.stderr).splitlines()
        lines = self.lines()
        self.assertIs(lines[0]["ok"], False)
        self.assertEqual(len(said), len(lines) - len(names))
        for text in said:
            self.assertRegex(text, rf"^bennu watch: no checkpoint {NAME.pattern}: ")
        self.assertEqual(self.entries(), names)
        self.good(names[0])
        program.go_on()

    def test_begun_again(self):
        """Names never go back, and a checkpoint that is not whole is no parent."""
        self.start_daemon()
        program = self.cut()
        watcher = self.watch(program, "--compress=1")
        self.wait_for_made(watcher, 1)
        name, = self.end(watcher)
        os.rename(self.store(name), self.store("20990101T000000Z"))
        for pack in [p for p in os.listdir(self.store("20990101T000000Z")) if p.startswith("bennu-pack-")]:
            os.truncate(self.store("20990101T000000Z", pack), 1)
        watcher = self.watch(program, "--keep=1")
        self.wait_for_made(watcher, 1)
        self.assertEqual(self.end(watcher), ["20990101T000001Z"])
        self.assertEqual(self.made()[0]["shared_bytes"], 0)
        self.assertEqual(self.entries(), ["20990101T000001Z"])
        self.good("20990101T000001Z")

    def test_wrong_usage(self):
        for time in ("10", "0s", "m", "5d", "1s1", "99999999h", "-1s"):
            self.refused(2, "watch", os.getpid(), self.store(), f"--every={time}", says=f"not '{time}'")
        self.refused(2, "watch", os.getpid(), self.store(), "--keep=0", says="from 1 on")
        self.refused(1, "watch", 4194304, self.store(), says="there is no process 4194304")
        self.assertFalse(os.path.exists(self.store()))


if __name__ == "__main__":
    harness.main()
