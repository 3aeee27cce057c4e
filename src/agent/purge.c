/* Giving zero pages back before CRIU looks.
 *
 * The driver's checkpoint adds about half a gigabyte of host memory to a process, 99 % of it zero pages, and CRIU writes and
 * reads them like any other. A page of private anonymous memory that is all zero may be dropped: the next look at it finds
 * zeros again. That is only sound while nobody writes: the controller asks for it when every thread of the process but the
 * agent's is stopped. Only memory that came since the eviction is touched, which is the driver's own; anything older may be
 * pinned by a device that holds the page and not the address.
 */
#include "agent/purge.h"

#include "agent/sync.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u
#define RANGES 16384u /* mappings of the process before the checkpoint; beyond that nothing is purged */
#define MAPS_BUF 65536u
#define PAGE_BITS 4096u /* pagemap entries read at once: 16 MiB of memory */
/* Pages looked at before they are dropped. Should the controller be killed in the middle, the process runs again: the
 * shorter the time between look and drop, and the sooner all of it ends, the better. */
#define RUN_MAX (64 * PAGE)
#define TIME_NS UINT64_C(2000000000)
#define PRESENT (UINT64_C(1) << 63)
#define OF_FILE (UINT64_C(1) << 61)

struct span {
    uint64_t start, end;
};

/* One mapping of its own for all tables: made at the first eviction, kept. */
static struct tables {
    struct span before[RANGES];
    char maps[MAPS_BUF];
    uint64_t pages[PAGE_BITS];
} * tables;
static size_t before_count;
static bool usable;

typedef void (*span_fn)(uint64_t start, uint64_t end, void *arg);

static const char *hex(const char *p, const char *end, uint64_t *out)
{
    uint64_t v = 0;
    for (; p < end; p++) {
        unsigned digit;
        if (*p >= '0' && *p <= '9')
            digit = (unsigned)(*p - '0');
        else if (*p >= 'a' && *p <= 'f')
            digit = (unsigned)(*p - 'a') + 10;
        else
            break;
        v = v << 4 | digit;
    }
    *out = v;
    return p;
}

/* "start-end perms offset major:minor inode [name]": true for private, readable and writable memory of no file. */
static bool parse(const char *line, const char *end, struct span *s)
{
    const char *p = hex(line, end, &s->start);
    if (p >= end || *p != '-')
        return false;
    p = hex(p + 1, end, &s->end);
    if (end - p < 6 || p[1] != 'r' || p[2] != 'w' || p[4] != 'p')
        return false;
    uint64_t ignored, inode = 0;
    p = hex(p + 6, end, &ignored); /* offset */
    while (p < end && *p == ' ')
        p++;
    while (p < end && *p != ' ') /* device */
        p++;
    while (p < end && *p == ' ')
        p++;
    hex(p, end, &inode);
    return inode == 0 && s->end > s->start;
}

static int each_mapping(span_fn fn, void *arg)
{
    int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    size_t have = 0;
    int r = 0;
    for (;;) {
        ssize_t n = read(fd, tables->maps + have, MAPS_BUF - have);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            r = -errno;
        if (n <= 0)
            break;
        have += (size_t)n;
        size_t done = 0;
        for (size_t i = 0; i < have; i++) {
            struct span s;
            if (tables->maps[i] != '\n')
                continue;
            if (parse(tables->maps + done, tables->maps + i, &s))
                fn(s.start, s.end, arg);
            done = i + 1;
        }
        if (done == 0 && have == MAPS_BUF) {
            r = -E2BIG;
            break;
        }
        for (size_t i = done; i < have; i++)
            tables->maps[i - done] = tables->maps[i];
        have -= done;
    }
    close(fd);
    return r;
}

static void note(uint64_t start, uint64_t end, void *arg)
{
    (void)arg;
    if (before_count < RANGES)
        tables->before[before_count] = (struct span){start, end};
    before_count++;
}

void bn_purge_note(void)
{
    usable = false;
    if (!tables) {
        void *mem = mmap(NULL, sizeof(*tables), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mem == MAP_FAILED)
            return;
        tables = mem;
    }
    before_count = 0;
    usable = each_mapping(note, NULL) == 0 && before_count <= RANGES;
}

static bool is_zero(const uint64_t *p)
{
    for (size_t i = 0; i < PAGE / 8; i += 8)
        if (p[i] | p[i + 1] | p[i + 2] | p[i + 3] | p[i + 4] | p[i + 5] | p[i + 6] | p[i + 7])
            return false;
    return true;
}

struct purge {
    int pagemap;
    size_t next; /* of before[]: maps come in order of addresses */
    uint64_t deadline;
    uint64_t freed;
};

static void drop(struct purge *p, uint64_t start, uint64_t end)
{
    if (end > start && madvise((void *)(uintptr_t)start, end - start, MADV_DONTNEED) == 0)
        p->freed += end - start;
}

/* The resident zero pages of [start, end), run by run. */
static void purge_range(struct purge *p, uint64_t start, uint64_t end)
{
    uint64_t run = 0; /* start of the run of zero pages that ends at `at`; 0: none */
    uint64_t at = start;
    while (at < end && bn_clock_ns() < p->deadline) {
        uint64_t want = (end - at) / PAGE;
        if (want > PAGE_BITS)
            want = PAGE_BITS;
        ssize_t n = pread(p->pagemap, tables->pages, want * 8, (off_t)(at / PAGE * 8));
        if (n < 8)
            break;
        for (ssize_t i = 0; i < n / 8; i++, at += PAGE) {
            uint64_t bits = tables->pages[i];
            bool zero = (bits & PRESENT) && !(bits & OF_FILE) && is_zero((const uint64_t *)(uintptr_t)at);
            if (zero && !run)
                run = at;
            if (run && (!zero || at - run >= RUN_MAX)) {
                drop(p, run, at);
                run = zero ? at : 0;
            }
        }
    }
    if (run)
        drop(p, run, at);
}

/* What of the mapping was not there before. */
static void purge_new(uint64_t start, uint64_t end, void *arg)
{
    struct purge *p = arg;
    while (p->next < before_count && tables->before[p->next].end <= start)
        p->next++;
    for (size_t i = p->next; i < before_count && tables->before[i].start < end && start < end; i++) {
        if (tables->before[i].start > start)
            purge_range(p, start, tables->before[i].start);
        if (tables->before[i].end > start)
            start = tables->before[i].end;
    }
    if (start < end)
        purge_range(p, start, end);
}

uint64_t bn_purge(void)
{
    if (!usable)
        return 0;
    struct purge p = {.pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC),
                      .deadline = bn_clock_ns() + TIME_NS};
    if (p.pagemap < 0)
        return 0;
    each_mapping(purge_new, &p);
    close(p.pagemap);
    return p.freed;
}
