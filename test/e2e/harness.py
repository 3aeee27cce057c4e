"""What the end-to-end tests share: a daemon of the test's own, programs that check themselves, and the command line.

Every test has a folder, a run folder and a simulated machine of its own (BENNU_SIM_MACHINE). Nothing here sleeps for a time and
hopes: it waits for a line in a file or for the end of a process. When a test fails, the logs of all that took part are printed.
"""

import contextlib
import ctypes
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest

BUILD = os.environ.get("BENNU_BUILD") or os.path.abspath("build")
SOURCE = os.environ.get("BENNU_SOURCE") or os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
from waiting import PATIENCE, text_of, wait_for  # noqa: E402,F401

BENNU = f"{BUILD}/src/cli/bennu"
BENNUD = f"{BUILD}/src/daemon/bennud"
PLUGIN_DIR = f"{BUILD}/src/criu"
DRIVER = f"{BUILD}/sim/libcuda.so.1"
CRIU = f"{BUILD}/criu/bin/criu" if os.path.exists(f"{BUILD}/criu/bin/criu") else "criu"
MEMCHECK = f"{BUILD}/test/cr/memcheck"
ODD = f"{BUILD}/test/cr/odd"
CONTROL = f"{BUILD}/test/cr/control"
IMAGE = f"{BUILD}/test/cr/image"
MANIFEST = "bennu-manifest.img"
# Of words in an agent's page (wire/agent_proto.h): that memory could be let go of; that an allocation waits for it, in bytes.
NEED_HOT, NEED_WANTED = 6816, 6832

_numbers = itertools.count()


def become_subreaper():
    """Restored processes have no parent: they become our children, so that we can wait for their ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(36, 1, 0, 0, 0) != 0:  # PR_SET_CHILD_SUBREAPER
        raise OSError(ctypes.get_errno(), "prctl")


def state_of(pid):
    """The letter of /proc/PID/stat; None: no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return chr(f.read().rpartition(b")")[2].split()[0][0])
    except (OSError, IndexError):
        return None


def alive(pid):
    return state_of(pid) not in (None, "Z", "X")


def reap(pid):
    """The end of a restored process that is our child: its exit code, negative for a signal."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def children_of(pid):
    """All descendants."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as f:
                parent = int(f.read().rpartition(b")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            found += [int(entry)] + children_of(int(entry))
    return found


def agent_word(pid, at):
    """The word there in the page of the process's agent; 0: it has none."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if "bennu-agent" in os.readlink(f"/proc/{pid}/fd/{fd}"):
                with open(f"/proc/{pid}/fd/{fd}", "rb") as f:
                    return int.from_bytes(os.pread(f.fileno(), 4, at), "little")
    return 0


def files_of_criu(folder):
    """What the manifest has hashes of, by name: its bytes. CRIU's and the plugin's images, and the command line's record."""
    return {e.name: e.stat().st_size for e in os.scandir(folder)
            if e.name.endswith((".img", ".json")) and not e.name.startswith("bennu-pack-") and e.name != MANIFEST}


class Program:
    """A program under test, through its dumps and restores: it keeps its pid and its output files."""

    def __init__(self, case, args, roles, env, agent, stdin=subprocess.DEVNULL, stdout=None, stderr=None):
        n = next(_numbers)
        self.case = case
        self.out = case.path(f"out-{n}")
        self.err = case.path(f"err-{n}")
        self.roles = list(roles)
        command = [BENNU, "run"] + ([] if agent else ["--no-agent"]) + ["--"] + [str(a) for a in args]
        with open(self.out, "ab") as out, open(self.err, "ab") as err:
            self.popen = subprocess.Popen(command, stdin=stdin, stdout=stdout or out, stderr=stderr or err, env=env,
                                          start_new_session=True, cwd="/")
        self.pid = self.popen.pid
        self.pids = [self.pid]  # of the tree, at its last dump
        self.restored = False
        self.moments = [0]  # where in the output a life begins that did not follow on the one before it

    def rounds(self, role, since=0):
        with open(self.out, "rb") as f:
            f.seek(since)
            return [int(n) for n in re.findall(rb"^%d \d+ round (\d+)\n" % role, f.read(), re.M)]

    def round(self, role):
        """The number of the last whole round that `role` has reported."""
        return (self.rounds(role, self.moments[-1]) or [0])[-1]

    def trouble(self):
        if "WRONG" in text_of(self.err):
            return text_of(self.err)
        if not alive(self.pid):
            return f"process {self.pid} has ended: {text_of(self.err)[-500:]}"
        return None

    def go_on(self, rounds=2):
        """Every process of the tree does some more rounds, each of which checks every byte. Rounds are reported from 1 on, each
        once: nothing is lost and nothing done twice."""
        before = {r: self.round(r) for r in self.roles}
        for r in self.roles:
            wait_for(lambda r=r: self.round(r) >= before[r] + rounds, f"role {r} of {self.pid} goes on after round {before[r]}",
                     self.trouble)
        self.check_sequence()

    def rest(self):
        """Holds `cut` still until SIGUSR2, so that what is new is known exactly."""
        os.kill(self.pid, signal.SIGUSR1)
        wait_for(lambda: "sigsuspend" in text_of(f"/proc/{self.pid}/wchan"), "it rests", self.trouble)

    def check_sequence(self):
        for r in self.roles:
            seen = self.rounds(r, self.moments[-1])
            first = 1 if self.moments == [0] else seen[0]
            self.case.assertEqual(seen, list(range(first, first + len(seen))), f"rounds of role {r}")
        self.case.assertNotIn("WRONG", text_of(self.err))

    def will_go_back(self):
        """Its next restore is of an older moment: it repeats rounds that it has reported already."""
        self.moments.append(os.path.getsize(self.out))

    def wait(self):
        """Waits for the end; returns the exit code, negative for a signal."""
        if not self.restored:
            return self.popen.wait(PATIENCE)
        return reap(self.pid)

    def gone(self, children):
        """A dump has ended it and its `children`: collect them, whose parent we are now, so that their pids are free."""
        self.case.assertEqual(self.wait(), -signal.SIGKILL)
        for pid in children:
            self.case.assertEqual(reap(pid), -signal.SIGKILL)

    def kill(self):
        children = children_of(self.pid)
        for pid in [self.pid] + children:
            os.kill(pid, signal.SIGKILL)
        self.gone(children)


class Case(unittest.TestCase):
    sim = {"BENNU_SIM_STATE_MB": "1", "BENNU_SIM_MEMORY": "256M"}

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="bennu-e2e.")
        os.chmod(self.dir, 0o755)
        self.machine = f"e2e-{os.getpid()}-{next(_numbers)}"
        self.rundir = self.path("run")
        keep = {k: v for k, v in os.environ.items()
                if not k.startswith(("BENNU_", "CRIU_", "LD_")) or k in ("BENNU_CRIU",)}
        # The library path leads programs without the agent to the simulated driver.
        self.env = {**keep, **self.sim, "BENNU_DRIVER": DRIVER, "BENNU_RUNDIR": self.rundir,
                    "BENNU_SIM_MACHINE": self.machine, "LD_LIBRARY_PATH": f"{BUILD}/sim"}
        self.daemon = None
        self.programs = []
        self.commands = []
        self.addCleanup(self._clean)

    # --- the folder ---

    def path(self, *names):
        return os.path.join(self.dir, *names)

    # --- the daemon ---

    def start_daemon(self, *args, **env):
        self.daemon_log = self.path("bennud.log")
        mark = len(text_of(self.daemon_log))
        with open(self.daemon_log, "ab") as log:
            self.daemon = subprocess.Popen([BENNUD, "--rundir", self.rundir, *args], stdin=subprocess.DEVNULL, stdout=log,
                                           stderr=log, env={**self.env, **env}, start_new_session=True)
        wait_for(lambda: " GPUs" in text_of(self.daemon_log)[mark:], "bennud starts",
                 lambda: None if alive(self.daemon.pid) else "it ended: " + text_of(self.daemon_log)[mark:])

    def stop_daemon(self):
        daemon, self.daemon = self.daemon, None
        daemon.terminate()
        return daemon.wait(PATIENCE)

    # --- programs ---

    def start(self, *args, agent=True, roles=(0,), wait=True, env=None, **kwargs):
        program = Program(self, args, roles, {**self.env, **(env or {})}, agent, **kwargs)
        self.programs.append(program)
        if wait:
            program.go_on()
        return program

    def memcheck(self, *args, **kwargs):
        small = ["--allocs=8", "--min=4", "--max=5M"]
        return self.start(MEMCHECK, *small, *args, **kwargs)

    def tree(self, children=2, root_cuda=True, **kwargs):
        args = [f"--children={children}"] + ([] if root_cuda else ["--root-without-cuda"])
        return self.memcheck(*args, roles=range(0 if root_cuda else 1, children + 1), **kwargs)

    def ours(self, daemons=False):
        """Living processes of this test's simulated machine; without bennud's if not asked for."""
        found = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or (not daemons and text_of(f"/proc/{entry}/comm").startswith("bennud")):
                continue
            try:
                with open(f"/proc/{entry}/environ", "rb") as f:
                    if f"BENNU_SIM_MACHINE={self.machine}\0".encode() in f.read() and alive(int(entry)):
                        found.append(int(entry))
            except OSError:
                pass
        return found

    def nothing_left(self, program, *but):
        """A failed restore leaves nothing of `program`, and no process but these. Those it has killed may be our children: they are
        collected."""
        def look():
            for entry in os.listdir("/proc"):
                if entry.isdigit() and state_of(entry) == "Z" and int(entry) not in but:
                    with contextlib.suppress(ChildProcessError, OSError):
                        os.waitpid(int(entry), os.WNOHANG)
            return self.ours() == list(but) and not any(state_of(pid) for pid in program.pids)
        wait_for(look, "nothing is left")

    # --- the command line ---

    def run_command(self, command, env=None, timeout=120, **kwargs):
        """`env`: what is to be set beside the test's own; None unsets."""
        kwargs.setdefault("stdin", subprocess.DEVNULL)
        done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              timeout=timeout, check=False,
                              env={k: v for k, v in {**self.env, **(env or {})}.items() if v is not None}, **kwargs)
        self.commands.append(done)
        return done

    def bennu(self, *args, **kwargs):
        return self.run_command([BENNU, *args], **kwargs)

    def ok(self, *args, **kwargs):
        done = self.bennu(*args, **kwargs)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def ok_json(self, *args, **kwargs):
        done = self.ok(*args, "--json", **kwargs)
        self.assertEqual(done.stderr, "")
        self.assertEqual(done.stdout.count("\n"), 1)
        answer = json.loads(done.stdout)
        self.assertIs(answer["ok"], True)
        return answer

    def refused(self, code, *args, says=(), **kwargs):
        """The command ends with `code` and one message; with --json the same is in the answer. Returns the message."""
        done = self.bennu(*args, **kwargs)
        self.assertEqual(done.returncode, code, done.stderr + done.stdout)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertTrue(done.stderr.startswith("bennu"), done.stderr)
        self.assertEqual(done.stdout, "")
        for text in (says,) if isinstance(says, str) else says:
            self.assertIn(text, done.stderr)
        return done.stderr

    # --- dump and restore ---

    def dump(self, program, *args, name="ck"):
        children = children_of(program.pid)
        program.pids = [program.pid] + children
        self.ok("dump", program.pid, self.path(name), *args)
        if "--leave-running" not in args:
            program.gone(children)
        return self.path(name)

    def restore(self, program, image=None, *args):
        done = self.ok("restore", image or self.path("ck"), "--detach", *args)
        self.assertEqual(done.stdout.strip(), str(program.pid))
        program.restored = True
        return done

    def no_checkpoint(self, path):
        """Nothing in `path` looks like a checkpoint."""
        if os.path.isdir(path):
            self.assertEqual(os.listdir(path), [])

    # --- the end ---

    def _show(self):
        print(f"\n===== {self.id()} =====", file=sys.stderr)
        for done in self.commands[-6:]:
            print(f"--- {done.args} -> {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}", file=sys.stderr)
        for folder, _, files in os.walk(self.dir):
            for name in sorted(files):
                if name.endswith(".log") or name.startswith(("out-", "err-")):
                    print(f"--- {folder}/{name}\n{text_of(os.path.join(folder, name))[-4000:]}", file=sys.stderr)
        for done in self.commands[-3:]:
            for log in re.findall(r"CRIU's log: (/tmp/bennu-restore[^)]*)\)", done.stderr):
                print(f"--- {log}\n{text_of(log)[-4000:]}", file=sys.stderr)
        for pid in self.ours():
            print(f"--- left: {pid} {text_of(f'/proc/{pid}/stat').strip()[:60]}", file=sys.stderr)
            for thread in os.listdir(f"/proc/{pid}/task"):
                print(f"    {thread} {text_of(f'/proc/{pid}/task/{thread}/wchan')}", file=sys.stderr)

    def _clean(self):
        if not self._outcome.success:
            self._show()
        for pid in self.ours():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for program in self.programs:
            if not program.restored:
                program.popen.wait(PATIENCE)
        if self.daemon:
            self.daemon.terminate()
            try:
                self.daemon.wait(15)
            except subprocess.TimeoutExpired:
                self.daemon.kill()
                self.daemon.wait(15)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        for done in self.commands:
            for log in re.findall(r"CRIU's log: (/tmp/bennu-restore[^/]*)/", done.stderr):
                shutil.rmtree(log, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink("/dev/shm/cuda-sim." + self.machine)  # the simulated driver's; no process of the machine is left
        shutil.rmtree(self.dir, ignore_errors=True)


def main():
    if os.geteuid() != 0:
        print("these tests need root", file=sys.stderr)
        sys.exit(77)
    for sig in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(sig) == signal.SIG_IGN:  # by nohup, or a shell that runs us in the background
            signal.signal(sig, signal.SIG_DFL)
    become_subreaper()
    unittest.main(verbosity=2)
