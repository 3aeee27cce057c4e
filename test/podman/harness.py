"""What the tests of containers share. They run inside the private Debian 13 (scripts/in-debian-root), whose system they change
as they like: Bennu is installed in it as on any machine, and the simulated driver is the machine's driver.

Nothing here sleeps for a time and hopes. When a test fails, the logs of Podman, conmon, the runtime, CRIU and bennud are printed.
"""

import atexit
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
from waiting import PATIENCE, text_of, wait_for  # noqa: E402

SOURCE = os.environ.get("BENNU_SOURCE", "")
BUILD = os.environ.get("BENNU_BUILD", "")
STAGE = os.environ.get("BENNU_STAGE", "")
STORAGE = "/var/lib/containers"
LIBS = os.path.dirname((glob.glob("/usr/lib/*/libc.so.6") or ["/usr/lib/none/libc.so.6"])[0])
DRIVER = LIBS + "/libcuda.so.575.57.08"
MANIFEST = "bennu-manifest.img"
BENNU = "/usr/local/bin/bennu"
BENNUD = "/usr/local/libexec/bennu/bennud"
AGENT = glob.glob("/usr/local/lib/*/bennu/agent/libbennu.so")
# Where the kernel needs it for network sockets (scripts/debian-root says why): a newer CRIU than the distribution's.
NEWER_CRIU = "/opt/criu/bin"
SMALL = ["--allocs=8", "--min=4", "--max=3M"]


def call(*command, **kwargs):
    done = subprocess.run([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, timeout=120, check=False, **kwargs)
    if done.returncode != 0:
        raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


# --- the machine ---

def install():
    """Bennu and a driver, as on a machine with a GPU."""
    atexit.register(tidy)
    shutil.copytree(f"{STAGE}/install", "/", symlinks=True, dirs_exist_ok=True)
    AGENT[:] = glob.glob("/usr/local/lib/*/bennu/agent/libbennu.so")
    shutil.copy(f"{BUILD}/sim/libcuda.so.1", DRIVER)
    os.symlink(os.path.basename(DRIVER), f"{LIBS}/libcuda.so.1")
    call("ldconfig")
    print(call(BENNU, "install"), file=sys.stderr)
    write_cdi("versioned", [(DRIVER, DRIVER)])
    write_cdi("direct", [(DRIVER, f"{LIBS}/libcuda.so.1")])


def write_cdi(name, mounts):
    """A device of the kind by which NVIDIA's container toolkit delivers the driver's files."""
    env = [f"{k}={v}" for k, v in os.environ.items() if k.startswith("BENNU_SIM_")]
    spec = {"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu", "devices": [{"name": name, "containerEdits": {
        "env": ["NVIDIA_VISIBLE_DEVICES=void"] + env,
        "mounts": [{"hostPath": host, "containerPath": path, "options": ["ro", "nosuid", "nodev", "rbind", "rprivate"]}
                   for host, path in mounts]}}]}
    os.makedirs("/etc/cdi", exist_ok=True)
    with open(f"/etc/cdi/nvidia-{name}.json", "w", encoding="utf-8") as f:
        json.dump(spec, f)


def tidy():
    """The groups that Podman leaves are the one thing in here that outlives us."""
    for folder in sorted(glob.glob("/sys/fs/cgroup/libpod_parent/*") + glob.glob("/sys/fs/cgroup/libpod_parent"), reverse=True):
        try:
            os.rmdir(folder)
        except OSError:
            pass


def import_image(name, files, links=(), folders=(), change=()):
    """An image of one layer made from files of this system."""
    with tempfile.TemporaryDirectory() as top:
        for folder in ("tmp", "proc", "sys", "dev", "etc", "run", *folders):
            os.makedirs(f"{top}/{folder}", exist_ok=True)
        os.chmod(f"{top}/tmp", 0o1777)
        for source, path in files:
            os.makedirs(os.path.dirname(top + path), exist_ok=True)
            shutil.copy(source, top + path)
            if path.startswith("/setuid/"):
                os.chmod(top + path, 0o4755)
        with open(f"{top}/etc/passwd", "w", encoding="utf-8") as f:
            f.write("root:x:0:0:root:/:/bin/sh\nuser:x:1234:1234::/:/bin/sh\n")
        with open(f"{top}/etc/group", "w", encoding="utf-8") as f:
            f.write("root:x:0:\nuser:x:1234:\n")
        if any(path.endswith("/libc.so.6") for _, path in files):
            call("ldconfig", "-r", top)
        # After ldconfig, which removes links that lead nowhere yet.
        for target, path in links:
            os.makedirs(os.path.dirname(top + path), exist_ok=True)
            os.symlink(target, top + path)
        changes = [a for c in change for a in ("--change", c)]
        tar = subprocess.Popen(["tar", "-C", top, "-c", "."], stdout=subprocess.PIPE)
        subprocess.run(["podman", "import", "--quiet", *changes, "-", name], stdin=tar.stdout, check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.PIPE)
        tar.wait()


def make_images():
    sh = [("/bin/busybox", "/bin/busybox")]
    sh_links = [("busybox", f"/bin/{n}") for n in ("sh", "sleep", "cat", "touch", "ls", "env", "grep")]
    loader = re.search(r"(/lib\S*/ld-linux\S+)", call("ldd", "/bin/true")).group(1)
    programs = [(f"{BUILD}/test/cr/memcheck", "/memcheck"), (f"{BUILD}/test/podman/talk", "/talk"),
                (f"{SOURCE}/sim/kernels.ptx", "/kernels.ptx")]
    libs = [(f"{LIBS}/{n}", f"{LIBS}/{n}") for n in ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1")]
    libs += [(loader, loader)]
    env = ["ENV CR_KERNELS=/kernels.ptx"]
    link = [(os.path.basename(DRIVER), f"{LIBS}/libcuda.so.1")]
    import_image("glibc", sh + programs + libs, sh_links + link, change=env)
    import_image("glibc-bare", sh + programs + libs, sh_links, change=env)
    import_image("glibc-user", sh + programs + libs, sh_links + link, change=env + ["USER user"])
    setuid = [(f"{BUILD}/test/cr/memcheck", "/setuid/memcheck")]
    import_image("glibc-setuid", sh + programs + setuid + libs, sh_links + link, change=env + ["USER user"])
    if os.path.exists(f"{STAGE}/musl"):
        musl = "/usr/lib/x86_64-linux-musl/libc.so"
        import_image("musl", sh + [(f"{STAGE}/musl", "/musl"), (musl, musl)], sh_links + [(musl, "/lib/ld-musl-x86_64.so.1")])


# --- processes ---

def has_sys_resource():
    """CRIU reads and sets the limits of other users' processes, for which it needs it."""
    bounding = re.search(r"^CapBnd:\s*(\w+)", text_of("/proc/self/status"), re.M)
    return bool(int(bounding.group(1), 16) >> 24 & 1)


def agents_in(pid):
    """The process holds an agent that has started."""
    try:
        return [fd for fd in os.listdir(f"/proc/{pid}/fd") if "memfd:bennu-agent" in os.readlink(f"/proc/{pid}/fd/{fd}")]
    except OSError:
        return []


def processes_with(argument):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and argument in text_of(f"/proc/{entry}/cmdline").split("\0"):
            found.append(int(entry))
    return found


class Container:
    """A container whose output is looked at: talk's rounds, and those of the program that it starts."""

    LINES = {"gpu": r"0 \d+ round (\d+)", "talk": r"talk (\d+)", "musl": r"round (\d+)"}

    def __init__(self, case, name, kinds=("talk", "gpu"), runtime="runc", tcp=None):
        self.case = case
        self.name = name
        self.kinds = kinds
        self.runtime = runtime
        # With connections a container needs --tcp-established, which Podman does not take together with --name.
        self.tcp = "talk" in kinds if tcp is None else tcp
        self.tcp_by_config = False  # CRIU's configuration says it
        self.backs = 0  # restores of an older moment, from which on rounds come again
        self.new_log = False  # what came before is not in it
        case.containers.append(self)

    def podman(self, *args):
        return self.case.podman("--runtime", self.runtime, *args, env=self.environment)

    def podman_says(self, *args):
        return self.case.podman_says("--runtime", self.runtime, *args, env=self.environment)

    def podman_starts(self, *args, **kwargs):
        with open(self.case.path("podman.log"), "ab") as log:
            return subprocess.Popen(["podman", "--runtime", self.runtime, *map(str, args)], stdin=subprocess.DEVNULL, stdout=log,
                                    stderr=log, env={**os.environ, **self.environment}, **kwargs)

    @property
    def environment(self):
        """Podman and the runtimes find criu by PATH."""
        return {"PATH": f"{NEWER_CRIU}:{os.environ['PATH']}"} if self.tcp and os.path.exists(NEWER_CRIU) else {}

    def inspect(self, what):
        return call("podman", "inspect", "--type", "container", "--format", what, self.name).strip()

    @property
    def pid(self):
        return int(self.inspect("{{.State.Pid}}"))

    @property
    def status(self):
        """What `podman ps` says, which is what a person sees."""
        lines = call("podman", "ps", "--all", "--filter", f"name=^{self.name}$", "--format", "{{.State}}").split()
        return lines[0] if lines else None

    @property
    def bundle(self):
        return f"{STORAGE}/storage/overlay-containers/{self.inspect('{{.Id}}')}/userdata"

    @property
    def checkpoint_dir(self):
        return self.bundle + "/checkpoint"

    def output(self):
        """All lines that the program has written, without conmon's time stamps."""
        whole, part = [], ""
        for line in text_of(self.log).split("\n"):
            fields = line.split(" ", 3)
            if len(fields) == 4:
                part += fields[3]
                if fields[2] == "F":
                    whole.append(part)
                    part = ""
        return whole

    def rounds(self, kind):
        pattern = re.compile(self.LINES[kind])
        return [int(m.group(1)) for m in map(pattern.fullmatch, self.output()) if m]

    def trouble(self):
        output = self.output()
        wrong = [line for line in output if "WRONG" in line or "error" in line]
        if wrong:
            return wrong[0]
        if self.status != "running":
            return f"{self.name} is {self.status}: {output[-5:]}"
        return None

    def go_on(self, rounds=3):
        """Every part does some more rounds. Each is reported once, in order: nothing is lost, and nothing done twice."""
        before = {k: len(self.rounds(k)) for k in self.kinds}
        for kind in self.kinds:
            wait_for(lambda k=kind: len(self.rounds(k)) >= before[k] + rounds, f"{kind} of {self.name} goes on", self.trouble)
        self.case.assertEqual(self.status, "running")
        self.check()

    def check(self):
        for kind in self.kinds:
            seen = self.rounds(kind)
            jumps = [(a, b) for a, b in zip(seen if self.new_log else [0] + seen, seen[self.new_log:]) if b != a + 1]
            self.case.assertEqual([j for j in jumps if j[1] > j[0]], [], f"rounds of {kind} of {self.name} that are missing")
            self.case.assertLessEqual(len(jumps), self.backs, f"rounds of {kind} of {self.name} that came twice: {jumps}")
        self.case.assertEqual([line for line in self.output() if "WRONG" in line], [])

    def run(self, *args, image="glibc", device="versioned", command=None):
        if command is None:
            command = ["/talk", *([] if self.tcp else ["--unix"]), "/memcheck", *SMALL]
        devices = ["--device", f"nvidia.com/gpu={device}"] if device else []
        # At a restore runc leaves the loopback of a network that it makes itself ("none") down.
        network = ["--network=bridge"] if self.tcp else []
        self.podman("run", "--detach", "--name", self.name, *devices, *network, *args, image, *command)
        self.log = self.inspect("{{.HostConfig.LogConfig.Path}}")
        self.go_on()
        return self

    def options(self):
        return ["--tcp-established"] if self.tcp and not self.tcp_by_config else []

    def checkpoint(self, *args):
        done = self.podman("container", "checkpoint", *self.options(), *args, self.name)
        if "--leave-running" not in args:
            self.case.assertEqual(self.status, "exited")
            self.case.assertEqual(self.inspect("{{.State.Checkpointed}}"), "true")
        return done

    def restore(self, *args):
        done = self.podman("container", "restore", *self.options(), *args, self.name)
        self.go_on()
        return done

    def import_as(self, name, archive, *args, older=False, image=False):
        """The container of an archive or an image, under another name or its own. `older`: it ran on while its output was being archived."""
        other = Container(self.case, name, self.kinds, self.runtime, self.tcp)
        other.tcp_by_config, other.new_log = self.tcp_by_config, image
        names = ["--name", name] if name != self.name else []
        source = [archive] if image else ["--import", archive]
        other.podman("container", "restore", *self.options(), *names, *args, *source)
        other.log = other.inspect("{{.HostConfig.LogConfig.Path}}")
        other.backs = self.backs + older
        other.go_on()
        return other

    def kill(self):
        self.podman("kill", self.name)
        self.podman("wait", self.name)

    def remove(self):
        self.podman("rm", "--force", "--time", "0", self.name)


class Case(unittest.TestCase):
    daemon_wanted = True

    def setUp(self):
        self.containers = []
        self.commands = []
        self.daemon = None
        self.dir = tempfile.mkdtemp(prefix="case.", dir="/tmp")
        self.addCleanup(self._clean)
        if self.daemon_wanted:
            self.start_daemon()

    def path(self, name):
        return os.path.join(self.dir, name)

    def container(self, name="one", **kwargs):
        return Container(self, name, **kwargs)

    # --- the daemon ---

    def start_daemon(self, **env):
        self.daemon_log = self.path("bennud.log")
        mark = len(text_of(self.daemon_log))
        with open(self.daemon_log, "ab") as log:
            self.daemon = subprocess.Popen([BENNUD], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                                           env={**os.environ, **env})
        wait_for(lambda: " GPUs" in text_of(self.daemon_log)[mark:], "bennud starts",
                 lambda: text_of(self.daemon_log)[mark:] if self.daemon.poll() is not None else None)

    def stop_daemon(self):
        daemon, self.daemon = self.daemon, None
        daemon.terminate()
        daemon.wait(PATIENCE)

    @staticmethod
    def daemon_pids():
        """Those too that are being killed: their files are closed only at the end of that."""
        return [int(p) for p in filter(str.isdigit, os.listdir("/proc"))
                if text_of(f"/proc/{p}/comm").strip() in ("bennud", "bennud-worker")]

    def kill_daemon(self, worker_only=False):
        """With SIGKILL. The keeper is what we started; its worker is its child, and the keeper starts another one."""
        if not worker_only:
            self.daemon.kill()
            self.daemon.wait()
        for pid in self.daemon_pids():
            if not worker_only or pid != self.daemon.pid:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        if not worker_only:
            self.daemon = None
            wait_for(lambda: not self.daemon_pids(), "bennud is gone")

    # --- commands ---

    def podman_says(self, *args, env=None):
        done = subprocess.run(["podman", *map(str, args)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, timeout=120, check=False, env={**os.environ, **(env or {})})
        self.commands.append(done)
        return done

    def podman(self, *args, **kwargs):
        done = self.podman_says(*args, **kwargs)
        self.assertEqual(done.returncode, 0, f"podman {' '.join(map(str, args))}: {done.stderr}")
        return done.stdout

    def manifest(self, folder):
        """What the checkpoint in `folder` holds of GPU memory."""
        return json.loads(call(BENNU, "inspect", folder, "--json"))

    # --- the end ---

    def _show(self):
        print(f"\n===== {self.id()} =====", file=sys.stderr)
        for done in self.commands[-8:]:
            print(f"--- {' '.join(map(str, done.args))} -> {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-3000:]}",
                  file=sys.stderr)
        print(subprocess.run(["podman", "ps", "--all"], capture_output=True, text=True, check=False).stdout, file=sys.stderr)
        logs = glob.glob(self.path("*.log"))
        for bundle in glob.glob(f"{STORAGE}/storage/overlay-containers/*/userdata"):
            logs += [f"{bundle}/{n}" for n in ("dump.log", "restore.log", "ctr.log", "oci-log", "checkpoint/dump.log")]
        for path in logs:
            text = text_of(path)
            if text:
                notable = [line for line in text.split("\n") if "Error" in line or "bennu" in line][-40:]
                print(f"--- {path}\n" + "\n".join(notable) + f"\n... its end:\n{text[-2500:]}", file=sys.stderr)

    def _clean(self):
        result = self._outcome.result
        if any(test is self for test, _ in result.failures + result.errors):
            self._show()
        subprocess.run(["podman", "rm", "--all", "--force", "--time", "0"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       timeout=120, check=False)
        if self.daemon:
            self.daemon.terminate()
            try:
                self.daemon.wait(20)
            except subprocess.TimeoutExpired:
                self.kill_daemon()
        for pid in self.daemon_pids():  # private ones, too
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        wait_for(lambda: not self.daemon_pids(), "bennud is gone")
        shutil.rmtree(self.dir, ignore_errors=True)
