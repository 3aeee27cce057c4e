/* Ctrl-C while CRIU works. CRIU cannot be killed then without harm, so it and we ignore the signals; a thread takes them here and
 * tells Bennu's plugin, which makes CRIU fail at its next step: what was done is undone as after any other failure. */
#include "cli/cli.h"

#include "base/cleanup.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>

struct cli_cancel {
    pthread_t thread;
    int signals, stop;
    int pipe[2]; /* the plugin opens the first one by its name in /proc */
    atomic_int signal;
};

static const int list[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};

static void *take_signals(void *arg)
{
    struct cli_cancel *c = arg;
    struct pollfd p[2] = {{.fd = c->signals, .events = POLLIN}, {.fd = c->stop, .events = POLLIN}};
    for (;;) {
        if (poll(p, 2, -1) < 0 && errno != EINTR)
            break;
        struct signalfd_siginfo info;
        if (p[0].revents & POLLIN && read(c->signals, &info, sizeof(info)) == sizeof(info) &&
            atomic_load(&c->signal) == 0) {
            atomic_store(&c->signal, (int)info.ssi_signo);
            if (write(c->pipe[1], "", 1) != 1)
                break;
        } else if (p[1].revents) {
            break;
        }
    }
    return NULL;
}

static void discard(struct cli_cancel *c)
{
    bn_close(c->signals);
    bn_close(c->stop);
    bn_close(c->pipe[0]);
    bn_close(c->pipe[1]);
    free(c);
}

int cli_signals_fd(void)
{
    sigset_t set;
    sigemptyset(&set);
    for (size_t i = 0; i < BN_ARRAY_SIZE(list); i++) {
        struct sigaction now;
        /* Whoever started us with nohup, or in the background, does not want it to stop us. */
        if (sigaction(list[i], NULL, &now) == 0 && now.sa_handler != SIG_IGN)
            sigaddset(&set, list[i]);
    }
    int fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0)
        return -errno;
    sigprocmask(SIG_BLOCK, &set, NULL);
    return fd;
}

/* Nobody will take the signals: they end us, as ever. */
static void give_up(struct cli_cancel *c)
{
    sigset_t set;
    sigemptyset(&set);
    for (size_t i = 0; i < BN_ARRAY_SIZE(list); i++)
        sigaddset(&set, list[i]);
    discard(c);
    sigprocmask(SIG_UNBLOCK, &set, NULL);
}

struct cli_cancel *cli_cancel_new(void)
{
    struct cli_cancel *c = calloc(1, sizeof(*c));
    if (!c)
        return NULL;
    sigset_t all, old;
    c->pipe[0] = c->pipe[1] = -1;
    c->stop = eventfd(0, EFD_CLOEXEC);
    c->signals = c->stop < 0 ? -1 : cli_signals_fd();
    if (c->stop < 0 || c->signals < 0 || pipe2(c->pipe, O_CLOEXEC | O_NONBLOCK) < 0) {
        give_up(c);
        return NULL;
    }
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", getpid(), c->pipe[0]);
    setenv("BENNU_CANCEL", path, 1);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int r = pthread_create(&c->thread, NULL, take_signals, c);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r != 0) {
        give_up(c);
        return NULL;
    }
    return c;
}

int cli_cancel_signal(const struct cli_cancel *c)
{
    return c ? atomic_load(&c->signal) : 0;
}

int cli_cancel_free(struct cli_cancel *c)
{
    if (!c)
        return 0;
    eventfd_write(c->stop, 1);
    pthread_join(c->thread, NULL);
    int sig = cli_cancel_signal(c);
    unsetenv("BENNU_CANCEL");
    discard(c);
    return sig;
}
