# SPDX-License-Identifier: MIT
"""Steps of run-all: tiers, many small blocks, memory that another program needs, hashes, and checkpoints of programs that run on."""

import os
import re
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


def train_live(t, count, steps, pace, more=10):
    """Every one of many live checkpoints of a training loop goes on to the same losses, bit for bit."""
    argv = [sys.executable, TESTS / "train.py", "--steps", steps]
    reference = t.start("train-reference", argv, agent=False)
    if reference.wait_end(120) != 0 or len(want := losses_of(reference.text())) != steps:
        raise Failed(f"train.py ended with {reference.status}\n{tail(reference.log)}")
    t.need_daemon()
    program = t.start("train", [*argv, "--at-least-ms", pace])
    program.wait_for(lambda s: len(losses_of(s)) >= 5, "step 5", 200)
    folders = []

    def compare(what):
        seen = losses_of(program.text())
        if seen != want[seen[0][0]:seen[0][0] + len(seen)]:
            raise Failed(f"{what}: the losses differ from the undisturbed run's: {seen[:3]} … {seen[-3:]}")

    for i in range(count):
        parent = [f"--parent={folders[-1]}"] if folders else []
        folders.append(t.dump(program, f"train/{i + 1}", "--live", *parent, leave_running=True))
        at = len(losses_of(program.text()))
        program.wait_for(lambda s: len(losses_of(s)) >= at + 3, "3 steps more", 60)
        compare(f"after live checkpoint {i + 1}")
    last = len(losses_of(program.text()))
    if last + more >= steps:
        raise Failed(f"the program is too fast: {last} of its {steps} steps are done")
    for i, folder in enumerate(folders):
        t.restore_older(program, folder, f"train/{i + 1}")
        program.wait_for(lambda s: len(losses_of(s)) >= more, f"{more} steps more", 60)
        compare(f"restored from live checkpoint {i + 1}")
        t.remove_image(folder)
    return f"{count} live checkpoints in {last} steps, each restored to the same losses"
