#include "wire/packet.h"

#include "base/cleanup.h"

#include <string.h>
#include <sys/socket.h>

union control {
    struct cmsghdr align;
    char buf[CMSG_SPACE(BN_PACKET_FDS_MAX * sizeof(int))];
};

static int packet_send(int sock, const struct iovec *iov, size_t niov, const int *fds, size_t nfds, int flags)
{
    if (nfds > BN_PACKET_FDS_MAX)
        return -E2BIG;
    union control control = {0};
    struct msghdr msg = {.msg_iov = (struct iovec *)iov, .msg_iovlen = niov};
    if (nfds > 0) {
        msg.msg_control = control.buf;
        msg.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(nfds * sizeof(int));
        memcpy(CMSG_DATA(c), fds, nfds * sizeof(int));
    }
    ssize_t n;
    do
        n = sendmsg(sock, &msg, flags | MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : 0;
}

int bn_packet_send(int sock, const struct iovec *iov, size_t niov, const int *fds, size_t nfds)
{
    return packet_send(sock, iov, niov, fds, nfds, 0);
}

int bn_packet_try_send(int sock, const struct iovec *iov, size_t niov, const int *fds, size_t nfds)
{
    return packet_send(sock, iov, niov, fds, nfds, MSG_DONTWAIT);
}

void bn_close_all(const int *fds, size_t n)
{
    for (size_t i = 0; i < n; i++)
        bn_close(fds[i]);
}

static void take_fds(struct msghdr *msg, int *fds, size_t max, size_t *nfds)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
            if (*nfds < max)
                fds[(*nfds)++] = fd;
            else
                bn_close(fd);
        }
    }
}

static int packet_recv(int sock, void *buf, size_t cap, size_t *len, int *fds, size_t max, size_t *nfds,
                       int flags)
{
    union control control;
    struct iovec iov = {buf, cap};
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf, .msg_controllen = sizeof(control)};
    ssize_t n;
    do
        n = recvmsg(sock, &msg, flags | MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return -errno;

    size_t got = 0;
    take_fds(&msg, fds, max, &got);
    int r = 0;
    if (n == 0)
        r = -EPIPE;
    else if (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
        r = -EMSGSIZE;
    if (r < 0) {
        bn_close_all(fds, got);
        got = 0;
    }
    if (nfds)
        *nfds = got;
    *len = n > 0 ? (size_t)n : 0;
    return r;
}

int bn_packet_recv(int sock, void *buf, size_t cap, size_t *len, int *fds, size_t max, size_t *nfds)
{
    return packet_recv(sock, buf, cap, len, fds, max, nfds, 0);
}

int bn_packet_try_recv(int sock, void *buf, size_t cap, size_t *len, int *fds, size_t max, size_t *nfds)
{
    return packet_recv(sock, buf, cap, len, fds, max, nfds, MSG_DONTWAIT);
}
