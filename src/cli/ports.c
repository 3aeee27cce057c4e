#include "cli/ports.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "image/sockets.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define FILES_MAX (64u << 20)
#define ANSWER_MAX 32768u
#define WAIT_S 2

struct request {
    struct nlmsghdr head;
    struct inet_diag_req_v2 what;
};

static int open_diag(void)
{
    int s = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
    struct timeval most = {.tv_sec = WAIT_S};
    if (s >= 0)
        setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &most, sizeof(most));
    return s;
}

static bool ask(int s, uint16_t type, uint16_t flags, const struct inet_diag_req_v2 *what)
{
    struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
    struct request rq = {
        .head = {.nlmsg_len = sizeof(rq), .nlmsg_type = type, .nlmsg_flags = NLM_F_REQUEST | flags},
        .what = *what};
    return sendto(s, &rq, sizeof(rq), 0, (struct sockaddr *)&kernel, sizeof(kernel)) == sizeof(rq);
}

/* One datagram of the kernel's; its length, or -1. */
static ssize_t answer(int s, void *buf, size_t cap)
{
    struct sockaddr_nl from;
    socklen_t len = sizeof(from);
    ssize_t n = recvfrom(s, buf, cap, 0, (struct sockaddr *)&from, &len);
    return n > 0 && len == sizeof(from) && from.nl_pid == 0 ? n : -1;
}

static void end(const struct inet_diag_msg *connection)
{
    struct inet_diag_req_v2 what = {.sdiag_family = connection->idiag_family,
                                    .sdiag_protocol = IPPROTO_TCP,
                                    .idiag_states = 1u << TCP_TIME_WAIT,
                                    .id = connection->id};
    char ack[512];
    bn_auto_fd s = open_diag();
    if (s >= 0 && ask(s, SOCK_DESTROY, NLM_F_ACK, &what))
        answer(s, ack, sizeof(ack)); /* done, or not to be done */
}

static bool is_ours(const struct inet_diag_msg *m, const struct bn_tcp_names *names)
{
    uint8_t addr[16];
    if (m->idiag_state != TCP_TIME_WAIT)
        return false;
    if (m->idiag_family == AF_INET)
        bn_tcp_addr_of_v4(addr, m->id.idiag_src);
    else
        memcpy(addr, m->id.idiag_src, 16);
    return bn_tcp_names_have(names, addr, ntohs(m->id.idiag_sport));
}

static void end_all(uint8_t family, const struct bn_tcp_names *names)
{
    struct inet_diag_req_v2 what = {
        .sdiag_family = family, .sdiag_protocol = IPPROTO_TCP, .idiag_states = 1u << TCP_TIME_WAIT};
    _Alignas(struct nlmsghdr) char buf[ANSWER_MAX];
    bn_auto_fd s = open_diag();
    if (s < 0 || !ask(s, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &what))
        return;
    for (ssize_t n; (n = answer(s, buf, sizeof(buf))) > 0;) {
        unsigned left = (unsigned)n;
        for (struct nlmsghdr *h = (struct nlmsghdr *)buf; NLMSG_OK(h, left); h = NLMSG_NEXT(h, left)) {
            if (h->nlmsg_type == NLMSG_DONE || h->nlmsg_type == NLMSG_ERROR)
                return;
            const struct inet_diag_msg *m = NLMSG_DATA(h);
            if (h->nlmsg_len >= NLMSG_LENGTH(sizeof(*m)) && is_ours(m, names))
                end(m);
        }
    }
}

/* CRIU makes such a file for each network namespace that it saves; sockets of the machine's own have none. */
static bool has_own_network(int dirfd)
{
    int fd = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_dir DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
    if (!dir) {
        bn_close(fd);
        return true; /* who knows */
    }
    for (struct dirent *e; (e = readdir(dir));)
        if (strncmp(e->d_name, "netns-", 6) == 0)
            return true;
    return false;
}

void cli_free_ports(int dirfd)
{
    bn_auto_free void *files = NULL;
    size_t len;
    struct bn_tcp_names names;
    struct bn_error ignored = BN_ERROR_INIT;
    if (has_own_network(dirfd) || bn_read_file_at(dirfd, "files.img", FILES_MAX, &files, &len) < 0 ||
        bn_tcp_names_decode(files, len, &names, &ignored) < 0)
        return;
    if (names.n > 0) {
        end_all(AF_INET, &names);
        end_all(AF_INET6, &names);
    }
    bn_tcp_names_free(&names);
}
