"""Checkpoints that send little: chunks asked for by their hashes."""


import harness
from harness import BUILD, Case

CUT = f"{BUILD}/test/cr/cut"
MIB = 1 << 20


class Live(Case):
    sim = {"BENNU_SIM_STATE_MB": "1", "BENNU_SIM_MEMORY": "512M"}

    def cut(self, hot=8, cold=12, **kwargs):
        return self.start(CUT, f"--hot={hot}", f"--cold={cold}", **kwargs)

    @staticmethod
    def bytes_of(answer, phase):
        return sum(p["bytes"] for p in answer["phases"] if p["name"] == phase)

    def dump_json(self, program, name, *args):
        answer = self.ok_json("dump", program.pid, self.path(name), *args)
        if "--leave-running" not in args:
            program.gone([])
        return answer


class Hashes(Live):
    """A dump asks for chunks by their hashes, and sends what nobody has."""

    def test_zero_and_equal_chunks_are_not_sent(self):
        self.start_daemon()
        program = self.cut()
        answer = self.dump_json(program, "ck")
        self.assertEqual(self.bytes_of(answer, "hash"), answer["gpu_bytes"])
        # Of 12 zero chunks none, of 12 equal ones at most one for each of their allocations.
        self.assertLessEqual(self.bytes_of(answer, "copy-out"), answer["gpu_bytes"] - (12 + 12 - 3) * 2 * MIB)
        seen = self.ok_json("inspect", "--verify", self.path("ck"))
        self.assertGreaterEqual(seen["zero_bytes"], 12 * 2 * MIB)
        self.restore(program)
        program.go_on()

    def test_a_parent_has_most_of_it(self):
        self.start_daemon()
        program = self.cut()
        self.dump_json(program, "first", "--leave-running")
        program.go_on()
        answer = self.dump_json(program, "second", f"--parent={self.path('first')}")
        # What is hot, the block that is made anew, and what is smaller than a chunk.
        self.assertLessEqual(self.bytes_of(answer, "copy-out"), (8 + 4 + 2) * 2 * MIB)
        self.restore(program, self.path("second"))
        program.go_on()

    def test_without_hashing_on_the_gpu(self):
        self.start_daemon(BENNU_SIM_HASH="wrong")
        program = self.cut()
        answer = self.dump_json(program, "ck")
        self.assertEqual(self.bytes_of(answer, "hash"), 0)
        self.assertEqual(self.bytes_of(answer, "copy-out"), answer["gpu_bytes"])
        self.restore(program)
        program.go_on()

    def test_what_arrives_is_not_what_was_hashed(self):
        """The process goes on, and there is no checkpoint."""
        self.start_daemon(BENNU_SIM_HASH="later")
        program = self.cut()
        self.refused(1, "dump", program.pid, self.path("ck"),
                     says=("arrived with other bytes than were hashed", "GPU 0 (Simulated GPU)"))
        self.no_checkpoint(self.path("ck"))
        program.go_on()


if __name__ == "__main__":
    harness.main()
