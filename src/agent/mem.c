#include "agent/mem.h"

#include <string.h>
#include <sys/mman.h>

#define SLAB (64u * 1024u)

void *bn_pool_get(struct bn_pool *p)
{
    if (p->free_list) {
        void *object = p->free_list;
        memcpy(&p->free_list, object, sizeof(void *));
        return memset(object, 0, p->size);
    }
    if ((size_t)(p->end - p->cur) < p->size) {
        char *slab = mmap(NULL, SLAB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (slab == MAP_FAILED)
            return NULL;
        memcpy(slab, &p->slabs, sizeof(void *));
        p->slabs = slab;
        p->cur = slab + 64;
        p->end = slab + SLAB;
    }
    void *object = p->cur;
    p->cur += p->size;
    return object;
}

void bn_pool_put(struct bn_pool *p, void *object)
{
    if (!object)
        return;
    memcpy(object, &p->free_list, sizeof(void *));
    p->free_list = object;
}

void bn_pool_drop(struct bn_pool *p)
{
    while (p->slabs) {
        void *slab = p->slabs;
        memcpy(&p->slabs, slab, sizeof(void *));
        munmap(slab, SLAB);
    }
    p->free_list = NULL;
    p->cur = p->end = NULL;
}

/* Spreads keys that come in order; balance needs no better randomness. */
static uint32_t prio_of(uint64_t key)
{
    key ^= key >> 33;
    key *= 0xff51afd7ed558ccdULL;
    key ^= key >> 33;
    key *= 0xc4ceb9fe1a85ec53ULL;
    return (uint32_t)(key >> 32);
}

void bn_tree_insert(struct bn_tree *t, struct bn_node *n, uint64_t key)
{
    n->key = key;
    n->prio = prio_of(key);
    struct bn_node **at = &t->root;
    while (*at && (*at)->prio >= n->prio)
        at = key < (*at)->key ? &(*at)->left : &(*at)->right;

    struct bn_node *rest = *at, **low = &n->left, **high = &n->right;
    while (rest) {
        if (rest->key < key) {
            *low = rest;
            low = &rest->right;
            rest = rest->right;
        } else {
            *high = rest;
            high = &rest->left;
            rest = rest->left;
        }
    }
    *low = *high = NULL;
    *at = n;
    t->count++;
}

void bn_tree_remove(struct bn_tree *t, struct bn_node *n)
{
    struct bn_node **at = &t->root;
    while (*at && *at != n)
        at = n->key < (*at)->key ? &(*at)->left : &(*at)->right;
    if (!*at)
        return;
    struct bn_node *a = n->left, *b = n->right;
    while (a && b) {
        if (a->prio >= b->prio) {
            *at = a;
            at = &a->right;
            a = a->right;
        } else {
            *at = b;
            at = &b->left;
            b = b->left;
        }
    }
    *at = a ? a : b;
    t->count--;
}

struct bn_node *bn_tree_find(const struct bn_tree *t, uint64_t key)
{
    struct bn_node *n = t->root;
    while (n && n->key != key)
        n = key < n->key ? n->left : n->right;
    return n;
}

struct bn_node *bn_tree_floor(const struct bn_tree *t, uint64_t key)
{
    struct bn_node *best = NULL;
    for (struct bn_node *n = t->root; n;) {
        if (n->key > key) {
            n = n->left;
        } else {
            best = n;
            n = n->right;
        }
    }
    return best;
}

struct bn_node *bn_tree_ceil(const struct bn_tree *t, uint64_t key)
{
    struct bn_node *best = NULL;
    for (struct bn_node *n = t->root; n;) {
        if (n->key < key) {
            n = n->right;
        } else {
            best = n;
            n = n->left;
        }
    }
    return best;
}
