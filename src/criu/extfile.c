/* A process may keep handles on /dev/nvidiactl and /dev/nvidia0 beside CUDA: NVML opens them, and the driver's checkpoint leaves
 * them alone. CRIU cannot dump such a descriptor. We write down its path and open that again at restore: NVML then
 * answers with an error until it is initialised anew, and the rest of the process goes on. */
#include "criu/plugin.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "criu/criu_abi.h"

#include <ctype.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <string.h>

#define PATH_LEN_MAX 64

/* Only devices without memory of CUDA's behind them: an open /dev/nvidia-uvm means that the driver was not checkpointed. */
static bool may_reopen(const char *path)
{
    static const char prefix[] = "/dev/nvidia";
    if (strncmp(path, prefix, sizeof(prefix) - 1) != 0)
        return false;
    const char *rest = path + sizeof(prefix) - 1;
    return strcmp(rest, "ctl") == 0 || (*rest && strspn(rest, "0123456789") == strlen(rest));
}

static void image_name(int id, char out[40])
{
    snprintf(out, 40, "bennu-device-%x.img", (unsigned)id);
}

int bnp_dump_ext_file(int fd, int id)
{
    char link[40], path[PATH_LEN_MAX], name[40];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof(path) - 1);
    if (n <= 0)
        return -ENOTSUP;
    path[n] = 0;
    if (!may_reopen(path))
        return -ENOTSUP;
    image_name(id, name);
    int r = bn_write_file_atomic_at(criu_get_image_dir(), name, path, (size_t)n);
    if (r < 0) {
        bnp_log(BNP_ERROR, "cannot write %s: %s", name, strerror(-r));
        return r;
    }
    bnp_log(BNP_INFO, "%s will be opened anew at restore", path);
    return 0;
}

/* CRIU after 4.2 passes a second argument and reads it back; before, the register holds anything. CRIU does not tell
 * its number of hooks, but the size of the table of chains does: a list head for the plugins and one for each hook. The argument
 * came between hooks 13 and 14. */
static bool has_retry_argument(void)
{
    void *table = dlsym(RTLD_DEFAULT, "cr_plugin_ctl");
    Dl_info info;
    void *extra = NULL;
    if (!table || !dladdr1(table, &info, &extra, RTLD_DL_SYMENT) || !extra)
        return false;
    size_t heads = ((const ElfW(Sym) *)extra)->st_size / (2 * sizeof(void *));
    return heads >= 1 + 14;
}

int bnp_restore_ext_file(int id, bool *retry_needed)
{
    char name[40];
    bn_auto_free void *path = NULL;
    size_t len = 0;
    image_name(id, name);
    int dir = criu_get_image_dir ? criu_get_image_dir() : -1;
    if (dir < 0 || bn_read_file_at(dir, name, PATH_LEN_MAX, &path, &len) < 0)
        return -ENOTSUP;
    if (strlen(path) != len || !may_reopen(path)) {
        bnp_log(BNP_ERROR, "%s is damaged", name);
        return -EINVAL;
    }
    if (has_retry_argument())
        *retry_needed = false;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        bnp_log(BNP_WARN, "cannot open %s again (%s): giving the process /dev/null in its place",
                (char *)path, strerror(errno));
        fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    }
    return fd < 0 ? -errno : fd;
}
