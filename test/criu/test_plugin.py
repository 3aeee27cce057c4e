#!/usr/bin/env python3
"""The CRIU plugin inside a real CRIU, with a daemon that does what the test says. Needs root, no GPU.

The processes that are dumped prove that they run by counting (counter.c). A failed test prints CRIU's logs.
"""

import argparse
import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import fake_daemon  # noqa: E402

OPTIONS = None
CRIU = None
SUCCESS = b"\x08\x01\x10\x01"  # criu_resp: type DUMP, success
LONG = 60  # seconds after which a thing that must happen counts as not happening


def wait_until(condition, what):
    end = time.monotonic() + LONG
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"never happened: {what}")
        time.sleep(0.005)


def state_of(pid):
    """State letter, '' once it is gone, and the pid of its tracer."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as f:
            status = dict(line.split(":\t", 1) for line in f.read().splitlines() if ":\t" in line)
        return status["State"][0], int(status["TracerPid"])
    except (FileNotFoundError, ProcessLookupError):
        return "", 0


def gone(pid):
    """True once the process has ended and its pid is free again. Orphans of the test are its own children (see main)."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
    return not state_of(pid)[0]


class PluginTest(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="bennu-criu-")
        self.images, self.rundir, self.libdir = (os.path.join(self.dir, n) for n in ("img", "run", "lib"))
        for folder in (self.images, self.rundir, self.libdir):
            os.mkdir(folder)
        shutil.copy(OPTIONS.plugin, os.path.join(self.libdir, "bennu_plugin.so"))
        self.daemon = None
        self.tree = None
        self.pids = []
        self.inside = []  # command that puts another into a mount namespace
        self.env = dict(os.environ, BENNU_RUNDIR=self.rundir, BENNU_BENNUD="/nonexistent/bennud")
        for name in ("CRIU_LIBS_DIR", "CRIU_CONFIG_FILE", "BENNU_DRIVER"):
            self.env.pop(name, None)

    def tearDown(self):
        self.kill_tree()
        if self.daemon:
            self.daemon.stop()
        outcome = self._outcome
        results = outcome.result.errors + outcome.result.failures if hasattr(outcome, "result") else outcome.errors
        if any(test is self and problem for test, problem in results):
            self.print_logs()
        shutil.rmtree(self.dir)

    def print_logs(self):
        for name in sorted(os.listdir(self.dir)) + [os.path.join("img", n) for n in sorted(os.listdir(self.images))]:
            if name.endswith(".log"):
                with open(os.path.join(self.dir, name), encoding="utf-8", errors="replace") as f:
                    print(f"--- {self.id()}: {name} ---\n" + "".join(f.readlines()[-120:]), file=sys.stderr)

    # --- the processes ---
    def start_tree(self, n=1, mark="agent", *device):
        # Its standard streams are opened in the mount namespace that it lives in: CRIU finds no others.
        self.tree = subprocess.Popen([*self.inside, "sh", "-c", 'exec "$@" </dev/null >/dev/null 2>&1', "sh",
                                      OPTIONS.counter, self.dir, str(n), mark, *device])
        self.n = n
        wait_until(lambda: all(self.count(i)[0] for i in range(n)), "the processes count")
        self.pids = [self.count(i)[1] for i in range(n)]
        return self.tree.pid

    def count(self, i):
        try:
            with open(os.path.join(self.dir, f"{i}.count"), "rb") as f:
                data = f.read(16)
        except FileNotFoundError:
            return 0, 0
        return struct.unpack("<QQ", data) if len(data) == 16 else (0, 0)

    def assert_running(self, clean=True):
        """Every process counts, on from where it was, is nobody's tracee, and has nothing of CRIU's left in it."""
        before = [self.count(i)[0] for i in range(self.n)]
        wait_until(lambda: all(self.count(i)[0] > before[i] for i in range(self.n)), "the processes go on counting")
        for pid in self.pids:
            self.assertEqual(state_of(pid)[1], 0, f"process {pid} is still traced")
            with open(f"/proc/{pid}/maps", encoding="utf-8") as f:
                self.assertFalse(clean and "memfd" in f.read(), "parasite left behind")

    def assert_dead(self):
        if self.tree:
            self.tree.wait(LONG)
        wait_until(lambda: all(gone(pid) for pid in self.pids), "the processes end")

    def kill_tree(self):
        for pid in self.pids:
            if state_of(pid)[0]:
                with open(f"/proc/{pid}/cmdline", "rb") as f:
                    if OPTIONS.counter.encode() in f.read():
                        os.kill(pid, signal.SIGKILL)
        if self.tree:
            self.tree.kill()
            self.tree.wait()
        wait_until(lambda: all(gone(pid) for pid in self.pids), "the processes end")

    # --- the daemon ---
    def start_daemon(self, **plan):
        self.daemon = fake_daemon.Listening(self.rundir, OPTIONS.control)
        self.daemon.plan.update(plan)

    @contextlib.contextmanager
    def hanging(self, request):
        """The daemon does not answer this request while the body runs."""
        release = threading.Event()
        self.daemon.plan[request] = {"call": lambda _: release.wait()}
        try:
            yield
        finally:
            release.set()

    def requests(self):
        return [r["request"] for r in self.daemon.records]

    def assert_requests(self, *expected):
        wait_until(lambda: len(self.daemon.records) >= len(expected), f"requests {expected}, got {self.requests()}")
        self.assertEqual(self.requests(), list(expected))
        self.assertFalse([r for r in self.daemon.records if r.get("malformed")])

    def wait_closed(self):
        """The daemon has seen the end of the connection: it writes down no more of it."""
        wait_until(lambda: self.requests()[-1:] == ["closed"], "the connection is closed")

    def use_private_daemon(self, **plan):
        plan_file = os.path.join(self.dir, "plan.json")
        with open(plan_file, "w", encoding="utf-8") as f:
            json.dump(plan, f)
        self.env.update(BENNU_BENNUD=os.path.join(os.path.dirname(os.path.abspath(__file__)), "fake_daemon.py"),
                        FAKE_BENNUD_PLAN=plan_file, FAKE_BENNUD_LOG=os.path.join(self.dir, "private.jsonl"),
                        FAKE_BENNUD_CONTROL=OPTIONS.control)

    def private_records(self):
        with open(self.env["FAKE_BENNUD_LOG"], encoding="utf-8") as f:
            return [json.loads(line) for line in f]

    # --- CRIU ---
    def criu(self, *args):
        command = [*self.inside, CRIU, args[0], "--no-default-config", "-D", self.images, "-o", f"{args[0]}.log", "-v4",
                   "-L", self.libdir, *args[1:]]
        return subprocess.run(command, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=LONG * 2, check=False).returncode

    def log(self, name="dump"):
        with open(os.path.join(self.images, f"{name}.log"), encoding="utf-8", errors="replace") as f:
            return f.read()

    def dump(self, *args):
        return self.criu("dump", "-t", str(self.tree.pid), *args)

    def assert_no_checkpoint(self):
        self.assertFalse(os.path.exists(os.path.join(self.images, "inventory.img")), "it still looks like a checkpoint")

    def dump_for_restore(self, n=1, mark="agent"):
        """A good dump by a daemon that is then gone, with a manifest as the real one would write."""
        self.start_tree(n, mark)
        self.start_daemon()
        self.assertEqual(self.dump(), 0)
        self.assert_dead()
        self.last = [self.count(i)[0] for i in range(n)]
        self.wait_closed()
        self.daemon.records.clear()
        with open(os.path.join(self.images, "bennu-manifest.img"), "w", encoding="utf-8") as f:
            f.write("not read by the plugin")

    def assert_continues(self):
        self.assert_running()
        for i in range(self.n):
            self.assertGreater(self.count(i)[0], self.last[i])


class Dump(PluginTest):
    def test_one_process(self):
        pid = self.start_tree()
        self.start_daemon()
        self.assertEqual(self.dump(), 0)
        self.assert_dead()
        self.assert_requests("DUMP_BEGIN", "DUMP_PROCESS", "DUMP_PROCESS", "DUMP_THREAD", "DUMP_END", "closed")
        begin, pause, checkpoint, _, end, _ = self.daemon.records
        self.assertEqual((begin["values"], begin["folders"]), ([pid, 0, 0, 0], [self.images]))
        self.assertEqual((pause["values"], checkpoint["values"], end["values"]), ([pid], [pid], [0, 0]))
        self.assertFalse(begin["traced"], "the tree must run while the GPU is dealt with")
        self.assertTrue(checkpoint["traced"])

    def test_three_processes(self):
        pid = self.start_tree(3, "agents")
        self.start_daemon()
        self.assertEqual(self.dump(), 0)
        self.assert_dead()
        self.wait_closed()
        asked = [r["values"][0] for r in self.daemon.records if r["request"] == "DUMP_PROCESS"]
        self.assertEqual(asked[0], pid)
        self.assertEqual(sorted(asked), sorted(2 * self.pids))
        self.assertEqual(self.requests(), ["DUMP_BEGIN"] + 3 * ["DUMP_PROCESS"] + 3 * ["DUMP_PROCESS", "DUMP_THREAD"] + ["DUMP_END"] + ["closed"])

    def test_leave_running(self):
        self.start_tree(3)
        self.start_daemon()
        self.assertEqual(self.dump("--leave-running"), 0)
        self.assert_running()

    def test_one_thread_runs_while_zero_pages_are_given_back(self):
        """The daemon names a thread: it alone may run during the purge, and is dumped and restored like the others."""
        pid = self.start_tree(3)
        counts = []
        self.start_daemon()
        self.daemon.plan[f"DUMP_THREAD:{pid}"] = {"value": pid}

        def ran(_):
            before = [self.count(i)[0] for i in range(3)]
            wait_until(lambda: self.count(0)[0] > before[0], "the thread runs during the purge")
            counts.extend(self.count(i)[0] - before[i] for i in range(3))

        self.daemon.plan["DUMP_PURGE"] = {"call": ran}
        self.assertEqual(self.dump("--leave-running"), 0)
        self.assertEqual(self.requests().count("DUMP_PURGE"), 1)
        self.assertGreater(counts[0], 0)
        self.assertEqual(counts[1:], [0, 0])
        self.assert_running()

    def test_a_failed_purge_fails_nothing(self):
        pid = self.start_tree()
        self.start_daemon(DUMP_PURGE={"error": [errno.ETIMEDOUT, "purge", "no answer"]})
        self.daemon.plan[f"DUMP_THREAD:{pid}"] = {"value": pid}
        self.assertEqual(self.dump(), 0)
        self.assert_dead()
        self.assertIn("no answer", self.log())

    def test_without_cuda_no_daemon_is_asked(self):
        self.start_tree(mark="none")
        self.start_daemon()
        self.assertEqual(self.dump("--leave-running"), 0)
        self.assertEqual(self.requests(), [])
        self.assert_running()

    def test_without_cuda_no_daemon_is_needed(self):
        self.start_tree(mark="none")
        self.assertEqual(self.dump(), 0)
        self.assertFalse([line for line in self.log().splitlines() if "(bennu)" in line or " bennu: " in line])

    def test_cuda_in_a_child_is_found(self):
        self.start_tree(3, "agents")
        self.start_daemon()
        self.daemon.plan["DUMP_BEGIN"] = {"value": 0}
        self.assertEqual(self.dump("--leave-running"), 0)
        self.assertEqual(self.requests()[0], "DUMP_BEGIN")

    def test_cuda_without_any_daemon_is_an_error(self):
        pid = self.start_tree()
        self.assertNotEqual(self.dump(), 0)
        self.assertIn(f"process {pid} uses CUDA", self.log())
        self.assertIn("start bennud", self.log())
        self.assert_running()
        self.assert_no_checkpoint()

    def test_daemon_is_silent_for_ten_seconds(self):
        """CRIU gives up on stopping a tree after ten seconds; the GPU's part must not count."""
        self.start_tree()
        self.start_daemon(DUMP_BEGIN={"delay": 12})
        self.assertEqual(self.dump("--leave-running"), 0)
        self.assertNotIn("Timeout reached", self.log())
        self.assert_running()

    def test_pre_dump_touches_nothing(self):
        self.start_tree()
        self.start_daemon()
        result = self.criu("pre-dump", "-t", str(self.tree.pid))
        self.assertEqual(self.requests(), [])
        # Where the kernel cannot track memory CRIU breaks off half-way, and leaves its parasite.
        self.assert_running(clean=result == 0)
        if result != 0:
            self.skipTest("this kernel cannot pre-dump; nothing was paused")

    def fails(self, *requests):
        self.assertNotEqual(self.dump(), 0)
        self.assert_running()
        self.assert_no_checkpoint()
        self.assert_requests(*requests)

    def test_begin_fails(self):
        self.start_tree(3)
        self.start_daemon(DUMP_BEGIN={"error": [errno.EBUSY, "gate", "process 7 does not come to rest"]})
        self.fails("DUMP_BEGIN", "closed")
        self.assertEqual(self.log().count("process 7 does not come to rest"), 1)

    def test_pause_of_a_child_fails(self):
        self.start_tree(3)
        self.start_daemon()
        child = self.pids[1]
        self.daemon.plan[f"DUMP_PROCESS:{child}"] = {"error": [errno.ENODEV, "session", "it started meanwhile"]}
        self.assertNotEqual(self.dump(), 0)
        self.assert_running()
        self.assert_no_checkpoint()
        self.wait_closed()
        self.assertEqual(self.requests()[-2], "DUMP_END")
        self.assertNotEqual(self.daemon.records[-2]["values"][0], 0)

    def test_criu_fails_after_the_gpu_is_done(self):
        self.start_tree()
        self.start_daemon()
        # An image that CRIU cannot create, because a folder has its name.
        os.mkdir(os.path.join(self.images, "pstree.img"))
        self.fails("DUMP_BEGIN", "DUMP_PROCESS", "DUMP_PROCESS", "DUMP_THREAD", "DUMP_END", "closed")
        self.assertNotEqual(self.daemon.records[4]["values"][0], 0)

    def test_end_fails(self):
        self.start_tree(3)
        self.start_daemon(DUMP_END={"error": [errno.ENOSPC, "write", "the disk is full"]})
        self.assertNotEqual(self.dump(), 0)
        self.assert_running()
        self.assert_no_checkpoint()
        self.assertIn("the disk is full", self.log())
        self.assertNotIn("Dumping finished successfully", self.log())
        # Nothing is left that would be in the way of another dump.
        shutil.rmtree(self.images)
        os.mkdir(self.images)
        self.daemon.plan.clear()
        self.assertEqual(self.dump(), 0)

    def test_network_is_unlocked_when_the_end_fails(self):
        self.inside = ["unshare", "-n"]
        pid = self.start_tree()
        self.inside = []
        self.start_daemon(DUMP_END={"error": [errno.EIO, "write", "bad disk"]})
        self.assertNotEqual(self.dump(), 0)
        if "Lock network" not in self.log() or not shutil.which("iptables-save"):
            self.skipTest("no network namespace, or nothing to look into it with")
        self.assert_running()
        rules = subprocess.run(["nsenter", "-t", str(pid), "-n", "iptables-save"], capture_output=True, text=True,
                               check=True).stdout
        self.assertNotIn("CRIU", rules)

    def test_daemon_that_hangs_does_not_hang_a_failed_dump(self):
        self.start_tree()
        self.start_daemon()
        os.mkdir(os.path.join(self.images, "pstree.img"))
        with self.hanging("DUMP_END"):
            self.assertNotEqual(self.dump(), 0)
            self.assert_running()

    def test_end_fails_with_leave_running(self):
        self.start_tree()
        self.start_daemon(DUMP_END={"error": [errno.EIO, "write", "bad disk"]})
        self.assertNotEqual(self.dump("--leave-running"), 0)
        self.assert_running()
        self.assert_no_checkpoint()

    def test_stopped_process_stays_stopped_when_the_end_fails(self):
        pid = self.start_tree()
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: state_of(pid)[0] == "T", "the process stops")
        self.start_daemon(DUMP_END={"error": [errno.EIO, "write", "bad disk"]})
        self.assertNotEqual(self.dump(), 0)
        wait_until(lambda: state_of(pid) == ("T", 0), "it is stopped and not traced")
        os.kill(pid, signal.SIGCONT)
        self.assert_running()

    def test_daemon_dies_in_begin(self):
        self.start_tree()
        self.start_daemon(DUMP_BEGIN={"die": True})
        self.fails("DUMP_BEGIN", "closed")

    def test_daemon_dies_in_checkpoint(self):
        self.start_tree(3)
        self.start_daemon(DUMP_PROCESS={"die": True})
        self.fails("DUMP_BEGIN", "DUMP_PROCESS", "closed")

    def test_daemon_dies_in_end(self):
        self.start_tree(3)
        self.start_daemon(DUMP_END={"die": True})
        self.assertNotEqual(self.dump(), 0)
        self.assert_running()
        self.assert_no_checkpoint()


class PrivateDaemon(PluginTest):
    def test_dump_starts_one_and_is_not_its_parent(self):
        self.start_tree(3)
        self.use_private_daemon()
        self.assertEqual(self.dump(), 0)
        self.assert_dead()
        start, *rest = self.private_records()
        self.assertEqual([r["request"] for r in rest if r["request"] != "closed"],
                         ["DUMP_BEGIN"] + 3 * ["DUMP_PROCESS"] + 3 * ["DUMP_PROCESS", "DUMP_THREAD"] + ["DUMP_END"])
        self.assertLessEqual(set(start["fds"]), {0, 1, 2, 3, 4}, "CRIU's descriptors were handed on")
        self.assertEqual(start["blocked"], [])
        self.assertNotEqual(start["sid"], os.getsid(0))

    def test_restore_starts_one(self):
        self.dump_for_restore(3)
        self.daemon.stop()
        self.daemon = None
        os.unlink(os.path.join(self.rundir, "bennud.sock"))
        self.use_private_daemon()
        self.assertEqual(self.criu("restore", "-d"), 0)
        self.assert_continues()
        self.assertEqual([r["request"] for r in self.private_records()[1:] if r["request"] != "closed"],
                         ["RESTORE_BEGIN"] + 3 * ["RESTORE_PROCESS"] + ["RESTORE_END"])

    def test_failed_end_lets_the_processes_go_on(self):
        self.start_tree(3)
        self.use_private_daemon(DUMP_END={"error": [errno.ENOSPC, "write", "the disk is full"]})
        self.assertNotEqual(self.dump(), 0)
        self.assert_running()
        self.assert_no_checkpoint()


class OtherPlugins(PluginTest):
    def add_other(self):
        """Add the other plugin under as many names as it takes until one is loaded after ours."""
        for i in range(64):
            shutil.copy(OPTIONS.other, os.path.join(self.libdir, f"other{i}.so"))
            names = [n for n in os.listdir(self.libdir) if n.endswith(".so")]
            if names.index("bennu_plugin.so") < len(names) - 1:
                self.env["OTHER_PLUGIN_LOG"] = os.path.join(self.dir, "other.txt")
                return names[-1]
        return self.skipTest("no way to have a plugin loaded after ours in this file system")

    def other_calls(self, name):
        path = self.env["OTHER_PLUGIN_LOG"]
        if not os.path.exists(path):
            return []
        with open(path, encoding="utf-8") as f:
            return [line.split()[1:] for line in f if line.split()[0].endswith("/" + name)]

    def test_nothing_is_claimed_when_the_daemon_finds_no_cuda(self):
        pid = self.start_tree()
        self.start_daemon(DUMP_BEGIN={"value": 0})
        other = self.add_other()
        self.assertEqual(self.dump(), 0)
        self.assertEqual(self.other_calls(other), [["pause", str(pid)], ["checkpoint", str(pid)]])
        self.assert_requests("DUMP_BEGIN", "closed")
        # And the image does not ask for us.
        self.assert_dead()
        os.unlink(os.path.join(self.libdir, "bennu_plugin.so"))
        self.assertEqual(self.criu("restore", "-d"), 0)

    def test_only_our_processes_are_claimed(self):
        self.start_tree(3)
        self.start_daemon(DUMP_PROCESS={"value": 0})
        self.daemon.plan[f"DUMP_PROCESS:{self.pids[1]}"] = {"value": 1}
        other = self.add_other()
        self.assertEqual(self.dump(), 0)
        theirs = sorted([self.pids[0], self.pids[2]])
        for hook in ("pause", "checkpoint"):
            self.assertEqual(sorted(int(p) for h, p in self.other_calls(other) if h == hook), theirs)

    def test_beside_the_stock_plugin_we_stand_aside(self):
        self.start_tree()
        self.start_daemon()
        shutil.copy(OPTIONS.other, os.path.join(self.libdir, "cuda_plugin.so"))
        self.assertEqual(self.dump("--leave-running"), 0)
        self.assertEqual(self.requests(), [])
        self.assertIn("leaving this dump to it", self.log())

    def test_restore_without_us_is_refused(self):
        self.dump_for_restore()
        os.unlink(os.path.join(self.libdir, "bennu_plugin.so"))
        self.assertNotEqual(self.criu("restore", "-d"), 0)
        self.assertIn("Missing required plugin: bennu", self.log("restore"))


class StockImages(PluginTest):
    """Images made by CRIU's own CUDA plugin, here played by other_plugin.c."""

    def stock_dump(self):
        self.start_tree(3)
        os.rename(os.path.join(self.libdir, "bennu_plugin.so"), os.path.join(self.dir, "bennu_plugin.so"))
        shutil.copy(OPTIONS.other, os.path.join(self.libdir, "cuda_plugin.so"))
        self.assertEqual(self.dump(), 0)
        self.assert_dead()
        self.last = [self.count(i)[0] for i in range(3)]
        os.rename(os.path.join(self.dir, "bennu_plugin.so"), os.path.join(self.libdir, "bennu_plugin.so"))
        self.start_daemon()

    def test_restored_in_its_place(self):
        self.stock_dump()
        os.unlink(os.path.join(self.libdir, "cuda_plugin.so"))
        self.assertEqual(self.criu("restore", "-d"), 0)
        self.assert_continues()
        self.assert_requests("RESTORE_BEGIN", *3 * ["RESTORE_PROCESS"], "RESTORE_END", "closed")
        self.assertEqual(self.daemon.records[0]["values"], [4])  # BN_CTL_F_STOCK_IMAGE

    def test_left_to_the_stock_plugin_if_that_is_there(self):
        self.stock_dump()
        # Our stand-in for it does not take its name off the list, so CRIU stops here.
        self.assertNotEqual(self.criu("restore", "-d"), 0)
        self.assertEqual(self.requests(), [])
        self.assertTrue("Missing required plugin: cuda_plugin" in self.log("restore"))


class Devices(PluginTest):
    """A descriptor of /dev/nvidiactl that NVML left behind. /dev/fuse plays the device: like it, CRIU does not know how to dump one.
    All in a mount namespace with a /dev of its own."""

    def setUp(self):
        super().setUp()
        if not os.path.exists("/dev/fuse"):
            self.skipTest("no /dev/fuse")
        script = ("umount -R -l /dev; mount -t tmpfs dev /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/zero c 1 5 && "
                  "mknod /dev/urandom c 1 9 && mknod /dev/nvidiactl c 10 229 && mknod /dev/nvidia-uvm c 10 229 && mknod /dev/nvidia0 c 1 5 && "
                  "echo ready && exec sleep 1000")
        self.holder = subprocess.Popen(["unshare", "-m", "--propagation", "private", "sh", "-c", script],
                                       stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        if self.holder.stdout.readline() != "ready\n":
            self.skipTest("no mount namespace can be made here")
        self.inside = ["nsenter", "-m", "-t", str(self.holder.pid)]

    def tearDown(self):
        super().tearDown()
        if hasattr(self, "holder"):
            self.holder.kill()
            self.holder.wait()
            self.holder.stdout.close()

    def dump_with(self, device):
        self.start_tree(1, "agent", device)
        self.start_daemon()
        return self.dump()

    def test_pre_dump_of_a_mapped_gpu_is_refused_first_of_all(self):
        self.start_tree(1, "agent", "/dev/nvidia0")
        self.start_daemon()
        with open(f"/proc/{self.pids[0]}/maps", encoding="utf-8") as f:
            self.assertIn("/dev/nvidia0", f.read())
        self.assertNotEqual(self.criu("pre-dump", "-t", str(self.pids[0])), 0)
        self.assertTrue("without --pre-checkpoint" in self.log("pre-dump"))
        self.assertEqual(self.requests(), [])
        self.assert_running()

    def test_left_over_control_device_is_opened_anew(self):
        self.assertEqual(self.dump_with("/dev/nvidiactl"), 0)
        self.assert_dead()
        self.last = [self.count(0)[0]]
        with open(os.path.join(self.images, "bennu-manifest.img"), "w", encoding="utf-8"):
            pass
        self.assertEqual(self.criu("restore", "-d"), 0)
        self.assert_continues()
        self.assertEqual(os.readlink(f"/proc/{self.pids[0]}/fd/9"), "/dev/nvidiactl")

    def test_null_device_where_it_is_missing(self):
        self.assertEqual(self.dump_with("/dev/nvidiactl"), 0)
        self.assert_dead()
        self.last = [self.count(0)[0]]
        with open(os.path.join(self.images, "bennu-manifest.img"), "w", encoding="utf-8"):
            pass
        subprocess.run([*self.inside, "rm", "/dev/nvidiactl"], check=True)
        self.assertEqual(self.criu("restore", "-d"), 0)
        self.assert_continues()
        self.assertEqual(os.readlink(f"/proc/{self.pids[0]}/fd/9"), "/dev/null")

    def test_hostile_path_is_refused(self):
        self.assertEqual(self.dump_with("/dev/nvidiactl"), 0)
        self.assert_dead()
        name = next(n for n in os.listdir(self.images) if n.startswith("bennu-device-"))
        with open(os.path.join(self.images, name), "w", encoding="utf-8") as f:
            f.write("/dev/nvidia0/../../etc/shadow")
        with open(os.path.join(self.images, "bennu-manifest.img"), "w", encoding="utf-8"):
            pass
        self.assertNotEqual(self.criu("restore", "-d"), 0)
        self.assertTrue(f"{name} is damaged" in self.log("restore"))

    def test_memory_device_still_open_is_an_error(self):
        self.assertNotEqual(self.dump_with("/dev/nvidia-uvm"), 0)
        self.assert_running()
        self.assert_no_checkpoint()

    def test_without_a_session_it_is_not_taken(self):
        self.start_tree(1, "agent", "/dev/nvidiactl")
        self.start_daemon(DUMP_BEGIN={"value": 0})
        self.assertNotEqual(self.dump(), 0)
        self.assert_running()


class Restore(PluginTest):
    def test_one_process(self):
        self.dump_for_restore()
        self.assertEqual(self.criu("restore", "-d"), 0)
        self.assert_continues()
        self.assert_requests("RESTORE_BEGIN", "RESTORE_PROCESS", "RESTORE_END", "closed")
        begin, process, end, _ = self.daemon.records
        self.assertEqual((begin["values"], begin["folders"]), ([0], [self.images]))
        self.assertEqual((process["values"], end["values"]), (self.pids, [0]))

    def test_three_processes(self):
        self.dump_for_restore(3)
        running = []
        self.daemon.plan["RESTORE_END"] = {"call": lambda _: running.extend(state_of(p)[1] for p in self.pids)}
        self.assertEqual(self.criu("restore", "-d"), 0)
        self.assert_continues()
        self.assert_requests("RESTORE_BEGIN", *3 * ["RESTORE_PROCESS"], "RESTORE_END", "closed")
        self.assertEqual(running, [0, 0, 0], "the processes must be able to run by then")
        for pid in self.pids:
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            self.assertFalse([link for link in links if link.startswith("socket:")], "our socket got into a process")

    def test_foreground_restore_gets_its_gpu_state_too(self):
        self.dump_for_restore(3)
        ended = []
        self.daemon.plan["RESTORE_END"] = {"call": ended.append}
        command = [CRIU, "restore", "--no-default-config", "-D", self.images, "-o", "restore.log", "-v4", "-L",
                   self.libdir]
        with subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL) as criu:
            wait_until(lambda: ended or criu.poll() is not None, "the daemon is told that the processes run")
            self.assertIsNone(criu.poll())
            self.assert_continues()
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
            self.assertEqual(criu.wait(LONG), 0)

    def test_foreground_restore_fails(self):
        self.dump_for_restore(3)
        self.daemon.plan["RESTORE_END"] = {"error": [errno.EIO, "verify", "a chunk is damaged"]}
        self.assertNotEqual(self.criu("restore"), 0)
        self.assertTrue("a chunk is damaged" in self.log("restore"))
        self.tree = None
        self.assert_dead()

    def test_daemon_that_hangs_does_not_hang_a_failed_restore(self):
        self.dump_for_restore(3)
        self.daemon.plan["RESTORE_PROCESS"] = {"error": [errno.EIO, "driver", "restore refused"]}
        with self.hanging("RESTORE_END"):
            self.restore_fails("restore refused")

    def restore_fails(self, message):
        self.assertNotEqual(self.criu("restore", "-d"), 0)
        self.assertTrue(message in self.log("restore"), f"CRIU's log lacks: {message}")
        self.tree = None
        self.assert_dead()

    def test_begin_fails_before_anything_is_forked(self):
        self.dump_for_restore(3)
        self.daemon.plan["RESTORE_BEGIN"] = {"error": [errno.ENOMEM, "room", "the GPU is full"]}
        self.restore_fails("the GPU is full")
        self.assertNotIn("Forking task", self.log("restore"))

    def test_process_fails(self):
        self.dump_for_restore(3)
        self.daemon.plan[f"RESTORE_PROCESS:{self.pids[1]}"] = {"error": [errno.EIO, "driver", "restore refused"]}
        self.restore_fails("restore refused")
        self.assertIn("Restoring FAILED", self.log("restore"))
        self.assertEqual(self.requests().count("RESTORE_END"), 1)

    def test_end_fails(self):
        self.dump_for_restore(3)
        self.daemon.plan["RESTORE_END"] = {"error": [errno.EIO, "verify", "a chunk is damaged"]}
        self.restore_fails("a chunk is damaged")

    def test_daemon_dies(self):
        self.dump_for_restore(3)
        for request in ("RESTORE_BEGIN", "RESTORE_PROCESS", "RESTORE_END"):
            with self.subTest(request):
                self.daemon.plan.clear()
                self.daemon.plan[request] = {"die": True}
                self.restore_fails("bennud")

    def test_no_daemon(self):
        self.dump_for_restore()
        self.daemon.stop()
        self.daemon = None
        self.restore_fails("start bennud")

    def test_manifest_missing(self):
        self.dump_for_restore()
        os.unlink(os.path.join(self.images, "bennu-manifest.img"))
        self.restore_fails("has no bennu-manifest.img")
        self.assertEqual(self.requests(), [])

    def test_image_without_gpu_needs_no_daemon(self):
        self.start_tree(mark="none")
        self.assertEqual(self.dump(), 0)
        self.assert_dead()
        self.last = [self.count(0)[0]]
        self.assertEqual(self.criu("restore", "-d"), 0)
        self.assert_continues()


class RestoreInPidNamespace(PluginTest):
    """As in a container: the kernel lets the first process go only after all others, while CRIU waits for it alone."""

    def start_tree(self, n=1, mark="agent", *device):
        self.inside = ["sh", "-c", 'exec unshare --pid --fork "$@" 2>/dev/null', "sh"]  # it complains of a signal at its end
        super().start_tree(n, mark, *device)
        self.inside = []
        self.root = self.counters()[0]
        self.pids = []  # what the processes wrote are their pids inside

    def counters(self):
        found = []
        for pid in sorted(int(p) for p in os.listdir("/proc") if p.isdigit()):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as f:
                    if f.read().split(b"\0")[:2] == [OPTIONS.counter.encode(), self.dir.encode()]:
                        found.append(pid)
            except OSError:
                pass
        return found

    def dump(self, *args):
        return self.criu("dump", "-t", str(self.root), *args)

    def kill_tree(self):
        for pid in self.counters():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        super().kill_tree()

    def all_gone(self):
        # Orphans of the test are its own children (see main).
        return all(gone(pid) for pid in self.counters()) and not self.counters()

    def test_daemon_dies(self):
        self.dump_for_restore(3)

        def after_two(record):
            seen.append(record)
            if len(seen) == 2:
                self.daemon.plan["RESTORE_PROCESS"] = {"die": True}
        for name, plan in (("begin", {"RESTORE_BEGIN": {"die": True}}), ("first", {"RESTORE_PROCESS": {"die": True}}),
                           ("last", {"RESTORE_PROCESS": {"call": after_two}}), ("end", {"RESTORE_END": {"die": True}})):
            with self.subTest(name):
                seen = []
                self.daemon.plan.clear()
                self.daemon.plan.update(plan)
                self.assertNotEqual(self.criu("restore", "-d"), 0)
                self.assertTrue("bennud" in self.log("restore"))
                wait_until(self.all_gone, "the processes end")
        self.daemon.plan.clear()
        self.assertEqual(self.criu("restore", "-d"), 0)
        self.assert_continues()


class Cancelled(PluginTest):
    """bennu was told to stop: it says so through a pipe that its environment names."""

    def setUp(self):
        super().setUp()
        self.env["BENNU_CANCEL"] = os.path.join(self.dir, "cancel")
        os.mkfifo(self.env["BENNU_CANCEL"])
        self.pipe = os.open(self.env["BENNU_CANCEL"], os.O_RDWR)
        self.closed = threading.Event()

    def tearDown(self):
        os.close(self.pipe)
        self.closed.set()
        super().tearDown()

    def at(self, request):
        """The order comes while the daemon is at this request, which it does not answer."""
        def cancel(_):
            os.write(self.pipe, b"x")
            self.closed.wait(LONG)
        self.closed.clear()
        self.daemon.plan.clear()
        self.daemon.plan[request] = {"call": cancel}

    def ended(self):
        self.closed.set()
        os.read(self.pipe, 1)

    def test_dump(self):
        self.start_tree(3)
        self.start_daemon()
        for request in ("DUMP_BEGIN", "DUMP_PROCESS", "DUMP_END"):
            with self.subTest(request):
                self.at(request)
                self.assertNotEqual(self.dump(), 0)
                self.assert_running()
                self.assert_no_checkpoint()
                self.ended()
        self.daemon.plan.clear()
        self.assertEqual(self.dump(), 0)
        self.assert_dead()

    def test_the_answer_is_here(self):
        """The daemon goes by having sent it: it is too late for the order."""
        self.start_tree()
        self.start_daemon()
        criu = []

        def hold(_):
            criu.append(state_of(self.tree.pid)[1])
            os.kill(criu[0], signal.SIGSTOP)
            wait_until(lambda: state_of(criu[0])[0] == "T", "CRIU is stopped")

        def order(_):
            os.write(self.pipe, b"x")
            os.kill(criu[0], signal.SIGCONT)
        self.daemon.plan["DUMP_END"] = {"call": hold, "after": order}
        self.assertEqual(self.dump(), 0, self.log()[-1000:])
        self.assert_dead()

    def test_dump_without_gpu(self):
        self.start_tree(mark="none")
        os.write(self.pipe, b"x")
        self.assertNotEqual(self.dump(), 0)
        self.assert_running()
        self.assert_no_checkpoint()

    def test_restore(self):
        self.dump_for_restore(3)
        self.tree = None
        for request in ("RESTORE_BEGIN", "RESTORE_PROCESS", "RESTORE_END"):
            with self.subTest(request):
                self.at(request)
                self.assertNotEqual(self.criu("restore", "-d"), 0)
                self.assert_dead()
                self.ended()
        self.daemon.plan.clear()
        self.assertEqual(self.criu("restore", "-d"), 0)
        self.assert_continues()

    def test_restore_without_gpu(self):
        self.start_tree(3, mark="none")
        self.assertEqual(self.dump(), 0)
        self.assert_dead()
        os.write(self.pipe, b"x")
        self.assertNotEqual(self.criu("restore", "-d"), 0)
        self.assert_dead()


class Swrk(PluginTest):
    """As libcriu, runc and crun drive it: `criu swrk`, orders through a socket."""

    def test_good_dump(self):
        self.start_daemon()
        self.assertTrue(self.swrk_dump().startswith(SUCCESS), "no success was reported")
        self.assert_dead()

    def test_end_fails(self):
        self.start_daemon(DUMP_END={"error": [errno.ENOSPC, "write", "the disk is full"]})
        self.assertFalse(self.swrk_dump().startswith(SUCCESS), "success was reported")
        self.assert_running()
        self.assert_no_checkpoint()
        self.assertIn("the disk is full", self.log())

    def swrk_dump(self):
        pid = self.start_tree(3)
        self.env["CRIU_LIBS_DIR"] = self.libdir
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        folder = os.open(self.images, os.O_RDONLY)
        with subprocess.Popen([CRIU, "swrk", str(theirs.fileno())], env=self.env, pass_fds=[theirs.fileno(), folder],
                              stdin=subprocess.DEVNULL) as criu:
            theirs.close()
            ours.send(self.dump_request(folder, pid))
            answer = ours.recv(65536)
            criu.wait(LONG)
        os.close(folder)
        ours.close()
        return answer

    @staticmethod
    def dump_request(folder, pid):
        """criu_req of images/rpc.proto, encoded by hand: type = DUMP, opts {images_dir_fd, pid, log_level, log_file}."""
        def number(n):
            out = b""
            while n > 127:
                out, n = out + bytes([n & 127 | 128]), n >> 7
            return out + bytes([n])
        opts = (b"\x08" + number(folder) + b"\x10" + number(pid) + b"\x48\x04" + b"\x52\x08dump.log")
        return b"\x08\x01" + b"\x12" + number(len(opts)) + opts


class Frozen(PluginTest):
    """As Kubernetes does: the container's cgroup is frozen before CRIU is called."""

    def setUp(self):
        super().setUp()
        self.groups = []
        self.make_group()

    def make_group(self):
        name = os.path.basename(self.dir)
        for base, control, frozen, thawed in (("/sys/fs/cgroup", "cgroup.freeze", "1", "0"),
                                              ("/sys/fs/cgroup/unified", "cgroup.freeze", "1", "0"),
                                              ("/sys/fs/cgroup/freezer", "freezer.state", "FROZEN", "THAWED")):
            group = os.path.join(base, name)
            try:
                os.mkdir(group)
            except OSError:
                continue
            if os.path.exists(os.path.join(group, control)):
                self.groups.append((group, control, frozen, thawed))
            else:
                os.rmdir(group)
        if not self.groups:
            self.skipTest("no cgroup with a freezer can be made here")

    def tearDown(self):
        for group, control, _, thawed in self.groups:
            with open(os.path.join(group, control), "w", encoding="utf-8") as f:
                f.write(thawed)
        super().tearDown()
        for group, *_ in self.groups:
            wait_until(lambda g=group: not self.read(g, "cgroup.procs"), "the group is empty")
            os.rmdir(group)

    @staticmethod
    def read(group, name):
        with open(os.path.join(group, name), encoding="utf-8") as f:
            return f.read().strip()

    def is_frozen(self, group, control):
        if control == "freezer.state":
            return self.read(group, control) == "FROZEN"
        return "frozen 1" in self.read(group, "cgroup.events")

    def each_kind(self, body):
        for group, control, frozen, _ in self.groups:
            with self.subTest(group):
                self.start_tree(3)
                for pid in self.pids:
                    with open(os.path.join(group, "cgroup.procs"), "w", encoding="utf-8") as f:
                        f.write(str(pid))
                with open(os.path.join(group, control), "w", encoding="utf-8") as f:
                    f.write(frozen)
                wait_until(lambda g=group, c=control: self.is_frozen(g, c), "the group is frozen")
                body(group, control)

    def thaw(self, group, control):
        thawed = next(t for g, c, _, t in self.groups if g == group)
        with open(os.path.join(group, control), "w", encoding="utf-8") as f:
            f.write(thawed)

    def test_runs_while_the_gpu_is_dealt_with_and_is_left_frozen(self):
        self.start_daemon()

        def body(group, control):
            seen = []
            self.daemon.plan["DUMP_BEGIN"] = {"call": lambda _: seen.append(self.is_frozen(group, control))}
            self.assertEqual(self.dump("--leave-running", "--freeze-cgroup", group), 0)
            self.assertEqual(seen, [False])
            wait_until(lambda: self.is_frozen(group, control), "the group is frozen again")
            self.thaw(group, control)
            self.assert_running()
            self.kill_tree()
            for i in range(3):
                os.unlink(os.path.join(self.dir, f"{i}.count"))
        self.each_kind(body)

    def test_left_frozen_when_it_fails(self):
        self.start_daemon()

        def body(group, control):
            for request in ("DUMP_BEGIN", "DUMP_END"):
                self.daemon.plan.clear()
                self.daemon.plan[request] = {"error": [errno.EBUSY, "gate", "no rest"]}
                self.assertNotEqual(self.dump("--freeze-cgroup", group), 0)
                wait_until(lambda: self.is_frozen(group, control), f"the group is frozen again after {request}")
            self.thaw(group, control)
            self.assert_running()
            self.kill_tree()
            for i in range(3):
                os.unlink(os.path.join(self.dir, f"{i}.count"))
        self.each_kind(body)


def find_criu():
    private = os.path.join(os.environ.get("BENNU_BUILD", "build"), "criu/bin/criu")
    for path in (os.environ.get("BENNU_TEST_CRIU"), private, shutil.which("criu")):
        if path and os.access(path, os.X_OK):
            return path
    return None


def main():
    global OPTIONS, CRIU
    parser = argparse.ArgumentParser()
    for name in ("plugin", "counter", "other", "control"):
        parser.add_argument(f"--{name}", required=True, type=os.path.abspath)
    OPTIONS, rest = parser.parse_known_args()
    CRIU = find_criu()
    if os.geteuid() != 0 or not CRIU:
        print("needs root and CRIU")
        sys.exit(77)
    # So that no zombie keeps a pid that a restore needs, whatever the machine's init does.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    unittest.main(argv=[sys.argv[0], *rest], verbosity=2)


if __name__ == "__main__":
    main()
