#include "hook/rootfs.h"

#include "base/cleanup.h"
#include "config.h"

#include <elf.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>

#if defined(__x86_64__)
#define MACHINE EM_X86_64
#define GLIBC_LOADER "/lib64/ld-linux-x86-64.so.2"
#define MUSL_LOADER "/lib/ld-musl-x86_64.so.1"
#elif defined(__aarch64__)
#define MACHINE EM_AARCH64
#define GLIBC_LOADER "/lib/ld-linux-aarch64.so.1"
#define MUSL_LOADER "/lib/ld-musl-aarch64.so.1"
#else
#error "unknown architecture"
#endif

int bn_rootfs_open(const char *path)
{
    return open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
}

/* An absolute link in an image means the image's root, and ".." must not lead out of it. */
static int open_inside(int root, const char *path, int flags)
{
    struct open_how how = {
        .flags = (unsigned)flags | O_CLOEXEC,
        .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
    };
    return (int)syscall(SYS_openat2, root, path, &how, sizeof(how));
}

static bool exists(int root, const char *path)
{
    bn_auto_fd fd = open_inside(root, path, O_PATH);
    return fd >= 0;
}

bool bn_rootfs_has_glibc(int root)
{
    return exists(root, GLIBC_LOADER);
}

bool bn_rootfs_has_musl(int root)
{
    return exists(root, MUSL_LOADER);
}

bool bn_rootfs_takes_mounts(int root, const char *folder)
{
    struct statvfs vfs;
    return exists(root, folder) || fstatvfs(root, &vfs) < 0 || !(vfs.f_flag & ST_RDONLY);
}

/* First number of "libcuda.so.580.65.06"; 0: the name has none, or it is that of the interface ("libcuda.so.1"). */
static unsigned major_of(const char *name)
{
    static const char prefix[] = "libcuda.so.";
    if (strncmp(name, prefix, sizeof(prefix) - 1) != 0)
        return 0;
    unsigned long v = strtoul(name + sizeof(prefix) - 1, NULL, 10);
    return v >= 100 && v < 100000 ? (unsigned)v : 0;
}

static unsigned highest_driver(int root, const char *folder)
{
    unsigned highest = 0;
    int fd = open_inside(root, folder, O_RDONLY | O_DIRECTORY);
    bn_auto_dir DIR *d = fd >= 0 ? fdopendir(fd) : NULL;
    if (!d)
        bn_close(fd);
    for (struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d)) {
        unsigned major = major_of(e->d_name);
        if (major > highest)
            highest = major;
    }
    return highest;
}

unsigned bn_rootfs_compat_driver(int root)
{
    /* Of CUDA's packages, and of the images of NVIDIA's catalogue, whose entrypoint makes a link to the second. */
    static const char *const folders[] = {"/usr/local/cuda/compat", "/usr/local/cuda/compat/lib.real"};
    unsigned highest = 0;
    for (size_t i = 0; i < sizeof(folders) / sizeof(folders[0]); i++) {
        unsigned major = highest_driver(root, folders[i]);
        if (major > highest)
            highest = major;
    }
    return highest;
}

bool bn_driver_name(const char *path)
{
    static const char prefix[] = "libcuda.so";
    const char *slash = strrchr(path, '/');
    if (path[0] != '/' || strncmp(slash + 1, prefix, sizeof(prefix) - 1) != 0)
        return false;
    const char *tail = slash + sizeof(prefix);
    return !*tail || (tail[0] == '.' && tail[1] && tail[1 + strspn(tail + 1, "0123456789.")] == 0);
}

enum bn_driver_file bn_driver_file(const char *path, const char *agent, unsigned *major)
{
    struct stat st, own;
    unsigned char head[EI_NIDENT + 4];
    uint16_t machine;
    char real[PATH_MAX];
    *major = 0;
    bn_auto_fd fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) ||
        pread(fd, head, sizeof(head), 0) != (ssize_t)sizeof(head))
        return BN_DRIVER_NONE;
    memcpy(&machine, head + EI_NIDENT + 2, sizeof(machine));
    if (memcmp(head, ELFMAG, SELFMAG) != 0 || head[EI_CLASS] != ELFCLASS64 || machine != MACHINE)
        return BN_DRIVER_NONE;
    if (!realpath(path, real))
        return BN_DRIVER_NONE;
    if (strncmp(real, BENNU_AGENTS_DIR "/", sizeof(BENNU_AGENTS_DIR)) == 0 ||
        (stat(agent, &own) == 0 && own.st_dev == st.st_dev && own.st_ino == st.st_ino))
        return BN_DRIVER_AGENT;
    *major = major_of(strrchr(real, '/') + 1);
    return BN_DRIVER_REAL;
}
