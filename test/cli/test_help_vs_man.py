#!/usr/bin/env python3
"""Every command and option of --help stands in its man page with the same words, and the page names no others."""

import os
import re
import shutil
import subprocess
import unittest

import common
from common import Case

COMMANDS = ["run", "dump", "pre-dump", "restore", "suspend", "resume", "ps", "inspect", "export", "import", "check", "install", "uninstall", "store",
            "watch"]


def plain(source):
    """The words of a page in the man macros, without markup."""
    words = []
    for line in source.splitlines():
        if line.startswith('.\\"'):
            continue
        line = re.sub(r"^\.[A-Z]+\s*", "", line)
        line = re.sub(r"\\f.", "", line).replace("\\-", "-").replace("\\(aq", "'").replace("\\&", "").replace('"', "")
        words.append(line)
    return re.sub(r"\s+", " ", " ".join(words))


def joined(text):
    return re.sub(r"\s+", " ", text).strip()


class HelpVsMan(Case):
    def page(self, name):
        with open(os.path.join(common.arguments.man, name), encoding="utf-8") as f:
            return f.read()

    def options_of_page(self, source):
        """Long options of the list of options, each an item that begins with .TP."""
        return set(re.findall(r"--([a-z][a-z-]*)", " ".join(
            line.replace("\\-", "-") for before, line in zip(source.splitlines(), source.splitlines()[1:]) if before == ".TP")))

    def test_every_command(self):
        overview = plain(self.page("bennu.1"))
        for command in COMMANDS:
            with self.subTest(command=command):
                text = self.bennu(command, "--help").stdout
                source = self.page(f"bennu-{command}.1")
                page = plain(source).lower()
                summary = joined(text.split("\n\n")[1]).rstrip(".")
                self.assertIn(summary.lower(), page)
                self.assertIn(f"bennu-{command}", overview)
                self.assertIn(summary.lower(), overview.lower())
                options = re.findall(r"^  (?:-(\w), |    )--([a-z-]+)(?:=([A-Z]+))? +(.*)$", text, re.M)
                self.assertTrue(options)
                for letter, name, argument, words in options:
                    self.assertIn(f"--{name}" + (f"={argument.lower()}" if argument else ""), page)
                    if letter:
                        self.assertIn(f"-{letter.lower()},", page)
                    self.assertIn(joined(words).lower(), page)
                self.assertEqual(self.options_of_page(source), {o[1] for o in options})

    def test_daemon(self):
        program = os.path.join(os.path.dirname(common.arguments.bennu), "../daemon/bennud")
        if not os.path.exists(program):
            self.skipTest("bennud is not built")
        text = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
        source = self.page("bennud.8")
        self.assertEqual(self.options_of_page(source), set(re.findall(r"--([a-z][a-z-]*)", text)))

    def test_exit_codes_are_documented(self):
        page = plain(self.page("bennu.1"))
        for code in range(6):
            self.assertRegex(page, rf" {code} ")

    def test_pages_are_clean(self):
        groff = shutil.which("groff")
        if not groff:
            self.skipTest("no groff")
        for name in sorted(os.listdir(common.arguments.man)):
            if re.search(r"\.[18]$", name):
                with self.subTest(page=name):
                    done = subprocess.run([groff, "-man", "-Tutf8", "-ww", "-z", os.path.join(common.arguments.man, name)],
                                          capture_output=True, text=True, check=False)
                    self.assertEqual((done.returncode, done.stderr), (0, ""))


if __name__ == "__main__":
    unittest.main(argv=common.parse("--man"))
