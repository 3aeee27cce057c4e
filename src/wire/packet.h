/* One packet on a SOCK_SEQPACKET socket, with descriptors. Blocking; EINTR is retried; no SIGPIPE. 0 or negative errno. */
#pragma once

#include <stddef.h>
#include <sys/uio.h>

#define BN_PACKET_FDS_MAX 64u

/* bn_packet_try_*: never wait, -EAGAIN instead: for a socket whose other holders are not to be trusted. */
int bn_packet_send(int sock, const struct iovec *iov, size_t niov, const int *fds, size_t nfds);
int bn_packet_try_send(int sock, const struct iovec *iov, size_t niov, const int *fds, size_t nfds);

/* Receive one packet of at most `cap` bytes. -EPIPE: the peer closed. -EMSGSIZE: it was longer (the rest is lost).
 * At most `max` descriptors are handed over (O_CLOEXEC), surplus ones are closed; fds/nfds may be NULL when max is 0. On a stream socket: up
 * to `cap` bytes of what has come, and the rest later. */
int bn_packet_recv(int sock, void *buf, size_t cap, size_t *len, int *fds, size_t max, size_t *nfds);
int bn_packet_try_recv(int sock, void *buf, size_t cap, size_t *len, int *fds, size_t max, size_t *nfds);

void bn_close_all(const int *fds, size_t n);
