#include "wire/agent_client.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "base/proc.h"
#include "wire/packet.h"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>

/* What an agent may take for an answer that waits for nothing but its own thread and the driver's bookkeeping. 64 GB in
 * 8,192 blocks unmap in well under a second; a process under heavy load gets its time too. */
#ifndef ANSWER_MS /* a test has less patience */
#define ANSWER_MS 60000u
#define GRACE_MS 5000u
#endif
#define LOCK_MS 200u
#define SEGMENTS_MAX (1u << 20)
#define GRANULARITY (2u << 20)

struct bn_agent {
    pid_t pid;
    int pidfd, memfd, sock;
    uint32_t next_id;
    bool answered;                             /* the latest request */
    _Alignas(8) uint8_t buf[BN_AGENT_MSG_MAX]; /* records are read in place */
};

struct message {
    struct bn_agent_msg head;
    const struct bn_agent_segment *segs; /* head.count of them, in the agent's buffer */
    int fds[BN_AGENT_BATCH];
    size_t nfds;
};

static int read_page(int memfd, struct bn_agent_page *page)
{
    int r = bn_pread_full(memfd, page, sizeof(*page), 0);
    if (r < 0)
        return r;
    if (page->magic != BN_AGENT_MAGIC)
        return -EBADMSG;
    if (page->gpu_count > BN_AGENT_GPUS_MAX)
        page->gpu_count = BN_AGENT_GPUS_MAX;
    if (page->unknown_count > BN_ARRAY_SIZE(page->unknown))
        page->unknown_count = BN_ARRAY_SIZE(page->unknown);
    page->agent_version[sizeof(page->agent_version) - 1] = 0;
    page->driver_path[sizeof(page->driver_path) - 1] = 0;
    page->reason[sizeof(page->reason) - 1] = 0;
    for (size_t i = 0; i < BN_ARRAY_SIZE(page->unknown); i++)
        page->unknown[i][sizeof(page->unknown[i]) - 1] = 0;
    return 0;
}

#define NEED_AT(field) (offsetof(struct bn_agent_page, need) + offsetof(struct bn_agent_need, field))

/* Before anything is written: what the process calls its page may be a file of somebody else's under the memfd's name. Only a memfd
 * can be sealed, and an agent's is. */
static int check_need(struct bn_agent *a)
{
    uint32_t knows;
    int seals = fcntl(a->memfd, F_GET_SEALS);
    if (seals < 0 || !(seals & F_SEAL_SHRINK) || !(seals & F_SEAL_GROW))
        return -ENOTSUP;
    int r = bn_pread_full(a->memfd, &knows, sizeof(knows), offsetof(struct bn_agent_page, knows));
    if (r < 0)
        return r;
    return knows & BN_AGENT_KNOWS_NEED ? 0 : -ENOTSUP;
}

int bn_agent_announce_hot(struct bn_agent *a, uint32_t hot)
{
    int r = check_need(a);
    return r < 0 ? r : bn_pwrite_full(a->memfd, &hot, sizeof(hot), NEED_AT(hot));
}

int bn_agent_wanted(struct bn_agent *a, struct bn_agent_want *want)
{
    uint32_t seq;
    struct bn_agent_need need;
    int r = check_need(a);
    if (r == 0) /* the number first: the agent raises it last */
        r = bn_pread_full(a->memfd, &seq, sizeof(seq), NEED_AT(wanted_seq));
    if (r == 0)
        r = bn_pread_full(a->memfd, &need, sizeof(need), offsetof(struct bn_agent_page, need));
    if (r < 0)
        return r;
    if (need.wanted_bytes == 0 || seq == need.answered_seq)
        return 0;
    *want = (struct bn_agent_want){.bytes = need.wanted_bytes, .seq = seq};
    memcpy(want->uuid, need.wanted_uuid, sizeof(want->uuid));
    return 1;
}

int bn_agent_answer_want(struct bn_agent *a, uint32_t seq, bool more)
{
    uint32_t word = more;
    int r = check_need(a);
    if (r == 0)
        r = bn_pwrite_full(a->memfd, &word, sizeof(word), NEED_AT(answered_more));
    return r < 0 ? r : bn_pwrite_full(a->memfd, &seq, sizeof(seq), NEED_AT(answered_seq));
}

/* A forked child may still hold its parent's page for a moment: it names the parent. */
static bool page_is_own(int memfd, void *arg)
{
    struct bn_agent_page page;
    pid_t inner = *(pid_t *)arg;
    return read_page(memfd, &page) == 0 && (pid_t)page.pid == inner;
}

int bn_agent_find(pid_t pid, struct bn_agent **out)
{
    pid_t inner;
    bn_auto_fd pidfd = bn_pidfd_open(pid);
    if (pidfd < 0)
        return pidfd;
    int r = bn_proc_inner_pid(pid, &inner);
    if (r < 0)
        return r;
    bn_auto_fd memfd = bn_proc_open_memfd(pid, BN_AGENT_MEMFD, page_is_own, &inner);
    if (memfd < 0)
        return memfd;
    if (bn_pidfd_dead(pidfd)) /* the number may have been given to another process while we looked */
        return -ESRCH;

    struct bn_agent *a = calloc(1, sizeof(*a));
    if (!a)
        return -ENOMEM;
    a->pid = pid;
    a->pidfd = BN_TAKE_FD(pidfd);
    a->memfd = BN_TAKE_FD(memfd);
    a->sock = -1;
    *out = a;
    return 0;
}

void bn_agent_free(struct bn_agent *a)
{
    if (!a)
        return;
    bn_agent_detach(a);
    bn_close(a->memfd);
    bn_close(a->pidfd);
    free(a);
}

int bn_agent_page(struct bn_agent *a, struct bn_agent_page *page)
{
    return read_page(a->memfd, page);
}

static int wait_for(struct bn_agent *a, short events, uint64_t deadline, struct bn_error *err)
{
    for (;;) {
        uint64_t now = bn_now_ns();
        int left = now >= deadline ? 0 : (int)((deadline - now) / 1000000u) + 1;
        struct pollfd p[2] = {{.fd = a->sock, .events = events}, {.fd = a->pidfd, .events = POLLIN}};
        int n = poll(p, 2, left);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return bn_error_set(err, errno, "agent", "cannot wait for process %d: %m", a->pid);
        if (p[0].revents && left > 0)
            return 0;
        if (p[1].revents)
            return bn_error_set(err, ESRCH, "agent", "process %d ended", a->pid);
        if (left == 0)
            return bn_error_set(err, ETIMEDOUT, "agent",
                                "the agent in process %d does not answer: is the process stopped or frozen?",
                                a->pid);
    }
}

/* The process has this end as well, and can fill or empty the queue: a call that waits might wait for ever. */
static int send_by(struct bn_agent *a, const struct iovec *iov, size_t niov, const int *fds, size_t nfds,
                   uint64_t deadline, struct bn_error *err)
{
    int r;
    while ((r = bn_packet_try_send(a->sock, iov, niov, fds, nfds)) == -EAGAIN) {
        r = wait_for(a, POLLOUT, deadline, err);
        if (r < 0)
            return r;
    }
    if (r < 0)
        return bn_error_set(err, r, "agent", "cannot send to the agent in process %d: %s", a->pid,
                            strerror(-r));
    return 0;
}

/* One packet, checked: sizes, counts, terminated text. -EAGAIN without an error: somebody else took it. */
static int receive(struct bn_agent *a, struct message *m, struct bn_error *err)
{
    size_t len;
    int r = bn_packet_try_recv(a->sock, a->buf, sizeof(a->buf), &len, m->fds, BN_AGENT_BATCH, &m->nfds);
    if (r == -EAGAIN)
        return r;
    if (r == -EPIPE)
        return bn_error_set(err, ESRCH, "agent", "process %d ended", a->pid);
    if (r < 0)
        return bn_error_set(err, r, "agent", "cannot read from the agent in process %d: %s", a->pid,
                            strerror(-r));
    if (len >= sizeof(m->head)) {
        memcpy(&m->head, a->buf, sizeof(m->head));
        m->head.text[sizeof(m->head.text) - 1] = 0;
        m->segs = (const struct bn_agent_segment *)(a->buf + sizeof(m->head));
        if (m->head.magic == BN_AGENT_MAGIC && m->head.count <= BN_AGENT_BATCH && m->head.error >= 0 &&
            len == sizeof(m->head) + m->head.count * sizeof(struct bn_agent_segment))
            return 0;
    }
    bn_close_all(m->fds, m->nfds);
    return bn_error_set(err, EBADMSG, "agent",
                        "the agent in process %d answers nonsense: is it of another version?", a->pid);
}

/* Send a request and wait for its own reply. On success m->fds are the caller's. A refusal by the agent is returned as its
 * negative errno with its own words. */
static int call(struct bn_agent *a, uint16_t type, uint64_t arg, const struct bn_agent_segment *segs,
                size_t count, const int *fds, unsigned timeout_ms, struct message *m, struct bn_error *err)
{
    a->answered = false;
    if (a->sock < 0)
        return bn_error_set(err, ENOTCONN, "agent", "not attached to process %d", a->pid);
    struct bn_agent_msg req = {
        .magic = BN_AGENT_MAGIC, .type = type, .id = ++a->next_id, .count = (uint32_t)count, .arg = arg};
    struct iovec iov[2] = {{&req, sizeof(req)}, {(void *)segs, count * sizeof(*segs)}};
    uint64_t deadline = bn_now_ns() + (uint64_t)timeout_ms * 1000000u;
    int r = send_by(a, iov, count ? 2 : 1, fds, fds ? count : 0, deadline, err);
    if (r < 0)
        return r;

    for (;;) {
        r = wait_for(a, POLLIN, deadline, err);
        if (r < 0)
            return r;
        r = receive(a, m, err);
        if (r == -EAGAIN)
            continue;
        if (r < 0)
            return r;
        if (m->head.reply && m->head.id == req.id && m->head.type == type)
            break;
        bn_close_all(m->fds, m->nfds); /* an answer to a controller that is gone */
    }
    a->answered = true;
    if (m->head.error == 0)
        return 0;
    bn_close_all(m->fds, m->nfds);
    return bn_error_set(err, m->head.error, "agent", "process %d: %s%s", a->pid,
                        m->head.text[0] ? m->head.text : strerror(m->head.error),
                        m->head.cuda_error == 2 ? " (GPU out of memory)" : "");
}

static int simple_call(struct bn_agent *a, uint16_t type, uint64_t arg, unsigned timeout_ms,
                       struct bn_error *err)
{
    struct message m;
    int r = call(a, type, arg, NULL, 0, NULL, timeout_ms, &m, err);
    if (r == 0)
        bn_close_all(m.fds, m.nfds);
    return r;
}

/* An agent that has lost its controller holds the lock itself for a moment, while it opens its gate. */
static int become_controller(int memfd)
{
    uint64_t deadline = bn_now_ns() + LOCK_MS * 1000000u;
    while (flock(memfd, LOCK_EX | LOCK_NB) < 0) {
        if (bn_now_ns() >= deadline)
            return -EBUSY;
        poll(NULL, 0, 5);
    }
    return 0;
}

int bn_agent_attach(struct bn_agent *a, struct bn_error *err)
{
    if (a->sock >= 0)
        return simple_call(a, BN_AGENT_HELLO, 0, GRACE_MS, err);
    if (become_controller(a->memfd) < 0)
        return bn_error_set(err, EBUSY, "agent", "process %d is being worked on by another bennud", a->pid);
    struct bn_agent_page page;
    int r = read_page(a->memfd, &page);
    if (r == 0 && page.version != BN_AGENT_VERSION)
        r = -EPROTONOSUPPORT;
    if (r == 0)
        r = a->sock = bn_pidfd_getfd(a->pidfd, page.far_fd);
    if (r < 0) {
        a->sock = -1;
        flock(a->memfd, LOCK_UN);
        return bn_error_set(err, r, "agent",
                            r == -EPROTONOSUPPORT
                                ? "process %d runs an agent of another protocol version (%s)"
                                : "cannot reach the agent in process %d (%s)",
                            a->pid, r == -EPROTONOSUPPORT ? page.agent_version : strerror(-r));
    }
    /* ids must differ from those of a controller that died with answers under way */
    a->next_id = (uint32_t)bn_now_ns();
    r = simple_call(a, BN_AGENT_HELLO, 0, GRACE_MS, err);
    if (r < 0)
        bn_agent_detach(a);
    return r;
}

void bn_agent_detach(struct bn_agent *a)
{
    if (a->sock < 0)
        return;
    a->sock = bn_close(a->sock);
    flock(a->memfd, LOCK_UN);
}

int bn_agent_close_gate(struct bn_agent *a, unsigned timeout_ms, struct bn_error *err)
{
    return simple_call(a, BN_AGENT_CLOSE, timeout_ms, timeout_ms + GRACE_MS, err);
}
int bn_agent_open_gate(struct bn_agent *a, struct bn_error *err)
{
    return simple_call(a, BN_AGENT_OPEN, 0, ANSWER_MS, err);
}
int bn_agent_evict(struct bn_agent *a, struct bn_error *err)
{
    return simple_call(a, BN_AGENT_EVICT, 0, ANSWER_MS, err);
}

bool bn_agent_answered(const struct bn_agent *a)
{
    return a->answered;
}

int bn_agent_purge(struct bn_agent *a, uint64_t *freed, struct bn_error *err)
{
    struct message m;
    int r = call(a, BN_AGENT_PURGE, 0, NULL, 0, NULL, ANSWER_MS, &m, err);
    if (r == 0) {
        *freed = m.head.arg;
        bn_close_all(m.fds, m.nfds);
    }
    return r;
}

pid_t bn_agent_tid(struct bn_agent *a)
{
    struct bn_agent_page page;
    int r = read_page(a->memfd, &page);
    return r < 0 ? r : bn_proc_thread(a->pid, (pid_t)page.tid);
}

static int check_segments(struct bn_agent *a, const struct message *m, struct bn_error *err)
{
    for (uint32_t i = 0; i < m->head.count; i++) {
        struct bn_agent_segment s;
        memcpy(&s, &m->segs[i], sizeof(s));
        if (s.size == 0 || s.size % GRANULARITY != 0 || s.size > (uint64_t)1 << 44)
            return bn_error_set(err, EBADMSG, "agent", "process %d: segment %llu has an impossible size",
                                a->pid, (unsigned long long)s.id);
    }
    return 0;
}

int bn_agent_list(struct bn_agent *a, struct bn_agent_segment **segs, size_t *n, struct bn_error *err)
{
    bn_auto_free struct bn_agent_segment *list = NULL;
    size_t have = 0, total = 0;
    do {
        struct message m;
        int r = call(a, BN_AGENT_LIST, have, NULL, 0, NULL, ANSWER_MS, &m, err);
        if (r < 0)
            return r;
        bn_close_all(m.fds, m.nfds);
        r = check_segments(a, &m, err);
        if (r < 0)
            return r;
        if (have == 0) {
            if (m.head.arg > SEGMENTS_MAX)
                return bn_error_set(err, E2BIG, "agent", "process %d has too many segments (%llu)", a->pid,
                                    (unsigned long long)m.head.arg);
            total = m.head.arg;
            list = calloc(total ? total : 1, sizeof(*list));
            if (!list)
                return bn_error_set(err, ENOMEM, "agent", "out of memory");
        }
        if (m.head.count > total - have || (m.head.count == 0 && have < total))
            return bn_error_set(err, EBADMSG, "agent", "process %d: the list of segments does not add up",
                                a->pid);
        memcpy(list + have, m.segs, m.head.count * sizeof(*list));
        have += m.head.count;
    } while (have < total);
    *segs = BN_TAKE_PTR(list);
    *n = total;
    return 0;
}

/* A descriptor for each of the first of `segs`, at least one and n at most; closes them where that is not so. */
static int check_exported(struct bn_agent *a, const struct message *m, const struct bn_agent_segment *segs,
                          size_t n, struct bn_error *err)
{
    bool same = m->head.count > 0 && m->head.count == m->nfds && m->head.count <= n;
    for (uint32_t i = 0; same && i < m->head.count; i++)
        same = memcmp(&m->segs[i].id, &segs[i].id, sizeof(uint64_t)) == 0;
    if (same)
        return 0;
    bn_close_all(m->fds, m->nfds);
    return bn_error_set(err, EBADMSG, "agent", "process %d: exported segments do not match the list", a->pid);
}

int bn_agent_export(struct bn_agent *a, const struct bn_agent_segment *segs, size_t n, int *fds,
                    struct bn_error *err)
{
    size_t have = 0;
    while (have < n) {
        struct message m;
        int r = call(a, BN_AGENT_EXPORT, have, NULL, 0, NULL, ANSWER_MS, &m, err);
        if (r == 0)
            r = check_exported(a, &m, segs + have, n - have, err);
        if (r < 0) {
            bn_close_all(fds, have);
            return r;
        }
        memcpy(fds + have, m.fds, m.nfds * sizeof(int));
        have += m.nfds;
    }
    return 0;
}

int bn_agent_import(struct bn_agent *a, const struct bn_agent_segment *segs, const int *fds, size_t n,
                    struct bn_error *err)
{
    for (size_t at = 0; at < n;) {
        size_t batch = n - at < BN_AGENT_BATCH ? n - at : BN_AGENT_BATCH;
        struct message m;
        int r = call(a, BN_AGENT_IMPORT, at, segs + at, batch, fds + at, ANSWER_MS, &m, err);
        if (r < 0)
            return r;
        bn_close_all(m.fds, m.nfds);
        at += batch;
    }
    return 0;
}

int bn_agent_create(struct bn_agent *a, const struct bn_agent_segment *segs, size_t n, int *fds,
                    struct bn_error *err)
{
    struct message m;
    int r = call(a, BN_AGENT_CREATE, 0, segs, n, NULL, ANSWER_MS, &m, err);
    if (r == 0)
        r = check_exported(a, &m, segs, n, err);
    if (r == 0 && m.nfds != n) {
        bn_close_all(m.fds, m.nfds);
        r = bn_error_set(err, EBADMSG, "agent",
                         "process %d: memory is missing of what it was asked to create", a->pid);
    }
    if (r == 0)
        memcpy(fds, m.fds, n * sizeof(int));
    return r;
}

int bn_agent_map(struct bn_agent *a, const struct bn_agent_segment *segs, size_t n, struct bn_error *err)
{
    struct message m;
    int r = call(a, BN_AGENT_MAP, 0, segs, n, NULL, ANSWER_MS, &m, err);
    if (r == 0)
        bn_close_all(m.fds, m.nfds);
    return r;
}
