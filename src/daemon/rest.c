/* What the daemon gives back when nobody has used it for a while: pinned host memory beyond --host-keep, and staging buffers. */
#include "daemon/daemon.h"

#include "base/cleanup.h"

#include <systemd/sd-event.h>

#define USEC 1000000ull

static void *trim(void *arg)
{
    struct daemon *d = arg;
    bn_pool_trim(d->env.pool);
    bn_copier_trim(d->env.copier);
    return NULL;
}

static void *touch(void *arg)
{
    struct daemon *d = arg;
    struct bn_error err = BN_ERROR_INIT;
    if (bn_pool_reserve(d->env.pool, d->host_keep, &err) < 0)
        fprintf(stderr, "bennud: cannot keep as much host memory as --host-keep says: %s\n", err.text);
    return NULL;
}

static int on_rest(sd_event_source *source, uint64_t usec, void *arg)
{
    (void)source, (void)usec;
    struct daemon *d = arg;
    pthread_mutex_lock(&d->lock);
    bool busy = d->published;
    pthread_mutex_unlock(&d->lock);
    if (!busy) /* a session that has not ended yet sets the timer when it does */
        bn_daemon_thread(d, trim, d);
    return 0;
}

void bn_rest_later(struct daemon *d)
{
    if (!d->rest)
        return;
    sd_event_source_set_time_relative(d->rest, d->trim_after * USEC);
    sd_event_source_set_enabled(d->rest, SD_EVENT_ONESHOT);
}

int bn_rest_open(struct daemon *d, sd_event *event)
{
    int r = sd_event_add_time_relative(event, &d->rest, CLOCK_MONOTONIC, d->trim_after * USEC, USEC / 10,
                                       on_rest, d);
    if (r >= 0)
        r = sd_event_source_set_enabled(d->rest, SD_EVENT_OFF);
    if (r >= 0 && d->host_keep)
        bn_daemon_thread(d, touch, d);
    return r;
}
