/* What the tests of src/gpu share. They run on the simulated driver ($BENNU_BUILD/sim/libcuda.so.1), or on
 * the driver that BENNU_TEST_DRIVER names, where the tests of injected failures skip themselves. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/cleanup.h"
#include "base/error.h"
#include "gpu/gpu.h"

#include <sys/types.h>

#define MIB (UINT64_C(1) << 20)

extern struct bn_gpu *gpu;

/* cmocka group set-up and tear-down: opens and closes `gpu`. */
int open_gpu(void **state);
int close_gpu(void **state);
const char *driver_path(void);

/* Rules of BENNU_SIM_FAIL for this process from now on; "" for none. Skips the test on a real driver. */
void inject(const char *rules);

/* Fails the test with the error's text unless r is 0 or more. */
#define assert_ok(r, err) check_ok((r), (err), __FILE__, __LINE__)
void check_ok(int r, const struct bn_error *err, const char *file, int line);
/* The call failed with this errno, and said something to a person. */
#define assert_fails(r, code, err) check_fails((r), (code), (err), __FILE__, __LINE__)
void check_fails(int r, int code, const struct bn_error *err, const char *file, int line);

uint64_t gpu_free(unsigned dev);
unsigned open_fds(void);

/* A set of n blocks of the given sizes (cycled), created. */
struct bn_gpu_set *make_set(unsigned dev, size_t n, const uint64_t *sizes, size_t nsizes);
/* The same memory once more, imported from duplicates of its descriptors. */
struct bn_gpu_set *import_again(struct bn_gpu_set *set);

/* Bytes that say where they belong: 64-bit words of seed, chunk and position. */
void pattern_fill(void *data, uint64_t seed, uint64_t chunk, unsigned nchunks);
int pattern_check(const void *data, uint64_t seed, uint64_t chunk, unsigned nchunks); /* 0 or -EILSEQ */
/* Through streamed jobs. */
int set_fill(struct bn_copier *copier, struct bn_gpu_set *set, uint64_t seed);
int set_check(struct bn_copier *copier, struct bn_gpu_set *set, uint64_t seed);

/* This program started again as `helper MODE`, with a SOCK_SEQPACKET socket on descriptor 3. `env` may be
 * NULL ("NAME=value"). */
struct child {
    pid_t pid;
    int sock;
};
struct child child_start(const char *mode, const char *env);
void child_end(struct child *c); /* closes the socket and waits; the test fails unless it exits with 0 */
void child_kill(struct child *c);
void say(int sock, const void *data, size_t len, const int *fds, size_t nfds);
size_t hear(int sock, void *data, size_t len, int *fds, size_t nfds); /* 0: the other side has ended */
