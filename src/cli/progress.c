#include "cli/cli.h"

#include "base/cleanup.h"
#include "base/io.h"

#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

#define QUIET_NS 500000000ull /* what takes less shows nothing */
#define REDRAW_NS 100000000ull
#define BAR_MAX 40

struct cli_progress {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool stop, drawn;
    const char *what;
    uint64_t began_ns, phase_ns; /* when all of it and when the phase began */
    struct bn_progress now;
};

static unsigned columns(void)
{
    struct winsize ws;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &ws) == 0 && ws.ws_col >= 20 ? ws.ws_col : 80;
}

static void draw_bar(char *out, size_t cap, unsigned width, uint64_t done, uint64_t total)
{
    unsigned full = (unsigned)((double)done / (double)total * width);
    size_t n = 0;
    for (unsigned i = 0; i < width && n + 1 < cap; i++)
        out[n++] = i < full ? '#' : '-';
    out[n] = 0;
}

static void draw(struct cli_progress *p, uint64_t now_ns)
{
    char line[256], bar[BAR_MAX + 1], done[16], total[16];
    unsigned cols = columns();
    struct bn_progress *g = &p->now;
    if (g->total == 0) {
        snprintf(line, sizeof(line), "%s  %.1f s", g->phase[0] ? g->phase : p->what,
                 (double)(now_ns - p->began_ns) / 1e9);
    } else {
        uint64_t shown = g->done < g->total ? g->done : g->total;
        double seconds = (double)(now_ns - p->phase_ns) / 1e9;
        unsigned width = cols > 70 + 10 ? BAR_MAX : cols > 60 ? cols - 50 : 10;
        draw_bar(bar, sizeof(bar), width < BAR_MAX ? width : BAR_MAX, shown, g->total);
        snprintf(line, sizeof(line), "%-14s [%s] %s of %s  %.1f GB/s", g->phase, bar, cli_bytes(shown, done),
                 cli_bytes(g->total, total), seconds > 0 ? (double)shown / seconds / 1e9 : 0);
    }
    if (strlen(line) >= cols)
        line[cols - 1] = 0;
    dprintf(STDERR_FILENO, "\r\033[K%s", line);
    p->drawn = true;
}

static void *draw_until_stopped(void *arg)
{
    struct cli_progress *p = arg;
    pthread_mutex_lock(&p->lock);
    while (!p->stop) {
        uint64_t now = bn_now_ns();
        uint64_t next = p->began_ns + QUIET_NS;
        if (now >= next) {
            draw(p, now);
            next = now + REDRAW_NS;
        }
        struct timespec until = {.tv_sec = (time_t)(next / 1000000000), .tv_nsec = (long)(next % 1000000000)};
        pthread_cond_timedwait(&p->wake, &p->lock, &until);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

struct cli_progress *cli_progress_new(const char *what)
{
    if (!isatty(STDERR_FILENO))
        return NULL;
    struct cli_progress *p = calloc(1, sizeof(*p));
    if (!p)
        return NULL;
    p->what = what;
    p->began_ns = p->phase_ns = bn_now_ns();
    pthread_mutex_init(&p->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&p->wake, &attr);
    pthread_condattr_destroy(&attr);
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int r = pthread_create(&p->thread, NULL, draw_until_stopped, p);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r != 0) {
        free(p);
        return NULL;
    }
    return p;
}

void cli_progress_update(struct cli_progress *p, const struct bn_progress *now)
{
    if (!p)
        return;
    pthread_mutex_lock(&p->lock);
    if (strcmp(p->now.phase, now->phase) != 0)
        p->phase_ns = bn_now_ns();
    p->now = *now;
    cli_clean(p->now.phase);
    pthread_mutex_unlock(&p->lock);
}

void cli_progress_event(void *arg, const struct bn_ctl_head *head, struct bn_reader *body)
{
    struct bn_progress now;
    cli_trace_event(head, body);
    if (head->type != BN_CTL_EV_PROGRESS)
        return;
    bn_read_progress(body, &now);
    if (!body->failed)
        cli_progress_update(arg, &now);
}

void cli_progress_free(struct cli_progress *p)
{
    if (!p)
        return;
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_cond_signal(&p->wake);
    pthread_mutex_unlock(&p->lock);
    pthread_join(p->thread, NULL);
    if (p->drawn) {
        dprintf(STDERR_FILENO, "\r\033[K");
    }
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    free(p);
}
