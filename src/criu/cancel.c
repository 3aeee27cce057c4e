/* bennu(1) was told to stop, by Ctrl-C say. A CRIU that is killed leaves its tasks broken, so it is not: bennu writes into a pipe,
 * which its environment names, and here that reads as an error of the daemon's. CRIU then fails as ever and undoes all of it. */
#include "criu/plugin.h"

#include "base/cleanup.h"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/time.h>

#define PIPE_NUMBER_MIN 128 /* as for the daemon's socket */

static int pipe_end = -1;

void bnp_cancel_init(void)
{
    const char *path = secure_getenv("BENNU_CANCEL");
    if (!path || pipe_end >= 0)
        return;
    bn_auto_fd fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd >= 0)
        pipe_end = fcntl(fd, F_DUPFD_CLOEXEC, PIPE_NUMBER_MIN);
}

/* bennu's own end closes the pipe, too, and is no order: CRIU goes on without it. */
static bool readable(const struct pollfd *p)
{
    return p->revents & POLLIN;
}

bool bnp_cancelled(void)
{
    struct pollfd p = {.fd = pipe_end, .events = POLLIN};
    return pipe_end >= 0 && poll(&p, 1, 0) > 0 && readable(&p);
}

bool bnp_cancelled_before_answer(int sock)
{
    struct timeval tv = {0};
    socklen_t len = sizeof(tv);
    if (pipe_end < 0)
        return false;
    getsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &tv, &len);
    int wait_ms = tv.tv_sec ? (int)tv.tv_sec * 1000 : -1;
    struct pollfd p[2] = {{.fd = sock, .events = POLLIN}, {.fd = pipe_end, .events = POLLIN}};
    int n;
    do {
        n = poll(p, 2, wait_ms);
        if (p[1].revents && !readable(&p[1]))
            p[1].fd = -1; /* bennu has gone: nobody will write any more */
    } while ((n < 0 && errno == EINTR) || (n > 0 && p[0].revents == 0 && !readable(&p[1])));
    return n > 0 && readable(&p[1]);
}
