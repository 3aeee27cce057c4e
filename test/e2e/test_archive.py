"""bennu export and bennu import: a checkpoint as one file, and what is no such file."""

import fcntl
import io
import os
import shutil
import signal
import subprocess
import tarfile

import harness
from harness import BENNU, Case, wait_for

MODEL = f"{harness.BUILD}/test/cr/model"
LIST = "bennu-archive.list"


def content(folder):
    found = {}
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as f:
            found[name] = f.read()
    return found


def member(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def read_tar(path):
    with tarfile.open(path) as tar:
        return [member(m.name, tar.extractfile(m).read()) for m in tar]


def write_tar(path, members):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


class Archives(Case):
    turn = False

    def checkpoint(self):
        self.start_daemon()
        program = self.start(MODEL, 2, 1)
        return program, self.dump(program)

    def same(self, folder, files):
        self.assertEqual(content(folder), files)
        for name in files:
            st = os.stat(os.path.join(folder, name))
            self.assertEqual((st.st_nlink, st.st_mode & 0o7777), (1, 0o600), name)

    def test_there_and_back(self):
        self.start_daemon()
        program = self.start(MODEL, 4, 1)
        first = self.dump(program, "--leave-running", name="first")
        program.go_on()
        second = self.dump(program, "--parent", first, name="second")
        packs = [n for n in os.listdir(second) if n.startswith("bennu-pack-")]
        self.assertTrue(any(os.stat(os.path.join(second, n)).st_nlink > 1 for n in packs))
        shutil.rmtree(first)
        files = content(second)
        os.mkdir(self.path("shelf"))
        plain, small = self.path("shelf", "a.tar"), self.path("shelf", "a.tar.zst")
        self.ok("export", second, plain)
        answer = self.ok_json("export", second, small)
        self.assertEqual((answer["file"], answer["bytes"]), (small, os.path.getsize(small)))
        self.assertEqual(sorted(os.listdir(self.path("shelf"))), ["a.tar", "a.tar.zst"])
        self.assertEqual(os.stat(plain).st_mode & 0o7777, 0o600)
        with open(small, "rb") as f:
            self.assertEqual(f.read(4), b"\x28\xb5\x2f\xfd")
        names = [m.name for m, _ in read_tar(plain)]
        self.assertEqual((names[0], names[-1]), (harness.MANIFEST, LIST))
        self.assertEqual(sorted(names[:-1]), sorted(files))
        # Through a pipe, compressed.
        with subprocess.Popen([BENNU, "export", "--zstd", second, "-"], stdout=subprocess.PIPE, env=self.env) as out:
            self.ok("import", "-", self.path("piped"), stdin=out.stdout)
        self.assertEqual(out.returncode, 0)
        self.same(self.path("piped"), files)
        shutil.rmtree(second)
        answer = self.ok_json("import", small, self.path("unpacked"))
        self.assertIs(answer["verified"], True)
        self.same(self.path("unpacked"), files)
        os.mkdir(self.path("there"))
        self.assertEqual(self.ok("import", plain, self.path("there")).stdout, "")
        self.same(self.path("there"), files)
        self.assertIn("as it was written", self.ok("inspect", "--verify", self.path("there")).stdout)
        self.restore(program, self.path("there"))
        program.go_on()

    def test_what_cannot_be_exported(self):
        _, ck = self.checkpoint()
        os.mkdir(self.path("shelf"))
        out = self.path("shelf", "a.tar")

        def fails(code, *says, to=out, **kwargs):
            self.refused(code, "export", ck, to, says=says, **kwargs)
            self.assertEqual(os.listdir(self.path("shelf")), [])
        self.refused(5, "export", self.path("shelf"), out, says="not a Bennu checkpoint")
        self.refused(1, "export", self.path("nowhere"), out, says="cannot open the checkpoint")
        fails(1, "cannot make a file in", to=self.path("no", "such", "a.tar"))
        fails(1, "no regular file", "standard output", to=self.path("shelf"))
        fails(1, "lies in the checkpoint itself", to=os.path.join(ck, "a.tar"))
        with open("/dev/full", "wb") as full:
            done = subprocess.run([BENNU, "export", ck, "-"], stdout=full, stderr=subprocess.PIPE, env=self.env, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"cannot write standard output: No space left", done.stderr)
        lock = os.open(ck, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails(1, "being removed or rewritten", "try again")
        os.close(lock)
        os.mkdir(os.path.join(ck, "sub"))
        fails(1, "sub is a directory")
        os.rmdir(os.path.join(ck, "sub"))
        os.symlink("/etc/hostname", os.path.join(ck, "link.img"))
        fails(1, "link.img is a symbolic link")
        os.unlink(os.path.join(ck, "link.img"))
        with open(os.path.join(ck, ".half"), "w", encoding="utf-8"):
            pass
        pack = os.path.join(ck, "bennu-pack-0.img")
        with open(os.path.join(ck, "bennu-pack-77.img"), "wb"):
            pass
        self.ok("export", ck, out)
        names = [m.name for m, _ in read_tar(out)]
        self.assertNotIn(".half", names)
        self.assertNotIn("bennu-pack-77.img", names)
        with open(out, "rb") as f:
            before = f.read()
        os.truncate(pack, os.path.getsize(pack) - 1)
        self.refused(5, "export", ck, out, says=("bennu-pack-0.img", "is truncated"))
        with open(out, "rb") as f:
            self.assertEqual(f.read(), before)
        os.unlink(out)
        os.unlink(os.path.join(ck, "inventory.img"))
        fails(5, "inventory.img is missing")

    def no_import(self, path, *says, code=5):
        """Nothing is left, in a folder that was there or, the next time, was not."""
        folder, self.turn = self.path("new"), not self.turn
        if self.turn:
            os.mkdir(folder)
        self.refused(code, "import", path, folder, says=says)
        if self.turn:
            os.rmdir(folder)
        self.assertFalse(os.path.lexists(folder))

    def test_hostile_archives(self):
        _, ck = self.checkpoint()
        good = self.path("good.tar")
        self.ok("export", ck, good)
        good = read_tar(good)
        bad = self.path("bad.tar")
        outside = self.path("outside.img")
        for says, entry in [
            ("has", member("../outside.img", b"x")),
            ("has", member(outside, b"x")),
            ("has", member("sub/outside.img", b"x")),
            ("has", member("..", b"x")),
            ("has", member(".hidden.img", b"x")),
            ("has", member("a b.img", b"x")),
            ("has", member("a\n.img", b"x")),
            ("has", member("a" * 201, b"x")),
            ("no regular file", member("odd.img", type=tarfile.SYMTYPE, linkname=outside)),
            ("no regular file", member("odd.img", type=tarfile.LNKTYPE, linkname="inventory.img")),
            ("no regular file", member("odd.img", type=tarfile.CHRTYPE, devmajor=1, devminor=3)),
            ("no regular file", member("odd.img", type=tarfile.FIFOTYPE)),
            ("has", member("odd.img", type=tarfile.DIRTYPE)),
            ("twice", member("core-9.img", b"x")),
            ("twice", member(harness.MANIFEST, b"x")),
            ("manifest does not know", member("bennu-pack-77.img", b"x")),
            ("another length by its manifest", member("bennu-pack-0.img", b"x")),
        ]:
            with self.subTest(entry=entry[0].name, type=entry[0].type):
                entries = good[:1] + [member("core-9.img", b"y"), entry] + good[1:]
                self.no_import(write_tar(bad, entries), says, "do not trust it")
                self.assertFalse(os.path.lexists(outside))
        self.no_import(write_tar(bad, good[1:]), "does not come first", "unpack it with tar")
        self.no_import(write_tar(bad, []), "damaged or no archive")
        self.no_import(write_tar(bad, good + good[-1:]), "goes on after its list")
        self.no_import(write_tar(bad, good[:-1]), "is cut off")
        for i in (1, len(good) // 2, len(good) - 2):
            self.no_import(write_tar(bad, good[:i] + good[i + 1:]), "is damaged", "copy or export it again")
        with open(bad, "wb") as f:
            f.write(os.urandom(1 << 16))
        self.no_import(bad, "damaged or no archive")
        self.no_import(self.path("nowhere"), "cannot open the archive", code=1)
        # What is in a folder already stays.
        self.refused(1, "import", write_tar(bad, good), ck, says="is not empty")
        self.assertEqual(sorted(os.listdir(ck)), sorted(m.name for m, _ in good[:-1]))

    def test_damage(self):
        _, ck = self.checkpoint()
        good, bad = self.path("good.tar"), self.path("bad.tar")
        self.ok("export", ck, good)
        with tarfile.open(good) as tar:
            places = {m.name: (m.offset_data, m.size) for m in tar}
        with open(good, "rb") as f:
            whole = f.read()
        for name in ("bennu-pack-0.img", "pages-1.img", "inventory.img", LIST):
            at, size = places[name]
            damaged = bytearray(whole)
            damaged[at + size // 2] ^= 1
            with open(bad, "wb") as f:
                f.write(damaged)
            self.no_import(bad, "bad.tar is damaged", "is not as it was exported", name if name != LIST else "")
        small = self.path("small.tar.zst")
        self.ok("export", ck, small)
        with open(small, "rb") as f:
            compressed = f.read()
        ends = [at + size // 2 for at, size in (places["pages-1.img"], places[LIST])]
        ends += [places[n][0] - 512 for n in ("inventory.img", LIST)]
        for data, cuts in ((whole, ends), (compressed, [0, 1000, len(compressed) - 1])):
            for cut in cuts:
                with open(bad, "wb") as f:
                    f.write(data[:cut])
                self.no_import(bad, "export")
        # Damage that was there before.
        with open(os.path.join(ck, "bennu-pack-0.img"), "r+b") as f:
            byte = f.read(1)
            f.seek(0)
            f.write(bytes([byte[0] ^ 1]))
        self.ok("export", ck, bad)
        self.no_import(bad, "bennu-pack-0.img", "segment", "it was exported like that", "--no-verify")
        self.assertIs(self.ok_json("import", "--no-verify", bad, self.path("seen"))["verified"], False)
        self.assertEqual(content(self.path("seen")), content(ck))

    def test_broken_off(self):
        _, ck = self.checkpoint()
        good, there = self.path("good.tar"), self.path("there")
        self.ok("export", ck, good)
        with open(good, "rb") as f:
            whole = f.read()
        with subprocess.Popen([BENNU, "import", "-", there], stdin=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=self.env) as program:
            program.stdin.write(whole[:-20000])
            program.stdin.flush()
            wait_for(lambda: os.path.isdir(there) and os.path.exists(os.path.join(there, "bennu-pack-0.img")),
                     "a pack is there")
            self.assertFalse({harness.MANIFEST, "inventory.img"} & set(os.listdir(there)))
            program.send_signal(signal.SIGTERM)
            message = program.stderr.read()
        self.assertEqual(program.returncode, 128 + signal.SIGTERM)
        self.assertIn(b"broken off", message)
        self.assertEqual(message.count(b"\n"), 1)
        self.assertFalse(os.path.lexists(there))


if __name__ == "__main__":
    harness.main()
