"""Tests of the scripts that guard the tree: each must find what it is there to find."""

import os
import shutil
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
SCRIPTS = os.path.join(ROOT, "scripts")


def call(*command):
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


class Layers(unittest.TestCase):
    def check(self, files):
        with tempfile.TemporaryDirectory() as root:
            for name, text in files.items():
                path = os.path.join(root, name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "w", encoding="utf-8") as out:
                    out.write(text)
            return call(sys.executable, os.path.join(SCRIPTS, "check-layers"), root)

    def test_upwards_is_allowed(self):
        done = self.check({"src/base/error.h": "", "src/wire/a.c": '#include "base/error.h"\n#include "a.h"\n'})
        self.assertEqual(done.returncode, 0, done.stdout)

    def test_downwards_is_not(self):
        done = self.check({"src/wire/a.h": "", "src/base/error.c": '\n#  include "wire/a.h"\n'})
        self.assertEqual(done.returncode, 1)
        self.assertIn("src/base/error.c:2:", done.stdout)

    def test_parent_folder_is_not(self):
        done = self.check({"src/wire/a.c": '#include "../base/error.h"\n'})
        self.assertEqual(done.returncode, 1)

    def test_sim_is_apart(self):
        files = {"src/base/error.h": "", "src/gpu/cuda_types.h": "", "src/agent/api/functions.tbl": ""}
        allowed = '#include "gpu/cuda_types.h"\n#include "agent/api/functions.tbl"\n#include "own.h"\n'
        self.assertEqual(self.check({**files, "sim/a.c": allowed}).returncode, 0)
        self.assertEqual(self.check({**files, "sim/a.c": '#include "base/error.h"\n'}).returncode, 1)

    def test_an_unknown_folder_is_reported(self):
        self.assertEqual(self.check({"src/other/a.c": '#include "base/error.h"\n'}).returncode, 1)

    def test_an_empty_tree_is_no_success(self):
        self.assertEqual(self.check({"README": ""}).returncode, 2)


@unittest.skipUnless(shutil.which("gcc") and shutil.which("readelf"), "no gcc or readelf")
class Glibc(unittest.TestCase):
    def test_finds_the_highest_version_and_enforces_a_limit(self):
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "a.c")
            library = os.path.join(folder, "a.so")
            with open(source, "w", encoding="utf-8") as out:
                out.write("#define _GNU_SOURCE\n#include <sys/mman.h>\n#include <unistd.h>\n"
                          'int f(void) { return memfd_create("x", 0) + getpid(); }\n')
            done = call("gcc", "-shared", "-fPIC", "-o", library, source)
            self.assertEqual(done.returncode, 0, done.stderr)
            script = os.path.join(SCRIPTS, "check-glibc")
            done = call(sys.executable, script, library)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("memfd_create", done.stdout)
            self.assertEqual(call(sys.executable, script, library, "2.17").returncode, 1)
            self.assertEqual(call(sys.executable, script, library, "2.99").returncode, 0)

    def test_wants_the_libraries_that_are_one_now(self):
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "a.c")
            library = os.path.join(folder, "a.so")
            with open(source, "w", encoding="utf-8") as out:
                version = {"x86_64": "2.2.5", "aarch64": "2.17"}.get(os.uname().machine)
                if not version:
                    self.skipTest("another machine")
                out.write(f'__asm__(".symver dlsym,dlsym@GLIBC_{version}");\n'
                          "void *dlsym(void *, const char *);\nvoid *f(void) { return dlsym(0, 0); }\n")
            script = os.path.join(SCRIPTS, "check-glibc")
            link = ["gcc", "-shared", "-fPIC", "-o", library, source, "-Wl,--no-as-needed"]
            done = call(*link)
            self.assertEqual(done.returncode, 0, done.stderr)
            done = call(sys.executable, script, library, "2.17")
            self.assertEqual(done.returncode, 1)
            self.assertIn("dlsym: before 2.34 in libdl.so.2", done.stdout)
            self.assertEqual(call(sys.executable, script, library, "2.34").returncode, 0)
            done = call(*link, "-l:libdl.so.2")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(call(sys.executable, script, library, "2.17").returncode, 0)


@unittest.skipUnless(shutil.which("meson") and shutil.which("ninja"), "no meson or ninja")
class RunTests(unittest.TestCase):
    def run_tests(self, tests):
        with tempfile.TemporaryDirectory() as folder:
            build = os.path.join(folder, "b")
            with open(os.path.join(folder, "meson.build"), "w", encoding="utf-8") as out:
                out.write("project('x')\nsh = find_program('sh')\n" + tests)
            done = call("meson", "setup", build, folder)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            done = call(sys.executable, os.path.join(SCRIPTS, "run-tests"), build)
            return done, done.stdout.splitlines()[-1]

    def test_all_pass(self):
        done, last = self.run_tests("test('a', sh, args: ['-c', 'exit 0'])\n")
        self.assertEqual((done.returncode, last), (0, "1 passed, 0 failed"))

    def test_failure_skip_and_timeout_are_counted_and_logged(self):
        done, last = self.run_tests(
            "test('a', sh, args: ['-c', 'exit 0'])\n"
            "test('b', sh, args: ['-c', 'echo why it failed >&2; exit 3'])\n"
            "test('c', sh, args: ['-c', 'exit 77'])\n"
            "test('d', sh, args: ['-c', 'sleep 100'], timeout: 1)\n"
            "test('real', sh, args: ['-c', 'exit 1'], suite: 'gpu')\n")
        self.assertEqual((done.returncode, last), (1, "1 passed, 2 failed, 1 skipped"), done.stdout)
        self.assertIn("why it failed", done.stdout)

    def test_a_folder_that_does_not_build_fails(self):
        done, last = self.run_tests(
            "custom_target('t', output: 't', command: [sh, '-c', 'exit 1'], build_by_default: true)\n"
            "test('a', sh, args: ['-c', 'exit 0'])\n")
        self.assertEqual((done.returncode, last), (2, "0 passed, 1 failed"), done.stdout)


if __name__ == "__main__":
    unittest.main()
