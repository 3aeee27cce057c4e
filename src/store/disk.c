#include "store/disk.h"

#include "base/cleanup.h"
#include "base/io.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/magic.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>

#define AREAS 4u /* registered with a ring: a thread has a few buffers */
#define NONE UINT32_MAX

struct area {
    uint8_t *base;
    size_t bytes; /* 0: free */
};

struct ring {
    struct io_uring uring;
    bool registers; /* areas can be registered with it */
    struct area areas[AREAS];
    unsigned next_area; /* to be given up for another */
    struct ring *next;
};

struct bn_disk {
    unsigned flags;
    pthread_mutex_t lock; /* everything below */
    struct ring *idle;
    bool no_rings; /* the kernel gives us none */
};

/* ---- rings ---- */

struct bn_disk *bn_disk_new(unsigned flags)
{
    struct bn_disk *d = calloc(1, sizeof(*d));
    if (!d)
        return NULL;
    pthread_mutex_init(&d->lock, NULL);
    d->flags = flags;
    d->no_rings = flags & BN_DISK_NO_RING;
    return d;
}

static void ring_free(struct ring *r)
{
    io_uring_queue_exit(&r->uring);
    free(r);
}

void bn_disk_free(struct bn_disk *d)
{
    if (!d)
        return;
    for (struct ring *r = d->idle, *next; r; r = next) {
        next = r->next;
        ring_free(r);
    }
    pthread_mutex_destroy(&d->lock);
    free(d);
}

static struct ring *ring_new(const struct bn_disk *d)
{
    struct ring *r = calloc(1, sizeof(*r));
    if (!r)
        return NULL;
    if (io_uring_queue_init(BN_DISK_PIECES, &r->uring, 0) < 0) {
        free(r);
        return NULL;
    }
    r->registers = io_uring_register_buffers_sparse(&r->uring, AREAS) == 0;
    return r;
}

static uint32_t area_of(const struct ring *r, const void *data, size_t bytes)
{
    for (uint32_t i = 0; i < AREAS; i++) {
        const struct area *a = &r->areas[i];
        if (a->bytes >= bytes && (uintptr_t)data >= (uintptr_t)a->base &&
            (uintptr_t)data - (uintptr_t)a->base <= a->bytes - bytes)
            return i;
    }
    return NONE;
}

/* A ring for the calling thread: one that knows this memory rather than another. NULL: there are none. */
static struct ring *ring_take(struct bn_disk *d, const struct bn_disk_piece *first)
{
    pthread_mutex_lock(&d->lock);
    struct ring **at = &d->idle;
    for (struct ring **look = at; first->stable && *look; look = &(*look)->next)
        if (area_of(*look, first->data, first->bytes) != NONE) {
            at = look;
            break;
        }
    struct ring *r = *at;
    if (r)
        *at = r->next;
    bool give_up = d->no_rings;
    pthread_mutex_unlock(&d->lock);
    if (r || give_up)
        return r;
    r = ring_new(d);
    if (!r) {
        pthread_mutex_lock(&d->lock);
        d->no_rings = true; /* what refuses one refuses the next: the calls are spared */
        pthread_mutex_unlock(&d->lock);
    }
    return r;
}

static void ring_put(struct bn_disk *d, struct ring *r)
{
    pthread_mutex_lock(&d->lock);
    r->next = d->idle;
    d->idle = r;
    pthread_mutex_unlock(&d->lock);
}

/* Register the memory from a piece on, as far as the following pieces go on in it. Does no harm if it fails: RLIMIT_MEMLOCK. */
static void ring_register(struct ring *r, const struct bn_disk_piece *p, size_t n)
{
    struct area whole = {p->data, p->bytes};
    for (size_t i = 1; i < n && p[i].stable && (uint8_t *)p[i].data == whole.base + whole.bytes; i++)
        whole.bytes += p[i].bytes;
    if (!r->registers || area_of(r, whole.base, whole.bytes) != NONE)
        return;
    unsigned slot = r->next_area;
    for (unsigned i = 0; i < AREAS; i++)
        if (r->areas[i].base == whole.base) /* the same buffer, of which less was used before */
            slot = i;
    struct iovec iov = {whole.base, whole.bytes};
    __u64 tag = 0;
    r->areas[slot] = (struct area){0};
    if (io_uring_register_buffers_update_tag(&r->uring, slot, &iov, &tag, 1) == 1) {
        r->areas[slot] = whole;
        if (slot == r->next_area)
            r->next_area = (slot + 1) % AREAS;
    } else
        r->registers = false;
}

/* ---- files ---- */

void bn_disk_file_open(const struct bn_disk *d, int fd, bool write, struct bn_disk_file *out)
{
    struct statfs fs;
    *out = (struct bn_disk_file){.fd = fd, .direct = -1};
    out->stacked = fstatfs(fd, &fs) == 0 && fs.f_type == OVERLAYFS_SUPER_MAGIC;
    if (d->flags & BN_DISK_NO_DIRECT)
        return;
    /* By descriptor: the name may be another file's by now. */
    char self[64];
    snprintf(self, sizeof(self), "/proc/self/fd/%d", fd);
    out->direct = open(self, (write ? O_RDWR : O_RDONLY) | O_DIRECT | O_NONBLOCK | O_CLOEXEC);
}

void bn_disk_file_close(struct bn_disk_file *f)
{
    bn_close(f->direct);
    *f = BN_DISK_FILE_NONE;
}

/* Others need room there, too: CRIU writes its files at the same time. */
static bool has_plenty(int fd)
{
    struct statvfs fs;
    uint64_t bytes;
    return fstatvfs(fd, &fs) < 0 || fs.f_blocks == 0 ||
           __builtin_mul_overflow((uint64_t)fs.f_bavail, (uint64_t)fs.f_frsize, &bytes) ||
           bytes >= BN_DISK_PLENTY;
}

static int extend(struct bn_disk_file *f, uint64_t bytes)
{
    if (fallocate(f->fd, 0, (off_t)f->reserved, (off_t)(bytes - f->reserved)) < 0)
        return -errno;
    f->reserved = bytes;
    return 0;
}

static bool is_full(int r)
{
    return r == -ENOSPC || r == -EDQUOT || r == -EFBIG;
}

bool bn_disk_reserve(struct bn_disk_file *f, uint64_t bytes)
{
    if (f->direct < 0 || bytes <= f->reserved)
        return true;
    bool plenty = has_plenty(f->fd);
    int r = plenty ? extend(f, (bytes + BN_DISK_STEP - 1) / BN_DISK_STEP * BN_DISK_STEP) : -ENOSPC;
    if (is_full(r)) { /* a whole step is too much: what is needed may fit */
        plenty = false;
        r = extend(f, bytes);
    }
    if (r < 0 && !is_full(r) && r != -EINTR)
        f->reserved = UINT64_MAX; /* it cannot: do not ask again */
    return plenty;
}

int bn_disk_trim(struct bn_disk_file *f, uint64_t bytes)
{
    /* Not only if something was got: what fails half-way may leave the file longer (ext4 that is full does). */
    struct stat st;
    if (f->direct < 0)
        return 0;
    if (fstat(f->fd, &st) < 0 || ((uint64_t)st.st_size > bytes && ftruncate(f->fd, (off_t)bytes) < 0))
        return -errno;
    if (f->reserved != UINT64_MAX && f->reserved > bytes)
        f->reserved = bytes;
    return 0;
}

/* ---- what is in the page cache ---- */

#ifndef SYS_cachestat
#define SYS_cachestat 451 /* Linux 6.5; the same on all architectures */
#endif

/* 1 or 0; -1: cannot be said this way. */
static int ask_cachestat(int fd, uint64_t offset, size_t bytes)
{
    struct {
        uint64_t off, len;
    } range = {offset, bytes};
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } have;
    if (syscall(SYS_cachestat, fd, &range, &have, 0) < 0)
        return -1;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    return have.cached >= (offset + bytes + page - 1) / page - offset / page;
}

static int ask_mincore(int fd, uint64_t offset, size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    unsigned char resident[1024];
    size_t step = sizeof(resident) * page;
    uint64_t begin = offset - offset % page;
    bytes += (size_t)(offset - begin);
    void *p = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, (off_t)begin);
    if (p == MAP_FAILED)
        return -1;
    int result = 1;
    for (size_t at = 0; at < bytes && result == 1; at += step) {
        size_t len = bytes - at < step ? bytes - at : step;
        if (mincore((uint8_t *)p + at, len, resident) < 0)
            result = -1;
        for (size_t i = 0; result == 1 && i < (len + page - 1) / page; i++)
            result = resident[i] & 1;
    }
    munmap(p, bytes);
    return result;
}

bool bn_disk_is_cached(const struct bn_disk *d, const struct bn_disk_file *f, uint64_t offset, size_t bytes)
{
    /* Neither of the two reads anything ahead, as preadv2(RWF_NOWAIT) would. */
    int r = -1;
    if (!f->stacked && !(d->flags & BN_DISK_NO_CACHESTAT))
        r = ask_cachestat(f->fd, offset, bytes);
    if (r < 0)
        r = ask_mincore(f->fd, offset, bytes);
    return r != 0;
}

uint64_t bn_disk_cache_room(void)
{
    bn_auto_free void *text = NULL;
    size_t len;
    if (bn_read_file_at(AT_FDCWD, "/proc/meminfo", 65536, &text, &len) < 0)
        return UINT64_MAX;
    const char *at = strstr(text, "MemAvailable:");
    return at ? strtoull(at + strlen("MemAvailable:"), NULL, 10) * 1024 : UINT64_MAX;
}

/* ---- moving ---- */

static bool aligned(const struct bn_disk_piece *p)
{
    return (p->offset | (uintptr_t)p->data | p->bytes) % BN_DISK_ALIGN == 0;
}

/* The rest of a piece through the page cache. */
static int finish_piece(const struct bn_disk_piece *p, size_t done, bool write)
{
    uint8_t *data = (uint8_t *)p->data + done;
    return write ? bn_pwrite_full(p->file->fd, data, p->bytes - done, p->offset + done)
                 : bn_pread_full(p->file->fd, data, p->bytes - done, p->offset + done);
}

/* What became of a piece that went around the page cache: `res` as of pread(2), -errno. */
static int settle_piece(const struct bn_disk_piece *p, ssize_t res, bool write)
{
    if (res == (ssize_t)p->bytes)
        return 0;
    switch (res) {
    case -EINVAL:     /* a file system with rules of its own about what is aligned */
    case -EFAULT:     /* memory that cannot be pinned */
    case -EOPNOTSUPP: /* no O_DIRECT after all */
    case -EAGAIN:     /* nothing of it was done */
    case -EINTR:
    case -ENOMEM:
    case -ECANCELED: res = 0; break;
    default:
        if (res < 0)
            return (int)res;
    }
    return finish_piece(p, (size_t)res, write);
}

static int direct_by_hand(const struct bn_disk_piece *p, bool write)
{
    ssize_t res;
    do
        res = write ? pwrite(p->file->direct, p->data, p->bytes, (off_t)p->offset)
                    : pread(p->file->direct, p->data, p->bytes, (off_t)p->offset);
    while (res < 0 && errno == EINTR);
    return settle_piece(p, res < 0 ? -errno : res, write);
}

struct call {
    struct bn_disk *d;
    const struct bn_disk_piece *pieces;
    size_t n;
    bool write;
    bn_disk_done_fn done;
    void *arg;
    int result;
    size_t failed;
    uint32_t direct, flying; /* bits of pieces: to go around the page cache; under way in the ring */
};

static void end_piece(struct call *c, size_t i, int r)
{
    if (r == 0 && c->result == 0 && c->done)
        r = c->done(c->arg, i);
    if (r < 0 && c->result == 0) {
        c->result = r;
        c->failed = i;
    }
}

/* Start what goes around the page cache. What does not get into the ring stays in `direct`. */
static void launch(struct call *c, struct ring *r)
{
    uint32_t want = 0;
    for (size_t i = 0; i < c->n; i++) {
        const struct bn_disk_piece *p = &c->pieces[i];
        if (!(c->direct & 1u << i))
            continue;
        if (p->stable)
            ring_register(r, p, c->n - i);
        struct io_uring_sqe *sqe = io_uring_get_sqe(&r->uring);
        uint32_t area = p->stable ? area_of(r, p->data, p->bytes) : NONE;
        if (!sqe)
            break;
        if (area != NONE && c->write)
            io_uring_prep_write_fixed(sqe, p->file->direct, p->data, (unsigned)p->bytes, p->offset,
                                      (int)area);
        else if (area != NONE)
            io_uring_prep_read_fixed(sqe, p->file->direct, p->data, (unsigned)p->bytes, p->offset, (int)area);
        else if (c->write)
            io_uring_prep_write(sqe, p->file->direct, p->data, (unsigned)p->bytes, p->offset);
        else
            io_uring_prep_read(sqe, p->file->direct, p->data, (unsigned)p->bytes, p->offset);
        sqe->user_data = i;
        want |= 1u << i;
    }
    int left = __builtin_popcount(want);
    while (left > 0) {
        int n = io_uring_submit(&r->uring);
        if (n == -EINTR)
            continue;
        if (n <= 0)
            break;
        left -= n;
    }
    /* The kernel takes them in order: the last `left` are not under way. */
    for (; left > 0; left--)
        want &= ~(1u << (31 - __builtin_clz(want)));
    c->flying = want;
    c->direct &= ~want;
}

/* Wait for all that is under way; memory must not be given back before. False: the ring can no longer be used. */
static bool land(struct call *c, struct ring *r)
{
    while (c->flying) {
        struct io_uring_cqe *cqe;
        int n = io_uring_wait_cqe(&r->uring, &cqe);
        if (n == -EINTR || n == -EAGAIN)
            continue;
        if (n < 0)
            abort(); /* only for arguments that are wrong; and to go on would leave the kernel writing into this memory */
        size_t i = (size_t)cqe->user_data;
        int res = cqe->res;
        io_uring_cqe_seen(&r->uring, cqe);
        c->flying &= ~(1u << i);
        end_piece(c, i, settle_piece(&c->pieces[i], res, c->write));
    }
    return io_uring_sq_ready(&r->uring) == 0;
}

static int move(struct call *c, size_t *failed)
{
    uint32_t buffered = 0;
    if (c->n > BN_DISK_PIECES)
        return -EINVAL;
    for (size_t i = 0; i < c->n; i++) {
        const struct bn_disk_piece *p = &c->pieces[i];
        bool around = p->file->direct >= 0 && aligned(p) && p->bytes <= 1u << 30 &&
                      (c->write || !bn_disk_is_cached(c->d, p->file, p->offset, p->bytes));
        if (around)
            c->direct |= 1u << i;
        else
            buffered |= 1u << i;
    }
    struct ring *r = c->direct ? ring_take(c->d, c->pieces) : NULL;
    if (r)
        launch(c, r);
    for (size_t i = 0; i < c->n && c->result == 0; i++)
        if (buffered & 1u << i)
            end_piece(c, i, finish_piece(&c->pieces[i], 0, c->write));
    if (r && land(c, r))
        ring_put(c->d, r);
    else if (r)
        ring_free(r);
    for (size_t i = 0; i < c->n && c->result == 0; i++)
        if (c->direct & 1u << i)
            end_piece(c, i, direct_by_hand(&c->pieces[i], c->write));
    if (c->result < 0 && failed)
        *failed = c->failed;
    return c->result;
}

int bn_disk_read(struct bn_disk *d, const struct bn_disk_piece *pieces, size_t n, bn_disk_done_fn done,
                 void *arg, size_t *failed)
{
    struct call c = {.d = d, .pieces = pieces, .n = n, .done = done, .arg = arg};
    return move(&c, failed);
}

int bn_disk_write(struct bn_disk *d, const struct bn_disk_piece *pieces, size_t n)
{
    struct call c = {.d = d, .pieces = pieces, .n = n, .write = true};
    return move(&c, NULL);
}
