# SPDX-License-Identifier: MIT
"""What smoke and run-all share: steps under time limits, the daemon, programs that are dumped and restored, logs, rows of results.

Everything goes to $OUT (or the folder that --out names): log.txt, as it happens; results.json, after every step; details.tar.gz, at the
end: what every program wrote, CRIU's logs, the daemon's.
"""

import argparse
import ctypes
import datetime
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "test/lib"))
from gpu_machine import find_driver, tail, write_simulated_gpus  # noqa: E402,F401

TESTS = ROOT / "test/gpu"
PR_SET_CHILD_SUBREAPER = 36


class Failed(Exception):
    """A step did not do what it should; the text says what."""


class Skipped(Exception):
    """A step cannot run here; the text says why."""


class OutOfTime(BaseException):
    """The step's time is over. Not an Exception: no step may swallow it."""


def below(pid):
    """The processes below pid."""
    found = []
    for children in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += [int(child), *below(child)]
    return found


class Program:
    """A program that was started for a test; it may be dumped, end, and be restored under the same number."""

    def __init__(self, suite, name, pid, log, popen=None):
        self.suite, self.name, self.pid, self.log, self.popen = suite, name, pid, log, popen
        self.status = None
        self.since = 0  # where in its log the present life began, once it was restored from an older moment

    def poll(self):
        """The exit status as a shell would say it, or None while it runs."""
        if self.status is not None:
            return self.status
        try:
            pid, raw = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            if os.path.exists(f"/proc/{self.pid}"):
                return None
            self.status = -1
            return self.status
        if pid == self.pid:
            code = os.waitstatus_to_exitcode(raw)
            self.status = code if code >= 0 else 128 - code
            if self.popen:
                self.popen.returncode = code
        return self.status

    def text(self):
        return self.log.read_bytes()[self.since:].decode(errors="replace")

    def wait_for(self, condition, what, seconds=120):
        """Until condition(text of the log) is true. Fails when the program ends before that."""
        end = time.monotonic() + seconds
        while True:
            ended = self.poll() is not None
            value = condition(self.text())
            if value:
                return value
            if ended:
                raise Failed(f"{self.name} (process {self.pid}) ended with {self.status} before {what}\n{tail(self.log)}")
            if time.monotonic() > end:
                raise Failed(f"{self.name} (process {self.pid}) did not get to {what} in {seconds} s\n{tail(self.log)}\n"
                             + self.suite.describe_process(self.pid))
            time.sleep(0.01)

    def wait_end(self, seconds=120):
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                raise Failed(f"{self.name} (process {self.pid}) did not end in {seconds} s\n{tail(self.log)}\n"
                             + self.suite.describe_process(self.pid))
            time.sleep(0.01)
        return self.status

    def kill(self):
        if self.poll() is None:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            end = time.monotonic() + 20
            while self.poll() is None and time.monotonic() < end:
                time.sleep(0.02)


class Suite:
    def __init__(self, name, devices=1, budget=570):
        """devices: that the simulated driver has."""
        p = argparse.ArgumentParser(prog=name)
        p.add_argument("--sim", metavar="BUILD", help="run on the simulated driver of this build folder, at small sizes")
        p.add_argument("--bundle", default=str(ROOT / ".gpu"), help="folder that test/gpu/bundle made (default: .gpu)")
        p.add_argument("--out", default=os.environ.get("OUT"), help="folder of the results (default: $OUT, else a new one in /tmp)")
        p.add_argument("--images", help="folder of the checkpoints (default: a tmpfs made for them)")
        p.add_argument("--budget", type=float, default=budget, help="begin no step that is expected to end later than this (s)")
        p.add_argument("--only", default="", help="names of steps, comma-separated")
        p.add_argument("--skip", default="", help="names of steps, comma-separated")
        p.add_argument("--quick", action="store_true", help="smaller sizes")
        p.add_argument("--list", action="store_true", help="list the steps and end")
        self.args = p.parse_args()
        self.began = time.monotonic()
        self.sim, self.devices = bool(self.args.sim), devices
        self.results, self.rows, self.notes, self.programs, self.steps = [], [], {}, [], []
        if self.args.list:
            return
        self.out = pathlib.Path(self.args.out or subprocess.check_output(["mktemp", "-d", "/tmp/bennu-results.XXXXXX"], text=True).strip())
        self.out.mkdir(parents=True, exist_ok=True)
        self.logfile = open(self.out / "log.txt", "w", buffering=1)
        self.work = pathlib.Path(subprocess.check_output(["mktemp", "-d", "/tmp/bennu-gpu.XXXXXX"], text=True).strip())
        self.details = self.work / "details"
        self.details.mkdir()
        self.rundir = self.work / "run"
        if self.sim:
            write_simulated_gpus(self.work / "gpus", f"gpu-tests{os.getpid()}", devices)
        self.bin = pathlib.Path(self.args.sim or self.args.bundle).resolve()
        self.bennu, self.bennud = self.bin / "src/cli/bennu", self.bin / "src/daemon/bennud"
        self.agent = self.bin / "src/agent/libbennu.so"
        self.daemon = self.daemon_log = None
        self.mounted = None
        # Of what is restored with --detach and then ends, this process is told; nobody else may wait for it.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.images = self.make_images_folder()

    # ---- surroundings ----

    def make_images_folder(self):
        if self.args.images:
            folder = pathlib.Path(self.args.images)
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        folder = self.work / "images"
        folder.mkdir()
        # Not in per cent: memory may be added to a virtual machine as it is used.
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={'90%' if self.sim else '96g'}", "bennu-gpu", folder], capture_output=True).returncode == 0:
            self.mounted = folder
        return folder

    def env(self, agent=False, **more):
        """The environment of a program under test: nothing of ours but the agent, if wanted."""
        e = {k: v for k, v in os.environ.items() if not k.startswith("BENNU_") and k != "LD_PRELOAD"}
        if self.sim:
            e["BENNU_DRIVER"] = str(self.bin / "sim/libcuda.so.1")
            e.update(BENNU_SIM_MACHINE=f"gpu-tests{os.getpid()}", BENNU_SIM_MEMORY="1G", BENNU_SIM_DEVICES=str(self.devices),
                     BENNU_SIM_PROC=str(self.work / "gpus"))
            if not agent:
                e["LD_LIBRARY_PATH"] = str(self.bin / "sim")
        if agent:
            e["LD_PRELOAD"] = str(self.agent)
        e.update(more)
        return e

    def own_env(self):
        """The environment of bennu and bennud."""
        e = self.env()
        e.pop("LD_LIBRARY_PATH", None) if self.sim else None
        if (self.bin / "criu/bin/criu").exists():
            e["BENNU_CRIU"] = str(self.bin / "criu/bin/criu")
        e.update(BENNU_RUNDIR=str(self.rundir), BENNU_AGENT=str(self.agent), BENNU_PLUGIN_DIR=str(self.bin / "src/criu"),
                 BENNU_BENNUD=str(self.bennud))
        return e

    def say(self, text=""):
        stamp = f"[{time.monotonic() - self.began:7.2f}] "
        for line in str(text).splitlines() or [""]:
            print(stamp + line, flush=True)
            self.logfile.write(stamp + line + "\n")

    def command(self, argv, timeout=60, quiet=False, ok=True, **kw):
        """Runs a command to its end; its output goes to the log. Returns the CompletedProcess (output: both streams)."""
        kw.setdefault("env", self.env())
        try:
            r = subprocess.run([str(a) for a in argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace", timeout=timeout, **kw)
        except FileNotFoundError as e:
            raise Failed(str(e)) from e
        except subprocess.TimeoutExpired as e:
            raise Failed(f"{' '.join(map(str, argv))}: not done in {timeout} s: "
                         f"{(e.stdout or b'').decode(errors='replace')[-2000:]}") from e
        if not quiet:
            self.say(f"$ {' '.join(map(str, argv))}\n{r.stdout.rstrip()[-40000:]}")
        if ok and r.returncode != 0:
            raise Failed(f"{' '.join(map(str, argv))}: status {r.returncode}: {r.stdout[-3000:]}")
        return r

    def describe_process(self, pid):
        """Where the threads of a process are: for failures."""
        lines = [f"process {pid}:"]
        for name in ("status", "wchan", "stack"):
            try:
                text = pathlib.Path(f"/proc/{pid}/{name}").read_text(errors="replace")
                lines += [f"  {name}: {line}" for line in text.splitlines()
                          if name != "status" or line.split(":")[0] in ("State", "Threads", "VmRSS", "SigBlk", "TracerPid")]
            except OSError as e:
                lines.append(f"  {name}: {e}")
        for task in sorted(pathlib.Path(f"/proc/{pid}/task").glob("*"))[:40]:
            try:
                lines.append(f"  thread {task.name} {(task / 'comm').read_text().strip()}: "
                             f"{(task / 'wchan').read_text().strip()} {(task / 'syscall').read_text().split()[0]}")
            except (OSError, IndexError):
                pass
        return "\n".join(lines)

    # ---- daemon ----

    def start_daemon(self, *options, visible=None):
        """visible: the GPUs that it sees, as CUDA_VISIBLE_DEVICES has them; None: as here."""
        self.stop_daemon()
        env = {**self.own_env(), **({"CUDA_VISIBLE_DEVICES": visible} if visible else {})}
        self.rundir.mkdir(exist_ok=True)
        self.daemon_log = self.details / "bennud.log"
        with open(self.daemon_log, "ab") as log:
            self.daemon = subprocess.Popen([self.bennud, "--rundir", self.rundir, *options], env=env, cwd=self.work,
                                           stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        began = time.monotonic()
        while time.monotonic() - began < 60:
            if self.daemon.poll() is not None:
                raise Failed(f"bennud ended with {self.daemon.returncode}\n{tail(self.daemon_log)}")
            if (self.rundir / "bennud.sock").exists():
                r = subprocess.run([self.bennu, "ps", "--json"], env=self.own_env(), capture_output=True, text=True)
                if r.returncode == 0:
                    self.say(f"bennud answers after {time.monotonic() - began:.2f} s")
                    return
            time.sleep(0.02)
        raise Failed(f"bennud does not answer\n{tail(self.daemon_log)}\n" + self.describe_process(self.daemon.pid))

    def stop_daemon(self):
        if self.daemon and self.daemon.poll() is None:
            self.daemon.terminate()
            try:
                self.daemon.wait(10)
            except subprocess.TimeoutExpired:
                self.say("bennud does not end when asked; killed\n" + self.describe_process(self.daemon.pid))
                self.daemon.kill()
                self.daemon.wait(10)
        self.daemon = None

    def need_daemon(self):
        if self.daemon is None or self.daemon.poll() is not None:
            if self.daemon:
                self.say(f"bennud has gone, with {self.daemon.returncode}\n{tail(self.daemon_log)}")
            self.start_daemon()

    # ---- programs ----

    def start(self, name, argv, agent=True, env=None):
        """Starts a program of its own session, standard input empty, output to a file: as CRIU likes it."""
        log = self.details / f"{name}.out"
        run = [self.bennu, "run", "--", *argv] if agent else argv
        e = self.env(**(env or {}))
        if agent:
            e["BENNU_AGENT"] = str(self.agent)
            e.pop("LD_LIBRARY_PATH", None) if self.sim else None
        log.unlink(missing_ok=True)
        # To append: of such a file CRIU does not ask that it is as long as it was, so that older checkpoints can be restored.
        with open(log, "ab") as out:
            p = subprocess.Popen([str(a) for a in run], env=e, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                 start_new_session=True)
        program = Program(self, name, p.pid, log, p)
        self.programs.append(program)
        return program

    def bennu_json(self, argv, timeout):
        r = subprocess.run([str(a) for a in [self.bennu, *argv]], env=self.own_env(), stdin=subprocess.DEVNULL, capture_output=True,
                           text=True, errors="replace", timeout=timeout)
        self.say(f"$ bennu {' '.join(map(str, argv))}  -> {r.returncode}")
        if r.stderr.strip():
            self.say(r.stderr.rstrip()[-4000:])
        try:
            answer = json.loads(r.stdout)
        except ValueError:
            answer = {"ok": False, "text": r.stdout[-2000:]}
        return r.returncode, answer

    @staticmethod
    def logs_named(answer):
        """The log files that a message names."""
        return re.findall(r"(/[^\s()]+\.log)", str(answer.get("error", {}).get("message", "")))

    def explain_failure(self, program, *logs):
        """Everything that may say why: once, in the log."""
        for log in dict.fromkeys(map(str, logs)):
            if pathlib.Path(log).exists():
                self.say(f"--- last lines of {log}\n{tail(log, 100)}")
                shutil.copy(log, self.details / f"failed-{program.name}-{pathlib.Path(log).name}")
        self.say(f"--- bennud's log\n{tail(self.daemon_log, 60) if self.daemon else '(no daemon)'}")
        self.say(f"--- {program.name}'s output\n{tail(program.log, 20)}")
        self.say(self.describe_process(program.pid))
        subprocess.run([self.bennu, "ps"], env=self.own_env(), stdout=self.logfile, stderr=self.logfile, timeout=20)
        r = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace")
        self.say("--- dmesg\n" + "\n".join(r.stdout.splitlines()[-25:]))

    def phases(self, what, answer):
        """Rows for the total and every phase of an answer of bennu's."""
        self.row(f"{what}/total", answer["duration_s"], "s")
        for ph in answer.get("phases", []):
            self.row(f"{what}/{ph['name']}", ph["duration_s"], "s", start_s=round(ph["start_s"], 6), bytes=ph["bytes"])
        text = [f"{ph['start_s']:8.3f} {ph['duration_s']:8.3f} s {ph['bytes'] / 1e9:9.3f} GB"
                f" {ph['bytes'] / 1e9 / ph['duration_s'] if ph['duration_s'] else 0:7.2f} GB/s  {ph['name']}"
                for ph in answer.get("phases", [])]
        self.say(f"{what}: {answer['duration_s']:.3f} s\n" + "\n".join(text))

    def dump(self, program, what, *options, timeout=200, leave_running=False):
        """bennu dump; the program is gone afterwards. Returns the folder of the checkpoint."""
        folder = self.images / f"{program.name}-{len(os.listdir(self.images))}"
        options = [*options, *(["--leave-running"] if leave_running else [])]
        children = below(program.pid)
        code, answer = self.bennu_json(["dump", "--json", *options, program.pid, folder], timeout)
        if code != 0:
            self.explain_failure(program, f"{folder}.log", folder / "dump.log", *self.logs_named(answer))
            raise Failed(f"bennu dump of {program.name}: status {code}: {answer.get('error', answer)}")
        if not leave_running:
            program.wait_end(20)
            program.status = None
            program.popen = None
            for child in children:  # they have become ours, see PR_SET_CHILD_SUBREAPER
                try:
                    os.waitpid(child, 0)
                except ChildProcessError:
                    pass
        size = sum(f.stat().st_size for f in folder.iterdir())
        if (folder / "dump.log").exists():
            shutil.copy(folder / "dump.log", self.details / f"{what.replace('/', '-')}-dump.log")
        self.last_dump = answer
        self.phases(f"{what}/dump", answer)
        self.row(f"{what}/gpu_bytes", answer.get("gpu_bytes", 0), "bytes")
        self.row(f"{what}/image_bytes", size, "bytes", better="lower")
        return folder

    def restore(self, program, folder, what, timeout=200):
        code, answer = self.bennu_json(["restore", "--json", "--detach", folder], timeout)
        program.status = None
        if code != 0:
            self.explain_failure(program, *self.logs_named(answer))
            raise Failed(f"bennu restore of {program.name}: status {code}: {answer.get('error', answer)}")
        self.phases(f"{what}/restore", answer)

    def restore_older(self, program, folder, what):
        """Ends a program that runs, and restores it as it was in a checkpoint that it was left running after."""
        program.kill()
        program.since = program.log.stat().st_size
        self.restore(program, folder, what)

    def suspend_resume(self, program, what, progress, *options, frees=True, timeout=120):
        """Suspends, sees that it stands still and (frees) that GPU memory is free, resumes. progress(): a number that grows."""
        self.need_daemon()
        before = self.gpu_used()
        code, answer = self.bennu_json(["suspend", "--json", *options, program.pid], timeout)
        if code != 0:
            self.explain_failure(program)
            raise Failed(f"bennu suspend of {program.name}: status {code}: {answer.get('error', answer)}")
        self.phases(f"{what}/suspend", answer)
        used = self.gpu_used()
        self.say(f"GPU memory in use: {before} before, {used} while suspended (MiB)")
        if before is not None and frees:
            if used >= before:
                raise Failed(f"no GPU memory is free that was not before: {before} and {used} MiB in use")
            self.row(f"{what}/gpu_used_while_suspended", used * 2**20, "bytes", better="lower")
        at = progress()
        self.command([self.bennu, "ps"], env=self.own_env(), ok=False)
        if progress() != at:
            raise Failed(f"{program.name} goes on while it is suspended")
        code, answer = self.bennu_json(["resume", "--json", program.pid], timeout)
        if code != 0:
            self.explain_failure(program)
            raise Failed(f"bennu resume of {program.name}: status {code}: {answer.get('error', answer)}")
        self.phases(f"{what}/resume", answer)
        return at

    def gpu_used(self):
        if self.sim:
            return None
        r = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"], capture_output=True,
                           text=True)
        try:
            return int(r.stdout.strip())
        except ValueError:
            return None

    def remove_image(self, folder):
        shutil.rmtree(folder, ignore_errors=True)

    def warm_memory(self, gigabytes, threads=8):
        """Touches host memory once, so that the machine under this one has backed it: otherwise the first use is timed with it."""
        began = time.monotonic()
        code = ("import mmap,sys; m=mmap.mmap(-1,int(sys.argv[1]),flags=mmap.MAP_PRIVATE|mmap.MAP_ANONYMOUS|0x8000)")
        each = int(gigabytes * 1e9 / threads)
        ps = [subprocess.Popen([sys.executable, "-S", "-c", code, str(each)], env=self.env()) for _ in range(threads)]
        for p in ps:
            p.wait(180)
        self.say(f"touched {gigabytes} GB of host memory in {time.monotonic() - began:.1f} s")
        self.notes["host_memory"] = f"{gigabytes} GB touched before the first measurement"

    # ---- results ----

    def row(self, name, value, unit, better="lower", target=None, **more):
        self.rows.append({"name": name, "value": value, "unit": unit, "target": target, "better": better, **more})

    def machine(self):
        smi = "" if self.sim else subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
                                                 capture_output=True, text=True).stdout.strip()
        gpu, _, driver = smi.partition("\n")[0].partition(", ")
        try:
            commit = (self.bin / "commit").read_text().splitlines()
        except OSError:
            commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        return {"machine": f"{os.cpu_count()} cores, {memory:.0f} GiB, Linux {os.uname().release}",
                "gpu": gpu or "simulated", "driver": driver or "simulated",
                "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "commit": (commit or ["unknown"])[0] + (" and changes" if len(commit) > 1 else "")}

    def write_results(self):
        filesystem = subprocess.run(["stat", "-f", "-c", "%T", self.images], capture_output=True, text=True).stdout.strip()
        data = {**self.machine(), "notes": {"images": filesystem, **self.notes},
                "steps": [{"name": n, "result": r, "seconds": round(s, 2), "text": t[:2000]} for n, r, s, t in self.results],
                "rows": self.rows}
        (self.out / "results.json").write_text(json.dumps(data, indent=1) + "\n")

    # ---- steps ----

    def step(self, timeout, expected=None, gpu=False):
        """Decorator: a step of this name, killed after `timeout` s, begun only if `expected` s are left. gpu: not on the simulation."""
        def add(fn):
            self.steps.append((fn.__name__.replace("_", "-"), fn, timeout, expected or timeout / 3, gpu))
            return fn
        return add

    def run_step(self, name, fn, timeout, expected, gpu):
        began = time.monotonic()
        left = self.args.budget - (began - self.began)
        if gpu and self.sim:
            return "SKIP", 0, "needs a GPU"
        if left < expected:
            return "NOT RUN", 0, f"{left:.0f} s are left, it needs about {expected:.0f}"
        self.say(f"=== {name}")

        def over(*_):
            raise OutOfTime

        signal.signal(signal.SIGALRM, over)
        signal.alarm(int(min(timeout, max(left, 5))))
        try:
            text = fn() or ""
            result = "PASS"
        except Skipped as e:
            result, text = "SKIP", str(e)
        except OutOfTime:
            result, text = "FAIL", "out of time at:\n" + "".join(traceback.format_exc().splitlines(True)[-12:])
            signal.alarm(0)
            for p in self.programs:
                if p.poll() is None:
                    self.say(self.describe_process(p.pid) + "\n" + tail(p.log, 10))
            if self.daemon:
                self.say(self.describe_process(self.daemon.pid) + "\n" + tail(self.daemon_log, 40))
                self.stop_daemon()
        except Exception as e:
            result, text = "FAIL", f"{e}" if isinstance(e, Failed) else traceback.format_exc()
        finally:
            signal.alarm(0)
            for p in self.programs:
                p.kill()
            self.programs.clear()
            for folder in self.images.iterdir():
                if folder.is_dir():
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    shutil.move(folder, self.details / f"{name}-{folder.name}")
        return result, time.monotonic() - began, text

    def main(self):
        if self.args.list:
            print(*(s[0] for s in self.steps), sep="\n")
            return 0
        only, skip = set(filter(None, self.args.only.split(","))), set(filter(None, self.args.skip.split(",")))
        unknown = (only | skip) - {s[0] for s in self.steps}
        if unknown:
            print(f"no such steps: {', '.join(sorted(unknown))}", file=sys.stderr)
            return 2
        try:
            for s in self.steps:
                if (only and s[0] not in only) or s[0] in skip:
                    continue
                result, seconds, text = self.run_step(*s)
                self.results.append((s[0], result, seconds, text))
                self.say(f"--- {s[0]}: {result} in {seconds:.1f} s {text}")
                self.write_results()
        finally:
            self.finish()
        return 1 if any(r[1] in ("FAIL", "NOT RUN") for r in self.results) else 0

    def finish(self):
        self.stop_daemon()
        self.say("\n=== summary")
        for name, result, seconds, text in self.results:
            first = text.strip().splitlines()[0][:150] if text.strip() else ""
            self.say(f"{result:8} {name:28} {seconds:7.1f} s  {first}")
        self.write_results()
        with tarfile.open(self.out / "details.tar.gz", "w:gz") as tar:
            for f in sorted(self.details.rglob("*")):
                if f.is_file() and f.stat().st_size > 4 << 20:
                    with open(f, "r+b") as big:
                        big.truncate(4 << 20)
            tar.add(self.details, "details")
        if self.mounted:
            subprocess.run(["umount", "-l", self.mounted], capture_output=True)
        shutil.rmtree(self.work, ignore_errors=True)
        pathlib.Path(f"/dev/shm/cuda-sim.gpu-tests{os.getpid()}").unlink(missing_ok=True)
        if not self.args.out:
            self.say(f"results: {self.out}")
        self.logfile.close()
