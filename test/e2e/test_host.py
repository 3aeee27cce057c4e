"""Host memory, filled in by the daemon while CRIU restores the rest: every byte of it, and what happens when a part of that fails."""

import contextlib
import os
import signal
import subprocess

import harness
from harness import BENNU, Case, MEMCHECK, children_of, text_of, wait_for


class HostMemory(Case):
    much = ("--host=160M", "--keep")

    def filled(self, image, *args):
        """Restores; how many bytes the daemon has filled in."""
        answer = self.ok_json("restore", image, "--detach", *args)
        return sum(p["bytes"] for p in answer["phases"] if p["name"] == "host-memory")

    def restored(self, program, *args):
        program.restored = True
        return self.filled(self.path("ck"), *args)

    def test_one_process(self):
        self.start_daemon()
        program = self.memcheck(*self.much)
        for _ in range(2):
            self.dump(program)
            self.assertGreater(self.restored(program), 160 << 20)
            program.go_on()
            subprocess.run(["rm", "-r", self.path("ck")], check=True)

    def test_criu_alone(self):
        self.start_daemon()
        program = self.memcheck(*self.much)
        self.dump(program)
        self.assertEqual(self.restored(program, "--criu-memory"), 0)
        program.go_on()

    def test_not_for_little(self):
        self.start_daemon()
        program = self.memcheck()
        self.dump(program)
        self.assertEqual(self.restored(program), 0)
        program.go_on()

    def test_a_tree(self):
        self.start_daemon()
        program = self.memcheck("--children=2", "--host=60M", "--keep", roles=range(3))
        self.dump(program)
        self.assertGreater(self.restored(program), 180 << 20)
        program.go_on()

    def test_not_for_what_forked_processes_share(self):
        """CRIU gives them the same pages again, and only CRIU can."""
        self.start_daemon()
        forked = "import os, time; b = os.urandom(160 << 20); os.fork(); print(0, 0, 'ready', flush=True)\nwhile True: time.sleep(1)"
        program = self.start("/bin/sh", "-c", f'{MEMCHECK} --allocs=4 --role=1 & python3 -c "{forked}" & wait', roles=(1,))
        wait_for(lambda: text_of(program.out).count("0 0 ready") == 2, "both have the memory", program.trouble)
        self.dump(program)
        self.assertEqual(self.restored(program), 0)
        program.go_on()

    def collected(self, program):
        """It has been killed, and was never seen to run."""
        wait_for(lambda: harness.state_of(program.pid) in (None, "Z"), f"{program.pid} ends")
        if harness.state_of(program.pid) == "Z":
            self.assertEqual(harness.reap(program.pid), -signal.SIGKILL)
        self.assertEqual(self.ours(), [])

    def test_a_file_is_cut_off(self):
        self.start_daemon()
        program = self.memcheck(*self.much)
        self.dump(program)
        pages = max((self.path("ck", n) for n in os.listdir(self.path("ck")) if n.startswith("pages-")), key=os.path.getsize)
        size = os.path.getsize(pages)
        with open(pages, "rb+") as f:
            f.seek(size // 2)
            rest = f.read()
            f.truncate(size // 2)
        self.refused(5, "restore", self.path("ck"), "--detach", says=(os.path.basename(pages), "shorter"))
        with open(pages, "ab") as f:
            f.write(rest)
        self.assertGreater(self.restored(program), 160 << 20)
        program.go_on()

    def test_the_worker_is_killed(self):
        """Memory that is not there yet reads as zero then: the process must not run."""
        self.start_daemon(BENNUD_TEST_KILL="host-memory:one")
        program = self.memcheck(*self.much)
        self.dump(program)
        self.refused(1, "restore", self.path("ck"), "--detach")
        self.collected(program)
        self.assertGreater(self.restored(program), 160 << 20)
        program.go_on()

    def test_criu_is_killed(self):
        """The daemon brings to an end what it has begun: nothing in a process that CRIU leaves behind is wrong."""
        self.start_daemon(BENNUD_TEST_KILL="@host-memory:one")
        program = self.memcheck(*self.much)
        self.dump(program)
        worker = children_of(self.daemon.pid)[0]
        restore = subprocess.Popen([BENNU, "restore", self.path("ck"), "--detach"], env=self.env, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        wait_for(lambda: harness.state_of(worker) == "T", "the worker has filled in a piece")
        os.kill(children_of(restore.pid)[0], signal.SIGKILL)
        os.kill(worker, signal.SIGCONT)
        self.assertEqual(restore.wait(harness.PATIENCE), 1)
        with restore.stderr as message:
            self.assertEqual(message.read().count("\n"), 1)
        wait_for(lambda: not any(p["state"] == "restoring" for p in self.ok_json("ps")["processes"]), "the session ends")
        with contextlib.suppress(ProcessLookupError):
            os.kill(program.pid, signal.SIGKILL)  # what CRIU leaves half-made is not ours to run
        self.collected(program)
        self.stop_daemon()
        self.start_daemon()
        self.assertGreater(self.restored(program), 160 << 20)
        program.go_on()


if __name__ == "__main__":
    harness.main()
