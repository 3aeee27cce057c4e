"""What gets an error: one message that names the thing and what to do, the exit code of the manual, the process goes on with every
byte as it was, and nothing is left that looks like a checkpoint."""

import contextlib
import errno
import os
import re
import shutil
import socket
import struct
import subprocess
import sys

import harness
from harness import Case, IMAGE, MANIFEST, MEMCHECK, ODD


class Refusal(Case):
    def dump_refused(self, program, code, says=(), *args, **kwargs):
        """The message; the program goes on."""
        path = kwargs.pop("path", self.path("refused"))
        existed = os.path.isdir(path)
        message = self.refused(code, "dump", program.pid, path, *args, says=says, **kwargs)
        self.assertEqual(os.path.isdir(path), existed)
        self.no_checkpoint(path)
        program.go_on()
        return message

    @contextlib.contextmanager
    def mounted(self, options):
        path = self.path("mnt")
        os.makedirs(path, exist_ok=True)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=False).returncode:
            self.skipTest("no right to mount")
        try:
            yield path
        finally:
            subprocess.run(["umount", path], check=True)


class Processes(Refusal):
    def test_no_such_process(self):
        self.start_daemon()
        gone = subprocess.Popen(["/bin/true"])
        gone.wait()
        for command in (("dump", gone.pid, self.path("ck")), ("suspend", gone.pid), ("resume", gone.pid)):
            self.refused(1, *command, says=f"no process {gone.pid}")
        self.assertFalse(os.path.exists(self.path("ck")))

    def test_no_cuda(self):
        self.start_daemon()
        program = self.start(ODD, "plain")
        self.dump_refused(program, 3, ("does not use CUDA", "--allow-no-cuda", str(program.pid)))
        self.refused(3, "suspend", program.pid, says="does not use CUDA")
        program.go_on()

    def test_not_root(self):
        self.start_daemon()
        program = self.memcheck()
        nobody = {"user": 65534, "group": 65534, "extra_groups": []}
        try:
            fit = self.run_command([harness.BENNU, "--version"], **nobody).returncode == 0
        except PermissionError:
            fit = False
        if not fit:
            self.skipTest("nobody cannot read the build folder")
        os.chmod(self.dir, 0o777)
        self.dump_refused(program, 1, ("root", "sudo"), **nobody)
        self.refused(1, "suspend", program.pid, says="sudo", **nobody)
        image = self.dump(program)
        os.chmod(image, 0o755)
        self.refused(1, "restore", image, says="root", **nobody)
        self.restore(program)
        program.go_on()

    def test_managed_memory(self):
        self.start_daemon()
        program = self.start(ODD, "managed")
        self.dump_refused(program, 3, ("managed memory", "cuMemAllocManaged", str(program.pid)))
        self.refused(3, "suspend", program.pid, says="managed memory")
        program.go_on()

    def test_managed_memory_without_agent(self):
        self.start_daemon()
        program = self.start(ODD, "managed", agent=False)
        self.dump_refused(program, 3, ("managed memory",))
        self.refused(3, "suspend", program.pid, says="managed memory")
        program.go_on()

    def test_one_of_a_tree(self):
        self.start_daemon()
        script = f"{MEMCHECK} --allocs=4 --role=1 & {MEMCHECK} --allocs=4 --role=2 & {ODD} managed & wait"
        program = self.start("/bin/sh", "-c", script, roles=(0, 1, 2))
        self.dump_refused(program, 3, "managed memory")

    def test_imported_memory(self):
        self.start_daemon()
        for how in ("import-ipc", "import-vmm"):
            with self.subTest(how):
                program = self.start(ODD, how)
                self.dump_refused(program, 3, ("memory of another process", str(program.pid)))
                self.refused(3, "suspend", program.pid, says="memory of another process")
                program.go_on()
                program.kill()

    def test_memory_used_outside(self):
        """The program's child has given memory to it; the child alone is named. Both go on with the same memory."""
        self.start_daemon()
        for how in ("import-ipc", "import-vmm"):
            with self.subTest(how):
                program = self.start(ODD, how)
                child = harness.children_of(program.pid)[0]
                # Who has imported a descriptor is not known for sure, so others on the machine may be named instead.
                says = (str(child), "above both") + ((str(program.pid),) if how == "import-ipc" else ())
                self.refused(3, "dump", child, self.path("ck"), says=says)
                self.no_checkpoint(self.path("ck"))
                self.refused(3, "suspend", child, says=says)
                program.go_on()
                program.kill()

    def test_memory_used_outside_before(self):
        self.start_daemon()
        program = self.start(ODD, "closed-ipc")
        child = harness.children_of(program.pid)[0]
        self.ok("suspend", child)
        program.go_on()
        self.ok("resume", child)
        self.ok("suspend", program.pid)
        self.ok("resume", program.pid)
        program.go_on()

    def test_client_of_mps(self):
        self.start_daemon()
        for agent in (True, False):
            with self.subTest(agent=agent):
                trace = self.path(f"trace-{agent}")
                program = self.memcheck(agent=agent, env={"BENNU_SIM_MPS": "1", "BENNU_SIM_TRACE": trace})
                self.dump_refused(program, 3, ("MPS", str(program.pid)))
                self.refused(3, "suspend", program.pid, says="MPS")
                program.go_on()
                if agent:  # known beforehand: nothing was handed over to be copied
                    self.assertNotIn("cuMemExportToShareableHandle", harness.text_of(trace))
                    self.assertIn("MPS", self.ok("ps").stdout)

    def test_gpu_that_stays_busy(self):
        self.start_daemon()
        for agent in (True, False):
            with self.subTest(agent=agent):
                program = self.start(ODD, "busy", 40000, agent=agent)
                self.dump_refused(program, 1, str(program.pid))
                program.kill()

    def test_suspended_already(self):
        self.start_daemon()
        program = self.memcheck()
        self.ok("suspend", program.pid)
        self.refused(1, "dump", program.pid, self.path("ck"), says=f"bennu resume {program.pid}")
        self.no_checkpoint(self.path("ck"))
        self.ok("resume", program.pid)
        program.go_on()


    def test_in_another_session(self):
        self.start_daemon()
        program = self.tree()
        child = harness.children_of(program.pid)[0]
        header = harness.text_of(f"{harness.SOURCE}/src/wire/control.h")
        magic = int(re.search(r"BN_CTL_MAGIC\s+(0x[0-9a-f]+)u", header)[1], 16)
        version, begin = (int(re.search(rf"{name}[\s=]+(\d+)", header)[1])
                          for name in ("BN_CTL_VERSION", "BN_CTL_DUMP_BEGIN"))
        head = struct.Struct("<IHHIi32s512s")
        os.mkdir(self.path("held"))

        def begin_dump(pid):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.addCleanup(sock.close)
            sock.connect(f"{self.rundir}/bennud.sock")
            folder = os.open(self.path("held"), os.O_RDONLY)
            socket.send_fds(sock, [head.pack(magic, version, begin, 0, 0, b"", b"") + struct.pack("<II", pid, 0)], [folder])
            os.close(folder)
            fields = head.unpack_from(sock.recv(65536))
            return sock, fields[4], fields[6].rstrip(b"\0").decode()

        session, code, text = begin_dump(program.pid)
        self.assertEqual(code, 0, text)
        for pid in (program.pid, child):
            says = ("at work", str(program.pid))
            self.refused(1, "suspend", pid, says=says)
            self.refused(1, "dump", pid, self.path("ck"), says=says)
            other, code, text = begin_dump(pid)
            other.close()
            self.assertEqual(code, errno.EBUSY)
            self.assertIn("at work", text)
        session.close()
        program.go_on()
        harness.wait_for(lambda: os.listdir(self.path("held")) == [], "nothing of the dump is left")
        self.ok("suspend", child)
        other, code, text = begin_dump(program.pid)
        other.close()
        self.assertEqual(code, errno.EALREADY)
        self.assertIn(f"bennu resume {child}", text)
        self.ok("resume", child)
        program.go_on()


class Directories(Refusal):
    def test_directory(self):
        self.start_daemon()
        program = self.memcheck()
        full, file = self.path("full"), self.path("file")
        os.mkdir(full)
        for path in (f"{full}/kept", file):
            with open(path, "w", encoding="utf-8") as f:
                f.write("kept")
        self.refused(1, "dump", program.pid, full, says=(full, "not empty"))
        self.refused(1, "dump", program.pid, file, says=(file, "not a directory"))
        self.refused(1, "dump", program.pid, self.path("no/such"), says=(self.path("no/such"), "parent"))
        self.assertEqual((os.listdir(full), harness.text_of(file)), (["kept"], "kept"))
        program.go_on()
        os.mkdir(self.path("empty"))
        self.dump(program, name="empty")
        other = self.memcheck()
        self.refused(1, "dump", other.pid, self.path("empty"), says="not empty")
        other.go_on()
        self.restore(program, self.path("empty"))
        program.go_on()

    def test_read_only(self):
        self.start_daemon()
        program = self.memcheck()
        with self.mounted("ro,size=64m") as path:
            self.dump_refused(program, 1, (path, "cannot write"), path=path)

    def test_too_small(self):
        self.start_daemon()
        program = self.memcheck()
        with self.mounted("size=8m") as path:
            self.dump_refused(program, 1, (path, "free", "needed"), path=path)
        for size in (2, 6, 10, 14):
            with self.subTest(size=size), self.mounted(f"size={size}m") as path:
                self.dump_refused(program, 1, (), "--no-space-check", path=path)


class Surroundings(Refusal):
    def test_daemon_not_running(self):
        program = self.memcheck()
        self.dump_refused(program, 4, ("bennud", "start"))
        for command in (("suspend", program.pid), ("resume", program.pid), ("ps",)):
            self.refused(4, *command, says=("bennud", "start"))
        program.go_on()
        self.start_daemon()
        image = self.dump(program)
        self.stop_daemon()
        self.refused(4, "restore", image, says=("bennud", "start"))
        self.assertFalse(harness.alive(program.pid))
        self.start_daemon()
        self.restore(program)
        program.go_on()

    def test_criu_missing_or_too_old(self):
        self.start_daemon()
        program = self.memcheck()
        old = self.path("criu-old")
        with open(old, "w", encoding="utf-8") as f:
            f.write("#!/bin/sh\necho 'Version: 3.17'\n")
        os.chmod(old, 0o755)
        image = self.dump(program, "--leave-running")
        cases = (("/nonexistent", ("/nonexistent", "BENNU_CRIU")), (old, (old, "3.17", "4.0 or newer")))
        for criu, says in cases:
            self.dump_refused(program, 1, says, env={"BENNU_CRIU": criu})
        program.kill()
        for criu, says in cases:
            self.refused(1, "restore", image, says=says, env={"BENNU_CRIU": criu})
        program.will_go_back()
        self.restore(program, image)
        program.go_on()

    def test_plugin_missing(self):
        self.start_daemon()
        program = self.memcheck()
        self.dump_refused(program, 1, ("/nonexistent", "BENNU_PLUGIN_DIR"), env={"BENNU_PLUGIN_DIR": "/nonexistent"})


class Images(Refusal):
    """Images that must not be restored. Nothing of them is left running, and the image is as good as before."""

    def setUp(self):
        super().setUp()
        self.start_daemon()

    def image_refused(self, code, says=(), inspect=None):
        """`inspect`: the exit code of inspect --verify."""
        message = self.refused(code, "restore", self.path("ck"), "--detach", says=says)
        self.nothing_left(self.programs[0])
        if inspect is not None:
            self.refused(inspect, "inspect", "--verify", self.path("ck"), says=says)
        return message

    @contextlib.contextmanager
    def changed(self, name):
        """The path of a file of the image, which may be spoilt and is put back afterwards."""
        path = self.path("ck", name)
        shutil.copy(path, self.path("kept"))
        yield path
        shutil.copy(self.path("kept"), path)

    @staticmethod
    def flip(path, at):
        with open(path, "r+b") as f:
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 0x10]))

    def test_not_a_checkpoint(self):
        os.mkdir(self.path("empty"))
        for command in ("restore", "inspect"):
            self.refused(5, command, self.path("empty"), says=(self.path("empty"), "not a checkpoint"))
            self.refused(5, command, "/dev/null", says="/dev/null")
            self.refused(1, command, self.path("nowhere"), says=self.path("nowhere"))

    def flips(self, packs):
        size = os.path.getsize(self.path("ck", packs[0]))
        for at in (0, size // 2, size - 1):
            with self.changed(packs[0]) as path:
                self.flip(path, at)
                message = self.image_refused(5, packs[0], inspect=5)
                self.assertRegex(message, r"chunk \d+ \(process \d+ .*segment \d+ at 0x[0-9a-f]+, byte \d+ of it\)")

    def test_damaged(self):
        program = self.tree()
        image = self.dump(program)
        packs = sorted(n for n in os.listdir(image) if n.startswith("bennu-pack-"))
        self.assertTrue(packs)
        size = os.path.getsize(self.path("ck", packs[0]))
        self.flips(packs)  # found on the GPU
        self.assertEqual(self.stop_daemon(), 0)
        self.start_daemon(BENNU_SIM_HASH="wrong")
        self.assertIn("the CPU hashes what is on GPU 0: GPU 0 (Simulated GPU) gives other hashes than the CPU",
                      harness.text_of(self.daemon_log))
        self.assertIn("[warn] GPU 0 hashing", re.sub(" +", " ", self.bennu("check").stdout))
        self.flips(packs)  # found by the CPU
        for length in (0, size // 2, size - 4096):
            with self.changed(packs[0]) as path:
                os.truncate(path, length)
                self.image_refused(5, packs[0], inspect=5)
        with self.changed(packs[0]) as path:
            os.unlink(path)
            self.image_refused(5, "bennu-pack", inspect=5)
        length = os.path.getsize(self.path("ck", MANIFEST))
        for at in (0, 40, length // 2, length - 1):
            with self.changed(MANIFEST) as path:
                self.flip(path, at)
                self.image_refused(5, MANIFEST, inspect=5)
        with self.changed(MANIFEST) as path:
            os.truncate(path, length // 2)
            self.image_refused(5, MANIFEST, inspect=5)
        with self.changed(MANIFEST) as path:
            os.unlink(path)
            self.image_refused(5, MANIFEST, inspect=5)
        with self.changed("inventory.img") as path:
            os.unlink(path)
            self.image_refused(5, "inventory.img", inspect=5)
        self.restore(program)
        program.go_on()

    def test_damaged_host_memory(self):
        """CRIU's files. What processes had in memory is compared while CRIU reads it, the rest before."""
        program = self.memcheck("--allocs=4")
        image = self.dump(program)
        names = {name: size for name, size in harness.files_of_criu(image).items() if size}
        self.assertIn("bennu-command.json", names)
        pages = max(names, key=names.get)
        self.assertRegex(pages, r"^pages-\d+\.img$")
        self.assertGreater(names[pages], 2 << 20)
        self.assertGreater(len(names), 10)
        for name, size in names.items():
            for at in {0, size // 2, size - 1} if name == pages else {size // 2}:
                with self.changed(name) as path:
                    self.flip(path, at)
                    where = "" if name.endswith(".json") else f"bytes {at >> 21 << 21} to "  # that one may make no sense any more
                    self.image_refused(5, (name, "is damaged", where), inspect=5)
        for name in (pages, next(n for n in names if n.startswith("core-"))):
            with self.changed(name) as path:
                os.truncate(path, os.path.getsize(path) - 1)
                self.image_refused(5, name, inspect=5)
                said = self.bennu("store", "verify", self.dir, "ck")
                self.assertEqual((said.returncode, said.stdout.count("\n")), (5, 1), said.stdout)
                self.assertIn(name, said.stdout)
            with self.changed(name) as path:
                os.unlink(path)
                self.image_refused(5, (name, "missing"), inspect=5)
        self.restore(program)
        program.go_on()

    def test_damaged_on_its_way(self):
        """What arrives on the GPU is not what the image holds, which is whole."""
        program = self.memcheck()
        self.dump(program)
        self.assertEqual(self.stop_daemon(), 0)
        self.start_daemon(BENNU_SIM_HASH="later")
        self.image_refused(5, ("is whole in the checkpoint", "lies on GPU 0 (Simulated GPU)"))
        self.assertEqual(self.stop_daemon(), 0)
        self.start_daemon()
        self.restore(program)
        program.go_on()

    def edit(self, path, what, value):
        done = self.run_command([IMAGE, path, what, value])
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_other_chip(self):
        program = self.memcheck()
        self.dump(program)
        with self.changed(MANIFEST) as path:
            self.edit(path, "cc", "1.3")
            self.image_refused(1, ("Simulated GPU", "1.3", "same type"))
        self.restore(program)
        program.go_on()

    def test_older_driver(self):
        program = self.memcheck()
        self.dump(program)
        with self.changed(MANIFEST) as path:
            self.edit(path, "driver", "99010")
            self.image_refused(1, ("99.1", "13.0", "newer driver"))
        self.assertEqual(self.stop_daemon(), 0)
        self.start_daemon(BENNU_SIM_DRIVER_VERSION="12080")
        self.image_refused(1, ("13.0", "12.8", "newer driver"))
        self.assertEqual(self.stop_daemon(), 0)
        self.start_daemon(BENNU_SIM_DRIVER_VERSION="13010")
        self.restore(program)
        program.go_on()

    def test_not_enough_gpu_memory(self):
        program = self.start(ODD, "hold", 160)
        self.dump(program)
        other = self.start(ODD, "hold", 160)
        message = self.refused(1, "restore", self.path("ck"), "--detach", says="memory")
        self.assertIn("free", message)
        self.nothing_left(program, other.pid)
        other.go_on()
        other.kill()
        self.restore(program)
        program.go_on()

    def test_criu_fails_at_once(self):
        """Before it has called the plugin: the daemon has nothing to say. The checkpoint does not know what CRIU's files were."""
        image = self.dump(self.memcheck())
        self.edit(self.path("ck", MANIFEST), "files", "none")
        with open(os.path.join(image, "inventory.img"), "r+b") as f:
            f.truncate(6)
        self.refused(1, "restore", image, "--detach", says="CRIU")

    def test_port_is_taken(self):
        """Connections of a killed program outlive it for a minute, and have its ports: they make way. Another program does not."""
        connected = """if True:
            import os, socket, sys
            listener = socket.create_server(("127.0.0.1", 0))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            client = socket.create_connection(listener.getsockname())
            server = listener.accept()[0]
            for s in (listener, client, server):
                s.set_inheritable(True)
            print("port", listener.getsockname()[1], flush=True)
            os.execv(sys.argv[1], sys.argv[1:])"""
        with open(self.path("criu.conf"), "w", encoding="utf-8") as f:
            f.write("network-lock skip\n")
        self.env["CRIU_CONFIG_FILE"] = self.path("criu.conf")
        program = self.start(sys.executable, "-c", connected, MEMCHECK, "--allocs=2", "--max=1M")
        port = int(re.search("port ([0-9]+)", harness.text_of(program.out))[1])
        self.dump(program, "--live", "--leave-running")

        def connections(of, state):  # "0: 0100007F:8A2B 0100007F:C0DE 06 …"
            sockets = [line.split() for line in harness.text_of("/proc/net/tcp").splitlines()[1:]]
            return [s for s in sockets if s[3] == state and f":{of:04X}" in (s[1][-5:], s[2][-5:])]
        program.kill()
        harness.wait_for(lambda: connections(port, "06"), "its connection is in TIME_WAIT")
        with socket.create_server(("127.0.0.1", 0)) as unrelated:
            with socket.create_connection(unrelated.getsockname()) as client, unrelated.accept()[0]:
                apart = client.getsockname()[1]
        harness.wait_for(lambda: connections(apart, "06"), "another one is, too")
        program.will_go_back()
        self.restore(program)
        program.go_on()
        self.assertEqual(len(connections(port, "01")), 2)
        self.assertFalse(connections(port, "06"))
        self.assertTrue(connections(apart, "06"))

        self.dump(program, name="again")  # CRIU ends connections without a trace
        with socket.create_server(("127.0.0.1", port)):
            self.refused(1, "restore", self.path("again"), "--detach", says=("a port of it is in use", "TIME_WAIT"))
        self.nothing_left(program)
        self.restore(program, self.path("again"))
        program.go_on()

    def test_pid_is_taken(self):
        program = self.memcheck()
        image = self.dump(program, "--leave-running")
        self.refused(1, "restore", image, says=(str(program.pid), "memcheck"))
        program.go_on()


if __name__ == "__main__":
    harness.main()
