#include "image/sockets.h"

#include "image/protobuf.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

/* CRIU's magic.h */
#define FILES_MAGIC 0x56303138u

enum { FILE_INET_SOCKET = 4 };
enum { SK_FAMILY = 3, SK_TYPE = 4, SK_PROTO = 5, SK_SRC_PORT = 7, SK_SRC_ADDR = 11 };

struct socket {
    uint64_t family, type, proto, port;
    uint32_t addr[4]; /* as in memory */
    unsigned words;
};

static bool add_word(struct socket *sk, uint64_t word)
{
    if (sk->words == 4)
        return false;
    sk->addr[sk->words++] = (uint32_t)word;
    return true;
}

static bool read_socket(struct bn_reader *r, struct socket *sk)
{
    struct bn_pb_field f;
    while (bn_reader_left(r) > 0) {
        if (!bn_pb_next(r, &f))
            return false;
        switch (f.number) {
        case SK_FAMILY: sk->family = f.value; break;
        case SK_TYPE: sk->type = f.value; break;
        case SK_PROTO: sk->proto = f.value; break;
        case SK_SRC_PORT: sk->port = f.value; break;
        case SK_SRC_ADDR: /* one by one, or packed */
            if (!f.has_body && !add_word(sk, f.value))
                return false;
            while (bn_reader_left(&f.body) > 0)
                if (!add_word(sk, bn_read_varint(&f.body)) || f.body.failed)
                    return false;
            break;
        default: break;
        }
    }
    return !r->failed;
}

void bn_tcp_addr_of_v4(uint8_t addr[16], const void *v4)
{
    memset(addr, 0, 10);
    memset(addr + 10, 0xff, 2);
    memcpy(addr + 12, v4, 4);
}

/* False: it is none of TCP's, or has no port. */
static bool name_of(const struct socket *sk, struct bn_tcp_name *name)
{
    *name = (struct bn_tcp_name){.port = (uint16_t)sk->port};
    if (sk->type != SOCK_STREAM || sk->proto != IPPROTO_TCP || sk->port == 0 || sk->port > UINT16_MAX)
        return false;
    if (sk->family == AF_INET && sk->words == 1) {
        if (sk->addr[0] != INADDR_ANY)
            bn_tcp_addr_of_v4(name->addr, sk->addr);
        return true;
    }
    if (sk->family != AF_INET6 || sk->words != 4)
        return false;
    memcpy(name->addr, sk->addr, 16);
    return true;
}

static int add_name(struct bn_tcp_names *names, const struct bn_tcp_name *name)
{
    if ((names->n & (names->n - 1)) == 0) { /* full: as many as a power of two */
        struct bn_tcp_name *grown = reallocarray(names->v, names->n ? 2 * names->n : 1, sizeof(*grown));
        if (!grown)
            return -ENOMEM;
        names->v = grown;
    }
    names->v[names->n++] = *name;
    return 0;
}

static int read_file(struct bn_reader *r, struct bn_tcp_names *names)
{
    uint32_t len = bn_read_u32(r);
    const void *bytes = bn_read_bytes(r, len);
    if (!bytes)
        return -EBADMSG;
    struct bn_reader body = bn_reader_init(bytes, len);
    struct bn_pb_field f;
    while (bn_reader_left(&body) > 0) {
        struct socket sk = {0};
        struct bn_tcp_name name;
        if (!bn_pb_next(&body, &f))
            return -EBADMSG;
        if (f.number != FILE_INET_SOCKET || !f.has_body)
            continue;
        if (!read_socket(&f.body, &sk))
            return -EBADMSG;
        int rc = name_of(&sk, &name) ? add_name(names, &name) : 0;
        if (rc < 0)
            return rc;
    }
    return 0;
}

int bn_tcp_names_decode(const void *data, size_t len, struct bn_tcp_names *out, struct bn_error *err)
{
    struct bn_reader r = bn_reader_init(data, len);
    struct bn_tcp_names names = {0};
    int rc = bn_read_u32(&r) == BN_CRIU_IMAGE_MAGIC && bn_read_u32(&r) == FILES_MAGIC ? 0 : -EBADMSG;
    while (rc == 0 && bn_reader_left(&r) > 0)
        rc = read_file(&r, &names);
    if (rc < 0) {
        bn_tcp_names_free(&names);
        return bn_error_set(err, rc, "image", "%s",
                            rc == -ENOMEM ? "out of memory" : "CRIU's list of open files cannot be read");
    }
    *out = names;
    return 0;
}

void bn_tcp_names_free(struct bn_tcp_names *names)
{
    free(names->v);
    *names = (struct bn_tcp_names){0};
}

bool bn_tcp_names_have(const struct bn_tcp_names *names, const uint8_t addr[16], uint16_t port)
{
    static const uint8_t any[16];
    for (size_t i = 0; i < names->n; i++) {
        const struct bn_tcp_name *name = &names->v[i];
        if (name->port == port && (memcmp(name->addr, any, 16) == 0 || memcmp(name->addr, addr, 16) == 0))
            return true;
    }
    return false;
}
