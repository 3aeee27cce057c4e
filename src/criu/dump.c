/* The plugin's part of a dump. PAUSE_DEVICES of the root is the one moment at which the whole tree surely still runs: all GPU
 * work happens there, and the copy out of GPU memory goes on in the daemon while CRIU dumps the processes. */
#include "criu/plugin.h"

#include "base/cleanup.h"
#include "criu/criu_abi.h"
#include "wire/control.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

/* On a failed dump the processes are still stopped: the daemon must answer at once. If it does not, closing the connection says
 * the same. */
#define FAILED_END_SECONDS 5

static struct {
    bool begun; /* PAUSE_DEVICES of the root has been here */
    int sock;   /* -1: no session, nothing of the tree is ours */
} dump = {false, -1};

static int fail(const char *what, const struct bn_error *err)
{
    bnp_log(BNP_ERROR, "%s: %s: %s", what, err->stage, err->text);
    return err->code > 0 ? -err->code : -EIO;
}

void bnp_dump_reset(void)
{
    dump.sock = bn_close(dump.sock);
    dump.begun = false;
}

bool bnp_dump_active(void)
{
    return dump.sock >= 0;
}

/* What bennu(1) was asked for. Under a container runtime the environment says nothing, and nothing is wanted. */
static unsigned flags_wanted(void)
{
    unsigned flags = 0;
    if (getenv("BENNU_DRIVER_PATH"))
        flags |= BN_CTL_F_DRIVER_PATH;
    const char *level = getenv("BENNU_COMPRESS");
    if (level)
        flags |= (unsigned)strtoul(level, NULL, 10) << BN_CTL_F_LEVEL_SHIFT;
    if (getenv("BENNU_SYNC"))
        flags |= BN_CTL_F_SYNC;
    if (getenv("BENNU_LEAVE_RUNNING"))
        flags |= BN_CTL_F_LEAVE_RUNNING;
    return flags;
}

/* Bytes a second of what is copied after the processes were let go; 0: no limit. */
static uint64_t bandwidth_wanted(void)
{
    const char *text = getenv("BENNU_BANDWIDTH");
    return text ? strtoull(text, NULL, 10) : 0;
}

/* Two plugins that suspend one process would undo each other's work, and which of them is asked first is left to chance (the
 * order of readdir). CRIU's own plugin claims every process, so it is the one that stays. */
static bool stock_plugin_present(void)
{
    char path[4200];
    snprintf(path, sizeof(path), "%s/cuda_plugin.so", bnp_own_folder());
    if (access(path, F_OK) != 0)
        return false;
    bnp_log(BNP_WARN, "%s is loaded too: leaving this dump to it. Remove one of the two plugins", path);
    return true;
}

/* The checkpoint to share bytes with. *fd stays -1 if none was named. */
static int open_parent(int *fd, struct bn_error *err)
{
    const char *path = getenv("BENNU_PARENT");
    if (!path || !*path)
        return 0;
    *fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return *fd < 0 ? bn_error_set(err, errno, "parent", "cannot open the parent checkpoint %s: %s", path,
                                  strerror(errno))
                   : 0;
}

static int begin_session(pid_t root, int sock)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bnp_thaw thaw;
    int r = bnp_thaw(root, &thaw, &err);
    if (r < 0)
        return fail("cannot dump", &err);
    uint64_t limit = bandwidth_wanted();
    unsigned handled = 0,
             args[4] = {(unsigned)root, flags_wanted(), (unsigned)limit, (unsigned)(limit >> 32)};
    bn_auto_fd parent = -1;
    int fds[2] = {criu_get_image_dir ? criu_get_image_dir() : -1, -1};
    r = open_parent(&parent, &err);
    if (r == 0) {
        fds[1] = parent;
        args[1] |= parent >= 0 ? BN_CTL_F_PARENT : 0;
        r = bnp_call_fds(sock, BN_CTL_DUMP_BEGIN, args, 4, fds,
                         fds[0] < 0   ? 0
                         : parent < 0 ? 1
                                      : 2,
                         &handled, &err);
    }
    bnp_refreeze(&thaw);
    if (r < 0)
        return fail("cannot dump the GPU state", &err);
    return handled > 0 ? 0 : -ENOTSUP;
}

static int begin(pid_t root)
{
    pid_t who;
    enum bnp_cuda cuda = bnp_tree_cuda(root, &who);
    if (cuda == BNP_CUDA_NO || stock_plugin_present())
        return -ENOTSUP;
    if (bnp_shm_would_be_replaced(root)) {
        bnp_log(BNP_ERROR,
                "this container has the machine's /dev/shm (--ipc=host), where Podman's restore would "
                "replace all "
                "files, its own locks among them: start it without --ipc=host, and with --shm-size");
        return -EBUSY;
    }

    struct bn_error err = BN_ERROR_INIT;
    bn_auto_fd sock = bnp_daemon_open(&err);
    if (sock < 0 && cuda == BNP_CUDA_MAYBE) {
        bnp_log(BNP_WARN,
                "process %d has the CUDA driver loaded, but nothing shows that it uses it; going on without "
                "bennud: %s",
                who, err.text);
        return -ENOTSUP;
    }
    if (sock < 0) {
        bnp_log(BNP_ERROR, "process %d uses CUDA: %s", who, err.text);
        return sock;
    }
    int r = begin_session(root, sock);
    if (r < 0)
        return r;
    /* So that a restore without us is refused. CRIU 4.0 cannot; the manifest tells us there. */
    if (add_inventory_plugin && add_inventory_plugin("bennu") != 0) {
        bnp_log(BNP_ERROR, "cannot add the plugin's name to the image's inventory");
        return -ENOMEM;
    }
    dump.sock = BN_TAKE_FD(sock);
    return 0;
}

int bnp_dump_process(int pid)
{
    if (dump.sock < 0)
        return -ENOTSUP;
    struct bn_error err = BN_ERROR_INIT;
    unsigned handled = 0, arg = (unsigned)pid;
    if (bnp_call(dump.sock, BN_CTL_DUMP_PROCESS, &arg, 1, -1, &handled, &err) < 0)
        return fail("cannot dump the GPU state", &err);
    return handled ? 0 : -ENOTSUP;
}

/* Half a gigabyte of zero pages that CRIU need not see. Only the agent's own thread runs meanwhile. Nothing depends on it. */
static int purge(int pid)
{
    struct bn_error err = BN_ERROR_INIT;
    unsigned tid = 0, mib = 0, arg = (unsigned)pid;
    if (bnp_call(dump.sock, BN_CTL_DUMP_THREAD, &arg, 1, -1, &tid, &err) < 0 || tid == 0)
        return 0;
    if (bnp_thread_run((pid_t)tid) < 0)
        return 0;
    int r = bnp_call(dump.sock, BN_CTL_DUMP_PURGE, &arg, 1, -1, &mib, &err);
    if (r < 0)
        bnp_log(BNP_WARN, "zero pages of process %d stay: %s", pid, err.text);
    else
        bnp_log(BNP_INFO, "process %d gave back %u MiB of zero pages", pid, mib);
    r = bnp_thread_stop((pid_t)tid);
    if (r < 0)
        bnp_log(BNP_ERROR, "thread %u of process %d cannot be stopped again: %s", tid, pid, strerror(-r));
    return r;
}

/* Every thread of every task is stopped. */
int bnp_dump_checkpoint(int pid)
{
    if (bnp_cancelled())
        return -ECANCELED;
    int r = bnp_dump_process(pid);
    return r == 0 ? purge(pid) : r;
}

int bnp_dump_pause(int pid)
{
    if (bnp_cancelled())
        return -ECANCELED;
    if (!dump.begun) {
        dump.begun = true;
        /* CRIU gives itself 10 seconds to stop the tree, and its signal would interrupt the work; with large GPU memory on a
         * slow path that is not enough. Nothing of the tree is stopped yet. */
        unsigned left = alarm(0);
        int r = begin(pid);
        if (left)
            alarm(left);
        if (r < 0)
            return r;
    }
    return bnp_dump_process(pid);
}

/* Nothing half-written may look like a checkpoint: without its inventory CRIU refuses an image. */
static void spoil_image(void)
{
    int dir = criu_get_image_dir ? criu_get_image_dir() : -1;
    if (dir >= 0)
        unlinkat(dir, "inventory.img", 0);
}

/* CRIU believes that all went well, is about to kill the processes and to report success, and does not ask us. So do what it does
 * after a failed dump (cr_dump_finish), and end it. Should one of these be missing, the end of the tracer lets the processes go
 * on all the same. */
__attribute__((noreturn)) static void abort_dump(void)
{
    if (unsuspend_lsm)
        unsuspend_lsm();
    if (network_unlock)
        network_unlock();
    if (delete_link_remaps)
        delete_link_remaps();
    if (clean_cr_time_mounts)
        clean_cr_time_mounts();
    if (&root_item && pstree_switch_state)
        pstree_switch_state(root_item, BNP_TASK_ALIVE);
    bnp_log(BNP_ERROR, "Dumping FAILED. The processes go on running");
    _exit(1);
}

void bnp_dump_exit(int ret)
{
    if (dump.sock < 0 && ret == 0 && bnp_cancelled()) {
        spoil_image();
        abort_dump();
    }
    if (dump.sock < 0)
        return;
    struct bn_error err = BN_ERROR_INIT;
    unsigned args[2] = {(unsigned)ret, 0};
    if (ret != 0)
        bnp_set_deadline(dump.sock, FAILED_END_SECONDS);
    int r = bnp_call(dump.sock, BN_CTL_DUMP_END, args, 2, -1, NULL, &err);
    if (ret != 0 || r < 0)
        spoil_image();
    if (r < 0)
        fail("cannot finish the dump of the GPU state", &err);
    if (r < 0 && ret == 0)
        abort_dump();
    bnp_dump_reset();
}
