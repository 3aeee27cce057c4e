"""Dump, kill, restore: trees, with agents and without, attached and detached, and what surrounds them."""

import os
import shutil
import signal
import subprocess

import harness
from harness import BENNU, Case, MEMCHECK, ODD, text_of, wait_for


class Trees(Case):
    def cycle(self, program, *dump_options, rounds=2):
        for i in range(rounds):
            image = self.dump(program, *dump_options, name=f"ck{i}")
            self.restore(program, image)
            program.go_on()

    def test_one_process(self):
        self.start_daemon()
        self.cycle(self.memcheck())

    def test_one_process_without_agent(self):
        self.start_daemon()
        self.cycle(self.memcheck(agent=False))

    def test_tree_of_three(self):
        self.start_daemon()
        self.cycle(self.tree())

    def test_tree_of_three_without_agents(self):
        self.start_daemon()
        self.cycle(self.tree(agent=False))

    def test_tree_whose_root_has_no_cuda(self):
        self.start_daemon()
        self.cycle(self.tree(root_cuda=False))

    def test_tree_of_processes_with_and_without_agent(self):
        self.start_daemon()
        # One shell, its two children: the second without what `bennu run` preloads.
        script = f'{MEMCHECK} --allocs=4 --role=1 & LD_PRELOAD= {MEMCHECK} --allocs=4 --role=2 & wait'
        program = self.start("/bin/sh", "-c", script, roles=(1, 2))
        answer = self.ok_json("dump", program.pid, self.path("first"), "--leave-running")
        self.assertEqual((answer["cuda_processes"], answer["agents"]), (2, 1))
        program.go_on()
        self.cycle(program)

    def test_driver_path_ignores_the_agents(self):
        self.start_daemon()
        program = self.tree()
        image = self.dump(program, "--driver-path")
        answer = self.ok_json("inspect", image)
        self.assertEqual({p["path"] for p in answer["processes"]}, {"driver"})
        self.assertEqual(answer["gpu_bytes"], 0)
        self.restore(program, image)
        program.go_on()

    def test_threads_that_launch_without_end(self):
        self.start_daemon()
        program = self.start(ODD, "threads", 8)
        self.cycle(program)

    def test_program_that_never_calls_cuda(self):
        self.start_daemon()
        program = self.start(ODD, "plain")
        self.cycle(program, "--allow-no-cuda")

    def test_leave_running_and_restore_afterwards(self):
        self.start_daemon()
        program = self.tree()
        image = self.dump(program, "--leave-running")
        program.go_on()
        self.dump(program, "--leave-running", name="second")
        program.go_on()
        last = program.round(0)
        for _ in range(2):  # as often as one likes
            program.kill()
            program.will_go_back()
            self.restore(program, image)
            program.go_on()
            self.assertLess(program.rounds(0, program.moments[-1])[0], last)


class Rounds(Case):
    def test_a_hundred_rounds(self):
        self.start_daemon()
        program = self.memcheck("--max=3M")
        image = self.path("ck")
        for _ in range(100):
            self.dump(program, "--quiet")
            self.restore(program, image)
            program.go_on(rounds=1)
            shutil.rmtree(image)


class Attached(Case):
    """`bennu restore` without --detach stands in for the program."""

    def attach(self, program, **kwargs):
        command = [BENNU, "restore", self.path("ck")]
        kwargs.setdefault("stdout", subprocess.DEVNULL)
        with open(self.path("restore.log"), "wb") as log:
            process = subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL, stderr=log, **kwargs)
        program.restored = True
        wait_for(lambda: program.round(0) > self.last, "the restored program goes on",
                 lambda: "restore ended" if process.poll() is not None else None)
        return process

    def begin(self, **kwargs):
        self.start_daemon()
        program = self.memcheck(**kwargs)
        self.dump(program)
        self.last = program.round(0)
        return program

    def test_exit_code_and_signals_are_passed_on(self):
        program = self.begin()
        process = self.attach(program)
        process.send_signal(signal.SIGUSR1)
        self.assertEqual(process.wait(60), 42)
        program.check_sequence()
        self.assertIn("0 %d end\n" % program.pid, text_of(program.out))

    def test_death_by_a_signal(self):
        program = self.begin()
        process = self.attach(program)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(60), 128 + signal.SIGTERM)
        self.assertFalse(harness.alive(program.pid))

    def test_standard_descriptors_that_are_pipes(self):
        ours, theirs = os.pipe()
        try:
            program = self.start(MEMCHECK, "--allocs=4", stdin=subprocess.PIPE, stdout=theirs, wait=False)
        finally:
            os.close(theirs)
        lines = os.fdopen(ours, "r")
        self.assertEqual(self.read_rounds(lines, 3), [1, 2, 3])
        self.start_daemon()
        self.dump(program)
        with lines:
            text = lines.read()  # up to its end: the pipe is closed now
        rest = [int(line.split()[-1]) for line in text.splitlines()]
        program.popen.stdin.close()
        process = subprocess.Popen([BENNU, "restore", "--quiet", self.path("ck")], env=self.env, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        program.restored = True
        last = rest[-1] if rest else 3
        self.assertEqual(self.read_rounds(process.stdout, 3), [last + 1, last + 2, last + 3])
        process.send_signal(signal.SIGUSR1)
        process.stdout.read()
        process.stdout.close()
        self.assertEqual(process.wait(60), 42)

    @staticmethod
    def read_rounds(lines, n):
        return [int(lines.readline().split()[-1]) for _ in range(n)]


class WithoutDaemon(Case):
    """Plain criu with CRIU_LIBS_DIR: the plugin starts a bennud of its own for each dump and restore."""

    def criu(self, *args, **kwargs):
        criu = self.env.get("BENNU_CRIU", harness.CRIU)
        return self.run_command([criu, *args, "-D", self.path("ck"), "-v4"], env={"CRIU_LIBS_DIR": harness.PLUGIN_DIR}, **kwargs)

    def cycle(self, program):
        os.mkdir(self.path("ck"))
        children = harness.children_of(program.pid)
        done = self.criu("dump", "-t", program.pid, "-o", "dump.log")
        self.assertEqual(done.returncode, 0, done.stderr)
        program.gone(children)
        answer = self.ok_json("inspect", self.path("ck"), "--verify")
        done = self.criu("restore", "-d", "-o", "restore.log")
        self.assertEqual(done.returncode, 0, done.stderr)
        program.restored = True
        program.go_on()
        return answer

    def test_tree_with_agents(self):
        answer = self.cycle(self.tree())
        self.assertEqual([p["path"] for p in answer["processes"]], 3 * ["agent"])
        self.assertGreater(answer["gpu_bytes"], 0)

    def test_tree_without_agents(self):
        answer = self.cycle(self.tree(agent=False))
        self.assertEqual([p["path"] for p in answer["processes"]], 3 * ["driver"])

    def test_dump_by_criu_and_restore_by_bennu(self):
        program = self.memcheck()
        os.mkdir(self.path("ck"))
        self.assertEqual(self.criu("dump", "-t", program.pid, "-o", "dump.log").returncode, 0)
        program.gone([])
        self.start_daemon()
        self.restore(program)
        program.go_on()

    def test_the_private_daemon_ends(self):
        program = self.memcheck()
        self.cycle(program)
        wait_for(lambda: self.ours(daemons=True) == [program.pid], "the private bennud ends")


class StockImages(Case):
    """Images as CRIU's own CUDA plugin leaves them: the driver has locked and checkpointed the process before CRIU saved it, and
    the image's inventory names the plugin. The plugin is played by test/criu/other_plugin.c, which leaves the name; the driver's
    calls are made by hand, at the moment at which the stock plugin makes them: before CRIU stops the process."""

    def control(self, call, pid):
        done = self.run_command([harness.CONTROL, harness.DRIVER, call, pid])
        self.assertEqual(done.returncode, 0, f"{call}: {done.stderr}")
        return done.stdout.strip()

    def stock_dump(self):
        program = self.memcheck(agent=False)
        os.mkdir(self.path("ck"))
        os.mkdir(self.path("plugins"))
        shutil.copy(f"{harness.BUILD}/test/criu/other_plugin.so", self.path("plugins", "cuda_plugin.so"))
        self.control("lock", program.pid)
        self.control("checkpoint", program.pid)
        done = self.run_command([self.env.get("BENNU_CRIU", harness.CRIU), "dump", "-t", program.pid, "-D", self.path("ck"),
                                 "-o", "dump.log", "-v4"], env={"CRIU_LIBS_DIR": self.path("plugins")})
        self.assertEqual(done.returncode, 0, done.stderr)
        program.gone([])
        return program

    def test_restored_by_bennu(self):
        program = self.stock_dump()
        self.start_daemon()
        self.restore(program)
        program.go_on()
        self.assertEqual(self.control("state", program.pid), "0")

    def test_restored_by_plain_criu(self):
        program = self.stock_dump()
        done = self.run_command([self.env.get("BENNU_CRIU", harness.CRIU), "restore", "-d", "-D", self.path("ck"), "-v4",
                                 "-o", "restore.log"], env={"CRIU_LIBS_DIR": harness.PLUGIN_DIR})
        self.assertEqual(done.returncode, 0, done.stderr)
        program.restored = True
        program.go_on()


if __name__ == "__main__":
    harness.main()
