/* bennu check: the driver, the agent, MPS and the daemon. */
#include "cli/check.h"

#include "base/cleanup.h"
#include "base/proc.h"

#include <dlfcn.h>
#include <string.h>
#include <sys/stat.h>

#define DRIVER_MIN 12080 /* 570: the first with cuCheckpointProcess* */

/* In a forked child: a driver that is half installed may take the process with it. Prints "VERSION HAS-CHECKPOINT". */
static int ask_driver(void *arg)
{
    const char *path = arg;
    void *lib = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!lib) {
        puts(dlerror());
        return 1;
    }
    int version = 0;
    int (*get_version)(int *) = (int (*)(int *))dlsym(lib, "cuDriverGetVersion");
    if (!get_version || get_version(&version) != 0) {
        printf("%s does not tell its version\n", path);
        return 2;
    }
    printf("%d %d\n", version, dlsym(lib, "cuCheckpointProcessCheckpoint") != NULL);
    return 0;
}

static void judge_driver(unsigned version, bool checkpoint, const char *where)
{
    unsigned major = version / 1000, minor = version % 1000 / 10;
    if (version < DRIVER_MIN || !checkpoint)
        check_add(CHECK_FAIL, "driver", "install driver 570 or newer",
                  "CUDA %u.%u (%s) cannot checkpoint processes", major, minor, where);
    else
        check_add(CHECK_OK, "driver", "", "CUDA %u.%u (%s)", major, minor, where);
}

static void check_driver_file(void)
{
    const char *given = getenv("BENNU_DRIVER");
    const char *path = given && *given ? given : "libcuda.so.1";
    bn_auto_free char *out = NULL;
    unsigned version;
    int checkpoint;
    int code = cli_in_child(ask_driver, (void *)path, &out);
    if (code == 1)
        check_add(CHECK_FAIL, "driver",
                  "install the NVIDIA driver, 570 or newer; without a GPU set BENNU_DRIVER to the "
                  "simulated one",
                  "%s cannot be loaded", path);
    else if (code != 0 || !out || sscanf(out, "%u %d", &version, &checkpoint) != 2)
        check_add(CHECK_FAIL, "driver", "mend the driver's installation (does nvidia-smi run?)",
                  "%s does not answer", path);
    else
        judge_driver(version, checkpoint, path);
}

static void describe_daemon(struct bn_daemon_info *info)
{
    char a[16], b[16];
    judge_driver(info->driver_version, true,
                 info->simulated ? "simulated, as the daemon has it" : "as the daemon has it");
    check_add(CHECK_OK, "daemon", "", "bennud %s, process %u, %u GPU%s, host memory %s of %s in use",
              info->version, info->pid, info->gpus, info->gpus == 1 ? "" : "s", cli_bytes(info->host_used, a),
              cli_bytes(info->host_limit, b));
    for (uint32_t i = 0; i < info->gpus && i < BN_ARRAY_SIZE(info->gpu); i++) {
        char name[24];
        snprintf(name, sizeof(name), "GPU %u", i);
        check_add(CHECK_OK, name, "", "%s, compute capability %u.%u, %s of %s free", info->gpu[i].name,
                  info->gpu[i].cc / 10, info->gpu[i].cc % 10, cli_bytes(info->gpu[i].free, a),
                  cli_bytes(info->gpu[i].total, b));
        snprintf(name, sizeof(name), "GPU %u hashing", i);
        if (info->gpu[i].no_hash[0])
            check_add(CHECK_WARN, name, "checkpoints are as safe, but take longer", "by the CPU: %s",
                      info->gpu[i].no_hash);
    }
}

static void check_daemon(void)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_reader reply;
    struct bn_daemon_info info;
    bn_auto_free void *buf = malloc(BN_CTL_MSG_MAX);
    bn_auto_fd sock = buf ? cli_daemon_connect(&err) : -1;
    if (sock < 0) {
        check_driver_file();
        check_add(CHECK_FAIL, "daemon", "", "%s", err.text);
        return;
    }
    int r = bn_ctl_call(sock, BN_CTL_INFO, NULL, NULL, 0, NULL, NULL, buf, &reply, &err);
    if (r == 0) {
        bn_read_daemon_info(&reply, &info);
        if (reply.failed)
            r = bn_error_set(&err, EBADMSG, "daemon",
                             "bennud's answer makes no sense: are command and daemon of one version?");
    }
    if (r == 0) {
        describe_daemon(&info);
    } else {
        check_driver_file();
        check_add(CHECK_FAIL, "daemon", "see its log (journalctl -u bennud)", "%s", err.text);
    }
}

static void check_run_folder(void)
{
    struct stat st;
    const char *dir = cli_rundir();
    if (stat(dir, &st) < 0)
        check_add(CHECK_WARN, "run folder", "starting bennud makes it", "%s does not exist", dir);
    else if (st.st_uid != 0 || (st.st_mode & 022))
        check_add(CHECK_FAIL, "run folder",
                  "chown root and chmod go-w it: whoever may write there can pose as the daemon",
                  "%s does not belong to root alone", dir);
    else
        check_add(CHECK_OK, "run folder", "", "%s", dir);
}

static int load_agent(void *arg)
{
    if (dlopen(arg, RTLD_NOW | RTLD_LOCAL))
        return 0;
    puts(dlerror());
    return 1;
}

static void check_agent(void)
{
    char path[PATH_MAX];
    bn_auto_free char *out = NULL;
    cli_agent_path(path);
    if (access(path, R_OK) < 0)
        check_add(CHECK_FAIL, "agent", "install Bennu, or set BENNU_AGENT", "%s: %s", path, strerror(errno));
    else if (cli_in_child(load_agent, path, &out) == 0)
        check_add(CHECK_OK, "agent", "", "%s", path);
    else
        check_add(CHECK_FAIL, "agent", "install Bennu for this C library", "cannot be loaded: %s",
                  out && *out ? strtok(out, "\n") : path);
}

/* A client of MPS cannot be locked by the driver (801). */
static void check_mps(void)
{
    bn_auto_free pid_t *pids = NULL;
    size_t n = 0;
    if (bn_proc_all(&pids, &n) < 0)
        return;
    for (size_t i = 0; i < n; i++) {
        char comm[16];
        if (bn_proc_comm(pids[i], comm) == 0 && strncmp(comm, "nvidia-cuda-mps", 15) == 0) {
            check_add(CHECK_WARN, "MPS",
                      "its clients cannot be saved, other programs can: start those without it, or only free "
                      "their GPU memory with 'bennu suspend --keep-context'",
                      "nvidia-cuda-mps runs (process %d)", pids[i]);
            return;
        }
    }
    check_add(CHECK_OK, "MPS", "", "does not run");
}

void check_gpu(void)
{
    check_daemon();
    check_run_folder();
    check_agent();
    check_mps();
}
