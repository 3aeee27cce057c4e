/* cuGetProcAddress: the driver answers, and what it answered decides which of our entries is given instead. The name alone does
 * not say: versions, per-thread streams and the driver's own renamings come in between. */
#include "agent/agent.h"
#include "agent/sync.h"

#include <string.h>

/* Function numbers, sorted by the driver's pointer. Built once by whoever comes first; others wait for nothing, they build into
 * nothing and search linearly meanwhile. */
static uint16_t order[BN_FN_COUNT];
static uint32_t order_count;
static uint32_t order_state; /* 0 none, 1 being built, 2 done */
static struct bn_lock unknown_lock;

static uintptr_t address(unsigned fn)
{
    return (uintptr_t)*bn_real_slot(fn);
}

static void sift(uint16_t *heap, unsigned from, unsigned n)
{
    for (unsigned at = from, child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && address(heap[child + 1]) > address(heap[child]))
            child++;
        if (address(heap[at]) >= address(heap[child]))
            return;
        uint16_t t = heap[at];
        heap[at] = heap[child];
        heap[child] = t;
    }
}

static void build(void)
{
    unsigned n = 0;
    for (unsigned fn = 0; fn < BN_FN_COUNT; fn++)
        if (address(fn))
            order[n++] = (uint16_t)fn;
    for (unsigned i = n / 2; i-- > 0;)
        sift(order, i, n);
    for (unsigned end = n; end-- > 1;) {
        uint16_t t = order[0];
        order[0] = order[end];
        order[end] = t;
        sift(order, 0, end);
    }
    order_count = n;
}

/* How well an entry's name fits the name asked for, where several functions share one address: the newest version of it. */
static unsigned fit(const char *entry, const char *asked)
{
    size_t len = strlen(asked);
    if (strncmp(entry, asked, len) != 0)
        return 1;
    const char *rest = entry + len;
    if (!rest[0])
        return 2;
    return rest[0] == '_' && rest[1] == 'v' && rest[2] >= '1' && rest[2] <= '9' && !rest[3]
               ? 2u + (unsigned)(rest[2] - '0')
               : 1;
}

static void consider(unsigned fn, const char *name, unsigned *best, void **found)
{
    unsigned score = fit(bn_entries[fn].name, name);
    if (score > *best) {
        *best = score;
        *found = bn_entries[fn].entry;
    }
}

/* Our entry for the driver's function `real`. NULL: unknown. */
static void *entry_for(void *real, const char *name)
{
    uint32_t seen = 0;
    if (__atomic_compare_exchange_n(&order_state, &seen, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        build();
        bn_store_rel(&order_state, 2);
    }
    void *found = NULL;
    unsigned best = 0;
    if (bn_load_acq(&order_state) != 2) {
        for (unsigned fn = 0; fn < BN_FN_COUNT; fn++)
            if (*bn_real_slot(fn) == real)
                consider(fn, name, &best, &found);
        return found;
    }
    unsigned low = 0, high = order_count;
    while (low < high) {
        unsigned mid = (low + high) / 2;
        if (address(order[mid]) < (uintptr_t)real)
            low = mid + 1;
        else
            high = mid;
    }
    for (; low < order_count && address(order[low]) == (uintptr_t)real; low++)
        consider(order[low], name, &best, &found);
    return found;
}

void bn_unknown_name(const char *name)
{
    struct bn_agent_page *page = bn_agent_page();
    bn_lock(&unknown_lock);
    uint32_t n = page->unknown_count;
    bool known = false;
    for (uint32_t i = 0; i < n && i < 64; i++)
        known = known || strncmp(page->unknown[i], name, sizeof(page->unknown[i]) - 1) == 0;
    if (!known) {
        __atomic_fetch_add(&page->gated_calls_unknown, 1, __ATOMIC_RELAXED);
        if (n < 64) {
            size_t len = strnlen(name, sizeof(page->unknown[n]) - 1);
            memcpy(page->unknown[n], name, len);
            page->unknown[n][len] = 0;
            bn_store_rel(&page->unknown_count, n + 1);
        }
    }
    bn_unlock(&unknown_lock);
}

void bn_procaddr_after_fork(void)
{
    unknown_lock.word = 0; /* a thread that is not here may have held it */
}

static void substitute(const char *symbol, void **pfn)
{
    if (!pfn || !*pfn)
        return;
    void *entry = entry_for(*pfn, symbol ? symbol : "");
    if (entry)
        *pfn = entry;
    else if (symbol && strncmp(symbol, "cu", 2) == 0)
        bn_unknown_name(symbol);
}

CUresult bn_wrap_cuGetProcAddress(const char *symbol, void **pfn, int cudaVersion, cuuint64_t flags)
{
    CUresult r = bn_real.cuGetProcAddress(symbol, pfn, cudaVersion, flags);
    if (r == CUDA_SUCCESS)
        substitute(symbol, pfn);
    return r;
}

CUresult bn_wrap_cuGetProcAddress_v2(const char *symbol, void **pfn, int cudaVersion, cuuint64_t flags,
                                     CUdriverProcAddressQueryResult *symbolStatus)
{
    CUresult r = bn_real.cuGetProcAddress_v2(symbol, pfn, cudaVersion, flags, symbolStatus);
    if (r == CUDA_SUCCESS)
        substitute(symbol, pfn);
    return r;
}
