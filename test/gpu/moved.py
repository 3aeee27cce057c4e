#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What a process can do with GPU memory after the driver's restore has brought it to another GPU. Needs two GPUs, root, and no Bennu.

usage: moved.py                 (prints what was asked, and the driver's answers: CUresult, 0 is success)

A program with a context on GPU 0 is locked, checkpointed, restored with pairs of GPUs, and unlocked, by the driver's own calls. It is then asked to
create memory, to import its own, and to import that of helpers on the new and on the old GPU; and the helpers to import its memory. It is shown GPU 0
alone (CUDA_VISIBLE_DEVICES), or both, or it can open no other's device file until it is checkpointed, as in a container.
"""
import ctypes
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile

MIB2 = 2 << 20
POSIX_FD = 1
cu = ctypes.CDLL("libcuda.so.1")
libc = ctypes.CDLL(None, use_errno=True)
size = ctypes.c_size_t(MIB2)


def uuids():
    n = ctypes.c_int()
    assert cu.cuInit(0) == 0 and cu.cuDeviceGetCount(ctypes.byref(n)) == 0
    found = []
    for i in range(n.value):
        raw = ctypes.create_string_buffer(16)
        assert cu.cuDeviceGetUuid_v2(raw, i) == 0
        found.append(raw.raw)
    return found


# ---- a program, or a helper: does what it reads, a line each, and answers a line ----

class Program:
    def __init__(self, device):
        self.device, self.held = device, []
        self.at_first = uuids()
        context = ctypes.c_void_p()
        assert cu.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0 and cu.cuCtxSetCurrent(context) == 0

    def map(self, handle):
        """(first error, what it reads there, the address)"""
        va, out = ctypes.c_uint64(), ctypes.c_uint32()
        access = ctypes.create_string_buffer(struct.pack("<iii", 1, self.device, 3), 12)
        calls = (lambda: cu.cuMemAddressReserve(ctypes.byref(va), size, ctypes.c_size_t(0), ctypes.c_uint64(0), ctypes.c_uint64(0)),
                 lambda: cu.cuMemMap(va, size, ctypes.c_size_t(0), handle, ctypes.c_uint64(0)),
                 lambda: cu.cuMemSetAccess(va, size, access, ctypes.c_size_t(1)),
                 lambda: cu.cuMemcpyDtoH_v2(ctypes.byref(out), va, ctypes.c_size_t(4)))
        for call in calls:
            if (r := call()) != 0:
                return r, None, va
        return 0, out.value, va

    def create(self, value):
        prop = ctypes.create_string_buffer(struct.pack("<iiii", 1, POSIX_FD, 1, self.device), 64)
        handle, fd = ctypes.c_uint64(), ctypes.c_int(-1)
        created = cu.cuMemCreate(ctypes.byref(handle), size, prop, ctypes.c_uint64(0))
        exported = cu.cuMemExportToShareableHandle(ctypes.byref(fd), handle, POSIX_FD, ctypes.c_uint64(0)) if created == 0 else None
        mapped, _, va = self.map(handle) if created == 0 else (None, None, None)
        if mapped == 0:
            cu.cuMemsetD32_v2(va, ctypes.c_uint32(int(value)), ctypes.c_size_t(MIB2 // 4))
            cu.cuCtxSynchronize()
            self.held.append((handle, va, fd.value))
        return f"{fd.value} create {created}, export {exported}, map {mapped}"

    def take(self, pid, fd):
        pidfd = libc.syscall(434, int(pid), 0)
        mine = libc.syscall(438, pidfd, int(fd), 0)
        os.close(pidfd)
        handle = ctypes.c_uint64()
        r = cu.cuMemImportFromShareableHandle(ctypes.byref(handle), ctypes.c_void_p(mine), POSIX_FD)
        if r != 0:
            os.close(mine)
            return f"import {r}"
        mapped, value, va = self.map(handle)
        if mapped == 0:
            self.held.append((handle, va, mine))
        return f"import {r}, map {mapped}, reads {value}"

    def free(self):
        for handle, va, fd in self.held:
            cu.cuMemUnmap(va, size)
            cu.cuMemRelease(handle)
            cu.cuMemAddressFree(va, size)
            os.close(fd)
        self.held = []
        return "freed"

    def uuid(self):
        now = uuids()
        return "its GPUs have " + ("the same UUIDs" if now == self.at_first else "other UUIDs") + f" as at cuInit: {[u[:2].hex() for u in now]}"

    def serve(self):
        print("ready", flush=True)
        for line in sys.stdin:
            what, *args = line.split()
            print(getattr(self, what)(*args), flush=True)


# ---- the other side ----

class Child:
    def __init__(self, name, device=0, visible=None, dev=None):
        env = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", **({"CUDA_VISIBLE_DEVICES": visible} if visible else {})}
        argv = [sys.executable, os.path.abspath(__file__), "program", str(device)]
        if dev:
            # libcuda would make the device files that it misses.
            argv = ["unshare", "-m", "sh", "-c", 'mount --bind "$0" /dev && exec setpriv --bounding-set -mknod "$@"', str(dev), *argv]
        self.name = name
        self.popen = subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.popen.pid
        assert self.popen.stdout.readline().strip() == "ready", name

    def ask(self, *words):
        self.popen.stdin.write(" ".join(map(str, words)) + "\n")
        self.popen.stdin.flush()
        return self.popen.stdout.readline().strip()

    def told(self, what, *words):
        answer = self.ask(*words)
        print(f"  {self.name} {what}: {answer}", flush=True)
        return answer

    def end(self):
        self.popen.kill()
        self.popen.wait()


def args():
    return ctypes.create_string_buffer(64)


def restore(pid, gpus, pairs):
    raw = b"".join(gpus[a] + gpus[b] for a, b in pairs)
    array, options = ctypes.create_string_buffer(raw, len(raw)), args()
    options[0:12] = struct.pack("<QI", ctypes.addressof(array), len(pairs))
    return cu.cuCheckpointProcessRestore(pid, options)


def move(program, gpus, lists, between=lambda: None):
    """Try these lists of pairs, one after another; whether one was taken."""
    print(f"  lock {cu.cuCheckpointProcessLock(program.pid, args())}, checkpoint {cu.cuCheckpointProcessCheckpoint(program.pid, args())}")
    between()
    for pairs in lists:
        r = restore(program.pid, gpus, pairs)
        print(f"  restore with {', '.join(f'{a} to {b}' for a, b in pairs)}: {r}", flush=True)
        if r == 0:
            break
    print(f"  unlock {cu.cuCheckpointProcessUnlock(program.pid, args())}")
    return r == 0


ALL, USED, STAY, SELF = [(0, 1), (1, 0)], [(0, 1)], [(0, 1), (1, 1)], [(0, 0)]


def memory_after(gpus, visible):
    print(f"A program that is shown {'GPU 0 alone' if visible else 'both GPUs'} is moved from 0 to 1:")
    program = Child("program", visible=visible)
    program.ask("create", 1)
    program.ask("free")
    if move(program, gpus, [ALL]):
        program.told("says", "uuid")
        fd = program.told("creates", "create", 2).split()[0]
        program.told("imports its own memory", "take", program.pid, fd)
        for where, device, shown in (("GPU 1, shown it alone", 0, "1"), ("GPU 1, shown both", 1, None), ("GPU 0, shown both", 0, None)):
            helper = Child(f"helper on {where},", device, shown)
            helper.told("imports the program's memory", "take", program.pid, fd)
            theirs = helper.ask("create", 3).split()[0]
            program.told(f"imports memory of a helper on {where}", "take", helper.pid, theirs)
            helper.end()
    program.end()


def lists_of_pairs(gpus, lists):
    print("A program that is shown GPU 0 alone; which lists are taken:")
    program = Child("program", visible="0")
    move(program, gpus, lists)
    program.end()


def in_a_container(gpus, lists, folder):
    """Only the device file of GPU 0 is there until the checkpoint, and that of GPU 1 for the restore."""
    print("A program that has the device file of GPU 0 alone:")
    dev = pathlib.Path(tempfile.mkdtemp(dir=folder))
    (dev / "shm").mkdir()
    files = ["null", "zero", "urandom", "random", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia0"]
    subprocess.run(["cp", "-a", *(f"/dev/{f}" for f in files), dev], check=True)
    program = Child("program", dev=dev)
    program.ask("create", 1)
    program.ask("free")
    if move(program, gpus, lists, lambda: subprocess.run(["cp", "-a", "/dev/nvidia1", dev], check=True)):
        program.told("says", "uuid")
        fd = program.told("creates", "create", 2).split()[0]
        program.told("imports its own memory", "take", program.pid, fd)
    program.end()


def main():
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if sys.argv[1:2] == ["program"]:
        return Program(int(sys.argv[2])).serve()
    gpus = uuids()
    if len(gpus) < 2:
        sys.exit(f"this machine has {len(gpus)} GPU")
    print(f"GPUs: {[g[:2].hex() for g in gpus]}")
    folder = tempfile.mkdtemp()
    try:
        for visible in ("0", None):
            memory_after(gpus, visible)
        lists_of_pairs(gpus, [USED, STAY, ALL])
        for lists in ([ALL, USED], [USED, ALL], [SELF], [STAY, USED]):
            in_a_container(gpus, lists, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
