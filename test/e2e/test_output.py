"""What the commands print: tables for people, JSON for programs, with the keys that the manual names."""

import re

import harness
from harness import Case, ODD

PHASE = {"name", "start_s", "duration_s", "bytes"}


class Output(Case):
    def check_phases(self, phases, *names):
        for phase in phases:
            self.assertEqual(set(phase), PHASE)
            self.assertGreaterEqual(phase["start_s"], 0)
            self.assertGreaterEqual(phase["duration_s"], 0)
        for name in names:
            self.assertIn(name, [p["name"] for p in phases])

    def test_run(self):
        done = self.bennu("run", "--", "/bin/sh", "-c", "echo $LD_PRELOAD; exit 7")
        self.assertEqual((done.returncode, done.stderr), (7, ""))
        self.assertIn("libbennu.so", done.stdout)
        done = self.bennu("run", "--no-agent", "/bin/sh", "-c", "echo x$LD_PRELOAD")
        self.assertEqual((done.returncode, done.stdout), (0, "x\n"))
        self.assertEqual(self.bennu("run", "/nonexistent").returncode, 127)
        self.assertEqual(self.bennu("run", "/dev/null").returncode, 126)
        done = self.bennu("run", "/bin/echo", "hello", env={"BENNU_DRIVER": "/nonexistent"})
        self.assertEqual((done.returncode, done.stdout), (0, "hello\n"))
        self.assertIn("no NVIDIA driver", done.stderr)

    def test_dump_restore_and_inspect(self):
        self.start_daemon()
        program = self.tree()
        children = harness.children_of(program.pid)
        image = self.path("ck")
        dump = self.ok_json("dump", program.pid, image)
        program.gone(children)
        self.assertEqual(set(dump), {"ok", "pid", "directory", "left_running", "cuda_processes", "agents", "gpu_bytes",
                                     "criu_version", "duration_s", "phases"})
        self.assertEqual((dump["pid"], dump["directory"], dump["left_running"]), (program.pid, image, False))
        self.assertEqual((dump["cuda_processes"], dump["agents"]), (3, 3))
        self.check_phases(dump["phases"], "gate", "hand-over", "evict", "driver-lock", "driver-checkpoint", "copy-out")

        seen = self.ok_json("inspect", image)
        self.assertEqual(set(seen), {"ok", "directory", "made", "bennu_version", "host", "driver_version", "gpu_bytes",
                                     "stored_bytes", "zero_bytes", "shared_bytes", "segments", "verified", "gpus",
                                     "processes", "phases"})
        self.assertIs(seen["verified"], False)
        self.assertEqual(seen["gpu_bytes"], dump["gpu_bytes"])
        self.assertEqual(seen["stored_bytes"] + seen["zero_bytes"] + seen["shared_bytes"], seen["gpu_bytes"])
        self.assertEqual(sorted(p["pid"] for p in seen["processes"]), sorted([program.pid] + children))
        for process in seen["processes"]:
            self.assertEqual(set(process), {"pid", "command", "path", "segments", "bytes"})
        for gpu in seen["gpus"]:
            self.assertEqual(set(gpu), {"name", "uuid", "compute_capability", "bytes"})
        self.check_phases(seen["phases"])
        self.assertIs(self.ok_json("inspect", "--verify", image)["verified"], True)
        text = self.ok("inspect", "--verify", image).stdout
        self.assertIn("Simulated GPU", text)
        self.assertIn("every stored chunk and each of CRIU's files is as it was written", text)

        done = self.bennu("restore", "--detach", "--json", "--pidfile", self.path("pid"), image)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        answer = harness.json.loads(done.stdout)
        program.restored = True
        self.assertEqual(set(answer), {"ok", "pid", "directory", "detached", "gpu_bytes", "duration_s", "phases"})
        self.assertEqual((answer["pid"], answer["detached"]), (program.pid, True))
        self.assertEqual(answer["gpu_bytes"], dump["gpu_bytes"])
        self.check_phases(answer["phases"], "load", "verify")
        self.assertEqual(harness.text_of(self.path("pid")), f"{program.pid}\n")
        program.go_on()

    def test_no_progress_on_a_pipe(self):
        self.start_daemon()
        program = self.memcheck()
        done = self.ok("dump", "--leave-running", program.pid, self.path("ck"))
        self.assertEqual(done.stderr, "")
        self.assertNotIn("\r", done.stdout)
        self.assertRegex(done.stdout, rf"process {program.pid} \(1 with CUDA, .* on the GPU\) is in .*/ck and goes on\n")
        self.assertEqual(self.ok("dump", "--quiet", "--leave-running", program.pid, self.path("ck2")).stdout, "")
        program.go_on()

    def test_ps(self):
        self.start_daemon()
        self.assertEqual(set(self.ok_json("ps")), {"ok", "processes"})
        first, second = self.memcheck(), self.memcheck(agent=False)
        third = self.start(ODD, "managed")
        ours = (first.pid, second.pid, third.pid)  # the machine has others
        found = {p["pid"]: p for p in self.ok_json("ps")["processes"] if p["pid"] in ours}
        self.assertEqual(set(found), {first.pid, second.pid, third.pid})
        for process in found.values():
            self.assertEqual(set(process), {"pid", "command", "state", "gpu_bytes", "host_bytes", "disk_bytes", "tier", "allocations",
                                            "unknown_functions", "note"})
        self.assertEqual((found[first.pid]["state"], found[first.pid]["command"]), ("running", "memcheck"))
        self.assertGreater(found[first.pid]["gpu_bytes"], 0)
        self.assertEqual(found[second.pid]["state"], "no agent")
        self.assertIn("managed", found[third.pid]["note"])
        table = self.ok("ps").stdout.splitlines()
        self.assertLessEqual(set(ours), {int(line.split()[0]) for line in table[1:]})
        self.assertTrue(re.match(r" *PID COMMAND +STATE +TIER +GPU +HOST +DISK +ALLOCS +NOTE", table[0]))

    def test_check(self):
        self.start_daemon()
        done = self.bennu("check", "--json")
        answer = harness.json.loads(done.stdout)
        levels = {c["level"] for c in answer["checks"]}
        self.assertEqual(done.returncode, 1 if "fail" in levels else 0)
        self.assertLessEqual(levels, {"ok", "warn", "fail"})
        for check in answer["checks"]:
            self.assertEqual(set(check), {"level", "name", "found", "todo"})
            if check["level"] != "ok":
                self.assertTrue(check["todo"], check)
        names = " ".join(c["name"] for c in answer["checks"]).lower()
        for name in ("criu", "plugin", "driver", "daemon", "agent", "mps", "kernel"):
            self.assertIn(name, names)
        text = self.bennu("check").stdout
        self.assertEqual(len(re.findall(r"^\[(ok|warn|fail)\]", text, re.M)), len(answer["checks"]))


if __name__ == "__main__":
    harness.main()
