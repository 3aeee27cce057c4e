#include "agent/gate.h"

#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

/* linux/membarrier.h of old distributions lacks the names. */
#define MB_GLOBAL (1 << 0)
#define MB_PRIVATE (1 << 3)
#define MB_REGISTER_PRIVATE (1 << 4)
#define NODES_STATIC 64
#define NODES_SLAB (64u * 1024u)
#define FENCED_SETTLE_NS 20000000u /* far longer than a store may stay in a processor's buffer */

uint32_t bn_gate_word;
__thread struct bn_gate_node *bn_gate_self __attribute__((tls_model("initial-exec")));

static struct bn_gate_node first[NODES_STATIC];
static uint32_t first_used;
static struct bn_gate_node *nodes; /* grows at the head; never shrinks */
/* For threads that can get no node: they share this one, so its count is worthless and the gate must not close. */
static struct bn_gate_node overflow;
static uint32_t overflowed;

static pthread_key_t key;
static uint32_t key_state; /* 0 none, 1 being made, 2 there, 3 could not be had */

static int membarrier(int command)
{
    int saved = errno;
    int r = (int)syscall(SYS_membarrier, command, 0, 0);
    if (r < 0)
        r = -errno;
    errno = saved;
    return r;
}

void bn_gate_init(void)
{
    if (membarrier(MB_REGISTER_PRIVATE) < 0 && membarrier(MB_GLOBAL) < 0)
        __atomic_fetch_or(&bn_gate_word, BN_GATE_FENCED, __ATOMIC_SEQ_CST);
}

/* At thread exit. Later destructors that call CUDA get a node again. */
static void give_node_back(void *arg)
{
    struct bn_gate_node *n = arg;
    bn_gate_self = NULL;
    bn_store(&n->in, 0);
    bn_store_rel(&n->owned, 0);
}

static void want_destructor(struct bn_gate_node *n)
{
    uint32_t seen = 0;
    if (__atomic_compare_exchange_n(&key_state, &seen, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        bn_store_rel(&key_state, pthread_key_create(&key, give_node_back) == 0 ? 2 : 3);
    /* Somebody else is making the key: this thread's node is not recycled, which costs 64 bytes. */
    if (bn_load_acq(&key_state) == 2)
        pthread_setspecific(key, n);
}

static void push(struct bn_gate_node *n, struct bn_gate_node *last)
{
    struct bn_gate_node *head = bn_load(&nodes);
    do
        last->next = head;
    while (!__atomic_compare_exchange_n(&nodes, &head, n, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
}

static struct bn_gate_node *new_node(void)
{
    uint32_t i = __atomic_fetch_add(&first_used, 1, __ATOMIC_RELAXED);
    if (i < NODES_STATIC) {
        first[i].owned = 1;
        push(&first[i], &first[i]);
        return &first[i];
    }
    bn_store(&first_used, NODES_STATIC);
    struct bn_gate_node *slab =
        mmap(NULL, NODES_SLAB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (slab == MAP_FAILED)
        return NULL;
    size_t count = NODES_SLAB / sizeof(*slab);
    for (size_t k = 0; k + 1 < count; k++)
        slab[k].next = &slab[k + 1];
    slab[0].owned = 1;
    push(slab, &slab[count - 1]);
    return slab;
}

struct bn_gate_node *bn_gate_register(void)
{
    int saved = errno;
    struct bn_gate_node *n;
    for (n = bn_load_acq(&nodes); n; n = n->next) {
        uint32_t seen = 0;
        if (bn_load(&n->owned) == 0 &&
            __atomic_compare_exchange_n(&n->owned, &seen, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            break;
    }
    if (!n)
        n = new_node();
    if (n) {
        bn_store(&n->exempt, 0);
        bn_store(&n->tid, (int32_t)syscall(SYS_gettid));
        bn_gate_self = n;
        want_destructor(n);
    } else {
        __atomic_store_n(&overflowed, 1, __ATOMIC_SEQ_CST);
        n = bn_gate_self = &overflow;
        /* It may have closed just before; from now on it cannot. */
        uint32_t word;
        while ((word = __atomic_load_n(&bn_gate_word, __ATOMIC_SEQ_CST)) & BN_GATE_CLOSED)
            bn_futex_wait(&bn_gate_word, word, 0);
    }
    errno = saved;
    return n;
}

void bn_gate_exempt_self(void)
{
    struct bn_gate_node *n = bn_gate_self ? bn_gate_self : bn_gate_register();
    bn_store(&n->exempt, 1);
}

void bn_gate_enter_slow(struct bn_gate_node *n)
{
    if (n == &overflow || bn_load(&n->exempt))
        return;
    for (;;) {
        bn_fence();
        uint32_t word = __atomic_load_n(&bn_gate_word, __ATOMIC_SEQ_CST);
        if (!(word & BN_GATE_CLOSED))
            return;
        bn_store_rel(&n->in, 0);
        bn_futex_wait(&bn_gate_word, word, 0);
        bn_store(&n->in, 1);
    }
}

/* After this, each thread is seen inside or will see the closed word. */
static void pass_barrier(void)
{
    /* Registering again costs nothing; a restored process is not registered. */
    if (membarrier(MB_PRIVATE) == 0)
        return;
    if (membarrier(MB_REGISTER_PRIVATE) == 0 && membarrier(MB_PRIVATE) == 0)
        return;
    if (membarrier(MB_GLOBAL) == 0)
        return;
    uint32_t before = __atomic_fetch_or(&bn_gate_word, BN_GATE_FENCED, __ATOMIC_SEQ_CST);
    bn_fence();
    if (before & BN_GATE_FENCED)
        return;
    /* Refused only since now: threads that went by without a fence have made their store visible long before this ends. */
    struct timespec ts = {0, FENCED_SETTLE_NS};
    nanosleep(&ts, NULL);
}

static struct bn_gate_node *somebody_inside(void)
{
    for (struct bn_gate_node *n = bn_load_acq(&nodes); n; n = n->next)
        if (bn_load_acq(&n->in) && !bn_load(&n->exempt))
            return n;
    return NULL;
}

int bn_gate_close(uint64_t deadline_ns, pid_t *holder)
{
    __atomic_fetch_or(&bn_gate_word, BN_GATE_CLOSED, __ATOMIC_SEQ_CST);
    pass_barrier();
    if (__atomic_load_n(&overflowed, __ATOMIC_SEQ_CST)) {
        bn_gate_open();
        return -ENOMEM;
    }
    struct bn_gate_node *n;
    for (unsigned round = 0; (n = somebody_inside()); round++) {
        if (round < 200)
            continue;
        if (bn_clock_ns() >= deadline_ns) {
            *holder = bn_load(&n->tid);
            bn_gate_open();
            return -EBUSY;
        }
        struct timespec ts = {0, round < 400 ? 20000 : 500000};
        nanosleep(&ts, NULL);
    }
    return 0;
}

void bn_gate_open(void)
{
    __atomic_fetch_and(&bn_gate_word, ~BN_GATE_CLOSED, __ATOMIC_SEQ_CST);
    bn_futex_wake(&bn_gate_word, INT32_MAX);
}

void bn_gate_after_fork(void)
{
    for (struct bn_gate_node *n = nodes; n; n = n->next) {
        bool mine = n == bn_gate_self;
        n->owned = mine;
        n->exempt = 0;
        if (!mine)
            n->in = 0;
        else
            n->tid = (int32_t)syscall(SYS_gettid);
    }
    bn_gate_word &= ~BN_GATE_CLOSED;
}
