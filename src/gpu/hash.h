/* Bennu's hash computed on a GPU: chunks of a set, where they lie. The value is that of image/hash.h.
 *
 * No device is believed: at its first use it hashes a few chunks of known content, and each value is compared with the
 * CPU's. A device whose driver cannot run the kernel, or whose values differ, is never used for hashing, and whoever
 * asked goes on with the CPU's hash. So an error in the kernel, or in a driver's compiler, costs time and no checkpoint.
 *
 * Any thread; one launch at a time on a device, on a stream of its own.
 */
#pragma once

#include "gpu/gpu.h"
#include "image/hash.h"

/* Can the device hash? The first call loads the kernel (the driver compiles it, and keeps the result in its cache) and
 * tests it; later ones only tell. 0; -ENOTSUP: no, as long as this process lives, err says why; other: not now (no
 * memory), a later call tries again. Keeps 2 MiB of the device's memory and as much of pinned host memory. */
int bn_gpu_hash_ready(struct bn_gpu *gpu, unsigned dev, struct bn_error *err);

/* Do not hash on this device from now on, for the reason `text` (at most BN_ERROR_TEXT_MAX bytes). */
void bn_gpu_hash_switch_off(struct bn_gpu *gpu, unsigned dev, const char *text);

/* Has the device been switched off for hashing? Then `why` (may be NULL) says what for. Tests nothing. */
bool bn_gpu_hash_off(struct bn_gpu *gpu, unsigned dev, struct bn_error *why);

/* Hash chunks first .. first + n - 1 of the set (each BN_GPU_CHUNK) under `key` into out[0 .. n), and wait for it.
 * -EINVAL: the set has not so many chunks; others as bn_gpu_hash_ready. A device that fails at it answers -ENOTSUP from
 * then on. Memory that is written meanwhile has some value or other, which is no chunk's unless by 2^-124. */
int bn_gpu_hash(struct bn_gpu *gpu, const struct bn_gpu_set *set, const struct bn_hash_key *key,
                uint64_t first, size_t n, struct bn_hash *out, struct bn_error *err);
