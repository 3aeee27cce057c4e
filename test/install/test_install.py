#!/usr/bin/env python3
"""Install into an empty folder and look at what is there: every file by name, what may be run, what systemd thinks of the
units, and that the programs run from where they were put.

Environment: BENNU_BUILD, BENNU_SOURCE (meson's test environment sets them)."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest

BUILD = os.environ["BENNU_BUILD"]
SOURCE = os.environ["BENNU_SOURCE"]

COMMANDS = ("check", "dump", "inspect", "install", "pre-dump", "ps", "restore", "resume", "run", "store", "suspend", "uninstall",
            "watch", "export", "import")


def run(*command, **more):
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **more)


def build_options():
    with open(os.path.join(BUILD, "meson-info", "intro-buildoptions.json"), encoding="utf-8") as options:
        return {option["name"]: option["value"] for option in json.load(options)}


OPTIONS = build_options()
PREFIX = OPTIONS["prefix"]
BINDIR, LIBDIR, LIBEXECDIR, MANDIR, DATADIR = (
    os.path.join(PREFIX, OPTIONS[name]) for name in ("bindir", "libdir", "libexecdir", "mandir", "datadir"))
DAEMON = os.path.join(LIBEXECDIR, "bennu/bennud")
AGENT = os.path.join(LIBDIR, "bennu/agent/libbennu.so")
UNITS = os.path.join(PREFIX, "lib/systemd/system")
PRIVATE_CRIU = os.path.join(LIBEXECDIR, "bennu/criu")
SANITIZED = OPTIONS["b_sanitize"] not in ("none", [], ["none"])


def criu_root():
    """The folder of the private CRIU that is part of the installation; None where the machine's own is used."""
    root = OPTIONS["criu_root"] or os.path.join(SOURCE, "build/criu")
    program = os.path.join(root, "bin/criu")
    return root if os.path.exists(program) and not os.path.islink(program) else None


def expected():
    """Every file that belongs to an installation, as it is named when it is in use; 'x' where it is to be run."""
    files = {
        os.path.join(BINDIR, "bennu"): "x",
        DAEMON: "x",
        AGENT: "",
        os.path.join(LIBDIR, "bennu/agent/libcuda.so.1"): "-> libbennu.so",
        os.path.join(LIBEXECDIR, "bennu/sim/libcuda.so.1"): "",
        os.path.join(LIBEXECDIR, "bennu/sim/libcuda.so"): "-> libcuda.so.1",
        os.path.join(LIBEXECDIR, "bennu/sim/kernels.ptx"): "",
        os.path.join(LIBEXECDIR, "bennu/bennu-oci-hook"): "x",
        os.path.join(DATADIR, "bennu/50-bennu.json.in"): "",
        os.path.join(DATADIR, "bennu/bennu.json.in"): "",
        os.path.join(UNITS, "bennud.service"): "",
        os.path.join(UNITS, "bennud.socket"): "",
        os.path.join(MANDIR, "man1/bennu.1"): "",
        os.path.join(MANDIR, "man8/bennud.8"): "",
    }
    if not SANITIZED:
        files[os.path.join(LIBDIR, "bennu/criu/bennu_plugin.so")] = ""
    for command in COMMANDS:
        files[os.path.join(MANDIR, f"man1/bennu-{command}.1")] = ""
    for document in ("LICENSE", "NEWS", "README.md", "ARCHITECTURE.md", "containers.md", "image-format.md", "COPYING.plugin"):
        files[os.path.join(DATADIR, "doc/bennu", document)] = ""
    root = criu_root()
    if root:
        for name in ("bin/criu", "runtime/criu", "lib/libcriu.so.2", "version"):
            files[os.path.join(PRIVATE_CRIU, name)] = "x" if name.endswith("criu") else ""
        for folder in ("doc", "runtime"):
            for name in os.listdir(os.path.join(root, folder)):
                what = "x" if os.access(os.path.join(root, folder, name), os.X_OK) else ""
                files[os.path.join(PRIVATE_CRIU, folder, name)] = what
    return files


def text_of(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


class Install(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.root = tempfile.mkdtemp(prefix="bennu-install.")
        cls.addClassCleanup(shutil.rmtree, cls.root)
        done = run("meson", "install", "-C", BUILD, "--no-rebuild", "--quiet",
                   env={**os.environ, "DESTDIR": cls.root})
        if done.returncode != 0:
            raise AssertionError("meson install failed:\n" + done.stdout + done.stderr)

    def at(self, path):
        return self.root + path

    def installed(self):
        found = {}
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(folder, name)
                found[path[len(self.root):]] = path
        return found

    def test_files(self):
        found, want = self.installed(), expected()
        self.assertEqual(sorted(set(want) - set(found)), [], "missing")
        self.assertEqual(sorted(set(found) - set(want)), [], "not expected; is this list to be extended?")
        for name, what in want.items():
            path = found[name]
            if what.startswith("-> "):
                self.assertEqual(os.readlink(path), what[3:], name)
                continue
            self.assertFalse(os.path.islink(path), name)
            mode = os.stat(path).st_mode
            self.assertFalse(mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IWGRP | stat.S_IWOTH), name)
            self.assertTrue(mode & stat.S_IROTH, name)
            if what == "x":
                self.assertTrue(mode & stat.S_IXOTH, name)

    def test_nothing_names_the_build_folder(self):
        """Text files; programs may, to find each other while they lie in the build folder."""
        for name, path in self.installed().items():
            with open(path, "rb") as file:
                content = file.read()
            if b"\0" not in content:
                self.assertNotIn(BUILD.encode(), content, name)

    def test_programs_run(self):
        version = text_of(os.path.join(SOURCE, "meson.build")).split("version: '")[1].split("'")[0]
        for program in (self.at(os.path.join(BINDIR, "bennu")), self.at(DAEMON)):
            done = run(program, "--version")
            self.assertEqual((done.returncode, done.stdout.split()[-1:]), (0, [version]), done.stderr)

    @unittest.skipUnless(shutil.which("readelf"), "no readelf here")
    def test_agent_bears_the_drivers_name(self):
        done = run("readelf", "-d", self.at(AGENT))
        self.assertRegex(done.stdout, r"SONAME.*\[libcuda\.so\.1\]")
        needed = re.findall(r"NEEDED.*\[(.+)\]", done.stdout)
        if not SANITIZED:
            self.assertEqual([name for name in needed if not name.startswith(("libc.", "libdl.", "libpthread."))], [])

    def test_units(self):
        socket, service = (text_of(self.at(os.path.join(UNITS, "bennud." + kind))) for kind in ("socket", "service"))
        rundir = OPTIONS["rundir"]
        self.assertIn(f"\nListenSequentialPacket={rundir}/bennud.sock\n", socket)
        self.assertIn("\nSocketMode=0600\n", socket)
        self.assertIn(f"\nExecStart={DAEMON} $BENNUD_OPTIONS\n", service)
        for unit in (socket, service):
            self.assertNotRegex(unit, r"@\w+@")

    @unittest.skipUnless(shutil.which("systemd-analyze"), "no systemd-analyze here")
    def test_units_verified_by_systemd(self):
        """systemd looks whether the program is there, so the copies that it sees name the one just installed."""
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for kind in ("socket", "service"):
                unit = text_of(self.at(os.path.join(UNITS, "bennud." + kind)))
                paths.append(os.path.join(folder, "bennud." + kind))
                with open(paths[-1], "w", encoding="utf-8") as copy:
                    copy.write(unit.replace("ExecStart=/", f"ExecStart={self.root}/"))
            # Manual pages are not where man looks yet.
            done = run("systemd-analyze", "verify", "--man=no", *paths)
            said = [line for line in (done.stdout + done.stderr).splitlines() if "bennud" in line]
            self.assertEqual((done.returncode, said), (0, []), done.stdout + done.stderr)

    @unittest.skipUnless(shutil.which("systemd-socket-activate") and os.geteuid() == 0,
                         "needs systemd-socket-activate and root")
    @unittest.skipIf(SANITIZED, "the installed daemon is the ordinary one")
    def test_socket_activation(self):
        """The daemon takes the socket that systemd made, answers the request that woke it, and ends at SIGTERM."""
        rundir = os.path.join(self.root, "run")
        os.mkdir(rundir)
        path = os.path.join(rundir, "bennud.sock")
        driver = self.at(os.path.join(LIBEXECDIR, "bennu/sim/libcuda.so.1"))
        environment = {**os.environ, "BENNU_RUNDIR": rundir, "BENNU_DRIVER": driver}
        systemd = subprocess.Popen(
            ["systemd-socket-activate", "--seqpacket", "--listen", path, "-E", f"BENNU_DRIVER={driver}",
             self.at(DAEMON)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
        try:
            said = systemd.stderr.readline()  # once it listens, it says so
            self.assertIn(b"istening", said)
            done = run(self.at(os.path.join(BINDIR, "bennu")), "ps", "--json", env=environment, timeout=60)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIs(json.loads(done.stdout)["ok"], True)
            systemd.terminate()
            self.assertEqual(systemd.wait(timeout=60), 0)
        finally:
            systemd.kill()
            systemd.communicate()
            shutil.rmtree(rundir)


if __name__ == "__main__":
    sys.exit(unittest.main(verbosity=2))
