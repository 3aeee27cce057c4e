"""What the tests of killed parts share: an application that checks itself, daemons that are killed at a named step, and looks at
what is left. Waits for things to happen, never for time to pass."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
from waiting import PATIENCE, text_of, wait_for  # noqa: E402,F401

BUILD = os.environ.get("BENNU_BUILD") or os.path.abspath("build")
BENNU = f"{BUILD}/src/cli/bennu"
BENNUD = f"{BUILD}/src/daemon/bennud"
DRIVER = f"{BUILD}/sim/libcuda.so.1"
AGENT = f"{BUILD}/src/agent/libbennu.so"
COUNTER = f"{BUILD}/test/demo/counter"
CRIU = f"{BUILD}/criu/bin/criu"
MANIFEST = "bennu-manifest.img"


def stat_of(pid):
    """State letter and parent, or None."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            words = f.read().rpartition(b")")[2].split()
        return words[0].decode(), int(words[1])
    except (OSError, IndexError):
        return None


def alive(pid):
    stat = stat_of(pid)
    return stat is not None and stat[0] not in "ZX"


def children(pid):
    return [int(p) for p in os.listdir("/proc") if p.isdigit() and (stat_of(p) or ("", 0))[1] == pid and alive(p)]


def descendants(pid):
    return [p for c in children(pid) for p in [c] + descendants(c)]


def vanish(pid):
    """Kill a tree that may be our child or, restored, our adopted one."""
    pids = [pid] + descendants(pid)
    for p in pids:
        try:
            os.kill(p, signal.SIGKILL)
        except ProcessLookupError:
            pass
    bury(pids)


def bury(pids):
    """Wait until their numbers are free again. Orphans are ours to wait for."""
    def gone():
        for p in pids:
            try:
                os.waitpid(p, os.WNOHANG)
            except ChildProcessError:
                pass
        return all(stat_of(p) is None for p in pids)
    wait_for(gone, f"the end of {pids}")


class Application:
    """Two counters with an agent and one that the driver alone serves, below a shell. Each checks every word of its memory at
    each step and ends as soon as one is wrong."""

    def __init__(self, folder, env):
        self.outs = [f"{folder}/count-{i}" for i in range(3)]
        line = "; ".join(
            f"{'env -u LD_PRELOAD ' if i == 2 else ''}{COUNTER} {24 if i == 0 else 8} >>{out} 2>&1 &"
            for i, out in enumerate(self.outs)).replace("&;", "&") + " wait"
        env = {**env, "LD_PRELOAD": AGENT, "LD_LIBRARY_PATH": os.path.dirname(DRIVER)}
        self.popen = subprocess.Popen(["/bin/sh", "-c", line], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                      stderr=subprocess.DEVNULL, start_new_session=True, cwd="/")
        self.pid = self.popen.pid
        wait_for(lambda: all(self.counts()), "the application counts",
                 lambda: None if alive(self.pid) else "it has ended")
        self.go_on()

    def counts(self):
        return [[int(n) for n in re.findall(r"^count (\d+)$", text_of(out), re.M)] for out in self.outs]

    def trouble(self):
        for out in self.outs:
            wrong = [x for x in text_of(out).splitlines() if not x.startswith("count ")]
            if wrong:
                return str(wrong)
        return None if len(descendants(self.pid)) >= 3 or not alive(self.pid) else "a counter has ended"

    def go_on(self):
        """Every counter does two more steps, and none was lost or done twice."""
        before = self.counts()
        wait_for(lambda: all(len(now) >= len(was) + 2 for now, was in zip(self.counts(), before)), "the application goes on",
                 lambda: self.trouble() or (None if alive(self.pid) else "it has ended"))
        for count in self.counts():
            assert count == list(range(1, len(count) + 1)), f"not in order: {count}"

    def forget(self):
        """Go back, with a restore, to what was counted at the time of a dump: what came after did not happen."""
        for out in self.outs:
            os.truncate(out, 0)

    def pids(self):
        return [self.pid] + descendants(self.pid)


class Daemon:
    def __init__(self, case, kill=None, *args):
        self.case = case
        self.rundir = case.path("run")
        env = dict(case.env)
        if kill is not None:
            env["BENNUD_TEST_KILL"] = kill
        self.log = case.path("bennud.log")
        with open(self.log, "ab") as log:
            log.write(f"---- kill at {kill}\n".encode())
            log.flush()
            if case.daemon:
                case.daemon.end()  # of a point at which something went wrong
            self.popen = subprocess.Popen([BENNUD, *args], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.first = self.wait_worker()
        self.wait_ready()

    def workers(self):
        return children(self.popen.pid)

    def wait_worker(self, other_than=None):
        def look():
            found = [w for w in self.workers() if w != other_than]
            return found[0] if found else None
        return wait_for(look, "a worker", lambda: None if self.popen.poll() is None else "the keeper ended")

    def wait_ready(self):
        wait_for(lambda: self.case.bennu("ps", "--json").returncode == 0, "an answer of the daemon",
                 lambda: None if self.popen.poll() is None else "the keeper ended")

    def wait_killed(self):
        """The first worker died at its point and another has taken over."""
        self.wait_worker(other_than=self.first)
        self.wait_ready()

    def was_killed(self):
        return self.first not in self.workers()

    def end(self):
        workers = self.workers() if self.popen.poll() is None else []
        for pid in [self.popen.pid] + workers:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.popen.wait()
        bury(workers)

    def stop(self, expected=0):
        self.popen.send_signal(signal.SIGTERM)
        code = self.popen.wait(PATIENCE)
        assert code == expected, f"bennud ended with {code}"


class FaultTest(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="bennu-fault.")
        machine = os.path.basename(self.dir).replace(".", "-")  # the simulated driver leaves dots out
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("BENNU", "CRIU", "LD_"))}
        os.makedirs(self.path("plugins"))
        os.symlink(f"{BUILD}/src/criu/bennu_plugin.so", self.path("plugins/bennu_plugin.so"))
        self.env.update(BENNU_DRIVER=DRIVER, BENNU_RUNDIR=self.path("run"), BENNU_SIM_MACHINE=machine, BENNU_SIM_MEMORY="512M",
                        BENNU_SIM_STATE_MB="2", BENNU_BENNUD=BENNUD)
        self.addCleanup(self.clean, machine)
        self.numbers = 0
        self.app = None
        self.daemon = None

    def clean(self, machine):
        if sys.exc_info()[0] or any(e for _, e in getattr(getattr(self, "_outcome", None), "errors", []) or [] if e):
            print(text_of(self.path("bennud.log"))[-4000:], file=sys.stderr)
        if self.daemon:
            self.daemon.end()
        if self.app:
            if stat_of(self.app.pid):
                vanish(self.app.pid)
            self.app.popen.poll()
        for p in filter(str.isdigit, os.listdir("/proc")):  # a worker whose keeper we killed, a private one
            if self.dir in text_of(f"/proc/{p}/environ"):
                try:
                    os.kill(int(p), signal.SIGKILL)
                except ProcessLookupError:
                    pass
        with contextlib.suppress(FileNotFoundError):
            os.unlink("/dev/shm/cuda-sim." + machine)
        shutil.rmtree(self.dir, ignore_errors=True)

    def path(self, *names):
        return os.path.join(self.dir, *names)

    def new_dir(self):
        self.numbers += 1
        path = self.path(f"ck-{self.numbers}")
        os.mkdir(path)
        return path

    def bennu(self, *args):
        done = subprocess.run([BENNU, *map(str, args)], env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, timeout=2 * PATIENCE, check=False)
        # A failed restore leaves CRIU's log for its user.
        for folder in re.findall(r"CRIU's log: (/tmp/bennu-restore[^/]*)/", done.stderr):
            self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        return done

    def succeeds(self, *args):
        done = self.bennu(*args)
        self.assertEqual(done.returncode, 0, f"bennu {args}: {done.stderr}{text_of(self.path('bennud.log'))[-3000:]}")
        return done.stdout

    def criu_start(self, verb, folder, *args, env=None):
        return subprocess.Popen([CRIU, verb, "-D", folder, "-o", f"{verb}.log", "-v4", "--shell-job", "-L",
                                 self.path("plugins"), *map(str, args)], env=env or self.env, stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def criu(self, verb, folder, *args, env=None):
        return self.criu_start(verb, folder, *args, env=env).wait(2 * PATIENCE)

    def privates(self):
        return [p for p in os.listdir("/proc") if p.isdigit() and alive(p)
                and self.dir in text_of(f"/proc/{p}/environ") and "--private" in text_of(f"/proc/{p}/cmdline")]

    def ps(self):
        done = self.bennu("ps", "--json")
        if done.returncode:  # one that is about to be killed once more
            return {}
        listed = json.loads(done.stdout)["processes"]
        return {p["pid"]: p["state"] for p in listed if p["pid"] in descendants(self.app.pid)}

    def wait_state(self, *states):
        wait_for(lambda: len(self.ps()) == 3 and set(self.ps().values()) <= set(states), f"all processes {states}",
                 lambda: None if alive(self.app.pid) else "the application has ended")

    def packs(self, folder):
        return sorted(n for n in os.listdir(folder) if n.startswith((".bennu", "bennu-")) and "manifest" not in n
                      and n != "bennu-command.json")

    def restore(self, folder):
        """The processes are dead; bring them back and look at every byte."""
        self.app.forget()
        self.succeeds("restore", "--detach", folder)
        self.moved()

    def moved(self):
        """Counts begin where the dump was made."""
        app = self.app
        wait_for(lambda: all(len(c) >= 3 for c in app.counts()), "the restored application counts", app.trouble)
        for count in app.counts():
            assert count == list(range(count[0], count[0] + len(count))), f"not in order: {count}"
        app.go_on = lambda: go_on_from(app)

    def cycle(self):
        """A dump that kills and a restore still work."""
        folder, pids = self.new_dir(), self.app.pids()
        self.succeeds("dump", self.app.pid, folder)
        bury(pids)
        self.restore(folder)
        shutil.rmtree(folder)


def go_on_from(app):
    before = app.counts()
    wait_for(lambda: all(len(now) >= len(was) + 2 for now, was in zip(app.counts(), before)), "the application goes on",
             lambda: app.trouble() or (None if alive(app.pid) else "it has ended"))
    for count in app.counts():
        assert count == list(range(count[0], count[0] + len(count))), f"not in order: {count}"


def main():
    if os.geteuid() != 0 or not os.access(CRIU, os.X_OK):
        print("needs root and", CRIU)
        sys.exit(77)
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: restored processes become our children
    unittest.main(failfast=False)
