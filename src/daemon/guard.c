/* The worker's side of the keeper. */
#include "daemon/keeper.h"

#include "base/cleanup.h"

#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#ifndef ANSWER_MS /* a test has less patience */
#define ANSWER_MS 30000
#endif

struct guard {
    struct bn_guard ops;
    int sock;
    pthread_mutex_t lock; /* a record and its answer belong together */
    uint64_t last_key;
    uint32_t last_seq;
    bool lost;
};

static struct guard *of(struct bn_guard *g)
{
    return (struct guard *)((char *)g - offsetof(struct guard, ops));
}

static void lost(struct guard *g, int r)
{
    if (!g->lost)
        fprintf(stderr,
                "bennud: the keeper is gone (%s): what is suspended or dumped would be lost if this "
                "process were killed too; restart bennud when it is convenient\n",
                strerror(-r));
    g->lost = true;
}

static int wait_answer(struct guard *g, uint32_t seq)
{
    struct keeper_inbox in = {0};
    struct keeper_head head;
    bool whole;
    for (;;) {
        struct pollfd p = {.fd = g->sock, .events = POLLIN};
        int n = poll(&p, 1, ANSWER_MS);
        if (n < 0 && errno == EINTR)
            continue;
        int r = n > 0 ? keeper_recv(g->sock, &in, &head, &whole) : -ETIMEDOUT;
        if (r < 0)
            return r;
        if (head.type == KEEPER_DONE && head.seq == seq)
            return 0 - head.error;
    }
}

/* Without a keeper the work goes on; that it cannot take a record is an error. So is its silence: while it lives its records are what a
 * next worker believes, so nothing may be done that they do not say. */
static int put(struct bn_guard *ops, uint64_t key, uint32_t kind, const struct bn_writer *body,
               const int *fds, size_t nfds, struct bn_error *err)
{
    struct guard *g = of(ops);
    struct bn_record r = {
        .key = key, .kind = kind, .bytes = body->buf, .nbytes = body->len, .fds = (int *)fds, .nfds = nfds};
    int rc = 0;
    pthread_mutex_lock(&g->lock);
    if (!g->lost) {
        rc = keeper_send_record(g->sock, &r, ++g->last_seq);
        if (rc == 0)
            rc = wait_answer(g, g->last_seq);
        if (rc == -EPIPE || rc == -ECONNRESET) {
            lost(g, rc);
            rc = 0;
        }
    }
    pthread_mutex_unlock(&g->lock);
    if (rc == -ETIMEDOUT)
        return bn_error_set(err, rc, "guard",
                            "bennud's keeper, its other process, does not answer: is it stopped?");
    return rc < 0 ? bn_error_set(err, rc, "guard",
                                 "bennud's keeper cannot hold the %zu descriptors of the process: %s", nfds,
                                 strerror(-rc))
                  : 0;
}

static void drop(struct bn_guard *ops, uint64_t key)
{
    struct guard *g = of(ops);
    pthread_mutex_lock(&g->lock);
    int r = g->lost ? 0 : keeper_send(g->sock, KEEPER_DROP, key, 0, 0);
    if (r < 0)
        lost(g, r);
    pthread_mutex_unlock(&g->lock);
}

static uint64_t new_key(struct bn_guard *ops)
{
    return __atomic_add_fetch(&of(ops)->last_key, 1, __ATOMIC_RELAXED);
}

static int read_records(struct guard *g, struct bn_record **records, size_t *n)
{
    struct keeper_inbox in = {0};
    struct bn_record *v = NULL;
    struct keeper_head head;
    bool whole;
    size_t have = 0;
    int r;
    while ((r = keeper_recv(g->sock, &in, &head, &whole)) == 0 && head.type != KEEPER_LAST) {
        if (!whole)
            continue;
        struct bn_record *more = reallocarray(v, have + 1, sizeof(*v));
        struct bn_record_head record;
        if (!more) {
            r = -ENOMEM;
            break;
        }
        v = more;
        v[have++] = in.record;
        in = (struct keeper_inbox){0};
        if (v[have - 1].key > g->last_key)
            g->last_key = v[have - 1].key;
        if (bn_record_head(&v[have - 1], &record) == 0 && record.session > g->last_key)
            g->last_key = record.session;
    }
    keeper_inbox_clear(&in);
    if (r == 0) {
        *records = v;
        *n = have;
        return 0;
    }
    for (size_t i = 0; i < have; i++)
        bn_record_clear(&v[i]);
    free(v);
    return r;
}

int bn_guard_open(int sock, struct bn_guard **out, struct bn_record **records, size_t *n,
                  struct bn_error *err)
{
    struct guard *g = calloc(1, sizeof(*g));
    if (!g)
        return bn_error_set(err, ENOMEM, "keeper", "out of memory");
    *g = (struct guard){.ops = {put, drop, new_key}, .sock = sock};
    pthread_mutex_init(&g->lock, NULL);
    int r = read_records(g, records, n);
    if (r < 0) {
        free(g);
        return bn_error_set(err, r, "keeper", "cannot read the records of an earlier bennud: %s",
                            strerror(-r));
    }
    *out = &g->ops;
    return 0;
}

void bn_guard_free(struct bn_guard *ops)
{
    if (!ops)
        return;
    bn_close(of(ops)->sock);
    pthread_mutex_destroy(&of(ops)->lock);
    free(of(ops));
}

void bn_guard_up(struct bn_guard *g)
{
    keeper_send(of(g)->sock, KEEPER_UP, 0, 0, 0);
}

int bn_guard_fd(const struct bn_guard *g)
{
    return of((struct bn_guard *)g)->sock;
}

void bn_guard_lost(struct bn_guard *g)
{
    pthread_mutex_lock(&of(g)->lock);
    lost(of(g), -EPIPE);
    pthread_mutex_unlock(&of(g)->lock);
}
