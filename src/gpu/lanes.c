/* Streams and events of copies, made with the context and kept as long as it.
 *
 * The driver takes device memory for a stream and can make none on a GPU that is full, and that is when copies are needed most: a
 * program that has taken all of its GPU is dumped, or memory that rests there has to make way. So nothing is made when a copy begins.
 * A few streams for each direction keep the link busy, so threads share them: the copy engine takes what is in them in turn, as it would
 * from streams of their own. */
#include "gpu/driver.h"

#include "base/cleanup.h"

#include <stdlib.h>

#define STREAMS 4u /* of each direction */
#define LANES 24u  /* at the beginning: more than the threads of one job */
#define BLOCK 4096u

struct bn_gpu_lanes {
    pthread_mutex_t lock;
    CUstream streams[2][STREAMS];
    unsigned users[2][STREAMS];
    struct bn_gpu_lane *idle;
    bool tried;
};

static CUresult lane_new(struct bn_gpu *gpu, struct bn_gpu_lane **out)
{
    struct bn_gpu_lane *lane = calloc(1, sizeof(*lane));
    CUresult c = lane ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    for (unsigned i = 0; i < 2 && c == CUDA_SUCCESS; i++)
        c = gpu->cu.EventCreate(&lane->events[i], CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING);
    if (c == CUDA_SUCCESS) {
        *out = lane;
        return c;
    }
    if (lane && lane->events[0])
        gpu->cu.EventDestroy(lane->events[0]);
    free(lane);
    return c;
}

CUresult bn_gpu_lane_take(struct bn_gpu *gpu, unsigned dev, bool in, struct bn_gpu_lane **out)
{
    struct bn_gpu_lanes *l = gpu->devices[dev].lanes;
    unsigned *users = l->users[in], least = 0;
    CUresult c = CUDA_SUCCESS;
    pthread_mutex_lock(&l->lock);
    struct bn_gpu_lane *lane = l->idle;
    if (lane)
        l->idle = lane->next;
    else
        c = lane_new(gpu, &lane);
    if (c == CUDA_SUCCESS) {
        for (unsigned i = 1; i < STREAMS; i++)
            if (users[i] < users[least])
                least = i;
        users[least]++;
        lane->users = &users[least];
        lane->stream = l->streams[in][least];
        *out = lane;
    }
    pthread_mutex_unlock(&l->lock);
    return c;
}

void bn_gpu_lane_return(struct bn_gpu *gpu, unsigned dev, struct bn_gpu_lane *lane)
{
    struct bn_gpu_lanes *l = gpu->devices[dev].lanes;
    if (!lane)
        return;
    pthread_mutex_lock(&l->lock);
    --*lane->users;
    lane->next = l->idle;
    l->idle = lane;
    pthread_mutex_unlock(&l->lock);
}

CUresult bn_gpu_lanes_make(struct bn_gpu *gpu, unsigned dev)
{
    struct bn_gpu_lanes *l = gpu->devices[dev].lanes = calloc(1, sizeof(*l));
    if (!l)
        return CUDA_ERROR_OUT_OF_MEMORY;
    pthread_mutex_init(&l->lock, NULL);
    CUresult c = CUDA_SUCCESS;
    for (unsigned i = 0; i < 2 * STREAMS && c == CUDA_SUCCESS; i++)
        c = gpu->cu.StreamCreate(&l->streams[i % 2][i / 2], CU_STREAM_NON_BLOCKING);
    for (unsigned i = 0; i < LANES && c == CUDA_SUCCESS; i++) {
        struct bn_gpu_lane *lane;
        if ((c = lane_new(gpu, &lane)) == CUDA_SUCCESS) {
            lane->next = l->idle;
            l->idle = lane;
        }
    }
    if (c != CUDA_SUCCESS)
        bn_gpu_lanes_free(gpu, dev);
    return c;
}

void bn_gpu_lanes_free(struct bn_gpu *gpu, unsigned dev)
{
    struct bn_gpu_lanes *l = gpu->devices[dev].lanes;
    if (!l)
        return;
    while (l->idle) {
        struct bn_gpu_lane *lane = l->idle;
        l->idle = lane->next;
        for (unsigned i = 0; i < 2; i++)
            gpu->cu.EventDestroy(lane->events[i]);
        free(lane);
    }
    for (unsigned i = 0; i < 2 * STREAMS; i++)
        if (l->streams[i % 2][i / 2])
            gpu->cu.StreamDestroy(l->streams[i % 2][i / 2]);
    pthread_mutex_destroy(&l->lock);
    free(l);
    gpu->devices[dev].lanes = NULL;
}

/* One small copy through each. */
static void use_all(struct bn_gpu *gpu, unsigned dev, struct bn_gpu_set *set, void *host)
{
    struct bn_gpu_lane *lanes[2 * STREAMS] = {0};
    for (unsigned i = 0; i < 2 * STREAMS; i++) {
        bool in = i % 2;
        if (bn_gpu_lane_take(gpu, dev, in, &lanes[i]) != CUDA_SUCCESS)
            break;
        if (in)
            gpu->cu.MemcpyHtoDAsync(bn_gpu_set_ptr(set), host, BLOCK, lanes[i]->stream);
        else
            gpu->cu.MemcpyDtoHAsync(host, bn_gpu_set_ptr(set), BLOCK, lanes[i]->stream);
        gpu->cu.EventRecord(lanes[i]->events[0], lanes[i]->stream);
    }
    for (unsigned i = 0; i < 2 * STREAMS && lanes[i]; i++) {
        gpu->cu.StreamSynchronize(lanes[i]->stream);
        bn_gpu_lane_return(gpu, dev, lanes[i]);
    }
}

void bn_gpu_lanes_use(struct bn_gpu *gpu, unsigned dev)
{
    struct bn_gpu_lanes *l = gpu->devices[dev].lanes;
    if (__atomic_exchange_n(&l->tried, true, __ATOMIC_RELAXED))
        return;
    struct bn_pool_config config = {.limit = BN_GPU_CHUNK, .slab = BN_GPU_CHUNK, .threads = 1};
    struct bn_gpu_set *set = NULL;
    struct bn_pool *pool = NULL;
    struct bn_mem *mem = NULL;
    int r = bn_gpu_set_create(gpu, dev, &(struct bn_gpu_block){.size = BN_GPU_CHUNK}, 1, &set, NULL);
    if (r == 0)
        r = bn_pool_new(gpu, &config, &pool, NULL);
    if (r == 0)
        r = bn_mem_alloc(pool, BN_GPU_CHUNK, &mem, NULL);
    if (r == 0 && bn_gpu_enter(gpu, dev, "copy", NULL) == 0) {
        use_all(gpu, dev, set, bn_mem_piece(mem, 0, NULL, NULL));
        bn_gpu_leave(gpu);
    }
    bn_mem_free(mem);
    bn_pool_free(pool);
    bn_gpu_set_free(set);
}
