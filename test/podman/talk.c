/* SPDX-License-Identifier: MIT */

/* What else a container's program holds while it uses the GPU: talk [OPTION...] [PROGRAM [ARGUMENT...]].
 *
 * A child keeps a TCP connection over the loopback (and others, if asked), and sends numbers through it in both directions; each
 * must arrive whole, once and in order. It reports "talk N" after each round, and ends with status 1 and a line with WRONG at
 * the first thing that is not as it should be. The process itself becomes PROGRAM, or waits.
 *
 *   --unix                   a pair of Unix sockets instead of the TCP connection
 *   --connect ADDRESS:PORT   also to a server outside that sends back what it gets
 *   --lock FILE              holds a flock and a POSIX lock of FILE, each on a descriptor of its own
 *   --file FILE              appends each number to FILE, on the root file system, and reads the last ones back
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WORDS 3000 /* more than one segment of the loopback holds at once, less than the sockets' buffers */
#define PATIENCE_MS 20000
#define ROUND_NS 5000000L

__attribute__((format(printf, 1, 2), noreturn)) static void wrong(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fputs("talk: WRONG: ", stderr);
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, " (%s)\n", strerror(errno));
    va_end(ap);
    exit(1);
}

static void send_all(int fd, const void *data, size_t len)
{
    for (size_t at = 0; at < len;) {
        ssize_t n = send(fd, (const char *)data + at, len - at, MSG_NOSIGNAL);
        if (n <= 0)
            wrong("cannot send");
        at += (size_t)n;
    }
}

static void receive_all(int fd, void *data, size_t len)
{
    for (size_t at = 0; at < len;) {
        struct pollfd p = {.fd = fd, .events = POLLIN};
        if (poll(&p, 1, PATIENCE_MS) == 0)
            wrong("nothing came");
        ssize_t n = recv(fd, (char *)data + at, len - at, 0);
        if (n <= 0)
            wrong("cannot receive: %zd", n);
        at += (size_t)n;
    }
}

/* From `a` to `b`, both of which we hold, or through an echo if they are one. */
static void pass(int a, int b, uint64_t round)
{
    static uint64_t out[WORDS], in[WORDS];
    for (size_t i = 0; i < WORDS; i++)
        out[i] = round * WORDS + i;
    send_all(a, out, sizeof(out));
    receive_all(b, in, sizeof(in));
    for (size_t i = 0; i < WORDS; i++)
        if (in[i] != out[i])
            wrong("round %llu: word %zu is %llu", (unsigned long long)round, i, (unsigned long long)in[i]);
}

static int connect_to(struct sockaddr_in to)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof(to)) < 0)
        wrong("cannot connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    return fd;
}

static void connect_pair(int pair[2])
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof(a);
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&a, sizeof(a)) < 0 || listen(listener, 1) < 0 ||
        getsockname(listener, (struct sockaddr *)&a, &len) < 0)
        wrong("cannot listen");
    pair[0] = connect_to(a);
    pair[1] = accept(listener, NULL, NULL);
    if (pair[1] < 0)
        wrong("cannot accept");
    close(listener);
}

static int connect_outside(const char *where)
{
    char address[64];
    unsigned port;
    struct sockaddr_in a = {.sin_family = AF_INET};
    if (!where)
        return -1;
    if (sscanf(where, "%63[^:]:%u", address, &port) != 2 || inet_pton(AF_INET, address, &a.sin_addr) != 1)
        wrong("ADDRESS:PORT is wanted");
    a.sin_port = htons((uint16_t)port);
    return connect_to(a);
}

static struct flock whole_file(void)
{
    return (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET};
}

static void take_locks(const char *path)
{
    struct flock fl = whole_file();
    int posix = open(path, O_RDWR | O_CREAT, 0600);
    char other[200];
    snprintf(other, sizeof(other), "%s.flock", path);
    int bsd = open(other, O_RDWR | O_CREAT, 0600);
    if (posix < 0 || bsd < 0 || fcntl(posix, F_SETLK, &fl) < 0 || flock(bsd, LOCK_EX | LOCK_NB) < 0)
        wrong("cannot lock %s", path);
}

/* Another process must find both locked. */
static void check_locks(const char *path)
{
    pid_t pid = fork();
    if (pid == 0) {
        struct flock fl = whole_file();
        char other[200];
        snprintf(other, sizeof(other), "%s.flock", path);
        int posix = open(path, O_RDWR), bsd = open(other, O_RDWR);
        if (posix < 0 || bsd < 0)
            _exit(2);
        if (fcntl(posix, F_SETLK, &fl) == 0)
            _exit(3);
        _exit(flock(bsd, LOCK_EX | LOCK_NB) == 0 ? 4 : 0);
    }
    int status;
    if (pid < 0 || waitpid(pid, &status, 0) != pid)
        wrong("cannot look at the locks");
    if (status != 0)
        wrong("a lock is gone: %d", WEXITSTATUS(status));
}

static void note(int fd, uint64_t round)
{
    uint64_t is;
    if (pwrite(fd, &round, sizeof(round), (off_t)(round * sizeof(round))) != sizeof(round))
        wrong("cannot write");
    for (uint64_t r = round > 100 ? round - 100 : 1; r <= round; r++)
        if (pread(fd, &is, sizeof(is), (off_t)(r * sizeof(r))) != sizeof(is) || is != r)
            wrong("the file's number %llu is not as written", (unsigned long long)r);
}

__attribute__((noreturn)) static void talk(bool in_unix, const char *outside, const char *lock,
                                           const char *path)
{
    int pair[2], echo = connect_outside(outside);
    int file = path ? open(path, O_RDWR | O_CREAT | O_TRUNC, 0600) : -1;
    if (!in_unix)
        connect_pair(pair);
    else if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0)
        wrong("cannot make a pair of sockets");
    if (path && file < 0)
        wrong("cannot open %s", path);
    if (lock)
        take_locks(lock);
    for (uint64_t round = 1;; round++) {
        pass(pair[0], pair[1], round);
        pass(pair[1], pair[0], round + 1);
        if (echo >= 0)
            pass(echo, echo, round);
        if (lock)
            check_locks(lock);
        if (file >= 0)
            note(file, round);
        printf("talk %llu\n", (unsigned long long)round);
        nanosleep(&(struct timespec){.tv_nsec = ROUND_NS}, NULL);
    }
}

int main(int argc, char **argv)
{
    static const struct option options[] = {{"unix", no_argument, NULL, 'u'},
                                            {"connect", required_argument, NULL, 'c'},
                                            {"lock", required_argument, NULL, 'l'},
                                            {"file", required_argument, NULL, 'f'},
                                            {0}};
    bool in_unix = false;
    const char *outside = NULL, *lock = NULL, *file = NULL;
    for (int c; (c = getopt_long(argc, argv, "+", options, NULL)) != -1;) {
        switch (c) {
        case 'u': in_unix = true; break;
        case 'c': outside = optarg; break;
        case 'l': lock = optarg; break;
        case 'f': file = optarg; break;
        default: return 2;
        }
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        talk(in_unix, outside, lock, file);
    }
    if (pid < 0)
        return 1;
    while (optind == argc)
        pause();
    execv(argv[optind], argv + optind);
    perror("talk: exec");
    return 1;
}
