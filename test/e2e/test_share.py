"""Checkpoints that share bytes: bennu dump --parent."""

import fcntl
import json
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


def criu_bytes(folder):
    return sum(harness.files_of_criu(folder).values())


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

    def test_compressed(self):
        self.start_daemon()
        program = self.start(MODEL, 2, 1, 4)
        self.refused(2, "dump", program.pid, self.path("ck"), "--compress=20", says="a level from 1 to 19, not 20")
        plain = self.dump(program, "--leave-running", name="plain")
        # Words that are mixed by a hash do not shrink: it is stored as it is, and no feature is needed to read it.
        image = self.dump(program, "--leave-running", "--compress=1", name="compressed")
        self.assertEqual(own_bytes(image), own_bytes(plain))
        tidy = self.start(MODEL, 4, 0)
        image = self.dump(tidy, "--compress=3", name="tidy")
        self.assertLess(own_bytes(image), 3 * MIB)
        self.assertIn("as it was written", self.ok("inspect", "--verify", image).stdout)
        self.restore(tidy, image)
        tidy.go_on()
        child = self.dump(tidy, "--parent", image, name="child")
        self.restore(tidy, child)
        tidy.go_on()

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



class Store(Case):
    """bennu store on checkpoints of real dumps."""

    def make(self):
        self.start_daemon()
        program = self.start(MODEL, WEIGHTS)
        os.mkdir(self.path("store"))
        one = self.dump(program, "--leave-running", name="store/one")
        self.dump(program, "--leave-running", "--parent", one, name="store/two")
        return program

    def listed(self):
        return {e["name"]: e for e in self.ok_json("store", "ls", self.path("store"))["checkpoints"]}

    def test_list_remove_restore(self):
        program = self.make()
        os.mkdir(self.path("store/notes"))
        os.mkdir(self.path("store/torn"))
        for name in ("bennu-pack-0.img", "core-1.img"):
            with open(self.path("store/torn", name), "wb") as f:
                f.write(b"x" * 100)
        entries = self.listed()
        self.assertEqual(list(entries), ["one", "two", "torn"])
        self.assertEqual(entries["torn"]["state"], "incomplete")
        for name in ("one", "two"):
            self.assertEqual(entries[name]["state"], "complete")
            self.assertEqual(entries[name]["processes"], 1)
            self.assertEqual(entries[name]["gpu_bytes"], self.ok_json("inspect", self.path("store", name))["gpu_bytes"])
            self.assertGreaterEqual(entries[name]["gpu_bytes"], (WEIGHTS + 2) * MIB)
            self.assertEqual(entries[name]["own_bytes"], own_bytes(self.path("store", name)))
            self.assertEqual(entries[name]["shared_bytes"], shared_bytes(self.path("store", name)))
        text = self.ok("store", "ls", self.path("store")).stdout.splitlines()
        self.assertEqual([line.split()[0] for line in text], ["NAME", "one", "two", "torn"])
        self.refused(1, "store", "rm", self.path("store"), "one", "three", says="three: No such file")
        self.refused(1, "store", "rm", self.path("store"), "../store/one", says="not the name of a checkpoint")
        self.refused(1, "store", "rm", self.path("store"), "notes", says="notes is no checkpoint")
        self.refused(2, "store", "rm", self.path("store"), says="needs the names")
        self.refused(2, "store", "gc", self.path("store"), "one", says="gc takes no names")
        self.refused(2, "store", "shrink", self.path("store"), says="'shrink' is none of")
        self.refused(1, "store", "ls", self.path("nowhere"), says=("cannot open the store", "nowhere"))
        self.assertEqual(set(self.listed()), {"one", "two", "torn"})
        answer = self.ok_json("store", "rm", self.path("store"), "one")
        self.assertEqual(answer["removed"], 1)
        self.assertEqual(self.listed()["two"]["shared_bytes"], 0)
        answer = self.ok_json("store", "gc", self.path("store"))
        self.assertEqual((answer["incomplete_removed"], answer["skipped"]), (1, 0))
        self.assertEqual(sorted(os.listdir(self.path("store"))), ["notes", "two"])
        program.kill()
        program.will_go_back()
        self.restore(program, self.path("store/two"))
        program.go_on()

    def test_what_is_rewritten_is_not_read(self):
        program = self.make()
        program.kill()
        image = self.path("store/two")
        folder = os.open(image, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        for command in ("restore", "inspect"):
            self.refused(1, command, image, says=("store/two", "is being removed or rewritten: try again later"))
        self.refused(1, "store", "verify", self.path("store"), says=("two", "is being removed or rewritten: try again later"))
        os.close(folder)
        self.ok("inspect", image)
        program.will_go_back()
        self.restore(program, image)
        program.go_on()

    def test_verify_names_the_damage(self):
        self.make()
        answer = self.ok_json("store", "verify", self.path("store"))
        self.assertEqual((answer["checkpoints"], answer["damage"]), (2, []))
        one, two = self.path("store/one"), self.path("store/two")
        self.assertEqual(answer["bytes_read"], shared_bytes(one) + own_bytes(one) + own_bytes(two) + criu_bytes(one) + criu_bytes(two))
        self.assertIn("all as they were written", self.ok("store", "verify", self.path("store"), "two").stdout)
        shared = next(n for n, st in packs(self.path("store/one")).items() if st.st_nlink > 1)
        with open(self.path("store/one", shared), "r+b") as f:
            f.seek(3 * MIB)
            byte = f.read(1)
            f.seek(3 * MIB)
            f.write(bytes([byte[0] ^ 8]))
        done = self.bennu("store", "verify", self.path("store"))
        self.assertEqual(done.returncode, 5)
        lines = done.stdout.splitlines()
        self.assertEqual([line.split(":")[0] for line in lines], ["one", "two"])
        for line in lines:
            self.assertRegex(line, r'chunk \d+ \(process \d+ "model", segment \d+ at 0x[0-9a-f]+, byte \d+ of it\) is damaged')
        self.assertEqual(done.stderr.count("\n"), 1)
        done = self.bennu("store", "--json", "verify", self.path("store"), "one")
        self.assertEqual(done.returncode, 5)
        answer = json.loads(done.stdout)
        self.assertIs(answer["ok"], False)
        self.assertEqual([d["name"] for d in answer["damage"]], ["one"])


if __name__ == "__main__":
    harness.main()
