/* The beginning of a worker whose predecessor was killed. */
#include "daemon/daemon.h"

#include "base/cleanup.h"
#include "checkpoint/cold.h"
#include "checkpoint/recover.h"

#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

struct recovery {
    struct daemon *d;
    struct suspended_entry *entry;
    struct bn_suspended *s;
    struct bn_record image; /* complete to all appearances; without content: none */
};

static void settle_image(struct daemon *d, struct bn_record *image, bool processes_run)
{
    if (image->nfds == 0 || !bn_recover_image(image, processes_run))
        return;
    d->env.guard->drop(d->env.guard, image->key);
    bn_record_clear(image);
}

static void *recover(void *arg)
{
    struct recovery *r = arg;
    struct daemon *d = r->d;
    struct bn_error err = BN_ERROR_INIT;
    pid_t root = bn_suspended_root(r->s);
    struct bn_report *report = bn_report_new();
    bn_recover_wait(r->s);
    settle_image(d, &r->image, true);
    if (!report || bn_recover(&r->s, report, &err) < 0)
        fprintf(stderr,
                "bennud: cannot bring process %d and its children back: %s; 'bennu resume %d' tries again\n",
                root, err.text, root);
    else
        fprintf(stderr, "bennud: process %d and its children go on\n", root);
    bn_report_unref(report);
    bn_return_suspended(d, r->entry, r->s);
    free(r);
    return NULL;
}

/* In a thread: it may take as long as CRIU holds the processes, or a frozen cgroup does. */
static void start(struct daemon *d, struct bn_suspended *s, struct bn_record *image)
{
    struct recovery *r = malloc(sizeof(*r));
    struct suspended_entry *e = r ? bn_enter_recovering(d, s) : NULL;
    if (!e) {
        free(r);
        fprintf(stderr, "bennud: out of memory: process %d stays stopped until the next start\n",
                bn_suspended_root(s));
        return; /* with its records where they are */
    }
    *r = (struct recovery){d, e, s, *image};
    *image = (struct bn_record){0};
    if (bn_daemon_thread(d, recover, r) < 0)
        recover(r);
}

/* Everything of one session. */
struct session {
    struct bn_suspended *s;
    struct bn_record image;
    bool suspended;
};

/* The rest of the session that the first record belongs to is used up, too. False: it makes no sense. */
static bool open_session(struct daemon *d, struct bn_record *records, size_t n, struct bn_record **targets,
                         struct session *out)
{
    struct bn_record_head first, other;
    struct bn_error err = BN_ERROR_INIT;
    size_t found = 0;
    bn_record_head(&records[0], &first);
    for (size_t i = 0; i < n; i++) {
        if (bn_record_head(&records[i], &other) < 0 || other.session != first.session)
            continue;
        if (records[i].kind == BN_RECORD_TARGET) {
            targets[found++] = &records[i];
        } else {
            out->image = records[i];
            records[i] = (struct bn_record){0};
        }
    }
    int r = found > 0 ? bn_recover_open(&d->env, targets, found, &out->s, &out->suspended, &err) : 0;
    if (r < 0)
        fprintf(stderr, "bennud: %s\n", err.text);
    for (size_t i = 0; i < found; i++)
        bn_record_clear(targets[i]);
    return r == 0;
}

static void put_right(struct daemon *d, struct session *session)
{
    struct bn_suspended *s = session->s;
    if (s && session->suspended && bn_keep_suspended(d, s) == 0)
        fprintf(stderr, "bennud: process %d is still suspended\n", bn_suspended_root(s));
    else if (s)
        start(d, s, &session->image);
    settle_image(d, &session->image, true);
    bn_record_clear(&session->image);
}

void bn_daemon_recover(struct daemon *d, struct bn_record *records, size_t n)
{
    bn_auto_free struct bn_record **targets = calloc(n ? n : 1, sizeof(*targets));
    bn_auto_free struct session *sessions = calloc(n ? n : 1, sizeof(*sessions));
    bn_auto_free struct bn_suspended **trees = calloc(n ? n : 1, sizeof(*trees));
    if (!targets || !sessions || !trees)
        return; /* the keeper has them still */
    for (size_t i = 0; i < n; i++)
        if (records[i].kind == BN_RECORD_IMAGE)
            settle_image(d, &records[i], false);
    size_t count = 0;
    bool all = true;
    for (size_t i = 0; i < n; i++) {
        struct bn_record_head head;
        if (records[i].bytes == NULL) /* used up */
            continue;
        if (bn_record_head(&records[i], &head) < 0) {
            all = false;
            continue;
        }
        all = open_session(d, &records[i], n - i, targets, &sessions[count]) && all;
        trees[count] = sessions[count].s;
        count++;
    }
    if (all)
        bn_recover_trim(trees, count);
    for (size_t i = 0; i < count; i++)
        put_right(d, &sessions[i]);
    for (size_t i = 0; i < n; i++)
        bn_record_clear(&records[i]);
}

/* A folder of the spool that nobody holds. False: it is of no use. */
static bool take_folder(void *arg, int dirfd)
{
    struct daemon *d = arg;
    struct bn_suspended *s = NULL;
    struct bn_error err = BN_ERROR_INIT;
    int r = bn_recover_folder(&d->env, dirfd, &s, &err);
    if (r == -ENOENT) /* it was being written or read */
        return false;
    if (r < 0) {
        fprintf(stderr, "bennud: memory that an earlier bennud left on the disk cannot be taken up: %s\n",
                err.text);
        return r != -EBADMSG; /* another start may find what this one lacks */
    }
    if (s && bn_keep_suspended(d, s) == 0)
        fprintf(stderr, "bennud: process %d is still suspended\n", bn_suspended_root(s));
    return true;
}

void bn_daemon_take_folders(struct daemon *d)
{
    bn_cold_clean(d->spool, take_folder, d);
}
