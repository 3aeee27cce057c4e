# SPDX-License-Identifier: MIT
"""Steps of run-multi: programs on two GPUs. Each checks every byte of its memory in each round or step, and says when it has done one."""

import contextlib
import os
import re
import signal
import subprocess
import sys

from harness import TESTS, Failed, Skipped, below, tail
from steps import KERNELS
from steps_live import asked

GPUS = 2


def need_gpus(t):
    if t.sim:
        return
    have = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("\nGPU ") + 1
    if have < GPUS:
        raise Skipped(f"this machine has {have} GPU")


def used(t):
    """MiB in use on each GPU; None on the simulated driver."""
    if t.sim:
        return None
    out = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True).stdout
    return [int(line) for line in out.split()]


# ---- programs ----

def progress(program):
    """{role or rank: its last round or step}"""
    return {int(who): int(n) for who, n in re.findall(r"^(\d+)(?: \d+ round| step) (\d+)$", program.text(), re.M)}


def go_on(program, more=2, seconds=60):
    """Every process of it does some more."""
    at = progress(program)

    def done(_):
        now = progress(program)
        return len(now) == program.roles and all(now[who] >= at.get(who, 0) + more for who in now)
    program.wait_for(done, f"{more} rounds or steps more after {at}", seconds)
    if "WRONG" in program.text():
        raise Failed(f"{program.name}:\n{tail(program.log)}")


def started(t, program, roles, seconds=60):
    program.roles = roles
    go_on(program, 2, seconds)
    t.say(f"{program.name}: process {program.pid}, {roles} with GPU memory; in use: {used(t)} MiB")
    return program


def memcheck(t, name, *args, roles=1, before=(), **env):
    """Driver API: allocations of all kinds. The largest: 64 MiB."""
    need_gpus(t)
    size = ["--allocs=8", "--max=5M"] if t.sim else ["--allocs=12", "--max=64M"]
    return started(t, t.start(name, [*before, t.bin / "test/cr/memcheck", *size, *args], env={"CR_KERNELS": str(KERNELS), **env}), roles)


@contextlib.contextmanager
def without_files(*gpus):
    """Meanwhile nobody can open these GPUs' device files who has not done so before."""
    away = [(f"/dev/nvidia{g}", f"/dev/.nvidia{g}.away") for g in gpus]
    done = []
    try:
        for file, other in away:
            os.rename(file, other)
            done.append((file, other))
        yield
    finally:
        for file, other in done:
            os.rename(other, file)


def contained(t, name, *args):
    """memcheck as in a container that has GPU 0 alone. Without the right to, libcuda does not make the files that it misses."""
    if t.sim:
        return memcheck(t, name, *args, BENNU_SIM_FILES="0")
    need_gpus(t)
    with without_files(*range(1, GPUS)):
        return memcheck(t, name, *args, before=["setpriv", "--bounding-set", "-mknod"])


def torch(t, name, *args, roles=1, **env):
    need_gpus(t)
    gigabytes = 1 if t.args.quick else 4
    program = t.start(name, [sys.executable, TESTS / "multi.py", *args, "--gpus", str(GPUS), "--gb", str(gigabytes)], env=env)
    return started(t, program, roles, 120)


def kill_tree(program):
    """All of it, so that its pids are free: its children are ours then."""
    children = below(program.pid)
    program.kill()
    for pid in children:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


# ---- what is done to them ----

def suspend_resume(t, program, what, tier, gpus=range(GPUS)):
    """gpus: whose memory it has."""
    before = used(t)
    t.phases(f"{what}/suspend to {tier}", asked(t, "suspend", "--to", tier, program.pid))
    at, now = progress(program), used(t)
    t.say(f"GPU memory in use: {before} before, {now} while suspended (MiB)")
    if now and tier != "gpu" and any(now[gpu] >= before[gpu] for gpu in gpus):
        raise Failed(f"{program.name} is suspended, and its GPUs have {now} MiB in use, {before} before")
    if progress(program) != at:
        raise Failed(f"{program.name} goes on while it is suspended")
    t.phases(f"{what}/resume from {tier}", asked(t, "resume", program.pid))
    go_on(program)


def suspends(t, program, what):
    t.need_daemon()
    for tier in ("host", "gpu", "disk"):
        suspend_resume(t, program, what, tier)


def dumps(t, program, what):
    """A live dump that leaves it running, and is restored after it was killed; then one that kills it."""
    t.need_daemon()
    folder = t.dump(program, f"{what}/live", "--live", leave_running=True)
    go_on(program)
    kill_tree(program)
    t.restore_older(program, folder, f"{what}/live")
    go_on(program)
    t.remove_image(folder)
    folder = t.dump(program, what)
    t.restore(program, folder, what)
    go_on(program)
    t.remove_image(folder)


def cycle(t, program, what):
    suspends(t, program, what)
    dumps(t, program, what)
    kill_tree(program)
    return "every byte right after suspends to each tier, a live dump, a dump and their restores"


# ---- steps ----

def memory_on_all(t):
    return cycle(t, memcheck(t, "on-all", f"--gpus={GPUS}"), "multi/one process")


def process_on_each(t):
    return cycle(t, memcheck(t, "on-each", f"--children={GPUS - 1}", f"--spread={GPUS}", roles=GPUS), "multi/tree")


def numbered_otherwise(t):
    """The daemon that restores numbers the GPUs the other way round: each process comes back on the GPU that it was on."""
    t.start_daemon()
    for name, program in (("one process", memcheck(t, "turned-all", f"--gpus={GPUS}")),
                          ("tree", memcheck(t, "turned-each", f"--children={GPUS - 1}", f"--spread={GPUS}", roles=GPUS))):
        what = f"multi/turned/{name}"
        folder = t.dump(program, what)
        t.start_daemon(visible=",".join(map(str, reversed(range(GPUS)))))
        t.restore(program, folder, what)
        go_on(program)
        suspend_resume(t, program, what, "host")
        kill_tree(program)
        t.remove_image(folder)
        t.start_daemon()
    return "restored, suspended and resumed under turned numbers"


def other_gpu(t):
    """A program that is shown GPU 0 alone."""
    return brought(t, lambda size: memcheck(t, "other-gpu", size, CUDA_VISIBLE_DEVICES="0"))


def other_gpu_contained(t):
    """A program that has the device file of GPU 0 alone, as in a container."""
    return brought(t, lambda size: contained(t, "other-gpu-contained", size))


def brought(t, start):
    """It is restored by a daemon that sees GPU 1 alone; that is where its memory is from then on."""
    t.start_daemon()
    program = start("--min=32M" if not t.sim else "--min=1M")
    folder = t.dump(program, "multi/other GPU")
    t.start_daemon(visible="1")
    before = used(t)
    t.restore(program, folder, "multi/other GPU")
    go_on(program)
    t.say(f"GPU memory in use: {before} before the restore on GPU 1, {used(t)} after it (MiB)")

    if (now := used(t)) and not (now[1] > before[1] + 200 and now[0] < before[0] + 200):
        raise Failed(f"its memory is not on GPU 1: {now} MiB in use, {before} before it was restored there")
    t.remove_image(folder)
    t.start_daemon()
    there = used(t)  # with this daemon's contexts

    def stays(after):
        go_on(program)
        now = used(t)
        t.say(f"GPU memory in use after {after}: {now}, {there} before (MiB)")
        if now and any(abs(n - b) > 300 for n, b in zip(now, there)):
            raise Failed(f"after {after} {now} MiB are in use on the GPUs, {there} before")
    suspend_resume(t, program, "multi/other GPU, later", "host", [1])
    stays("a suspend and resume")
    folder = t.dump(program, "multi/other GPU, later")
    t.restore(program, folder, "multi/other GPU, later")
    stays("another dump and restore")
    kill_tree(program)
    return "restored on GPU 1, and there after a suspend and another dump"


def torch_both(t):
    return cycle(t, torch(t, "torch-both", "both"), "multi/PyTorch on both")


def torch_peer(t):
    """It copies from GPU to GPU, so each may reach into the other's memory."""
    return cycle(t, torch(t, "torch-peer", "both", "--peer"), "multi/PyTorch, peer access")


# No peer-to-peer memory and no multicast, which cannot be saved; nothing that this machine may or may not have beside its loopback.
NCCL = {"NCCL_P2P_DISABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_CUMEM_ENABLE": "0", "NCCL_CUMEM_HOST_ENABLE": "0", "NCCL_IB_DISABLE": "1",
        "NCCL_SOCKET_IFNAME": "lo", "NCCL_DEBUG": "WARN"}


def ranks(t, name, **env):
    meet = t.work / f"{name}.meet"
    meet.unlink(missing_ok=True)
    return torch(t, name, "ranks", "--meet", meet, roles=GPUS, **NCCL, **env)


def nccl_suspend(t):
    """Two ranks that wait for each other in every step: no CRIU."""
    program = ranks(t, "nccl-suspend", NCCL_SHM_DISABLE="1")
    suspends(t, program, "multi/NCCL")
    kill_tree(program)
    return "suspended to each tier, sums of both ranks right"


def nccl_sockets(t):
    program = ranks(t, "nccl-sockets", NCCL_SHM_DISABLE="1")
    dumps(t, program, "multi/NCCL over sockets")
    kill_tree(program)
    return "dumped, live and not, and restored, sums of both ranks right"


def nccl_shm(t):
    return cycle(t, ranks(t, "nccl-shm"), "multi/NCCL over shared memory")
