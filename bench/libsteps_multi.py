# SPDX-License-Identifier: MIT
"""Steps of bench/run on several GPUs."""

import concurrent.futures
import time

from libbench import Failed, Skipped


class MultiSteps:
    def multi(self):
        """Suspend and resume of a process on one GPU, and of two on two at the same time: does either wait for the other?"""
        t, s = self.t, self.s
        if t.gpu_count() < 2:
            raise Skipped(f"this machine has {t.gpu_count()} GPU")
        t.start_daemon()
        programs = [t.hold(s["multi"], s["block"], gpu=gpu) for gpu in (0, 1)]
        self.at_once("suspend", programs)  # pins the pool's memory for both
        self.at_once("resume", programs)
        found = {}
        for _ in range(s["rounds"]):
            for which in (programs[:1], programs):
                for command in ("suspend", "resume"):
                    found.setdefault((command, len(which)), []).append(self.at_once(command, which))
                for program in which:
                    program.check()
        for command in ("suspend", "resume"):
            self.report_multi(command, found[command, 1], found[command, 2])

    def at_once(self, command, programs):
        """(s until the last is done, [bytes / time of the copy of each, GB/s])"""
        fn, began = getattr(self.t, command), time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(len(programs)) as pool:
            answers = list(pool.map(fn, programs))
        wall, rates = time.monotonic() - began, []
        for a in answers:
            seconds, moved = a.copy()
            if moved != self.s["multi"]:
                raise Failed(f"bennu {command} moved {moved} bytes, not {self.s['multi']}")
            rates.append(moved / 1e9 / seconds)
        return wall, rates

    def report_multi(self, command, alone, both):
        size = self.s["multi_text"]
        one, two = f"{command} {size} on one GPU", f"{command} 2 x {size} on two GPUs at once"
        key = f"multi.{command}"
        self.add(f"{key}.alone.wall", f"{one}: whole command", [wall for wall, _ in alone])
        self.add(f"{key}.alone.rate", f"{one}: bytes / time of the copy", [r[0] for _, r in alone], "GB/s", "higher")
        self.add(f"{key}.both.wall", f"{two}: until both are done", [wall for wall, _ in both], note="two commands, two processes")
        for gpu in (0, 1):
            self.add(f"{key}.both.rate{gpu}", f"{two}: bytes / time of the copy, GPU {gpu}", [r[gpu] for _, r in both], "GB/s", "higher")
        self.add(f"{key}.both.share", f"{two}: the slower one's share of both rates", [min(r) / sum(r) for _, r in both], "", "higher",
                 note="0.5: each has as much as the other")
        self.add(f"{key}.both.scale", f"{two}: both rates together / the rate of one alone",
                 [sum(r) / a[0] for (_, r), (_, a) in zip(both, alone)], "x", "higher", note="2: neither waits for the other")
