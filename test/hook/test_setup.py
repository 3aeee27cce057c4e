#!/usr/bin/env python3
"""`bennu install` and `bennu uninstall` in a root folder: what they put there, twice, over what others put there, and away again.

Environment: BENNU_BUILD (meson's test environment sets it)."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

BUILD = os.environ["BENNU_BUILD"]
BENNU = os.path.join(BUILD, "src/cli/bennu")
HOOK = "/usr/share/containers/oci/hooks.d/50-bennu.json"
CDI = "/etc/cdi/bennu.json"
CONF = "/etc/criu/default.conf"
PLUGIN = "/usr/lib/criu/bennu_plugin.so"
STOCK = "/usr/lib/criu/cuda_plugin.so"
AGENTS = "/usr/lib/bennu/agents"
RECORD = "/var/lib/bennu/install.json"

with open(os.path.join(BUILD, "meson-info/intro-buildoptions.json"), encoding="utf-8") as options:
    OPTIONS = {option["name"]: option["value"] for option in json.load(options)}
PREFIX = OPTIONS["prefix"]
OUR_FOLDER = os.path.join(PREFIX, OPTIONS["libdir"], "bennu/criu")


class Setup(unittest.TestCase):
    def setUp(self):
        self.root = tempfile.mkdtemp(prefix="bennu-setup.")
        self.addCleanup(shutil.rmtree, self.root)

    def bennu(self, command, *arguments, program=BENNU, code=0):
        done = subprocess.run([program, command, "--root=" + self.root, "--json", *arguments], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=300, check=False)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        result = json.loads(done.stdout)
        self.assertEqual(result["ok"], code == 0)
        return {a["path"]: (a["action"], a["note"]) for a in result.get("actions", ())}

    def write(self, path, text):
        os.makedirs(os.path.dirname(self.root + path), exist_ok=True)
        with open(self.root + path, "w", encoding="utf-8") as out:
            out.write(text)

    def read(self, path):
        with open(self.root + path, encoding="utf-8") as text:
            return text.read()

    def tree(self):
        """Every file and folder, with contents."""
        found = {}
        for folder, folders, names in os.walk(self.root):
            for name in folders + names:
                path = os.path.join(folder, name)
                content = None
                if os.path.islink(path):
                    content = os.readlink(path)
                elif os.path.isfile(path):
                    with open(path, "rb") as file:
                        content = (file.read(), os.stat(path).st_mode)
                found[path[len(self.root):]] = content
        return found

    def agent(self):
        names = os.listdir(self.root + AGENTS)
        self.assertEqual(len(names), 1, names)
        return f"{AGENTS}/{names[0]}/libbennu.so"

    def test_what_is_there(self):
        self.bennu("install")
        agent = self.agent()
        self.assertRegex(agent, r"/0\.\d+\.\d+-[0-9a-f]{16}/libbennu\.so$")
        tree = self.tree()
        self.assertEqual(tree[agent], (tree[f"{PREFIX}/{OPTIONS['libdir']}/bennu/agent/libbennu.so"][0], 0o100644))
        self.assertEqual(tree[PLUGIN][0], tree[OUR_FOLDER + "/bennu_plugin.so"][0])
        self.assertEqual(self.read(CONF).splitlines()[1:-1], ["link-remap", "ghost-limit 64M"])
        hook = json.loads(self.read(HOOK))
        self.assertEqual((hook["stages"], hook["when"]), (["precreate"], {"always": True}))
        self.assertTrue(os.access(self.root + hook["hook"]["path"], os.X_OK))
        self.assertEqual(hook["hook"]["args"][1:], ["--agent=" + agent])
        device, = json.loads(self.read(CDI))["devices"]
        mount, = device["containerEdits"]["mounts"]
        self.assertEqual(mount["hostPath"], agent)
        self.assertEqual(device["containerEdits"]["env"], ["LD_PRELOAD=" + mount["containerPath"], "UV_USE_IO_URING=0"])
        for path, content in tree.items():
            self.assertFalse(re.search(r"\.bennu-new$|\.new$", path), path)
            if isinstance(content, tuple):
                self.assertTrue(content[1] & 0o004, path)
            elif content is None:
                self.assertTrue(os.stat(self.root + path).st_mode & 0o005, path)

    def test_twice_is_once(self):
        self.bennu("install")
        before = self.tree()
        done = self.bennu("install")
        self.assertEqual({action for action, _ in done.values()} - {"skipped"}, {"unchanged"})
        self.assertEqual(self.tree(), before)

    def test_nothing_is_left(self):
        for folder in ("/etc/cdi", "/usr/bin"):  # and what was there stays, though it is empty
            os.makedirs(self.root + folder)
        before = self.tree()
        self.bennu("install")
        self.bennu("install")
        self.bennu("uninstall", "--all-versions")
        self.assertEqual(self.tree(), before)
        self.bennu("uninstall", "--all-versions")
        self.assertEqual(self.tree(), before)

    def test_chosen_containers(self):
        def when():
            return json.loads(self.read(HOOK))["when"]
        self.bennu("install", "--containers=chosen")
        (name, value), = when()["annotations"].items()
        self.assertEqual(list(when()), ["annotations"])
        self.assertTrue(re.search(name, "dev.bennu.agent"))
        for other in ("dev.bennu.agents", "devxbennu.agent", "x.dev.bennu.agent"):
            self.assertFalse(re.search(name, other))
        self.assertEqual([v for v in ("on", "preload", "off", "upon", "") if re.search(value, v)], ["on", "preload"])
        before = self.tree()
        self.bennu("install")  # as an upgrade does it: what was said once holds
        self.assertEqual(self.tree(), before)
        self.assertEqual(self.bennu("install", "--containers=all")[HOOK][0], "updated")
        self.assertEqual(when(), {"always": True})
        done = subprocess.run([BENNU, "install", "--root=" + self.root, "--containers=some"], capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 2)
        self.assertIn("'chosen'", done.stderr)

    def test_agents_are_kept(self):
        self.bennu("install")
        agent = self.agent()
        old = f"{AGENTS}/0.0.9-0123456789abcdef/libbennu.so"
        self.write(old, "old")
        self.assertEqual(self.bennu("install")[os.path.dirname(old)][0], "kept")
        done = self.bennu("uninstall")
        self.assertEqual((done[agent][0], done[old][0]), ("kept", "kept"))
        self.assertEqual(sorted(p for p, content in self.tree().items() if content is not None), sorted([agent, old]))
        self.bennu("uninstall", "--all-versions")
        self.assertEqual([p for p, content in self.tree().items() if content is not None], [])
        self.assertFalse(os.path.exists(self.root + "/usr/lib/bennu"))

    def test_dry_run(self):
        before = self.tree()
        done = self.bennu("install", "--dry-run")
        self.assertEqual(done[HOOK][0], "installed")
        self.assertEqual(self.tree(), before)
        self.bennu("install")
        before = self.tree()
        self.assertEqual(self.bennu("uninstall", "--dry-run", "--all-versions")[HOOK][0], "removed")
        self.assertEqual(self.tree(), before)

    def test_edited_files(self):
        """What somebody has changed is neither overwritten nor lost, and an edited hook does not outlive its program."""
        self.bennu("install")
        for path in (HOOK, CDI):
            self.write(path, "mine")
        done = self.bennu("install")
        for path in (HOOK, CDI):
            self.assertEqual(done[path][0], "kept")
            self.assertIn(path + ".new", done[path][1])
            self.assertEqual(self.read(path), "mine")
            json.loads(self.read(path + ".new"))
        self.bennu("uninstall", "--all-versions")
        files = {p: c[0] for p, c in self.tree().items() if c is not None}
        self.assertEqual(files, {HOOK + ".saved": b"mine", CDI + ".saved": b"mine"})

    def test_old_version_is_updated(self):
        self.bennu("install")
        record = json.loads(self.read(RECORD))
        self.write(HOOK, "")  # as an older Bennu wrote it, which had it in its record
        record["files"][HOOK] = "cbf29ce484222325"
        self.write(RECORD, json.dumps(record))
        self.write(PLUGIN, "old")
        done = self.bennu("install")
        self.assertEqual((done[HOOK][0], done[PLUGIN][0]), ("updated", "updated"))
        json.loads(self.read(HOOK))

    def test_configuration_of_others(self):
        for mine in ("timeout 60\n", "# nothing\n\n", "tcp-close"):
            with self.subTest(mine=mine):
                self.write(CONF, mine)
                self.bennu("install")
                self.bennu("install")
                text = self.read(CONF)
                self.assertTrue(text.startswith(mine))
                self.assertEqual(text.count("BEGIN bennu"), 1)
                self.write(CONF, text + "evasive-devices\n")  # added behind the block
                self.bennu("install")
                self.bennu("uninstall")
                self.assertEqual(self.read(CONF), mine + ("" if mine.endswith("\n") else "\n") + "evasive-devices\n")

    def test_own_ghost_limit(self):
        for line in ("ghost-limit 1G\n", "ghost-limit=1G\n"):
            self.write(CONF, line)
            self.bennu("install")
            self.assertNotIn("64M", self.read(CONF))

    def test_stock_plugin(self):
        """CRIU's own plugin stays where it is; CRIU is told to use the folder that has Bennu's alone."""
        self.write(STOCK, "stock")
        self.write("/usr/lib/criu/amdgpu_plugin.so", "other")
        done = self.bennu("install")
        self.assertEqual(done["/usr/lib/criu"][0], "kept")
        self.assertIn("no longer loads amdgpu_plugin.so", done["/usr/lib/criu"][1])
        self.assertFalse(os.path.exists(self.root + PLUGIN))
        self.assertIn(f"\nlibdir {OUR_FOLDER}\n", self.read(CONF))
        self.assertEqual(os.listdir(self.root + OUR_FOLDER), ["bennu_plugin.so"])
        self.bennu("install")
        os.remove(self.root + STOCK)  # gone: the usual folder again
        self.bennu("install")
        self.assertNotIn("libdir", self.read(CONF))
        self.assertTrue(os.path.exists(self.root + PLUGIN))
        self.write(STOCK, "stock")  # and there again
        self.bennu("install")
        self.assertFalse(os.path.exists(self.root + PLUGIN))
        self.bennu("uninstall")
        self.assertFalse(os.path.exists(self.root + CONF))
        self.assertEqual(self.read(STOCK), "stock")

    def test_own_plugin_folder(self):
        for line in ("libdir /opt/criu\n", "libdir=/opt/criu\n", "libdir /nowhere\n\tlibdir  /opt/criu \n"):
            with self.subTest(line):
                self.own_plugin_folder(line)

    def own_plugin_folder(self, line):
        self.write(CONF, line)
        if os.path.exists(self.root + "/opt/criu"):
            shutil.rmtree(self.root + "/opt/criu")
        os.makedirs(self.root + "/opt/criu")
        self.bennu("install")
        self.assertTrue(os.path.exists(self.root + "/opt/criu/bennu_plugin.so"))
        self.assertFalse(os.path.exists(self.root + PLUGIN))
        self.write("/opt/criu/cuda_plugin.so", "stock")
        done = self.bennu("install")
        self.assertEqual(done["/opt/criu"][0], "skipped")
        self.assertIn("acts", done["/opt/criu"][1])
        self.assertFalse(os.path.exists(self.root + "/opt/criu/bennu_plugin.so"))
        self.bennu("uninstall")
        self.assertEqual(self.read(CONF), line)

    def test_from_where_it_is_installed(self):
        """As a package's script calls it: the programs are there, nobody's build folder is."""
        done = subprocess.run(["meson", "install", "-C", BUILD, "--no-rebuild", "--quiet"], capture_output=True, check=False,
                              env={**os.environ, "DESTDIR": self.root})
        self.assertEqual(done.returncode, 0, done.stderr)
        before = self.tree()
        program = os.path.join(self.root + PREFIX, OPTIONS["bindir"], "bennu")
        done = self.bennu("install", program=program)
        self.assertEqual(done[HOOK][0], "installed")
        done = self.bennu("uninstall", "--all-versions", program=program)
        self.assertEqual(done[PREFIX][0], "kept")
        self.assertEqual({p: c for p, c in self.tree().items() if c is not None},
                         {p: c for p, c in before.items() if c is not None})
        self.bennu("uninstall", program=program)

    def test_without_programs(self):
        """Bennu run from elsewhere for a root folder that has none of it."""
        elsewhere = tempfile.mkdtemp(prefix="bennu-setup.")
        self.addCleanup(shutil.rmtree, elsewhere)
        criu = os.path.join(elsewhere, "libexec/bennu")
        os.makedirs(os.path.join(elsewhere, "bin"))
        os.makedirs(criu)
        os.symlink(os.path.join(BUILD, "criu"), os.path.join(criu, "criu"))
        program = shutil.copy(BENNU, os.path.join(elsewhere, "bin/bennu"))
        environment = {**os.environ, "LD_LIBRARY_PATH": os.path.join(BUILD, "criu/lib")}
        done = subprocess.run([program, "install", "--root=" + self.root], capture_output=True, text=True, check=False,
                              env=environment)
        self.assertEqual(done.returncode, 1, done.stdout)
        self.assertIn("make install", done.stderr)
        self.assertEqual([p for p, content in self.tree().items() if content is not None], [])


@unittest.skipUnless(os.geteuid() == 0, "needs root")
class Machine(unittest.TestCase):
    """Without --root, in a copy-on-write copy of this machine."""

    def setUp(self):
        self.top = tempfile.mkdtemp(prefix="bennu-machine.")
        self.addCleanup(shutil.rmtree, self.top)

    def run_in_copy(self, script):
        """`script` is run by sh with $BENNU; a `criu` of version $1 can be made by `criu VERSION`."""
        setup = f"""
            set -e
            mount -t tmpfs tmpfs {self.top}
            mkdir {self.top}/upper {self.top}/work {self.top}/root
            mount -t overlay overlay -o lowerdir=/,upperdir={self.top}/upper,workdir={self.top}/work {self.top}/root || exit 77
            mkdir -p {self.top}/root{BUILD}
            for folder in /proc /dev {BUILD}; do mount --rbind $folder {self.top}/root$folder; done
            exec chroot {self.top}/root sh -ec "$1"
        """
        script = f"""
            BENNU={BENNU}
            rm -rf /run/systemd/system /usr/lib/criu /etc/criu
            criu() {{ printf '#!/bin/sh\necho Version: %s\n' $1 >/usr/local/sbin/criu; chmod 755 /usr/local/sbin/criu; }}
            {script}
        """
        done = subprocess.run(["unshare", "-m", "--propagation=private", "sh", "-c", setup, "sh", script], capture_output=True, text=True,
                              stdin=subprocess.DEVNULL, timeout=300, check=False)
        if done.returncode == 77:
            self.skipTest("no overlay of this machine's root folder can be mounted")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout

    def test_old_criu_gets_no_plugin(self):
        """It would fail at every checkpoint; and when it comes later, the plugin goes."""
        said = self.run_in_copy(f"""
            criu 3.17
            $BENNU install
            ! [ -e {PLUGIN} ] && ! [ -e {CONF} ] && [ -e {HOOK} ]
            criu 4.1.1
            $BENNU install
            [ -e {PLUGIN} ] && [ -e {CONF} ]
            criu 3.19
            $BENNU check | grep 'system plugins' || true
            $BENNU install
            ! [ -e {PLUGIN} ] && ! [ -e {CONF} ]
        """)
        self.assertRegex(said, r"skipped +/etc/criu/default.conf \(CRIU at \S+ is version 3.17")
        self.assertRegex(said, r"\[fail\] system plugins .*version 3.19.*bennu install")

    def test_systemd(self):
        """systemd here is a script that writes down what it is told."""
        said = self.run_in_copy("""
            criu 4.1.1
            mkdir -p /run/systemd/system
            printf '#!/bin/sh\\necho "$@" >>/told\\n' >/usr/local/bin/systemctl
            chmod 755 /usr/local/bin/systemctl
            export PATH=/usr/local/bin:$PATH
            $BENNU install --no-start && ! [ -e /told ]
            $BENNU install
            $BENNU uninstall --no-stop
            cat /told; rm /told
            $BENNU install && rm /told
            $BENNU uninstall
            cat /told
            printf '#!/bin/sh\\necho no bus; exit 1\\n' >/usr/local/bin/systemctl
            ! $BENNU install
        """)
        told = [line for line in said.splitlines() if line.startswith(("daemon-reload", "enable ", "disable "))]
        self.assertEqual(told, ["daemon-reload", "enable --now bennud.socket", "disable --now bennud.socket bennud.service"])
        self.assertRegex(said, r"failed +bennud.socket \(no bus")

    def test_agent_of_run_outlives_an_upgrade(self):
        """`bennu run` preloads the copy that is kept, once there is one."""
        said = self.run_in_copy(f"""
            criu 4.1.1
            $BENNU install >&2
            export BENNU_DRIVER={PREFIX}/{OPTIONS['libexecdir']}/bennu/sim/libcuda.so.1
            for bennu in /usr/local/bin/bennu /usr/bin/bennu; do [ -e $bennu ] && break; done
            $bennu run -- env | grep ^LD_PRELOAD
            rm -r /usr/lib/bennu/agents/*
            $bennu run -- env | grep ^LD_PRELOAD
        """)
        kept, own = (line.split("=", 1)[1].split(":")[0] for line in said.splitlines())
        self.assertRegex(kept, AGENTS + r"/[^/]+/libbennu.so$")
        self.assertEqual(own, f"{PREFIX}/{OPTIONS['libdir']}/bennu/agent/libbennu.so")

    def test_check(self):
        """What `bennu check` says of the container hook, at each stage."""
        said = self.run_in_copy("""
            check() { $BENNU check | grep -e 'container hook' -e 'system plugins' || true; }
            criu 4.1.1
            check
            mkdir -p /usr/lib/criu && touch /usr/lib/criu/cuda_plugin.so
            check
            $BENNU install
            check
            $BENNU install --containers=chosen
            check
            $BENNU install --containers=all
            rm /usr/lib/criu/cuda_plugin.so
            $BENNU install
            check
            rm -r /usr/lib/bennu/agents/*
            check
            rm /usr/local/libexec/bennu/bennu-oci-hook || rm /usr/libexec/bennu/bennu-oci-hook
            check
            $BENNU uninstall
        """)
        hook = [line for line in said.splitlines() if "container hook" in line]
        given = r"^\[ok\].* GPU containers /\S*/libbennu.so \(1 versions"
        chosen = r"^\[ok\].* GPU containers with the annotation dev.bennu.agent=on /\S*/libbennu.so \(1 versions"
        for line, want in zip(hook, (r"^\[ok\].*none", r"^\[ok\].*none", given, chosen, given, r"^\[fail\].*missing", r"^\[fail\].*cannot be run"),
                              strict=True):
            self.assertRegex(line, want)
        plugins = [line for line in said.splitlines() if "system plugins" in line]
        ours = "use Bennu's, too; CRIU's own .* does not act"
        for line, want in zip(plugins, ("none: podman", "use that one, bennu's own commands do not", ours, ours, "use Bennu's, too$"),
                              strict=False):
            self.assertRegex(line, want)


if __name__ == "__main__":
    sys.exit(unittest.main(verbosity=2))
