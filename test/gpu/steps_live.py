# SPDX-License-Identifier: MIT
"""Steps of run-all: tiers, many small blocks, memory that another program needs, hashes, and checkpoints of programs that run on."""

import os
import re
import shutil
import signal
import sys

from harness import TESTS, Failed, Skipped, tail
from steps import KERNELS, benchmark, end_alloc, generate_arguments, go_on, start_alloc, steps_done, tokens_of

NEED_HOT = 6816  # of the word in an agent's page that says that memory rests (src/wire/agent_proto.h)


def asked(t, *command, timeout=120):
    """A command of bennu's that must succeed: its answer."""
    code, answer = t.bennu_json([command[0], "--json", *command[1:]], timeout)
    if code != 0:
        raise Failed(f"bennu {' '.join(map(str, command))}: status {code}: {answer.get('error', answer)}")
    return answer


def hash_on_gpu(t):
    """The kernel's values are the CPU's, whatever the content and the key."""
    options = ["--driver", t.bin / "sim/libcuda.so.1", "--chunks", 60, "--keys", 2, "--bytes", "64M", "--rounds", 2] if t.sim else [
        "--chunks", 6144, "--keys", 12]
    out = benchmark(t, "bench-hash-gpu", *options, timeout=100)
    return re.search(r"^compared .*", out, re.M)[0]


# ---- tiers ----

def tiers(t, size):
    """Every tier, and memory without its context: in turn, of one program."""
    t.need_daemon()
    program = start_alloc(t, "tiers", size)
    for options in (["--to", "gpu"], ["--to", "host"], ["--to", "disk"], ["--keep-context"], ["--keep-context", "--to", "gpu"]):
        what = f"alloc/{'-'.join(o.strip('-') for o in options)}/{size}"
        t.suspend_resume(program, what, lambda: steps_done(program.text()), *options, frees="gpu" not in options)
        go_on(program)
    return end_alloc(t, program)


def start_hold(t, name, size, block, agent=True):
    """bench-hold: it has that much in blocks of that size, and checks all of it when it is asked to."""
    fifo = t.work / f"{name}.fifo"
    fifo.unlink(missing_ok=True)
    os.mkfifo(fifo, 0o600)
    program = t.start(name, [t.bin / "bench/bench-hold", "--kernels", KERNELS, "--bytes", size, "--block", block, "--commands", fifo], agent)
    program.fifo, program.checks = fifo, 0
    m = program.wait_for(lambda s: re.search(r"^ready .*", s, re.M), "its memory is filled")
    t.say(f"{name}: process {program.pid}, {m[0]}")
    return program


def check_hold(program):
    program.checks += 1
    fd = os.open(program.fifo, os.O_RDWR)
    try:
        os.write(fd, b"check\n")
        m = program.wait_for(lambda s: re.search(rf"^checked {program.checks}: (\d+) wrong", s, re.M), f"check {program.checks}")
    finally:
        os.close(fd)
    if m[1] != "0":
        raise Failed(f"{program.name}: {m[1]} words are wrong")


def slabs(t, count):
    """Thousands of blocks that share memory: suspended and resumed, dumped and restored."""
    t.need_daemon()
    for name, size in (("2 MiB", 2 << 20), ("64 KiB", 64 << 10)):
        program = start_hold(t, f"slabs-{size}", size * count, size)
        what = f"{count} blocks of {name}"
        for tier in ("host", "gpu"):
            t.suspend_resume(program, f"{what}/{tier}", lambda: 0, "--to", tier, frees=False)
            check_hold(program)
        folder = t.dump(program, what)
        t.restore(program, folder, what)
        check_hold(program)
        t.remove_image(folder)
        program.kill()
    return f"{count} blocks of 2 MiB and of 64 KiB, every byte right"


# ---- memory that another program needs ----

def free_mib(t):
    """MiB of GPU 0 that are free."""
    if t.sim:
        return 1024  # as harness.py gives it
    out = t.command(["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "-i", "0"], quiet=True).stdout
    return int(out)


def heard_of_need(pid):
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            if "bennu-agent" in os.readlink(f"/proc/{pid}/fd/{fd}"):
                with open(f"/proc/{pid}/fd/{fd}", "rb") as f:
                    return any(os.pread(f.fileno(), 4, NEED_HOT))
        except FileNotFoundError:
            pass  # closed meanwhile
    return False


def out_of_memory(t, mib):
    """A program's allocations get what another one left on the GPU, which is moved to the host."""
    t.start_daemon()
    hot = start_hold(t, "hot", mib << 20, 64 << 20)
    # What is left is half of what the third program will need, its context (and those of the others) included.
    rest = (free_mib(t) - mib if t.sim else free_mib(t)) - mib // 2
    filler = start_hold(t, "filler", rest << 20, 256 << 20, agent=False)
    asked(t, "suspend", "--to", "gpu", hot.pid)
    other = t.start("needs-memory", [t.bin / "test/cr/odd", "later", mib], env={"CR_KERNELS": str(KERNELS)})
    other.wait_for(lambda s: "open" in s, "it uses CUDA")
    other.wait_for(lambda _: heard_of_need(other.pid), "it has heard of memory that rests", 30)
    os.kill(other.pid, signal.SIGUSR1)
    other.wait_for(lambda s: re.search(r"^0 \d+ round 2$", s, re.M), "its allocations")
    tier = next((p["tier"] for p in asked(t, "ps")["processes"] if p["pid"] == hot.pid), None)
    if tier != "host":
        raise Failed(f"what rested on the GPU is in the tier {tier} now, not host")
    other.kill()
    asked(t, "resume", hot.pid)
    check_hold(hot)
    check_hold(filler)
    return f"{mib} MiB were needed and given"


# ---- live ----

def rounds_of_cut(text):
    return [int(n) for n in re.findall(r"^0 \d+ round (\d+)$", text, re.M)]


def cut_goes_on(program, rounds=2):
    """Each round compares all memory with what the program's own count of steps demands."""
    at = len(rounds_of_cut(program.text()))
    program.wait_for(lambda s: len(rounds_of_cut(s)) >= at + rounds, f"{rounds} rounds more")
    seen = rounds_of_cut(program.text())
    if seen != list(range(seen[0], seen[0] + len(seen))):
        raise Failed(f"{program.name}: its rounds are not one after another: {seen}")


def copied_bytes(answer):
    return sum(p["bytes"] for p in answer["phases"] if p["name"] == "copy-out")


def live(t, count, hot, cold):
    """A program that writes all the time: each of several live checkpoints is a moment that it was really in, and one after a pre-dump."""
    t.need_daemon()
    program = t.start("cut", [t.bin / "test/cr/cut", f"--hot={hot}", f"--cold={cold}"], env={"CR_KERNELS": str(KERNELS)})
    program.wait_for(lambda s: len(rounds_of_cut(s)) >= 2, "round 2")
    folders = []
    for i in range(count):
        folders.append(t.dump(program, f"live/{i + 1}", "--live", leave_running=True))
        cut_goes_on(program)
    t.command([t.bennu, "inspect", "--verify", folders[0]], env=t.own_env())
    for i in [*range(1, count), 0]:
        t.restore_older(program, folders[i], f"live/{i + 1}")
        cut_goes_on(program)
        t.remove_image(folders[i])
    ahead = asked(t, "pre-dump", program.pid)
    t.say(f"pre-dump: {ahead}")
    folder = t.dump(program, "after-pre-dump")
    if copied_bytes(t.last_dump) > t.last_dump["gpu_bytes"] // 2:
        raise Failed(f"after a pre-dump {copied_bytes(t.last_dump)} of {t.last_dump['gpu_bytes']} bytes were sent")
    t.restore(program, folder, "after-pre-dump")
    cut_goes_on(program)
    return f"{count} live checkpoints and one after a pre-dump, every byte right"


def alloc_live(t, size, count):
    """The program of all kinds of allocations, which rewrites every byte in every step."""
    t.need_daemon()
    program = start_alloc(t, "alloc-live", size)
    folders = []
    for i in range(count):
        folders.append(t.dump(program, f"alloc/live/{size}/{i + 1}", "--live", leave_running=True))
        go_on(program)
    for i in reversed(range(count)):
        t.restore_older(program, folders[i], f"alloc/live/{size}/{i + 1}")
        program.wait_for(lambda s: steps_done(s) > 0, "a step after its restore")
        go_on(program)
    os.kill(program.pid, signal.SIGUSR1)
    if program.wait_end() not in (0, -1) or not re.search(r"^done \d+$", program.text(), re.M):
        raise Failed(f"{program.name} ended with {program.status}\n{tail(program.log)}")
    return f"{count} live checkpoints, every byte right"


def generate_live(t, tokens, ballast):
    """A live checkpoint leaves the tokens as they are, in the program that runs on and in the one that is restored."""
    want = tokens_of(getattr(t, "reference", None) or "")
    if not want:
        raise Skipped("there is no undisturbed run to compare with")
    t.need_daemon()
    program = t.start("generate-live", generate_arguments(t, tokens, ballast, 30))
    program.wait_for(lambda s: len(tokens_of(s)) >= 20, "20 tokens", 240)
    folder = t.dump(program, "generate/live", "--live", leave_running=True)
    at = len(tokens_of(program.text()))
    program.wait_for(lambda s: len(tokens_of(s)) >= at + 20, "20 tokens more", 60)
    before = tokens_of(program.text())
    t.restore_older(program, folder, "generate/live")
    program.wait_end(200)
    after = tokens_of(program.text())
    if before != want[:len(before)] or not after or after != want[int(after[0][0]):]:
        raise Failed(f"the tokens differ: {before[-3:]}, restored {after[:3]} to {after[-3:]}\n{tail(program.log, 15)}")
    if program.text().strip().splitlines()[-1] != t.reference.strip().splitlines()[-1]:
        raise Failed(f"PyTorch's allocator holds something else: {program.text().strip().splitlines()[-1]}")
    return f"{len(before)} tokens before and {len(after)} after the restore identical"


def losses_of(text):
    return [(int(n), loss) for n, loss in re.findall(r"^(\d+) ([0-9a-f]{8})$", text, re.M)]


def room_for(t, folder, count):
    """Fails before a file system is full, and not after: `count` more checkpoints as large as this one."""
    need = count * sum(f.stat().st_blocks * 512 for f in folder.iterdir() if f.stat().st_nlink == 1)
    free = shutil.disk_usage(folder).free
    if free < need * 1.1:
        raise Failed(f"{count} checkpoints more need {need / 1e9:.0f} GB, and {t.images} has {free / 1e9:.0f} GB free")


class Training:
    """train.py, undisturbed and with the agent: both at once, since most of their time goes to the beginning."""

    def __init__(self, t, steps, pace_ms):
        self.t, self.steps, self.pace = t, steps, t.work / "pace"
        argv = [sys.executable, TESTS / "train.py", "--steps", steps]
        self.at_pace(pace_ms)
        reference = t.start("train-reference", argv, agent=False)
        self.program = t.start("train", [*argv, "--pace", self.pace])
        if reference.wait_end(120) != 0 or len(losses_of(reference.text())) != steps:
            raise Failed(f"train.py ended with {reference.status}\n{tail(reference.log)}")
        self.want = losses_of(reference.text())
        self.go_on(5, "its beginning")

    def at_pace(self, ms):
        self.pace.write_text(str(ms))

    def go_on(self, more, what):
        at = len(losses_of(self.program.text()))
        self.program.wait_for(lambda s: len(losses_of(s)) >= at + more, f"{more} steps after {what}", 60)
        self.compare(what)

    def compare(self, what):
        """Of its present life, from its first step on. Returns the number of that."""
        seen = losses_of(self.program.text())
        if seen != self.want[seen[0][0]:seen[0][0] + len(seen)]:
            raise Failed(f"{what}: the losses differ from the undisturbed run's: {seen[:3]} … {seen[-3:]}")
        return seen[0][0]


def train_live(t, count, steps):
    """Every one of many live checkpoints of a training loop goes on to the same losses, bit for bit; some of them to the end."""
    t.need_daemon()
    training, folders, begins = Training(t, steps, 40), [], []
    program = training.program
    for i in range(count):
        parent = [f"--parent={folders[-1]}"] if folders else []
        folders.append(t.dump(program, f"train/{i + 1}", "--live", *parent, leave_running=True))
        training.go_on(2, f"live checkpoint {i + 1}")
        if i == 0:
            room_for(t, folders[0], count - 1)
    last = len(losses_of(program.text()))
    if last + 10 >= steps:
        raise Failed(f"the program is too fast: {last} of its {steps} steps are done")
    to_the_end = {0, count // 2, count - 1}
    for i, folder in enumerate(folders):
        training.at_pace(0 if i in to_the_end else 10)
        t.restore_older(program, folder, f"train/{i + 1}")
        training.go_on(5, f"the restore from live checkpoint {i + 1}")
        if i in to_the_end:
            program.wait_for(lambda s: re.search("^done$", s, re.M), "its end", 60)
        begins.append(training.compare(f"restored from live checkpoint {i + 1}"))
        if i in to_the_end and begins[-1] + len(losses_of(program.text())) != steps:
            raise Failed(f"restored from live checkpoint {i + 1}: it ended before step {steps}")
        t.remove_image(folder)
    if begins != sorted(set(begins)) or begins[-1] > last:
        raise Failed(f"the checkpoints are not of {count} moments of the run: they go on at {begins}")
    return f"{count} live checkpoints in {last} steps, each restored to the same losses, {len(to_the_end)} to the end"
