# SPDX-License-Identifier: MIT
"""Steps of bench/run: hashes, and checkpoints of programs that run on meanwhile."""

import concurrent.futures
import os
import pathlib
import re
import shutil
import signal
import socket
import statistics
import sys
import time

import libhttp
from libbench import MIB, PROGRAMS, ROOT, Failed, Skipped, tail
from librows import median_range


def steps_of(program):
    """When its steps ended (CLOCK_MONOTONIC, s)."""
    return [float(at) for at in re.findall(r"^step \d+ ([\d.]+)$", program.log.read_text(errors="replace"), re.M)]


def steps_in(program, began, ended):
    """The times of its steps from the last that ended before `began` to the first that ended after `ended`."""
    end = time.monotonic() + 120
    while not (ends := steps_of(program)) or ends[-1] < ended:
        if program.poll() is not None or time.monotonic() > end:
            raise Failed(f"{program.name} does not go on\n{tail(program.log)}")
        time.sleep(0.01)
    first = max((i for i, at in enumerate(ends) if at <= began), default=0)
    last = next(i for i, at in enumerate(ends) if at >= ended)
    return [b - a for a, b in zip(ends[first:last], ends[first + 1:last + 1])]


def steps_within(ends, began, ended):
    """The times of those steps that began and ended between these two times."""
    return [b - a for a, b in zip(ends, ends[1:]) if a >= began and b <= ended]


def slower_by_turns(ends, windows):
    """Of windows [(began, ended)] by turns, the first without and the second with something: by how many % the mean step in each one with it
    is slower than in the two beside it."""
    means = [statistics.mean(steps) if (steps := steps_within(ends, *w)) else None for w in windows]
    return [(m / statistics.mean((a, b)) - 1) * 100 for a, m, b in zip(means[::2], means[1::2], means[2::2]) if a and m and b]


def longest_gap(program, began, ended):
    """The longest time between two ends of its steps around what happened from `began` to `ended`."""
    steps_in(program, began, ended)
    ends = steps_of(program)
    around = [(a, b) for a, b in zip(ends, ends[1:]) if b >= began and a <= ended]
    return max(b - a for a, b in around)


def varint(data, at):
    """(value, where the next begins)"""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 128:
            return value, at


def criu_stats(folder):
    """What CRIU says that a dump took: its file stats-dump (CRIU's images/stats.proto)."""
    names = {1: "freezing_time", 2: "frozen_time", 3: "memdump_time", 4: "memwrite_time", 5: "pages_scanned", 7: "pages_written"}
    data = (pathlib.Path(folder) / "stats-dump").read_bytes()[12:]  # two magic numbers and a length
    tag, at = varint(data, 0)
    if tag != 1 << 3 | 2:
        raise Failed(f"{folder}/stats-dump is not what CRIU 4 writes")
    length, at = varint(data, at)
    end, found = at + length, {}
    while at < end:
        tag, at = varint(data, at)
        value, at = varint(data, at)
        if tag >> 3 in names:
            found[names[tag >> 3]] = value / 1e6 if names[tag >> 3].endswith("time") else value
    return found


def private_of(pid):
    """Bytes that are in its memory, its alone, and were written: about what CRIU has to write of a process."""
    return 1024 * sum(map(int, re.findall(r"^Private_Dirty: +(\d+) kB", pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)))


def own_bytes(folder):
    """Bytes of GPU memory that a checkpoint shares with no other."""
    return sum(f.stat().st_size for f in pathlib.Path(folder).glob("bennu-pack-*") if f.stat().st_nlink == 1)


class LiveSteps:
    """For libsteps.Steps."""

    def need_live(self):
        if "--live" not in self.t.command([self.t.bennu, "dump", "--help"], env=self.t.own_env(), ok=False):
            raise Skipped("this bennu has no dump --live")

    def live_folder(self):
        self.t.count += 1
        return pathlib.Path(self.t.tmpfs()) / f"image-live-{self.t.count}"

    def hash(self):
        """The kernel that hashes, against its twin on the CPU."""
        t, s = self.t, self.s
        argv = ["--chunks", s["hash_chunks"], "--bytes", s["hash"], "--rounds", 2 * s["rounds"] - 1]
        out = t.tool("bench-hash-gpu", *argv, *(["--driver", t.driver, "--keys", 2] if t.simulated else []), timeout=110)
        compared = re.search(r"^compared (\d+) values: (\d+) wrong$", out, re.M)
        gpu, core = (re.search(rf"^{which} ([\d.]+) GB/s$", out, re.M) for which in ("gpu", "core"))
        if not compared or compared[2] != "0" or not gpu or not core:
            raise Failed(f"bench-hash-gpu: {out[-800:]}")
        note = "random content; median of its rounds"
        self.add("hash.gpu", f"hash kernel, {s['hash_text']}: launch to values", float(gpu[1]) / 1000, "TB/s", "higher", note)
        self.add("hash.core", "the hash on one core, 512 MiB at most", float(core[1]), "GB/s", "higher", note)
        self.add("hash.wrong", f"hash kernel: values of {compared[1]} that are not the CPU's", int(compared[2]), "values")

    def live(self):
        """A program that writes all the time: how long a live dump stops it, what its second checkpoint costs, what verification costs."""
        t, s = self.t, self.s
        self.need_live()
        cut = t.bin / "test/cr/cut"
        if not cut.exists():
            raise Skipped(f"there is no {cut}")
        t.start_daemon()
        chunks = s["load"] // (2 * MIB)
        hot = max(4, chunks // 256)
        gpu, whole, plain, new = [], [], [], []
        # A chunk of 2 MiB every 3 ms and more: less than 0.7 GB a second.
        program = t.start("cut", ["/usr/bin/env", f"CR_KERNELS={ROOT / 'sim/kernels.ptx'}", cut, "--plain", "--gaps",
                                  f"--pause={s['pause']}", f"--hot={hot}", f"--cold={chunks}"], commands=False)
        program.wait_for("round 2$", "its second round", 120)

        def dump(*options):
            """Answer, and the longest call of the driver meanwhile: that is how long the program was stopped."""
            folder, before = self.live_folder(), program.log.stat().st_size
            a = t.timed(["dump", "--json", "--leave-running", *options, program.pid, folder], 200)
            end = program.log.stat().st_size
            for _ in range(2):
                program.wait_for("^0 .* round", "it goes on", 120, end)
                end = program.log.stat().st_size
            gap = max(float(g) for g in re.findall(r"^gap ([\d.]+)$", program.log.read_text()[before:], re.M))
            return a, gap, folder

        for _ in range(min(s["rounds"], 3)):
            a, gap, folder = dump()
            plain.append(gap)
            b, gap, second = dump(f"--parent={folder}")
            new.append(b.phases["copy-out"][1] / b.data["gpu_bytes"] * 100)
            shutil.rmtree(second)
            shutil.rmtree(folder)
            a, gap, folder = dump("--live")
            gpu.append(a.seconds("gpu-pause"))
            whole.append(gap)
            shutil.rmtree(folder)
        size = s["load_text"]
        self.add("live.gpu", f"live dump of {size}: gates closed until nothing is copied from its memory", gpu)
        self.add("live.pause", f"live dump of {size}, --leave-running: longest call of the driver in the program", whole)
        self.add("live.plain", f"dump of {size}, --leave-running: longest call of the driver in the program", plain)
        self.add("live.new", f"second checkpoint of {size}, of which 1/256 is written: bytes sent", new, "%")
        verify, share = [], []
        for _ in range(min(s["rounds"], 3)):
            answer, folder, _ = t.dump(program, t.tmpfs())
            back = t.restore(program, folder)
            verify.append(back.seconds("verify"))
            share.append(back.seconds("verify") / back.wall * 100)
            program.wait_for("^0 .* round", "it goes on", 120, program.log_size)
            shutil.rmtree(folder)
        self.add("live.verify", f"restore of {size}: hashing on the GPU, of the whole command", share, "%")
        self.add("live.verify_s", f"restore of {size}: hashing on the GPU", verify)
        program.kill()

    def rewrite(self):
        """A loop that rewrites everything in each step, as training does."""
        t, s = self.t, self.s
        self.need_live()
        t.start_daemon()
        program = t.start("rewrite", [t.bin / "bench/bench-step", "--kernels", ROOT / "sim/kernels.ptx", "--hot", s["rewrite"], "--period",
                                      s["period"]])
        program.wait_for(r"^step 3 ", "its third step", 120)
        gpu, gates, whole, aside = [], [], [], []
        for _ in range(s["rounds"]):
            folder, began = self.live_folder(), time.monotonic()
            a = t.timed(["dump", "--json", "--live", "--leave-running", program.pid, folder], 200)
            gates.append(a.seconds("pause"))
            aside.append(a.phases["set-aside"][1] / a.data["gpu_bytes"] * 100)
            whole.append(longest_gap(program, began, time.monotonic()))
            gpu.append(a.seconds("gpu-pause"))
            program.check()
            shutil.rmtree(folder)
        what = f"live dump of {s['rewrite_text']}, all rewritten every {s['period']} ms"
        self.add("rewrite.gpu", f"{what}: gates closed until nothing is copied from its memory", gpu)
        self.add("rewrite.aside", f"{what}: of its memory, set aside on the GPU", aside, "%", "higher")
        self.add("rewrite.gates", f"{what}, --leave-running: gates closed until they are open again", gates)
        self.add("rewrite.pause", f"{what}, --leave-running: longest step of the program", whole)

    def by_turns(self, program, stop, work):
        """[(began, ended)]: windows of the time that work() takes, in which the process `stop` is stopped and goes on by turns; the first and the
        last are windows in which it is stopped. None: nobody is. A drift of the program, or of the machine, takes itself out in pairs of short
        windows."""
        windows, send = [], (lambda number: os.kill(stop, number)) if stop else (lambda number: None)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            job = pool.submit(work)
            try:
                concurrent.futures.wait([job], self.s["lead"])
                while not job.done():
                    send(signal.SIGSTOP)
                    began = time.monotonic()
                    time.sleep(self.s["slice"])
                    windows.append((began, time.monotonic()))
                    send(signal.SIGCONT)
                    began = time.monotonic()
                    concurrent.futures.wait([job], self.s["slice"])
                    windows.append((began, time.monotonic()))
            finally:
                send(signal.SIGCONT)
            job.result()
        if len(windows) < 4:
            raise Failed(f"what a program is to be slowed by was done in {self.s['lead']} s")
        return windows[:-1]  # in the last the work ended

    def slowed(self, key, text, program, rounds):
        """By how much its steps are slower while bennu pre-dump copies; and while nobody does, which is the noise."""
        def copy():
            """GB/s of the whole command."""
            began = time.monotonic()
            a = self.t.timed(["pre-dump", "--json", program.pid], 200)
            return a.data["sent_bytes"] / 1e9 / (time.monotonic() - began)

        def drop():
            self.t.timed(["pre-dump", "--json", "--drop", program.pid], 60)

        text, began, windows = f"{text}, while bennu pre-dump copies", time.monotonic(), []
        rate, whole = copy(), steps_in(program, began, time.monotonic())
        drop()
        for _ in range(rounds):
            windows.append(self.by_turns(program, self.t.daemon.pid, copy))
            drop()
        quiet = self.by_turns(program, None, lambda: time.sleep(windows[-1][-1][1] - windows[-1][0][0]))
        for figure, what, found in (("slower", "slower by", windows), ("noise", "slower by, with nobody copying", [quiet])):
            steps_in(program, found[0][0][0], found[-1][-1][1])
            ends = steps_of(program)
            values = [p for w in found for p in slower_by_turns(ends, w)]
            if not values:
                raise Failed(f"{program.name} took no whole step in windows of {self.s['slice']} s")
            low, high = median_range(values)
            self.add(f"{key}.{figure}", f"{text}: {what}", values, "%", note=f"windows of {self.s['slice']} s, each against the two beside it; their "
                     f"median lies within {low:.1f} and {high:.1f}, their mean is {statistics.mean(values):.1f}")
        usual = [s for w in quiet for s in steps_within(ends, *w)]
        self.add(f"{key}.whole", f"{text}: slower by, from the command's start to its end", (statistics.mean(whole) / statistics.mean(usual) - 1) * 100, "%",
                 note="one pre-dump, its two pauses included, against all of the time with nobody copying")
        self.add(f"{key}.rate", f"{text}: bytes / time", rate, "GB/s", "higher", note="into a tmpfs")

    def memory_loop(self, size):
        """What to run for a loop that is bound by the GPU's memory, with so many bytes on the GPU."""
        return [self.t.bin / "bench/bench-step", "--kernels", ROOT / "sim/kernels.ptx", "--cold", size - self.s["hot"], "--hot", self.s["hot"]]

    def copying(self):
        """What a program loses while its memory is copied, and how long a live dump stops PyTorch."""
        t, s = self.t, self.s
        self.need_live()
        t.start_daemon("--spool", t.tmpfs() / "spool")
        program = t.start("memory-loop", self.memory_loop(s["load"]))
        program.wait_for(r"^step 3 ", "its third step", 120)
        self.slowed("copying.memory", f"memory-bound loop of {s['hot_text']}, {s['load_text']} on the GPU", program, 2)
        program.check()
        program.kill()
        self.need_torch()
        for key, argv, what in (("torch", ["--gb", s["torch_live"]], f"PyTorch decoding, {s['torch_live'] + 4} GB on the GPU"),
                                ("empty", ["--shape", "tiny"], "PyTorch decoding with a tiny model")):
            program = t.start(f"decode-{key}", [sys.executable, PROGRAMS / "decode.py", *argv])
            program.wait_for(r"^step 30 ", "its 30th token", 200)
            gaps, costs = [], {}
            for _ in range(s["rounds"]):
                folder = self.live_folder()
                maps, private, began = pathlib.Path(f"/proc/{program.pid}/maps").read_text().count("\n"), private_of(program.pid), time.monotonic()
                t.timed(["dump", "--json", "--live", "--leave-running", program.pid, folder], 200)
                gaps.append(longest_gap(program, began, time.monotonic()))
                for name, value in {**criu_stats(folder), "mappings": maps, "private_bytes": private}.items():
                    costs.setdefault(name, []).append(value)
                shutil.rmtree(folder)
            self.add(f"pause.{key}", f"dump --live --leave-running, {what}: longest token", gaps, note="into a tmpfs")
            for name, values in costs.items():
                self.add(f"pause.{key}.{name}", f"dump --live --leave-running, {what}: {name.replace('_', ' ')}", values,
                         "s" if name.endswith("time") else "bytes" if name.endswith("bytes") else "", note="" if name in ("mappings", "private_bytes") else "CRIU's")
            if key == "torch":
                for loop, text in (("decode", what), ("eager", f"{what}, without a CUDA graph")):
                    self.slowed(f"copying.{loop}", text, program, 2)
                    program.tell("eager")
                program.check()
            program.kill()

    def replicas(self):
        """What the second checkpoint of an inference server adds to the first, and the first of its replica."""
        t = self.t
        self.need_torch()
        t.start_daemon()

        def server():
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            program = t.start("llm-server", [sys.executable, ROOT / "examples/llm-server/server.py", "--port", str(port)], commands=False)
            libhttp.generate(port, gone=lambda: program.poll() is not None)
            return program, port

        def dump(program, *options):
            folder = self.live_folder()
            a = t.timed(["dump", "--json", "--leave-running", *options, program.pid, folder], 200)
            return folder, own_bytes(folder) / a.data["gpu_bytes"] * 100

        first, port = server()
        image, _ = dump(first)
        libhttp.generate(port, count=64)
        folder, new = dump(first, f"--parent={image}")
        self.add("replicas.second", "llm-server: GPU memory that its second checkpoint stores anew, 64 tokens later", new, "%")
        shutil.rmtree(folder)
        other, _ = server()
        _, new = dump(other, f"--parent={image}")
        self.add("replicas.replica", "llm-server: GPU memory that a replica's checkpoint stores anew", new, "%")
