#include "base/cgroup.h"

#include "base/cleanup.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PATH_CAP 512

bool bn_cgroup_path(pid_t pid, bool v2, char *out, size_t cap)
{
    char name[64];
    snprintf(name, sizeof(name), "/proc/%d/cgroup", pid);
    bn_auto_file FILE *f = fopen(name, "re");
    bn_auto_free char *line = NULL;
    size_t size = 0;
    while (f && getline(&line, &size, f) > 0) {
        char *controllers = strchr(line, ':');
        char *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path)
            continue;
        *path++ = 0;
        path[strcspn(path, "\n")] = 0;
        bool right = v2 ? strcmp(line, "0:") == 0 : strcmp(controllers, ":freezer") == 0;
        if (right && snprintf(out, cap, "%s", path) < (int)cap)
            return true;
    }
    return false;
}

/* Where that hierarchy is mounted, and which of its folders is at the mount point. */
static bool mount_of(bool v2, char *point, char *root, size_t cap)
{
    bn_auto_file FILE *f = fopen("/proc/self/mountinfo", "re");
    bn_auto_free char *line = NULL;
    size_t size = 0;
    while (f && getline(&line, &size, f) > 0) {
        char r[512], p[512], type[64], super[512];
        const char *rest = strstr(line, " - ");
        if (!rest || sscanf(line, "%*s %*s %*s %511s %511s", r, p) != 2 ||
            sscanf(rest, " - %63s %*s %511s", type, super) != 2)
            continue;
        bool right =
            v2 ? strcmp(type, "cgroup2") == 0 : strcmp(type, "cgroup") == 0 && strstr(super, "freezer");
        if (right && strlen(r) < cap && strlen(p) < cap) {
            strcpy(root, r);
            strcpy(point, p);
            return true;
        }
    }
    return false;
}

int bn_cgroup_folder(pid_t pid, bool v2, char *out, size_t cap, size_t *mount)
{
    char group[PATH_CAP], point[PATH_CAP], root[PATH_CAP];
    if (!bn_cgroup_path(pid, v2, group, sizeof(group)) || strstr(group, "/..") ||
        !mount_of(v2, point, root, sizeof(point)))
        return -ENOENT;
    size_t skip = strcmp(root, "/") == 0 ? 0 : strlen(root);
    if (skip && strncmp(group, root, skip) != 0)
        return -ENOENT;
    if (snprintf(out, cap, "%s%s", point, group + skip) >= (int)cap)
        return -ENAMETOOLONG;
    *mount = strlen(point);
    return 0;
}

void bn_cgroup_read(const char *folder, const char *file, char *out, size_t cap)
{
    char path[2 * PATH_CAP + 32];
    *out = 0;
    if (snprintf(path, sizeof(path), "%s/%s", folder, file) >= (int)sizeof(path))
        return;
    bn_auto_fd fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, out, cap - 1);
    out[n > 0 ? n : 0] = 0;
}

bool bn_cgroup_is_frozen(pid_t pid, char *folder, size_t cap)
{
    char text[256];
    size_t mount;
    if (bn_cgroup_folder(pid, true, folder, cap, &mount) == 0) {
        bn_cgroup_read(folder, "cgroup.events", text, sizeof(text));
        if (strstr(text, "frozen 1"))
            return true;
    }
    if (bn_cgroup_folder(pid, false, folder, cap, &mount) < 0)
        return false;
    bn_cgroup_read(folder, "freezer.state", text, sizeof(text));
    return strncmp(text, "FROZEN", 6) == 0;
}
