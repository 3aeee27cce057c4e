# SPDX-License-Identifier: MIT
"""Steps of bench/run: hashes, and checkpoints of programs that run on meanwhile."""

import concurrent.futures
import pathlib
import re
import shutil
import socket
import statistics
import sys
import tempfile
import time

import libhttp
from libbench import MIB, PROGRAMS, ROOT, Failed, Skipped, tail


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


def slower(of, these, before, after):
    """By how many % each of these windows' steps are slower than those of the windows before and after it, by `of` (a mean, a median)."""
    return [(of(w) / statistics.mean((of(b), of(a))) - 1) * 100 for w, b, a in zip(these, before, after)]


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
    """{mapped file, or what else it is: bytes that are in memory and its alone and were written}: about what CRIU has to write of a process."""
    found, name = {}, ""
    for line in pathlib.Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if header := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+\s*(.*)$", line):
            name = header[1] or "anonymous"
        elif line.startswith("Private_Dirty:"):
            found[name] = found.get(name, 0) + int(line.split()[1]) * 1024
    return found


def most_grown(old, new):
    """(bytes, which three grew most)"""
    grown = sorted(((new.get(n, 0) - old.get(n, 0), n) for n in new), reverse=True)
    return sum(new.values()) - sum(old.values()), ", ".join(f"{n} {b / 1e6:.1f} MB" for b, n in grown[:3] if b > 0)


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

    def beside(self, key, text, program, rounds, work, clear=lambda: None):
        """Its steps while work() does something, beside those right before and right after: a drift takes itself out. clear() is no part of
        either. What work() returned."""
        s = self.s

        def undisturbed():
            began = time.monotonic()
            time.sleep(s["window"])
            return steps_in(program, began, time.monotonic())
        without, with_, answers = [undisturbed()], [], []
        for _ in range(rounds):
            began = time.monotonic()
            answers.append(work())
            with_.append(steps_in(program, began, time.monotonic()))
            clear()
            without.append(undisturbed())
        self.add(f"{key}.without", f"{text}: a step, before and after", [statistics.mean(w) for w in without])
        self.add(f"{key}.with", f"{text}: a step", [statistics.mean(w) for w in with_])
        for what, of in (("mean", statistics.mean), ("median", statistics.median)):
            self.add(f"{key}.{what}", f"{text}: slower by the {what} step", slower(of, with_, without, without[1:]), "%",
                     note=f"{what}s of all steps; before and after it")
            if rounds > 1:
                self.add(f"{key}.{what}_none", f"{text}: slower by the {what} step with nothing done, which is the noise",
                         slower(of, without[1:], without, without[2:]), "%", note="each undisturbed window against its two neighbours")
        return answers

    def pre_dumping(self, program, *options):
        """For beside(): what copies (bytes / time, GB/s), and what drops that again."""
        def copy():
            began = time.monotonic()
            a = self.t.timed(["pre-dump", "--json", *options, program.pid], 200)
            return a.data["sent_bytes"] / 1e9 / (time.monotonic() - began)
        return copy, lambda: self.t.timed(["pre-dump", "--json", "--drop", program.pid], 60)

    def slowed(self, key, text, program, rounds):
        """Its steps while bennu pre-dump copies."""
        rates = self.beside(f"copying.{key}", f"{text}, while bennu pre-dump copies", program, rounds, *self.pre_dumping(program))
        program.check()
        self.add(f"copying.{key}.rate", f"{text}: bytes that pre-dump copies meanwhile / its time", rates, "GB/s", "higher",
                 note="into a tmpfs")

    def written(self, threads):
        """That many threads write into a tmpfs for a window; bytes / time, GB/s."""
        data, end, written = bytearray(16 * MIB), time.monotonic() + self.s["window"], [0] * threads
        room = self.s["mid"] // threads

        def write(i):
            with tempfile.TemporaryFile(dir=self.t.tmpfs(), buffering=0) as f:
                while time.monotonic() < end:
                    written[i] += f.write(data)
                    if f.tell() >= room:
                        f.seek(0)
                        f.truncate()
        began = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(write, range(threads)))
        return sum(written) / 1e9 / (time.monotonic() - began)

    def moved(self, other):
        """Another program's memory goes to the host and back for a window, without a CPU that copies; bytes / time, GB/s."""
        began, bytes_ = time.monotonic(), 0
        while time.monotonic() < began + self.s["window"]:
            for a in (self.t.suspend(other, "--keep-context"), self.t.resume(other)):
                bytes_ += a.copy()[1]
        return bytes_ / 1e9 / (time.monotonic() - began)

    def memory_loop(self, size):
        """What to run for a loop that is bound by the GPU's memory, with so many bytes on the GPU."""
        return [self.t.bin / "bench/bench-step", "--kernels", ROOT / "sim/kernels.ptx", "--cold", size - self.s["hot"], "--hot", self.s["hot"]]

    def disturb(self):
        """What makes a program slower that decodes, or is bound by the GPU's memory: copying as it is, copying slowly, the CPU's part of it alone,
        the link's part of it alone."""
        t, s = self.t, self.s
        self.need_live()
        t.start_daemon("--spool", t.tmpfs() / "spool")
        other = t.hold(s["mid"], s["block"])
        t.suspend(other)  # pins the pool's memory
        t.resume(other)
        programs = [("memory", "memory-bound loop", self.memory_loop(s["mid"]))]
        if not t.simulated:
            self.need_torch()
            programs.append(("decode", "PyTorch decoding", [sys.executable, PROGRAMS / "decode.py", "--gb", s["torch_gb"]]))
        for key, text, argv in programs:
            program = t.start(f"disturbed-{key}", argv)
            program.wait_for(r"^step 30 ", "its 30th step", 200)
            for what, doing, work in (("copied", "while bennu pre-dump copies", self.pre_dumping(program)),
                                      ("slowly", "while bennu pre-dump copies 2 GB/s at most", self.pre_dumping(program, "--bandwidth", "2G")),
                                      ("written", "while 4 threads write into a tmpfs", [lambda: self.written(4)]),
                                      ("link", "while another's memory goes to the host and back", [lambda: self.moved(other)])):
                rates = self.beside(f"disturb.{key}.{what}", f"{text}, {doing}", program, min(s["rounds"], 3), *work)
                self.add(f"disturb.{key}.{what}.rate", f"{text}, {doing}: bytes / time", rates, "GB/s", "higher")
            program.kill()

    def copying(self):
        """What a program loses while its memory is copied, and how long a live dump stops PyTorch."""
        t, s = self.t, self.s
        self.need_live()
        t.start_daemon("--spool", t.tmpfs() / "spool")
        program = t.start("memory-loop", self.memory_loop(s["load"]))
        program.wait_for(r"^step 3 ", "its third step", 120)
        self.slowed("memory", f"memory-bound loop of {s['hot_text']}, {s['load_text']} on the GPU", program, min(s["rounds"], 3))
        program.kill()
        self.need_torch()
        for key, argv, what in (("torch", ["--gb", s["torch_live"]], f"PyTorch decoding, {s['torch_live'] + 4} GB on the GPU"),
                                ("empty", ["--shape", "tiny"], "PyTorch decoding with a tiny model")):
            program = t.start(f"decode-{key}", [sys.executable, PROGRAMS / "decode.py", *argv])
            program.wait_for(r"^step 30 ", "its 30th token", 200)
            gaps, costs, last, grew = [], {}, None, {}
            for _ in range(s["rounds"]):
                folder = self.live_folder()
                maps = pathlib.Path(f"/proc/{program.pid}/maps").read_text().count("\n")
                private, began = private_of(program.pid), time.monotonic()
                t.timed(["dump", "--json", "--live", "--leave-running", program.pid, folder], 200)
                gaps.append(longest_gap(program, began, time.monotonic()))
                for name, value in {**criu_stats(folder), "mappings": maps, "private_bytes": sum(private.values())}.items():
                    costs.setdefault(name, []).append(value)
                for when, old, new in (("since the last dump", last, private), ("by the dump", private, last := private_of(program.pid))):
                    if old is not None:
                        grew.setdefault(when, []).append(most_grown(old, new))
                shutil.rmtree(folder)
            self.add(f"pause.{key}", f"dump --live --leave-running, {what}: longest token", gaps, note="into a tmpfs")
            for name, values in costs.items():
                self.add(f"pause.{key}.{name}", f"dump --live --leave-running, {what}: {name.replace('_', ' ')}", values,
                         "s" if name.endswith("time") else "bytes" if name.endswith("bytes") else "", note="" if name in ("mappings", "private_bytes") else "CRIU's")
            for when, values in grew.items():
                self.add(f"pause.{key}.grew {when}", f"dump --live --leave-running, {what}: private memory more {when}", [b for b, _ in values], "bytes",
                         note=f"of the last: {values[-1][1]}")
            if key == "torch":
                self.slowed("decode", what, program, s["rounds"])
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
