/* SPDX-License-Identifier: MIT */

/*
 * How full the machine's devices are.
 *
 * Device memory is a memfd, named cuda-sim:DEVICE (cuda-sim.MACHINE:DEVICE with BENNU_SIM_MACHINE), and lives as long
 * as any process holds a descriptor or a mapping of it. So the truth is in /proc, exact whatever was killed: the
 * sum over the distinct inodes. Looking there costs milliseconds, so a ledger in /dev/shm keeps an upper bound:
 * allocating adds to it, freeing does not, and only when it says that the device may be full is it made exact.
 *
 * What runs in the restore thread allocates no memory and uses no stdio: another thread may be stopped inside malloc.
 */

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sim.h"

#define LEDGER_VERSION 0x62730001u

struct ledger {
    uint32_t version, pad;
    uint64_t used[SIM_MAX_DEVICES];
};

/* ---- Text without stdio ---- */

static char *put_text(char *at, const char *text)
{
    while (*text)
        *at++ = *text++;
    *at = '\0';
    return at;
}

static char *put_number(char *at, uint64_t value)
{
    char digits[24];
    int n = 0;

    do
        digits[n++] = (char)('0' + value % 10);
    while (value /= 10);
    while (n)
        *at++ = digits[--n];
    *at = '\0';
    return at;
}

/* "cuda-sim:3", room for 64 bytes */
static char *put_name(char *at, int physical)
{
    at = put_text(at, "cuda-sim");
    if (sim.machine[0]) {
        *at++ = '.';
        at = put_text(at, sim.machine);
    }
    *at++ = ':';
    return put_number(at, (uint64_t)physical);
}

int phys_memfd(int physical, uint64_t size)
{
    char name[64];
    int fd;

    if (physical < 0)
        put_text(name, "cuda-sim-host");
    else
        put_name(name, physical);
    fd = (int)syscall(SYS_memfd_create, name, MFD_CLOEXEC);
    if (fd < 0)
        return -errno;
    fd = sim_high_fd(fd);
    if (ftruncate(fd, (off_t)size) < 0) {
        int err = errno;

        close(fd);
        return -err;
    }
    return fd;
}

/* Device of "/memfd:cuda-sim:3 (deleted)" on this machine; -1: another thing. */
static int parse_link(const char *link)
{
    static const char prefix[] = "/memfd:cuda-sim";
    size_t len = strlen(sim.machine);
    int n = 0;

    if (strncmp(link, prefix, sizeof(prefix) - 1) != 0)
        return -1;
    link += sizeof(prefix) - 1;
    if (len) {
        if (*link != '.' || strncmp(link + 1, sim.machine, len) != 0)
            return -1;
        link += len + 1;
    }
    if (*link++ != ':' || *link < '0' || *link > '9')
        return -1;
    while (*link >= '0' && *link <= '9' && n < SIM_MAX_DEVICES)
        n = n * 10 + (*link++ - '0');
    return n < SIM_MAX_DEVICES && (*link == ' ' || *link == '\0' || *link == '\n') ? n : -1;
}

int capacity_device_of(int fd)
{
    char path[64], link[128];
    ssize_t len;

    if (fd < 0)
        return -1;
    put_number(put_text(path, "/proc/self/fd/"), (uint64_t)fd);
    len = readlink(path, link, sizeof(link) - 1);
    if (len < 0)
        return -1;
    link[len] = '\0';
    return parse_link(link);
}

/* ---- The truth ---- */

#define SEEN_SLOTS 65536

struct scan {
    int physical;
    uint64_t total;
    uint64_t *seen; /* hash of inodes; a mapping of its own */
};

static void count(struct scan *scan, uint64_t inode, uint64_t size)
{
    size_t slot = (inode * 0x9e3779b97f4a7c15u) >> 48;

    for (size_t i = 0; i < SEEN_SLOTS; i++, slot = (slot + 1) % SEEN_SLOTS) {
        if (scan->seen[slot] == inode)
            return;
        if (scan->seen[slot] == 0) {
            scan->seen[slot] = inode;
            scan->total += size;
            return;
        }
    }
}

struct entry { /* what getdents64 gives */
    uint64_t inode;
    int64_t offset;
    uint16_t length;
    uint8_t type;
    char name[];
};

/* Calls fn for each name that is a number. */
static void each_number(int dir, void (*fn)(int dir, const char *name, void *arg), void *arg)
{
    _Alignas(8) char buffer[4096];
    long n;

    while ((n = syscall(SYS_getdents64, dir, buffer, sizeof(buffer))) > 0)
        for (long at = 0; at < n;) {
            const struct entry *e = (const struct entry *)(buffer + at);

            at += e->length;
            if (e->name[0] >= '0' && e->name[0] <= '9')
                fn(dir, e->name, arg);
        }
}

static void look_at_fd(int dir, const char *name, void *arg)
{
    struct scan *scan = arg;
    char link[128];
    struct stat st;
    ssize_t len = readlinkat(dir, name, link, sizeof(link) - 1);

    if (len <= 0)
        return;
    link[len] = '\0';
    if (parse_link(link) == scan->physical && fstatat(dir, name, &st, 0) == 0)
        count(scan, st.st_ino, (uint64_t)st.st_size);
}

static uint64_t read_hex(const char **at)
{
    uint64_t value = 0;

    for (;; (*at)++) {
        char c = **at;

        if (c >= '0' && c <= '9')
            value = value << 4 | (uint64_t)(c - '0');
        else if (c >= 'a' && c <= 'f')
            value = value << 4 | (uint64_t)(c - 'a' + 10);
        else
            return value;
    }
}

/* start-end perms offset dev inode path. Native memory is always mapped whole, by one mapping. */
static void look_at_line(const char *line, struct scan *scan)
{
    const char *path = strstr(line, "/memfd:cuda-sim");
    uint64_t start, end, inode = 0;

    if (!path || parse_link(path) != scan->physical)
        return;
    start = read_hex(&line);
    line++;
    end = read_hex(&line);
    for (int i = 0; i < 4; i++) { /* to the inode */
        while (*line && *line != ' ')
            line++;
        while (*line == ' ')
            line++;
    }
    while (*line >= '0' && *line <= '9')
        inode = inode * 10 + (uint64_t)(*line++ - '0');
    if (inode)
        count(scan, inode, end - start);
}

static void look_at_maps(int fd, struct scan *scan)
{
    char buffer[8192 + 1];
    size_t have = 0;
    ssize_t n;

    while ((n = read(fd, buffer + have, sizeof(buffer) - 1 - have)) > 0) {
        char *line = buffer, *end;

        have += (size_t)n;
        buffer[have] = '\0';
        while ((end = strchr(line, '\n'))) {
            *end = '\0';
            look_at_line(line, scan);
            line = end + 1;
        }
        have -= (size_t)(line - buffer);
        memmove(buffer, line, have);
        if (have == sizeof(buffer) - 1)
            have = 0; /* a longer line is none of ours */
    }
}

static void look_at_process(int proc, const char *pid, void *arg)
{
    char path[64];
    int fd;

    put_text(put_text(path, pid), "/fd");
    fd = openat(proc, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        each_number(fd, look_at_fd, arg);
        close(fd);
    }
    put_text(put_text(path, pid), "/maps");
    fd = openat(proc, path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        look_at_maps(fd, arg);
        close(fd);
    }
}

uint64_t capacity_used(int physical)
{
    struct scan scan = {.physical = physical};
    size_t size = SEEN_SLOTS * sizeof(*scan.seen);
    int proc = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    if (proc < 0)
        return 0;
    scan.seen = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (scan.seen != MAP_FAILED) {
        each_number(proc, look_at_process, &scan);
        munmap(scan.seen, size);
    }
    close(proc);
    return scan.total;
}

/* ---- The ledger ---- */

int capacity_lock(void)
{
    char path[96];
    int fd;

    put_text(put_text(put_text(path, "/dev/shm/cuda-sim"), sim.machine[0] ? "." : ""), sim.machine);
    fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (fd < 0)
        return -1; /* always counted then */
    fchmod(fd, 0666);
    while (flock(fd, LOCK_EX) < 0 && errno == EINTR)
        ;
    return fd;
}

/* Does it fit? If so, and with `take`, it is noted. */
static bool fits(int lock_fd, int physical, uint64_t size, bool take)
{
    struct ledger ledger = {0};
    uint64_t used;

    if (size > sim.memory)
        return false;
    if (lock_fd < 0)
        return capacity_used(physical) + size <= sim.memory;
    if (pread(lock_fd, &ledger, sizeof(ledger), 0) != (ssize_t)sizeof(ledger) ||
        ledger.version != LEDGER_VERSION) {
        memset(&ledger, 0, sizeof(ledger));
        ledger.version = LEDGER_VERSION;
        for (int i = 0; i < SIM_MAX_DEVICES; i++)
            ledger.used[i] = UINT64_MAX / 2; /* nothing known yet */
    }
    used = ledger.used[physical];
    if (used + size > sim.memory)
        used = capacity_used(physical);
    if (used + size > sim.memory)
        return false;
    ledger.used[physical] = take ? used + size : used;
    return pwrite(lock_fd, &ledger, sizeof(ledger), 0) == (ssize_t)sizeof(ledger);
}

bool capacity_take(int lock_fd, int physical, uint64_t size)
{
    return fits(lock_fd, physical, size, true);
}

bool capacity_has(int physical, uint64_t size)
{
    int lock = capacity_lock();
    bool has = fits(lock, physical, size, false);

    if (lock >= 0)
        close(lock);
    return has;
}

/* ---- Physical allocations ---- */

CUresult phys_create(int ordinal, uint64_t size, struct phys **out)
{
    struct phys *phys = calloc(1, sizeof(*phys));
    bool fits = true;
    int lock;

    if (!phys)
        return CUDA_ERROR_OUT_OF_MEMORY;
    phys->ordinal = ordinal;
    phys->size = size;
    phys->fd = -1;
    phys->id = sim.next_id++;
    if (ordinal < 0) {
        phys->fd = phys_memfd(-1, size);
    } else {
        lock = capacity_lock();
        fits = capacity_take(lock, sim.physical[ordinal], size);
        if (fits)
            phys->fd = phys_memfd(sim.physical[ordinal], size);
        if (lock >= 0)
            close(lock);
    }
    if (phys->fd < 0) {
        free(phys);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    phys->next = sim.physical_list;
    sim.physical_list = phys;
    *out = phys;
    return CUDA_SUCCESS;
}

void phys_settle(struct phys *phys)
{
    if (phys->handles || phys->maps)
        return;
    for (struct phys **p = &sim.physical_list; *p; p = &(*p)->next)
        if (*p == phys) {
            *p = phys->next;
            break;
        }
    if (phys->fd >= 0)
        close(phys->fd);
    free(phys);
}

struct phys *phys_by_id(uint64_t id)
{
    for (struct phys *p = sim.physical_list; p; p = p->next)
        if (p->id == id && p->handles)
            return p;
    return NULL;
}

int phys_ordinal(int physical)
{
    for (int i = 0; i < sim.devices; i++)
        if (sim.physical[i] == physical)
            return i;
    return -1;
}
