/* What was copied ahead of dumps: kept until the dump comes, its process ends, or somebody has it dropped. */
#include "daemon/daemon.h"

#include "base/cleanup.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <systemd/sd-event.h>

struct prepared_entry {
    struct bn_prepared *p;
    const void *owner; /* a connection, or NULL */
    bool watched;      /* the event loop has its pidfd */
    struct prepared_entry *next;
};

/* Cut the first entry out of the list that `wanted` says yes to. */
static struct bn_prepared *cut(struct daemon *d,
                               bool (*wanted)(const struct prepared_entry *e, const void *arg),
                               const void *arg)
{
    struct prepared_entry *found = NULL;
    pthread_mutex_lock(&d->lock);
    for (struct prepared_entry **at = &d->prepared; *at && !found;) {
        if (wanted(*at, arg)) {
            found = *at;
            *at = found->next;
        } else {
            at = &(*at)->next;
        }
    }
    pthread_mutex_unlock(&d->lock);
    struct bn_prepared *p = found ? found->p : NULL;
    free(found);
    return p;
}

static bool is_for(const struct prepared_entry *e, const void *root)
{
    return bn_prepared_for(e->p, *(const pid_t *)root);
}

static bool is_of(const struct prepared_entry *e, const void *owner)
{
    return e->owner == owner;
}

static bool is_over(const struct prepared_entry *e, const void *arg)
{
    (void)arg;
    return !bn_prepared_for(e->p, bn_prepared_root(e->p));
}

static bool is_any(const struct prepared_entry *e, const void *arg)
{
    (void)e, (void)arg;
    return true;
}

static void drop(struct daemon *d, bool (*wanted)(const struct prepared_entry *e, const void *arg),
                 const void *arg)
{
    for (struct bn_prepared *p; (p = cut(d, wanted, arg));)
        bn_prepared_free(p);
}

struct bn_prepared *bn_take_prepared(struct daemon *d, pid_t root)
{
    return cut(d, is_for, &root);
}

void bn_keep_prepared(struct daemon *d, struct bn_prepared *p, const void *owner)
{
    struct prepared_entry *e = calloc(1, sizeof(*e));
    if (!e) {
        bn_prepared_free(p);
        return;
    }
    *e = (struct prepared_entry){.p = p, .owner = owner};
    pthread_mutex_lock(&d->lock);
    e->next = d->prepared;
    d->prepared = e;
    pthread_mutex_unlock(&d->lock);
    eventfd_write(d->wake_fd, 1);
}

void bn_drop_prepared_of(struct daemon *d, const void *owner)
{
    drop(d, is_of, owner);
}

void bn_drop_all_prepared(struct daemon *d)
{
    drop(d, is_any, NULL);
}

static int on_end(sd_event_source *source, int fd, uint32_t revents, void *arg)
{
    (void)fd, (void)revents;
    drop(arg, is_over, NULL);
    sd_event_source_disable_unref(source);
    return 0;
}

/* The pidfds are duplicated: the entry may be gone before its process. */
void bn_watch_prepared(struct daemon *d, struct sd_event *loop)
{
    pthread_mutex_lock(&d->lock);
    for (struct prepared_entry *e = d->prepared; e; e = e->next) {
        sd_event_source *end;
        int pidfd = e->watched ? -1 : fcntl(bn_prepared_pidfd(e->p), F_DUPFD_CLOEXEC, 3);
        e->watched = true;
        if (pidfd < 0)
            continue;
        if (sd_event_add_io(loop, &end, pidfd, EPOLLIN, on_end, d) < 0)
            bn_close(pidfd);
        else
            sd_event_source_set_io_fd_own(end, true);
    }
    pthread_mutex_unlock(&d->lock);
}
