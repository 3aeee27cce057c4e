#!/usr/bin/env python3
"""Usage, messages and exit codes of everything that needs no CRIU run; with a daemon that pretends where one is needed."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
import unittest

import common
import fake_bennud
from common import Case, as_root
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
from waiting import wait_for  # noqa: E402

COMMANDS = ["run", "dump", "restore", "suspend", "resume", "ps", "inspect", "check"]


class Usage(Case):
    def test_help_and_version_end_well(self):
        self.assertRegex(self.bennu("--version").stdout, r"^bennu \d+\.\d+\.\d+\n$")
        text = self.bennu("--help").stdout
        for command in COMMANDS:
            self.assertIn(f"\n  {command} ", text)
            done = self.bennu(command, "--help")
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertTrue(done.stdout.startswith(f"Usage: bennu {command}"))
            self.assertEqual(done.stdout, self.bennu(command, "-h").stdout)

    def test_no_command(self):
        done = self.bennu()
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertIn("Usage:", done.stderr)

    def test_wrong_usage(self):
        for args, says in [
            (["frobnicate"], "there is no command 'frobnicate'"),
            (["--frobnicate"], "there is no option '--frobnicate'"),
            (["dump"], "PID and DIR"),
            (["dump", "1"], "PID and DIR"),
            (["dump", "1", "2", "3"], "too many operands"),
            (["dump", "x", self.path("d")], "'x' is not a process id"),
            (["dump", "0", self.path("d")], "'0' is not a process id"),
            (["dump", "-1", self.path("d")], "unknown option -1"),
            (["dump", "99999999999", self.path("d")], "is not a process id"),
            (["dump", "--frobnicate", "1", "2"], "unknown option --frobnicate"),
            (["dump", "--timeout", "soon", "1", "2"], "--timeout takes a number, not 'soon'"),
            (["dump", "1", "2", "--timeout"], "--timeout needs an argument"),
            (["dump", "--json=yes", "1", "2"], "--json=yes"),
            (["restore"], "DIR"),
            (["suspend"], "PID"),
            (["suspend", "12/x"], "'12/x' is neither a process id nor the name of a container"),
            (["suspend", "0"], "'0' is neither a process id nor the name of a container"),
            (["resume", "a" * 256], "is neither a process id nor the name of a container"),
            (["pre-dump", ""], "'' is neither a process id nor the name of a container"),
            (["resume"], "PID"),
            (["ps", "1"], "too many operands"),
            (["inspect"], "DIR"),
            (["check", "1"], "too many operands"),
            (["run"], "name the program"),
            (["run", "--frobnicate", "true"], "unknown option --frobnicate"),
        ]:
            with self.subTest(args=args):
                text = self.fails(2, *args, says=says)
                self.assertIn("--help'", text)
        self.assertFalse(os.path.exists(self.path("d")))

    def test_full_disk_behind_standard_output(self):
        with open("/dev/full", "w", encoding="utf-8") as full:
            done = subprocess.run([common.arguments.bennu, "--help"], stdout=full, stderr=subprocess.PIPE, text=True,
                                  check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("cannot write to standard output", done.stderr)


class Run(Case):
    """No driver is needed: one that can be loaded is enough."""

    def setUp(self):
        super().setUp()
        # Any shared library will do as driver and as agent: neither is asked for anything.
        with open("/proc/self/maps", encoding="utf-8") as maps:
            self.library = next(m[1] for m in (re.search(r"(/\S*/libc\.so\.6)$", line.strip()) for line in maps) if m)
        self.env.update(BENNU_DRIVER=self.library, BENNU_AGENT=self.library)

    def test_preloads_the_agent(self):
        done = self.bennu("run", "--", "sh", "-c", "echo $LD_PRELOAD")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, self.library + "\n", ""))

    def test_keeps_an_earlier_preload(self):
        other = self.library
        # A sanitized bennu would otherwise refuse any library that is loaded before its own.
        asan = os.environ.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0"
        done = self.bennu("run", "sh", "-c", "echo $LD_PRELOAD", env={**self.env, "LD_PRELOAD": other, "ASAN_OPTIONS": asan})
        self.assertEqual(done.stdout, f"{self.library}:{other}\n")

    def test_options_after_the_program_are_its_own(self):
        done = self.bennu("run", "echo", "--no-agent", "--help")
        self.assertEqual(done.stdout, "--no-agent --help\n")

    def test_no_agent(self):
        done = self.bennu("run", "--no-agent", "--", "sh", "-c", "echo \"<$LD_PRELOAD>\"")
        self.assertEqual((done.stdout, done.stderr), ("<>\n", ""))

    def test_without_a_driver_it_says_so_and_runs(self):
        done = self.bennu("run", "sh", "-c", "echo \"<$LD_PRELOAD>\"; exit 7",
                          env={**self.env, "BENNU_DRIVER": self.path("nowhere.so")})
        self.assertEqual((done.returncode, done.stdout), (7, "<>\n"))
        self.assertEqual(done.stderr.count("\n"), 1)
        self.assertIn("no NVIDIA driver", done.stderr)

    def test_exit_codes(self):
        self.assertEqual(self.bennu("run", "sh", "-c", "exit 3").returncode, 3)
        self.fails(127, "run", self.path("nothing"), says="cannot run")
        self.fails(126, "run", self.make("no-program"), says="cannot run")

    def test_agent_missing(self):
        self.fails(1, "run", "true", says=("cannot read the agent", "BENNU_AGENT"),
                   env={**self.env, "BENNU_AGENT": self.path("none.so")})

    def test_agent_path_that_cannot_be_preloaded(self):
        odd = self.make("a b.so")
        self.fails(1, "run", "true", says="space or colon", env={**self.env, "BENNU_AGENT": odd})


@unittest.skipUnless(as_root(), "needs root")
class Dump(Case):
    def setUp(self):
        super().setUp()
        self.program = subprocess.Popen(["sleep", "1000"])
        self.addCleanup(self.program.wait)
        self.addCleanup(self.program.kill)
        self.pid = self.program.pid
        os.mkdir(self.path("plugin"))
        self.make("plugin/bennu_plugin.so")
        self.env.update(BENNU_CRIU=self.fake_criu("4.1.1"), BENNU_PLUGIN_DIR=self.path("plugin"))
        self.target = self.path("checkpoint")

    def fails(self, *args, **kwargs):
        text = super().fails(*args, **kwargs)
        self.assertFalse(os.path.exists(self.target), "the directory that was made is still there")
        self.assertIsNone(self.program.poll(), "the process ended")
        return text

    def test_process(self):
        ended = subprocess.Popen(["true"])
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        self.fails(1, "dump", ended.pid, self.target, says="has ended already")
        ended.wait()
        self.fails(1, "dump", ended.pid, self.target, says=f"there is no process {ended.pid}")
        self.fails(1, "dump", os.getpid(), self.target, says=("runs below process", "another shell"))
        self.fails(1, "dump", 1, self.target)

    def test_itself(self):
        done = subprocess.run(["sh", "-c", 'exec "$0" dump $$ "$1"', common.arguments.bennu, self.target], env=self.env,
                              stderr=subprocess.PIPE, text=True, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("is this command itself", done.stderr)

    def test_thread(self):
        code = "import threading,time,sys; t=threading.Thread(target=time.sleep,args=(1000,),daemon=True); t.start();" \
               "print(t.native_id,flush=True); time.sleep(1000)"
        program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        self.addCleanup(program.wait)
        self.addCleanup(program.stdout.close)
        self.addCleanup(program.kill)
        thread = int(program.stdout.readline())
        self.fails(1, "dump", thread, self.target, says=f"is a thread of process {program.pid}")

    def test_not_root(self):
        self.fails(1, "dump", self.pid, self.target, says=("belongs to root", "sudo"), **self.nobody())
        own = subprocess.Popen(["sleep", "1000"], user=65534)
        self.addCleanup(own.wait)
        self.addCleanup(own.kill)
        self.fails(1, "dump", own.pid, self.target, says="needs root", **self.nobody())

    def test_directory(self):
        full = self.path("full")
        os.mkdir(full)
        self.make("full/file")
        self.fails(1, "dump", self.pid, full, says=("is not empty", full))
        self.assertEqual(os.listdir(full), ["file"])
        self.fails(1, "dump", self.pid, self.make("file"), says="is not a directory")
        self.fails(1, "dump", self.pid, self.path("no/such/parent"), says="parent directory does not exist")
        self.fails(1, "dump", self.pid, "/proc/bennu", says="cannot make")
        self.fails(1, "dump", self.pid, "/proc/self/task", says="not empty")

    def test_directory_not_writable(self):
        empty = self.path("empty")
        os.mkdir(empty)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", empty], check=False, stderr=subprocess.DEVNULL)
        if mounted.returncode != 0:
            self.skipTest("cannot mount here")
        self.addCleanup(subprocess.run, ["umount", empty], check=True)
        self.fails(1, "dump", self.pid, empty, says=("cannot write to the directory", empty, "Read-only"))

    def test_criu(self):
        env = {**self.env, "BENNU_CRIU": self.path("nowhere")}
        self.fails(1, "dump", self.pid, self.target, env=env, says=("cannot run CRIU at", "BENNU_CRIU"))
        env = {**self.env, "BENNU_CRIU": self.fake_criu("3.17")}
        self.fails(1, "dump", self.pid, self.target, env=env, says=("is version 3.17; 4.0 or newer is needed"))
        env = {**self.env, "BENNU_CRIU": self.make("broken", 0o755, "#!/bin/sh\necho no such library >&2; exit 1\n")}
        self.fails(1, "dump", self.pid, self.target, env=env, says=("does not start", "no such library"))
        env = {**self.env, "BENNU_CRIU": self.make("other", 0o755, "#!/bin/sh\necho hello\n")}
        self.fails(1, "dump", self.pid, self.target, env=env, says="is it CRIU?")

    def test_plugin_missing(self):
        os.unlink(self.path("plugin/bennu_plugin.so"))
        self.fails(1, "dump", self.pid, self.target, says=("CRIU plugin is not at", "BENNU_PLUGIN_DIR"))

    def test_daemon_not_running(self):
        text = self.fails(4, "dump", self.pid, self.target)
        self.assertIn("systemctl start bennud", text)
        error = self.fails_in_json(4, "dump", self.pid, self.target)
        self.assertEqual(error["stage"], "daemon")

    def test_daemon_refuses(self):
        daemon = fake_bennud.FakeBennud(self.rundir, common.arguments.control)
        self.addCleanup(daemon.stop)
        daemon.plan["CHECK"] = fake_bennud.Refusal(95, "it uses 12 MiB of managed memory", "check")
        self.fails(3, "dump", self.pid, self.target, says="12 MiB of managed memory")
        self.assertEqual(self.fails_in_json(3, "dump", self.pid, self.target)["stage"], "check")
        daemon.plan["CHECK"] = fake_bennud.Refusal(19, "no GPU\n\x1b[31m here", "driver")
        self.fails(1, "dump", self.pid, self.target, says="no GPU??[31m here")
        daemon.plan["CHECK"] = lambda values, fds: bytes(16)
        self.fails(3, "dump", self.pid, self.target, says=("does not use CUDA", "criu dump", "--allow-no-cuda"))
        self.assertEqual(daemon.asked[-1], ("CHECK", [self.pid]))
        daemon.plan["CHECK"] = lambda values, fds: bytes(3)
        self.fails(1, "dump", self.pid, self.target, says="makes no sense")
        daemon.plan["CHECK"] = lambda values, fds: b"\1\0\0\0\1\0\0\0" + (1 << 60).to_bytes(8, "little")
        self.fails(1, "dump", self.pid, self.target, says=(self.target, "free", "--no-space-check"))


@unittest.skipUnless(as_root(), "needs root")
class Restore(Case):
    def setUp(self):
        super().setUp()
        os.mkdir(self.path("plugin"))
        self.make("plugin/bennu_plugin.so")
        os.mkdir(self.path("ck"))
        self.env.update(BENNU_CRIU=self.fake_criu("4.1.1"), BENNU_PLUGIN_DIR=self.path("plugin"))

    def record(self, **changes):
        self.make("ck/inventory.img", text="x")
        record = {"version": 1, "gpu": True, "criu": 40101, "pids": [2 ** 22 + 5], "stdio": ["", "", ""], **changes}
        self.make("ck/bennu-command.json", text=json.dumps(record))

    def test_not_a_checkpoint(self):
        self.fails(1, "restore", self.path("nothing"), says="cannot open the checkpoint")
        self.fails(5, "restore", self.make("file"), says="cannot open the checkpoint")
        self.fails(5, "restore", self.path("ck"), says=("is not a checkpoint", "inventory.img"))
        self.assertEqual(self.fails_in_json(5, "restore", self.path("ck"))["stage"], "image")

    def test_cut_off(self):
        self.record()
        self.fails(5, "restore", self.path("ck"), says=("is not complete", "bennu-manifest.img"))
        self.fails(5, "inspect", self.path("ck"), says=("is not complete", "bennu-manifest.img"))

    def test_damaged(self):
        self.record()
        for text in ["", "{", "[]", '{"version":1}', json.dumps({"version": 2}),
                     '{"version":1,"gpu":false,"criu":1,"pids":[],"stdio":["","",""]}',
                     '{"version":1,"gpu":false,"criu":1,"pids":[-4],"stdio":["","",""]}',
                     '{"version":1,"gpu":false,"criu":1,"pids":["1"],"stdio":["","",""]}',
                     '{"version":1,"gpu":false,"criu":1,"pids":[1],"stdio":["","pipe:[1] x",""]}',
                     '{"version":1,"gpu":false,"criu":1,"pids":[1],"stdio":["tty[1]","",""]}']:
            with self.subTest(text=text):
                self.make("ck/bennu-command.json", text=text)
                self.fails(5, "restore", self.path("ck"), says=("is damaged", "bennu-command.json"))
        self.record()
        self.make("ck/bennu-manifest.img", text="rubbish")
        self.fails(5, "restore", self.path("ck"))
        self.fails(5, "inspect", self.path("ck"))

    def test_process_id_taken(self):
        self.record(gpu=False, pids=[os.getpid()])
        self.fails(1, "restore", self.path("ck"), says=(f"needs process id {os.getpid()}", "unshare"))

    def test_older_criu(self):
        self.record(gpu=False, criu=40300)
        self.fails(1, "restore", self.path("ck"), says=("made by CRIU 4.3", "is 4.1.1"))

    def test_not_root(self):
        self.record(gpu=False)
        self.fails(1, "restore", self.path("ck"), says="needs root", **self.nobody())


class Inspect(Case):
    def test_not_a_checkpoint(self):
        os.mkdir(self.path("ck"))
        self.fails(5, "inspect", self.path("ck"), says="is not a checkpoint")
        self.make("ck/inventory.img", text="x")
        self.fails(5, "inspect", self.path("ck"), says="checkpoint of CRIU's without GPU memory")
        self.fails(1, "inspect", self.path("none"), says="cannot open")
        self.assertEqual(self.fails_in_json(5, "inspect", self.path("ck"))["stage"], "image")


@unittest.skipUnless(as_root(), "needs root")
class Containers(Case):
    """Operands that are names, with a podman that says what the test wants."""

    def podman(self, says, status=0, errors=""):
        os.makedirs(self.path("bin"), exist_ok=True)
        self.make("bin/podman", 0o755, f"#!/bin/sh\necho \"$@\" >{self.path('asked')}\nprintf '%s' '{errors}' >&2\nprintf '%s' '{says}'\nexit {status}\n")
        self.env["PATH"] = f"{self.path('bin')}:{os.environ['PATH']}"

    def test_answers(self):
        for command in ("suspend", "resume", "pre-dump"):
            for answer, says in [
                (dict(says="bennu-pid=0 exited\n"), "container 'llm' does not run: Podman calls it exited"),
                (dict(says="bennu-pid=99999999999 running\n"), "container 'llm' does not run"),
                (dict(says="", status=125, errors="one\nError: no such container llm\n"), "Podman knows no container 'llm': Error: no such container llm"),
                (dict(says="", status=0), "Podman's answer about container 'llm' makes no sense"),
                (dict(says="bennu-pid=x running"), "Podman's answer about container 'llm' makes no sense"),
                (dict(says="a\x1b[31mb", status=1), "Podman knows no container 'llm': a [31mb"),
            ]:
                with self.subTest(command=command, answer=answer):
                    self.podman(**answer)
                    self.fails(1, command, "llm", says=says)
        with open(self.path("asked"), encoding="utf-8") as asked:
            self.assertEqual(asked.read(), "container inspect --format bennu-pid={{.State.Pid}} {{.State.Status}} llm\n")

    def group(self):
        """A control group of the test's own, of version 2."""
        for base in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
            group = os.path.join(base, os.path.basename(self.dir))
            with contextlib.suppress(OSError):
                os.mkdir(group)
                self.addCleanup(os.rmdir, group)
                if os.path.exists(os.path.join(group, "cgroup.freeze")):
                    return group
        return self.skipTest("no control group with a freezer can be made here")

    def test_paused(self):
        group = self.group()

        def write(name, what):
            with open(os.path.join(group, name), "w", encoding="utf-8") as f:
                f.write(str(what))

        def is_frozen():
            with open(os.path.join(group, "cgroup.events"), encoding="utf-8") as f:
                return "frozen 1" in f.read()
        process = subprocess.Popen(["sleep", "1000"])
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.addCleanup(write, "cgroup.freeze", 0)
        self.podman(f"bennu-pid={process.pid} paused\n")
        write("cgroup.procs", process.pid)
        write("cgroup.freeze", 1)
        wait_for(is_frozen, "the group is frozen")
        for command in ("suspend", "resume", "pre-dump"):
            with self.subTest(command):
                self.fails(1, command, "llm", says="container 'llm' is paused: 'podman unpause llm' first")
                self.fails(1, command, process.pid, says=(f"process {process.pid} is frozen with its cgroup {group}", "podman unpause"))
                self.assertEqual(self.fails_in_json(1, command, "llm")["stage"], "container")
        self.fails(4, "pre-dump", "--drop", "llm")  # needs nothing of it
        write("cgroup.freeze", 0)
        self.fails(4, "suspend", "llm", says="bennud is not running")

    def test_its_process_is_meant(self):
        self.podman(f"bennu-pid={os.getpid()} running\n", errors="WARN: something else\n")
        daemon = fake_bennud.FakeBennud(self.rundir, common.arguments.control)
        daemon.plan["RESUME"] = lambda values, fds: fake_bennud.phases()
        done = self.bennu("resume", "--json", "web-1.a_b")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(json.loads(done.stdout)["pid"], os.getpid())
        self.assertEqual([values[0] for name, values in daemon.asked if name == "RESUME"], [os.getpid()])

    def test_no_podman(self):
        self.env["PATH"] = self.path("nowhere")
        self.fails(1, "suspend", "llm", says="there is no podman here")


class WithDaemon(Case):
    def setUp(self):
        super().setUp()
        self.daemon = fake_bennud.FakeBennud(self.rundir, common.arguments.control)
        self.addCleanup(self.daemon.stop)

    def test_ps(self):
        def ps(values, fds):
            for body in [fake_bennud.process(11, "python3"), fake_bennud.process(12, "evil\x1b[2J", 6, "no agent: why")]:
                self.daemon.send("EV_PROCESS", body=body)
            return b""

        self.daemon.plan["PS"] = ps
        done = self.bennu("ps")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        rows = done.stdout.splitlines()
        self.assertEqual(rows[0].split(), ["PID", "COMMAND", "STATE", "TIER", "GPU", "HOST", "DISK", "ALLOCS", "NOTE"])
        self.assertEqual(rows[1].split(), ["11", "python3", "running", "-", "3.2", "GB", "0", "B", "0", "B", "12"])
        self.assertIn("evil?[2J", rows[2])
        self.assertNotIn("\x1b", done.stdout)
        answer = json.loads(self.bennu("ps", "--json").stdout)
        self.assertIs(answer["ok"], True)
        self.assertEqual([p["pid"] for p in answer["processes"]], [11, 12])
        self.assertEqual(answer["processes"][0], {
            "pid": 11, "command": "python3", "state": "running", "gpu_bytes": 3 << 30, "host_bytes": 0, "disk_bytes": 0,
            "tier": None, "allocations": 12, "unknown_functions": 0, "note": ""})

    def test_ps_of_nothing(self):
        self.daemon.plan["PS"] = lambda values, fds: b""
        self.assertEqual(json.loads(self.bennu("ps", "--json").stdout), {"ok": True, "processes": []})

    @unittest.skipUnless(as_root(), "needs root")
    def test_suspend_and_resume(self):
        program = subprocess.Popen(["sleep", "1000"])
        self.addCleanup(program.wait)
        self.addCleanup(program.kill)

        def suspend(values, fds):
            self.daemon.progress("copy out", 1 << 30, 4 << 30)
            return fake_bennud.phases(("gate", 0, 1_000_000, 0), ("copy out", 1_000_000, 100_000_000, 4_000_000_000))

        self.daemon.plan["SUSPEND"] = suspend
        done = self.bennu("suspend", program.pid)
        self.assertEqual((done.returncode, done.stderr), (0, ""), "no progress is shown on a pipe")
        self.assertRegex(done.stdout, r"copy out +0\.001 s +0\.100 s +4\.0 GB +40\.00\n")
        self.assertEqual(self.daemon.asked[-1], ("SUSPEND", [program.pid, 1, 1]))
        self.assertEqual(self.bennu("suspend", program.pid, "--quiet").stdout, "")
        for tier, number in (("gpu", 2), ("disk", 3), ("host", 1)):
            self.assertEqual(self.bennu("suspend", program.pid, "--quiet", "--to", tier).returncode, 0)
            self.assertEqual(self.daemon.asked[-1], ("SUSPEND", [program.pid, number, 1]))
        self.assertEqual(self.bennu("suspend", program.pid, "--to", "tape").returncode, 2)
        answer = json.loads(self.bennu("suspend", "--json", program.pid).stdout)
        self.assertEqual(answer["phases"][1], {"name": "copy out", "start_s": 0.001, "duration_s": 0.1,
                                               "bytes": 4_000_000_000})
        self.daemon.plan["RESUME"] = fake_bennud.Refusal(2, "process 5 is not suspended")
        self.fails(1, "resume", program.pid, says="is not suspended")
        self.daemon.plan["RESUME"] = fake_bennud.Refusal(95, "cannot be")
        self.fails(3, "resume", program.pid, says="cannot be")

    def on_terminal(self, *args):
        """What the command writes to a terminal, all of it."""
        ours, theirs = pty.openpty()
        command = subprocess.Popen([common.arguments.bennu, *map(str, args)], env=self.env, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=theirs)
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the other side open any more
            while part := os.read(ours, 4096):
                text += part
                self.seen(text)
        os.close(ours)
        self.assertEqual(command.wait(100), 0, text)
        return text.decode()

    @unittest.skipUnless(as_root(), "needs root")
    def test_progress(self):
        program = subprocess.Popen(["sleep", "1000"])
        self.addCleanup(program.wait)
        self.addCleanup(program.kill)
        drawn = threading.Event()
        self.seen = lambda text: drawn.set() if b"GB of" in text else None

        def suspend(values, fds):
            self.daemon.progress("copy\x1bout", 1 << 30, 4 << 30)
            self.assertTrue(drawn.wait(100) if slow else True)
            return fake_bennud.phases(("copy out", 0, 1_000_000, 4_000_000_000))

        self.daemon.plan["SUSPEND"] = suspend
        slow = True
        text = self.on_terminal("suspend", program.pid)
        self.assertRegex(text, r"^\r\x1b\[Kcopy\?out +\[#+-+\] 1\.1 GB of 4\.3 GB  \d+\.\d GB/s")
        self.assertTrue(text.endswith("\r\x1b[K"), "the bar is wiped away")
        self.assertNotIn("\n", text)
        for line in text.split("\r\x1b[K"):
            self.assertLess(len(line), 80, "it stays within the line")
        slow = False
        # An answer that comes at once draws nothing; on a loaded machine "at once" may be late, but what is drawn is wiped.
        self.assertRegex(self.on_terminal("suspend", program.pid), r"^(.*\r\x1b\[K)?$")

        def wait(values, fds):
            self.daemon.progress("copy out", 1 << 30, 4 << 30)
            time.sleep(0.7)
            return fake_bennud.phases(("copy out", 0, 1_000_000, 4_000_000_000))

        self.daemon.plan["SUSPEND"] = wait
        done = self.bennu("suspend", program.pid)
        self.assertEqual((done.returncode, done.stderr), (0, ""), "nothing of it is shown on a pipe")
        self.assertNotIn("\x1b", done.stdout)

    @unittest.skipUnless(as_root(), "needs root")
    def test_daemon_dies(self):
        program = subprocess.Popen(["sleep", "1000"])
        self.addCleanup(program.wait)
        self.addCleanup(program.kill)

        def die(values, fds):
            raise OSError

        self.daemon.plan["SUSPEND"] = die
        self.fails(1, "suspend", program.pid, says="bennud ended before it answered")

    def test_check(self):
        self.daemon.plan["INFO"] = lambda values, fds: fake_bennud.daemon_info()
        answer = json.loads(self.bennu("check", "--json").stdout)
        found = {c["name"]: c for c in answer["checks"]}
        for name in ["kernel", "kernel options", "permissions", "ptrace", "criu", "plugin", "system plugins", "driver", "daemon",
                     "run folder", "agent", "MPS", "memory", "disk", "GPU 0"]:
            self.assertIn(name, found)
        self.assertEqual(found["driver"]["level"], "ok")
        self.assertIn("13.0", found["driver"]["found"])
        for c in answer["checks"]:
            self.assertIn(c["level"], ("ok", "warn", "fail"))
        self.daemon.plan["INFO"] = lambda values, fds: fake_bennud.daemon_info(driver=12040)
        done = self.bennu("check")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stdout, r"\[fail\] driver .*install driver 570 or newer")


class WithoutDaemon(Case):
    def test_not_running(self):
        for args in (["ps"],) + ((["suspend", os.getppid()], ["resume", os.getppid()]) if as_root() else ()):
            self.fails(4, *args, says=("bennud is not running", "systemctl start bennud"))
            self.fails_in_json(4, *args)

    def test_check_names_what_is_missing(self):
        env = {**self.env, "BENNU_AGENT": self.path("agent.so"), "BENNU_PLUGIN_DIR": self.dir,
               "BENNU_CRIU": self.fake_criu("3.17"), "BENNU_DRIVER": self.path("libcuda.so.1")}
        done = self.bennu("check", env=env)
        self.assertEqual(done.returncode, 1)
        for name in ["criu", "plugin", "driver", "daemon", "agent"]:
            self.assertRegex(done.stdout, rf"(?m)^\[fail\] {name} .*:")


if __name__ == "__main__":
    unittest.main(argv=common.parse())
