#!/usr/bin/env python3
"""podman container checkpoint and restore of containers that use a GPU. See run and harness.py."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import unittest

import harness
from harness import BENNU, LIBS, MANIFEST, PATIENCE, SMALL, STORAGE, Case, agents_in, call, has_sys_resource, processes_with, text_of, wait_for


class Cycle(Case):
    def test_again_and_again(self):
        c = self.container().run()
        self.assertTrue(agents_in(c.pid))
        for _ in range(3):
            c.checkpoint()
            self.assertTrue(os.path.exists(f"{c.checkpoint_dir}/{MANIFEST}"))
            c.restore()
            self.assertFalse(os.path.exists(c.checkpoint_dir))
            self.assertTrue(agents_in(c.pid))

    def test_distributions_criu(self):
        """No network connection, thus no newer CRIU on any kernel."""
        c = self.container(kinds=["gpu"]).run(command=["/memcheck", *SMALL])
        for _ in range(2):
            c.checkpoint()
            self.assertEqual(len(self.manifest(c.checkpoint_dir)["processes"]), 1)
            c.restore()

    def test_tree_of_processes(self):
        c = self.container().run(command=["/talk", "/memcheck", *SMALL, "--children=2"])
        c.checkpoint()
        self.assertEqual(len(self.manifest(c.checkpoint_dir)["processes"]), 3)
        c.restore()

    def test_driver_at_its_short_name(self):
        c = self.container().run(image="glibc-bare", device="direct")
        self.assertTrue(agents_in(c.pid))
        c.checkpoint()
        c.restore()

    def test_several_at_once(self):
        """Three with a GPU and a plain one, which stays out of it all."""
        plain = self.container("plain", kinds=["talk"]).run(device=None, command=["/talk"])
        three = [self.container(name).run() for name in "abc"]
        self.both(lambda c: c.checkpoint(), *three)
        plain.go_on()
        self.both(lambda c: c.restore(), *three)
        a, *others = three
        a.checkpoint()
        for c in (*others, plain):
            c.go_on()
        a.restore()

    def test_gpu_and_plain_at_once(self):
        a, b = self.container("a").run(), self.container("b", kinds=["talk"]).run(device=None, command=["/talk"])
        self.both(lambda c: c.checkpoint(), a, b)
        self.assertFalse(os.path.exists(f"{b.checkpoint_dir}/{MANIFEST}"))
        self.both(lambda c: c.restore(), a, b)

    def both(self, work, *containers):
        failures = []

        def one(c):
            try:
                work(c)
            except BaseException as e:
                failures.append(e)
        threads = [threading.Thread(target=one, args=(c,)) for c in containers]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if failures:
            raise failures[0]


class Options(Case):
    def test_leave_running(self):
        c = self.container().run()
        c.checkpoint("--leave-running")
        c.go_on()
        c.checkpoint("--leave-running")
        c.go_on()
        c.checkpoint()
        c.restore()

    def test_keep(self):
        c = self.container().run()
        c.checkpoint("--keep")
        self.assertIn("Dumping finished successfully", text_of(f"{c.bundle}/dump.log"))
        c.restore("--keep")
        self.assertTrue(os.path.exists(f"{c.checkpoint_dir}/{MANIFEST}"))
        c.kill()
        c.backs += 1
        c.restore()
        self.assertFalse(os.path.exists(c.checkpoint_dir))

    def test_file_locks(self):
        c = self.container().run(command=["/talk", "--lock", "/tmp/lock", "--file", "/tmp/file", "/memcheck", *SMALL])
        self.assertNotEqual(c.podman_says("container", "checkpoint", "--tcp-established", c.name).returncode, 0)
        c.go_on()
        c.checkpoint("--file-locks")
        c.restore("--file-locks")

    def test_print_stats(self):
        c = self.container().run()
        stats = json.loads(c.checkpoint("--print-stats"))["container_statistics"][0]
        self.assertGreater(stats["criu_statistics"]["pages_written"], 0)
        stats = json.loads(c.restore("--print-stats"))["container_statistics"][0]
        self.assertGreater(stats["criu_statistics"]["pages_restored"], 0)

    def test_ignore_rootfs(self):
        c = self.container(tcp=False).run()
        c.podman("exec", c.name, "/bin/touch", "/left-behind")
        c.checkpoint("--ignore-rootfs", "--export", self.path("c.tar"), "--compress", "none")
        c.remove()
        c = c.import_as("two", self.path("c.tar"), "--ignore-rootfs")
        self.assertNotIn("left-behind", c.podman("exec", c.name, "/bin/ls", "/"))

    def test_by_its_name(self):
        """bennu's commands for a process take a container's name; what is copied ahead is what the next checkpoint need not send."""
        c = self.container().run()
        call(BENNU, "suspend", c.name)
        call(BENNU, "resume", c.inspect("{{.Id}}"))
        c.go_on()
        ahead = json.loads(call(BENNU, "pre-dump", "--json", c.name))
        self.assertGreater(ahead["sent_bytes"], 0)
        c.checkpoint()
        self.assertIn("take-over", [p["name"] for p in self.manifest(c.checkpoint_dir)["phases"]])
        c.restore()

    def test_paused(self):
        """Its agent would not answer: that is said at once, and nothing is touched."""
        c = self.container().run()
        c.podman("pause", c.name)
        for command in ("suspend", "resume", "pre-dump"):
            done = subprocess.run([BENNU, command, c.name], capture_output=True, text=True, check=False)
            self.assertEqual(done.returncode, 1, done.stderr)
            self.assertEqual(done.stderr, f"bennu {command}: container '{c.name}' is paused: 'podman unpause {c.name}' first\n")
        c.podman("unpause", c.name)
        call(BENNU, "suspend", c.name)
        c.podman("pause", c.name)
        self.assertNotEqual(subprocess.run([BENNU, "resume", c.name], capture_output=True, check=False).returncode, 0)
        c.podman("unpause", c.name)
        call(BENNU, "resume", c.name)
        c.go_on()

    def test_pre_checkpoint(self):
        """Host memory ahead of a checkpoint: where the kernel cannot tell which was written since, Podman refuses and nothing happens."""
        c = self.container().run()
        said = c.podman_says("container", "checkpoint", "--pre-checkpoint", *c.options(), c.name)
        c.go_on()
        self.assertTrue(agents_in(c.pid))
        if said.returncode != 0:
            self.assertRegex(said.stderr, "memory tracking|missing features")
            c.checkpoint()
        else:
            c.checkpoint("--with-previous")
        self.assertEqual(len(self.manifest(c.checkpoint_dir)["processes"]), 1)
        c.restore()

    def test_connection_to_the_outside(self):
        with Echo("0.0.0.0") as echo:
            c = self.container().run(command=["/talk", "--connect", f"10.88.0.1:{echo.port}", "/memcheck", *SMALL])
            for _ in range(2):
                c.checkpoint()
                c.restore()
            self.assertEqual(echo.connections, 1)

    def test_shm_of_the_host(self):
        """Podman's restore would replace all files in the machine's /dev/shm, its own locks among them, and hang from then on."""
        shared = self.container("shared", tcp=False).run("--ipc=host")
        for args in ((), ("--leave-running",), ("--export", self.path("c.tar"))):
            self.assertNotEqual(shared.podman_says("container", "checkpoint", *args, shared.name).returncode, 0)
            self.assertRegex(text_of(f"{shared.bundle}/dump.log"), r"Error \(bennu\): .*--shm-size")
            shared.go_on()
        self.assertTrue(agents_in(shared.pid))
        own = self.container("own", tcp=False).run("--shm-size=200m", "--volume=/dev/shm:/mnt")
        own.checkpoint()
        own.restore()
        shared.go_on()

    def test_connection_lost_without_option(self):
        """Refused before anything is lost."""
        c = self.container().run()
        self.assertNotEqual(c.podman_says("container", "checkpoint", c.name).returncode, 0)
        c.go_on()
        self.assertTrue(agents_in(c.pid))
        c.checkpoint()
        c.restore()


class Upgrade(Case):
    """Another build of Bennu is installed over the one that a container was started with."""

    def setUp(self):
        super().setUp()
        old = harness.AGENT[0]
        shutil.copy(old, self.path("old.so"))
        with open(old, "rb") as f:
            text = bytearray(f.read())
        note = text.find(b"\x03\0\0\0GNU\0") + 8
        self.assertGreater(note, 8, "the agent has a build id")
        text[note] ^= 0xff
        with open(self.path("new.so"), "wb") as f:
            f.write(text + b"\0")  # of another length, too
        self.addCleanup(call, harness.BENNU, "install")
        self.addCleanup(shutil.copy, self.path("old.so"), old)

    @staticmethod
    def agent_of(c):
        """The folder that the container's agent is mounted from."""
        return re.search(r"\S*(/agents/[^/ ]+)/libbennu\.so ", text_of(f"/proc/{c.pid}/mountinfo")).group(1)

    def test_between_checkpoint_and_restore(self):
        a = self.container("a", tcp=False).run()
        first = self.agent_of(a)
        a.checkpoint("--export", self.path("a.tar"), "--compress", "none")
        # As a package does it: another file under the same name.
        os.rename(shutil.copy(self.path("new.so"), harness.AGENT[0] + ".new"), harness.AGENT[0])
        call(harness.BENNU, "install")
        a.restore()
        b = self.container("b", tcp=False).run()
        self.assertEqual(self.agent_of(a), first)
        self.assertNotEqual(self.agent_of(b), first)
        self.assertTrue(agents_in(a.pid) and agents_in(b.pid))
        for c in (a, b):
            c.checkpoint()
            self.assertEqual(len(self.manifest(c.checkpoint_dir)["processes"]), 1)
            c.restore()
        a.remove()
        copy = b.import_as("copy", self.path("a.tar"), older=True)
        self.assertEqual(self.agent_of(copy), first)


class Export(Case):
    def cycle(self, compress):
        c = self.container(tcp=False).run(command=["/talk", "--unix", "--file", "/data", "/memcheck", *SMALL])
        c.checkpoint("--export", self.path("c.tar"), "--compress", compress)
        c.remove()
        d = c.import_as("another", self.path("c.tar"))
        self.assertTrue(agents_in(d.pid))
        return d

    def test_uncompressed(self):
        self.in_its_own_group(self.cycle("none"))

    def in_its_own_group(self, c):
        """runc before 1.2 does not tell CRIU of it, so that plain containers come back in the group of the container that they were; and then
        a checkpoint fails, as runc freezes an empty group."""
        self.assertTrue(text_of(f"/proc/{c.pid}/cgroup").strip().endswith(c.inspect("{{.Id}}")))
        c.checkpoint()
        c.restore()
        c.checkpoint("--export", self.path("again.tar"), "--compress", "none")
        third = c.import_as("third", self.path("again.tar"))
        third.podman("pause", third.name)
        third.podman("unpause", third.name)
        third.checkpoint()
        third.restore()

    def test_by_the_drivers_path(self):
        c = self.container(tcp=False).run("--annotation", "dev.bennu.agent=off")
        c.checkpoint("--export", self.path("c.tar"), "--compress", "none")
        self.in_its_own_group(c.import_as("another", self.path("c.tar")))

    def test_zstd(self):
        self.cycle("zstd")

    def test_gzip(self):
        self.cycle("gzip")

    def test_with_its_connections(self):
        c = self.container().run(command=["/talk", "--file", "/data", "/memcheck", *SMALL])
        c.checkpoint("--export", self.path("c.tar.zst"))
        c.remove()
        c = c.import_as("one", self.path("c.tar.zst"))
        c.checkpoint()
        c.restore()

    def test_connections_under_another_name(self):
        """Podman does not take --tcp-established together with --name; what CRIU's configuration says it need not."""
        config = "/etc/criu/runc.conf"
        with open(config, "w", encoding="utf-8") as f:
            f.write("tcp-established\n")
        self.addCleanup(os.unlink, config)
        c = self.container().run()
        c.checkpoint("--export", self.path("c.tar"), "--compress", "none")
        c.remove()
        c.tcp_by_config = True
        d = c.import_as("another", self.path("c.tar"))
        d.checkpoint()
        d.restore()

    def test_as_an_image(self):
        c = self.container(tcp=False).run()
        c.checkpoint("--create-image", "saved")
        self.addCleanup(call, "podman", "rmi", "--force", "saved")
        c.remove()
        for name in ("first", "second"):
            d = c.import_as(name, "saved", image=True)
            self.assertTrue(agents_in(d.pid))
        d.checkpoint()
        d.restore()

    def test_copies_beside_the_original(self):
        c = self.container(tcp=False).run()
        c.checkpoint("--leave-running", "--export", self.path("c.tar"), "--compress", "none")
        c.go_on()
        copies = [c.import_as(n, self.path("c.tar"), older=True) for n in ("copy-1", "copy-2")]
        for each in [c] + copies:
            each.go_on()
        self.assertTrue(all(agents_in(each.pid) for each in copies))
        copies[0].checkpoint()
        for each in [c] + copies[1:]:
            each.go_on()
        copies[0].restore()

    def test_import_without_daemon(self):
        c = self.container(tcp=False).run()
        c.checkpoint("--export", self.path("c.tar.zst"))
        c.remove()
        self.stop_daemon()
        c = c.import_as("one", self.path("c.tar.zst"))
        self.start_daemon()
        c.checkpoint()
        c.restore()


class Ways(Case):
    """How the agent gets in, or not."""

    def test_agent_switched_off(self):
        c = self.container(tcp=False).run("--annotation", "dev.bennu.agent=off")
        self.assertFalse(agents_in(c.pid))
        c.checkpoint()
        c.restore()
        self.assertFalse(agents_in(c.pid))
        c.checkpoint("--export", self.path("c.tar"), "--compress", "none")
        c.remove()
        c.import_as("two", self.path("c.tar"))

    def test_agent_preloaded(self):
        c = self.container().run("--annotation", "dev.bennu.agent=preload")
        self.assertTrue(agents_in(c.pid))
        c.checkpoint()
        c.restore()

    def test_preload_of_others_is_kept(self):
        other = "/usr/lib/other.so"
        shutil.copy(f"{LIBS}/libm.so.6", self.path("other.so"))
        for wish in ("mount", "preload"):
            with self.subTest(wish):
                c = self.container(wish).run("--env", f"LD_PRELOAD={other}", "--volume", f"{self.path('other.so')}:{other}:ro",
                                             "--annotation", f"dev.bennu.agent={wish}")
                self.assertIn(other, text_of(f"/proc/{c.pid}/maps"))
                self.assertTrue(agents_in(c.pid))
                c.checkpoint()
                c.restore()

    def test_cdi_device(self):
        """As engines that know no hooks are given the agent: here Podman's is told to stay out."""
        c = self.container(tcp=False).run("--device", "bennu.dev/agent=all", "--annotation", "dev.bennu.agent=off")
        self.assertIn("LD_PRELOAD=/.bennu/libbennu.so", text_of(f"/proc/{c.pid}/environ").split("\0"))
        self.assertTrue(agents_in(c.pid))
        c.checkpoint()
        c.restore()
        c.checkpoint("--export", self.path("c.tar"), "--compress", "none")
        c.remove()
        c.import_as("two", self.path("c.tar"))

    def test_chosen_containers(self):
        """By the annotation, or by the CDI device."""
        call(BENNU, "install", "--containers=chosen")
        self.addCleanup(call, BENNU, "install", "--containers=all")
        without = self.container("without", tcp=False).run()
        by_hook = self.container("annotation", tcp=False).run("--annotation", "dev.bennu.agent=on")
        by_cdi = self.container("device", tcp=False).run("--device", "bennu.dev/agent=all")
        self.assertEqual([len(agents_in(c.pid)) for c in (without, by_hook, by_cdi)], [0, 1, 1])
        for c in (without, by_hook, by_cdi):
            c.checkpoint()
        for c in (without, by_hook, by_cdi):
            c.restore()

    def test_cdi_device_beside_the_hook(self):
        c = self.container(tcp=False).run("--device", "bennu.dev/agent=all")
        self.assertEqual(len(agents_in(c.pid)), 1)
        self.assertNotIn("/.bennu/driver", text_of(f"/proc/{c.pid}/mountinfo"))
        c.checkpoint()
        c.restore()

    def test_exec_finds_the_agent(self):
        c = self.container().run()
        c.podman("exec", "--detach", c.name, "/bin/env", "-i", "CR_KERNELS=/kernels.ptx", "/memcheck", "--max=4321")
        pid = wait_for(lambda: [p for p in processes_with("--max=4321") if agents_in(p)], "the second program starts")[0]
        os.kill(pid, signal.SIGKILL)

    def test_musl(self):
        if not os.path.exists(f"{harness.STAGE}/musl"):
            self.skipTest("no program of musl's on this architecture")
        c = self.container(kinds=["musl"]).run(image="musl", command=["/musl"])
        self.assertNotIn("libbennu", text_of(f"/proc/{c.pid}/maps"))
        c.checkpoint("--export", self.path("c.tar"))
        c.restore()
        c.checkpoint()
        c.restore()

    def as_user(self, *args):
        """Without CAP_SYS_RESOURCE another user's processes can be dumped only in a user namespace of root's, and CRIU 4.1 cannot
        restore those, plain or not: they have no right to its images."""
        if not has_sys_resource():
            args += ("--userns=auto",)
        c = self.container(tcp=False).run(*args, image="glibc-user")
        uid = os.stat(f"/proc/{c.pid}").st_uid
        self.assertNotEqual(uid, 0)
        self.assertTrue(agents_in(c.pid))
        c.checkpoint("--leave-running")
        self.assertEqual(len(self.manifest(c.checkpoint_dir)["processes"]), 1)
        c.go_on()
        if has_sys_resource():
            c.checkpoint()
            c.restore()
            self.assertEqual(os.stat(f"/proc/{c.pid}").st_uid, uid)

    def test_user_that_is_not_root(self):
        self.as_user()

    def test_no_rights_at_all(self):
        self.as_user("--cap-drop=all", "--security-opt=no-new-privileges")

    def test_root_that_is_read_only(self):
        c = self.container().run("--read-only")
        self.assertTrue(agents_in(c.pid))
        c.checkpoint()
        c.restore()

    def test_user_namespace(self):
        c = self.container(tcp=False).run("--userns=auto")
        self.assertTrue(agents_in(c.pid))
        self.assertNotEqual(os.stat(f"/proc/{c.pid}").st_uid, 0)
        c.checkpoint("--leave-running")
        self.assertEqual(len(self.manifest(c.checkpoint_dir)["processes"]), 1)
        c.go_on()

    def test_mapped_users_and_a_root_that_is_read_only(self):
        c = self.container(tcp=False).run("--uidmap=0:200000:65536", "--gidmap=0:200000:65536", "--read-only")
        self.assertTrue(agents_in(c.pid))
        self.assertEqual(os.stat(f"/proc/{c.pid}").st_uid, 200000)
        c.checkpoint("--leave-running")
        self.assertEqual(len(self.manifest(c.checkpoint_dir)["processes"]), 1)
        c.go_on()

    def test_program_that_changes_its_user(self):
        """As sudo does: the loader heeds no variable then, and the agent is there nevertheless."""
        c = self.container(tcp=False).run(image="glibc-setuid", command=["/talk", "--unix", "/setuid/memcheck", *SMALL])
        gpu = processes_with("/setuid/memcheck")
        gpu = [p for p in gpu if "talk" not in text_of(f"/proc/{p}/comm")]
        self.assertEqual([os.stat(f"/proc/{p}").st_uid for p in gpu], [0])
        self.assertTrue(agents_in(gpu[0]))
        c.go_on()

    def test_namespaces_of_the_host(self):
        c = self.container().run("--pid=host", "--ipc=host")
        self.assertTrue(agents_in(c.pid))


class Neighbours(Case):
    """What else may be on the machine: MPS, and CRIU's own plugin, which is played by test/criu/other_plugin.c."""
    STOCK = "/usr/lib/criu/cuda_plugin.so"
    CONFIG = "/etc/criu/default.conf"

    def test_mps(self):
        """A client is refused with the reason and goes on, others work; and its memory can be freed."""
        client = self.container("client", tcp=False).run("--env", "BENNU_SIM_MPS=1")
        other = self.container("other", tcp=False).run()
        for _ in range(2):
            self.assertNotEqual(client.podman_says("container", "checkpoint", client.name).returncode, 0)
            self.assertRegex(text_of(f"{client.bundle}/dump.log"), r"Error \(bennu\): .*MPS")
            client.go_on()
        other.checkpoint()
        client.go_on()
        other.restore()
        call(BENNU, "suspend", "--keep-context", client.name)
        rested = json.loads(call(BENNU, "ps", "--json"))
        self.assertEqual([p["state"] for p in rested["processes"] if p["pid"] == client.pid], ["suspended"])
        other.go_on()
        call(BENNU, "resume", client.name)
        client.go_on()

    def stock_plugin(self):
        def away():
            os.unlink(self.STOCK)
            if os.path.exists(self.CONFIG):
                os.unlink(self.CONFIG)
            call(BENNU, "install")
        shutil.copy(f"{harness.BUILD}/test/criu/other_plugin.so", self.STOCK)
        self.addCleanup(away)

    def check(self):
        """What `bennu check` says of plugins, whatever else it finds."""
        said = subprocess.run([BENNU, "check"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
        return next(line for line in said.stdout.splitlines() if "system plugins" in line)

    @staticmethod
    def asked(c):
        """The plugins that the checkpoint names."""
        with open(f"{c.checkpoint_dir}/inventory.img", "rb") as f:
            inventory = f.read()
        return [name for name in (b"bennu", b"cuda_plugin") if name in inventory]

    def test_stock_plugin(self):
        self.stock_plugin()
        self.assertRegex(self.check(), "fail.*holds both plugins")
        self.assertIn("does not act", call(BENNU, "install"))
        self.assertRegex(self.check(), r"ok.*use Bennu's, too; CRIU's own cuda_plugin.so in /usr/lib/criu does not act")
        c, plain = self.container(tcp=False).run(), self.container("plain", kinds=["talk"], tcp=False).run(device=None, command=["/talk", "--unix"])
        for each, plugins in ((c, [b"bennu"]), (plain, [])):
            each.checkpoint("--keep")
            self.assertEqual(self.asked(each), plugins)
            each.restore()

    def test_stock_plugin_preferred(self):
        """The administrator says which folder."""
        self.stock_plugin()
        with open(self.CONFIG, "w", encoding="utf-8") as f:
            f.write("libdir /usr/lib/criu\n")
        self.assertIn("acts for podman and criu", call(BENNU, "install"))
        self.assertRegex(self.check(), "warn.*podman and plain criu use that one")
        plain = self.container(kinds=["talk"], tcp=False).run(device=None, command=["/talk", "--unix"])
        plain.checkpoint("--leave-running", "--keep")
        self.assertEqual(self.asked(plain), [b"cuda_plugin"])
        plain.go_on()


class WithoutDaemon(Case):
    daemon_wanted = False

    def test_cycle(self):
        c = self.container(tcp=False).run()
        self.assertTrue(agents_in(c.pid))
        c.checkpoint()
        self.assertTrue(os.path.exists(f"{c.checkpoint_dir}/{MANIFEST}"))
        c.restore()
        c.checkpoint("--export", self.path("c.tar"), "--compress", "none")
        c.remove()
        c.import_as("two", self.path("c.tar"))

    def test_plain(self):
        c = self.container(kinds=["talk"]).run(device=None, command=["/talk"])
        c.checkpoint()
        c.restore()

    def test_leave_running(self):
        c = self.container().run()
        c.checkpoint("--leave-running")
        c.go_on()
        c.checkpoint()
        c.restore()


class Trouble(Case):
    BIG = ["--allocs=8", "--min=4", "--max=24M"]

    def test_export_interrupted(self):
        """The checkpoint itself was done: the container is restored from it."""
        c = self.container().run(command=["/talk", "/memcheck", *self.BIG])
        archive = self.path("c.tar.gz")
        popen = c.podman_starts("container", "checkpoint", "--tcp-established", "--export", archive, "--compress", "gzip", c.name)
        wait_for(lambda: os.path.exists(archive) and os.path.getsize(archive) > 0, "the archive grows")
        popen.kill()
        popen.wait()
        wait_for(lambda: c.status == "exited", "podman sees that the container has ended")
        c.restore()
        c.checkpoint("--export", archive)
        c.remove()
        c.import_as("one", archive)

    def test_ctrl_c(self):
        """Podman and what it has started get the signal. They finish what they are at, or, early on, leave it."""
        c = self.container().run(command=["/talk", "/memcheck", *self.BIG])
        for name, log in (("checkpoint", "dump.log"), ("restore", "restore.log")):
            if name == "restore" and c.status == "running":
                c.go_on()
                c.checkpoint("--keep")
            popen = c.podman_starts("container", name, "--keep", "--tcp-established", c.name, start_new_session=True)
            wait_for(lambda path=f"{c.bundle}/{log}": os.path.exists(path), f"the {name} begins",
                     lambda p=popen: "it has ended" if p.poll() is not None else None)
            try:
                os.killpg(popen.pid, signal.SIGINT)
            except ProcessLookupError:
                pass  # it was faster
            popen.wait(PATIENCE)
            wait_for(lambda: not processes_with("swrk"), "the runtime's criu ends")
        self.goes_on_or_is_restorable(c)

    def test_podman_killed_while_it_dumps(self):
        c = self.container().run(command=["/talk", "/memcheck", *self.BIG])
        popen = c.podman_starts("container", "checkpoint", "--tcp-established", c.name)
        wait_for(lambda: os.path.exists(c.checkpoint_dir) and os.listdir(c.checkpoint_dir), "the checkpoint begins")
        popen.kill()
        popen.wait()
        wait_for(lambda: not processes_with("swrk"), "the runtime's criu ends")
        self.goes_on_or_is_restorable(c)

    def test_full_disk(self):
        c = self.container().run(command=["/talk", "/memcheck", *self.BIG])
        st = os.statvfs(STORAGE)
        for room in (20 << 20, 4 << 20, 1 << 20):
            with self.subTest(room=room):
                st = os.statvfs(STORAGE)
                used = (st.f_blocks - st.f_bfree) * st.f_frsize
                call("mount", "-o", f"remount,size={used + room}", STORAGE)
                try:
                    said = c.podman_says("container", "checkpoint", "--tcp-established", c.name)
                finally:
                    call("mount", "-o", "remount,size=8g", STORAGE)
                self.assertNotEqual(said.returncode, 0)
                self.assertEqual(c.status, "running")
                c.go_on()
        c.checkpoint()
        c.restore()

    def test_full_disk_of_an_export(self):
        c = self.container().run(command=["/talk", "/memcheck", *self.BIG])
        small = self.path("small")
        os.mkdir(small)
        call("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small)
        self.addCleanup(call, "umount", small)
        said = c.podman_says("container", "checkpoint", "--tcp-established", "--export", f"{small}/c.tar", "--compress", "none", c.name)
        self.assertNotEqual(said.returncode, 0)
        self.goes_on_or_is_restorable(c)

    def kill_daemon_at(self, moment, worker_only):
        c = self.container().run(command=["/talk", "/memcheck", *self.BIG])
        popen = c.podman_starts("container", "checkpoint", "--tcp-established", c.name)
        wait_for(lambda: moment(c), "the moment comes", lambda: "the checkpoint has ended" if popen.poll() is not None else None)
        self.kill_daemon(worker_only)
        popen.wait(PATIENCE)
        if not worker_only:
            self.start_daemon()
        self.goes_on_or_is_restorable(c)

    @staticmethod
    def dump_began(c):
        return os.path.exists(c.checkpoint_dir)

    def copying(self, c):
        return [n for n in self.files(c.checkpoint_dir) if n.startswith("bennu")]

    def criu_dumping(self, c):
        return [n for n in self.files(c.checkpoint_dir) if n.startswith("pages-")]

    def test_daemon_killed_when_the_dump_begins(self):
        self.kill_daemon_at(self.dump_began, False)

    def test_daemon_killed_while_it_copies(self):
        self.kill_daemon_at(self.copying, False)

    def test_daemon_killed_while_criu_dumps(self):
        self.kill_daemon_at(self.criu_dumping, False)

    def test_worker_killed_when_the_dump_begins(self):
        self.kill_daemon_at(self.dump_began, True)

    def test_worker_killed_while_it_copies(self):
        self.kill_daemon_at(self.copying, True)

    def test_worker_killed_while_criu_dumps(self):
        self.kill_daemon_at(self.criu_dumping, True)

    def test_worker_killed_while_it_restores(self):
        """Podman says so, nothing is left of it, and the checkpoint is as before."""
        c = self.container().run(command=["/talk", "/memcheck", *self.BIG, "--children=1"])
        c.checkpoint("--keep")
        for point in ("driver-restore:begin", "give-back:one", "open-gate:one"):
            with self.subTest(point):
                self.stop_daemon()
                self.start_daemon(BENNUD_TEST_KILL=point)
                self.assertNotEqual(c.podman_says("container", "restore", "--keep", "--tcp-established", c.name).returncode, 0)
                self.assertEqual(processes_with("/memcheck"), [])
                self.assertEqual(c.status, "exited")
        self.stop_daemon()
        self.start_daemon()
        c.restore()

    def test_daemon_killed_while_a_container_runs(self):
        c = self.container().run()
        self.kill_daemon(False)
        c.go_on()
        c.checkpoint()
        c.restore()
        self.start_daemon()
        c.checkpoint()
        self.stop_daemon()
        self.start_daemon()
        c.restore()

    def files(self, folder):
        try:
            return os.listdir(folder)
        except OSError:
            return []

    def goes_on_or_is_restorable(self, c):
        """What `podman ps` says is true, whichever it is; and the next checkpoint works."""
        wait_for(lambda: c.status in ("running", "exited"), "podman knows what the container does")
        if c.status == "running":
            c.go_on()
        else:
            c.restore()
        c.checkpoint()
        c.restore()


class Crun(Case):
    """With mounts without a type, as CDI makes them: crun 1.21 would crash in a restore, were it not for the hook."""
    runtime = "crun"
    other_name = "two"

    def setUp(self):
        super().setUp()
        if re.search(r"^cpuset\t[1-9]", text_of("/proc/cgroups"), re.M):
            # The host has cgroup v1's controllers beside v2's: as crun asks for it, CRIU would make groups there, outside of this root,
            # and may not write cpuset.cpu_exclusive.
            self.runtime = self.path("crun")
            with open(self.runtime, "w", encoding="utf-8") as f:
                f.write('#!/bin/bash\nfor word; do args+=("$word"); case $word in checkpoint | restore) '
                        'args+=(--manage-cgroups-mode=ignore) ;; esac; done\nexec /usr/bin/crun "${args[@]}"\n')
            os.chmod(self.runtime, 0o755)
            self.other_name = "one"  # its processes are to be in the group that the container had, which nobody makes then

    def test_cycle(self):
        c = self.container(runtime=self.runtime, tcp=False).run()
        c.checkpoint()
        self.assertTrue(os.path.exists(f"{c.checkpoint_dir}/{MANIFEST}"))
        c.restore()
        c.checkpoint("--export", self.path("c.tar"), "--compress", "none")
        c.remove()
        d = c.import_as(self.other_name, self.path("c.tar"))
        d.checkpoint("--leave-running")
        d.go_on()

    def test_with_connections(self):
        c = self.container(runtime=self.runtime).run()
        for _ in range(2):
            c.checkpoint()
            c.restore()

    def test_options(self):
        c = self.container(runtime=self.runtime).run(command=["/talk", "--lock", "/tmp/lock", "--file", "/tmp/file", "/memcheck", *SMALL])
        self.assertNotEqual(c.podman_says("container", "checkpoint", "--tcp-established", c.name).returncode, 0)
        c.go_on()
        stats = json.loads(c.checkpoint("--file-locks", "--print-stats", "--keep"))["container_statistics"][0]
        self.assertGreater(stats["criu_statistics"]["pages_written"], 0)
        stats = json.loads(c.restore("--file-locks", "--print-stats", "--keep"))["container_statistics"][0]
        self.assertGreater(stats["criu_statistics"]["pages_restored"], 0)

    def test_without_the_agent(self):
        """Switched off, or by CDI."""
        off = self.container("off", runtime=self.runtime, tcp=False).run("--annotation", "dev.bennu.agent=off")
        cdi = self.container("cdi", runtime=self.runtime, tcp=False).run("--device", "bennu.dev/agent=all")
        self.assertEqual([len(agents_in(c.pid)) for c in (off, cdi)], [0, 1])
        for c in (off, cdi):
            c.checkpoint()
            self.assertEqual(len(self.manifest(c.checkpoint_dir)["processes"]), 1)
            c.restore()

    def test_ignore_rootfs(self):
        c = self.container(runtime=self.runtime, tcp=False).run()
        c.podman("exec", c.name, "/bin/touch", "/left-behind")
        c.checkpoint("--ignore-rootfs", "--export", self.path("c.tar"), "--compress", "none")
        c.remove()
        c = c.import_as(self.other_name, self.path("c.tar"), "--ignore-rootfs")
        self.assertNotIn("left-behind", c.podman("exec", c.name, "/bin/ls", "/"))


class Echo:
    """A server outside of the container that sends back what it gets."""

    def __init__(self, address):
        self.listener = socket.create_server((address, 0))
        self.port = self.listener.getsockname()[1]
        self.connections = 0
        self.thread = threading.Thread(target=self.serve, daemon=True)

    def serve(self):
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.echo, args=(peer,), daemon=True).start()

    def echo(self, peer):
        with peer:
            while data := peer.recv(65536):
                peer.sendall(data)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.listener.close()


if __name__ == "__main__":
    harness.install()
    harness.make_images()
    result = unittest.main(verbosity=2, durations=0, exit=False).result
    if result.testsRun == len(result.skipped) > 0:
        sys.exit(77)
    sys.exit(not result.wasSuccessful())
