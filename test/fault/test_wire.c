/* Records between worker and keeper: large ones, ones that break off, and one that has more descriptors than the receiver may have. */
#include "base/cleanup.h"
#include "daemon/keeper.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>

struct sender {
    int sock;
    const struct bn_record *record;
    int result;
};

static void *send_it(void *arg)
{
    struct sender *s = arg;
    s->result = keeper_send_record(s->sock, s->record, 0);
    if (s->result == 0)
        s->result = keeper_send(s->sock, KEEPER_LAST, 0, 0, 0);
    return NULL;
}

static struct bn_record make(uint64_t key, size_t nbytes, size_t nfds)
{
    struct bn_record r = {.key = key, .kind = BN_RECORD_TARGET, .nbytes = nbytes, .nfds = nfds};
    uint8_t *bytes = malloc(nbytes + 1);
    r.fds = calloc(nfds + 1, sizeof(int));
    assert_non_null(bytes);
    assert_non_null(r.fds);
    for (size_t i = 0; i < nbytes; i++)
        bytes[i] = (uint8_t)(i * 31 + key);
    for (size_t i = 0; i < nfds; i++) {
        int pipes[2];
        assert_int_equal(pipe2(pipes, O_CLOEXEC), 0);
        r.fds[i] = pipes[0];
        bn_close(pipes[1]);
    }
    r.bytes = bytes;
    return r;
}

static void same_record(const struct bn_record *a, const struct bn_record *b)
{
    assert_int_equal(a->key, b->key);
    assert_int_equal(a->kind, b->kind);
    assert_int_equal(a->nbytes, b->nbytes);
    assert_memory_equal(a->bytes, b->bytes, a->nbytes);
    assert_int_equal(a->nfds, b->nfds);
    for (size_t i = 0; i < a->nfds; i++) {
        struct stat x, y;
        assert_int_equal(fstat(a->fds[i], &x), 0);
        assert_int_equal(fstat(b->fds[i], &y), 0);
        assert_int_equal(x.st_ino, y.st_ino);
    }
}

static void through(size_t nbytes, size_t nfds)
{
    int pair[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    struct bn_record out = make(7, nbytes, nfds);
    struct sender s = {pair[0], &out, 1};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, send_it, &s), 0);
    struct keeper_inbox in = {0};
    struct keeper_head head;
    bool whole = false;
    while (!whole) {
        assert_int_equal(keeper_recv(pair[1], &in, &head, &whole), 0);
        assert_int_equal(head.type, KEEPER_PUT);
    }
    same_record(&in.record, &out);
    assert_int_equal(keeper_recv(pair[1], &(struct keeper_inbox){0}, &head, &whole), 0);
    assert_int_equal(head.type, KEEPER_LAST);
    pthread_join(thread, NULL);
    assert_int_equal(s.result, 0);
    bn_record_clear(&in.record);
    bn_record_clear(&out);
    bn_close(pair[0]);
    assert_int_equal(keeper_recv(pair[1], &(struct keeper_inbox){0}, &head, &whole), -EPIPE);
    bn_close(pair[1]);
}

static void test_sizes(void **state)
{
    (void)state;
    through(0, 0);
    through(1, 1);
    through(KEEPER_BYTES, 64);
    through(KEEPER_BYTES + 1, 65);
    through(10, 300);
    through(1 << 20, 3);
}

/* The sender dies in the middle; what it said before counts, the half record does not. */
static void test_broken_off(void **state)
{
    (void)state;
    int pair[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    struct bn_record small = make(1, 100, 2);
    assert_int_equal(keeper_send_record(pair[0], &small, 0), 0);
    struct keeper_head head = {
        .magic = KEEPER_MAGIC, .type = KEEPER_PUT, .key = 2, .nbytes = 100, .nfds = 0, .first = 1};
    uint8_t packet[sizeof(head) + 50] = {0};
    memcpy(packet, &head, sizeof(head));
    assert_int_equal(send(pair[0], packet, sizeof(packet), 0), sizeof(packet));
    assert_int_equal(keeper_send(pair[1], KEEPER_DONE, 1, 0, 0),
                     0); /* never read: the kernel tells us with ECONNRESET */
    bn_close(pair[0]);

    struct keeper_inbox in = {0};
    bool whole;
    assert_int_equal(keeper_recv(pair[1], &in, &head, &whole), 0);
    assert_true(whole);
    same_record(&in.record, &small);
    bn_record_clear(&in.record);
    in = (struct keeper_inbox){0};
    assert_int_equal(keeper_recv(pair[1], &in, &head, &whole), 0);
    assert_false(whole);
    assert_int_equal(keeper_recv(pair[1], &in, &head, &whole), -EPIPE);
    keeper_inbox_clear(&in);
    bn_record_clear(&small);
    bn_close(pair[1]);
}

static void test_nonsense(void **state)
{
    (void)state;
    int pair[2];
    struct keeper_inbox in = {0};
    struct keeper_head got;
    bool whole;
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    const struct keeper_head bad[] = {
        {.magic = 1, .type = KEEPER_PUT, .first = 1},
        {.magic = KEEPER_MAGIC, .type = KEEPER_PUT, .first = 1, .nbytes = UINT64_MAX},
        {.magic = KEEPER_MAGIC, .type = KEEPER_PUT, .first = 1, .nfds = UINT32_MAX},
    };
    for (size_t i = 0; i < BN_ARRAY_SIZE(bad); i++) {
        assert_int_equal(send(pair[0], &bad[i], sizeof(bad[i]), 0), sizeof(bad[i]));
        assert_int_equal(keeper_recv(pair[1], &in, &got, &whole), -EBADMSG);
    }
    /* More than it said. */
    uint8_t packet[sizeof(got) + 20] = {0};
    got = (struct keeper_head){.magic = KEEPER_MAGIC, .type = KEEPER_PUT, .first = 1, .nbytes = 10};
    memcpy(packet, &got, sizeof(got));
    assert_int_equal(send(pair[0], packet, sizeof(packet), 0), sizeof(packet));
    assert_int_equal(keeper_recv(pair[1], &in, &got, &whole), -EBADMSG);
    /* A rest without a beginning is passed over. */
    got = (struct keeper_head){.magic = KEEPER_MAGIC, .type = KEEPER_PUT, .nbytes = 20};
    memcpy(packet, &got, sizeof(got));
    assert_int_equal(send(pair[0], packet, sizeof(packet), 0), sizeof(packet));
    assert_int_equal(keeper_recv(pair[1], &in, &got, &whole), 0);
    assert_false(whole);
    assert_int_equal(send(pair[0], "x", 1, 0), 1);
    assert_int_equal(keeper_recv(pair[1], &in, &got, &whole), -EBADMSG);
    bn_close(pair[0]);
    bn_close(pair[1]);
}

static void test_too_many_descriptors(void **state)
{
    (void)state;
    int pair[2];
    struct rlimit before;
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    struct bn_record out = make(9, 10, 60);
    assert_int_equal(keeper_send_record(pair[0], &out, 0), 0);
    getrlimit(RLIMIT_NOFILE, &before);
    int next = fcntl(0, F_DUPFD_CLOEXEC, 3);
    struct rlimit low = {(rlim_t)next + 10, before.rlim_max};
    bn_close(next);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &low), 0);
    struct keeper_inbox in = {0};
    struct keeper_head head = {0};
    bool whole;
    int r = keeper_recv(pair[1], &in, &head, &whole);
    setrlimit(RLIMIT_NOFILE, &before);
    assert_int_equal(r, -EMFILE);
    assert_int_equal(head.key, 9);
    int again = fcntl(0, F_DUPFD_CLOEXEC, 3);
    assert_int_equal(again, next); /* nothing leaked */
    bn_close(again);
    bn_record_clear(&out);
    bn_close(pair[0]);
    bn_close(pair[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_sizes), cmocka_unit_test(test_broken_off),
                                       cmocka_unit_test(test_nonsense),
                                       cmocka_unit_test(test_too_many_descriptors)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
