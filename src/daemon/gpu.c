#include "daemon/daemon.h"

#include "gpu/hash.h"

#include <stdio.h>

#define GATE_TIMEOUT_MS 10000u
#define LOCK_TIMEOUT_MS 10000u

int bn_daemon_open_gpu(struct daemon *d, struct bn_error *err)
{
    struct bn_env *env = &d->env;
    env->gate_timeout_ms = GATE_TIMEOUT_MS;
    env->lock_timeout_ms = LOCK_TIMEOUT_MS;
    env->spool = d->spool;
    env->room = bn_make_room;
    int r = bn_gpu_open(d->driver, &env->gpu, err);
    if (r == 0)
        r = bn_pool_new(env->gpu, &(struct bn_pool_config){.limit = d->host_limit, .keep = d->host_keep},
                        &env->pool, err);
    if (r == 0)
        r = bn_copier_new(env->gpu, &(struct bn_copier_config){0}, &env->copier, err);
    if (r < 0) {
        bn_daemon_close_gpu(d);
        d->no_gpu = *err;
    }
    return r;
}

void bn_daemon_note_hashing(struct daemon *d)
{
    for (unsigned g = 0; d->env.gpu && g < bn_gpu_count(d->env.gpu) && g < 64; g++) {
        struct bn_error why = BN_ERROR_INIT;
        uint64_t bit = UINT64_C(1) << g;
        if (!bn_gpu_hash_off(d->env.gpu, g, &why))
            continue;
        if (!(__atomic_fetch_or(&d->hashless, bit, __ATOMIC_RELAXED) & bit))
            fprintf(stderr, "bennud: the CPU hashes what is on GPU %u: %s\n", g, why.text);
    }
}

void bn_daemon_close_gpu(struct daemon *d)
{
    bn_copier_free(d->env.copier);
    bn_pool_free(d->env.pool);
    bn_gpu_close(d->env.gpu);
    d->env = (struct bn_env){0};
}
