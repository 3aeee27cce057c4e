/* SPDX-License-Identifier: MIT */

/*
 * What the restore thread does at checkpoint and restore. Every other thread may be stopped anywhere, inside malloc
 * too, so there is no malloc and no stdio here; sim.lock is held by this thread since the Lock.
 */

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "sim.h"

#define PAGE 4096u

static struct {
    CUresult fate; /* what a restore will answer: decided at the checkpoint */
    void *state;   /* stands for the half gigabyte that the real driver keeps, mostly zero pages */
} save;

static bool own_device_memory(const struct phys *phys)
{
    return !phys->imported && phys->ordinal >= 0;
}

static bool all_zero(const void *page)
{
    const uint64_t *p = page;

    for (unsigned i = 0; i < PAGE / 8; i++)
        if (p[i])
            return false;
    return true;
}

static void drop_copies(void)
{
    for (struct phys *p = sim.physical_list; p; p = p->next)
        if (p->saved) {
            munmap(p->saved, p->size);
            p->saved = NULL;
        }
}

static struct map *mapping_of(const struct phys *phys, size_t *from)
{
    while (*from < sim.mappings.count) {
        struct map *map = (struct map *)sim.mappings.items[(*from)++];

        if (map->phys == phys)
            return map;
    }
    return NULL;
}

static char *put_hex(char *at, uint64_t value)
{
    int shift = 60;

    while (shift && !(value >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        *at++ = "0123456789abcdef"[value >> shift & 15];
    *at = '\0';
    return at;
}

/* A descriptor of native memory, to see where it has holes. Needs a capability; -1 without. */
static int open_mapping(const struct map *map)
{
    char path[80] = "/proc/self/map_files/";
    char *at = put_hex(path + strlen(path), map->r.start);

    *at++ = '-';
    put_hex(at, map->r.start + map->r.size);
    return open(path, O_RDONLY | O_CLOEXEC);
}

static bool copy_from_fd(int fd, char *to, uint64_t size)
{
    off_t data = 0, hole;

    while ((uint64_t)data < size && (data = lseek(fd, data, SEEK_DATA)) >= 0) {
        hole = lseek(fd, data, SEEK_HOLE);
        if (hole < 0)
            return false;
        while (data < hole) {
            ssize_t n = pread(fd, to + data, (size_t)(hole - data), data);

            if (n <= 0)
                return false;
            data += n;
        }
    }
    return true;
}

/* Into phys->saved, which is fresh and zero. */
static bool copy_out(struct phys *phys)
{
    size_t from = 0;
    const struct map *map = mapping_of(phys, &from);
    int fd = phys->fd;
    bool ok;

    if (fd < 0 && map)
        fd = open_mapping(map);
    if (fd >= 0) {
        ok = copy_from_fd(fd, phys->saved, phys->size);
        if (fd != phys->fd)
            close(fd);
        return ok;
    }
    if (!map)
        return false;
    for (uint64_t at = 0; at < phys->size; at += PAGE) {
        const char *page = (const char *)map->r.start + at;

        if (!all_zero(page))
            memcpy((char *)phys->saved + at, page, PAGE);
    }
    return true;
}

static void *anonymous(uint64_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return p == MAP_FAILED ? NULL : p;
}

static CUresult make_state(void)
{
    if (sim.state_size == 0)
        return CUDA_SUCCESS;
    save.state = anonymous(sim.state_size);
    if (!save.state)
        return CUDA_ERROR_OUT_OF_MEMORY;
    memset(save.state, 0, sim.state_size); /* present pages of zeros, not holes */
    for (uint64_t at = 0; at < sim.state_size; at += 100 * PAGE)
        memset((char *)save.state + at, 0x5a, PAGE);
    return CUDA_SUCCESS;
}

static void drop_state(void)
{
    if (save.state)
        munmap(save.state, sim.state_size);
    save.state = NULL;
}

CUresult save_checkpoint(void)
{
    CUresult rc = make_state();

    save.fate = CUDA_SUCCESS;
    for (struct phys *p = sim.physical_list; p && rc == CUDA_SUCCESS; p = p->next) {
        if (!own_device_memory(p))
            continue;
        p->saved = anonymous(p->size);
        if (!p->saved)
            rc = CUDA_ERROR_OUT_OF_MEMORY;
        else if (!copy_out(p))
            rc = CUDA_ERROR_OPERATING_SYSTEM;
    }
    if (rc != CUDA_SUCCESS) {
        drop_copies();
        drop_state();
        return rc;
    }
    for (struct phys *p = sim.physical_list; p; p = p->next) {
        size_t from = 0;
        struct map *map;

        if (p->imported)
            save.fate = CUDA_ERROR_NOT_SUPPORTED; /* the checkpoint succeeds, its restore will not */
        if (p->ordinal < 0) {
            if (p->maps && save.fate == CUDA_SUCCESS)
                save.fate = CUDA_ERROR_UNKNOWN;
            continue;
        }
        while ((map = mapping_of(p, &from)))
            space_clear(map->r.start, map->r.size);
        close_fd(&p->fd);
    }
    control_close_device();
    return CUDA_SUCCESS;
}

/* ---- Restore ---- */

static int machine_device(const CUuuid *uuid)
{
    CUuuid other;

    for (int i = 0; i < sim.machine_devices; i++) {
        device_uuid(i, &other);
        if (memcmp(&other, uuid, sizeof(other)) == 0)
            return i;
    }
    return -1;
}

/* Every device of the machine must be listed, also those that the process was not shown, or, in a container, those whose files it has and no
 * other; and no two may come to be one. (As measured with driver 580 on two H200.) */
static bool remap_devices(const CUcheckpointGpuPair *pairs, unsigned count, int physical[SIM_MAX_DEVICES])
{
    unsigned taken = 0, left = 0;

    memcpy(physical, sim.physical, sizeof(sim.physical));
    if (count == 0)
        return true;
    if (count != (unsigned)device_files())
        return false;
    for (unsigned i = 0; i < count; i++) {
        int from = machine_device(&pairs[i].oldUuid), to = machine_device(&pairs[i].newUuid);
        int ordinal = from < 0 ? -1 : phys_ordinal(from);

        if (from < 0 || to < 0 || !sim.has_file[from] || left >> from & 1 || taken >> to & 1)
            return false;
        left |= 1u << from;
        taken |= 1u << to;
        if (ordinal >= 0)
            physical[ordinal] = to;
    }
    for (int i = 0; i < sim.machine_devices; i++)
        sim.has_file[i] = taken >> i & 1;
    return true;
}

static CUresult copy_in(struct phys *phys, int fd)
{
    uint64_t at = 0, end;
    const char *from = phys->saved;

    while (at < phys->size) {
        if (all_zero(from + at)) {
            at += PAGE;
            continue;
        }
        for (end = at; end < phys->size && end - at < (1u << 20) && !all_zero(from + end);)
            end += PAGE;
        while (at < end) {
            ssize_t n = pwrite(fd, from + at, end - at, (off_t)at);

            if (n <= 0)
                return CUDA_ERROR_OPERATING_SYSTEM;
            at += (uint64_t)n;
        }
    }
    return CUDA_SUCCESS;
}

static CUresult bring_back(struct phys *phys, int fd)
{
    size_t from = 0;
    struct map *map;
    CUresult rc = copy_in(phys, fd);

    while (rc == CUDA_SUCCESS && (map = mapping_of(phys, &from)))
        if (map_mmap(map, fd) < 0)
            rc = CUDA_ERROR_OPERATING_SYSTEM;
    munmap(phys->saved, phys->size);
    phys->saved = NULL;
    if (phys->native)
        close(fd);
    else
        phys->fd = fd;
    return rc;
}

static CUresult bring_all_back(void)
{
    uint64_t need[SIM_MAX_DEVICES] = {0};
    CUresult rc = CUDA_SUCCESS;
    int lock = capacity_lock();

    for (struct phys *p = sim.physical_list; p; p = p->next)
        if (p->saved)
            need[sim.physical[p->ordinal]] += p->size;
    for (int i = 0; i < SIM_MAX_DEVICES; i++)
        if (need[i] && !capacity_take(lock, i, need[i]))
            rc = CUDA_ERROR_OUT_OF_MEMORY;
    for (struct phys *p = sim.physical_list; p && rc == CUDA_SUCCESS; p = p->next) {
        int fd;

        if (!p->saved)
            continue;
        fd = phys_memfd(sim.physical[p->ordinal], p->size);
        rc = fd < 0 ? CUDA_ERROR_OPERATING_SYSTEM : bring_back(p, fd);
    }
    if (lock >= 0)
        close(lock);
    return rc;
}

CUresult save_restore(const CUcheckpointGpuPair *pairs, unsigned count)
{
    int physical[SIM_MAX_DEVICES];
    CUresult rc;

    if (save.fate != CUDA_SUCCESS)
        return save.fate;
    if (!remap_devices(pairs, count, physical))
        return CUDA_ERROR_INVALID_VALUE;
    memcpy(sim.physical, physical, sizeof(physical));
    rc = bring_all_back();
    if (rc != CUDA_SUCCESS)
        return rc;
    drop_state();
    control_open_device();
    return CUDA_SUCCESS;
}
