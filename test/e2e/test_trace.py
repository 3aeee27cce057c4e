"""--trace: what was done when. Order and overlap are looked at, never how long something takes."""

import json
import os
import pathlib
import stat
import subprocess
import sys
import time
import xml.etree.ElementTree

import harness
from harness import Case

OURS, DAEMON, CRIU = 1, 2, 3


class Trace(Case):
    def events(self, path):
        all_events = json.loads(harness.text_of(path))
        for e in all_events:
            self.assertIn(e["ph"], ("M", "X"))
            if e["ph"] == "X":
                self.assertEqual(set(e), {"ph", "name", "pid", "tid", "ts", "dur", "args"})
                self.assertGreaterEqual(e["dur"], 0)
        done = [e for e in all_events if e["ph"] == "X"]
        for e in done:
            e["end"] = e["ts"] + e["dur"]
        self.in_lanes(done)
        return done

    def in_lanes(self, done):
        """In one lane events may only lie behind or inside each other, else no viewer shows them."""
        for a in done:
            for b in done:
                if a is not b and (a["pid"], a["tid"]) == (b["pid"], b["tid"]) and a["ts"] <= b["ts"] < a["end"]:
                    self.assertLessEqual(b["end"], a["end"] + 1, f"{a} and {b}")

    def phase(self, done, name, pid=DAEMON):
        found = [e for e in done if e["name"] == name and e["pid"] == pid and e["tid"] < 100]
        self.assertEqual(len(found), 1, f"{name}: {sorted(e['name'] for e in done)}")
        return found[0]

    def inside(self, inner, outer):
        self.assertGreaterEqual(inner["ts"], outer["ts"])
        self.assertLessEqual(inner["end"], outer["end"])

    def parts(self, done, name, processes):
        """A copy each of a process on a GPU, inside of the phase, which moves what they move."""
        parts = [e for e in done if e["name"] == name and e["tid"] >= 100]
        phase = self.phase(done, name)
        self.assertLessEqual({p["args"]["process"] for p in parts}, set(processes))
        self.assertGreater(phase["args"]["bytes"], 0)
        self.assertEqual(sum(p["args"]["bytes"] for p in parts), phase["args"]["bytes"])
        for p in parts:
            self.assertGreaterEqual(p["ts"], phase["ts"])
            self.assertLessEqual(p["end"], phase["end"] + 1)
            self.assertEqual(p["args"]["gpu"], 0)

    def picture(self, path):
        script = pathlib.Path(__file__).resolve().parents[2] / "bench/trace2svg.py"
        drawn = subprocess.run([sys.executable, script, path], capture_output=True, text=True, timeout=60)
        self.assertEqual((drawn.returncode, drawn.stderr), (0, ""))
        text = [e.text for e in xml.etree.ElementTree.fromstring(drawn.stdout).iter("{http://www.w3.org/2000/svg}text")]
        for name in ("load", "CRIU, all of it", "driver-restore", "give-back"):
            self.assertIn(name, text)

    def test_dump_and_restore(self):
        self.start_daemon()
        program = self.tree()
        pids = [program.pid] + harness.children_of(program.pid)
        image, out, back = self.path("ck"), self.path("dump.json"), self.path("restore.json")
        before = time.monotonic() * 1e6
        answer = self.ok_json("dump", "--trace", out, program.pid, image)
        after = time.monotonic() * 1e6
        program.gone(pids[1:])
        done = self.events(out)
        self.assertEqual({p["name"] for p in answer["phases"]} - {"CRIU, all of it"},
                         {e["name"] for e in done if e["pid"] == DAEMON and e["tid"] < 100})
        whole, criu = self.phase(done, "dump", OURS), self.phase(done, "criu", CRIU)
        self.assertGreaterEqual(whole["ts"], before)
        self.assertLessEqual(whole["end"], after)
        for e in done:  # one clock for all of them
            self.inside(e, whole)
        self.inside(criu, whole)
        self.inside(self.phase(done, "driver-checkpoint"), criu)
        self.inside(self.phase(done, "processes", CRIU), criu)
        for name in ("freezing_us", "frozen_us", "memdump_us", "memwrite_us"):
            self.assertGreaterEqual(criu["args"][name], 0)
        self.assertGreater(criu["args"]["pages_written"], 0)
        self.assertLess(self.phase(done, "copy-out")["ts"], self.phase(done, "driver-checkpoint")["ts"])
        self.assertLess(self.phase(done, "driver-checkpoint")["end"], self.phase(done, "processes", CRIU)["ts"])
        self.parts(done, "copy-out", pids)

        self.ok("restore", "--detach", "--trace", back, image)
        program.restored = True
        done = self.events(back)
        criu = self.phase(done, "criu", CRIU)
        self.inside(criu, self.phase(done, "restore", OURS))
        self.assertLess(self.phase(done, "load")["ts"], self.phase(done, "processes", CRIU)["ts"])
        self.assertLess(self.phase(done, "processes", CRIU)["ts"], self.phase(done, "driver-restore")["ts"])
        self.assertGreater(criu["args"]["pages_restored"], 0)
        self.parts(done, "load", pids)
        self.picture(back)
        program.go_on()

    def test_suspend_and_resume(self):
        self.start_daemon()
        program = self.memcheck()
        out = self.path("trace.json")
        self.ok("suspend", "--trace", out, program.pid)
        done = self.events(out)
        self.assertFalse([e for e in done if e["pid"] == CRIU])
        self.inside(self.phase(done, "copy-out"), self.phase(done, "suspend", OURS))
        self.assertLess(self.phase(done, "copy-out")["ts"], self.phase(done, "driver-checkpoint")["end"])
        self.ok("resume", "--trace", out, program.pid)  # takes the other's place
        done = self.events(out)
        self.assertLess(self.phase(done, "copy-in")["ts"], self.phase(done, "driver-restore")["end"])
        self.phase(done, "resume", OURS)
        program.go_on()

    def test_after_a_failure(self):
        """What was done until then."""
        self.start_daemon(BENNU_SIM_FAIL="cuCheckpointProcessCheckpoint:1=2")
        program = self.memcheck()
        out = self.path("trace.json")
        self.refused(1, "dump", "--trace", out, program.pid, self.path("ck"))
        done = self.events(out)
        self.phase(done, "dump", OURS)
        self.phase(done, "copy-out")
        self.phase(done, "driver-checkpoint")
        program.go_on()

    def test_where_it_cannot_be_written(self):
        self.start_daemon()
        program = self.memcheck()
        for path in (self.path("none", "trace.json"), self.path()):
            self.refused(1, "dump", "--trace", path, program.pid, self.path("ck"), says=("cannot write", path))
            self.assertFalse(os.path.exists(self.path("ck")))
        out = self.path("trace.json")
        self.refused(1, "suspend", "--trace", out, 1)  # there is nothing to tell, and yet it is a whole file or none
        self.assertFalse(os.path.exists(out))
        self.ok("suspend", "--trace", out, program.pid)
        self.assertTrue(stat.S_ISREG(os.lstat(out).st_mode))
        self.assertFalse([name for name in os.listdir(os.path.dirname(out)) if name.startswith("trace.json") and name != "trace.json"])
        self.ok("resume", program.pid)
        program.go_on()


if __name__ == "__main__":
    harness.main()
