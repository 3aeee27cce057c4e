/* Does anything in a process tree use CUDA? Asked before every dump of the machine, so that trees without it cost nothing and
 * no daemon is needed for them. */
#include "criu/plugin.h"

#include "base/cleanup.h"
#include "base/proc.h"
#include "wire/agent_proto.h"

#include <stdio.h>
#include <string.h>

static bool starts_with(const char *s, const char *prefix)
{
    return strncmp(s, prefix, strlen(prefix)) == 0;
}

/* /dev/nvidia0, /dev/nvidiactl, /dev/nvidia-uvm, … */
static bool is_device(const char *path)
{
    return starts_with(path, "/dev/nvidia");
}

static enum bnp_cuda look_at_descriptors(pid_t pid)
{
    char folder[64];
    snprintf(folder, sizeof(folder), "/proc/%d/fd", pid);
    bn_auto_dir DIR *d = opendir(folder);
    if (!d)
        return BNP_CUDA_NO;
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        char target[256];
        ssize_t n = readlinkat(dirfd(d), e->d_name, target, sizeof(target) - 1);
        if (n <= 0)
            continue;
        target[n] = 0;
        if (is_device(target) || starts_with(target, "/memfd:" BN_AGENT_MEMFD " ") ||
            strcmp(target, "/memfd:" BN_AGENT_MEMFD) == 0)
            return BNP_CUDA_YES;
    }
    return BNP_CUDA_NO;
}

static enum bnp_cuda look_at_mappings(pid_t pid)
{
    char name[64];
    snprintf(name, sizeof(name), "/proc/%d/maps", pid);
    bn_auto_file FILE *f = fopen(name, "re");
    if (!f)
        return BNP_CUDA_NO;
    enum bnp_cuda found = BNP_CUDA_NO;
    bn_auto_free char *line = NULL;
    size_t cap = 0;
    while (found != BNP_CUDA_YES && getline(&line, &cap, f) > 0) {
        const char *path = strchr(line, '/');
        if (!path)
            continue;
        if (is_device(path))
            found = BNP_CUDA_YES;
        else if (starts_with(strrchr(path, '/'), "/libcuda.so"))
            found = BNP_CUDA_MAYBE;
    }
    return found;
}

bool bnp_maps_gpu(pid_t pid)
{
    return look_at_mappings(pid) == BNP_CUDA_YES;
}

enum bnp_cuda bnp_tree_cuda(pid_t root, pid_t *who)
{
    bn_auto_free pid_t *pids = NULL;
    size_t n = 0;
    enum bnp_cuda best = BNP_CUDA_NO;
    *who = root;
    if (bn_proc_tree(root, &pids, &n) < 0)
        return BNP_CUDA_NO;
    for (size_t i = 0; i < n && best != BNP_CUDA_YES; i++) {
        enum bnp_cuda found = look_at_descriptors(pids[i]);
        if (found != BNP_CUDA_YES)
            found = look_at_mappings(pids[i]);
        if (found > best) {
            best = found;
            *who = pids[i];
        }
    }
    return best;
}
