/* Budgets of the tiers: who is moved down when another needs the room. The one that was used least recently goes first, where "used"
 * is its suspend or the last try to resume it. A tree that moves has its entry taken, as for any request; a resume that comes
 * meanwhile ends the move.
 */
#include "daemon/daemon.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "base/parallel.h"
#include "wire/agent_proto.h"

#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define MIB(bytes) ((unsigned long long)((bytes) >> 20))
#define ANY_GPU UINT32_MAX
#define ASIDE_SECONDS 1 /* then somebody looks whether there is room */
/* So long an allocation waits for a dump; then the dump ends. Half of what agents wait in all. */
#define ASIDE_NS (BN_AGENT_NEED_MS / 2 * UINT64_C(1000000))

static uint64_t in_tier(const struct bn_usage *u, uint32_t tier, unsigned dev)
{
    if (tier == BN_TIER_HOST)
        return u->host;
    if (tier == BN_TIER_DISK)
        return u->disk;
    uint64_t bytes = 0;
    for (unsigned g = 0; g < BN_USAGE_GPUS; g++)
        bytes += dev == ANY_GPU || dev == g ? u->gpu[g] : 0;
    return bytes;
}

/* Of all trees together; with d->lock. */
static uint64_t used(const struct daemon *d, uint32_t tier, unsigned dev)
{
    uint64_t bytes = 0;
    for (const struct suspended_entry *e = d->suspended; e; e = e->next)
        bytes += in_tier(&e->usage, tier, dev);
    return bytes;
}

/* Take the one in the tier that was used least recently, has not failed in this round, and may be moved. NULL: none. */
static struct suspended_entry *take_oldest(struct daemon *d, uint32_t tier, unsigned dev, unsigned round,
                                           struct bn_suspended **s)
{
    struct suspended_entry *oldest = NULL;
    pthread_mutex_lock(&d->lock);
    for (struct suspended_entry *e = d->suspended; e; e = e->next)
        if (e->s && e->failed_round != round && in_tier(&e->usage, tier, dev) && bn_suspended_movable(e->s) &&
            !bn_suspended_dead(e->s) && (!oldest || bn_suspended_used(e->s) < bn_suspended_used(oldest->s)))
            oldest = e;
    if (oldest) {
        *s = oldest->s;
        oldest->s = NULL;
        oldest->moving = true;
        oldest->stop = false;
    }
    pthread_mutex_unlock(&d->lock);
    return oldest;
}

/* One tree from this tier to one below. False: there is none that can go. */
static bool move_down(struct daemon *d, uint32_t tier, unsigned dev, unsigned round)
{
    static const uint32_t below[BN_TIERS][2] = {
        [BN_TIER_GPU] = {BN_TIER_HOST, BN_TIER_DISK}, [BN_TIER_HOST] = {BN_TIER_DISK}};
    struct suspended_entry *e;
    struct bn_suspended *s;
    while ((e = take_oldest(d, tier, dev, round, &s))) {
        struct bn_error err = BN_ERROR_INIT;
        int r = -ENOSPC;
        for (unsigned i = 0; i < 2 && below[tier][i] && r < 0 && r != -ECANCELED; i++) {
            err = (struct bn_error)BN_ERROR_INIT;
            r = bn_suspended_move(s, below[tier][i], &e->stop, &err);
        }
        e->failed_round = r < 0 ? round : 0;
        if (r < 0 && r != -ECANCELED)
            fprintf(stderr, "bennud: cannot move the memory of process %d out of the way: %s\n",
                    bn_suspended_root(s), err.text);
        bn_return_suspended(d, e, s);
        if (r == 0)
            return true;
    }
    return false;
}

static unsigned new_round(struct daemon *d)
{
    return __atomic_add_fetch(&d->rounds, 1, __ATOMIC_RELAXED);
}

static uint64_t budget(const struct daemon *d, uint32_t tier)
{
    return tier == BN_TIER_GPU ? d->gpu_budget : tier == BN_TIER_DISK ? d->disk_budget : 0;
}

static int no_room(struct daemon *d, uint32_t tier, unsigned dev, uint64_t bytes, uint64_t have,
                   struct bn_error *err)
{
    if (tier == BN_TIER_GPU)
        return bn_error_set(err, ENOMEM, "budget",
                            "%llu MiB are to stay on GPU %u, and of its budget of %llu MiB %llu are in use: "
                            "suspend to the host, resume something, or raise bennud's --gpu-budget",
                            MIB(bytes), dev, MIB(d->gpu_budget), MIB(have));
    return bn_error_set(
        err, ENOSPC, "budget",
        "%llu MiB are to go to the disk, and of the budget of %llu MiB %llu are in use: resume "
        "something, or raise bennud's --disk-budget",
        MIB(bytes), MIB(d->disk_budget), MIB(have));
}

int bn_make_room(struct bn_env *env, uint32_t tier, unsigned dev, uint64_t bytes, struct bn_error *err)
{
    struct daemon *d = (struct daemon *)((char *)env - offsetof(struct daemon, env));
    unsigned round = new_round(d);
    if (tier == BN_TIER_HOST) /* the pool keeps to its limit, and has said that there is no room */
        return move_down(d, tier, 0, round) ? 0 : bn_error_set(err, ENOMEM, "budget", "nothing can be moved");
    uint64_t limit = budget(d, tier);
    for (;;) {
        pthread_mutex_lock(&d->lock);
        uint64_t have = used(d, tier, dev);
        pthread_mutex_unlock(&d->lock);
        if (limit == 0 || (bytes <= limit && have <= limit - bytes))
            return 0;
        if (bytes > limit || !move_down(d, tier, dev, round))
            return no_room(d, tier, dev, bytes, have, err);
    }
}

void bn_keep_budgets(struct daemon *d)
{
    unsigned round = new_round(d);
    for (unsigned dev = 0; d->gpu_budget && dev < bn_gpu_count(d->env.gpu) && dev < BN_USAGE_GPUS; dev++)
        for (bool over = true; over;) {
            pthread_mutex_lock(&d->lock);
            over = used(d, BN_TIER_GPU, dev) > d->gpu_budget;
            pthread_mutex_unlock(&d->lock);
            over = over && move_down(d, BN_TIER_GPU, dev, round);
        }
}

/* Is one on its way out of there already? Then wait for it. */
static bool wait_for_move(struct daemon *d, unsigned dev)
{
    bool waited = false;
    pthread_mutex_lock(&d->lock);
    for (struct suspended_entry *e = d->suspended; e;) {
        if (!e->moving || !in_tier(&e->usage, BN_TIER_GPU, dev)) {
            e = e->next;
            continue;
        }
        waited = true;
        pthread_cond_wait(&d->published_changed, &d->lock);
        e = d->suspended;
    }
    pthread_mutex_unlock(&d->lock);
    return waited;
}

void bn_room_aside(struct daemon *d, const struct bn_report *report, const struct bn_usage *usage, bool *stop)
{
    pthread_mutex_lock(&d->lock);
    for (unsigned g = 0; g < BN_USAGE_GPUS; g++)
        d->aside.gpu[g] += stop ? usage->gpu[g] : -usage->gpu[g];
    for (struct published *p = d->published; p; p = p->next)
        if (p->report == report) {
            p->aside = stop ? *usage : (struct bn_usage){0};
            p->stop = stop;
        }
    pthread_cond_broadcast(&d->published_changed);
    pthread_mutex_unlock(&d->lock);
    eventfd_write(d->wake_fd, 1);
}

bool bn_room_needed(struct daemon *d, const struct bn_report *report)
{
    bool needed = false;
    pthread_mutex_lock(&d->lock);
    for (struct published *p = d->published; p; p = p->next)
        needed = needed || (p->report == report && p->needed);
    pthread_mutex_unlock(&d->lock);
    return needed;
}

static void stop_aside(struct daemon *d, unsigned dev)
{
    pthread_mutex_lock(&d->lock);
    for (struct published *p = d->published; p; p = p->next)
        if (p->stop && p->aside.gpu[dev]) {
            p->needed = true;
            __atomic_store_n(p->stop, true, __ATOMIC_RELEASE);
        }
    pthread_mutex_unlock(&d->lock);
}

static uint64_t aside_on(struct daemon *d, unsigned dev)
{
    pthread_mutex_lock(&d->lock);
    uint64_t bytes = d->aside.gpu[dev];
    pthread_mutex_unlock(&d->lock);
    return bytes;
}

/* What is set aside cannot be moved, but comes free when it is copied. */
static bool wait_for_aside(struct daemon *d, unsigned dev)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += ASIDE_SECONDS;
    pthread_mutex_lock(&d->lock);
    uint64_t before = in_tier(&d->aside, BN_TIER_GPU, dev);
    while (before && in_tier(&d->aside, BN_TIER_GPU, dev) == before &&
           pthread_cond_timedwait(&d->published_changed, &d->lock, &until) == 0)
        ;
    pthread_mutex_unlock(&d->lock);
    return before > 0;
}

/* Of what is needed, that on the GPUs that have too little; all of it if none has, or has any more. *hopeless: nor is it enough with what
 * is set aside there. */
static struct bn_usage what_lacks(struct daemon *d, const struct bn_usage *where, bool *hopeless)
{
    struct bn_usage lacks = {0};
    bool some = false;
    *hopeless = false;
    for (unsigned dev = 0; dev < BN_USAGE_GPUS; dev++) {
        uint64_t aside = aside_on(d, dev), unused, total;
        if (where->gpu[dev] == 0 || bn_gpu_mem_info(d->env.gpu, dev, &unused, &total, NULL) < 0 ||
            unused >= where->gpu[dev])
            continue;
        some = true;
        lacks.gpu[dev] = where->gpu[dev];
        *hopeless = *hopeless || unused + aside < where->gpu[dev];
    }
    return some ? lacks : *where;
}

bool bn_let_go(struct daemon *d, const struct bn_usage *where)
{
    unsigned round = new_round(d);
    if (!where)
        return move_down(d, BN_TIER_GPU, ANY_GPU, round) || wait_for_move(d, ANY_GPU) ||
               wait_for_aside(d, ANY_GPU);
    bool hopeless;
    struct bn_usage lacks = what_lacks(d, where, &hopeless);
    for (unsigned dev = 0; dev < BN_USAGE_GPUS; dev++)
        if (lacks.gpu[dev] && (move_down(d, BN_TIER_GPU, dev, round) || wait_for_move(d, dev)))
            return true;
    for (unsigned dev = 0; !hopeless && dev < BN_USAGE_GPUS; dev++)
        if (lacks.gpu[dev] && wait_for_aside(d, dev))
            return true;
    return false;
}

/* Resident bytes of a process: the driver has saved its GPU memory in there. */
static uint64_t resident(pid_t pid)
{
    char path[32];
    unsigned long long all, pages = 0;
    snprintf(path, sizeof(path), "/proc/%d/statm", pid);
    bn_auto_file FILE *f = fopen(path, "re");
    if (!f || fscanf(f, "%llu %llu", &all, &pages) != 2)
        return 0;
    return (uint64_t)pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

bool bn_free_gpu(struct daemon *d, unsigned dev, uint64_t least, uint64_t bytes, bool (*wanted)(void *),
                 void *arg)
{
    uint64_t until = bn_now_ns() + ASIDE_NS;
    for (bool went = false;;) {
        /* What comes free between the two looks counts twice, not never. */
        uint64_t aside = aside_on(d, dev), free_bytes, total;
        if (bn_gpu_mem_info(d->env.gpu, dev, &free_bytes, &total, NULL) < 0)
            return went;
        if (free_bytes >= bytes)
            return true;
        if (move_down(d, BN_TIER_GPU, dev, new_round(d)) || wait_for_move(d, dev)) {
            went = true;
            continue;
        }
        if (aside == 0 || free_bytes + aside < least || (wanted && !wanted(arg)))
            return went;
        if (wanted && bn_now_ns() >= until)
            stop_aside(d, dev);
        wait_for_aside(d, dev);
    }
}

struct resume_room {
    struct daemon *d;
    const struct bn_usage *least, *most;
    uint64_t anywhere;
};

static int free_one(void *arg, size_t dev, struct bn_error *err)
{
    const struct resume_room *r = arg;
    (void)err;
    uint64_t bytes = r->most->gpu[dev] + r->anywhere;
    if (bytes) /* where a process may have been is not waited for if it cannot be met anyway */
        bn_free_gpu(r->d, (unsigned)dev, r->anywhere ? bytes : r->least->gpu[dev], bytes, NULL, NULL);
    return 0;
}

bool bn_room_for_resume(struct daemon *d, const struct bn_suspended *s, struct bn_usage *where)
{
    const struct bn_targets *t = bn_suspended_targets(s);
    uint64_t anywhere = 0; /* of processes of which only the driver knows where they were */
    bool somewhere = false;
    struct bn_usage most = {0};
    *where = (struct bn_usage){0};
    for (size_t i = 0; i < t->n; i++) {
        uint64_t driver = t->v[i].checkpointed ? BN_ROOM_CONTEXTS : 0;
        if (t->v[i].nparts == 0 && driver)
            anywhere += driver + resident(t->v[i].pid);
        for (size_t p = 0; p < t->v[i].nparts; p++) {
            const struct bn_target_part *part = &t->v[i].parts[p];
            if (part->dev >= BN_USAGE_GPUS)
                continue;
            where->gpu[part->dev] += (part->set ? 0 : part->bytes) + 1;
            most.gpu[part->dev] += driver + (part->set ? 0 : part->bytes);
        }
    }
    unsigned gpus = bn_gpu_count(d->env.gpu);
    gpus = gpus < BN_USAGE_GPUS ? gpus : BN_USAGE_GPUS;
    for (unsigned dev = 0; dev < gpus; dev++)
        somewhere = somewhere || where->gpu[dev];
    bn_parallel(gpus, free_one, &(struct resume_room){d, where, &most, anywhere}, NULL);
    return somewhere;
}
