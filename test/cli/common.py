"""What the tests of the command line share."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest

arguments = None


def parse(*extra):
    global arguments
    parser = argparse.ArgumentParser()
    for name in ("--bennu", "--control") + extra:
        parser.add_argument(name, required=True)
    arguments, rest = parser.parse_known_args()
    for name, value in vars(arguments).items():
        setattr(arguments, name, os.path.abspath(value))
    return sys.argv[:1] + rest


def clean_environment(**more):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("BENNU_", "CRIU_", "LD_PRELOAD"))}
    # Not in a build folder's sense either: nothing of this machine is to be found by chance.
    return {**env, **more}


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="bennu-cli.")
        os.chmod(self.dir, 0o755)
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.rundir = os.path.join(self.dir, "run")
        self.env = clean_environment(BENNU_RUNDIR=self.rundir)

    def path(self, *names):
        return os.path.join(self.dir, *names)

    def bennu(self, *args, **kwargs):
        kwargs.setdefault("env", self.env)
        kwargs.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run([arguments.bennu, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              timeout=100, check=False, **kwargs)

    def nobody(self):
        """Somebody without rights, who can run the program nevertheless: not if it was built in root's home."""
        try:
            self.bennu("--version", user=65534, group=65534)
        except PermissionError:
            self.skipTest(f"other users cannot get at {arguments.bennu}")
        return {"user": 65534, "group": 65534}

    def fails(self, code, *args, says=(), **kwargs):
        """The command ends with `code`, says one line on standard error and nothing on standard output."""
        done = self.bennu(*args, **kwargs)
        self.assertEqual(done.returncode, code, done.stderr)
        self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertEqual(done.stdout, "")
        self.assertTrue(done.stderr.startswith("bennu"), done.stderr)
        for text in (says,) if isinstance(says, str) else says:
            self.assertIn(text, done.stderr)
        return done.stderr

    def fails_in_json(self, code, *args, **kwargs):
        done = self.bennu(*args, "--json", **kwargs)
        self.assertEqual(done.returncode, code, done.stderr)
        answer = json.loads(done.stdout)
        self.assertIs(answer["ok"], False)
        self.assertEqual(answer["error"]["exit_code"], code)
        self.assertIn(answer["error"]["message"], done.stderr)
        return answer["error"]

    def make(self, name, mode=0o644, text=""):
        with open(self.path(name), "w", encoding="utf-8") as f:
            f.write(text)
        os.chmod(self.path(name), mode)
        return self.path(name)

    def fake_criu(self, version):
        return self.make(f"criu-{version}", 0o755, f"#!/bin/sh\necho 'Version: {version}'\n")


def as_root():
    return os.geteuid() == 0
