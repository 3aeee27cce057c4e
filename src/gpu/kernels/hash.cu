/* Bennu's hash on a GPU: the same value as src/image/hash.c, one block of 512 threads a chunk of 2 MiB.
 *
 * Thread t is lane t of docs/image-format.md: a warp has a strip of 128 KiB and reads 512 bytes of it at a time, each thread 16.
 * hash.ptx is made of this file by make-ptx beside it; to use it takes no CUDA toolkit, only a driver.
 *
 * The material is `struct bn_hash_material` of src/image/hash.h as it lies in memory.
 */
#include <stdint.h>

#define PASSES 4
#define ROWS   256
#define LANES  512
#define ROUNDS 8
#define AHEAD  8 /* rows in flight: 8 x 16 bytes a thread, 64 KiB a block */

struct material {
    uint4 nh[ROWS + PASSES];
    uint64_t lanes[PASSES][2][LANES];
    uint64_t length[PASSES];
    uint64_t add[PASSES];
    uint32_t last[ROUNDS + 1][4];
};
static_assert(sizeof(material) == 37136, "the layout is part of the format");

__device__ __forceinline__ void nh_add(uint64_t &sum, const uint4 &d, const uint4 &k) {
    sum += (uint64_t)(d.x + k.x) * (uint32_t)(d.y + k.y);
    sum += (uint64_t)(d.z + k.z) * (uint32_t)(d.w + k.w);
}

__device__ __forceinline__ uint32_t rotl(uint32_t v, int n) {
    return __funnelshift_l(v, v, n);
}

__device__ __forceinline__ void quarter_round(uint32_t *x) {
    x[0] += x[1], x[3] = rotl(x[3] ^ x[0], 16);
    x[2] += x[3], x[1] = rotl(x[1] ^ x[2], 12);
    x[0] += x[1], x[3] = rotl(x[3] ^ x[0], 8);
    x[2] += x[3], x[1] = rotl(x[1] ^ x[2], 7);
}

struct scratch {
    uint4 nh[ROWS + PASSES];
    uint64_t parts[LANES / 32][PASSES];
};

__device__ __forceinline__ void hash_chunk(scratch &s, const uint4 *chunk, const material *m, uint4 *out) {
    const unsigned t = threadIdx.x;
    if (t < ROWS + PASSES)
        s.nh[t] = m->nh[t];
    __syncthreads();

    /* First level. Keys slide: row r of pass p uses nh[r + p]. */
    const uint4 *p = chunk + (t / 32) * (ROWS * 32) + t % 32;
    uint64_t sum[PASSES] = {0, 0, 0, 0};
    uint4 k0 = s.nh[0], k1 = s.nh[1], k2 = s.nh[2];
    for (int row = 0; row < ROWS; row += AHEAD) {
        uint4 d[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            d[i] = __ldcs(p + (row + i) * 32); /* read once: leave the caches to others */
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            uint4 k3 = s.nh[row + i + 3];
            nh_add(sum[0], d[i], k0);
            nh_add(sum[1], d[i], k1);
            nh_add(sum[2], d[i], k2);
            nh_add(sum[3], d[i], k3);
            k0 = k1, k1 = k2, k2 = k3;
        }
    }

    /* Second level: this lane's share, then the sum over all lanes. */
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        uint64_t v = m->lanes[pass][0][t] * (uint32_t)sum[pass] + m->lanes[pass][1][t] * (sum[pass] >> 32);
        for (int step = 16; step > 0; step /= 2)
            v += __shfl_down_sync(0xffffffff, v, step);
        if (t % 32 == 0)
            s.parts[t / 32][pass] = v;
    }
    __syncthreads();
    if (t != 0)
        return;
    uint32_t x[PASSES];
    for (int pass = 0; pass < PASSES; pass++) {
        uint64_t total = m->add[pass] + m->length[pass] * (2u << 20);
        for (int i = 0; i < LANES / 32; i++)
            total += s.parts[i][pass];
        x[pass] = (uint32_t)(total >> 32);
    }
    for (int i = 0; i < ROUNDS; i++) {
        for (int w = 0; w < 4; w++)
            x[w] ^= m->last[i][w];
        quarter_round(x);
    }
    *out = make_uint4(x[0] ^ m->last[ROUNDS][0], x[1] ^ m->last[ROUNDS][1], x[2] ^ m->last[ROUNDS][2],
                      x[3] ^ m->last[ROUNDS][3]);
}

/* Chunks one behind the other, `stride` bytes (a multiple of 16) from the beginning of one to the next. Grid: a block a chunk. */
extern "C" __global__ void __launch_bounds__(LANES, 2)
    bn_hash_range(const uint8_t *base, uint64_t stride, const material *m, uint4 *out) {
    __shared__ scratch s;
    hash_chunk(s, (const uint4 *)(base + blockIdx.x * stride), m, out + blockIdx.x);
}

/* Chunks anywhere: an array of their addresses, aligned to 16 bytes. */
extern "C" __global__ void __launch_bounds__(LANES, 2)
    bn_hash_list(const uint64_t *chunks, const material *m, uint4 *out) {
    __shared__ scratch s;
    hash_chunk(s, (const uint4 *)chunks[blockIdx.x], m, out + blockIdx.x);
}
