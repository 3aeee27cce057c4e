# SPDX-License-Identifier: MIT
"""What bench/run measures. Each step adds figures; no step relies on another, so that any of them can be run alone. A ratio is made only if
all of its figures come from one run."""

import os
import pathlib
import re
import shutil
import socket
import statistics
import sys
import time

import libhttp
import libsteps_live
import libsteps_multi
from libbench import GIB, MIB, PROGRAMS, ROOT, Failed, Skipped, cached_share, drop_from_cache, size_text, tail
from librows import LOOPS, median_range

# For the driver's path with CRIU, as one has it without Bennu.
CRIU_ALONE = ["--criu-memory"]


def sizes_for(simulated, quick):
    if simulated:
        n = 1 if quick else 4
        s = {"big": 64 * n * MIB, "block": 16 * MIB, "mid": 32 * n * MIB, "small": 2 * MIB, "load": 64 * n * MIB, "disk": 64 * n * MIB,
             "disk_test": 64 * n * MIB, "torch_gb": 0.1, "copy": 32 * n * MIB, "rest_s": 1 if quick else 3, "rounds": 2 if quick else 5,
             "slow": 1, "loop_rounds": (4, 4) if quick else (6, 12), "loop_s": 1, "loop_pairs": {"c-": 2, "": 1}, "scale": 256 if quick else 64, "hash": 16 * n * MIB, "hash_chunks": 12 * n,
             "rewrite": 8 * n * MIB, "period": 20, "hot": 4 * n * MIB, "lead": 0, "slice": 0.01, "pause": 1, "torch_live": 1,
             "multi": 32 * n * MIB}
    else:
        s = {"big": 64 * GIB, "block": GIB, "mid": 16 * GIB, "small": 2 * MIB, "load": 40 * GIB, "disk": 12 * GIB, "disk_test": 6 * GIB,
             "torch_gb": 7, "copy": 2 * GIB, "rest_s": 10, "rounds": 5, "slow": 1 if quick else 2, "loop_rounds": (5, 31) if quick else (11, 101),
             "loop_s": 2 if quick else 9, "loop_pairs": {"c-": 3, "": 2}, "scale": 1,
             "hash": 64 * GIB, "hash_chunks": 4096, "rewrite": 20 * GIB, "period": 250, "hot": 4 * GIB, "lead": 0.2, "slice": 0.2, "pause": 3, "torch_live": 36,
             "multi": 32 * GIB}
        if quick:
            s.update(big=16 * GIB, mid=4 * GIB, load=8 * GIB, disk=4 * GIB, disk_test=2 * GIB, rounds=3, hash=16 * GIB, rewrite=4 * GIB,
                     torch_live=4, multi=8 * GIB)
    return {**s, **{f"{k}_text": size_text(s[k]) for k in ("big", "block", "mid", "small", "load", "disk", "hash", "rewrite", "hot", "multi")}}


class Steps(libsteps_live.LiveSteps, libsteps_multi.MultiSteps):
    """t: the Bench; f: the Figures; s: the sizes. `expected`: seconds that a step takes on an H100, `limit`: when it is given up."""

    def __init__(self, t, f, s):
        self.t, self.f, self.s = t, f, s

    def all(self):
        """(name, function, limit in s, expected in s), in the order to run them in: what is cheap and what others rest on goes first."""
        return [("link", self.link, 120, 20), ("gate", self.gate, 90, 20), ("hash", self.hash, 120, 15),
                ("rest", self.rest, 90, 30), ("suspend", self.suspend, 180, 55), ("driver", self.driver, 200, 80), ("blocks", self.blocks, 150, 50), ("gpu-tier", self.gpu_tier, 150, 30),
                ("overhead", self.overhead, 240, 100), ("pytorch", self.pytorch, 300, 120), ("load", self.load, 200, 60),
                ("live", self.live, 240, 120), ("rewrite", self.rewrite, 150, 35), ("copying", self.copying, 280, 215),
                ("disk", self.disk, 240, 80), ("llm", self.llm, 300, 120), ("replicas", self.replicas, 200, 50), ("multi", self.multi, 180, 60)]

    def memory_needed(self, step):
        """Host memory (bytes) that a step uses, to be touched beforehand."""
        big = self.s["big"] + self.s["big"] // 16
        extra = (1 if self.t.simulated else 8) * GIB // (8 if self.t.simulated else 1)
        return {"suspend": big, "driver": big, "blocks": self.s["mid"], "load": self.s["load"] + extra, "live": self.s["load"] + extra,
                "copying": self.s["load"] + 2 * extra, "rewrite": self.s["rewrite"] + extra,
                "replicas": 3 * extra, "rest": self.s["mid"], "pytorch": 3 * extra, "llm": 3 * extra, "disk": self.s["disk"] + extra,
                "multi": 2 * self.s["multi"] + self.s["multi"] // 8}.get(step, 0)

    def add(self, key, name, values, unit="s", better="lower", note=""):
        self.f.add(key, name, values, unit, better, note, self.step)
        values = values if isinstance(values, list) else [values]
        if len(values) <= 12:
            text = " ".join(f"{v:.4g}" for v in values)
        else:
            text = "{:.4g} [{:.4g} {:.4g} {:.4g}] {:.4g}".format(min(values), *statistics.quantiles(values, n=4), max(values)) + f" of {len(values)}"
        self.t.say(f"  {name}: {text} {unit}")

    # ---- the machine ----

    def link(self):
        """What the link between GPU and host gives, pinned."""
        rounds = self.s["rounds"]
        argv = ["--bytes", str(self.s["copy"]), "--rounds", str(rounds), "--no-check"]
        out = self.t.tool("bench-copy", *argv, *(["--driver", self.t.driver] if self.t.simulated else []), timeout=110)
        for key, text, name in (("link.out", "device to host, cuMemHostAlloc", "pinned copy, device to host"),
                                ("link.in", "host to device, cuMemHostAlloc", "pinned copy, host to device")):
            m = re.search(rf"{re.escape(text)}.*?([\d.]+) GB/s", out)
            if not m:
                raise Failed(f"bench-copy did not say how fast it copies {text}\n{out[-800:]}")
            self.add(key, name, float(m[1]), "GB/s", "higher", f"best of {rounds} rounds of 8 copies of 1 GiB at most: the limit")

    def gate(self):
        """Nanoseconds that the agent's gate adds to a call: to the driver's cheapest, and to a launch."""
        found = {}
        for _ in range(self.s["rounds"]):
            out = self.t.tool("bench-gate", "--kernels", ROOT / "sim/kernels.ptx", self.t.agent, self.t.driver, timeout=50)
            for name, direct, cost in re.findall(r"^(.*?): direct ([\d.]+) ns, gated [\d.]+ ns, the \w+ costs (-?[\d.]+) ns", out, re.M):
                found.setdefault(name.split(", 1 thread")[0], []).append((float(direct), float(cost)))
        for key, name, text in (("gate", "cuCtxGetCurrent", "cuCtxGetCurrent"),
                                ("gate.cold", "cuCtxGetCurrent, displaced", "cuCtxGetCurrent with other code and data in the caches"),
                                ("gate.launch", "cuLaunchKernel", "cuLaunchKernel")):
            if name not in found:
                raise Failed(f"bench-gate said nothing of {name}\n{out[-800:]}")
            self.add(f"{key}.cost", f"the gate: {text} through the agent, more", [c for _, c in found[name]], "ns",
                     note="each the median of the differences of many pairs of runs, by turns in one process")
            self.add(f"{key}.direct", f"{text}, the driver alone", [d for d, _ in found[name]], "ns")
        for name in (n for n in found if n.startswith("cuMemAlloc")):
            self.add(f"gate.{name}.direct", f"{name}, the driver alone", [d / 1e3 for d, _ in found[name]], "us")
            self.add(f"gate.{name}.cost", f"{name} through the agent, more", [c / 1e3 for _, c in found[name]], "us",
                     note="each the median of the differences of 51 pairs, by turns in one process")

    def rest(self):
        """The daemon with nothing to do, before and after it has worked."""
        t, s = self.t, self.s
        t.stop_daemon()
        idle = t.gpu_memory_used()
        context = t.hold(0, s["block"], agent=False)
        gpu = t.gpu_memory_of([context.pid], idle)
        if gpu is not None:
            self.add("rest.context", "GPU memory of a process with a context and nothing else", gpu, "bytes")
        context.kill()
        t.start_daemon("--no-gpu-hash")
        gpu = t.gpu_memory_of(family(t.daemon.pid), idle)
        if gpu is not None:
            self.add("rest.gpu_nohash", "daemon with --no-gpu-hash, fresh: GPU memory", gpu, "bytes", note="nvidia-smi")
        t.start_daemon("--trim-after", "2")
        fresh = pinned_bytes(t.daemon.pid)
        self.add("rest.pinned_fresh", "daemon at rest, fresh: pinned host memory", fresh, "bytes")
        program = t.hold(s["mid"], s["block"])
        t.suspend(program)
        t.resume(program)
        program.check()
        program.kill()
        self.add("rest.pinned_work", f"daemon after a suspend of {s['mid_text']}: pinned host memory", pinned_bytes(t.daemon.pid), "bytes",
                 note="what --trim-after keeps for the next one")
        began = time.monotonic()
        while pinned_bytes(t.daemon.pid) > fresh + 2 * MIB and time.monotonic() < began + 30:
            time.sleep(0.05)
        self.add("rest.trim", "daemon: until its pinned host memory was given back, with --trim-after 2", time.monotonic() - began)
        context = t.hold(0, s["block"], agent=False)
        before = [cpu_of(p.pid) for p in (context, t.daemon)]
        time.sleep(s["rest_s"])
        (floor, floor_text), (cpu, text) = cpu_since(before[0], context.pid), cpu_since(before[1], t.daemon.pid)
        context.kill()  # nvidia-smi may know no processes
        self.add("rest.context_cpu", "CPU time of a process with a context and nothing else", floor, "%", note=floor_text)
        self.add("rest.cpu", "daemon at rest: CPU time of all threads", cpu, "%",
                 note=f"{floor:.4f} % with a context and nothing else; {text}; after a suspend and resume")
        self.add("rest.pinned_used", f"daemon at rest, after a suspend of {s['mid_text']} and --trim-after: pinned host memory", pinned_bytes(t.daemon.pid),
                 "bytes", note="no configuration asks it to keep any")
        gpu = t.gpu_memory_of(family(t.daemon.pid), idle)
        if gpu is not None:
            self.add("rest.gpu", "daemon at rest: GPU memory", gpu, "bytes", note="nvidia-smi")
        self.add("rest.resident", "daemon at rest: resident memory of its processes", resident_bytes(t.daemon.pid), "bytes")

    # ---- suspend and resume ----

    def rounds(self, program, rounds, *options):
        """Suspend and resume, once for warming and then `rounds` times: lists of wall times and of copy rates (GB/s)."""
        out = {"suspend": [], "resume": [], "out": [], "in": [], "first": None}
        for i in range(rounds + 1):
            a = self.t.suspend(program, *options)
            b = self.t.resume(program)
            program.check()
            if i == 0:
                out["first"] = a.wall
                continue
            out["suspend"].append(a.wall)
            out["resume"].append(b.wall)
            for key, answer in (("out", a), ("in", b)):
                try:
                    s, moved = answer.copy()
                    out[key].append(moved / 1e9 / s)
                except Failed:
                    pass  # a tier that moves nothing
            out["phases"] = (a.phases, b.phases)
        return out

    def suspend(self):
        t, s = self.t, self.s
        t.start_daemon()
        program = t.hold(s["big"], s["block"])
        r = self.rounds(program, s["rounds"])
        what = f"{s['big_text']}, host tier"
        note = "host memory touched and the pool pinned by one suspend before"
        self.add("suspend.wall", f"suspend {what}: whole command", r["suspend"], note=note)
        self.add("resume.wall", f"resume {what}: whole command", r["resume"], note=note)
        self.add("suspend.first", f"suspend {what}: whole command, the first after the daemon's start", r["first"],
                 note="pins the pool's memory; not counted in the other figures")
        if not r["out"] or not r["in"]:
            raise Failed("the phases say no bytes that were copied")
        self.add("suspend.rate", f"suspend {what}: bytes / time of the copy", r["out"], "GB/s", "higher")
        self.add("resume.rate", f"resume {what}: bytes / time of the copy", r["in"], "GB/s", "higher")
        for which, phases in zip(("suspend", "resume"), r["phases"]):
            for name, (seconds, _) in phases.items():
                self.add(f"{which}.phase.{name}", f"{which} {what}: phase {name}", seconds, note="of the last round")

    def driver(self):
        """The driver's own path for the same bytes, without agent or daemon."""
        t, s = self.t, self.s
        t.stop_daemon()  # gives its pinned memory back
        program = t.hold(s["big"], s["block"], agent=False)
        # The driver's is minutes of the machine's time: once.
        out = t.tool("bench-driver-ckpt", program.pid, timeout=180)
        program.check()
        for name, seconds in re.findall(r"^(\w+) ([\d.]+)$", out, re.M):
            self.add(f"driver.{name}", f"driver's path, {s['big_text']}: {name}", float(seconds), note="no agent; one run: it takes so long")

    def blocks(self):
        t, s = self.t, self.s
        t.start_daemon()
        for key, block in (("small", s["small"]), ("large", s["block"])):
            program = t.hold(s["mid"], block)
            r = self.rounds(program, s["rounds"])
            what = f"{s['mid_text']} in {s['mid'] // block} blocks of {size_text(block)}, host tier"
            self.add(f"blocks.{key}.suspend", f"suspend {what}: whole command", r["suspend"])
            self.add(f"blocks.{key}.resume", f"resume {what}: whole command", r["resume"])
            program.kill()

    def gpu_tier(self):
        t, s = self.t, self.s
        if "--to" not in t.command([t.bennu, "suspend", "--help"], env=t.own_env(), ok=False):
            raise Skipped("this bennu has no suspend --to gpu")
        t.start_daemon()
        for key, size in (("", s["big"]), ("mid.", s["mid"])):
            program = t.hold(size, s["block"])
            r = self.rounds(program, s["rounds"], "--to", "gpu")
            self.add(f"gpu.{key}suspend", f"suspend {size_text(size)}, GPU tier: whole command", r["suspend"])
            self.add(f"gpu.{key}resume", f"resume {size_text(size)}, GPU tier: whole command", r["resume"])
            program.kill()

    # ---- what the agent costs ----

    def overhead(self):
        t, s = self.t, self.s
        t.stop_daemon()
        hosts = [("c-", [t.bin / "bench/bench-loops", "--kernels", ROOT / "sim/kernels.ptx", "--scale", s["scale"]])]
        missing = None
        try:
            need_torch(t)
            hosts.append(("", [sys.executable, PROGRAMS / "loops.py"]))
        except Skipped as e:
            missing = e
        before = os.sched_getaffinity(0)
        for prefix, argv in hosts:
            # Both of a pair run on the same cores, and this process, which looks for their answers, on others. One core does for the
            # driver API; PyTorch brings threads of its own, and four processes start at once.
            cores = sorted(before)[-(1 if prefix else 4):]
            try:
                os.sched_setaffinity(0, before - set(cores) or before)
                self.overhead_of(prefix, argv, cores)
            finally:
                os.sched_setaffinity(0, before)
                t.end_programs()
        if missing:
            raise Skipped(f"{missing}: the loops of PyTorch were left out")

    def overhead_of(self, prefix, argv, cores):
        """Every loop of one program, with and without the agent. All programs are there at once, and all but the one under measurement
        idle: they are taken by turns, at one clock and temperature. Several pairs, since where a process's memory happens to lie makes a
        difference that no number of rounds evens out."""
        t, s = self.t, self.s
        pairs = [[(which, t.start(f"loops{prefix}{which}", argv, agent=which == "with", cores=cores)) for which in ("without", "with")]
                 for _ in range(s["loop_pairs"][prefix])]
        for _, program in sum(pairs, []):
            program.wait_for("^ready", "its first run", 120)
        for key, text in LOOPS.items():
            if key.startswith("c-") != (prefix == "c-"):
                continue
            taken, medians = {"with": [], "without": [], "ratio": []}, []
            for pair in pairs:
                warm = [run_pair(pair, key.removeprefix("c-"), order) for order in (0, 1)]
                fewest, most = s["loop_rounds"]
                rounds = min(max(fewest, int(s["loop_s"] / sum(warm[1].values()))), most)
                mine = [run_pair(pair, key.removeprefix("c-"), i % 2) for i in range(-(-rounds // len(pairs)))]
                medians.append(statistics.median(r["with"] / r["without"] for r in mine))
                for r in mine:
                    taken["with"].append(r["with"])
                    taken["without"].append(r["without"])
                    taken["ratio"].append(r["with"] / r["without"])
            where = f"by turns on {'core' if len(cores) == 1 else 'cores'} {','.join(map(str, cores))}, two rounds to warm up"
            for which in ("with", "without"):
                self.add(f"loop.{key}.{which}", f"{text}, {which} the agent", taken[which], note=where)
            low, high = median_range(taken["ratio"])
            self.add(f"loop.{key}.ratio", f"{text}, with / without the agent", taken["ratio"], "x", note=(
                f"median of {len(taken['ratio'])} paired ratios (95 %: {(low - 1) * 100:+.2f} to {(high - 1) * 100:+.2f} %; medians of each pair of "
                f"processes: {', '.join(f'{(m - 1) * 100:+.2f}' for m in medians)} %); {where}"))

    # ---- dump and restore ----

    def pytorch(self):
        t, s = self.t, self.s
        need_torch(t)
        t.start_daemon()
        images = self.disk_folder()
        for key, agent, gigabytes, rounds in (("agent", True, s["torch_gb"], s["rounds"]), ("empty", True, 0, s["rounds"]),
                                              ("driver", False, s["torch_gb"], s["slow"])):
            program = t.start(f"torch-{key}", [sys.executable, PROGRAMS / "torch_hold.py", "--gb", gigabytes], agent)
            t.say(program.wait_for("^ready .*", "its tensors are made", 120)[0])
            dumps, restores, drivers, cached, image = [], [], [], [], 0
            for _ in range(rounds):
                a, folder, image = t.dump(program, images, *([] if agent else ["--driver-path"]))
                cached.append(cached_share(folder))
                b = t.restore(program, folder, *([] if agent else CRIU_ALONE))
                program.check()
                shutil.rmtree(folder)
                dumps.append(a.wall)
                restores.append(b.wall)
                drivers.append(driver_seconds(b))
            program.kill()
            what = f"PyTorch with {'an empty GPU' if not gigabytes else f'{gigabytes} GB on the GPU'}" + ("" if agent else ", driver path + CRIU")
            note = f"{share_text(cached)} of the image in the page cache; files on {file_system(images)}"
            self.add(f"pytorch.{key}.dump", f"dump {what}, to page cache", dumps, note=note)
            self.add(f"pytorch.{key}.restore", f"restore {what}, from page cache", restores, note=note)
            self.add(f"pytorch.{key}.restore_driver", f"restore {what}: the driver's share", drivers)
            self.add(f"pytorch.{key}.image", f"image of {what}", image, "bytes")

    def load(self):
        """A large image in tmpfs, and CRIU with nothing on the GPU."""
        t, s = self.t, self.s
        t.start_daemon()
        for key, size, name in (("empty.", 0, "nothing"), ("", s["load"], s["load_text"])):
            program = t.hold(size, s["block"])
            a, folder, image = t.dump(program, t.tmpfs())
            walls, drivers, rates = [], [], []
            for i in range(s["rounds"]):
                b = t.restore(program, folder)
                program.check()
                program.kill()
                walls.append(b.wall)
                drivers.append(driver_seconds(b))
                if size:
                    seconds, moved = b.copy()
                    rates.append(moved / 1e9 / seconds)
            shutil.rmtree(folder)
            what = f"{name} on the GPU"
            self.add(f"load.{key}dump", f"dump with {what}, to tmpfs: whole command", a.wall)
            self.add(f"load.{key}restore", f"restore with {what}, from tmpfs: whole command", walls, note="one image, restored again and again")
            self.add(f"load.{key}driver", f"restore with {what}: driver restore and unlock", drivers)
            if rates:
                self.add("load.rate", f"restore with {what}, from tmpfs: bytes / time of the load", rates, "GB/s", "higher")

    def disk(self):
        t, s = self.t, self.s
        images = self.disk_folder()
        threads, rounds = 8, 2
        out = t.tool("bench-disk", images, s["disk_test"], threads, rounds, timeout=120)
        note = f"{size_text(s['disk_test'])}, blocks of 16 MiB, {threads} in flight, files on {file_system(images)}"
        if "no O_DIRECT" in out:
            note += "; THIS FILE SYSTEM HAS NO O_DIRECT: this is its page cache"
        for which in ("write", "read"):
            rates = [float(x) for x in re.findall(rf"^{which} ([\d.]+) GB/s", out, re.M)]
            self.add(f"disk.{which}", f"disk, O_DIRECT {which}", rates, "GB/s", "higher", note)
        for which, what in (("write", "writing packs"), ("read", "reading packs"), ("verify", "reading packs and hashing them on the CPU")):
            rates = [float(x) for x in re.findall(rf"^packs-{which} ([\d.]+) GB/s", out, re.M)]
            self.add(f"disk.packs_{which}", f"{what}, nothing in the page cache", rates, "GB/s", "higher", note)
        t.start_daemon()
        program = t.hold(s["disk"], s["block"])
        walls, rates, in_walls, in_rates = [], [], [], []
        for _ in range(s["slow"]):
            a, folder, image = t.dump(program, images, "--sync")
            drop_from_cache(folder)
            cached = cached_share(folder)
            b = t.restore(program, folder)
            program.check()
            shutil.rmtree(folder)
            walls.append(a.wall)
            rates.append(image / 1e9 / a.wall)
            in_walls.append(b.wall)
            in_rates.append(image / 1e9 / b.wall)
        note = f"the image dropped from the page cache before ({share_text([cached])} of the image was in it)"
        self.add("disk.dump", f"dump with {s['disk_text']} on the GPU to disk, synced: whole command", walls)
        self.add("disk.dump_rate", "dump to disk: bytes of the image / whole command", rates, "GB/s", "higher")
        self.add("disk.restore", f"restore with {s['disk_text']} on the GPU from disk: whole command", in_walls, note=note)
        self.add("disk.restore_rate", "restore from disk: bytes of the image / whole command", in_rates, "GB/s", "higher", note=note)

    # ---- the server ----

    def llm(self):
        t, s = self.t, self.s
        need_torch(t)
        t.start_daemon()
        images = self.disk_folder()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        argv = [sys.executable, ROOT / "examples/llm-server/server.py", "--port", str(port)]

        def cold(agent):
            began = time.monotonic()
            server = t.start("llm-server", argv, agent, commands=False)
            first, tokens = first_token(server, port)
            t.say(f"cold start {'with' if agent else 'without'} the agent: first token after {first - began:.3f} s")
            return server, first - began, tokens

        def colds_are():
            self.add("llm.cold", "llm-server: cold start to first token", colds, note="Python's files in the page cache; no agent")

        server, _, want = cold(False)  # reads Python's files from the disk, perhaps: not counted
        colds = []
        for _ in range(max(1, s["slow"] - 1)):
            server.kill()
            server, seconds, tokens = cold(False)
            colds.append(seconds)
        server.kill()
        colds_are()
        server, seconds, tokens = cold(True)
        self.add("llm.cold_agent", "llm-server under the agent: cold start to first token", seconds)
        if tokens != want:
            raise Failed(f"under the agent the server answers {tokens}, not {want}")
        self.server_restores("restored", server, port, images, want, s["rounds"])
        self.server_restores("criu_memory", server, port, images, want, s["slow"], restore=CRIU_ALONE)
        server.kill()
        server, seconds, tokens = cold(False)
        colds.append(seconds)
        colds_are()
        self.server_restores("driver", server, port, images, want, s["slow"], dump=["--driver-path"], restore=CRIU_ALONE)

    def server_restores(self, key, server, port, images, want, rounds, dump=(), restore=()):
        """Dumps the server and restores it some times over: from the start of bennu restore to the first token."""
        t = self.t
        a, folder, image = t.dump(server, images, *dump)
        cached, walls, firsts, rates = cached_share(folder), [], [], []
        for i in range(rounds):
            began = time.monotonic()
            b = t.restore(server, folder, *restore)
            if "host-memory" in b.phases:
                seconds, moved = b.phases["host-memory"]
                rates.append(moved / 1e9 / seconds)
            first, tokens = first_token(server, port)
            if tokens != want:
                raise Failed(f"after its restore the server answers {tokens}, not {want}")
            walls.append(b.wall)
            firsts.append(first - began)
            if i + 1 < rounds:
                server.kill()
        shutil.rmtree(folder)
        how = "driver path + CRIU" if dump else "Bennu, host memory by CRIU alone" if restore else "Bennu"
        note = f"{share_text([cached])} of the image in the page cache; files on {file_system(images)}; the same tokens as before"
        self.add(f"llm.{key}", f"llm-server: restore ({how}) to first token", firsts, note=note)
        self.add(f"llm.{key}_restore", f"llm-server: restore ({how}), whole command", walls, note=note)
        self.add(f"llm.{key}_dump", f"llm-server: dump ({how}), whole command", a.wall, note=note)
        self.add(f"llm.{key}_image", f"llm-server: image ({how})", image, "bytes")
        if rates:
            self.add(f"llm.{key}_host", f"llm-server: restore ({how}), host memory filled in", rates, "GB/s", "higher", note)

    def need_torch(self):
        need_torch(self.t)

    def disk_folder(self):
        """Where images go that are not to be in tmpfs."""
        return self.t.work


# ---- small things ----

def run_pair(pair, loop, turned):
    """One round of a loop in both programs of a pair, one after the other: {"with": seconds, "without": seconds}."""
    return {which: float(program.ask(loop, rf"^{loop} ([\d.]+)$")[1]) for which, program in (pair[::-1] if turned else pair)}


def need_torch(t):
    if t.simulated:
        raise Skipped("PyTorch does not run on the simulated driver")
    out = t.command([sys.executable, "-c", "import importlib.util as u; print(bool(u.find_spec('torch') and u.find_spec('transformers')))"],
                    ok=False)
    if "True" not in out:
        raise Skipped("PyTorch and transformers are not installed")


def first_token(server, port):
    """(time.monotonic() of the first token, tokens), as soon as the server answers."""
    try:
        return libhttp.generate(port, gone=lambda: server.poll() is not None)
    except (OSError, TimeoutError, ValueError, KeyError) as e:
        raise Failed(f"{e}\n{tail(server.log)}") from e


def driver_seconds(answer):
    return answer.seconds("driver-restore", "driver-unlock")


def share_text(shares):
    known = [s for s in shares if s is not None]
    return f"{min(known) * 100:.0f} %" if known else "an unknown share"


def file_system(folder):
    best = ("", "?")
    for line in pathlib.Path("/proc/mounts").read_text().splitlines():
        _, at, kind = line.split()[:3]
        if (str(folder) + "/").startswith(at.rstrip("/") + "/") and len(at) >= len(best[0]):
            best = (at, kind)
    return best[1]


def family(pid):
    """A process and all below it: the daemon is two."""
    found = [pid]
    for children in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in children.read_text().split():
                found += family(int(child))
        except OSError:
            pass  # that thread has ended
    return found


def cpu_of(pid):
    """(when, {thread: its CPU time, ns}, the kernel's sum of them in ns, in steps of its tick), of a process and all below it."""
    at, threads, ticks = time.monotonic(), {}, 0
    for p in family(pid):
        try:
            of_all = pathlib.Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, of_all[11:15]))  # its own, and its children's that have ended
            for t in pathlib.Path(f"/proc/{p}/task").iterdir():
                threads[int(t.name)] = (t / "comm").read_text().strip(), int((t / "schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has just ended
    return at, threads, ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def cpu_since(before, pid):
    """(CPU time in % of the time since, what to say about it). A thread that has ended took its own with it: then the kernel's sum counts."""
    (began, old, old_ticks), (ended, now, ticks) = before, cpu_of(pid)
    spent = {tid: (name, ns - old.get(tid, ("", 0))[1]) for tid, (name, ns) in now.items()}
    most = [f"{name} {ns / 1e3:.0f} us" for name, ns in sorted(spent.values(), key=lambda x: -x[1])[:3] if ns > 0]
    total, gone = sum(ns for _, ns in spent.values()), len(set(old) - set(now))
    text = f"over {ended - began:.0f} s, {len(now)} threads; {', '.join(most) if most else 'none ran'}"
    if gone:
        total, text = max(total, ticks - old_ticks), f"{text}; {gone} threads ended, so in ticks"
    return total / 1e9 / (ended - began) * 100, text


def pinned_bytes(pid):
    """Bytes that the memfds of a process and those below it hold, each counted once: the daemon's pool is one."""
    held = {}
    for fd in (f for p in family(pid) for f in pathlib.Path(f"/proc/{p}/fd").iterdir()):
        try:
            if os.readlink(fd).startswith("/memfd:"):
                st = os.stat(fd)
                held[st.st_dev, st.st_ino] = st.st_blocks * 512
        except OSError:
            pass  # closed meanwhile
    return sum(held.values())


def resident_bytes(pid):
    return sum(int(pathlib.Path(f"/proc/{p}/statm").read_text().split()[1]) for p in family(pid)) * os.sysconf("SC_PAGE_SIZE")
