# SPDX-License-Identifier: MIT
"""What the steps of bench/run share: surroundings, the daemon, programs that are dumped and restored, timed commands of bennu's."""

import ctypes
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "test/lib"))
from gpu_machine import find_driver, tail  # noqa: E402,F401

PROGRAMS = ROOT / "bench/programs"
PR_SET_CHILD_SUBREAPER = 36
GIB, MIB = 1 << 30, 1 << 20


class Failed(Exception):
    """A step could not measure; the text says why."""


class Skipped(Exception):
    """A step cannot run here; the text says why."""


class OutOfTime(BaseException):
    """The step's time is over. Not an Exception: no step may swallow it."""


def size_text(n):
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if n >= unit and n % unit == 0:
            return f"{n // unit} {name}"
    return f"{n} bytes"


def cached_share(folder):
    """The share of the bytes of a folder's files that is in the page cache, 0 to 1, or None where that cannot be told."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    page, there, all_pages = os.sysconf("SC_PAGE_SIZE"), 0, 0
    for f in pathlib.Path(folder).iterdir():
        size = f.stat().st_size
        if not f.is_file() or size == 0:
            continue
        pages = (size + page - 1) // page
        vector = (ctypes.c_ubyte * pages)()
        fd = os.open(f, os.O_RDONLY)
        try:
            at = libc.mmap(None, size, 1, 1, fd, 0)  # PROT_READ, MAP_SHARED
            if at in (None, ctypes.c_void_p(-1).value):
                return None
            ok = libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), vector) == 0
            libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size))
        finally:
            os.close(fd)
        if not ok:
            return None
        there += bytes(vector).translate(bytes(b & 1 for b in range(256))).count(1)
        all_pages += pages
    return there / all_pages if all_pages else None


def drop_from_cache(folder):
    """The files of a folder leave the page cache, those of other programs stay in it."""
    for f in pathlib.Path(folder).iterdir():
        fd = os.open(f, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


class Answer:
    """What a command of bennu's measured: wall (s, the whole command as a caller sees it) and phases {name: (s, bytes)}."""

    def __init__(self, wall, data):
        self.wall, self.data = wall, data
        self.phases = {p["name"]: (p["duration_s"], p["bytes"]) for p in data.get("phases", [])}

    def seconds(self, *names):
        """The sum of the phases of these names; Failed where there is none of them."""
        found = [self.phases[n][0] for n in names if n in self.phases]
        if not found:
            raise Failed(f"bennu named no phase {' or '.join(names)}, only {', '.join(self.phases)}")
        return sum(found)

    def copy(self):
        """(s, bytes) of the phase that moved GPU memory."""
        moved = [p for name, p in self.phases.items() if name != "host-memory" and p[1] > 0 and p[0] > 0]
        if not moved:
            raise Failed(f"bennu named no phase with bytes, only {', '.join(self.phases)}")
        return max(moved, key=lambda p: p[1])


class Program:
    """A program under measurement. It may be dumped, which ends it, and be restored under the same number."""

    def __init__(self, bench, name, popen, log, fifo):
        self.bench, self.name, self.pid, self.popen, self.log, self.fifo = bench, name, popen.pid, popen, log, fifo
        self.status, self.checks = None, 0

    def poll(self):
        if self.status is not None:
            return self.status
        try:
            pid, raw = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            if not os.path.exists(f"/proc/{self.pid}"):
                self.status = -1
            return self.status
        if pid == self.pid:
            self.status = os.waitstatus_to_exitcode(raw)
            if self.popen:
                self.popen.returncode = self.status
        return self.status

    def wait_for(self, pattern, what, seconds, after=0):
        """The first match of a pattern, line by line, in what it printed behind byte `after`."""
        end = time.monotonic() + seconds
        while True:
            ended = self.poll() is not None
            found = re.search(pattern, self.log.read_text(errors="replace")[after:], re.M)
            if found:
                return found
            if ended or time.monotonic() > end:
                raise Failed(f"{self.name} {'ended with ' + str(self.status) if ended else 'was not done'} before {what}\n{tail(self.log)}")
            time.sleep(0.002)

    def tell(self, command):
        fd = os.open(self.fifo, os.O_RDWR)
        try:
            os.write(fd, command.encode() + b"\n")
        finally:
            os.close(fd)

    def ask(self, command, pattern, seconds=120):
        at = len(self.log.read_text(errors="replace"))
        self.tell(command)
        return self.wait_for(pattern, f"its answer to {command}", seconds, at)

    def check(self):
        """Every byte of its GPU memory is right, or Failed."""
        wrong = self.ask("check", r"^checked \d+: (\d+) wrong")[1]
        if wrong != "0":
            raise Failed(f"{self.name}: {wrong} words or tensors are wrong")
        self.checks += 1

    def kill(self):
        if self.poll() is None:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            end = time.monotonic() + 30
            while self.poll() is None and time.monotonic() < end:
                time.sleep(0.005)


class Bench:
    def __init__(self, build, simulated, work_parent="/tmp", log=None):
        self.began, self.simulated, self.bin = time.monotonic(), simulated, pathlib.Path(build).resolve()
        self.logfile = log
        self.bennu, self.bennud = self.bin / "src/cli/bennu", self.bin / "src/daemon/bennud"
        self.agent = self.bin / "src/agent/libbennu.so"
        self.driver = str(self.bin / "sim/libcuda.so.1") if simulated else find_driver()
        self.work = pathlib.Path(subprocess.check_output(["mktemp", "-d", f"{work_parent}/bennu-bench.XXXXXX"], text=True).strip())
        self.rundir, self.programs, self.daemon, self.mounted, self.count = self.work / "run", [], None, None, 0
        self.daemon_log = self.work / "bennud.log"
        # Of what is restored with --detach and then ends, this process is told; nobody else may wait for it.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def say(self, text=""):
        for line in str(text).splitlines() or [""]:
            line = f"[{time.monotonic() - self.began:7.2f}] {line}"
            print(line, flush=True)
            if self.logfile:
                self.logfile.write(line + "\n")

    # ---- surroundings ----

    def env(self, agent=False):
        """The environment of a program under measurement: nothing of ours but the agent, if wanted."""
        e = {k: v for k, v in os.environ.items() if not k.startswith("BENNU_") and k != "LD_PRELOAD"}
        if self.simulated:
            e.update(BENNU_DRIVER=self.driver, BENNU_SIM_DEVICES="2")
            if not agent:
                e["LD_LIBRARY_PATH"] = str(self.bin / "sim")
        if agent:
            e["BENNU_AGENT"] = str(self.agent)
        return e

    def own_env(self):
        """The environment of bennu and bennud."""
        e = self.env(agent=True)
        if (self.bin / "criu/bin/criu").exists():
            e["BENNU_CRIU"] = str(self.bin / "criu/bin/criu")
        e.update(BENNU_RUNDIR=str(self.rundir), BENNU_PLUGIN_DIR=str(self.bin / "src/criu"), BENNU_BENNUD=str(self.bennud))
        return e

    def command(self, argv, timeout=60, env=None, ok=True):
        """Runs a command; returns what it printed on both streams."""
        argv = [str(a) for a in argv]
        try:
            r = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace", timeout=timeout, env=env or self.env())
        except FileNotFoundError as e:
            raise Failed(str(e)) from e
        except subprocess.TimeoutExpired as e:
            raise Failed(f"{' '.join(argv)}: not done in {timeout} s: {(e.stdout or b'').decode(errors='replace')[-1000:]}") from e
        if ok and r.returncode != 0:
            raise Failed(f"{' '.join(argv)}: status {r.returncode}: {r.stdout[-1500:]}")
        return r.stdout

    def tool(self, name, *argv, timeout=60):
        """A program of bench/."""
        program = self.bin / "bench" / name
        if not program.exists():
            raise Skipped(f"{program} was not built")
        return self.command([program, *argv], timeout)

    def tmpfs(self):
        """A folder in memory."""
        if self.mounted is None:
            folder = self.work / "tmpfs"
            folder.mkdir(exist_ok=True)
            # Not in per cent: memory may be added to a virtual machine as it is used.
            self.command(["mount", "-t", "tmpfs", "-o", f"size={'2g' if self.simulated else '100g'}", "bennu-bench", folder])
            self.mounted = folder
        return self.mounted

    def warm_memory(self, size):
        """Touches host memory once, so that the machine under this one has backed it: else the first use would be timed with it."""
        began, threads = time.monotonic(), min(os.cpu_count() or 1, 16)
        code = ("import mmap,sys; m=mmap.mmap(-1,int(sys.argv[1]),flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS|0x8000);"  # MAP_POPULATE
                "print(flush=True); sys.stdin.read()")
        touchers = [subprocess.Popen([sys.executable, "-S", "-c", code, str(max(size // threads, 4096))], stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, env=self.env()) for _ in range(threads)]
        # None gives its memory back before all have theirs, or they would share it.
        bad = sum(p.stdout.readline() != b"\n" for p in touchers)
        for p in touchers:
            p.communicate()
        self.say(f"touched {size / 1e9:.1f} GB of host memory in {time.monotonic() - began:.1f} s" + (f"; {bad} of {threads} failed" if bad else ""))
        return bad == 0

    # ---- the daemon ----

    def start_daemon(self, *options):
        self.stop_daemon()
        self.rundir.mkdir(exist_ok=True)
        with open(self.daemon_log, "ab") as log:
            self.daemon = subprocess.Popen([self.bennud, "--rundir", self.rundir, *options], env=self.own_env(), cwd=self.work,
                                           stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if self.daemon.poll() is not None:
                raise Failed(f"bennud ended with {self.daemon.returncode}\n{tail(self.daemon_log)}")
            if (self.rundir / "bennud.sock").exists() and subprocess.run([self.bennu, "ps", "--json"], env=self.own_env(),
                                                                          capture_output=True).returncode == 0:
                return
            time.sleep(0.02)
        raise Failed(f"bennud does not answer\n{tail(self.daemon_log)}")

    def stop_daemon(self):
        if self.daemon and self.daemon.poll() is None:
            self.daemon.terminate()
            try:
                self.daemon.wait(60)  # it has much pinned memory to give back
            except subprocess.TimeoutExpired:
                self.say("bennud does not end when asked; killed")
                self.daemon.kill()
                self.daemon.wait(15)
        self.daemon = None

    # ---- programs ----

    def start(self, name, argv, agent=True, commands=True, cores=None):
        """Starts a program in a session of its own, standard input empty, output to a file: as CRIU likes it. All of its threads run on
        `cores`, if any are named."""
        self.count += 1
        log, fifo = self.work / f"{name}-{self.count}.out", self.work / f"{name}-{self.count}.fifo"
        run = [self.bennu, "run", "--", *argv] if agent else list(argv)
        if commands:
            os.mkfifo(fifo, 0o600)
            run += ["--commands", fifo]
        with open(log, "ab") as out:
            p = subprocess.Popen([str(a) for a in run], env=self.env(agent), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                 start_new_session=True, preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None)
        program = Program(self, name, p, log, fifo)
        self.programs.append(program)
        return program

    def hold(self, size, block, agent=True, seconds=120, gpu=None):
        """bench-hold with that much GPU memory, filled. gpu: the one that it sees; None: all."""
        what = f"hold-{size_text(size)}".replace(" ", "")
        where = [] if gpu is None else ["env", f"CUDA_VISIBLE_DEVICES={gpu}"]
        program = self.start(what, [*where, self.bin / "bench/bench-hold", "--kernels", ROOT / "sim/kernels.ptx", "--bytes", size, "--block", block],
                             agent)
        self.say(f"{what}: {program.wait_for('^ready .*', 'its memory is filled', seconds)[0]}")
        return program

    def end_programs(self):
        for p in self.programs:
            p.kill()
        self.programs.clear()

    # ---- timed commands ----

    def timed(self, argv, timeout):
        began = time.monotonic()
        try:
            r = subprocess.run([str(a) for a in [self.bennu, *argv]], env=self.own_env(), stdin=subprocess.DEVNULL, capture_output=True,
                               text=True, errors="replace", timeout=timeout)
        except subprocess.TimeoutExpired as e:
            raise Failed(f"bennu {argv[0]}: not done in {timeout} s") from e
        wall = time.monotonic() - began
        try:
            data = json.loads(r.stdout)
        except ValueError:
            data = {}
        if r.returncode != 0:
            log = next(iter(re.findall(r"(/[^\s()]+\.log)", r.stderr)), None)
            raise Failed(f"bennu {' '.join(map(str, argv))}: status {r.returncode}: {r.stderr.strip()[-800:]}\n{tail(log, 15) if log else ''}\n"
                         f"bennud: {tail(self.daemon_log, 8)}")
        answer = Answer(wall, data)
        self.say(f"bennu {argv[0]}: {wall:.3f} s; " + ", ".join(
            f"{n} {s:.3f}" + (f" ({b / 1e9 / s:.1f} GB/s)" if b and s else "") for n, (s, b) in answer.phases.items()))
        return answer

    def suspend(self, program, *options, timeout=200):
        return self.timed(["suspend", "--json", *options, program.pid], timeout)

    def resume(self, program, timeout=200):
        return self.timed(["resume", "--json", program.pid], timeout)

    def dump(self, program, parent, *options, timeout=200):
        """(Answer, folder of the checkpoint, bytes of its files). The program is gone afterwards."""
        self.count += 1
        folder = pathlib.Path(parent) / f"image-{program.name}-{self.count}"
        answer = self.timed(["dump", "--json", *options, program.pid, folder], timeout)
        end = time.monotonic() + 30
        while program.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        program.status, program.popen = None, None
        program.log_size = program.log.stat().st_size
        return answer, folder, sum(f.stat().st_size for f in folder.iterdir())

    def restore(self, program, folder, *options, timeout=200):
        # CRIU wants the file that it printed into as long as it was.
        os.truncate(program.log, program.log_size)
        answer = self.timed(["restore", "--json", "--detach", *options, folder], timeout)
        program.status = None
        return answer

    def gpu_memory_of(self, pids, idle):
        """Bytes of GPU memory of processes as nvidia-smi says it; where it does not say it, those that are in use beyond `idle`. None: neither."""
        if self.simulated:
            return None
        out = self.command(["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"], ok=False)
        found = [int(used) for pid, used in re.findall(r"^\s*(\d+)\s*,\s*(\d+)", out, re.M) if int(pid) in pids]
        if found:
            return sum(found) * MIB
        used = self.gpu_memory_used()
        return None if used is None or idle is None else used - idle

    def gpu_count(self):
        return 2 if self.simulated else len(self.command(["nvidia-smi", "-L"], ok=False).splitlines())

    def gpu_memory_used(self):
        """Bytes in use on GPU 0, or None."""
        if self.simulated:
            return None
        out = self.command(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"], ok=False).strip()
        return int(out) * MIB if out.isdigit() else None

    # ---- ends ----

    def end_step(self):
        self.end_programs()
        for parent in (self.work, self.mounted):
            for folder in parent.glob("image-*") if parent else ():
                shutil.rmtree(folder, ignore_errors=True)

    def finish(self):
        self.end_step()
        self.stop_daemon()
        if self.mounted:
            subprocess.run(["umount", "-l", self.mounted], capture_output=True)
        shutil.rmtree(self.work, ignore_errors=True)
