/* Podman packs up a container's /dev/shm at a checkpoint and unpacks it before the restore (container_internal_common.go,
 * DevShmCheckpointTar). With --ipc=host that is the machine's own: what other programs have there is replaced by what it was, and so
 * are Podman's locks, as they were held during the checkpoint. From then on podman waits for them for ever. Nobody can undo it, so
 * such a checkpoint is refused, before anything is touched. */
#include "criu/plugin.h"

#include "criu/criu_abi.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Is the image Podman's? runc and crun are told to write into the folder that Podman has for the container. */
static bool is_podmans(int dir)
{
    static const char tail[] = "/userdata/checkpoint";
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", dir);
    ssize_t n = readlink(link, path, sizeof(path) - 1);
    if (n < (ssize_t)sizeof(tail))
        return false;
    path[n] = 0;
    return strcmp(path + n - (sizeof(tail) - 1), tail) == 0;
}

static bool same(const char *format, pid_t pid, const char *own)
{
    char path[64];
    struct stat theirs, ours;
    snprintf(path, sizeof(path), format, (int)pid);
    return stat(path, &theirs) == 0 && stat(own, &ours) == 0 && theirs.st_dev == ours.st_dev &&
           theirs.st_ino == ours.st_ino;
}

bool bnp_shm_would_be_replaced(pid_t root)
{
    int dir = criu_get_image_dir ? criu_get_image_dir() : -1;
    return dir >= 0 && is_podmans(dir) && same("/proc/%d/ns/ipc", root, "/proc/self/ns/ipc") &&
           same("/proc/%d/root/dev/shm", root, "/dev/shm");
}
