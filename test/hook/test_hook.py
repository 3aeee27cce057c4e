#!/usr/bin/env python3
"""The precreate hook on samples of containers' configurations: what is changed, and that everything else stays byte for byte.

Environment: BENNU_BUILD (meson's test environment sets it)."""

import copy
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest

BUILD = os.environ["BENNU_BUILD"]
HOOK = os.path.join(BUILD, "src/hook/bennu-oci-hook")
DRIVER = "/.bennu/driver/libcuda.so.1"
AGENT = "/.bennu/libbennu.so"
NO_IO_URING = "UV_USE_IO_URING=0"
OPTIONS = ["ro", "nosuid", "nodev", "bind", "rprivate"]
LIB = "/usr/lib/x86_64-linux-gnu"
MACHINE = {"x86_64": 62, "aarch64": 183}[os.uname().machine]


def elf(machine=MACHINE, bits=64, tail=b"driver"):
    return b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9) + struct.pack("<HH", 3, machine) + bytes(44) + tail


class Hook(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="bennu-hook.")
        self.addCleanup(shutil.rmtree, self.folder)
        self.agent = self.file("agents/1/libbennu.so", elf(tail=b"agent"))
        self.driver = self.file("host/libcuda.so.580.65.06", elf())
        self.root = os.path.join(self.folder, "root")
        self.file("root/lib64/ld-linux-x86-64.so.2")
        self.file("root/lib/ld-linux-aarch64.so.1")

    def file(self, name, content=b""):
        path = os.path.join(self.folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as out:
            out.write(content)
        return path

    def config(self, mounts=(), devices=(), env=(), annotations=None, **more):
        """As Podman 5 writes it: members in this order, numbers that do not fit into 64 bits with a sign."""
        return {
            "ociVersion": "1.2.0",
            "process": {
                "terminal": True, "user": {"uid": 1000, "gid": 1000, "additionalGids": [1000]},
                "args": ["python3", "-c", "print('<é\U0001f600\\u2028>')"],
                "env": ["PATH=/usr/bin:/bin", "HOME=/root", *env], "cwd": "/",
                "rlimits": [{"type": "RLIMIT_MEMLOCK", "hard": 18446744073709551615, "soft": 18446744073709551615}]},
            "root": {"path": self.root, "readonly": True},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=65536k"]},
                *mounts],
            "annotations": {"io.container.manager": "libpod", **(annotations or {})},
            "linux": {"devices": list(devices), "resources": {"cpu": {"shares": 1e3}}},
            **more}

    def bind(self, source, destination, **more):
        return {"destination": destination, "type": "bind", "source": source,
                "options": ["ro", "nosuid", "nodev", "rbind", "rprivate"], **more}

    def filter(self, text, *arguments):
        if not isinstance(text, bytes):
            text = json.dumps(text).encode() + b"\n"
        done = subprocess.run([HOOK, "--agent=" + self.agent, *arguments], input=text, capture_output=True,
                              timeout=60, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout, done.stderr.decode()

    def assert_same(self, config, said=None):
        text = config if isinstance(config, bytes) else json.dumps(config).encode() + b"\n"
        out, err = self.filter(text)
        self.assertEqual(out, text)
        if said is None:
            self.assertEqual(err, "")
        else:
            self.assertRegex(err, said)

    def assert_edited(self, config, want):
        """Edited to `want`, and a second time to nothing else."""
        out, err = self.filter(config)
        self.assertEqual(json.loads(out), want)
        self.assertEqual(err, "")
        self.assertEqual(self.filter(out), (out, ""))
        return out

    def mounted_over(self, config, index, others=()):
        want = copy.deepcopy(config)
        mount = want["mounts"][index]
        over = {"destination": mount["destination"], "type": "bind", "source": self.agent, "options": OPTIONS}
        mount["destination"] = DRIVER
        mount.setdefault("type", "bind")
        for other in others:
            want["mounts"][other]["source"] = self.agent
        want["mounts"].insert(index + 1, over)
        want["process"]["env"].append(NO_IO_URING)
        return want

    def preloaded(self, config, value=AGENT):
        want = copy.deepcopy(config)
        env = want["process"]["env"]
        env[:] = [value if e.startswith("LD_PRELOAD=") else e for e in env]
        if value == AGENT:
            env.append("LD_PRELOAD=" + AGENT)
        env.append(NO_IO_URING)
        want["mounts"].append({"destination": AGENT, "type": "bind", "source": self.agent, "options": OPTIONS})
        return want

    # --- crun --------------------------------------------------------------------------------------------------------

    def test_mounts_without_type_get_one(self):
        """As CDI makes them, in any number: crun crashes on them."""
        def plain(source, destination):
            mount = self.bind(source, destination)
            del mount["type"]
            return mount
        config = self.config([plain(self.driver, LIB + "/libcuda.so.1")]
                             + [plain("/usr/bin/nvidia-smi", f"/usr/bin/tool-{i}") for i in range(200)]
                             + [{"destination": "/run", "source": "tmpfs", "options": ["nosuid"]}])
        want = self.mounted_over(config, 2)
        for mount in want["mounts"][2:-1]:
            mount["type"] = "bind"
        self.assert_edited(config, want)
        self.assert_same(self.config([plain("/usr/bin/tool", "/usr/bin/tool")]))
        # With a GPU and without the agent, too: switched off, in an image without glibc, or given by CDI.
        for others, more in (([], {"annotations": {"dev.bennu.agent": "off"}}), ([plain(self.agent, AGENT)], {})):
            config = self.config([plain(self.driver, LIB + "/libcuda.so.1"), plain("/usr/bin/tool", "/usr/bin/tool"), *others], **more)
            want = copy.deepcopy(config)
            for mount in want["mounts"]:
                mount.setdefault("type", "bind")
            self.assert_edited(config, want)
        shutil.rmtree(self.root)
        config = self.gpu(mounts=[plain("/usr/bin/tool", "/usr/bin/tool")])
        out, err = self.filter(config)
        config["mounts"][-1]["type"] = "bind"
        self.assertEqual(json.loads(out), config)
        self.assertIn("no agent for this container", err)

    # --- nothing to do -----------------------------------------------------------------------------------------------

    def test_no_gpu(self):
        self.assert_same(self.config())
        self.assert_same(b'  {"mounts":[ ] ,"a":1.0e+5, "b":[{}, [], "\\u0041\\ud83d\\ude00\\/"],"c":null}\n\n')

    def test_cuda_image_without_gpu(self):
        """Images carry the variable for whoever runs them; `void` and `none` say that there is to be none."""
        for value in ("void", "none", ""):
            self.assert_same(self.config(env=["NVIDIA_VISIBLE_DEVICES=" + value],
                                         hooks={"prestart": [{"path": "/usr/bin/nvidia-container-runtime-hook"}]}))
        if not os.path.exists("/dev/nvidiactl"):
            self.assert_same(self.config(env=["NVIDIA_VISIBLE_DEVICES=all"]))

    def test_annotation_off(self):
        self.assert_same(self.config([self.bind(self.driver, LIB + "/libcuda.so.1")],
                                     annotations={"dev.bennu.agent": "off"}))

    def test_files_that_are_no_driver(self):
        for name, content in (("script", b"#!/bin/sh\n" + bytes(64)), ("32", elf(3, 32)), ("other", elf(40)), ("short", b"\x7fELF")):
            self.assert_same(self.config([self.bind(self.file("host/" + name, content), LIB + "/libcuda.so.1")]))
        self.assert_same(self.config([self.bind(self.folder + "/missing", LIB + "/libcuda.so.1")]))
        os.mkfifo(self.folder + "/fifo")  # opening it must not wait
        self.assert_same(self.config([self.bind(self.folder + "/fifo", LIB + "/libcuda.so.1")]))

    def test_other_names(self):
        for name in ("/libcuda.so.1.py", "/libcudart.so.12", "/xlibcuda.so.1", "/libcuda.so.", "/libcudadebugger.so.1"):
            self.assert_same(self.config([self.bind(self.driver, LIB + name)]))

    # --- the agent in the driver's place ------------------------------------------------------------------------------

    def test_nvidia_cdi(self):
        """The versioned file alone is mounted; NVIDIA's own hooks make the links in the container."""
        config = self.config(
            [self.bind("/usr/bin/nvidia-smi", "/usr/bin/nvidia-smi"),
             self.bind(self.driver, LIB + "/libcuda.so.580.65.06"),
             self.bind("/usr/lib/libcudadebugger.so.580.65.06", LIB + "/libcudadebugger.so.580.65.06")],
            [{"path": "/dev/nvidia0", "type": "c", "major": 195, "minor": 0}], ["NVIDIA_VISIBLE_DEVICES=void"],
            hooks={"createContainer": [{"path": "/usr/bin/nvidia-cdi-hook", "args": ["nvidia-cdi-hook", "update-ldcache"]}]})
        out = self.assert_edited(config, self.mounted_over(config, 3))
        self.assertIn(b'"hard": 18446744073709551615', out)
        self.assertIn(b'"shares": 1000.0', out)

    def test_plain_mount(self):
        config = self.config([self.bind(self.driver, LIB + "/libcuda.so.1")])
        self.assert_edited(config, self.mounted_over(config, 2))

    def test_link_as_source(self):
        link = self.folder + "/host/libcuda.so.1"
        os.symlink("libcuda.so.580.65.06", link)
        config = self.config([self.bind(link, LIB + "/libcuda.so.1")])
        self.assert_edited(config, self.mounted_over(config, 2))

    def test_bind_by_option(self):
        mount = self.bind(self.driver, LIB + "/libcuda.so.1")
        del mount["type"]
        config = self.config([mount])
        self.assert_edited(config, self.mounted_over(config, 2))

    def test_several_names(self):
        """Two names and a 32-bit driver: both names lead to the agent, the 32-bit one is left alone."""
        other = self.file("host32/libcuda.so.580.65.06", elf(3, 32))
        config = self.config([self.bind(other, "/usr/lib/i386-linux-gnu/libcuda.so.1"),
                              self.bind(self.driver, LIB + "/libcuda.so.580.65.06"),
                              self.bind(self.driver, LIB + "/libcuda.so.1")])
        self.assert_edited(config, self.mounted_over(config, 3, others=[4]))

    def test_existing_preload_is_left_alone(self):
        config = self.config([self.bind(self.driver, LIB + "/libcuda.so.1")], env=["LD_PRELOAD=/usr/lib/libjemalloc.so"])
        self.assert_edited(config, self.mounted_over(config, 2))

    def test_odd_names(self):
        """Characters that JSON escapes, in the mount that is moved."""
        odd = self.file('host/"a\\b\té<>/libcuda.so.1', elf())
        config = self.config([self.bind(odd, LIB + '/"x\\\n</libcuda.so.1')])
        self.assert_edited(config, self.mounted_over(config, 2))

    def test_agent_already_there(self):
        """By hand, by CDI, or an older version in a configuration that was edited before."""
        self.assert_same(self.config([self.bind(self.agent, LIB + "/libcuda.so.1")]))
        self.assert_same(self.config([self.bind(self.driver, DRIVER), self.bind("/old/agent", LIB + "/libcuda.so.1")]))
        self.assert_same(self.config([self.bind("/old/agent", AGENT), self.bind(self.driver, LIB + "/libcuda.so.1")]))

    # --- preload ------------------------------------------------------------------------------------------------------

    def gpu(self, **more):
        return self.config(devices=[{"path": "/dev/nvidia0", "type": "c"}], **more)

    def test_devices(self):
        self.assert_edited(self.gpu(), self.preloaded(self.gpu()))
        config = self.config([self.bind("/dev/nvidiactl", "/dev/nvidiactl")])
        self.assert_edited(config, self.preloaded(config))

    def test_nvidias_old_hook(self):
        config = self.config(env=["NVIDIA_VISIBLE_DEVICES=all"], hooks={
            "prestart": [{"path": "/usr/bin/nvidia-container-runtime-hook", "args": ["nvidia-container-runtime-hook", "prestart"]}]})
        self.assert_edited(config, self.preloaded(config))

    def test_existing_preload(self):
        config = self.gpu(env=["LD_PRELOAD=/a.so /b.so", "X=1"])
        self.assert_edited(config, self.preloaded(config, f"LD_PRELOAD={AGENT}:/a.so /b.so"))
        config = self.gpu(env=["LD_PRELOAD="])
        self.assert_edited(config, self.preloaded(config, f"LD_PRELOAD={AGENT}"))

    def test_own_words_on_io_uring(self):
        config = self.gpu(env=["LD_PRELOAD=/x", "UV_USE_IO_URING=1"])
        want = self.preloaded(config, f"LD_PRELOAD={AGENT}:/x")
        want["process"]["env"].pop()
        self.assert_edited(config, want)

    def test_empty_environment(self):
        config = self.gpu()
        config["process"]["env"] = []
        self.assert_edited(config, self.preloaded(config))

    def test_annotation_preload(self):
        config = self.config([self.bind(self.driver, LIB + "/libcuda.so.1")], annotations={"dev.bennu.agent": "preload"})
        self.assert_edited(config, self.preloaded(config))

    def test_image_with_newer_driver(self):
        """Forward compatibility: the image's libcuda is the one that will be loaded."""
        os.makedirs(self.root + "/usr/local")
        os.symlink("/usr/local/cuda-13", self.root + "/usr/local/cuda")  # as the container sees it
        config = self.config([self.bind(self.driver, LIB + "/libcuda.so.580.65.06")])
        self.file("root/usr/local/cuda-13/compat/libcuda.so.570.10")
        self.assert_edited(config, self.mounted_over(config, 2))
        for folder in ("compat", "compat/lib.real"):
            newer = self.file(f"root/usr/local/cuda-13/{folder}/libcuda.so.590.44.01")
            self.assert_edited(config, self.preloaded(config))
            os.remove(newer)

    def test_musl(self):
        shutil.rmtree(self.root)
        self.file(f"root/lib/ld-musl-{os.uname().machine}.so.1")
        self.assert_same(self.gpu(), "musl")
        config = self.gpu(annotations={"dev.bennu.agent": "preload"})
        self.assert_edited(config, self.preloaded(config))

    def test_no_c_library(self):
        shutil.rmtree(self.root)
        self.assert_same(self.gpu(), "cannot be looked into")
        os.mkdir(self.root)
        self.assert_same(self.gpu(), "no glibc")

    def test_links_do_not_lead_out_of_the_image(self):
        """A link to the machine's own glibc is not the image's."""
        shutil.rmtree(self.root)
        os.mkdir(self.root)
        real = next(p for p in ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1") if os.path.exists(p))
        os.mkdir(self.root + os.path.dirname(real))
        os.symlink("../" * 20 + os.path.realpath(real)[1:], self.root + real)
        self.assert_same(self.gpu(), "no glibc")

    # --- what goes wrong ----------------------------------------------------------------------------------------------

    def test_missing_agent(self):
        os.remove(self.agent)
        self.assert_same(self.gpu(), "no agent at .*bennu install")
        self.assert_same(self.config([self.bind(self.driver, LIB + "/libcuda.so.1")]), "no agent at")
        self.assert_same(self.config())

    def test_invalid_json(self):
        whole = json.dumps(self.gpu()).encode()
        for text in (b"", b" ", b"{", b"nonsense", b"{}{}", b'{"a":}', b'{"a" 1}', b"[1,]", b'{"a":01}', b'"\\x"', b'"\n"', b'"\\u12"',
                     b"[" * 100000, b'{"a":' * 100000, b"\0\1\2", b"\xff\xfe{}", whole[:-1], whole[1:], whole + b"x", whole + b"\0",
                     whole.replace(b'"env": [', b'"env": [,')):
            self.assert_same(text, "cannot be read")

    def test_wrong_types(self):
        """Valid JSON in which nothing is what it should be."""
        for config in (1, "x", [], {}, None, {"mounts": {}}, {"mounts": [1, [], None, {"destination": []}]},
                       {"process": []}, {"annotations": 7, "linux": {"devices": [{"path": 1}, 2]}, "hooks": []}):
            self.assert_same(config)
        self.assert_same({**self.gpu(), "mounts": 5}, "no list of mounts")
        self.assert_same({**self.gpu(), "process": {"env": {}}}, "no environment")
        self.assert_same({**self.gpu(), "root": {"path": "relative"}}, "cannot be looked into")
        self.assert_same({**self.gpu(), "root": {"path": 5}}, "cannot be looked into")

    def test_huge(self):
        """Too large to be edited, and passed on whole."""
        self.assert_same(json.dumps(self.gpu(env=["X=" + "y" * 10_000_000])).encode(), "too large")
        config = self.gpu(env=[f"X{i}=" + "y" * 50 for i in range(50_000)])
        self.assert_edited(config, self.preloaded(config))

    def test_too_many_drivers(self):
        config = self.config([self.bind(self.driver, f"/{i}/libcuda.so.1") for i in range(9)])
        self.assert_same(config, "more than 8 times")

    def test_broken_output(self):
        with open("/dev/full", "wb") as full:
            done = subprocess.run([HOOK, "--agent=" + self.agent], input=b"{}", stdout=full, stderr=subprocess.PIPE, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"cannot pass", done.stderr)

    def test_usage(self):
        for arguments in (["--nonsense"], ["operand"], ["--agent=relative"]):
            done = subprocess.run([HOOK, *arguments], input=b"{}", capture_output=True, check=False)
            self.assertEqual((done.returncode, done.stdout), (2, b""))


if __name__ == "__main__":
    sys.exit(unittest.main(verbosity=2))
