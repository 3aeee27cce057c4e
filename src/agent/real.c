/* Finding and loading the real driver.
 *
 * Nothing is locked while it is looked for: dlopen takes the loader's lock, and a thread that holds that lock (it runs a
 * constructor that calls CUDA) would wait for ours while we wait for its. So any number of threads do the same work at once; it
 * gives each of them the same handle and the same pointers, and the first to finish publishes them.
 */
#include "agent/agent.h"
#include "agent/libc.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Where the container hook moves the driver's library when it mounts the agent in its place (src/hook). Nothing is there
 * outside of containers, and only root could put something there. */
#ifndef BENNU_REAL_DRIVER
#define BENNU_REAL_DRIVER "/.bennu/driver/libcuda.so.1"
#endif

#define SONAME "libcuda.so.1"

/* Exported: how one copy of the agent knows another. */
extern const char bn_agent_version[] __attribute__((visibility("default")));
const char bn_agent_version[] = BENNU_AGENT_VERSION;

static char driver_path[256];

const char *bn_real_path(void)
{
    return driver_path;
}

/* One search: handle is set when it has succeeded. */
struct search {
    void *handle;
    char path[PATH_MAX];
};

static bool try_file(struct search *s, const char *path)
{
    struct stat st;
    if (s->handle || path[0] != '/' || strlen(path) >= sizeof(s->path) || bn_stat(path, &st) < 0 ||
        !S_ISREG(st.st_mode))
        return s->handle != NULL;
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        return false;
    if (dlsym(handle, "bn_agent_version") || !dlsym(handle, "cuInit")) {
        dlclose(handle);
        return false;
    }
    s->handle = handle;
    strcpy(s->path, path);
    return true;
}

/* "libcuda.so.580.159.04": the name that a mount over libcuda.so.1 leaves alone. */
static bool versioned_name(const char *name)
{
    static const char prefix[] = "libcuda.so.";
    if (strncmp(name, prefix, sizeof(prefix) - 1) != 0)
        return false;
    name += sizeof(prefix) - 1;
    size_t digits = strspn(name, "0123456789");
    return digits >= 2 && name[digits] == '.' && name[strspn(name, "0123456789.")] == 0;
}

static bool try_versioned(struct search *s, const char *folder)
{
    DIR *d = opendir(folder);
    if (!d)
        return false;
    char best[256] = "";
    for (struct dirent *e; (e = readdir(d));)
        if (versioned_name(e->d_name) && strlen(e->d_name) < sizeof(best) &&
            strverscmp(e->d_name, best) > 0) {
            char path[PATH_MAX];
            struct search one = {0};
            if ((size_t)snprintf(path, sizeof(path), "%s/%s", folder, e->d_name) < sizeof(path) &&
                try_file(&one, path)) {
                dlclose(one.handle);
                strcpy(best, e->d_name);
            }
        }
    closedir(d);
    char path[PATH_MAX];
    if (!best[0] || (size_t)snprintf(path, sizeof(path), "%s/%s", folder, best) >= sizeof(path))
        return false;
    return try_file(s, path);
}

static bool try_folder(struct search *s, const char *folder)
{
    char path[PATH_MAX];
    if (folder[0] != '/' || (size_t)snprintf(path, sizeof(path), "%s/" SONAME, folder) >= sizeof(path))
        return false;
    if (try_file(s, path))
        return true;
    /* Only where we stand in its place: elsewhere a lone versioned file is no installed driver. */
    struct stat there;
    if (bn_stat(path, &there) < 0)
        return false;
    return try_versioned(s, folder);
}

/* Where the application's own dlopen("libcuda.so.1") would look: RPATH, LD_LIBRARY_PATH, the system's folders. */
static bool try_search_path(struct search *s)
{
    void *self = dlopen(NULL, RTLD_LAZY);
    Dl_serinfo head;
    bool found = false;
    if (self && dlinfo(self, RTLD_DI_SERINFOSIZE, &head) == 0 && head.dls_size < (1u << 20)) {
        void *mem = mmap(NULL, head.dls_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mem != MAP_FAILED) {
            Dl_serinfo *info = mem;
            info->dls_size = head.dls_size;
            info->dls_cnt = head.dls_cnt;
            if (dlinfo(self, RTLD_DI_SERINFO, info) == 0)
                for (unsigned i = 0; i < info->dls_cnt && !found; i++)
                    found = try_folder(s, info->dls_serpath[i].dls_name);
            munmap(mem, head.dls_size);
        }
    }
    if (self)
        dlclose(self);
    return found;
}

/* ld.so.cache, new format (glibc 2.2 and later; old-format caches carry it behind their own table):
 * sysdeps/generic/dl-cache.h of glibc describes it. */
struct cache_entry {
    int32_t flags;
    uint32_t name, path; /* offsets from the header */
    uint32_t osversion;
    uint64_t hwcap;
};
struct cache_head {
    char magic[20]; /* "glibc-ld.so.cache1.1" */
    uint32_t count, strings_len;
    uint32_t unused[5];
};
_Static_assert(sizeof(struct cache_entry) == 24 && sizeof(struct cache_head) == 48, "ld.so.cache");

static const char *cache_string(const char *base, size_t len, uint32_t at)
{
    return at < len && memchr(base + at, 0, len - at) ? base + at : NULL;
}

static bool try_cache_bytes(struct search *s, const char *base, size_t len)
{
    static const char magic[] = "glibc-ld.so.cache1.1";
    const char *head = memmem(base, len, magic, sizeof(magic) - 1);
    if (!head || len - (size_t)(head - base) < sizeof(struct cache_head))
        return false;
    len -= (size_t)(head - base);
    struct cache_head h;
    memcpy(&h, head, sizeof(h));
    if (h.count > (len - sizeof(h)) / sizeof(struct cache_entry))
        return false;
    for (uint32_t i = 0; i < h.count; i++) {
        struct cache_entry e;
        memcpy(&e, head + sizeof(h) + i * sizeof(e), sizeof(e));
        const char *name = cache_string(head, len, e.name), *path = cache_string(head, len, e.path);
        if (!name || !path || strcmp(name, SONAME) != 0 || strlen(path) >= PATH_MAX)
            continue;
        if (try_file(s, path))
            return true;
        char folder[PATH_MAX];
        strcpy(folder, path);
        char *slash = strrchr(folder, '/');
        if (slash && slash != folder) {
            *slash = 0;
            if (try_folder(s, folder))
                return true;
        }
    }
    return false;
}

static bool try_cache(struct search *s)
{
    int fd = open("/etc/ld.so.cache", O_RDONLY | O_CLOEXEC);
    struct stat st;
    bool found = false;
    if (fd >= 0 && bn_fstat(fd, &st) == 0 && st.st_size > 0 && st.st_size < (64 << 20)) {
        void *mem = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (mem != MAP_FAILED) {
            found = try_cache_bytes(s, mem, (size_t)st.st_size);
            munmap(mem, (size_t)st.st_size);
        }
    }
    if (fd >= 0)
        close(fd);
    return found;
}

static bool try_known_folders(struct search *s)
{
    static const char *const folders[] = {
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/nvidia/lib64",
        "/usr/local/cuda/compat",
        "/usr/lib/wsl/lib",
        "/run/opengl-driver/lib",
    };
    for (size_t i = 0; i < sizeof(folders) / sizeof(folders[0]); i++)
        if (try_folder(s, folders[i]))
            return true;
    return false;
}

/* A program that runs with more rights than its caller takes nothing from its environment. */
static const char *environment(const char *name)
{
    return getauxval(AT_SECURE) ? NULL : getenv(name);
}

static void find_driver(struct search *s)
{
    const char *given = environment("BENNU_DRIVER");
    if (given && given[0]) {
        try_file(s, given);
        return;
    }
    const char *kept = environment("BENNU_SELF_REAL");
    if (kept && kept[0] && try_file(s, kept))
        return;
    (void)(try_file(s, BENNU_REAL_DRIVER) || try_search_path(s) || try_cache(s) || try_known_folders(s));
}

void bn_real_resolve(void)
{
    int saved = errno;
    struct search s = {0};
    find_driver(&s);
    if (s.handle) {
        for (unsigned i = 0; i < BN_FN_COUNT; i++) {
            void *real = dlsym(s.handle, bn_entries[i].name);
            /* Another thread may call it at once, before the others are there: what dlopen wrote comes first. */
            if (real)
                __atomic_store_n(bn_real_slot(i), real, __ATOMIC_RELEASE);
        }
        if (!__atomic_load_n(&bn_real_ready, __ATOMIC_ACQUIRE))
            snprintf(driver_path, sizeof(driver_path), "%.255s", s.path);
    }
    __atomic_store_n(&bn_real_ready, 1, __ATOMIC_RELEASE);
    errno = saved;
}

/* With no driver a program is told what it would be told without us as nearly as can be. It found no library then; now it
 * finds one that has nothing: cudart looks functions up by name and, finding none, reports
 * cudaErrorInsufficientDriver, as it does when the library is missing (seen with cudart 13.0). */
CUresult bn_real_missing(unsigned fn)
{
    if (bn_real.cuInit)
        return CUDA_ERROR_NOT_FOUND;
    switch (fn) {
    case BN_FN_cuGetProcAddress:
    case BN_FN_cuGetProcAddress_v2: return CUDA_ERROR_NOT_FOUND;
    default: return CUDA_ERROR_NO_DEVICE;
    }
}
