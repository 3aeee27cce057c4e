"""Suspend and resume: the GPU's memory is really free meanwhile, and every byte is back afterwards."""

import errno
import os
import resource
import signal
import socket
import struct
import subprocess

import harness
from harness import Case, ODD, wait_for


def answer(rules, text):
    """What the driver of a daemon with this file of rules answers from now on; see sim/README.md."""
    with open(rules, "w", encoding="utf-8") as f:
        f.write(text)


class Suspend(Case):
    def state(self, pid):
        found = [p for p in self.ok_json("ps")["processes"] if p["pid"] == pid]
        self.assertEqual(len(found), 1)
        return found[0]

    def check_cycle(self, program, rounds=2):
        for _ in range(rounds):
            self.ok("suspend", program.pid)
            before = [program.round(r) for r in program.roles]
            self.assertEqual(self.state(program.pid)["state"], "suspended")
            self.ok("resume", program.pid)
            program.go_on()
            self.assertGreaterEqual([program.round(r) for r in program.roles], before)

    def test_one_process(self):
        self.start_daemon()
        self.check_cycle(self.memcheck())

    def test_one_process_without_agent(self):
        self.start_daemon()
        self.check_cycle(self.memcheck(agent=False))

    def test_tree_of_three(self):
        self.start_daemon()
        self.check_cycle(self.tree())

    def test_threads_that_launch_without_end(self):
        self.start_daemon()
        self.check_cycle(self.start(ODD, "threads", 8), rounds=5)

    def test_json(self):
        self.start_daemon()
        program = self.memcheck()
        for command in ("suspend", "resume"):
            answer = self.ok_json(command, program.pid)
            self.assertEqual(answer["pid"], program.pid)
            self.assertGreater(answer["duration_s"], 0)
            self.assertTrue(answer["phases"])
        program.go_on()

    def test_a_dump_after_a_resume(self):
        self.start_daemon()
        program = self.tree()
        self.check_cycle(program, rounds=1)
        self.dump(program)
        self.restore(program)
        program.go_on()
        self.check_cycle(program, rounds=1)

    def test_right_after_a_dump(self):
        """The daemon is still bringing the processes back."""
        self.start_daemon()
        program = self.tree()
        for i in range(4):
            self.dump(program, "--leave-running", name=f"ck{2 * i}")
            self.dump(program, "--leave-running", name=f"ck{2 * i + 1}")
            self.ok("suspend", program.pid)
            self.ok("resume", program.pid)
        program.go_on()

    def test_memory_is_free_meanwhile_and_resume_waits_for_it(self):
        self.start_daemon()
        program = self.start(ODD, "hold", 160)
        second = self.start(ODD, "hold", 160, wait=False)
        self.assertEqual(second.popen.wait(60), 1)
        self.assertIn("CUDA error 2", harness.text_of(second.err))

        self.ok("suspend", program.pid)
        state = self.state(program.pid)
        self.assertEqual((state["state"], state["gpu_bytes"]), ("suspended", 0))
        self.assertGreaterEqual(state["host_bytes"], 160 << 20)
        third = self.start(ODD, "hold", 160)
        self.refused(1, "resume", program.pid, says=("free", "memory"))
        self.assertEqual(self.state(program.pid)["state"], "suspended")
        third.go_on()
        third.kill()
        self.ok("resume", program.pid)
        program.go_on()

    def test_twice_and_not_at_all(self):
        self.start_daemon()
        program = self.memcheck()
        self.refused(1, "resume", program.pid, says=("not suspended", str(program.pid)))
        self.ok("suspend", program.pid)
        self.refused(1, "suspend", program.pid, says="already")
        self.refused(1, "dump", program.pid, self.path("ck"), says=("suspended", "resume"))
        self.no_checkpoint(self.path("ck"))
        self.ok("resume", program.pid)
        program.go_on()

    def test_the_daemon_gives_all_back_before_it_ends(self):
        self.start_daemon()
        program = self.memcheck()
        self.ok("suspend", program.pid)
        self.assertEqual(self.stop_daemon(), 0)
        program.go_on()

    def test_what_cannot_be_brought_back_is_kept_for_a_resume(self):
        rules = self.path("rules")
        self.start_daemon(BENNU_SIM_FAIL_FILE=rules)
        for agent in (True, False):
            program = self.tree(agent=agent)
            for call in ("cuCheckpointProcessUnlock", "cuCheckpointProcessRestore"):
                with self.subTest(agent=agent, call=call):
                    answer(rules, f"{call}:1+=2")
                    name = f"{call}-{agent}"
                    self.refused(1, "dump", program.pid, self.path(name), "--leave-running",
                                 says=("is complete", "not brought back", f"bennu resume {program.pid}"))
                    self.ok("inspect", self.path(name))
                    self.assertEqual(self.state(program.pid)["state"], "suspended")
                    self.refused(1, "resume", program.pid)
                    self.refused(1, "dump", program.pid, self.path("ck"), says=f"bennu resume {program.pid}")
                    os.unlink(rules)
                    self.ok("resume", program.pid)
                    program.go_on()
            program.kill()

    def test_a_suspend_that_cannot_be_undone_is_kept_for_a_resume(self):
        rules = self.path("rules")
        self.start_daemon(BENNU_SIM_FAIL_FILE=rules)
        program = self.tree()
        answer(rules, "cuCheckpointProcessCheckpoint:3+=2,cuCheckpointProcessUnlock:1+=2")
        self.refused(1, "suspend", program.pid,
                     says=("cannot be checkpointed", "; and the process could not be put back:", "cannot be unlocked",
                           f"'bennu resume {program.pid}' tries again"))
        self.assertEqual(self.state(program.pid)["state"], "suspended")
        os.unlink(rules)
        self.ok("resume", program.pid)
        program.go_on()

    def test_the_driver_forgets_a_process(self):
        """It answers, once, that one does not use CUDA which does: nothing is left out, nobody stays behind."""
        rules = self.path("rules")
        self.start_daemon(BENNU_SIM_FAIL_FILE=rules)
        program = self.tree()
        answer(rules, "cuCheckpointProcessGetState:1=3")
        self.refused(1, "suspend", program.pid, says=("does not use CUDA", "try again"))
        program.go_on()
        self.check_cycle(program, rounds=1)
        program.kill()

        os.unlink(rules)
        program = self.tree(agent=False)
        self.ok("suspend", program.pid)
        worker, = harness.children_of(self.daemon.pid)
        os.kill(worker, signal.SIGKILL)
        harness.wait_for(lambda: self.bennu("ps").returncode == 0 and harness.children_of(self.daemon.pid) != [worker],
                         "another worker")
        answer(rules, "cuCheckpointProcessGetState:1+=3")
        self.refused(1, "resume", program.pid, says=("does not use CUDA", "try again"))
        os.unlink(rules)
        self.ok("resume", program.pid)
        program.go_on()

    def test_the_daemon_ends_though_the_driver_has_lost_a_process(self):
        rules = self.path("rules")
        self.start_daemon(BENNU_SIM_FAIL_FILE=rules)
        program, other = self.memcheck(), self.memcheck()
        for p in (program, other):
            self.ok("suspend", p.pid)
        answer(rules, "cuCheckpointProcessRestore:1+=304")
        self.refused(1, "resume", program.pid)
        answer(rules, "cuCheckpointProcessRestore:1=304")
        self.assertEqual(self.stop_daemon(), 0)
        log = harness.text_of(self.daemon_log)
        self.assertEqual(log.count("can only be killed"), 1, log)
        lost, = [p for p in (program, other) if f"process {p.pid} or its children: they can only" in log]
        (other if lost is program else program).go_on()

    def test_a_request_that_is_too_short(self):
        """It is not acted on."""
        self.start_daemon()
        program = self.memcheck()
        head = struct.Struct("<IHHIi32s512s")
        os.mkdir(self.path("ck"))
        folder = os.open(self.path("ck"), os.O_RDONLY)
        for kind in (10, 20):  # SUSPEND, DUMP_BEGIN: without their flags
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(os.path.join(self.rundir, "bennud.sock"))
                message = head.pack(0x6c746362, 1, kind, 0, 0, b"", b"") + struct.pack("<I", program.pid)
                socket.send_fds(sock, [message], [folder])
                answer = head.unpack_from(sock.recv(65536))
                self.assertEqual((answer[2:5], answer[6].rstrip(b"\0")[-9:]), ((kind, 1, errno.EBADMSG), b"too short"))
                self.assertEqual(self.state(program.pid)["state"], "running")
        os.close(folder)
        program.go_on()

    def test_no_descriptor_for_a_connection(self):
        self.start_daemon()
        worker, = harness.children_of(self.daemon.pid)
        limits = resource.prlimit(worker, resource.RLIMIT_NOFILE)
        resource.prlimit(worker, resource.RLIMIT_NOFILE, (3, limits[1]))
        with subprocess.Popen([harness.BENNU, "ps"], env=self.env, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as ps:
            wait_for(lambda: "cannot take a connection" in harness.text_of(self.daemon_log), "it says why")
            resource.prlimit(worker, resource.RLIMIT_NOFILE, limits)
            ps.communicate(timeout=harness.PATIENCE)
        self.assertEqual(ps.returncode, 0)
        self.assertLess(harness.text_of(self.daemon_log).count("cannot take"), 1000, "it does not spin")

    def test_ps_leaves_daemons_out(self):
        self.start_daemon()
        other = self.path("other")
        with open(self.path("other.log"), "ab") as log:
            daemon = subprocess.Popen([harness.BENNUD, "--rundir", other], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                      env=self.env)
        try:
            wait_for(lambda: " GPUs" in harness.text_of(self.path("other.log")), "the other bennud starts")
            self.assertNotIn("bennud", " ".join(p["command"] for p in self.ok_json("ps")["processes"]))
        finally:
            daemon.terminate()
            daemon.wait(60)

    def test_a_suspended_process_that_is_killed_leaves_nothing(self):
        self.start_daemon()
        program = self.start(ODD, "hold", 160)
        self.ok("suspend", program.pid)
        program.kill()
        wait_for(lambda: program.pid not in [p["pid"] for p in self.ok_json("ps")["processes"]], "bennud forgets it")
        self.start(ODD, "hold", 160)


if __name__ == "__main__":
    harness.main()
