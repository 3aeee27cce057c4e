"""Checkpoints that share bytes: bennu dump --parent."""

import os
import shutil

import harness
from harness import Case

MODEL = f"{harness.BUILD}/test/cr/model"
MIB = 1 << 20
WEIGHTS = 16


def packs(folder):
    return {name: os.stat(os.path.join(folder, name)) for name in os.listdir(folder) if name.startswith("bennu-pack-")}


def own_bytes(folder):
    return sum(st.st_size for st in packs(folder).values() if st.st_nlink == 1)


def shared_bytes(folder):
    return sum(st.st_size for st in packs(folder).values() if st.st_nlink > 1)


class Share(Case):
    def model(self, seed=1):
        return self.start(MODEL, WEIGHTS, seed)

    def test_second_checkpoint_stores_what_is_new(self):
        self.start_daemon()
        program = self.model()
        first = self.dump(program, "--leave-running", name="first")
        program.go_on()
        second = self.dump(program, "--leave-running", "--parent", first, name="second")
        program.go_on()
        self.assertEqual(shared_bytes(second), shared_bytes(first))
        self.assertGreaterEqual(shared_bytes(second), WEIGHTS * MIB)
        self.assertEqual(own_bytes(second), 2 * MIB)
        # Each is complete by itself: the parent goes, the child is restored from another place.
        third = self.dump(program, "--parent", second, name="third")
        shutil.rmtree(first)
        shutil.rmtree(second)
        self.assertEqual(shared_bytes(third), 0)
        self.assertNotIn(os.path.basename(first), "".join(os.listdir(third)))
        self.restore(program, third)
        program.go_on()

    def test_replica_and_other_process(self):
        self.start_daemon()
        first, replica, other = self.model(), self.model(), self.model(seed=2)
        image = self.dump(first, "--leave-running", name="first")
        copy = self.dump(replica, "--leave-running", "--parent", image, name="replica")
        self.assertEqual(own_bytes(copy), 2 * MIB)
        alone = self.dump(other, "--leave-running", "--parent", copy, name="other")
        self.assertEqual(shared_bytes(alone), 0)
        for program, folder in ((replica, copy), (other, alone), (first, image)):
            program.kill()
            program.will_go_back()
            self.restore(program, folder)
            program.go_on()

    def test_parent_that_cannot_be_used(self):
        self.start_daemon()
        program = self.model()
        image = self.dump(program, "--leave-running", name="first")
        new = self.path("new")
        self.refused(1, "dump", program.pid, new, "--parent", self.path("nowhere"),
                     says=("cannot open the parent checkpoint", "nowhere", "No such file"))
        os.mkdir(self.path("empty"))
        self.refused(5, "dump", program.pid, new, "--parent", self.path("empty"), says="not a Bennu checkpoint")
        damaged = self.path("damaged")
        shutil.copytree(image, damaged)
        name = sorted(packs(damaged))[0]
        os.truncate(os.path.join(damaged, name), packs(damaged)[name].st_size - 1)
        self.refused(5, "dump", program.pid, new, "--parent", damaged, says=("the parent checkpoint", name, "is truncated"))
        os.unlink(os.path.join(damaged, name))
        self.refused(1, "dump", program.pid, new, "--parent", damaged, says=("the parent checkpoint", name, "is missing"))
        with open(os.path.join(damaged, harness.MANIFEST), "r+b") as f:
            f.seek(100)
            byte = f.read(1)
            f.seek(100)
            f.write(bytes([byte[0] ^ 1]))
        self.refused(5, "dump", program.pid, new, "--parent", damaged, says=("the parent checkpoint", "wrong checksum"))
        self.no_checkpoint(new)
        program.go_on()
        self.dump(program, "--parent", image)
        self.restore(program)
        program.go_on()


if __name__ == "__main__":
    harness.main()
