#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""bench/run on the simulated driver: it measures, writes what it should, can be run in several goes, and loses nothing when a step fails."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import xml.etree.ElementTree

sys.dont_write_bytecode = True
import librows  # noqa: E402
import libsteps  # noqa: E402
import libsteps_live  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
SIZES = libsteps.sizes_for(True, True)
KEYS = ["name", "value", "unit", "target", "better"]


def figures(**values):
    f = librows.Figures({})
    for key, v in values.items():
        f.add(key.replace("_", "."), key, v, "s", step="x")
    return f.data


class Rows(unittest.TestCase):
    def value(self, rows, text):
        return next(r["value"] for r in rows if text in r["name"])

    def test_a_ratio_is_of_medians(self):
        rows, runs = librows.make_rows(figures(suspend_rate=[40.0, 45.0, 90.0], link_out=50.0), SIZES, {})
        self.assertEqual(self.value(rows, "suspend 64 MiB, host tier: rate"), 0.9)
        self.assertEqual(runs["suspend_rate"], {"n": 3, "min": 40.0, "median": 45.0, "max": 90.0, "values": [40.0, 45.0, 90.0], "step": "x",
                                                "at": runs["suspend_rate"]["at"]})

    def test_overhead_is_the_median_of_paired_ratios(self):
        data = figures(**{"loop_c-launches_ratio": [1.01, 0.99, 1.03, 1.02, 1.05]})
        data["loop.c-launches.ratio"]["note"] = "how"
        rows, runs = librows.make_rows(data, SIZES, {})
        self.assertAlmostEqual(self.value(rows, "under the agent, 10,000 small launches (driver API)"), 2)
        self.assertEqual(runs["under the agent, 10,000 small launches (driver API): slower by"]["note"], "how")
        self.assertEqual(runs["loop_c-launches_ratio"]["quartiles"], [1.0, 1.04])

    def test_what_criu_says_of_a_dump(self):
        entry = bytes([0x08, 5, 0x10, 0xC0, 0x84, 0x3D, 0x18, 7, 0x20, 9, 0x28, 0x80, 0x02, 0x30, 1, 0x38, 0x96, 0x01, 0x40, 3])
        with tempfile.TemporaryDirectory() as folder:
            with open(f"{folder}/stats-dump", "wb") as f:
                f.write(bytes(12) + bytes([0x0A, len(entry)]) + entry)
            self.assertEqual(libsteps_live.criu_stats(folder), {"freezing_time": 5e-6, "frozen_time": 1.0, "memdump_time": 7e-6, "memwrite_time": 9e-6,
                                                                "pages_scanned": 256, "pages_written": 150})

    def test_how_much_memory_is_its_own(self):
        before = libsteps_live.private_of(os.getpid())
        held = bytearray(os.urandom(16 << 20))
        self.assertGreaterEqual(libsteps_live.private_of(os.getpid()) - before, len(held) // 2)

    def test_slower_by_turns(self):
        ends = [i / 10 for i in range(11)] + [1 + i / 5 for i in range(1, 6)] + [2 + i / 10 for i in range(1, 11)]
        windows = [(0, 1), (1, 2), (2, 3)]
        slower, = libsteps_live.slower_by_turns(ends, windows)
        self.assertAlmostEqual(slower, 100)
        # A step that lies in two windows is in neither; a window without a step counts for nothing.
        slower, = libsteps_live.slower_by_turns([e - 0.05 for e in ends], windows)
        self.assertAlmostEqual(slower, 100)
        self.assertEqual(libsteps_live.slower_by_turns(ends, [(0, 1), (1.01, 1.15), (2, 3)]), [])

    def test_cpu_of_threads_that_end(self):
        def thread():
            end.wait()
        end = threading.Event()
        other = threading.Thread(target=thread)
        other.start()
        before = libsteps.cpu_of(os.getpid())
        end.set()
        other.join()
        while os.path.exists(f"/proc/self/task/{other.native_id}"):  # join() returns a moment before the kernel's thread ends
            time.sleep(0.001)
        value, text = libsteps.cpu_since(before, os.getpid())
        self.assertGreaterEqual(value, 0)
        self.assertIn("1 threads ended, so in ticks", text)

    def test_where_a_median_lies(self):
        self.assertEqual(librows.median_range([3, 1, 2]), (1, 3))
        self.assertEqual(librows.median_range(list(range(101))), (40, 60))  # 0.98 times the root of 101 to each side of 50

    def test_a_target_without_its_figures_has_no_value(self):
        rows, runs = librows.make_rows(figures(suspend_rate=45.0), SIZES, {"link": "no", "suspend": "why"})
        self.assertIsNone(self.value(rows, "suspend 64 MiB, host tier: rate"))
        self.assertEqual(runs["suspend 64 MiB, host tier: rate / pinned bandwidth"]["note"], "why")
        self.assertEqual(len([r for r in rows if r["target"] is not None]), len(librows.targets(SIZES)))

    def test_the_bound_of_a_load(self):
        data = figures(load_restore=2.0, load_driver=0.3, load_empty_restore=1.2, load_empty_driver=0.2)
        rows, _ = librows.make_rows(data, {**SIZES, "load": int(100e9)}, {})  # 2 s at 50 GB/s, longer than CRIU's 1 s
        self.assertAlmostEqual(self.value(rows, "from tmpfs / (max"), 2.0 / (2 * 1.15 + 0.3), places=5)

    def test_merge_takes_the_later_value_and_no_null(self):
        def doc(date, data):
            head = {"machine": "m", "gpu": "g", "driver": "d", "date": date, "commit": "c"}
            for figure in data.values():
                figure["at"] = date
            return librows.document(head, {"figures": data, "steps": {}, "notes": {}, "simulated": False, "quick": False}, SIZES)
        first = doc("2026-01-01T00:00:00Z", figures(gate_cost=3.0, link_in=50.0))
        second = doc("2026-01-01T01:00:00Z", figures(gate_cost=4.0))
        for docs in ([first, second], [second, first]):
            merged = librows.merge(docs)
            self.assertEqual(self.value(merged["rows"], "a gated call"), 4.0)
            self.assertEqual(self.value(merged["rows"], "link_in"), 50.0)
            self.assertEqual(len({r["name"] for r in merged["rows"]}), len(merged["rows"]))
        with self.assertRaises(ValueError):
            librows.merge([first, {**second, "commit": "other"}])


class Run(unittest.TestCase):
    def run_bench(self, *args, status=0):
        r = subprocess.run([sys.executable, HERE / "run", *map(str, args)], capture_output=True, text=True, timeout=100)
        self.assertEqual(r.returncode, status, r.stdout[-4000:] + r.stderr[-2000:])
        return r.stdout

    def read(self, folder):
        file, = pathlib.Path(folder).glob("*.json")
        xml.etree.ElementTree.parse(file.with_suffix(".svg"))
        doc = json.loads(file.read_text())
        for key in ("machine", "gpu", "driver", "date", "commit"):
            self.assertTrue(doc[key] and isinstance(doc[key], str), key)
        for row in doc["rows"]:
            self.assertEqual(list(row), KEYS)
            self.assertIn(row["better"], ("higher", "lower"))
            self.assertTrue(row["value"] is None or isinstance(row["value"], (int, float)), row)
        return doc, {r["name"]: r["value"] for r in doc["rows"]}

    def test_in_two_goes(self):
        build = os.environ["BENNU_BUILD"]
        with tempfile.TemporaryDirectory(prefix="bennu-test-bench.") as folder:
            common = ["--simulated", "--quick", "--build", build, "--out", f"{folder}/out", "--state", f"{folder}/state", "--images", folder]
            text = self.run_bench(*common, "--only", "link,suspend,driver,gpu-tier")
            self.assertIn("shape only", text)
            doc, values = self.read(f"{folder}/out")
            self.assertTrue(doc["simulated"])
            self.assertEqual({k: v["result"] for k, v in doc["steps"].items() if k != "gpu-tier"},
                             dict.fromkeys(("link", "suspend", "driver"), "done"))
            for name in ("suspend 64 MiB, host tier: rate / pinned bandwidth", "resume 64 MiB, host tier: times faster than the driver's path"):
                self.assertGreater(values[name], 0)
            self.assertIsNone(values["dump to disk: rate / the disk's O_DIRECT rate"])
            self.assertEqual(doc["runs"]["suspend 64 MiB, host tier: whole command"]["n"], 2)

            text = self.run_bench(*common, "--only", "suspend,rest,hash,blocks,overhead,load,live,rewrite,copying,disk,multi")
            self.assertIn("measured already since this machine booted (--again measures again): suspend", text)
            doc, more = self.read(f"{folder}/out")
            for name, value in values.items():
                if value is not None:
                    self.assertEqual(more[name], value)
            for name in ("dump to disk: rate / the disk's O_DIRECT rate", "restore from disk: rate / the disk's O_DIRECT rate"):
                self.assertGreater(more[name], 0)
            self.assertTrue(any(" times " in n or " in blocks of " in n for n in more))

            result, = pathlib.Path(f"{folder}/out").glob("*.json")
            self.run_bench("--merge", result, "--out", f"{folder}/merged")
            self.assertEqual(self.read(f"{folder}/merged")[1], more)
            self.assertFalse(list(pathlib.Path(folder).glob("bennu-bench.*")), "the working folder is left")

    def test_a_step_that_fails_loses_nothing(self):
        with tempfile.TemporaryDirectory(prefix="bennu-test-bench.") as folder:
            build, broken = pathlib.Path(os.environ["BENNU_BUILD"]), pathlib.Path(folder) / "build"
            broken.mkdir()
            for entry in build.iterdir():
                (broken / entry.name).symlink_to(entry)
            (broken / "bench").unlink()
            (broken / "bench").mkdir()
            for entry in (build / "bench").glob("bench-*"):
                (broken / "bench" / entry.name).symlink_to(entry)
            (broken / "bench/bench-driver-ckpt").unlink()
            (broken / "bench/bench-driver-ckpt").symlink_to("/bin/false")
            self.run_bench("--simulated", "--quick", "--build", broken, "--out", f"{folder}/out", "--state", f"{folder}/state", "--images", folder,
                           "--only", "link,driver,suspend", status=1)
            doc, values = self.read(f"{folder}/out")
            self.assertEqual({k: v["result"] for k, v in doc["steps"].items()}, {"link": "done", "suspend": "done", "driver": "failed"})
            self.assertIsNone(values["suspend 64 MiB, host tier: times faster than the driver's path"])
            self.assertGreater(values["resume 64 MiB, host tier: rate / pinned bandwidth"], 0)

    def test_wrong_usage(self):
        with tempfile.TemporaryDirectory(prefix="bennu-test-bench.") as folder:
            self.run_bench("--build", os.environ["BENNU_BUILD"], "--simulated", "--only", "nonsense", "--state", f"{folder}/state", "--out",
                           f"{folder}/out", "--images", folder, status=1)
            self.assertFalse(list(pathlib.Path(folder).glob("bennu-bench.*")), "the working folder is left")


if __name__ == "__main__":
    if os.geteuid() != 0:
        print("checkpoints need root")
        sys.exit(77)
    unittest.main(verbosity=2)
