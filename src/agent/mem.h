/* Memory and search trees for the agent's tables. No malloc: the application's allocator may be anything, and may itself be
 * what is calling us. Not locked: whoever owns the table locks. */
#pragma once

#include <stddef.h>
#include <stdint.h>

/* Objects of one size, from anonymous mappings. Zero `cur` and `slabs` at start. */
struct bn_pool {
    size_t size; /* bytes of an object, at least 8 */
    void *free_list;
    char *cur, *end;
    void *slabs;
};

/* A zeroed object, or NULL. */
void *bn_pool_get(struct bn_pool *p);
void bn_pool_put(struct bn_pool *p, void *object); /* NULL is fine */
/* Unmap everything: all objects are gone. */
void bn_pool_drop(struct bn_pool *p);

/* A treap: embed a node, keys are unique within a tree. */
struct bn_node {
    struct bn_node *left, *right;
    uint64_t key;
    uint32_t prio;
};
struct bn_tree {
    struct bn_node *root;
    size_t count;
};

/* The key must not be in the tree yet. */
void bn_tree_insert(struct bn_tree *t, struct bn_node *n, uint64_t key);
void bn_tree_remove(struct bn_tree *t, struct bn_node *n);
struct bn_node *bn_tree_find(const struct bn_tree *t, uint64_t key);
struct bn_node *bn_tree_floor(const struct bn_tree *t, uint64_t key); /* greatest key <= */
struct bn_node *bn_tree_ceil(const struct bn_tree *t, uint64_t key);  /* least key >= */

/* Each node in order of keys; the current one may be removed by the body. */
#define BN_TREE_EACH(tree, n)                                    \
    for (struct bn_node *n = bn_tree_ceil((tree), 0), *n##_next; \
         n && ((n##_next = bn_tree_ceil((tree), n->key + 1)), 1); n = n##_next)

#define BN_CONTAINER(node, type, member)                                       \
    ({                                                                         \
        struct bn_node *bn_node_ = (node);                                     \
        bn_node_ ? (type *)((char *)bn_node_ - offsetof(type, member)) : NULL; \
    })
