/* The agent's descriptors, kept out of the application's way: at high numbers, so that select(2) and programs that count on
 * getting the lowest number are not disturbed. */
#include "agent/agent.h"
#include "agent/libc.h"
#include "agent/track.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>

#ifndef F_GET_SEALS
#define F_GET_SEALS 1034
#endif

#ifndef F_SETSIG
#define F_SETSIG 10
#define F_GETSIG 11
#endif
#define MARKS 64 /* numbers of signals */

static struct rlimit before;
static bool lifted;

/* Below the soft limit with room for 512, but no higher than the kernel's table of descriptors is cheap. */
static int base(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        return 512;
    rlim_t soft = lifted ? before.rlim_cur : limit.rlim_cur;
    if (soft >= 2048)
        return 1024;
    return soft > 640 ? (int)soft - 512 : (int)soft / 2;
}

int bn_fd_high(int fd)
{
    int high = fcntl(fd, F_DUPFD_CLOEXEC, base());
    if (high < 0)
        return -errno;
    close(fd);
    return high;
}

/* A restored process has its sockets at the old numbers, but the kernel numbers them anew: what they are must do. */
static bool is_seqpacket(int fd)
{
    int domain = 0, type = 0;
    socklen_t len = sizeof(int);
    return getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &len) == 0 && domain == AF_UNIX &&
           getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) == 0 && type == SOCK_SEQPACKET;
}

/* Likewise the page's memfd, and its duplicates that hold the place of offered memory. No memory of the driver's is as small. */
static bool is_page(int fd, const struct stat *st)
{
    return S_ISREG(st->st_mode) && st->st_size == BN_AGENT_PAGE_SIZE && fcntl(fd, F_GET_SEALS) > 0;
}

/* Files of the driver's are alike to fstat: they share an inode, or are opens of one device. But what fcntl(F_SETSIG) sets belongs
 * to the open file, nothing else comes of it while O_ASYNC is off, and a file that somebody opens has 0. So one that is
 * kept gets a number of its own there. A duplicate of a file that is kept already has its number. */
static int mark(int fd, const struct stat *st)
{
    static uint32_t last;
    if (S_ISSOCK(st->st_mode) || is_page(fd, st)) /* these are in checkpoints, and known otherwise */
        return 0;
    int have = fcntl(fd, F_GETSIG);
    if (have > 0)
        return have;
    int number = (int)(__atomic_fetch_add(&last, 1, __ATOMIC_RELAXED) % MARKS) + 1;
    return fcntl(fd, F_SETSIG, number) == 0 ? number : 0;
}

int bn_kept_take(struct bn_kept *kept, int fd)
{
    struct stat st;
    if (bn_fstat(fd, &st) < 0)
        return -errno;
    int high = bn_fd_high(fd);
    if (high < 0)
        return high;
    *kept = (struct bn_kept){
        .fd = high, .mark = mark(high, &st), .dev = st.st_dev, .rdev = st.st_rdev, .ino = st.st_ino};
    return 0;
}

void bn_kept_moved(struct bn_kept *kept)
{
    struct stat st;
    if (bn_fstat(kept->fd, &st) == 0)
        *kept = (struct bn_kept){.fd = kept->fd,
                                 .mark = mark(kept->fd, &st),
                                 .dev = st.st_dev,
                                 .rdev = st.st_rdev,
                                 .ino = st.st_ino};
}

bool bn_kept_valid(const struct bn_kept *kept)
{
    struct stat st;
    if (kept->fd <= 0 || bn_fstat(kept->fd, &st) < 0)
        return false;
    if (S_ISSOCK(st.st_mode))
        return is_seqpacket(kept->fd);
    if (is_page(kept->fd, &st))
        return true;
    return st.st_dev == kept->dev && st.st_ino == kept->ino && st.st_rdev == kept->rdev &&
           fcntl(kept->fd, F_GETSIG) == kept->mark;
}

void bn_kept_close(struct bn_kept *kept)
{
    if (bn_kept_valid(kept))
        close(kept->fd);
    kept->fd = 0;
}

void bn_fd_limit_lift(void)
{
    if (lifted || getrlimit(RLIMIT_NOFILE, &before) < 0 || before.rlim_cur == before.rlim_max)
        return;
    struct rlimit all = {before.rlim_max, before.rlim_max};
    lifted = setrlimit(RLIMIT_NOFILE, &all) == 0;
}

void bn_fd_limit_restore(void)
{
    if (lifted)
        setrlimit(RLIMIT_NOFILE, &before);
    lifted = false;
}
