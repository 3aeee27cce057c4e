/* CRIU's list of open files: which TCP addresses are found in it, and that damage is. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/cursor.h"
#include "image/sockets.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

static void put_varint(struct bn_writer *w, uint64_t v)
{
    for (; v > 127; v >>= 7)
        bn_write_u8(w, (uint8_t)(v | 128));
    bn_write_u8(w, (uint8_t)v);
}

static void put_number(struct bn_writer *w, unsigned field, uint64_t v)
{
    put_varint(w, field << 3);
    put_varint(w, v);
}

static void put_bytes(struct bn_writer *w, unsigned field, const struct bn_writer *body)
{
    put_varint(w, field << 3 | 2);
    put_varint(w, body->len);
    bn_write_bytes(w, body->buf, body->len);
}

static void put_head(struct bn_writer *w)
{
    bn_write_u32(w, 0x54564319);
    bn_write_u32(w, 0x56303138);
}

struct sock {
    unsigned family, type, proto, port, words;
    uint32_t addr[4];
    bool packed;
};

/* A file entry as CRIU writes it: with other fields before and behind, one of each kind. */
static void put_socket(struct bn_writer *w, const struct sock *s)
{
    bn_auto_writer sk = {0}, packed = {0}, file = {0};
    put_number(&sk, 1, 27);
    put_varint(&sk, 30 << 3 | 1);
    bn_write_u64(&sk, 1);
    put_varint(&sk, 31 << 3 | 5);
    bn_write_u32(&sk, 1);
    put_number(&sk, 3, s->family);
    put_number(&sk, 4, s->type);
    put_number(&sk, 5, s->proto);
    put_number(&sk, 7, s->port);
    put_number(&sk, 8, 4711);
    for (unsigned i = 0; i < s->words; i++)
        s->packed ? put_varint(&packed, s->addr[i]) : put_number(&sk, 11, s->addr[i]);
    if (s->packed)
        put_bytes(&sk, 11, &packed);
    put_number(&file, 1, 4);
    put_number(&file, 2, 27);
    put_bytes(&file, 4, &sk);
    bn_write_u32(w, (uint32_t)file.len);
    bn_write_bytes(w, file.buf, file.len);
}

static const struct sock loopback = {AF_INET, SOCK_STREAM, IPPROTO_TCP, 8080, 1, {0}, false};

static void decode(const struct bn_writer *w, struct bn_tcp_names *names)
{
    struct bn_error err = BN_ERROR_INIT;
    assert_int_equal(bn_tcp_names_decode(w->buf, w->len, names, &err), 0);
}

static void names(void **state)
{
    static const uint8_t v4[16] = {[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 1},
                         other[16] = {[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 2}, v6[16] = {[15] = 1};
    bn_auto_writer w = {0};
    struct bn_tcp_names found;
    struct sock s = loopback;
    put_head(&w);
    s.addr[0] = htonl(INADDR_LOOPBACK);
    put_socket(&w, &s);
    s.port = 8081;
    s.packed = true;
    put_socket(&w, &s);
    s = loopback; /* any address */
    s.port = 8082;
    put_socket(&w, &s);
    s = (struct sock){AF_INET6, SOCK_STREAM, IPPROTO_TCP, 8083, 4, {0, 0, 0, htonl(1)}, true};
    put_socket(&w, &s);
    s.port = 8084;
    memset(s.addr, 0, sizeof(s.addr));
    put_socket(&w, &s);
    decode(&w, &found);
    assert_int_equal(found.n, 5);
    assert_true(bn_tcp_names_have(&found, v4, 8080));
    assert_false(bn_tcp_names_have(&found, other, 8080));
    assert_false(bn_tcp_names_have(&found, v4, 8079));
    assert_true(bn_tcp_names_have(&found, v4, 8081));
    assert_true(bn_tcp_names_have(&found, other, 8082));
    assert_true(bn_tcp_names_have(&found, v6, 8083));
    assert_false(bn_tcp_names_have(&found, v4, 8083));
    assert_true(bn_tcp_names_have(&found, v4, 8084));
    bn_tcp_names_free(&found);
}

static void no_names(void **state)
{
    bn_auto_writer w = {0};
    struct bn_tcp_names found;
    put_head(&w);
    decode(&w, &found);
    assert_int_equal(found.n, 0);
    struct sock others[] = {loopback, loopback, loopback, loopback, loopback, loopback};
    others[0].type = SOCK_DGRAM;
    others[1].proto = IPPROTO_UDP;
    others[2].port = 0;
    others[3].port = 65536;
    others[4].family = AF_UNIX;
    others[5].words = 2;
    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++)
        put_socket(&w, &others[i]);
    decode(&w, &found);
    assert_int_equal(found.n, 0);
    bn_tcp_names_free(&found);
}

static void damaged(void **state)
{
    bn_auto_writer w = {0};
    put_head(&w);
    size_t first = w.len;
    put_socket(&w, &loopback);
    for (size_t len = 0; len < w.len; len++) {
        struct bn_tcp_names found = {0};
        struct bn_error err = BN_ERROR_INIT;
        uint8_t *cut = malloc(len + 1); /* its end is the end */
        memcpy(cut, w.buf, len);
        assert_int_equal(bn_tcp_names_decode(cut, len, &found, &err), len == first ? 0 : -EBADMSG);
        assert_int_equal(found.n, 0);
        free(cut);
    }
    bn_auto_writer five = {0}, sk = {0}, file = {0};
    for (unsigned i = 0; i < 5; i++)
        put_number(&sk, 11, 1);
    put_bytes(&file, 4, &sk);
    put_head(&five);
    bn_write_u32(&five, (uint32_t)file.len);
    bn_write_bytes(&five, file.buf, file.len);
    struct bn_tcp_names found = {0};
    struct bn_error err = BN_ERROR_INIT;
    assert_int_equal(bn_tcp_names_decode(five.buf, five.len, &found, &err), -EBADMSG);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names),
        cmocka_unit_test(no_names),
        cmocka_unit_test(damaged),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
