#!/usr/bin/env python3
"""Make the Debian package, install it into an empty root folder, upgrade, remove and purge it there, and look at the files.

Environment: BENNU_BUILD, BENNU_SOURCE (meson's test environment sets them). Exit status 77: dpkg is not here."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest

BUILD, SOURCE = os.environ["BENNU_BUILD"], os.environ["BENNU_SOURCE"]
HOOK = "/usr/share/containers/oci/hooks.d/50-bennu.json"
MADE = ["/etc/cdi/bennu.json", "/etc/criu/default.conf", "/usr/lib/criu/bennu_plugin.so", HOOK, "/var/lib/bennu/install.json"]


def run(*command, **more):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **more)
    if done.returncode != 0:
        raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


class Package(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.package = os.path.join(SOURCE, run(os.path.join(SOURCE, "packaging/deb/build"), os.path.join(BUILD, "deb"),
                                               cwd=SOURCE).splitlines()[-1])

    def setUp(self):
        self.root = tempfile.mkdtemp(prefix="bennu-deb.")
        self.addCleanup(shutil.rmtree, self.root)
        for folder in ("var/lib/dpkg/info", "var/lib/dpkg/updates"):
            os.makedirs(os.path.join(self.root, folder))
        for name in ("status", "available"):
            with open(os.path.join(self.root, "var/lib/dpkg", name), "w", encoding="utf-8"):
                pass

    def dpkg(self, *arguments):
        """The package's scripts run outside of the root, which has no shell, and are told where it is."""
        return run("dpkg", "--root=" + self.root, "--force-script-chrootless", "--force-depends", "--log=/dev/null",
                   *arguments)

    def files(self):
        found = set()
        for folder, _, names in os.walk(self.root):
            found |= {os.path.join(folder, name)[len(self.root):] for name in names}
        return {path for path in found if not path.startswith("/var/lib/dpkg/")}

    def agents(self):
        return {path for path in self.files() if path.startswith("/usr/lib/bennu/agents/")}

    def test_life(self):
        self.dpkg("-i", self.package)
        listing = run("dpkg-deb", "-c", self.package).splitlines()
        of_package = {line.split(" -> ")[0].rsplit(" ", 1)[-1][1:] for line in listing if not line.startswith("d")}
        agent, = self.agents()
        self.assertEqual(self.files(), of_package | set(MADE) | {agent})
        self.assertEqual({path.split("/")[2] for path in of_package}, {"bin", "lib", "libexec", "share"})
        with open(self.root + HOOK, encoding="utf-8") as hook:
            hook = json.load(hook)["hook"]
        self.assertTrue(os.access(self.root + hook["path"], os.X_OK))
        self.assertEqual(hook["args"][1], "--agent=" + agent)
        before = self.files()
        self.dpkg("-i", self.package)  # an upgrade to itself
        self.assertEqual(self.files(), before)
        self.dpkg("-r", "bennu")
        self.assertEqual(self.files(), {agent})  # old checkpoints need it
        self.dpkg("-i", self.package)
        self.assertEqual(self.files(), before)
        self.dpkg("-P", "bennu")
        self.assertEqual(self.files(), set())

    def test_control(self):
        fields = run("dpkg-deb", "-f", self.package)
        for library in ("libarchive13", "libc6", "libjansson4", "libprotobuf-c1", "libsystemd0", "liburing2", "libzstd1"):
            self.assertRegex(fields, rf"\nDepends: .*\b{library}\b")
        self.assertRegex(fields, r"\nRecommends: criu \(>= 4\.0\)")

    def test_documents(self):
        run("dpkg-deb", "-x", self.package, self.root)
        doc = self.root + "/usr/share/doc/bennu/"
        for name in ("changelog.gz", "NEWS.gz"):
            with gzip.open(doc + name, "rt") as text:
                self.assertTrue(text.read())
        with open(doc + "copyright", encoding="utf-8") as text:
            text = text.read()
        self.assertIn("MIT", text)
        self.assertIn("GPL-2", text)

    @unittest.skipUnless(shutil.which("lintian"), "no lintian here")
    def test_lintian(self):
        done = subprocess.run(["lintian", "--fail-on=none", self.package], capture_output=True, text=True, check=False)
        # The private CRIU is Debian's, with the libraries that it was made for; the address is the builder's to give.
        said = [line for line in done.stdout.splitlines()
                if line[:2] in ("E:", "W:") and "/bennu/criu/" not in line and "bogus-mail-host" not in line]
        self.assertEqual(said, [])


if __name__ == "__main__":
    if not shutil.which("dpkg-deb") or os.geteuid() != 0:
        print("needs dpkg and root")
        sys.exit(77)
    sys.exit(unittest.main(verbosity=2))
