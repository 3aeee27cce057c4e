"""Machines with several GPUs: a process that uses all of them, a tree with a process on each, and restores where they are others."""

import os
import re
import shutil
import signal

import harness
from harness import ODD, Case, wait_for
from gpu_machine import write_simulated_gpus

UNITS = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9}
MIB = 1 << 20


class Gpus(Case):
    gpus, memory = 2, "256M"

    def setUp(self):
        self.sim = {"BENNU_SIM_STATE_MB": "1", "BENNU_SIM_MEMORY": self.memory, "BENNU_SIM_DEVICES": str(self.gpus)}
        super().setUp()

    def on_all(self, *args):
        """One process with memory on every GPU."""
        return self.memcheck(f"--gpus={self.gpus}", *args)

    def one_each(self):
        """A tree with a process on every GPU."""
        return self.memcheck(f"--children={self.gpus - 1}", f"--spread={self.gpus}", roles=range(self.gpus))

    def each(self):
        """The one and the other, in a folder of checkpoints of their own."""
        for start in (self.on_all, self.one_each):
            program = start()
            yield program
            program.kill()
            shutil.rmtree(self.path("ck"), ignore_errors=True)

    def restart_daemon(self, *gpus):
        """It sees these GPUs, in this order; none named: all."""
        if self.daemon:
            self.assertEqual(self.stop_daemon(), 0)
        self.start_daemon(**({"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else {}))

    def used(self):
        """MB in use on each GPU, in the daemon's order."""
        found = {}
        for line in self.ok_json("check")["checks"]:
            m = re.search(r"([\d.]+) (\w+) of ([\d.]+) (\w+) free", line["found"])
            if m and re.fullmatch(r"GPU \d+", line["name"]):
                found[int(line["name"][4:])] = (float(m[3]) * UNITS[m[4]] - float(m[1]) * UNITS[m[2]]) / 1e6
        return [found[i] for i in sorted(found)]

    @staticmethod
    def bytes_of(answer, phase):
        return sum(p["bytes"] for p in answer["phases"] if p["name"] == phase)


class Cycles:
    tiers = ("gpu", "host", "disk")

    def test_suspend_and_resume(self):
        self.start_daemon()
        idle = self.used()
        for program in self.each():
            running = self.used()
            for gpu in range(self.gpus):
                self.assertGreater(running[gpu], idle[gpu] + 3, f"GPU {gpu} is not used")
            for tier in self.tiers:
                self.ok("suspend", "--to", tier, program.pid)
                self.assertEqual(self.used() == idle, tier != "gpu")
                self.ok("resume", program.pid)
                program.go_on()

    def test_dump_and_restore(self):
        self.start_daemon()
        for program in self.each():
            running = self.used()
            os.mkdir(self.path("ck"))
            self.ok("dump", program.pid, self.path("ck", "first"), "--live", "--leave-running")
            program.go_on()
            program.kill()
            program.will_go_back()
            self.restore(program, self.path("ck", "first"))
            program.go_on()
            self.dump(program, f"--parent={self.path('ck', 'first')}", name="ck/second")
            self.restore(program, self.path("ck", "second"))
            program.go_on()
            for now, before in zip(self.used(), running):
                self.assertAlmostEqual(now, before, delta=6)  # one allocation is made anew in each round


class Two(Cycles, Gpus):
    pass


class Eight(Cycles, Gpus):
    gpus, tiers = 8, ("host",)


class Places(Gpus):
    """Restores where the GPUs have other numbers, or are others."""

    def test_numbered_otherwise(self):
        self.start_daemon()
        for program in self.each():
            self.dump(program)
            self.restart_daemon(1, 0)
            self.restore(program)
            program.go_on()
            self.ok("suspend", program.pid)
            self.ok("resume", program.pid)
            program.go_on()

    def start_daemon_that_knows(self):
        """It knows of all GPUs that there are, also when it is shown only some."""
        self.env["BENNU_SIM_PROC"] = self.path("gpus")
        write_simulated_gpus(self.path("gpus"), self.machine, self.gpus)
        self.start_daemon()

    def dumped_before_another(self, **env):
        """A program that knows of GPU 0, and a daemon that sees GPU 1 alone."""
        program = self.memcheck(env=env)
        self.dump(program)
        self.restart_daemon(1)
        return program

    def test_on_another_gpu(self):
        """The program knows of one GPU, which becomes another; from then on that is where its memory is. It cannot take memory there from
        anybody, and has to create it."""
        self.start_daemon_that_knows()
        idle = self.used()
        program = self.dumped_before_another(CUDA_VISIBLE_DEVICES="0")
        self.restore(program)
        program.go_on()
        self.restart_daemon()

        def is_there():
            program.go_on()
            first, second = self.used()
            self.assertEqual(first, idle[0])
            self.assertGreater(second, idle[1] + 3)
        is_there()
        for tier in ("gpu", "host", "disk"):
            self.ok("suspend", "--to", tier, program.pid)
            self.assertEqual(self.used()[0], idle[0])
            self.ok("resume", program.pid)
            is_there()
        self.dump(program, "--live", "--leave-running", name="left")
        is_there()
        program.kill()
        program.will_go_back()
        self.restore(program, self.path("left"))
        is_there()
        self.dump(program, name="again")
        self.restore(program, self.path("again"))
        is_there()

    def fill(self, leave):
        """A program that has all of GPU 1, the only one that the daemon sees, but `leave` MiB, by and large."""
        def blocks(n):
            other = self.start(harness.MEMCHECK, f"--allocs={n}", "--min=4M", "--max=4M", "--keep", agent=False, env={"CUDA_VISIBLE_DEVICES": "1"})
            return other, 256 - self.used()[0] * 1e6 / MIB
        other, free = blocks(20)
        other.kill()
        other, free = blocks(round(20 + (free - leave) / 4))
        self.assertAlmostEqual(free, leave, delta=6)
        return other

    def test_on_another_gpu_with_little_room(self):
        """What it has to create must be free beside what the daemon holds: a segment at a time."""
        self.start_daemon_that_knows()
        idle = self.used()[0]
        program = self.start(harness.MEMCHECK, "--allocs=3", "--min=24M", "--max=24M", "--keep", env={"CUDA_VISIBLE_DEVICES": "0"})
        size = int((self.used()[0] - idle) * 1e6 / MIB)
        self.dump(program)
        self.restart_daemon(1)
        other = self.fill(size + 10)
        self.refused(1, "restore", self.path("ck"), "--detach", says=("another GPU", "24 MiB more must be free"))
        self.nothing_left(program, other.pid)
        other.kill()
        other = self.fill(size + 36)
        self.restore(program)
        program.go_on()
        self.ok("suspend", "--to", "host", program.pid)
        other.kill()
        other = self.fill(size + 10)
        self.refused(1, "resume", program.pid, says=("another GPU", "24 MiB more must be free"))
        other.kill()
        self.ok("resume", program.pid)
        program.go_on()

    def test_in_a_container_on_another_gpu(self):
        """The program can open the device file of one GPU, so the driver wants to hear of that one alone."""
        self.start_daemon()
        program = self.dumped_before_another(BENNU_SIM_FILES="0")
        self.restore(program)
        program.go_on()
        for tier in ("gpu", "host"):
            self.ok("suspend", "--to", tier, program.pid)
            self.ok("resume", program.pid)
            program.go_on()

    def test_another_gpu_of_a_machine_that_is_not_shown(self):
        """The driver wants to hear of every GPU. A daemon that is shown one knows the others by the checkpoint."""
        self.start_daemon()
        program = self.dumped_before_another(CUDA_VISIBLE_DEVICES="0")
        self.restore(program)
        program.go_on()

    def test_another_gpu_of_a_machine_that_is_not_known(self):
        """Nor did the daemon know them that made the checkpoint."""
        self.restart_daemon(0)
        program = self.dumped_before_another(CUDA_VISIBLE_DEVICES="0")
        self.refused(1, "restore", self.path("ck"), "--detach", says="restore")
        self.nothing_left(program, *self.ours())
        self.restart_daemon()
        self.restore(program)
        program.go_on()


class Uneven(Gpus):
    """What is true of one GPU and not of another."""

    def test_one_cannot_hash(self):
        self.start_daemon(BENNU_SIM_FAIL="cuModuleLoadData:1=222")
        wait_for(lambda: "the CPU hashes what is on GPU" in harness.text_of(self.daemon_log), "one GPU is said to be unfit")
        self.assertEqual(harness.text_of(self.daemon_log).count("the CPU hashes"), 1)
        for program in self.each():
            answer = self.ok_json("dump", program.pid, self.path("ck"), "--leave-running")
            self.assertGreater(self.bytes_of(answer, "hash"), 0)
            self.assertLess(self.bytes_of(answer, "hash"), answer["gpu_bytes"])
            program.kill()
            program.will_go_back()
            answer = self.ok_json("restore", "--detach", self.path("ck"))
            program.restored = True
            self.assertGreater(self.bytes_of(answer, "verify"), 0)
            self.assertLess(self.bytes_of(answer, "verify"), answer["gpu_bytes"])
            program.go_on()

    def test_one_is_full(self):
        self.start_daemon()
        program = self.on_all()
        self.ok("suspend", program.pid)
        idle = self.used()
        other = self.start(ODD, "hold", 240, env={"CUDA_VISIBLE_DEVICES": "1"})
        self.refused(1, "resume", program.pid, says=("GPU 1", "memory"))
        self.assertEqual(self.used()[0], idle[0])
        other.kill()
        self.ok("resume", program.pid)
        program.go_on()

    def let_go_on_both(self, rundirs):
        """On each GPU rests memory that a new program wants; `rundirs`: of the daemons that see them."""
        on = [{"CUDA_VISIBLE_DEVICES": str(gpu), "BENNU_RUNDIR": rundir} for gpu, rundir in enumerate(rundirs)]
        rest = [self.start(ODD, "hold", 100, env=env) for env in on]
        for program, env in zip(rest, on):
            self.ok("suspend", "--to", "gpu", program.pid, env=env)
        want = [self.start(ODD, "later", 200, wait=False, env=env) for env in on]
        for program in want:
            wait_for(lambda p=program: "open" in harness.text_of(p.out) and harness.agent_word(p.pid, harness.NEED_HOT),
                     "it has heard of memory that rests", program.trouble)
        for program in want:
            os.kill(program.pid, signal.SIGUSR1)
        for program in want:
            program.go_on()
            program.kill()
        for program, env in zip(rest, on):
            self.ok("resume", program.pid, env=env)
            program.go_on()

    def test_both_are_wanted(self):
        self.start_daemon()
        self.let_go_on_both([self.rundir, self.rundir])

    def test_a_daemon_for_each(self):
        """Neither answers for a GPU that it does not see."""
        self.start_daemon(CUDA_VISIBLE_DEVICES="0")
        first, rundir = self.daemon, self.rundir
        self.addCleanup(first.wait)
        self.addCleanup(first.terminate)
        self.rundir = self.path("run-1")
        self.start_daemon(CUDA_VISIBLE_DEVICES="1")
        self.let_go_on_both([rundir, self.rundir])


class Large(Gpus):
    memory = "4G"

    def test_set_aside_on_each(self):
        self.start_daemon()
        program = self.start(harness.MEMCHECK, "--allocs=4", "--min=40M", "--max=40M", "--keep", f"--gpus={self.gpus}")
        answer = self.ok_json("dump", program.pid, self.path("ck"), "--leave-running")
        self.assertGreaterEqual(self.bytes_of(answer, "set-aside"), 4 * 40 * MIB)
        self.assertEqual(self.bytes_of(answer, "set-aside"), self.bytes_of(answer, "copy-out"))
        program.go_on()
        program.kill()
        program.will_go_back()
        self.restore(program)
        program.go_on()


if __name__ == "__main__":
    harness.main()
