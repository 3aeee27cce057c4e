#include "image/manifest.h"

#include "base/cleanup.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

struct bn_manifest *bn_manifest_new(void)
{
    struct bn_manifest *m = calloc(1, sizeof(*m));
    struct timespec now = {0};
    if (!m)
        return NULL;
    if (bn_hash_key_random(m->key) < 0) {
        free(m);
        return NULL;
    }
    clock_gettime(CLOCK_REALTIME, &now);
    m->created_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    return m;
}

void bn_manifest_free(struct bn_manifest *m)
{
    if (!m)
        return;
    for (uint32_t i = 0; i < m->n_processes; i++)
        free(m->processes[i].segments);
    free(m->gpus);
    free(m->others);
    free(m->files);
    free(m->file_hashes);
    free(m->processes);
    free(m->chunks);
    free(m->packs);
    free(m->phases);
    free(m);
}

/* Room for one more record, zeroed. The capacity is the power of two from `n` on, so it need not be remembered. */
static void *append(void **array, uint32_t *n, size_t size, uint32_t max)
{
    if (*n >= max)
        return NULL;
    if (*n == 0 || (*n & (*n - 1)) == 0) {
        void *more = realloc(*array, (*n ? (size_t)*n * 2 : 1) * size);
        if (!more)
            return NULL;
        *array = more;
    }
    void *at = (char *)*array + (size_t)*n * size;
    memset(at, 0, size);
    (*n)++;
    return at;
}

struct bn_image_gpu *bn_manifest_add_gpu(struct bn_manifest *m)
{
    return append((void **)&m->gpus, &m->n_gpus, sizeof(*m->gpus), BN_MANIFEST_GPUS_MAX);
}

uint8_t (*bn_manifest_add_other(struct bn_manifest *m))[16]
{
    return append((void **)&m->others, &m->n_others, sizeof(*m->others), BN_MANIFEST_GPUS_MAX);
}

int bn_manifest_find_gpu(const struct bn_manifest *m, const uint8_t uuid[16])
{
    for (uint32_t g = 0; g < m->n_gpus; g++)
        if (memcmp(m->gpus[g].uuid, uuid, sizeof(m->gpus[g].uuid)) == 0)
            return (int)g;
    return -1;
}

struct bn_image_process *bn_manifest_add_process(struct bn_manifest *m)
{
    return append((void **)&m->processes, &m->n_processes, sizeof(*m->processes), BN_MANIFEST_PROCESSES_MAX);
}

struct bn_image_segment *bn_process_add_segment(struct bn_image_process *p)
{
    return append((void **)&p->segments, &p->n_segments, sizeof(*p->segments), BN_MANIFEST_SEGMENTS_MAX);
}

bool bn_image_file_name_ok(const char *name)
{
    size_t length = strlen(name);
    if (strcmp(name, BN_IMAGE_RECORD_NAME) == 0)
        return true;
    return length > 4 && length < BN_IMAGE_FILE_NAME_MAX && strcmp(name + length - 4, ".img") == 0 &&
           strncmp(name, "bennu-pack-", 11) != 0 && strcmp(name, BN_MANIFEST_NAME) != 0 && !strchr(name, '/');
}

int bn_manifest_add_file(struct bn_manifest *m, const char *name, uint64_t length)
{
    uint64_t pieces = bn_image_file_pieces(length);
    if (!bn_image_file_name_ok(name))
        return -EINVAL;
    if (m->n_files == BN_MANIFEST_FILES_MAX || pieces > BN_MANIFEST_CHUNKS_MAX - m->n_file_hashes)
        return -E2BIG;
    struct bn_hash *hashes =
        pieces ? reallocarray(m->file_hashes, m->n_file_hashes + pieces, sizeof(*hashes)) : NULL;
    if (pieces && !hashes)
        return -ENOMEM;
    if (hashes) {
        memset(&hashes[m->n_file_hashes], 0, pieces * sizeof(*hashes));
        m->file_hashes = hashes;
    }
    struct bn_image_file *f = append((void **)&m->files, &m->n_files, sizeof(*f), BN_MANIFEST_FILES_MAX);
    if (!f)
        return -ENOMEM;
    strcpy(f->name, name);
    f->length = length;
    f->first_hash = m->n_file_hashes;
    m->n_file_hashes += (uint32_t)pieces;
    return 0;
}

int bn_manifest_add_phase(struct bn_manifest *m, const char *name, uint64_t start_ns, uint64_t duration_ns,
                          uint64_t bytes)
{
    if (m->n_phases >= BN_MANIFEST_PHASES_MAX)
        return -E2BIG;
    struct bn_image_phase *p =
        append((void **)&m->phases, &m->n_phases, sizeof(*m->phases), BN_MANIFEST_PHASES_MAX);
    if (!p)
        return -ENOMEM;
    memcpy(p->name, name, strnlen(name, sizeof(p->name) - 1));
    p->start_ns = start_ns;
    p->duration_ns = duration_ns;
    p->bytes = bytes;
    return 0;
}

int bn_manifest_layout(struct bn_manifest *m, struct bn_error *err)
{
    uint64_t chunks = 0;
    for (uint32_t i = 0; i < m->n_processes; i++)
        for (uint32_t s = 0; s < m->processes[i].n_segments; s++) {
            struct bn_image_segment *seg = &m->processes[i].segments[s];
            if (seg->size == 0 || seg->size % BN_CHUNK_SIZE)
                return bn_error_set(err, EINVAL, "manifest",
                                    "segment %u of process %d has %llu bytes, no multiple of 2 MiB", s,
                                    m->processes[i].pid, (unsigned long long)seg->size);
            if (seg->size / BN_CHUNK_SIZE > BN_MANIFEST_CHUNKS_MAX - chunks)
                return bn_error_set(err, E2BIG, "manifest",
                                    "more than %u chunks of GPU memory in one checkpoint",
                                    BN_MANIFEST_CHUNKS_MAX);
            seg->first_chunk = (uint32_t)chunks;
            chunks += seg->size / BN_CHUNK_SIZE;
        }
    struct bn_image_chunk *table = calloc(chunks ? chunks : 1, sizeof(*table));
    if (!table)
        return bn_error_set(err, ENOMEM, "manifest", "out of memory for a table of %llu chunks",
                            (unsigned long long)chunks);
    free(m->chunks);
    m->chunks = table;
    m->n_chunks = (uint32_t)chunks;
    return 0;
}

uint64_t bn_manifest_bytes(const struct bn_manifest *m)
{
    return m->n_chunks * BN_CHUNK_SIZE;
}

uint64_t bn_manifest_stored_bytes(const struct bn_manifest *m)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < m->n_packs; i++)
        sum += m->packs[i].length;
    return sum;
}

const struct bn_image_process *bn_manifest_find_process(const struct bn_manifest *m,
                                                        const uint8_t instance[16], int32_t pid)
{
    static const uint8_t none[16];
    bool agent = instance && memcmp(instance, none, sizeof(none)) != 0;
    for (uint32_t i = 0; i < m->n_processes; i++) {
        const struct bn_image_process *p = &m->processes[i];
        if (agent ? memcmp(p->instance, instance, sizeof(none)) == 0
                  : p->pid == pid && memcmp(p->instance, none, sizeof(none)) == 0)
            return p;
    }
    return NULL;
}

bool bn_manifest_chunk_owner(const struct bn_manifest *m, uint32_t chunk, struct bn_chunk_owner *out)
{
    for (uint32_t i = 0; i < m->n_processes; i++) {
        const struct bn_image_process *p = &m->processes[i];
        if (p->n_segments == 0)
            continue;
        const struct bn_image_segment *last = &p->segments[p->n_segments - 1];
        if (chunk >= last->first_chunk + bn_segment_chunks(last))
            continue;
        uint32_t low = 0, high = p->n_segments; /* the last segment that begins at or before the chunk */
        while (high - low > 1) {
            uint32_t mid = low + (high - low) / 2;
            if (p->segments[mid].first_chunk <= chunk)
                low = mid;
            else
                high = mid;
        }
        const struct bn_image_segment *s = &p->segments[low];
        if (chunk < s->first_chunk)
            return false;
        *out = (struct bn_chunk_owner){p, s, low, (chunk - s->first_chunk) * BN_CHUNK_SIZE};
        return true;
    }
    return false;
}

const struct bn_image_pack *bn_manifest_find_pack(const struct bn_manifest *m, uint32_t index)
{
    uint32_t low = 0, high = m->n_packs;
    while (low < high) {
        uint32_t mid = low + (high - low) / 2;
        if (m->packs[mid].index == index)
            return &m->packs[mid];
        if (m->packs[mid].index < index)
            low = mid + 1;
        else
            high = mid;
    }
    return NULL;
}
