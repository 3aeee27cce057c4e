"""Checkpoints that send little: chunks asked for by their hashes."""


import contextlib
import json
import os
import shutil
import signal
import subprocess

import harness
from harness import BENNU, BUILD, CRIU, Case, text_of

CUT = f"{BUILD}/test/cr/cut"
MIB = 1 << 20


class Live(Case):
    sim = {"BENNU_SIM_STATE_MB": "1", "BENNU_SIM_MEMORY": "512M"}

    def cut(self, hot=8, cold=12, **kwargs):
        return self.start(CUT, f"--hot={hot}", f"--cold={cold}", **kwargs)

    @staticmethod
    def bytes_of(answer, phase):
        return sum(p["bytes"] for p in answer["phases"] if p["name"] == phase)

    def dump_json(self, program, name, *args):
        answer = self.ok_json("dump", program.pid, self.path(name), *args)
        if "--leave-running" not in args:
            program.gone([])
        return answer


class Hashes(Live):
    """A dump asks for chunks by their hashes, and sends what nobody has."""

    def test_zero_and_equal_chunks_are_not_sent(self):
        self.start_daemon()
        program = self.cut()
        answer = self.dump_json(program, "ck")
        self.assertEqual(self.bytes_of(answer, "hash"), answer["gpu_bytes"])
        # Of 12 zero chunks none, of 12 equal ones at most one for each of their allocations.
        self.assertLessEqual(self.bytes_of(answer, "copy-out"), answer["gpu_bytes"] - (12 + 12 - 3) * 2 * MIB)
        seen = self.ok_json("inspect", "--verify", self.path("ck"))
        self.assertGreaterEqual(seen["zero_bytes"], 12 * 2 * MIB)
        self.restore(program)
        program.go_on()

    def test_a_parent_has_most_of_it(self):
        self.start_daemon()
        program = self.cut()
        self.dump_json(program, "first", "--leave-running")
        program.go_on()
        answer = self.dump_json(program, "second", f"--parent={self.path('first')}")
        # What is hot, the block that is made anew, and what is smaller than a chunk.
        self.assertLessEqual(self.bytes_of(answer, "copy-out"), (8 + 4 + 2) * 2 * MIB)
        self.restore(program, self.path("second"))
        program.go_on()

    def test_without_hashing_on_the_gpu(self):
        self.start_daemon(BENNU_SIM_HASH="wrong")
        program = self.cut()
        answer = self.dump_json(program, "ck")
        self.assertEqual(self.bytes_of(answer, "hash"), 0)
        self.assertEqual(self.bytes_of(answer, "copy-out"), answer["gpu_bytes"])
        self.restore(program)
        program.go_on()

    def test_what_arrives_is_not_what_was_hashed(self):
        """The process goes on, and there is no checkpoint."""
        self.start_daemon(BENNU_SIM_HASH="later")
        program = self.cut()
        self.refused(1, "dump", program.pid, self.path("ck"),
                     says=("arrived with other bytes than were hashed", "GPU 0 (Simulated GPU)", "--no-gpu-hash"))
        self.no_checkpoint(self.path("ck"))
        program.go_on()
        self.assertEqual(self.stop_daemon(), 0)
        self.start_daemon("--no-gpu-hash", BENNU_SIM_HASH="later")
        answer = self.dump_json(program, "ck")
        self.assertEqual(self.bytes_of(answer, "hash"), 0)
        self.restore(program)
        program.go_on()


class Ahead(Live):
    """GPU memory that was copied before the dump, while the program ran."""

    def spool(self):
        try:
            return os.listdir(os.path.join(self.rundir, "spool"))
        except FileNotFoundError:
            return []

    def test_a_dump_sends_only_what_changed(self):
        self.start_daemon()
        program = self.cut()
        program.rest()
        ahead = self.ok_json("pre-dump", program.pid)
        self.assertEqual(len(self.spool()), 1)
        # Two passes at most, of which the second finds nothing to do.
        self.assertEqual(ahead["last_bytes"], 0 if ahead["passes"] > 1 else ahead["sent_bytes"])
        os.kill(program.pid, signal.SIGUSR2)
        program.go_on()
        answer = self.dump_json(program, "ck")
        # What is hot, the block that is made anew, and what is smaller than a chunk.
        self.assertLessEqual(self.bytes_of(answer, "copy-out"), (8 + 4 + 2) * 2 * MIB)
        self.assertGreater(ahead["sent_bytes"], self.bytes_of(answer, "copy-out"))
        self.assertEqual(self.spool(), [])
        self.assertIs(self.ok_json("inspect", "--verify", self.path("ck"))["verified"], True)
        self.restore(program)
        program.go_on()

    def test_nothing_changed_and_nothing_is_sent(self):
        self.start_daemon()
        program = self.cut()
        program.rest()
        self.ok("pre-dump", program.pid)
        answer = self.dump_json(program, "ck")
        self.assertEqual(self.bytes_of(answer, "copy-out"), 0)
        self.restore(program)
        os.kill(program.pid, signal.SIGUSR2)
        program.go_on()

    def test_a_plain_criu_dump_uses_it(self):
        self.start_daemon()
        program = self.cut()
        program.rest()
        self.ok("pre-dump", program.pid)
        os.mkdir(self.path("ck"))
        done = self.run_command([CRIU, "dump", "-t", program.pid, "-D", self.path("ck"), "-o", "dump.log", "-v4", "-L",
                                 harness.PLUGIN_DIR])
        self.assertEqual(done.returncode, 0, text_of(self.path("ck", "dump.log"))[-2000:])
        program.gone([])
        seen = self.ok_json("inspect", "--verify", self.path("ck"))
        self.assertEqual(self.bytes_of(seen, "copy-out"), 0)
        self.restore(program)
        os.kill(program.pid, signal.SIGUSR2)
        program.go_on()

    def test_it_is_dropped(self):
        self.start_daemon()
        program = self.cut()
        self.ok("pre-dump", program.pid)
        self.assertEqual(len(self.spool()), 1)
        self.ok("pre-dump", "--drop", program.pid)
        self.assertEqual(self.spool(), [])
        self.refused(1, "pre-dump", "--drop", program.pid, says="nothing was copied ahead")
        # With its process.
        self.ok("pre-dump", program.pid)
        program.kill()
        harness.wait_for(lambda: self.spool() == [], "it is removed with its process")
        # With the daemon, also when that is killed.
        other = self.cut()
        self.ok("pre-dump", other.pid)
        self.assertEqual(self.stop_daemon(), 0)
        self.assertEqual(self.spool(), [])
        other.go_on()

    def test_again_and_again(self):
        """Each goes on with what is there."""
        self.start_daemon()
        program = self.cut()
        first = self.ok_json("pre-dump", program.pid)
        program.go_on()
        second = self.ok_json("pre-dump", program.pid)
        self.assertLess(second["sent_bytes"], first["sent_bytes"])
        self.assertEqual(len(self.spool()), 1)
        self.dump_json(program, "ck")
        self.restore(program)
        program.go_on()

    def test_without_hashing_on_the_gpu(self):
        """Everything is sent twice, and stored once."""
        self.start_daemon(BENNU_SIM_HASH="wrong")
        program = self.cut()
        program.rest()
        ahead = self.ok_json("pre-dump", program.pid)
        self.assertEqual((ahead["passes"], ahead["sent_bytes"]), (1, ahead["gpu_bytes"]))
        answer = self.dump_json(program, "ck")
        self.assertEqual(self.bytes_of(answer, "copy-out"), answer["gpu_bytes"])
        self.restore(program)
        os.kill(program.pid, signal.SIGUSR2)
        program.go_on()

    def test_no_cuda(self):
        self.start_daemon()
        with subprocess.Popen(["sleep", "1000"], env=self.env) as other:
            self.refused(3, "pre-dump", other.pid, says="does not use CUDA")
            other.kill()


class WhileItRuns(Live):
    """bennu dump --live: every image is a state that the program was really in."""

    def live(self, program, name, *args):
        answer = self.dump_json(program, name, "--live", *args)
        self.assertGreaterEqual(answer["live"]["passes"], 1)
        return answer

    def test_one_after_another(self):
        self.start_daemon()
        program = self.cut()
        for n in range(3):
            self.live(program, f"ck{n}", "--leave-running")
            program.go_on()
            self.assertIs(self.ok_json("inspect", "--verify", self.path(f"ck{n}"))["verified"], True)
        program.pids = [program.pid]
        program.kill()
        for n in (1, 0, 2):
            program.will_go_back()
            self.restore(program, self.path(f"ck{n}"))
            program.go_on()
            program.kill()

    def test_tree(self):
        self.start_daemon()
        program = self.tree(children=1)
        children = harness.children_of(program.pid)
        program.pids = [program.pid] + children
        self.ok("dump", "--live", program.pid, self.path("ck"))
        program.gone(children)
        self.restore(program)
        program.go_on()

    def test_around_the_page_cache(self):
        self.start_daemon()
        program = self.cut()
        self.live(program, "ck", "--sync")
        self.assertIs(self.ok_json("inspect", "--verify", self.path("ck"))["verified"], True)
        self.restore(program)
        program.go_on()

    def test_compressed(self):
        """What is copied ahead, too."""
        self.start_daemon()
        program = self.memcheck()  # of whose chunks the ends are empty
        self.live(program, "plain", "--leave-running")
        self.live(program, "ck", "--compress=1")
        self.assertIs(self.ok_json("inspect", "--verify", self.path("ck"))["verified"], True)
        self.restore(program)
        program.go_on()

    def test_without_an_agent(self):
        """Nothing can be copied ahead, and nothing is wrong with it."""
        self.start_daemon()
        program = self.cut(agent=False)
        answer = self.live(program, "ck")
        self.assertEqual(answer["live"]["gpu_bytes"], 0)
        self.restore(program)
        program.go_on()

    def test_with_a_parent(self):
        self.start_daemon()
        program = self.cut()
        self.dump_json(program, "first", "--leave-running")
        program.go_on()
        answer = self.live(program, "second", f"--parent={self.path('first')}")
        self.assertLessEqual(answer["live"]["phases"][2]["bytes"], answer["gpu_bytes"] // 2)
        self.restore(program, self.path("second"))
        program.go_on()

    def test_bandwidth(self):
        """So little that it would take minutes: an interrupted one leaves nothing, and the program goes on."""
        self.start_daemon()
        program = self.cut()
        command = [BENNU, "dump", "--live", "--bandwidth=100K", str(program.pid), self.path("ck")]
        with open(self.path("slow"), "wb") as out:
            slow = subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        harness.wait_for(lambda: "bennu-pack-0.img" in (os.listdir(self.path("ck")) if os.path.isdir(self.path("ck")) else ()),
                         "it copies", lambda: None if slow.poll() is None else text_of(self.path("slow")))
        program.go_on()
        slow.send_signal(signal.SIGINT)
        self.assertEqual(slow.wait(harness.PATIENCE), 128 + signal.SIGINT, text_of(self.path("slow")))
        self.assertIn("interrupted", text_of(self.path("slow")))
        self.assertFalse(os.path.exists(self.path("ck")))
        self.live(program, "ck", "--bandwidth=4G")
        self.restore(program)
        program.go_on()


class Aside(Live):
    """What has to be sent is set aside on the GPU, and the program goes on while it is on its way to the disk."""
    sim = {"BENNU_SIM_STATE_MB": "1", "BENNU_SIM_MEMORY": "4G"}
    # More than what is not worth it. A pass of --live takes so long that the program rewrites most of it meanwhile.
    many = {"hot": 64, "cold": 4}
    slowly = ("--live", "--bandwidth=64M")
    # What is set aside takes minutes from there to the disk.
    for_long = "--bandwidth=1M"

    def start_dump(self, program, *args):
        with open(self.path("answer"), "wb") as out, open(self.path("message"), "wb") as err:
            dump = subprocess.Popen([BENNU, "dump", "--leave-running", "--json", *args, str(program.pid), self.path("ck")],
                                    env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        self.addCleanup(dump.wait, harness.PATIENCE)
        self.addCleanup(lambda: dump.poll() is None and dump.kill())
        return dump

    def ended(self, dump):
        return None if dump.poll() is None else f"it ended: {text_of(self.path('message'))}"

    def has(self, name):
        return os.path.exists(self.path("ck", name))

    @contextlib.contextmanager
    def written_later(self, program, *args, at="commit:begin", manifest=False, **env):
        """A dump, and the daemon stopped before it waits for the rest of it: nothing can be written, and the program runs. Or it is
        stopped elsewhere, maybe when the manifest is there."""
        self.start_daemon(BENNUD_TEST_KILL=f"@{at}", **env)
        worker, = harness.children_of(self.daemon.pid)
        dump = self.start_dump(program, *args)
        harness.wait_for(lambda: harness.state_of(worker) == "T", "the daemon waits for the rest", lambda: self.ended(dump))
        try:
            self.assertTrue(self.has("inventory.img"))
            self.assertEqual(self.has(harness.MANIFEST), manifest)
            self.assertIsNone(dump.poll())
            yield dump, worker
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)
        self.code = dump.wait(harness.PATIENCE)

    def answer(self):
        self.assertEqual(self.code, 0, text_of(self.path("message")))
        return json.loads(text_of(self.path("answer")))

    def restores(self, program):
        """To the moment of the dump, also when the program went on after it."""
        self.assertIs(self.ok_json("inspect", "--verify", self.path("ck"))["verified"], True)
        if harness.alive(program.pid):
            program.kill()
        program.will_go_back()
        self.restore(program)
        program.go_on()

    @staticmethod
    def seconds_of(answer, phase):
        return [p["duration_s"] for p in answer["phases"] if p["name"] == phase]

    def test_the_program_does_not_wait(self):
        program = self.cut(**self.many)
        with self.written_later(program, *self.slowly):
            program.go_on()
        answer = self.answer()
        aside = self.bytes_of(answer, "set-aside")
        self.assertGreater(aside, 64 * MIB)
        self.assertEqual(aside, self.bytes_of(answer, "copy-out"))
        pause, = self.seconds_of(answer, "pause")
        gpu_pause, = self.seconds_of(answer, "gpu-pause")
        self.assertLess(gpu_pause, pause)
        program.go_on()
        self.restores(program)

    def test_options(self):
        """Around the page cache, compressed, with a parent."""
        program = self.cut(**self.many)
        with self.written_later(program, "--sync", "--compress=1"):
            program.go_on()
        answer = self.answer()
        self.assertEqual(self.bytes_of(answer, "set-aside"), self.bytes_of(answer, "copy-out"))
        self.assertEqual(self.stop_daemon(), 0)
        os.rename(self.path("ck"), self.path("first"))
        with self.written_later(program, f"--parent={self.path('first')}"):
            program.go_on()
        answer = self.answer()
        self.assertGreater(self.bytes_of(answer, "set-aside"), 64 * MIB)
        self.restores(program)

    def test_the_gpu_is_full(self):
        """Then the program waits for the copy, which no bandwidth limits, and for no more than that."""
        program = self.cut(env={"BENNU_SIM_MEMORY": "900M"}, **self.many)
        with self.written_later(program, self.for_long, BENNU_SIM_MEMORY="900M"):
            program.go_on()
        answer = self.answer()
        self.assertEqual(self.bytes_of(answer, "set-aside"), 0)
        self.assertGreater(self.bytes_of(answer, "copy-out"), 64 * MIB)
        self.restores(program)

    def test_setting_aside_fails(self):
        program = self.cut(**self.many)
        with self.written_later(program, BENNU_SIM_FAIL="cuMemcpyDtoDAsync:1+=999"):
            program.go_on()
        answer = self.answer()
        self.assertEqual(self.bytes_of(answer, "set-aside"), 0)
        self.restores(program)

    def test_what_arrives_is_not_what_was_hashed(self):
        program = self.cut(**self.many)
        with self.written_later(program, BENNU_SIM_HASH="later"):
            program.go_on()
        self.assertEqual(self.code, 1)
        self.assertIn("arrived with other bytes than were hashed", text_of(self.path("message")))
        self.no_checkpoint(self.path("ck"))
        program.go_on()

    def test_the_program_ends_meanwhile(self):
        program = self.cut(**self.many)
        with self.written_later(program):
            program.go_on()
            program.kill()
        self.assertEqual(self.code, 0, text_of(self.path("message")))
        self.restores(program)

    def test_the_program_cannot_run_yet(self):
        """As in a frozen cgroup: the checkpoint is finished, and the program gets its memory back when it can run."""
        program = self.cut(**self.many)
        with self.written_later(program, at="reply:end") as (dump, _):
            harness.wait_for(lambda: not harness.children_of(dump.pid), "CRIU has ended", lambda: self.ended(dump))
            os.kill(program.pid, signal.SIGSTOP)
            harness.wait_for(lambda: harness.state_of(program.pid) == "T", "the program is stopped", program.trouble)
        answer = self.answer()
        self.assertEqual(self.seconds_of(answer, "pause"), [])
        self.assertEqual(len(self.seconds_of(answer, "gpu-pause")), 1)
        os.kill(program.pid, signal.SIGCONT)
        program.go_on()
        self.restores(program)

    def test_the_disk_is_full(self):
        program = self.cut(**self.many)
        os.mkdir(self.path("ck"))
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1G", "tmpfs", self.path("ck")], check=False).returncode:
            self.skipTest("no right to mount")
        self.addCleanup(subprocess.run, ["umount", self.path("ck")], check=True)
        with self.written_later(program):
            program.go_on()
            with open(self.path("ck", "other"), "wb") as other, contextlib.suppress(OSError):
                os.posix_fallocate(other.fileno(), 0, os.statvfs(self.path("ck")).f_bavail * 4096)
        self.assertEqual(self.code, 1)
        self.assertEqual(text_of(self.path("message")).count("\n"), 1)
        self.assertIn("No space left", text_of(self.path("message")))
        self.no_checkpoint(self.path("ck"))
        program.go_on()

    # Two processes, each with more than what is not worth it, on a GPU that has room for all of that, but not for two contexts beside it.
    tight = {"BENNU_SIM_MEMORY": "1600M"}

    def two_on_a_tight_gpu(self):
        self.env.update(self.tight)
        return self.start(harness.MEMCHECK, "--allocs=16", "--min=4M", "--max=5M", "--children=1", roles=range(2))

    def test_no_room_for_the_contexts(self):
        """Then they come back when what was set aside is free again: after the rest is written, which no bandwidth limits then."""
        program = self.two_on_a_tight_gpu()
        program.pids += harness.children_of(program.pid)
        with self.written_later(program, self.for_long, at="driver-restore:begin", manifest=True):
            pass
        answer = self.answer()
        self.assertGreater(self.bytes_of(answer, "set-aside"), 2 * 64 * MIB)
        program.go_on()
        self.assertEqual(self.stop_daemon(), 0)
        self.start_daemon()
        self.restores(program)

    def test_no_room_for_the_contexts_and_no_checkpoint(self):
        """However it ends, they come back."""
        program = self.two_on_a_tight_gpu()
        with self.written_later(program, self.for_long, "--compress=19") as (dump, _):
            dump.send_signal(signal.SIGINT)
        self.assertEqual(self.code, 128 + signal.SIGINT, text_of(self.path("message")))
        self.assertFalse(os.path.exists(self.path("ck")))
        program.go_on()
        self.assertEqual(self.stop_daemon(), 0)
        with self.written_later(program, BENNU_SIM_HASH="later"):
            pass
        self.assertEqual(self.code, 1)
        self.assertIn("arrived with other bytes than were hashed", text_of(self.path("message")))
        self.no_checkpoint(self.path("ck"))
        program.go_on()

    def plain_dump(self, program):
        """By CRIU alone, as a container runtime does it. Returns the process."""
        os.mkdir(self.path("ck"))
        command = [CRIU, "dump", "-t", str(program.pid), "-R", "-D", self.path("ck"), "-o", "dump.log", "-v4", "-L", harness.PLUGIN_DIR]
        criu = subprocess.Popen(command, env={**self.env, "BENNU_LEAVE_RUNNING": "1"}, stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(criu.wait, harness.PATIENCE)
        self.addCleanup(lambda: criu.poll() is None and criu.kill())
        return criu

    def test_nobody_watches(self):
        """CRIU alone is told how it ends, so it waits for all of it, and the program with it."""
        program = self.cut(**self.many)
        self.start_daemon(BENNUD_TEST_KILL="@commit:end")
        worker, = harness.children_of(self.daemon.pid)
        criu = self.plain_dump(program)
        harness.wait_for(lambda: harness.state_of(worker) == "T", "the daemon has written it all",
                         lambda: None if criu.poll() is None else text_of(self.path("ck", "dump.log"))[-2000:])
        self.assertTrue(self.has(harness.MANIFEST))
        self.assertEqual(harness.state_of(program.pid), "t")
        os.kill(worker, signal.SIGCONT)
        self.assertEqual(criu.wait(harness.PATIENCE), 0)
        program.go_on()
        seen = self.ok_json("inspect", "--verify", self.path("ck"))
        self.assertNotIn("set-aside", [p["name"] for p in seen["phases"]])
        self.restores(program)

    def test_nobody_watches_and_it_fails(self):
        program = self.cut(**self.many)
        self.start_daemon(BENNU_SIM_HASH="later")
        self.assertNotEqual(self.plain_dump(program).wait(harness.PATIENCE), 0)
        self.nothing_whole()
        program.go_on()
        self.assertEqual(self.stop_daemon(), 0)
        self.start_daemon()
        self.dump(program, name="next")
        self.restore(program, self.path("next"))
        program.go_on()

    def nothing_whole(self):
        harness.wait_for(lambda: not self.has("inventory.img") and not any("pack" in n for n in os.listdir(self.path("ck"))),
                         "no checkpoint is left")
        self.assertFalse(self.has(harness.MANIFEST))

    def late(self, program, *args):
        """A dump that takes long, after the moment at which the program was let go."""
        dump = self.start_dump(program, self.for_long, *args)
        harness.wait_for(lambda: self.has("inventory.img"), "CRIU has ended its half", lambda: self.ended(dump))
        program.go_on()
        self.assertIsNone(dump.poll(), text_of(self.path("message")))
        return dump

    def test_interrupted(self):
        self.start_daemon()
        program = self.cut(**self.many)
        dump = self.late(program)
        # Nothing else works on it meanwhile.
        for command in (("dump", program.pid, self.path("other")), ("suspend", program.pid)):
            self.refused(1, *command, says=f"{program.pid}")
        self.assertFalse(os.path.exists(self.path("other")))
        dump.send_signal(signal.SIGINT)
        self.assertEqual(dump.wait(harness.PATIENCE), 128 + signal.SIGINT)
        self.assertIn("interrupted", text_of(self.path("message")))
        self.assertEqual(text_of(self.path("message")).count("\n"), 1)
        self.assertFalse(os.path.exists(self.path("ck")))
        program.go_on()
        self.dump(program)
        self.restore(program)
        program.go_on()

    def wants(self, mib, env):
        """A program that allocates once it has heard that memory could come free; until it waits for that."""
        program = self.start(harness.ODD, "later", mib, wait=False, env=env)
        harness.wait_for(lambda: "open" in text_of(program.out), "it uses CUDA", program.trouble)
        harness.wait_for(lambda: harness.agent_word(program.pid, harness.NEED_HOT), "it has heard of memory", program.trouble)
        os.kill(program.pid, signal.SIGUSR1)
        harness.wait_for(lambda: harness.agent_word(program.pid, harness.NEED_WANTED),
                         "it waits for memory", program.trouble)
        return program

    def test_an_allocation_waits_for_it(self):
        """It would have gone well without the dump."""
        room = {"BENNU_SIM_MEMORY": "1200M"}
        self.env.update(room)
        self.start_daemon()
        program = self.cut(**self.many)
        dump = self.late(program)
        other = self.wants(930, room)
        self.assertIsNone(dump.poll(), text_of(self.path("message")))
        dump.send_signal(signal.SIGINT)
        other.go_on()
        self.assertEqual(dump.wait(harness.PATIENCE), 128 + signal.SIGINT)
        program.go_on()

    def test_an_allocation_waits_no_longer_than_it_can(self):
        """Before the other program would hear that there is no memory the dump ends, and says why."""
        room = {"BENNU_SIM_MEMORY": "1200M"}
        self.env.update(room)
        self.start_daemon()
        program = self.cut(**self.many)
        dump = self.late(program)
        other = self.wants(930, room)
        self.assertEqual(dump.wait(harness.PATIENCE), 1)
        self.assertIn("another program needed the GPU memory", text_of(self.path("message")))
        self.assertEqual(text_of(self.path("message")).count("\n"), 1)
        self.no_checkpoint(self.path("ck"))
        other.go_on()
        program.go_on()

    def resume_beside(self, fill):
        """A dump of a program that goes on, with what it has set aside on the GPU; 500 MiB that rest elsewhere; and a program that takes `fill`
        MiB of the 890 that are left."""
        self.env.update(BENNU_SIM_MEMORY="1200M")
        self.start_daemon()
        program = self.cut(**self.many)
        rests = self.start(harness.ODD, "hold", 500)
        self.ok("suspend", rests.pid)
        dump = self.late(program, "--trace", self.path("trace"))
        self.start(harness.ODD, "hold", fill)
        return program, rests, dump

    def test_a_resume_that_cannot_fit_does_not_wait(self):
        """With what is set aside there would be too little as well."""
        program, rests, dump = self.resume_beside(600)
        self.refused(1, "resume", rests.pid, says=("free", "memory"))
        self.assertIsNone(dump.poll(), text_of(self.path("message")))
        dump.send_signal(signal.SIGINT)
        self.assertEqual(dump.wait(harness.PATIENCE), 128 + signal.SIGINT)
        program.go_on()

    def test_a_resume_that_may_lack_memory_waits(self):
        """There is room for what it had, but maybe none for its contexts: a process that these cannot be given back to is lost."""
        program, rests, dump = self.resume_beside(200)
        with open(self.path("resumed"), "wb") as out:
            resume = subprocess.Popen([BENNU, "resume", "--trace", self.path("resume-trace"), str(rests.pid)], env=self.env,
                                      stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self.addCleanup(resume.wait, harness.PATIENCE)
        self.addCleanup(lambda: resume.poll() is None and resume.kill())
        harness.wait_for(lambda: resume.poll() is not None or "packets" in text_of(f"/proc/{resume.pid}/wchan"), "it waits for an answer")
        dump.send_signal(signal.SIGINT)
        self.assertEqual(dump.wait(harness.PATIENCE), 128 + signal.SIGINT)
        self.assertEqual(resume.wait(harness.PATIENCE), 0, text_of(self.path("resumed")))
        copied, = [e["ts"] + e["dur"] for e in json.loads(text_of(self.path("trace"))) if e["name"] == "copy-out" and "process" not in e["args"]]
        began, = [e["ts"] for e in json.loads(text_of(self.path("resume-trace"))) if e["name"] == "driver-restore"]
        self.assertGreater(began, copied)
        rests.go_on()
        program.go_on()

    def test_the_program_is_not_brought_back(self):
        """The checkpoint is good, and stays, but nobody is told that all is well."""
        program = self.cut(**self.many)
        with self.written_later(program, BENNU_SIM_FAIL="cuCheckpointProcessRestore:1+=2"):
            pass
        self.assertEqual(self.code, 1)
        message = text_of(self.path("message"))
        self.assertEqual(message.count("\n"), 1)
        self.assertIn("is complete, but the process was not brought back", message)
        self.assertIs(self.ok_json("inspect", "--verify", self.path("ck"))["verified"], True)

    def test_the_command_is_killed(self):
        """Nobody would hear how it ends: it is undone."""
        self.start_daemon()
        program = self.cut(**self.many)
        dump = self.late(program)
        dump.kill()
        dump.wait(harness.PATIENCE)
        self.nothing_whole()
        program.go_on()
        self.dump(program, name="next")
        self.restore(program, self.path("next"))
        program.go_on()

    def nothing_or_whole(self):
        """The daemon has ended its work on the program, and what is there is a checkpoint, or nothing that looks like one."""
        harness.wait_for(lambda: self.has(harness.MANIFEST) or not any("pack" in n for n in os.listdir(self.path("ck"))), "it has ended")
        if not self.has(harness.MANIFEST):
            self.nothing_whole()
        else:
            self.assertIs(self.ok_json("inspect", "--verify", self.path("ck"))["verified"], True)
            self.assertTrue(self.has("inventory.img"))

    def traced(self, phase):
        """Bytes of the phase, as a trace has them."""
        return sum(e.get("args", {}).get("bytes", 0) for e in json.loads(text_of(self.path("trace")))
                   if e["name"] == phase and "process" not in e["args"])

    # From where the daemon is about to say that the program may go on: to the moment before the manifest is written, and after it.
    steps = ("reply:begin", "reply:end", "commit:begin", "commit:one", "commit:end")

    def test_interrupted_at_each_step(self):
        program = self.cut(**self.many)
        for at in self.steps:
            with self.subTest(at):
                early = at not in ("commit:one", "commit:end")
                with self.written_later(program, "--trace", self.path("trace"), *([self.for_long] if early else []), at=at,
                                        manifest=at == "commit:end") as (dump, _):
                    dump.send_signal(signal.SIGINT)
                program.go_on()
                if early:
                    self.assertLess(self.traced("copy-out"), self.traced("set-aside"), "it went on")
                if os.path.exists(self.path("ck")):  # it came too late
                    self.assertFalse(early)
                    self.assertEqual(self.code, 0)
                    self.nothing_or_whole()
                    shutil.rmtree(self.path("ck"))
                else:
                    self.assertNotEqual(at, "commit:end")
                    self.assertEqual(self.code, 128 + signal.SIGINT)
                    self.assertIn("interrupted", text_of(self.path("message")))
                    self.assertEqual(text_of(self.path("message")).count("\n"), 1)
                self.assertEqual(self.stop_daemon(), 0)
        self.start_daemon()
        self.dump(program)
        self.restore(program)
        program.go_on()

    def test_the_command_is_killed_at_each_step(self):
        program = self.cut(**self.many)
        for at in self.steps:
            with self.subTest(at):
                with self.written_later(program, at=at, manifest=at == "commit:end") as (dump, _):
                    dump.kill()
                program.go_on()
                self.nothing_or_whole()
                shutil.rmtree(self.path("ck"))
                self.assertEqual(self.stop_daemon(), 0)
        self.start_daemon()
        self.dump(program)
        self.restore(program)
        program.go_on()

    def test_command_and_daemon_are_killed(self):
        """The next worker undoes it."""
        program = self.cut(**self.many)
        with self.written_later(program) as (dump, worker):
            dump.kill()
            dump.wait(harness.PATIENCE)
            os.kill(worker, signal.SIGKILL)
            self.nothing_whole()
            program.go_on()


if __name__ == "__main__":
    harness.main()
