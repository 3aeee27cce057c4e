/* Bennu's hash: 128 bits over a chunk of GPU memory, keyed, with one value on CPU and GPU.
 *
 * docs/image-format.md §Hash is the specification and holds the account of collision odds. In short: 512 lanes, each an
 * NH sum (32 x 32 -> 64 bit products) over every 32nd 16-byte word of one 128 KiB strip, four times with shifted key material;
 * the lanes are put together by a multilinear hash, and a keyed permutation ends it. Two different chunks have the same
 * value with a probability of at most 2^-124 over the choice of the key.
 *
 * It is not a message authentication code: whoever knows the key can make two chunks with one value.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BN_HASH_SIZE 16u                      /* bytes of a value */
#define BN_HASH_KEY_SIZE 16u                  /* bytes of a key */
#define BN_HASH_LENGTH_MAX ((size_t)2u << 20) /* bytes that bn_hash_chunk takes: one chunk */

/* Shape of the first level. */
#define BN_HASH_WORD 16u  /* bytes a lane reads of each row */
#define BN_HASH_LANES 32u /* lanes of a strip; a row is 32 words of 16 bytes = 512 bytes */
#define BN_HASH_ROW (BN_HASH_WORD * BN_HASH_LANES)
#define BN_HASH_ROWS 256u  /* rows of a strip: 128 KiB */
#define BN_HASH_STRIPS 16u /* strips of a chunk: 2 MiB */
#define BN_HASH_PASSES 4u  /* independent results of each lane */
#define BN_HASH_ROUNDS 8u  /* of the last permutation */

struct bn_hash {
    uint8_t b[BN_HASH_SIZE];
};

/* What a key is expanded to. The layout is the kernel's too (src/gpu/kernels/hash.cu): 37,136 bytes, little endian, to be
 * copied to the GPU as it stands. */
struct bn_hash_material {
    uint32_t nh[BN_HASH_ROWS + BN_HASH_PASSES][4]; /* row r of pass p uses nh[r + p] */
    uint64_t lanes[BN_HASH_PASSES][2]
                  [BN_HASH_STRIPS * BN_HASH_LANES]; /* for the low and high half of each lane */
    uint64_t length[BN_HASH_PASSES];
    uint64_t add[BN_HASH_PASSES];
    uint32_t last[BN_HASH_ROUNDS + 1][4];
};
_Static_assert(sizeof(struct bn_hash_material) == 37136, "the layout is part of the format");

/* An expanded key. Immutable: any number of threads may use one. NULL: out of memory. The caller frees it. */
struct bn_hash_key;
struct bn_hash_key *bn_hash_key_new(const uint8_t key[BN_HASH_KEY_SIZE]);
void bn_hash_key_free(struct bn_hash_key *k);
/* The 16 bytes it was made from, and what they were expanded to; both live as long as the key. */
const uint8_t *bn_hash_key_bytes(const struct bn_hash_key *k);
const struct bn_hash_material *bn_hash_key_material(const struct bn_hash_key *k);

/* Fill a key with the kernel's random bytes. 0 or negative errno. Any thread. */
int bn_hash_key_random(uint8_t key[BN_HASH_KEY_SIZE]);

/* Hash `len` bytes, at most BN_HASH_LENGTH_MAX; any alignment, 32 bytes is quickest. Any thread. */
void bn_hash_chunk(const struct bn_hash_key *k, const void *data, size_t len, struct bn_hash *out);
/* The same value without vector instructions (tests, other processors). */
void bn_hash_chunk_portable(const struct bn_hash_key *k, const void *data, size_t len, struct bn_hash *out);

/* Hash any number of bytes: equal to bn_hash_chunk up to BN_HASH_LENGTH_MAX, a tree of such values beyond.
 * 0 or -ENOMEM. Any thread. */
int bn_hash_long(const uint8_t key[BN_HASH_KEY_SIZE], const void *data, size_t len, struct bn_hash *out);

bool bn_hash_equal(const struct bn_hash *a, const struct bn_hash *b);

/* True if every one of the `len` bytes is zero. Any alignment; any thread. */
bool bn_is_zero(const void *data, size_t len);
