/* Kubernetes' runtimes freeze a container's cgroup before they call CRIU, but GPU memory can only be taken from processes that
 * run. So the groups are thawed while that is done, and left as they were found.
 * Files: see base/cgroup.h. */
#include "criu/plugin.h"

#include "base/cgroup.h"
#include "base/cleanup.h"
#include "base/io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define WAIT_MS 5000

static int write_control(const char *dir, const char *file, const char *value)
{
    char path[600];
    snprintf(path, sizeof(path), "%s/%s", dir, file);
    bn_auto_fd fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    return bn_write_full(fd, value, strlen(value));
}

/* Frozen by a request of its own, not only through a parent. */
static bool asks_for_freeze(const char *dir, bool v2)
{
    char text[64];
    bn_cgroup_read(dir, v2 ? "cgroup.freeze" : "freezer.self_freezing", text, sizeof(text));
    return text[0] == '1';
}

static bool in_force(const char *leaf, bool v2, bool frozen)
{
    char text[256];
    if (!*leaf)
        return true;
    bn_cgroup_read(leaf, v2 ? "cgroup.events" : "freezer.state", text, sizeof(text));
    if (v2)
        return strstr(text, frozen ? "frozen 1" : "frozen 0") != NULL;
    return strncmp(text, frozen ? "FROZEN" : "THAWED", 6) == 0;
}

static bool wait_for(const struct bnp_thaw *t, bool frozen)
{
    for (int ms = 0; ms < WAIT_MS; ms++) {
        bool ok = true;
        for (int i = 0; i < t->n; i++)
            ok = ok && in_force(t->leaf[t->v2[i]], t->v2[i], frozen);
        if (ok)
            return true;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    return false;
}

static int set_frozen(const char *dir, bool v2, bool frozen)
{
    if (v2)
        return write_control(dir, "cgroup.freeze", frozen ? "1" : "0");
    return write_control(dir, "freezer.state", frozen ? "FROZEN" : "THAWED");
}

static void thaw_in(pid_t pid, bool v2, struct bnp_thaw *t, struct bn_error *err)
{
    char dir[sizeof(t->leaf[0])];
    size_t floor;
    if (bn_cgroup_folder(pid, v2, dir, sizeof(dir), &floor) < 0)
        return;
    strcpy(t->leaf[v2], dir);
    /* The group itself or any above it may be the one that was frozen. */
    while (strlen(dir) > floor && t->n < BNP_FROZEN_MAX) {
        if (asks_for_freeze(dir, v2)) {
            int r = set_frozen(dir, v2, false);
            if (r < 0) {
                bn_error_set(err, r, "thaw", "cannot thaw the cgroup %s: %s", dir, strerror(-r));
                return;
            }
            strcpy(t->dir[t->n], dir);
            t->v2[t->n++] = v2;
        }
        char *slash = strrchr(dir, '/');
        if (!slash)
            break;
        *slash = 0;
    }
}

int bnp_thaw(pid_t pid, struct bnp_thaw *t, struct bn_error *err)
{
    memset(t, 0, sizeof(*t));
    struct bn_error failed = BN_ERROR_INIT;
    thaw_in(pid, true, t, &failed);
    if (!bn_error_is_set(&failed))
        thaw_in(pid, false, t, &failed);
    if (!bn_error_is_set(&failed) && t->n > 0 && !wait_for(t, false))
        bn_error_set(&failed, ETIMEDOUT, "thaw", "process %d stays frozen although its cgroup %s was thawed",
                     pid, t->dir[0]);
    if (!bn_error_is_set(&failed))
        return 0;
    bnp_refreeze(t);
    *err = failed;
    return -failed.code;
}

void bnp_refreeze(struct bnp_thaw *t)
{
    for (int i = t->n - 1; i >= 0; i--) {
        int r = set_frozen(t->dir[i], t->v2[i], true);
        if (r < 0)
            bnp_log(BNP_WARN, "cannot freeze the cgroup %s again: %s", t->dir[i], strerror(-r));
    }
    if (t->n > 0 && !wait_for(t, true))
        bnp_log(BNP_WARN, "the cgroup %s is not frozen again yet", t->dir[0]);
    t->n = 0;
}
