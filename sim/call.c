/* SPDX-License-Identifier: MIT */

/* The door of every driver call: gate, initialisation, injected failures; cuInit itself. */

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "sim.h"

struct sim sim = {
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .changed = PTHREAD_COND_INITIALIZER,
    .maps = PTHREAD_RWLOCK_INITIALIZER,
    .next_id = 1,
};

static _Atomic bool initialised, forked;
static _Atomic int gate_closed; /* futex */
static _Atomic int inside;      /* calls past the gate; futex */

static long futex(_Atomic int *word, int op, int value, const struct timespec *timeout)
{
    return syscall(SYS_futex, word, op, value, timeout, NULL, 0);
}

uint64_t sim_now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/*
 * Nothing but two counters, so that a thread which a tracer stopped anywhere in here cannot keep the restore thread
 * from its work: a count that rises once the gate is closed is nobody's business any more.
 */
static void gate_enter(void)
{
    for (;;) {
        atomic_fetch_add(&inside, 1);
        if (!gate_closed)
            return;
        if (atomic_fetch_sub(&inside, 1) == 1)
            futex(&inside, FUTEX_WAKE_PRIVATE, INT_MAX, NULL);
        futex(&gate_closed, FUTEX_WAIT_PRIVATE, 1, NULL);
    }
}

static void gate_leave(void)
{
    if (atomic_fetch_sub(&inside, 1) == 1 && gate_closed)
        futex(&inside, FUTEX_WAKE_PRIVATE, INT_MAX, NULL);
}

void gate_close(void)
{
    gate_closed = 1;
}

void gate_open(void)
{
    gate_closed = 0;
    futex(&gate_closed, FUTEX_WAKE_PRIVATE, INT_MAX, NULL);
}

bool gate_wait_empty(uint64_t deadline_ns)
{
    int n;

    while ((n = inside) != 0) {
        struct timespec wait = {.tv_nsec = 20 * 1000 * 1000};

        if (deadline_ns && sim_now_ns() >= deadline_ns)
            return false;
        futex(&inside, FUTEX_WAIT_PRIVATE, n, &wait);
    }
    return true;
}

CUresult sim_enter(const char *name, unsigned flags)
{
    CUresult rc;

    if (forked)
        return CUDA_ERROR_NOT_INITIALIZED;
    fault_init();
    if (!(flags & CALL_UNGATED))
        gate_enter();
    rc = fault_check(name);
    if (rc == CUDA_SUCCESS && !(flags & CALL_EARLY) && !initialised)
        rc = CUDA_ERROR_NOT_INITIALIZED;
    if (rc != CUDA_SUCCESS)
        sim_leave(name, flags, rc);
    return rc;
}

CUresult sim_leave(const char *name, unsigned flags, CUresult rc)
{
    fault_trace(name, rc);
    if (!(flags & CALL_UNGATED))
        gate_leave();
    return rc;
}

int sim_high_fd(int fd)
{
    struct rlimit limit;
    int high;

    if (fd < 0)
        return fd;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur == RLIM_INFINITY || limit.rlim_cur > 8192)
        limit.rlim_cur = 8192;
    high = fcntl(fd, F_DUPFD_CLOEXEC, (int)(limit.rlim_cur / 2));
    if (high < 0)
        return fd; /* fine where it is */
    close(fd);
    return high;
}

static void after_fork_in_child(void)
{
    if (!initialised)
        return;
    forked = true;
    control_forked();
    for (struct phys *p = sim.physical_list; p; p = p->next)
        if (p->fd >= 0)
            close(p->fd);
}

static uint64_t parse_size(const char *text, uint64_t otherwise)
{
    char *end;
    uint64_t value;

    if (!text || !*text)
        return otherwise;
    value = strtoull(text, &end, 0);
    switch (*end) {
    case 'T':
    case 't': value <<= 10; /* fall through */
    case 'G':
    case 'g': value <<= 10; /* fall through */
    case 'M':
    case 'm': value <<= 10; /* fall through */
    case 'K':
    case 'k': value <<= 10;
    }
    return value ? value : otherwise;
}

/* The next number of a list with commas; -1 at its end, or where no number is. */
static long next_number(const char **list)
{
    char *end;
    long n = strtol(*list, &end, 10);

    if (end == *list)
        return -1;
    *list = *end == ',' ? end + 1 : end;
    return n;
}

/* Those whose device files are there: BENNU_SIM_FILES, or all. */
static void choose_files(void)
{
    const char *files = getenv("BENNU_SIM_FILES");
    long file;

    for (int i = 0; i < sim.machine_devices; i++)
        sim.has_file[i] = !files;
    while (files && (file = next_number(&files)) >= 0)
        if (file < sim.machine_devices)
            sim.has_file[file] = true;
}

int device_files(void)
{
    int n = 0;

    for (int i = 0; i < sim.machine_devices; i++)
        n += sim.has_file[i];
    return n;
}

/* CUDA_VISIBLE_DEVICES as a list of numbers; the first that is no device ends it, as with the real driver. */
static void choose_devices(void)
{
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    int found[SIM_MAX_DEVICES], count = 0;
    long n;

    for (int i = 0; i < sim.machine_devices; i++)
        if (sim.has_file[i])
            found[count++] = i;
    sim.devices = 0;
    while (sim.devices < count && (n = visible ? next_number(&visible) : sim.devices) >= 0 && n < count) {
        sim.physical[sim.devices] = sim.shown[sim.devices] = found[n];
        sim.devices++;
    }
}

static void read_environment(void)
{
    const char *devices = getenv("BENNU_SIM_DEVICES"), *version = getenv("BENNU_SIM_DRIVER_VERSION"),
               *mps = getenv("BENNU_SIM_MPS"), *strict = getenv("BENNU_SIM_STRICT"),
               *state = getenv("BENNU_SIM_STATE_MB"), *machine = getenv("BENNU_SIM_MACHINE");

    sim.machine_devices = devices ? atoi(devices) : 1;
    if (sim.machine_devices < 0)
        sim.machine_devices = 0;
    if (sim.machine_devices > SIM_MAX_DEVICES)
        sim.machine_devices = SIM_MAX_DEVICES;
    sim.memory = parse_size(getenv("BENNU_SIM_MEMORY"), 4ull << 30);
    sim.version = version && atoi(version) > 0 ? atoi(version) : 13000;
    sim.mps = mps && strcmp(mps, "1") == 0;
    sim.strict = !strict || strcmp(strict, "0") != 0;
    sim.state_size = (state ? strtoull(state, NULL, 10) : 16) << 20;
    for (size_t i = 0; machine && *machine && i + 1 < sizeof(sim.machine); machine++)
        if ((*machine >= '0' && *machine <= '9') || ((*machine | 32) >= 'a' && (*machine | 32) <= 'z') ||
            *machine == '-' || *machine == '_')
            sim.machine[i++] = *machine;
    choose_files();
    choose_devices();
}

SIM_FN(cuInit, CALL_EARLY, (unsigned flags), (flags))
{
    static bool handlers;

    if (flags != 0)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    if (initialised)
        return CUDA_SUCCESS;
    read_environment();
    if (sim.devices == 0)
        return CUDA_ERROR_NO_DEVICE;
    if (!handlers && pthread_atfork(NULL, NULL, after_fork_in_child) != 0)
        return CUDA_ERROR_OUT_OF_MEMORY;
    handlers = true;

    CUresult rc = control_start();

    if (rc == CUDA_SUCCESS)
        initialised = true;
    return rc;
}

SIM_FN(cuDriverGetVersion, CALL_EARLY | CALL_UNGATED, (int *version), (version))
{
    const char *text = getenv("BENNU_SIM_DRIVER_VERSION");

    if (!version)
        return CUDA_ERROR_INVALID_VALUE;
    *version = text && atoi(text) > 0 ? atoi(text) : 13000;
    return CUDA_SUCCESS;
}

SIM_EXPORT const char *cuda_sim_version(void);
SIM_EXPORT const char *cuda_sim_version(void)
{
    return "1";
}
