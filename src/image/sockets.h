/* Which TCP addresses the processes of a checkpoint have, by CRIU's account of their open files (files.img). Source: CRIU's
 * images/fdinfo.proto and images/sk-inet.proto, 4.0 to 4.2. Pure bytes, any thread.
 */
#pragma once

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bn_tcp_name {
    uint8_t addr[16]; /* IPv4 as ::ffff:a.b.c.d; zeros: every address of the machine */
    uint16_t port;    /* not 0 */
};

struct bn_tcp_names {
    struct bn_tcp_name *v;
    size_t n;
};

/* Of all TCP sockets, whatever their state. `data`: the whole file. On success *out is the caller's: bn_tcp_names_free. -EBADMSG: damaged, or
 * of a CRIU that writes it otherwise; -ENOMEM. *err is filled. */
int bn_tcp_names_decode(const void *data, size_t len, struct bn_tcp_names *out, struct bn_error *err);
void bn_tcp_names_free(struct bn_tcp_names *names);
/* An IPv4 address, four bytes, as a name has it. */
void bn_tcp_addr_of_v4(uint8_t addr[16], const void *v4);
/* Is this local address, with this port, one of them? */
bool bn_tcp_names_have(const struct bn_tcp_names *names, const uint8_t addr[16], uint16_t port);
