#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Dumps and restores a process on the simulated driver with real CRIU: test_criu.py COUNTER CONTROL

The driver's calls are made by hand, with neither agent nor plugin: what is tested is the simulation.
"""
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

COUNTER, CONTROL = sys.argv[1:3]
CRIU = os.path.join(os.environ.get("BENNU_BUILD", "build"), "criu/bin/criu")
ROUNDS = 3


def control(verb, pid, expected=0):
    done = subprocess.run([CONTROL, verb, str(pid)], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == expected, f"{verb}: {done.returncode}, expected {expected}"
    return done.stdout.strip()


def criu(folder, verb, *options):
    os.makedirs(folder, exist_ok=True)
    done = subprocess.run([CRIU, verb, "-D", folder, "-o", "log", "-v4", "--shell-job", *options], timeout=120)
    if done.returncode:
        with open(os.path.join(folder, "log"), encoding="utf-8", errors="replace") as log:
            return done.returncode, log.read()
    return 0, ""


def wait_for(what, done, pid):
    """Waits for a program that cannot signal across a dump; a dead one ends the wait."""
    for _ in range(6000):
        if done():
            return
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            sys.exit(f"{what}: the program is gone")
        time.sleep(0.01)
    sys.exit(f"{what}: no answer in a minute")


def ask(folder, number, pid):
    with open(folder + "/ask.new", "w", encoding="utf-8") as f:
        f.write(f"{number}\n")
    os.rename(folder + "/ask.new", folder + "/ask")
    answer = []

    def answered():
        try:
            with open(folder + "/answer", encoding="utf-8") as f:
                words = f.read().split()
        except FileNotFoundError:
            return False
        answer[:] = map(int, words)
        return answer[0] == number

    wait_for(f"question {number}", answered, pid)
    return answer[1]


def run(folder):
    log = open(folder + "/output", "wb")
    child = subprocess.Popen([COUNTER, folder], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                             start_new_session=True)
    pid = child.pid
    count = ask(folder, 1, pid)

    # Like a process that holds /dev/nvidiactl, it cannot be dumped while it runs on the device.
    code, text = criu(folder + "/refused", "dump", "-t", str(pid))
    assert code != 0, "a process on the device was dumped"
    assert "Can't dump file" in text or "anon_inode" in text, text[-2000:]
    assert ask(folder, 2, pid) >= count

    for i in range(ROUNDS):
        images = f"{folder}/images{i}"
        control("lock", pid)
        control("checkpoint", pid)
        code, text = criu(images, "dump", "-t", str(pid))
        assert code == 0, text[-4000:]
        if i == 0:
            child.wait()
        else:
            os.waitpid(pid, 0)
        code, text = criu(images, "restore", "--restore-detached", "--pidfile", "pid")
        assert code == 0, text[-4000:]
        assert control("state", pid) == "2"
        control("restore", pid)
        control("unlock", pid)
        now = ask(folder, 3 + i, pid)
        assert now > count, f"counted {count} before and {now} after"
        count = now
        shutil.rmtree(images)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def main():
    if os.geteuid() != 0 or not os.access(CRIU, os.X_OK):
        print("needs root and", CRIU)
        sys.exit(77)
    # What CRIU restores is left to the nearest subreaper, which must bury it before its number is free again.
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    folder = tempfile.mkdtemp(prefix="sim-criu.")
    os.environ["BENNU_SIM_MACHINE"] = f"criu{os.getpid()}"
    try:
        run(folder)
    finally:
        try:
            with open(folder + "/output", encoding="utf-8") as f:
                sys.stderr.write(f.read())
            os.unlink("/dev/shm/cuda-sim." + os.environ["BENNU_SIM_MACHINE"])
        except FileNotFoundError:
            pass
        shutil.rmtree(folder)


main()
