/* The agent's beginning and end: page, socketpair and thread after the first successful cuInit; nothing at all in a forked
 * child. Whatever fails here, the program goes on as without an agent. */
#include "agent/agent.h"
#include "agent/control.h"
#include "agent/gate.h"
#include "agent/idle.h"
#include "agent/need.h"
#include "agent/track.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>

#ifndef F_ADD_SEALS
#define F_ADD_SEALS 1033
#endif
#define SEAL_SHRINK 0x0002
#define SEAL_GROW 0x0004
#define MEMFD_CLOEXEC 0x0001u
#define MEMFD_SEALING 0x0002u
#define DRAIN_MAX 1024
#define CONTROLLER_LOOK_MS 200 /* between two looks whether the one who closed the gate still lives */
#define FLIGHT_NS 1000000000u  /* nobody waits longer for the end of a fork, or forks later */

static struct bn_agent_page own_page; /* until there is a shared one */
static struct bn_agent_page *shared = &own_page;
static struct bn_kept memfd, near, far;
static uint32_t started; /* 0 no, 1 somebody is at it, 2 tried */
static uint32_t converting;
static uint32_t atfork_done;

struct bn_agent_page *bn_agent_page(void)
{
    return __atomic_load_n(&shared, __ATOMIC_ACQUIRE);
}

bool bn_agent_converting(void)
{
    return bn_load_acq(&converting) != 0; /* what bn_track_devices wrote is there */
}

int bn_agent_placeholder(void)
{
    return bn_kept_valid(&memfd) ? memfd.fd : -1;
}

/* ---- the thread ------------------------------------------------------------------------------------ */

static void stepped_aside(const char *why)
{
    struct bn_agent_page *page = bn_agent_page();
    bn_store(&converting, 0);
    snprintf(page->reason, sizeof(page->reason), "%s", why);
    bn_store_rel(&page->state, (uint32_t)BN_AGENT_INACTIVE);
}

union fd_space {
    char bytes[CMSG_SPACE(BN_AGENT_BATCH * sizeof(int))];
    struct cmsghdr align;
};

static unsigned take_fds(struct msghdr *msg, int fds[BN_AGENT_BATCH])
{
    unsigned n = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
            if (n < BN_AGENT_BATCH)
                fds[n++] = fd;
            else
                close(fd);
        }
    }
    return n;
}

/* One packet: its length, 0 at the end of the conversation, or -errno. */
static ssize_t receive(int fd, int flags, void *buf, size_t cap, int fds[BN_AGENT_BATCH], unsigned *nfds)
{
    union fd_space space;
    struct iovec iov = {buf, cap};
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = space.bytes, .msg_controllen = sizeof(space.bytes)};
    ssize_t len;
    do
        len = recvmsg(fd, &msg, flags | MSG_CMSG_CLOEXEC);
    while (len < 0 && errno == EINTR);
    if (len < 0)
        return -errno;
    *nfds = take_fds(&msg, fds);
    /* A packet that did not fit has a length that cannot be right; truncated descriptors are missing ones. */
    return msg.msg_flags & MSG_TRUNC ? (ssize_t)cap + 1 : len;
}

/* Answers that nobody read fill the far end's queue: their askers are gone. */
static void drain_far(void)
{
    char buf[sizeof(struct bn_agent_msg)];
    int fds[BN_AGENT_BATCH];
    unsigned nfds = 0;
    for (int i = 0; i < DRAIN_MAX && bn_kept_valid(&far); i++) {
        ssize_t len = receive(far.fd, MSG_DONTWAIT, buf, sizeof(buf), fds, &nfds);
        if (len < 0)
            return;
        while (nfds)
            close(fds[--nfds]);
    }
}

static int send_answer(struct bn_answer *a)
{
    union fd_space space;
    memset(&space, 0, sizeof(space));
    struct iovec iov[2] = {{&a->head, sizeof(a->head)}, {a->segs, a->head.count * sizeof(a->segs[0])}};
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = 2};
    if (a->nfds) {
        msg.msg_control = space.bytes;
        msg.msg_controllen = CMSG_SPACE(a->nfds * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(a->nfds * sizeof(int));
        memcpy(CMSG_DATA(c), a->fds, a->nfds * sizeof(int));
    }
    for (int drained = 0;;) {
        if (sendmsg(near.fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0)
            return 0;
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN || drained++)
            return -errno;
        drain_far();
    }
}

static void answer(struct bn_answer *a)
{
    int r = send_answer(a);
    for (unsigned i = 0; i < a->nfds; i++)
        close(a->fds[i]);
    if (r == 0 || a->nfds == 0)
        return;
    a->nfds = 0;
    bn_answer_fail(a, -r, 0, "its GPU memory's descriptors cannot be sent: %s", strerror(-r));
    send_answer(a);
}

/* The controller holds a lock on the memfd through an open of its own, which ends with it: whoever gets the lock knows that there is
 * no controller. */
static void open_if_alone(void)
{
    if (!bn_kept_valid(&memfd) || flock(memfd.fd, LOCK_EX | LOCK_NB) < 0)
        return;
    struct pollfd p = {.fd = near.fd, .events = POLLIN};
    if (poll(&p, 1, 0) == 0) { /* nothing that it asked for is left to be done */
        bn_control_open();
        drain_far(); /* an answer that it did not read may hold descriptors of the memory */
    }
    flock(memfd.fd, LOCK_UN);
}

/* Until there is a request. At rest, and while the memory is away, this wakes up for nothing else. */
static void wait_for_request(void)
{
    for (;;) {
        struct pollfd p = {.fd = near.fd, .events = POLLIN};
        int n = poll(&p, 1, bn_control_open_alone() ? CONTROLLER_LOOK_MS : -1);
        if (n > 0 || (n < 0 && errno != EINTR))
            return;
        if (n == 0)
            open_if_alone();
    }
}

/* ---- descriptors on their way ---------------------------------------------------------------------- */

/* The thread (its id) that has descriptors of GPU memory which are in no table yet, or that forks: a child would keep them. */
static uint32_t flight;

/* In the end it goes on without: whoever has it may be stopped, or wait for something that this thread holds. */
static void flight_begin(void)
{
    uint32_t me = (uint32_t)syscall(SYS_gettid), none = 0;
    uint64_t end = bn_clock_ns() + FLIGHT_NS;
    while (!__atomic_compare_exchange_n(&flight, &none, me, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
        if (bn_clock_ns() >= end)
            return;
        struct timespec ts = {0, 200000};
        nanosleep(&ts, NULL);
        none = 0;
    }
}

static void flight_end(void)
{
    uint32_t me = (uint32_t)syscall(SYS_gettid);
    __atomic_compare_exchange_n(&flight, &me, 0, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

/* The next request, and its answer; false when there can be no more. */
static bool serve_one(void)
{
    static char packet[BN_AGENT_MSG_MAX];
    static struct bn_answer a;
    int fds[BN_AGENT_BATCH];
    unsigned nfds = 0;
    wait_for_request();
    uint32_t state = bn_load(&bn_agent_page()->state);
    if (state != BN_AGENT_ACTIVE)
        flight_begin();
    /* Descriptors may arrive in any packet; where the limit leaves no room, they would silently be missing. At no other
     * time is it lifted: a checkpoint would keep it so. */
    if (state == BN_AGENT_EVICTED)
        bn_fd_limit_lift();
    ssize_t len = receive(near.fd, MSG_DONTWAIT, packet, sizeof(packet), fds, &nfds);
    if (state == BN_AGENT_EVICTED)
        bn_fd_limit_restore();
    if (len > 0 && bn_control_handle(packet, (size_t)len, fds, nfds, &a))
        answer(&a);
    flight_end();
    return len > 0 || len == -EAGAIN;
}

static void *agent_main(void *unused)
{
    CUstreamCaptureMode relaxed = CU_STREAM_CAPTURE_MODE_RELAXED;
    bn_store(&bn_agent_page()->tid, (uint32_t)syscall(SYS_gettid));
    if (bn_real.cuThreadExchangeStreamCaptureMode)
        bn_real.cuThreadExchangeStreamCaptureMode(&relaxed);
    while (bn_kept_valid(&near) && serve_one())
        ;
    while (bn_control_open_alone()) { /* nobody can ask for it any more */
        bn_control_open();
        if (bn_control_open_alone())
            poll(NULL, 0, CONTROLLER_LOOK_MS);
    }
    stepped_aside("the program closed the agent's descriptors");
    return NULL;
}

/* ---- start ----------------------------------------------------------------------------------------- */

static void random_bytes(uint8_t out[16])
{
    if (syscall(SYS_getrandom, out, 16, 0) == 16)
        return;
    int fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd >= 0 ? read(fd, out, 16) : -1;
    if (fd >= 0)
        close(fd);
    if (got == 16)
        return;
    uint64_t now = bn_clock_ns() * 0x9e3779b97f4a7c15ULL;
    uint64_t who = ((uint64_t)getpid() << 32) ^ (uint64_t)(uintptr_t)&now;
    memcpy(out, &now, 8);
    memcpy(out + 8, &who, 8);
}

static int make_page(void)
{
    int fd = (int)syscall(SYS_memfd_create, BN_AGENT_MEMFD, MEMFD_CLOEXEC | MEMFD_SEALING);
    if (fd < 0)
        return -errno;
    int r = ftruncate(fd, BN_AGENT_PAGE_SIZE) < 0 ? -errno : 0;
    /* Nobody shrinks it under our mapping. */
    if (r == 0)
        fcntl(fd, F_ADD_SEALS, SEAL_SHRINK | SEAL_GROW);
    void *mem =
        r < 0 ? MAP_FAILED : mmap(NULL, BN_AGENT_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (r == 0 && mem == MAP_FAILED)
        r = -errno;
    if (r == 0)
        r = bn_kept_take(&memfd, fd);
    if (r < 0) {
        if (mem != MAP_FAILED)
            munmap(mem, BN_AGENT_PAGE_SIZE);
        close(fd);
        return r;
    }
    struct bn_agent_page *page = mem;
    memcpy(page, &own_page, sizeof(*page)); /* what was counted so far */
    page->version = BN_AGENT_VERSION;
    page->knows = BN_AGENT_KNOWS_NEED | BN_AGENT_KNOWS_SHARING;
    page->pid = (uint32_t)getpid();
    page->far_fd = -1;
    random_bytes(page->instance);
    snprintf(page->agent_version, sizeof(page->agent_version), "%s", BENNU_AGENT_VERSION);
    snprintf(page->driver_path, sizeof(page->driver_path), "%s", bn_real_path());
    bn_store_rel(&page->magic, BN_AGENT_MAGIC);
    __atomic_store_n(&shared, page, __ATOMIC_RELEASE);
    return 0;
}

static int make_pair(void)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return -errno;
    int r = bn_kept_take(&near, pair[0]);
    if (r < 0) {
        close(pair[0]);
        close(pair[1]);
        return r;
    }
    r = bn_kept_take(&far, pair[1]);
    if (r < 0) {
        close(pair[1]);
        bn_kept_close(&near);
        return r;
    }
    bn_store(&bn_agent_page()->far_fd, far.fd);
    return 0;
}

static void after_fork_in_child(void)
{
    if (shared != &own_page)
        munmap(shared, BN_AGENT_PAGE_SIZE);
    memset(&own_page, 0, sizeof(own_page));
    shared = &own_page;
    bn_kept_close(&near);
    bn_kept_close(&far);
    bn_kept_close(&memfd);
    bn_fd_limit_restore();
    bn_track_drop();
    bn_procaddr_after_fork();
    bn_evict_after_fork();
    bn_idle_after_fork();
    bn_need_after_fork();
    bn_gate_after_fork();
    flight = 0;
    converting = 0;
    started = 0;
}

void bn_agent_start(void)
{
    uint32_t none = 0;
    if (!__atomic_compare_exchange_n(&started, &none, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        return;
    int saved = errno;
    bn_gate_init();
    if (!__atomic_exchange_n(&atfork_done, 1, __ATOMIC_ACQ_REL))
        pthread_atfork(flight_begin, flight_end, after_fork_in_child);
    const char *what = "make its page";
    int r = make_page();
    if (r == 0) {
        bn_track_devices();
        what = "make its socket";
        r = make_pair();
    }
    if (r == 0) {
        what = "start its thread";
        bn_store(&bn_agent_page()->state, (uint32_t)BN_AGENT_ACTIVE);
        bn_store_rel(&converting, 1);
        r = bn_thread_start("bennu-agent", agent_main, NULL);
    }
    if (r < 0) {
        char why[128];
        snprintf(why, sizeof(why), "the agent could not %s: %s", what, strerror(-r));
        bn_kept_close(&near);
        bn_kept_close(&far);
        bn_store(&bn_agent_page()->far_fd, -1);
        stepped_aside(why);
    }
    bn_store_rel(&started, 2);
    errno = saved;
}

CUresult bn_wrap_cuInit(unsigned int Flags)
{
    BN_GATED();
    CUresult r = bn_real.cuInit(Flags);
    if (r == CUDA_SUCCESS && bn_unlikely(bn_load(&started) == 0))
        bn_agent_start();
    return r;
}
