/* Taking the process's GPU memory away and giving it back. All of it in the agent's thread; from CLOSE to OPEN no thread of the
 * application is inside the driver, so the tables stand still. */
#include "agent/agent.h"
#include "agent/purge.h"
#include "agent/capture.h"
#include "agent/gate.h"
#include "agent/idle.h"
#include "agent/track.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define TIMEOUT_MAX_MS 3600000u

static enum bn_agent_state state = BN_AGENT_ACTIVE;
static struct bn_seg **order; /* from CLOSE to OPEN: the evictable segments, by id */
static size_t order_count, order_bytes, missing;

static void set_state(enum bn_agent_state s)
{
    state = s;
    bn_store_rel(&bn_agent_page()->state, (uint32_t)s);
}

int bn_answer_fail(struct bn_answer *a, int error, CUresult cuda, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    vsnprintf(a->head.text, sizeof(a->head.text), fmt, args);
    va_end(args);
    a->head.error = error;
    a->head.cuda_error = (uint32_t)cuda;
    a->head.count = 0;
    return -error;
}

static const char *cuda_text(CUresult r)
{
    const char *text = NULL;
    if (!bn_real.cuGetErrorName || bn_real.cuGetErrorName(r, &text) != CUDA_SUCCESS || !text)
        return "unknown CUDA error";
    return text;
}

/* ---- closing and opening --------------------------------------------------------------------------- */

static void drop_order(void)
{
    if (order)
        munmap(order, order_bytes);
    order = NULL;
    order_count = order_bytes = missing = 0;
}

static int make_order(struct bn_answer *a)
{
    BN_LOCKED();
    drop_order();
    order_bytes = (bn_track.segs.count + 1) * sizeof(*order);
    void *mem = mmap(NULL, order_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mem == MAP_FAILED)
        return bn_answer_fail(a, ENOMEM, 0, "the process has no memory left for a list of its GPU memory");
    order = mem;
    BN_TREE_EACH(&bn_track.segs, n)
    {
        struct bn_seg *seg = BN_CONTAINER(n, struct bn_seg, by_id);
        if (!bn_seg_evictable(seg))
            continue;
        if (seg->array_maps)
            return bn_answer_fail(a, ENOTSUP, 0, "VMM memory of the process is bound to a sparse array");
        order[order_count++] = seg;
    }
    return 0;
}

static int check_blockers(struct bn_answer *a)
{
    const struct bn_agent_blockers *b = &bn_agent_page()->blockers;
    uint64_t managed = bn_load(&b->managed_bytes), host = bn_load(&b->host_vmm_bytes);
    uint64_t imported = bn_load(&b->imported_handles), multicast = bn_load(&b->multicast_handles);
    if (managed)
        return bn_answer_fail(a, ENOTSUP, 0,
                              "it has %llu bytes of managed memory (cuMemAllocManaged), which the driver "
                              "cannot checkpoint",
                              (unsigned long long)managed);
    if (host)
        return bn_answer_fail(a, ENOTSUP, 0,
                              "it has %llu bytes of VMM memory on the host, which the driver cannot restore",
                              (unsigned long long)host);
    if (imported)
        return bn_answer_fail(
            a, ENOTSUP, 0,
            "it has imported GPU memory of another process (%llu handles), which the driver "
            "cannot restore",
            (unsigned long long)imported);
    if (multicast)
        return bn_answer_fail(a, ENOTSUP, 0,
                              "it has %llu multicast objects, which the driver cannot checkpoint",
                              (unsigned long long)multicast);
    if (bn_load(&bn_track.missed))
        return bn_answer_fail(
            a, ENOTSUP, 0,
            "something that it asked of the driver could not be kept track of (its memory was "
            "full, or the driver failed): only a new start of it helps");
    return 0;
}

static void thread_name(pid_t tid, char *out, size_t cap)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/task/%d/comm", (int)tid);
    snprintf(out, cap, "?");
    FILE *f = fopen(path, "re");
    if (!f)
        return;
    if (fgets(out, (int)cap, f))
        out[strcspn(out, "\n")] = 0;
    fclose(f);
}

/* With the gate closed: everything that must hold before memory can be touched. */
static int check_closed(uint64_t deadline, uint64_t timeout_ms, struct bn_answer *a)
{
    if (bn_track.doomed) {
        BN_LOCKED();
        bn_ctx_borrow();
        bn_doomed_again_locked();
        bn_ctx_unborrow();
    }
    int r = check_blockers(a);
    if (r < 0)
        return r;
    unsigned captures = bn_capture_recount();
    if (captures)
        return bn_answer_fail(a, EAGAIN, 0,
                              "%u stream captures are under way: try again when they have ended", captures);
    CUresult cuda = CUDA_SUCCESS;
    r = bn_idle_wait(deadline, &cuda);
    if (r == -EBUSY)
        return bn_answer_fail(a, EBUSY, 0,
                              "work on the GPU did not end within %llu ms (a kernel that waits for another "
                              "process?)",
                              (unsigned long long)timeout_ms);
    if (r == -EIO)
        return bn_answer_fail(a, EIO, cuda, "a CUDA context of it is broken: %s", cuda_text(cuda));
    if (r == -E2BIG)
        return bn_answer_fail(a, E2BIG, 0, "it has more CUDA contexts than can be waited for");
    if (r < 0)
        return bn_answer_fail(a, -r, 0, "the process can have no more threads");
    {
        BN_LOCKED();
        bn_free_later_locked();
    }
    return make_order(a);
}

int bn_evict_close(uint64_t timeout_ms, struct bn_answer *a)
{
    if (state == BN_AGENT_CLOSED)
        return 0;
    if (state == BN_AGENT_EVICTED)
        return bn_answer_fail(a, EINVAL, 0, "its GPU memory is evicted: import it first");
    if (timeout_ms > TIMEOUT_MAX_MS)
        timeout_ms = TIMEOUT_MAX_MS;
    int r = bn_load(&bn_track.doomed) ? 0 : check_blockers(a); /* before anybody has to wait */
    if (r < 0)
        return r;
    uint64_t deadline = bn_clock_ns() + timeout_ms * 1000000u;
    pid_t holder = 0;
    r = bn_gate_close(deadline, &holder);
    if (r == -EBUSY) {
        char name[32];
        thread_name(holder, name, sizeof(name));
        return bn_answer_fail(a, EBUSY, 0, "a CUDA call of its thread %d (%s) did not end within %llu ms",
                              holder, name, (unsigned long long)timeout_ms);
    }
    if (r < 0)
        return bn_answer_fail(a, -r, 0,
                              "the process had no memory for one of its threads: its gate cannot close");
    r = check_closed(deadline, timeout_ms, a);
    if (r < 0) {
        drop_order();
        bn_gate_open();
        return r;
    }
    set_state(BN_AGENT_CLOSED);
    return 0;
}

/* ---- listing and handing over ---------------------------------------------------------------------- */

static void describe(const struct bn_seg *seg, struct bn_agent_segment *out)
{
    *out = (struct bn_agent_segment){.id = seg->by_id.key, .size = seg->size, .flags = seg->flags};
    for (const struct bn_map *m = seg->maps; m; m = m->next)
        if (out->va == 0 || m->by_va.key < out->va)
            out->va = m->by_va.key;
    memcpy(out->uuid, bn_track.devices[seg->dev].uuid, sizeof(out->uuid));
}

int bn_evict_list(uint64_t at, struct bn_answer *a)
{
    if (state != BN_AGENT_CLOSED && state != BN_AGENT_EVICTED)
        return bn_answer_fail(a, EINVAL, 0, "its gate is not closed");
    a->head.arg = order_count;
    for (; at < order_count && a->head.count < BN_AGENT_BATCH; at++)
        describe(order[at], &a->segs[a->head.count++]);
    return 0;
}

static CUresult export_one(const struct bn_seg *seg, int *fd)
{
    *fd = -1;
    if (seg->kept.fd) {
        if (!bn_kept_valid(&seg->kept))
            return CUDA_ERROR_INVALID_HANDLE;
        *fd = fcntl(seg->kept.fd, F_DUPFD_CLOEXEC, 0);
        return *fd < 0 ? CUDA_ERROR_OPERATING_SYSTEM : CUDA_SUCCESS;
    }
    CUresult r =
        bn_real.cuMemExportToShareableHandle(fd, seg->real, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    if (r == CUDA_SUCCESS)
        fcntl(*fd, F_SETFD, FD_CLOEXEC);
    return r;
}

int bn_evict_export(uint64_t at, struct bn_answer *a)
{
    if (state != BN_AGENT_CLOSED)
        return bn_answer_fail(a, EINVAL, 0, "its gate is not closed with its memory in place");
    bn_fd_limit_lift();
    CUresult r = CUDA_SUCCESS;
    for (; at < order_count && a->nfds < BN_AGENT_BATCH && r == CUDA_SUCCESS; at++) {
        r = export_one(order[at], &a->fds[a->nfds]);
        if (r == CUDA_SUCCESS)
            describe(order[at], &a->segs[a->nfds++]);
    }
    bn_fd_limit_restore();
    a->head.count = a->nfds;
    a->head.arg = order_count;
    if (r == CUDA_SUCCESS)
        return 0;
    return bn_answer_fail(a, EIO, r,
                          r == CUDA_ERROR_INVALID_HANDLE
                              ? "the program closed the descriptor of GPU memory segment %llu (%s)"
                              : "segment %llu of its GPU memory cannot be exported: %s",
                          (unsigned long long)order[at - 1]->by_id.key, cuda_text(r));
}

/* ---- taking away ----------------------------------------------------------------------------------- */

static CUresult map_one(struct bn_map *m)
{
    CUdeviceptr va = m->by_va.key;
    CUresult r = m->mapped ? CUDA_SUCCESS : bn_real.cuMemMap(va, m->size, m->offset, m->seg->real, 0);
    if (r != CUDA_SUCCESS)
        return r;
    r = bn_map_apply_access_locked(m);
    m->mapped = r == CUDA_SUCCESS || bn_real.cuMemUnmap(va, m->size) != CUDA_SUCCESS;
    m->bare = m->mapped && r != CUDA_SUCCESS;
    return r;
}

/* Map what is not mapped; on error what could be mapped until then stays so. */
static CUresult map_segment(struct bn_seg *seg)
{
    for (struct bn_map *m = seg->maps; m; m = m->next) {
        if (m->mapped && !m->bare)
            continue;
        CUresult r = map_one(m);
        if (r != CUDA_SUCCESS)
            return r;
    }
    return CUDA_SUCCESS;
}

static CUresult unmap_segment(struct bn_seg *seg)
{
    for (struct bn_map *m = seg->maps; m; m = m->next) {
        if (!m->mapped)
            continue;
        CUresult r = bn_real.cuMemUnmap(m->by_va.key, m->size);
        if (r != CUDA_SUCCESS)
            return r;
        m->mapped = m->bare = false;
    }
    return CUDA_SUCCESS;
}

int bn_evict_evict(struct bn_answer *a)
{
    if (state != BN_AGENT_CLOSED)
        return bn_answer_fail(a, EINVAL, 0, "its gate is not closed with its memory in place");
    BN_LOCKED();
    bn_ctx_borrow();
    CUresult r = bn_release_stuck_locked();
    size_t i;
    for (i = 0; i < order_count && r == CUDA_SUCCESS; i++)
        r = unmap_segment(order[i]);
    if (r != CUDA_SUCCESS) {
        /* Every handle is still held: put back what was unmapped. */
        CUresult back = CUDA_SUCCESS;
        for (size_t k = 0; k < i; k++) {
            CUresult one = map_segment(order[k]);
            back = back == CUDA_SUCCESS ? one : back;
        }
        bn_ctx_unborrow();
        return bn_answer_fail(a, EIO, r, "its GPU memory cannot be unmapped (%s)%s", cuda_text(r),
                              back == CUDA_SUCCESS ? "; nothing has changed" : ", nor mapped again");
    }
    for (i = 0; i < order_count; i++) {
        struct bn_seg *seg = order[i];
        CUresult one = bn_release_locked(seg->real);
        r = r == CUDA_SUCCESS ? one : r;
        seg->real = 0;
        seg->present = false;
        bn_kept_close(&seg->kept);
        bn_ipc_withdraw_locked(seg);
    }
    bn_ctx_unborrow();
    missing = order_count;
    __atomic_fetch_add(&bn_agent_page()->epoch, 1, __ATOMIC_RELAXED);
    bn_store(&bn_agent_page()->need.hot, 0); /* what a daemon says now does not hold after a restore */
    set_state(BN_AGENT_EVICTED);
    bn_purge_note();
    if (r != CUDA_SUCCESS) /* evicted all the same: whoever holds the memory has to give it back */
        return bn_answer_fail(a, EIO, r, "the driver does not release its GPU memory: %s", cuda_text(r));
    return 0;
}

int bn_evict_open(struct bn_answer *a)
{
    if (state != BN_AGENT_CLOSED && !(state == BN_AGENT_EVICTED && missing == 0))
        return bn_answer_fail(
            a, EINVAL, 0,
            state == BN_AGENT_EVICTED ? "%zu segments are not back yet" : "its gate is not closed", missing);
    /* An eviction that failed half-way may have left something unmapped: once more. */
    for (size_t i = 0; i < order_count; i++) {
        CUresult r = map_segment(order[i]);
        if (r != CUDA_SUCCESS)
            return bn_answer_fail(a, EIO, r, "segment %llu of its GPU memory cannot be mapped: %s",
                                  (unsigned long long)order[i]->by_id.key, cuda_text(r));
    }
    drop_order();
    set_state(BN_AGENT_ACTIVE);
    bn_gate_open();
    return 0;
}

/* ---- giving back ----------------------------------------------------------------------------------- */

static struct bn_seg *find_ordered(uint64_t id)
{
    size_t low = 0, high = order_count;
    while (low < high) {
        size_t mid = (low + high) / 2;
        if (order[mid]->by_id.key < id)
            low = mid + 1;
        else
            high = mid;
    }
    return low < order_count && order[low]->by_id.key == id ? order[low] : NULL;
}

/* Import what fd stands for into seg and keep fd; takes it over. A CUresult, or with *error an errno. */
static CUresult hold(struct bn_seg *seg, int fd, int *error)
{
    CUresult r = bn_real.cuMemImportFromShareableHandle(&seg->real, (void *)(intptr_t)fd,
                                                        CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    if (r != CUDA_SUCCESS) {
        seg->real = 0;
        close(fd);
        return r;
    }
    *error = -bn_kept_take(&seg->kept, fd);
    if (*error == 0)
        return CUDA_SUCCESS;
    close(fd);
    bn_release_locked(seg->real);
    seg->real = 0;
    return CUDA_ERROR_OPERATING_SYSTEM;
}

/* After a failure to map: nothing of the segment is left here, or, where even that fails, its handle is kept for another try. */
static void let_go(struct bn_seg *seg)
{
    if (unmap_segment(seg) != CUDA_SUCCESS)
        return;
    bn_release_locked(seg->real);
    seg->real = 0;
    bn_kept_close(&seg->kept);
}

/* The segment has its memory again. */
static void settled(struct bn_seg *seg, const uint8_t uuid[16])
{
    seg->present = true;
    bn_track_moved_locked(seg->dev, uuid);
    bn_ipc_offer_again_locked(seg);
    missing--;
}

static int cannot(const char *be_done, unsigned long long id, CUresult r, struct bn_answer *a)
{
    return bn_answer_fail(a, r == CUDA_ERROR_OUT_OF_MEMORY ? ENOMEM : EIO, r,
                          "segment %llu of its GPU memory cannot be %s: %s", id, be_done, cuda_text(r));
}

/* NULL, and the answer says why. */
static struct bn_seg *find_wanted(const struct bn_agent_segment *want, struct bn_answer *a)
{
    struct bn_seg *seg = find_ordered(want->id);
    if (seg && seg->size == want->size)
        return seg;
    bn_answer_fail(a, EINVAL, 0, seg ? "segment %llu has another size" : "it has no segment %llu",
                   (unsigned long long)want->id);
    return NULL;
}

/* Give up memory that was created for it and never filled. */
static void drop_unfilled(struct bn_seg *seg)
{
    if (!seg->unfilled)
        return;
    bn_release_locked(seg->real);
    seg->real = 0;
    seg->unfilled = false;
}

/* Takes over fd. */
static int import_one(const struct bn_agent_segment *want, int fd, struct bn_answer *a)
{
    struct bn_seg *seg = find_wanted(want, a);
    unsigned long long id = want->id;
    int error = 0;
    CUresult r = CUDA_SUCCESS;
    if (!seg) {
        close(fd);
        return -EINVAL;
    }
    drop_unfilled(seg);
    if (seg->present || seg->real)
        close(fd);
    else
        r = hold(seg, fd, &error);
    if (seg->present)
        return 0;
    if (error)
        return bn_answer_fail(a, error, 0,
                              "it can have no more open descriptors (ulimit -n) for segment %llu", id);
    if (r != CUDA_SUCCESS) {
        cannot("imported", id, r, a);
        if (r == CUDA_ERROR_NOT_INITIALIZED || r == CUDA_ERROR_INVALID_DEVICE) /* the latter in a container */
            a->head.error = ENODEV;
        return -a->head.error;
    }
    r = map_segment(seg);
    if (r != CUDA_SUCCESS) {
        let_go(seg);
        return cannot("mapped", id, r, a);
    }
    settled(seg, want->uuid);
    return 0;
}

int bn_evict_import(const struct bn_agent_segment *segs, unsigned n, const int *fds, struct bn_answer *a)
{
    unsigned i = 0;
    int r = 0;
    if (state != BN_AGENT_EVICTED && !(state == BN_AGENT_CLOSED && missing == 0)) {
        r = bn_answer_fail(a, EINVAL, 0, "its GPU memory is not evicted");
    } else {
        BN_LOCKED();
        bn_ctx_borrow();
        bn_fd_limit_lift();
        for (; i < n && r == 0; i++)
            r = import_one(&segs[i], fds[i], a);
        bn_fd_limit_restore();
        bn_ctx_unborrow();
    }
    for (; i < n; i++)
        close(fds[i]);
    if (r == 0 && missing == 0)
        set_state(BN_AGENT_CLOSED);
    return r;
}

/* ---- giving back where nothing can be imported ------------------------------------------------------ */

/* As it was made. */
static CUresult create_again(struct bn_seg *seg)
{
    uint32_t flags = seg->flags;
    CUresult r = bn_seg_create_locked(seg, &flags);
    seg->unfilled = r == CUDA_SUCCESS;
    return r;
}

static int create_one(const struct bn_agent_segment *want, struct bn_answer *a)
{
    struct bn_seg *seg = find_wanted(want, a);
    if (!seg)
        return -EINVAL;
    drop_unfilled(seg);
    /* What is in place was filled by a controller that did not get further: it is filled once more. */
    CUresult r = seg->real ? CUDA_SUCCESS : create_again(seg);
    if (r != CUDA_SUCCESS)
        return cannot("created", want->id, r, a);
    r = export_one(seg, &a->fds[a->nfds]);
    if (r != CUDA_SUCCESS) {
        drop_unfilled(seg);
        return bn_answer_fail(a, EIO, r, "segment %llu of its GPU memory cannot be exported: %s",
                              (unsigned long long)want->id, cuda_text(r));
    }
    describe(seg, &a->segs[a->nfds++]);
    return 0;
}

int bn_evict_create(const struct bn_agent_segment *segs, unsigned n, struct bn_answer *a)
{
    if (state != BN_AGENT_EVICTED)
        return bn_answer_fail(a, EINVAL, 0, "its GPU memory is not evicted");
    BN_LOCKED();
    bn_ctx_borrow();
    bn_fd_limit_lift();
    int r = 0;
    for (unsigned i = 0; i < n && r == 0; i++)
        r = create_one(&segs[i], a);
    while (r < 0 && a->nfds > 0) {
        close(a->fds[--a->nfds]);
        drop_unfilled(find_ordered(a->segs[a->nfds].id));
    }
    bn_fd_limit_restore();
    bn_ctx_unborrow();
    a->head.count = a->nfds;
    return r;
}

static int map_unfilled(const struct bn_agent_segment *want, struct bn_answer *a)
{
    struct bn_seg *seg = find_wanted(want, a);
    if (!seg)
        return -EINVAL;
    if (seg->present)
        return 0;
    if (!seg->real)
        return bn_answer_fail(a, EINVAL, 0, "no memory was created for segment %llu",
                              (unsigned long long)want->id);
    CUresult r = map_segment(seg);
    if (r != CUDA_SUCCESS) {
        seg->unfilled =
            unmap_segment(seg) == CUDA_SUCCESS; /* else its handle is kept, as import_one has it */
        drop_unfilled(seg);
        return cannot("mapped", want->id, r, a);
    }
    seg->unfilled = false;
    settled(seg, want->uuid);
    return 0;
}

int bn_evict_map(const struct bn_agent_segment *segs, unsigned n, struct bn_answer *a)
{
    if (state != BN_AGENT_EVICTED && !(state == BN_AGENT_CLOSED && missing == 0))
        return bn_answer_fail(a, EINVAL, 0, "its GPU memory is not evicted");
    BN_LOCKED();
    bn_ctx_borrow();
    int r = 0;
    for (unsigned i = 0; i < n && r == 0; i++)
        r = map_unfilled(&segs[i], a);
    bn_ctx_unborrow();
    if (r == 0 && missing == 0)
        set_state(BN_AGENT_CLOSED);
    return r;
}

void bn_evict_after_fork(void)
{
    drop_order();
    state = BN_AGENT_ACTIVE;
}
