# SPDX-License-Identifier: MIT
"""What smoke and run-all do; each function is a step or the heart of some."""

import concurrent.futures
import difflib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time

from harness import ROOT, TESTS, Failed, Skipped, find_driver, tail

KERNELS = ROOT / "sim/kernels.ptx"


# ---- what the machine is ----

def versions(t):
    t.say(f"python {sys.version.split()[0]}, {os.uname().release}, {os.cpu_count()} cores")
    for argv in (["nvidia-smi"], ["free", "-m"], ["df", "-h", "/", "/tmp", "/dev/shm"], ["cat", "/etc/os-release"],
                 ["sh", "-c", "ldd --version | head -1; ldconfig -p | grep -i cuda; ls -la /usr/local/nvidia/lib64/libcuda* 2>&1;"
                              " ls -d /usr/local/cuda*; which nvcc gcc nm gdb strace iptables nft; cat /proc/sys/kernel/yama/ptrace_scope"
                              " /proc/sys/kernel/ns_last_pid; ls -la /dev/nvidia*; env | grep -i -E 'cuda|nvidia|preload|library' "],
                 ["sh", "-c", "cat /proc/1/comm; cat /proc/self/status | grep -i -E 'cap|seccomp'; mount | head -30; dmesg | tail -5"]):
        try:
            t.command(argv, timeout=30, ok=False)
        except Failed as e:
            t.say(str(e))
    t.say(f"libcuda: {find_driver()}")
    t.command([t.bin / "criu/bin/criu", "--version"], ok=False)
    t.command([t.bin / "criu/bin/criu", "check"], ok=False)
    t.command([t.bennu, "--version"])


def exported(path):
    """The names of the functions that a library exports: a reader of ELF's dynamic symbols, as the machine may lack nm."""
    data = pathlib.Path(path).read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise Failed(f"{path} is no 64-bit ELF file")
    offset, = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3a)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)]
    names = set()
    for s in sections:
        if s[1] != 11:  # SHT_DYNSYM
            continue
        strings = sections[s[6]][4]
        for at in range(s[4], s[4] + s[5], 24):
            name, info, _, index = struct.unpack_from("<IBBH", data, at)
            if index != 0 and info >> 4 in (1, 2) and info & 15 in (2, 10):
                end = data.index(b"\0", strings + name)
                names.add(data[strings + name:end].decode())
    return names


def symbols(t):
    """Every function that this machine's driver exports is in the agent's table."""
    driver = find_driver()
    if not driver or t.sim:
        raise Skipped("no driver")
    theirs = {n for n in exported(driver) if n.startswith("cu")}
    ours = exported(t.agent)
    missing = sorted(n for n in theirs - ours if not (n.startswith("cudbg") and n not in ("cudbgGetAPI", "cudbgGetAPIVersion")))
    t.say(f"{driver} exports {len(theirs)} functions, the agent {len(ours)}")
    header = next((p for p in pathlib.Path("/usr/local").glob("cuda*/**/include/cuda.h")), None)
    if header and shutil.which("nm"):
        t.command([ROOT / "scripts/refresh-api", "--check", "--symbols", driver, header], ok=False, timeout=120)
    if missing:
        raise Failed(f"the agent lacks {len(missing)}: {' '.join(missing)}")
    return f"{len(theirs)} functions"


def check(t):
    t.need_daemon()
    r = t.command([t.bennu, "check"], env=t.own_env(), ok=False)
    t.command([t.bennu, "check", "--json"], env=t.own_env(), ok=False, quiet=True)
    return f"status {r.returncode}"


# ---- the agent's presence changes nothing ----

def nvcc():
    found = shutil.which("nvcc") or ("/usr/local/cuda/bin/nvcc" if os.path.exists("/usr/local/cuda/bin/nvcc") else None)
    if not found:
        raise Skipped("no nvcc")
    return found


def cuda_program(t, name):
    """A program of this folder, from the bundle or compiled here."""
    made = t.bin / "test/gpu" / name
    if made.exists():
        return made
    made = t.work / name
    if made.exists():
        return made
    source, options = {"udp_counter": ("udp_counter.cu", []), "runtime-static": ("runtime.cu", []),
                       "runtime-lcuda": ("runtime.cu", ["-DDRIVER", "-lcuda"])}[name]
    t.command([nvcc(), "-cudart", "static", "-arch=native", *options, "-o", made, TESTS / source], timeout=120)
    return made


def run_beside(t, name, argv, agent, by_path, timeout):
    """One of the two runs of compare(): status, both outputs, seconds."""
    e = t.env(agent and not by_path)
    if agent and by_path:
        e["LD_LIBRARY_PATH"] = ":".join(filter(None, [str(t.agent.parent), os.environ.get("LD_LIBRARY_PATH")]))
    home = t.work / f"home-{name}-{agent}"
    home.mkdir(exist_ok=True)
    # Neither run finds what the other compiled.
    e.update(TORCHINDUCTOR_CACHE_DIR=str(home / "inductor"), TRITON_CACHE_DIR=str(home / "triton"), CUPY_CACHE_DIR=str(home / "cupy"))
    began = time.monotonic()
    try:
        r = subprocess.run([str(a) for a in argv], env=e, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                           timeout=timeout, cwd=t.work)
        got = (r.returncode, r.stdout, r.stderr, time.monotonic() - began)
    except subprocess.TimeoutExpired:
        got = (-1, "", f"not done in {timeout} s", timeout)
    except FileNotFoundError as x:
        got = (127, "", str(x), 0)
    (t.details / f"compare-{name}-{'with' if agent else 'without'}.txt").write_text(f"{got[0]}\n{got[1]}\n---\n{got[2]}\n")
    return got


def compare(t, name, argv, by_path=False, at_once=True, timeout=200):
    """Runs a program without and with the agent (preloaded, or found first on the library path). Returns what differs, or None, and what
    both did."""
    with concurrent.futures.ThreadPoolExecutor(2 if at_once else 1) as pool:
        got = list(pool.map(lambda agent: run_beside(t, name, argv, agent, by_path, timeout), (False, True)))
    (code0, out0, err0, _), (code1, out1, err1, _) = got
    if code0 != code1 or out0 != out1:
        diff = list(difflib.unified_diff(out0.splitlines(), out1.splitlines(), "without", "with", lineterm="", n=1))
        return (f"{name}: status {code0} without and {code1} with the agent\n" + "\n".join(diff[:40]) + "\nstderr without: "
                + err0[-600:] + "\nstderr with: " + err1[-1500:]), got
    if err0 != err1:
        t.say(f"{name}: only standard error differs:\nwithout: {err0[-400:]}\nwith: {err1[-400:]}")
    return None, got


def programs(t, frameworks=("pytorch", "expandable", "cupy", "jax", "compiled")):
    """Programs of all kinds print and return the same with and without the agent."""
    py = sys.executable
    todo = {
        "bash": ["bash", "-c", "for i in 1 2 3; do (echo $i; exit $i); echo $?; done; cat /proc/self/comm; exit 7"],
        "python": [py, "-c", "import subprocess; print(subprocess.run(['true']).returncode)"],
    }
    if not t.sim:
        todo["nvidia-smi"] = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,uuid", "--format=csv"]
        todo["nvidia-smi -L"] = ["nvidia-smi", "-L"]
        for name in ("runtime-static", "runtime-lcuda"):
            try:
                todo[name] = [cuda_program(t, name)]
            except Skipped as e:
                t.say(f"{name}: {e}")
        for f in frameworks:
            todo[f] = [py, TESTS / "frameworks.py", f]
        for name in ("pytorch", "runtime-static"):
            if name in todo:
                todo[f"{name}, by path"] = todo[name]
    wrong = []
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        futures = {name: pool.submit(compare, t, re.sub("[ ,]+", "-", name), argv, "by path" in name) for name, argv in todo.items()}
        for name, future in futures.items():
            problem, got = future.result()
            times = " and ".join(f"{g[3]:.2f} s" for g in got)
            t.say(f"{'DIFFERENT' if problem else 'same     '} {name:24} {times} (without, with)  "
                  + (got[-1][1].strip().splitlines() or [""])[-1][:100])
            if got and got[0][0] != 0 and name not in ("bash",):
                t.say(f"  {name} itself ends with {got[0][0]}: {got[0][2][-800:]}")
                wrong.append(f"{name} fails without the agent, too: {got[0][2].strip()[-200:]}")
            if problem:
                t.say(problem)
                wrong.append(problem.splitlines()[0])
    if wrong:
        raise Failed("\n".join(wrong))
    return f"{len(todo)} programs"


def semantics(t):
    """The answers to many questions about allocations are those of the driver, but for the known differences."""
    known = [re.compile(line) for line in (TESTS / "semantics.known").read_text().splitlines() if line and not line.startswith("#")]
    _, got = compare(t, "semantics", [t.bin / "test/gpu/gpu-semantics"], at_once=False, timeout=100)
    without, with_ = (g[1].splitlines() for g in got)
    if not without or without[-1] != "end":
        raise Failed(f"gpu-semantics does not get to its end without the agent: {got[0][0]}, {without[-3:]} {got[0][2]}")
    new, expected = [], 0
    matcher = difflib.SequenceMatcher(None, without, with_, autojunk=False)
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        if tag == "equal":
            continue
        section = next((line for line in reversed(without[:a0 + 1]) if line.startswith("== ")), "")
        was, now = without[a0:a1], with_[b0:b1]
        for i in range(max(len(was), len(now))):
            line = f"{was[i] if i < len(was) else '(nothing)'}  =>  {now[i].split(')')[-1].strip() if i < len(now) else '(nothing)'}"
            if any(k.search(line) for k in known):
                expected += 1
            else:
                new.append(f"{section}: {line}   [{now[i] if i < len(now) else ''}]")
    t.say(f"{len(without)} answers; {expected} differ as known, {len(new)} otherwise")
    if new:
        t.say("\n".join(new))
        raise Failed(f"{len(new)} answers differ with the agent, the first: {new[0]}")
    return f"{len(without)} answers the same, {expected} known differences"


def benchmark(t, name, *argv, timeout=120, env=None):
    """A program of bench/, if it was built. What it prints goes to the log, and each line that has a number and a unit after its text to
    the rows as well."""
    program = t.bin / "bench" / name
    if not program.exists():
        raise Skipped(f"{program} was not built")
    r = t.command([program, *argv], timeout=timeout, ok=False, env=t.env(**(env or {})))
    (t.details / f"{name}.txt").write_text(r.stdout)
    section = ""
    for line in r.stdout.splitlines():
        if line and not line[0].isspace():
            section = line.split("  ")[0].strip() + "/"
        m = re.match(r"(.*?\S)\s+(-?[0-9.]+) (GB/s|TB/s|ns|us|ms|s|%)(?:\s|$)", line.strip())
        if m:
            t.row(f"{name}/{section if line[0].isspace() else ''}{m[1].strip()}", float(m[2]), m[3],
                  better="higher" if m[3].endswith("B/s") else "lower")
    if r.returncode != 0:
        raise Failed(f"{name}: status {r.returncode}: {r.stdout[-500:]}")
    return r.stdout


def copy_speed(t):
    options = ["--driver", t.bin / "sim/libcuda.so.1", "--bytes", "64M", "--rounds", "2"] if t.sim else ["--bytes", "4G", "--rounds", "3",
                                                                                                     "--touch", "8"]
    benchmark(t, "bench-copy", *options, timeout=100)


def gate(t):
    """What a gated call costs; both libraries in one process."""
    driver = t.bin / "sim/libcuda.so.1" if t.sim else find_driver()
    out = benchmark(t, "bench-gate", t.agent, driver, timeout=50, env={"BENNU_DRIVER": str(driver)})
    cost = re.search(r"gate costs (-?[0-9.]+) ns", out)
    t.row("a gated call costs", float(cost[1]), "ns", target=15)
    return cost[0]


def answers(t):
    """What the driver answers where its reference is silent."""
    benchmark(t, "bench-answers", *(["--driver", t.bin / "sim/libcuda.so.1"] if t.sim else []), timeout=60)


# ---- (a) the C program ----

def alloc_arguments(t, size):
    if t.sim:
        size = "sim"
    table = {"sim": ["--row", "4M", "--largest", "16M", "--no-fork"], "small": ["--row", "64M", "--largest", "512M"],
             "quick": ["--row", "256M", "--largest", "2G"], "full": []}
    return ["--kernels", KERNELS, *table[size]]


def steps_done(text):
    done = re.findall(r"^step (\d+)$", text, re.M)
    return int(done[-1]) + 1 if done else 0


def start_alloc(t, name, size, agent=True):
    program = t.start(name, [t.bin / "test/gpu/gpu-alloc", *alloc_arguments(t, size)], agent=agent)
    m = program.wait_for(lambda s: re.search(r"^allocations (\d+) bytes (\d+)$", s, re.M), "its allocations")
    t.say(f"{name}: process {program.pid}, {m[1]} allocations, {int(m[2]) / 1e9:.2f} GB")
    program.wait_for(lambda s: steps_done(s) >= 3, "step 3")
    return program


def check_path(t, folder, want):
    """Was the GPU memory saved the way that was meant?"""
    r = t.command([t.bennu, "inspect", "--json", folder], env=t.own_env(), quiet=True)
    paths = {p["path"] for p in json.loads(r.stdout)["processes"]}
    if paths != {want}:
        raise Failed(f"the checkpoint was made by {paths}, not by {want}")


def go_on(program, steps=3, seconds=120):
    at = steps_done(program.text())
    program.wait_for(lambda s: steps_done(s) >= at + steps, f"{steps} steps after {at}", seconds)


def end_alloc(t, program):
    os.kill(program.pid, signal.SIGUSR1)
    status = program.wait_end()
    text = program.text()
    numbers = [int(n) for n in re.findall(r"^step (\d+)$", text, re.M)]
    if status not in (0, -1) or f"done {len(numbers)}" not in text:
        raise Failed(f"{program.name} ended with {status}\n{tail(program.log)}")
    if numbers != list(range(len(numbers))):
        raise Failed(f"{program.name}: its steps are not one after another")
    return f"{len(numbers)} steps, every byte right"


def alloc_alone(t, size, agent=True, seconds=5):
    """The program under the agent, nothing else happening."""
    program = start_alloc(t, "alone", size, agent)
    at, began = steps_done(program.text()), time.monotonic()
    time.sleep(seconds)
    n = steps_done(program.text()) - at
    t.row(f"alloc/{'agent' if agent else 'no agent'}/{size}/step", (time.monotonic() - began) / max(n, 1), "s")
    return end_alloc(t, program)


def alloc_rounds(t, name, size, rounds, agent=True, options=(), leave_running=False):
    """Dump, which kills, and restore, some times over; the program checks every byte of its memory each step."""
    t.need_daemon()
    program = start_alloc(t, name, size, agent)
    if leave_running:
        folder = t.dump(program, f"alloc/{name}/leave-running", *options, leave_running=True)
        go_on(program)
        t.remove_image(folder)
    for i in range(1, rounds + 1):
        what = f"alloc/{name}/{size}/round{i}"
        folder = t.dump(program, what, *options)
        check_path(t, folder, "driver" if not agent or "--driver-path" in options else "agent")
        if i == 1:
            t.command([t.bennu, "inspect", folder], env=t.own_env(), ok=False)
            used = t.gpu_used()
            t.say(f"GPU memory in use after the dump: {used} MiB")
        t.restore(program, folder, what)
        go_on(program)
        t.remove_image(folder)
    t.command([t.bennu, "ps"], env=t.own_env(), ok=False)
    return end_alloc(t, program)


def alloc_suspend(t, size, rounds=2, agent=True):
    t.need_daemon()
    name = f"suspend-{'agent' if agent else 'driver'}"
    program = start_alloc(t, name, size, agent)
    t.command([t.bennu, "ps"], env=t.own_env(), ok=False)
    for i in range(1, rounds + 1):
        t.suspend_resume(program, f"alloc/{name}/{size}/round{i}", lambda: steps_done(program.text()))
        go_on(program)
    return end_alloc(t, program)


def tree(t, size, rounds=2):
    """A shell and two programs below it, one with and one without the agent: dumped and restored as one."""
    t.need_daemon()
    program = [t.bin / "test/gpu/gpu-alloc", *alloc_arguments(t, size)]
    line = " ".join(map(str, program))
    logs = [t.details / "tree-agent.out", t.details / "tree-driver.out"]
    library = f"LD_LIBRARY_PATH={t.bin / 'sim'}" if t.sim else ""
    shell = t.start("tree", ["bash", "-c", f"{line} >{logs[0]} 2>&1 & env -u LD_PRELOAD {library} {line} >{logs[1]} 2>&1 & wait"])

    def both(n):
        return lambda _: all(log.exists() and steps_done(log.read_text()) >= n for log in logs)

    def more(n):
        at = max(steps_done(log.read_text()) for log in logs)
        shell.wait_for(both(at + n), f"{n} steps more of both\n{tail(logs[0], 5)}\n{tail(logs[1], 5)}")

    shell.wait_for(both(3), "step 3 of both")
    pids = [int(p) for p in pathlib.Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()]
    try:
        for i in range(1, rounds + 1):
            folder = t.dump(shell, f"tree/{size}/round{i}")
            r = t.command([t.bennu, "inspect", "--json", folder], env=t.own_env(), quiet=True)
            paths = sorted(p["path"] for p in json.loads(r.stdout)["processes"])
            if paths != ["agent", "driver"]:
                raise Failed(f"the checkpoint has processes of {paths}")
            t.restore(shell, folder, f"tree/{size}/round{i}")
            more(3)
            t.remove_image(folder)
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)
        shell.wait_end()
    except BaseException:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        raise
    for log in logs:
        if not re.search(r"^done \d+$", log.read_text(), re.M):
            raise Failed(f"{log.name}:\n{tail(log)}")
    return "both went on, every byte right"


def criu_alone(t):
    """CRIU with the plugin, started by hand, without a daemon: the plugin brings a private one."""
    program = start_alloc(t, "no-daemon", "small", True)
    t.stop_daemon()
    folder = t.images / "by-hand"
    folder.mkdir()
    env = t.own_env()
    env.update(CRIU_LIBS_DIR=str(t.bin / "src/criu"), BENNU_RUNDIR=str(t.work / "nobody"))
    criu = [t.bin / "criu/bin/criu"]
    common = ["-D", folder, "-v4", "--shell-job", "--ext-unix-sk", "--link-remap", "--file-locks"]
    if not shutil.which("iptables"):
        common += ["--network-lock", "nftables"]
    r = t.command([*criu, "dump", "-t", str(program.pid), "-o", "dump.log", *common], env=env, ok=False, timeout=120)
    if r.returncode != 0:
        t.daemon_log = t.details / "bennud.log"
        t.explain_failure(program, folder / "dump.log")
        raise Failed(f"criu dump: status {r.returncode}")
    program.wait_end(20)
    program.status, program.popen = None, None
    r = t.command([*criu, "restore", "-d", "-o", "restore.log", *common], env=env, ok=False, timeout=120)
    if r.returncode != 0:
        t.explain_failure(program, folder / "restore.log")
        raise Failed(f"criu restore: status {r.returncode}")
    go_on(program)
    return end_alloc(t, program)


# ---- (b), (d) PyTorch ----

def tokens_of(text):
    return re.findall(r"^(\d+) (\d+) (-?\d+)$", text, re.M)


def generate_arguments(t, tokens, ballast, at_least_ms=0):
    return [sys.executable, TESTS / "generate.py", "--tokens", str(tokens), "--ballast-gb", str(ballast), "--at-least-ms",
            str(at_least_ms)]


def generate_reference(t, tokens, ballast):
    """An undisturbed run, without anything of ours. Kept for those that follow. A second one, slower and without ballast, must
    agree with it: otherwise the program itself does not repeat, and comparing says nothing."""
    began = time.monotonic()
    program = t.start("generate-reference", generate_arguments(t, tokens, ballast), agent=False)
    program.wait_for(lambda s: "ready" in s, "the model", 200)
    ready = time.monotonic()
    t.row("generate/cold start to model ready", ready - began, "s")
    status = program.wait_end(300)
    again = t.start("generate-again", generate_arguments(t, tokens, 0, 10), agent=False)
    t.reference = program.text()
    if again.wait_end(300) != 0 or tokens_of(again.text()) != tokens_of(t.reference):
        t.reference = None
        raise Failed(f"two undisturbed runs of the program differ\n{tail(again.log)}")
    if status != 0 or len(tokens_of(t.reference)) != tokens:
        raise Failed(f"it ended with {status}\n{tail(program.log)}")
    t.row("generate/token, no agent", (time.monotonic() - ready) / tokens, "s")
    distinct = len({tok for _, tok, _ in tokens_of(t.reference)})
    return f"{tokens} tokens, {distinct} distinct; {t.reference.strip().splitlines()[-1]}"


def generate(t, name, tokens, ballast, rounds, agent=True, suspend=False, options=(), inspect=False, pace=30):
    """Dumps, kills and restores the program in the middle: its tokens are those of the undisturbed run."""
    if not getattr(t, "reference", None):
        raise Skipped("there is no undisturbed run to compare with")
    t.need_daemon()
    program = t.start(f"generate-{name}", generate_arguments(t, tokens, ballast, pace), agent=agent)
    program.wait_for(lambda s: len(tokens_of(s)) >= 20, "20 tokens", 240)
    done = lambda: len(tokens_of(program.text()))  # noqa: E731
    if inspect:
        t.command([t.bennu, "ps"], env=t.own_env(), ok=False)
        t.command([t.bennu, "ps", "--json"], env=t.own_env(), ok=False)
    if suspend:
        for i in (1, 2):
            t.suspend_resume(program, f"generate/{name}/round{i}", done)
            at = done()
            program.wait_for(lambda s: len(tokens_of(s)) >= at + 5, "5 more tokens", 60)
    for i in range(1, rounds + 1):
        what = f"generate/{name}/round{i}"
        folder = t.dump(program, what, *options)
        check_path(t, folder, "agent" if agent else "driver")
        if inspect and i == 1:
            t.command([t.bennu, "inspect", folder], env=t.own_env(), ok=False)
            t.command(["sh", "-c", f"ls -laS {folder} | head -20"], ok=False)
        t.restore(program, folder, what)
        at, began = done(), time.monotonic()
        program.wait_for(lambda s: len(tokens_of(s)) >= at + 1, "the next token", 60)
        t.row(f"{what}/restored to next token", time.monotonic() - began, "s")
        program.wait_for(lambda s: len(tokens_of(s)) >= at + 5, "5 more tokens", 60)
        t.remove_image(folder)
    program.wait_end(200)
    text = program.text()
    mine, theirs = tokens_of(text), tokens_of(t.reference)
    if mine != theirs:
        first = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
        which = "tokens" if [m[:2] for m in mine] != [m[:2] for m in theirs] else "logits (but no token)"
        raise Failed(f"the {which} differ from number {first} on: {mine[first:first + 3]} and {theirs[first:first + 3]}; "
                     f"{len(mine)} and {len(theirs)} tokens\n{tail(program.log, 15)}")
    if text.strip().splitlines()[-1] != t.reference.strip().splitlines()[-1]:
        raise Failed(f"PyTorch's allocator holds something else: {text.strip().splitlines()[-1]}, not "
                     f"{t.reference.strip().splitlines()[-1]}")
    return f"{len(mine)} tokens identical"


# ---- (c) the server ----

def ask_server(port, seconds=10):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(seconds)
        s.sendto(b"hello", ("127.0.0.1", port))
        return int(s.recv(64))


def udp(t, agent):
    t.need_daemon()
    name = f"udp-{'agent' if agent else 'driver'}"
    program = t.start(name, [cuda_program(t, "udp_counter"), "0"], agent=agent)
    port = int(program.wait_for(lambda s: re.search(r"^port (\d+)$", s, re.M), "its port")[1])
    for want in (101, 102, 103):
        if (got := ask_server(port)) != want:
            raise Failed(f"it answers {got}, not {want}")
    want = 104
    for i in (1, 2):
        folder = t.dump(program, f"udp/{name}/round{i}")
        t.restore(program, folder, f"udp/{name}/round{i}")
        for _ in range(3):
            if (got := ask_server(port)) != want:
                raise Failed(f"after round {i} it answers {got}, not {want}")
            want += 1
        t.remove_image(folder)
    program.kill()
    return f"counted to {want - 1}"
