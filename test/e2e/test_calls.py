"""Every call of the driver that a step makes fails once, in the daemon and in the application's agent: a dump or a suspend that fails
leaves the process running, a restore that fails leaves nothing, a resume that fails can be tried again, and whatever is reported
to have succeeded has. Which calls a step makes is taken from the simulated driver's trace of a step that works."""

import collections
import os

import harness
from harness import Case, text_of

CODE = 999


class Calls(Case):
    def setUp(self):
        super().setUp()
        self.rules = {who: self.path(f"rules-{who}") for who in ("daemon", "application")}
        self.traces = {who: self.path(f"trace-{who}") for who in ("daemon", "application")}
        self.clear()
        self.start_daemon(**self.variables("daemon"))
        self.program = self.memcheck("--allocs=3", "--max=3M", "--keep", "--pause=0", env=self.variables("application"))
        self.outcomes = collections.Counter()

    def variables(self, who):
        return {"BENNU_SIM_FAIL_FILE": self.rules[who], "BENNU_SIM_TRACE": self.traces[who]}

    def clear(self):
        for path in self.rules.values():
            with open(path, "w", encoding="utf-8"):
                pass

    def calls_of(self, step):
        """(who, name, n) of the calls that a step makes: of each name the first and the last."""
        marks = {who: len(text_of(self.traces[who])) for who in self.traces}
        step()
        found = []
        for who, mark in marks.items():
            count, others = collections.Counter(), set()
            for line in text_of(self.traces[who])[mark:].splitlines():
                pid, tid, name, _ = line.split()
                # The program's own calls are not the agent's, and it may stop at an error.
                if who == "application" and pid == tid:
                    others.add(name)
                count[name] += 1
            for name in sorted(set(count) - others):
                found += [(who, name, n) for n in sorted({1, count[name]})]
        self.assertTrue([c for c in found if c[0] == "daemon"])
        return found

    def attempt(self, call, *command):
        who, name, n = call
        with open(self.rules[who], "w", encoding="utf-8") as f:
            f.write(f"{name}:{n}={CODE}")
        done = self.bennu(*command)
        self.clear()
        self.outcomes[done.returncode] += 1
        if done.returncode:
            self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
            self.assertEqual(done.stdout, "")
        return done.returncode == 0

    def each(self, calls, one):
        for call in calls:
            with self.subTest(call=call):
                one(call)
        self.assertGreater(sum(self.outcomes.values()) - self.outcomes[0], 3, "hardly a call that failed made the step fail")

    def test_dump(self):
        program, image = self.program, self.path("ck")

        def clean():
            self.dump(program)

        def back():
            self.restore(program, image)
            self.clean_up(image)
            program.go_on()

        def one(call):
            if self.attempt(call, "dump", program.pid, image):
                program.gone([])
                back()
            else:
                self.assertFalse(os.path.exists(image))
                program.go_on()

        calls = self.calls_of(clean)
        back()
        self.each(calls, one)

    def test_restore(self):
        program, image = self.program, self.path("ck")
        self.dump(program)

        def clean():
            self.restore(program, image)

        def one(call):
            if self.attempt(call, "restore", image, "--detach"):
                program.go_on()
                self.clean_up(image)
                self.dump(program)
            else:
                self.nothing_left(program)

        calls = self.calls_of(clean)
        program.go_on()
        self.clean_up(image)
        self.dump(program)
        self.each(calls, one)
        self.restore(program, image)
        program.go_on()

    def test_suspend(self):
        program = self.program

        def clean():
            self.ok("suspend", program.pid)

        def one(call):
            if self.attempt(call, "suspend", program.pid):
                self.ok("resume", program.pid)
            program.go_on()

        calls = self.calls_of(clean)
        self.ok("resume", program.pid)
        program.go_on()
        self.each(calls, one)

    def test_resume(self):
        program = self.program
        self.ok("suspend", program.pid)

        def clean():
            self.ok("resume", program.pid)

        def one(call):
            if call[1] == "cuCheckpointProcessRestore":
                return  # final, by the driver's rules
            self.ok("suspend", program.pid)
            if not self.attempt(call, "resume", program.pid):
                self.ok("resume", program.pid)
            program.go_on()

        calls = self.calls_of(clean)
        program.go_on()
        self.each(calls, one)

    @staticmethod
    def clean_up(image):
        harness.shutil.rmtree(image)


if __name__ == "__main__":
    harness.main()
