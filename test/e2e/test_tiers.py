"""Suspended to each of the tiers: where the bytes are meanwhile, and that every one of them is back afterwards."""

import contextlib
import os
import signal
import stat

import harness
from harness import Case, ODD, wait_for

TIERS = ("gpu", "host", "disk")
MIB = 1 << 20


class TierCase(Case):
    def state(self, pid):
        found = [p for p in self.ok_json("ps")["processes"] if p["pid"] == pid]
        self.assertEqual(len(found), 1)
        return found[0]

    def bytes_in(self, pid):
        """The tier, and the bytes in each."""
        state = self.state(pid)
        self.assertEqual(state["state"], "suspended")
        return (state["tier"],) + tuple(state[f"{tier}_bytes"] for tier in TIERS)

    def spool(self):
        path = self.path("run", "spool")
        return [os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else []

    def packs(self):
        return [os.path.join(folder, name) for folder in self.spool() for name in os.listdir(folder) if "pack" in name]

    def tier(self, program):
        return self.bytes_in(program.pid)[0]

    def kill_worker(self):
        worker, = harness.children_of(self.daemon.pid)
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: harness.children_of(self.daemon.pid) not in ([], [worker]), "another worker")
        wait_for(lambda: self.bennu("ps").returncode == 0, "it answers")


class Tiers(TierCase):
    def cycle(self, program, tier):
        self.ok("suspend", "--to", tier, program.pid)
        self.assertEqual(self.state(program.pid)["tier"], tier)
        self.ok("resume", program.pid)
        program.go_on()
        self.assertEqual(self.spool(), [])

    def test_each_tier(self):
        self.start_daemon()
        programs = self.memcheck(), self.memcheck(agent=False), self.tree()
        for tier in TIERS + TIERS:
            for program in programs:
                self.cycle(program, tier)

    def test_where_the_bytes_are(self):
        self.start_daemon()
        program = self.start(ODD, "hold", 160)
        held = self.state(program.pid)["gpu_bytes"]
        self.assertGreaterEqual(held, 160 * MIB)
        for i, tier in enumerate(TIERS):
            self.ok("suspend", "--to", tier, program.pid)
            self.assertEqual(self.bytes_in(program.pid), (tier,) + tuple(held if k == i else 0 for k in range(3)))
            if tier != "gpu":
                other = self.start(ODD, "hold", 160)
                self.refused(1, "resume", program.pid, says=("free", "memory"))
                self.assertEqual(self.tier(program), tier)
                other.kill()
            self.ok("resume", program.pid)
            program.go_on()

    def test_gpu_copies_nothing(self):
        self.start_daemon()
        program = self.memcheck()
        for command in (("suspend", "--to", "gpu"), ("resume",)):
            self.assertEqual({p["bytes"] for p in self.ok_json(*command, program.pid)["phases"]}, {0})
        program.go_on()

    def test_folder_of_the_disk_tier(self):
        spool = self.path("elsewhere", "spool")
        self.start_daemon("--spool", spool)
        program = self.start(ODD, "hold", 160)
        self.ok("suspend", "--to", "disk", program.pid)
        folder, = os.listdir(spool)
        for path in (spool, os.path.join(spool, folder)):
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o700)
        stored = sum(os.stat(os.path.join(spool, folder, name)).st_size for name in os.listdir(os.path.join(spool, folder)))
        self.assertLess(stored, 40 * MIB, "most of its memory is zero")
        self.ok("resume", program.pid)
        program.go_on()
        self.assertEqual(os.listdir(spool), [])

    def test_damaged_on_disk(self):
        self.start_daemon()
        program = self.memcheck()
        self.ok("suspend", "--to", "disk", program.pid)
        with open(self.packs()[0], "r+b") as f:
            f.seek(12345)
            byte = f.read(1)
            f.seek(12345)
            f.write(bytes([byte[0] ^ 1]))
        self.refused(5, "resume", program.pid, says="damaged")
        self.assertEqual(self.state(program.pid)["state"], "suspended")
        with open(self.packs()[0], "r+b") as f:
            f.seek(12345)
            f.write(byte)
        self.ok("resume", program.pid)
        program.go_on()
        self.assertEqual(self.spool(), [])

    def test_no_room_on_disk(self):
        self.start_daemon("--spool", "/dev/null/spool")
        program = self.memcheck()
        self.refused(1, "suspend", "--to", "disk", program.pid, says="/dev/null/spool")
        program.go_on()

    def test_ends_while_suspended(self):
        self.start_daemon()
        for tier in TIERS:
            program = self.start(ODD, "hold", 160)
            self.ok("suspend", "--to", tier, program.pid)
            program.kill()
            wait_for(lambda p=program: p.pid not in [e["pid"] for e in self.ok_json("ps")["processes"]], "bennud forgets it")
            wait_for(lambda: self.spool() == [], "the folder is removed")

    def test_the_daemon_gives_all_back_before_it_ends(self):
        self.start_daemon()
        programs = [self.memcheck() for _ in TIERS]
        for program, tier in zip(programs, TIERS):
            self.ok("suspend", "--to", tier, program.pid)
        self.assertEqual(self.stop_daemon(), 0)
        for program in programs:
            program.go_on()
        self.assertEqual(self.spool(), [])

    def test_folders_of_a_dead_daemon(self):
        left, other = self.path("run", "spool", "123-abcdef"), self.path("run", "spool", "notes")
        for folder in (left, other):
            os.makedirs(folder)
        with open(os.path.join(left, "bennu-pack-0.img"), "wb") as f:
            f.write(bytes(4096))
        self.start_daemon()
        self.assertEqual(self.spool(), [other])

    def test_an_unknown_tier(self):
        self.refused_usage("suspend", "--to", "tape", 1)

    def refused_usage(self, *args):
        done = self.bennu(*args)
        self.assertEqual(done.returncode, 2)
        self.assertIn("gpu, host and disk", done.stderr)


class Budgets(TierCase):
    """Who was used least recently is moved down a tier when another needs the room."""

    sim = {"BENNU_SIM_STATE_MB": "1", "BENNU_SIM_MEMORY": "1G"}

    def hold(self, mib=40):
        return self.start(ODD, "hold", mib)

    def go_on(self, *programs):
        for program in programs:
            self.ok("resume", program.pid)
            program.go_on()
        self.assertEqual(self.spool(), [])

    def test_gpu(self):
        self.start_daemon("--gpu-budget", "100M")
        first, second, third = self.hold(), self.hold(), self.hold()
        for program in (first, second):
            self.ok("suspend", "--to", "gpu", program.pid)
        self.assertEqual([self.tier(p) for p in (first, second)], ["gpu", "gpu"])
        self.ok("suspend", "--to", "gpu", third.pid)
        self.assertEqual([self.tier(p) for p in (first, second, third)], ["host", "gpu", "gpu"])
        self.go_on(first, second, third)

    def test_one_that_was_resumed_is_younger(self):
        self.start_daemon("--gpu-budget", "100M")
        first, second, third = self.hold(), self.hold(), self.hold()
        for program in (first, second):
            self.ok("suspend", "--to", "gpu", program.pid)
        self.go_on(first)
        for program in (first, third):
            self.ok("suspend", "--to", "gpu", program.pid)
        self.assertEqual([self.tier(p) for p in (first, second, third)], ["gpu", "host", "gpu"])
        self.go_on(first, second, third)

    def test_host(self):
        self.start_daemon("--host-limit", "100M")
        programs = [self.hold() for _ in range(4)]
        for program in programs:
            self.ok("suspend", program.pid)
        self.assertEqual([self.tier(p) for p in programs], ["disk", "disk", "host", "host"])
        self.go_on(*programs)

    def test_all_of_them(self):
        self.start_daemon("--gpu-budget", "50M", "--host-limit", "50M")
        programs = [self.hold(), self.tree(), self.memcheck(agent=False), self.hold(), self.hold()]
        for program in programs:
            self.ok("suspend", "--to", "gpu", program.pid)
        self.assertEqual([self.tier(p) for p in programs[-2:]], ["host", "gpu"])
        self.assertEqual(self.tier(programs[0]), "disk")
        self.go_on(*programs)

    def test_more_than_there_is(self):
        self.start_daemon("--gpu-budget", "20M", "--host-limit", "20M", "--disk-budget", "2M")
        first, program = self.start(ODD, "hold", 6), self.memcheck("--min=5M", "--allocs=12", "--max=6M")
        self.ok("suspend", "--to", "gpu", first.pid)
        self.refused(1, "suspend", "--to", "gpu", program.pid, says=("--gpu-budget", "20 MiB"))
        self.refused(1, "suspend", program.pid, says="--host-limit")
        self.refused(1, "suspend", "--to", "disk", program.pid, says=("--disk-budget", "2 MiB"))
        program.go_on()
        self.assertEqual(self.tier(first), "gpu")
        self.go_on(first)

    def test_what_rests_makes_way_for_what_runs(self):
        self.start_daemon()
        rests, runs = self.hold(500), self.hold(400)
        self.ok("suspend", "--to", "host", runs.pid)
        self.ok("suspend", "--to", "gpu", rests.pid)
        other = self.hold(400)
        self.ok("resume", runs.pid)
        runs.go_on()
        self.assertEqual(self.tier(rests), "host")
        other.kill()
        runs.kill()
        self.go_on(rests)

    def test_a_restore_finds_room(self):
        self.start_daemon()
        rests, program = self.hold(500), self.hold(400)
        self.ok("suspend", "--to", "gpu", rests.pid)
        self.dump(program)
        other = self.hold(400)
        self.restore(program)
        program.go_on()
        self.assertEqual(self.tier(rests), "host")
        for p in (program, other):
            p.kill()
        self.go_on(rests)

    def test_sizes(self):
        for option in ("--gpu-budget", "--disk-budget", "--host-limit"):
            done = self.run_command([harness.BENNUD, option, "much"])
            self.assertEqual(done.returncode, 2)
            self.assertIn("'much'", done.stderr)


class Wanted(TierCase):
    """An allocation that would fail gets what rests on the GPU."""

    def listens(self):
        worker, = harness.children_of(self.daemon.pid)
        return "bennud-need" in [harness.text_of(f"/proc/{worker}/task/{t}/comm").strip()
                                 for t in os.listdir(f"/proc/{worker}/task")]

    def wants(self, mib):
        """A program that allocates once it has heard that memory rests."""
        program = self.start(ODD, "later", mib, wait=False)
        wait_for(lambda: "open" in harness.text_of(program.out), "it uses CUDA", program.trouble)
        wait_for(lambda: harness.agent_word(program.pid, harness.NEED_HOT), "it has heard of memory that rests", program.trouble)
        os.kill(program.pid, signal.SIGUSR1)
        return program

    def test_an_allocation_gets_what_rests(self):
        self.start_daemon()
        self.assertFalse(self.listens())
        first = self.start(ODD, "hold", 100)
        for _ in range(2):
            self.ok("suspend", "--to", "gpu", first.pid)
            wait_for(self.listens, "bennud listens to agents")
            second = self.wants(200)
            second.go_on()
            self.assertEqual(self.tier(first), "host")
            wait_for(lambda: not self.listens(), "nobody needs to listen any more")
            self.refused(1, "resume", first.pid, says=("free", "memory"))
            second.go_on()
            second.kill()
            self.ok("resume", first.pid)
            first.go_on()

    def test_the_oldest_goes_first_and_no_more_than_needed(self):
        self.start_daemon()
        programs = [self.start(ODD, "hold", 60) for _ in range(3)]
        for program in programs:
            self.ok("suspend", "--to", "gpu", program.pid)
        other = self.wants(80)
        other.go_on()
        self.assertEqual([self.tier(p) for p in programs], ["host", "gpu", "gpu"])
        other.kill()
        for program in programs:
            self.ok("resume", program.pid)
            program.go_on()
        wait_for(lambda: not self.listens(), "nobody needs to listen any more")

    def test_more_than_rests(self):
        self.start_daemon()
        first = self.start(ODD, "hold", 60)
        self.ok("suspend", "--to", "gpu", first.pid)
        other = self.wants(300)
        self.assertEqual(other.popen.wait(harness.PATIENCE), 1)
        self.assertIn("CUDA error 2", harness.text_of(other.err))
        self.ok("resume", first.pid)
        first.go_on()

    def test_programs_on_other_gpus_hear_nothing(self):
        """They are another daemon's business: an answer that there is nothing would end their wait for its memory."""
        self.start_daemon()
        machine = f"{self.machine}-other"

        def forget():
            other.popen.kill()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"/dev/shm/cuda-sim.{machine}")
        other = self.start(ODD, "hold", 20, env={"BENNU_SIM_MACHINE": machine})
        self.addCleanup(forget)
        rests, runs = self.start(ODD, "hold", 100), self.start(ODD, "hold", 20)
        self.ok("suspend", "--to", "gpu", rests.pid)

        def heard():
            return harness.agent_word(runs.pid, harness.NEED_HOT)
        wait_for(heard, "a program has heard of memory that rests", runs.trouble)
        twice = heard() + 2  # all others have been looked at meanwhile
        wait_for(lambda: heard() >= twice, "it has heard again", runs.trouble)
        self.assertEqual(harness.agent_word(other.pid, harness.NEED_HOT), 0)
        other.kill()

    def test_after_a_worker_was_killed(self):
        self.start_daemon()
        first = self.start(ODD, "hold", 100)
        self.ok("suspend", "--to", "gpu", first.pid)
        self.kill_worker()
        second = self.wants(200)
        second.go_on()
        self.assertEqual(self.tier(first), "host")
        second.kill()
        self.ok("resume", first.pid)
        first.go_on()


class KeepContext(TierCase):
    """Only the memory is taken; the driver is asked nothing."""

    mps = {"BENNU_SIM_MPS": "1"}

    def cycle(self, program, *args):
        self.ok("suspend", "--keep-context", *args, program.pid)
        self.assertEqual(self.state(program.pid)["state"], "suspended")
        self.ok("resume", program.pid)
        program.go_on()

    def test_clients_of_mps(self):
        self.start_daemon()
        for program in (self.memcheck(env=self.mps), self.tree(env=self.mps)):
            self.refused(3, "suspend", program.pid, says="MPS")
            for tier in TIERS:
                self.cycle(program, "--to", tier)

    def test_memory_is_free_meanwhile(self):
        self.start_daemon()
        program = self.start(ODD, "hold", 160, env=self.mps)
        self.ok("suspend", "--keep-context", program.pid)
        self.assertGreaterEqual(self.bytes_in(program.pid)[2], 160 * MIB)
        other = self.start(ODD, "hold", 160)
        other.kill()
        self.ok("resume", program.pid)
        program.go_on()

    def test_without_an_agent(self):
        self.start_daemon()
        program = self.memcheck(agent=False)
        self.refused(3, "suspend", "--keep-context", program.pid, says=("no agent", "--keep-context"))
        program.go_on()

    def test_after_a_worker_was_killed(self):
        self.start_daemon()
        program = self.tree(env=self.mps)
        for tier in TIERS:
            self.ok("suspend", "--keep-context", "--to", tier, program.pid)
            self.kill_worker()
            self.assertEqual(self.tier(program), tier)
            self.ok("resume", program.pid)
            program.go_on()


class AtRest(TierCase):
    """What the daemon has when nobody uses it."""

    def pinned(self):
        """Bytes in the files behind pinned memory, without the 2 MiB for hashing on each GPU."""
        worker, = harness.children_of(self.daemon.pid)
        total = 0
        for fd in os.listdir(f"/proc/{worker}/fd"):
            try:
                if "bennu-pool" in os.readlink(f"/proc/{worker}/fd/{fd}"):
                    size = os.stat(f"/proc/{worker}/fd/{fd}").st_blocks * 512
                    total += size if size > 2 * MIB else 0
            except FileNotFoundError:
                pass
        return total

    def work(self):
        program = self.memcheck()
        for tier in TIERS:
            self.ok("suspend", "--to", tier, program.pid)
            self.ok("resume", program.pid)
        program.go_on()
        return program

    def test_memory_goes_back(self):
        self.start_daemon("--trim-after", "0", "--host-limit", "64M")
        self.assertEqual(self.pinned(), 0)
        program = self.work()
        wait_for(lambda: self.pinned() == 0, "all of it is given back")
        self.ok("suspend", program.pid)
        held = self.state(program.pid)["host_bytes"]
        wait_for(lambda: self.pinned() == 64 * MIB, "staging buffers are given back, and what is in use is not")
        self.assertGreater(held, 0)
        self.ok("resume", program.pid)
        program.go_on()
        wait_for(lambda: self.pinned() == 0, "all of it is given back")

    def test_memory_is_kept_for_the_next_suspend(self):
        self.start_daemon("--host-limit", "64M")
        self.work()
        self.assertGreaterEqual(self.pinned(), 64 * MIB)

    def test_what_is_to_be_kept(self):
        self.start_daemon("--trim-after", "0", "--host-limit", "64M", "--host-keep", "32M")
        wait_for(lambda: self.pinned() == 64 * MIB, "it is there from the start, in one piece")
        self.work()
        wait_for(lambda: self.pinned() == 64 * MIB, "it is still there, and nothing else")


if __name__ == "__main__":
    harness.main()
