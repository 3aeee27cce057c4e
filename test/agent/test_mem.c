/* The agent's pools and trees against an array that does the same slowly. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "agent/mem.h"

#define KEYS 512

struct item {
    struct bn_node node;
    uint64_t filler;
};

static uint32_t rng = 12345;
static uint32_t next_random(void)
{
    rng ^= rng << 13;
    rng ^= rng >> 17;
    rng ^= rng << 5;
    return rng;
}

static void check(const struct bn_tree *t, struct item *const present[KEYS])
{
    struct item *below = NULL;
    size_t count = 0;
    for (uint64_t key = 0; key < KEYS; key++) {
        if (present[key]) {
            below = present[key];
            count++;
        }
        struct bn_node *found = bn_tree_find(t, key), *floor = bn_tree_floor(t, key);
        assert_ptr_equal(found, present[key] ? &present[key]->node : NULL);
        assert_ptr_equal(floor, below ? &below->node : NULL);
    }
    struct item *above = NULL;
    for (uint64_t key = KEYS; key-- > 0;) {
        if (present[key])
            above = present[key];
        assert_ptr_equal(bn_tree_ceil(t, key), above ? &above->node : NULL);
    }
    assert_int_equal(t->count, count);
}

static void test_tree_like_array(void **state)
{
    struct bn_pool pool = {.size = sizeof(struct item)};
    struct bn_tree tree = {0};
    struct item *present[KEYS] = {0};
    for (int round = 0; round < 5000; round++) {
        uint64_t key = next_random() % KEYS;
        if (present[key]) {
            bn_tree_remove(&tree, &present[key]->node);
            bn_pool_put(&pool, present[key]);
            present[key] = NULL;
        } else {
            struct item *item = bn_pool_get(&pool);
            assert_non_null(item);
            assert_int_equal(item->filler, 0);
            item->filler = ~0ULL;
            bn_tree_insert(&tree, &item->node, key);
            present[key] = item;
        }
        if (round % 50 == 0)
            check(&tree, present);
    }
    check(&tree, present);
    bn_pool_drop(&pool);
}

static void test_each_allows_removal(void **state)
{
    struct bn_pool pool = {.size = sizeof(struct item)};
    struct bn_tree tree = {0};
    for (uint64_t key = 1; key <= 100; key++)
        bn_tree_insert(&tree, bn_pool_get(&pool), key);
    uint64_t expected = 1;
    BN_TREE_EACH(&tree, n)
    {
        assert_int_equal(n->key, expected++);
        if (n->key % 2)
            bn_tree_remove(&tree, n);
    }
    assert_int_equal(expected, 101);
    assert_int_equal(tree.count, 50);
    bn_pool_drop(&pool);
}

static void test_pool_many_slabs(void **state)
{
    enum { N = 5000 };
    struct bn_pool pool = {.size = 120};
    static char *objects[N];
    for (int i = 0; i < N; i++) {
        objects[i] = bn_pool_get(&pool);
        assert_non_null(objects[i]);
        memset(objects[i], i & 0xff, 120);
    }
    for (int i = 0; i < N; i++)
        for (int k = 0; k < 120; k++)
            assert_int_equal((unsigned char)objects[i][k], i & 0xff);
    bn_pool_put(&pool, objects[7]);
    char *again = bn_pool_get(&pool);
    assert_ptr_equal(again, objects[7]);
    for (int k = 0; k < 120; k++)
        assert_int_equal(again[k], 0);
    bn_pool_drop(&pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tree_like_array),
        cmocka_unit_test(test_each_allows_removal),
        cmocka_unit_test(test_pool_many_slabs),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
