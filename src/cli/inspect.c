/* bennu inspect: what a checkpoint holds, and whether every byte of it is as it was written. */
#include "cli/cli.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "store/host_files.h"
#include "store/image_dir.h"
#include "store/pack.h"

#include <fcntl.h>
#include <string.h>
#include <time.h>

static bool json, verify;

static const struct cli_option options[] = {
    {"verify", 'v', CLI_FLAG, NULL, &verify,
     "read every stored chunk and CRIU's files, and compare their checksums"},
    {"json", 'j', CLI_FLAG, NULL, &json, "print the result as one JSON object"},
    {0},
};

struct totals {
    uint64_t bytes, stored, zero, same;
    uint32_t segments;
};

static struct totals sum_up(const struct bn_manifest *m)
{
    struct totals t = {.bytes = bn_manifest_bytes(m), .stored = bn_manifest_stored_bytes(m)};
    for (uint32_t i = 0; i < m->n_chunks; i++) {
        if (m->chunks[i].flags & BN_CHUNK_ZERO)
            t.zero += BN_CHUNK_SIZE;
    }
    for (uint32_t i = 0; i < m->n_processes; i++)
        t.segments += m->processes[i].n_segments;
    t.same = t.bytes > t.zero + t.stored ? t.bytes - t.zero - t.stored : 0;
    return t;
}

static uint64_t process_bytes(const struct bn_image_process *p)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < p->n_segments; i++)
        bytes += p->segments[i].size;
    return bytes;
}

static const char *path_name(const struct bn_image_process *p)
{
    return p->flags & BN_PROCESS_AGENT ? "agent" : p->flags & BN_PROCESS_DRIVER ? "driver" : "none";
}

static void uuid_text(const uint8_t u[16], char out[48])
{
    size_t n = (size_t)snprintf(out, 48, "GPU-");
    for (int i = 0; i < 16; i++)
        n += (size_t)snprintf(out + n, 48 - n, "%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "",
                              u[i]);
}

static void made_text(const struct bn_manifest *m, char out[32])
{
    time_t seconds = (time_t)(m->created_ns / 1000000000);
    struct tm tm;
    if (!gmtime_r(&seconds, &tm) || strftime(out, 32, "%Y-%m-%dT%H:%M:%SZ", &tm) == 0)
        snprintf(out, 32, "unknown");
}

static struct bn_phases phases_of(const struct bn_manifest *m, uint64_t *end)
{
    struct bn_phases phases = {0};
    *end = 0;
    for (uint32_t i = 0; i < m->n_phases; i++) {
        const struct bn_image_phase *p = &m->phases[i];
        cli_add_phase(&phases, p->name, p->start_ns, p->duration_ns);
        if (phases.n == i + 1)
            phases.phase[i].bytes = p->bytes;
        if (p->start_ns + p->duration_ns > *end)
            *end = p->start_ns + p->duration_ns;
    }
    return phases;
}

static double percent(uint64_t part, uint64_t all)
{
    return all ? 100.0 * (double)part / (double)all : 0;
}

static void print_text(const char *path, struct bn_manifest *m)
{
    struct totals t = sum_up(m);
    char a[16], b[16], made[32], uuid[48];
    made_text(m, made);
    printf("checkpoint  %s\nmade        %s by Bennu %s on %s, CUDA driver %u.%u\n", path, made,
           cli_clean(m->bennu_version), cli_clean(m->host), m->driver_version / 1000,
           m->driver_version % 1000 / 10);
    printf("GPU memory  %s in %u segments; %s stored (%.1f %% zero, %.1f %% shared)\n", cli_bytes(t.bytes, a),
           t.segments, cli_bytes(t.stored, b), percent(t.zero, t.bytes), percent(t.same, t.bytes));
    for (uint32_t i = 0; i < m->n_gpus; i++) {
        struct bn_image_gpu *g = &m->gpus[i];
        uuid_text(g->uuid, uuid);
        printf("GPU %-7u %s, compute capability %u.%u, %s, %s\n", i, cli_clean(g->name), g->cc_major,
               g->cc_minor, cli_bytes(g->bytes, a), uuid);
    }
    printf("\n%7s %-15s %-7s %9s %10s\n", "PID", "COMMAND", "PATH", "SEGMENTS", "BYTES");
    for (uint32_t i = 0; i < m->n_processes; i++) {
        struct bn_image_process *p = &m->processes[i];
        printf("%7d %-15s %-7s %9u %10s\n", p->pid, cli_clean(p->comm), path_name(p), p->n_segments,
               cli_bytes(process_bytes(p), a));
    }
    uint64_t end;
    struct bn_phases phases = phases_of(m, &end);
    if (phases.n) {
        putchar('\n');
        cli_print_phases(stdout, &phases, end);
    }
}

static void set_string(json_t *o, const char *key, const char *text)
{
    json_t *s = json_string(text);
    json_object_set_new(o, key, s ? s : json_null()); /* null: not UTF-8 */
}

static json_t *json_gpus(const struct bn_manifest *m)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < m->n_gpus; i++) {
        char uuid[48], cc[24];
        uuid_text(m->gpus[i].uuid, uuid);
        snprintf(cc, sizeof(cc), "%u.%u", m->gpus[i].cc_major, m->gpus[i].cc_minor);
        json_t *g = json_object();
        set_string(g, "name", m->gpus[i].name);
        set_string(g, "uuid", uuid);
        set_string(g, "compute_capability", cc);
        json_object_set_new(g, "bytes", json_integer((json_int_t)m->gpus[i].bytes));
        json_array_append_new(list, g);
    }
    return list;
}

static json_t *json_processes(const struct bn_manifest *m)
{
    json_t *list = json_array();
    for (uint32_t i = 0; i < m->n_processes; i++) {
        const struct bn_image_process *p = &m->processes[i];
        json_t *o = json_object();
        json_object_set_new(o, "pid", json_integer(p->pid));
        set_string(o, "command", p->comm);
        set_string(o, "path", path_name(p));
        json_object_set_new(o, "segments", json_integer(p->n_segments));
        json_object_set_new(o, "bytes", json_integer((json_int_t)process_bytes(p)));
        json_array_append_new(list, o);
    }
    return list;
}

static void print_json(const char *path, const struct bn_manifest *m)
{
    struct totals t = sum_up(m);
    uint64_t end;
    char made[32];
    made_text(m, made);
    struct bn_phases phases = phases_of(m, &end);
    json_t *o = cli_json_ok();
    set_string(o, "directory", path);
    set_string(o, "made", made);
    set_string(o, "bennu_version", m->bennu_version);
    set_string(o, "host", m->host);
    json_object_set_new(o, "driver_version", json_integer(m->driver_version));
    json_object_set_new(o, "gpu_bytes", json_integer((json_int_t)t.bytes));
    json_object_set_new(o, "stored_bytes", json_integer((json_int_t)t.stored));
    json_object_set_new(o, "zero_bytes", json_integer((json_int_t)t.zero));
    json_object_set_new(o, "shared_bytes", json_integer((json_int_t)t.same));
    json_object_set_new(o, "segments", json_integer(t.segments));
    json_object_set_new(o, "verified", json_boolean(verify));
    json_object_set_new(o, "gpus", json_gpus(m));
    json_object_set_new(o, "processes", json_processes(m));
    json_object_set_new(o, "phases", cli_json_phases(&phases));
    cli_print_json(o);
}

static int verify_chunks(int dir, const struct bn_manifest *m, struct bn_error *err)
{
    struct bn_pack_reader *reader = NULL;
    bn_auto_free void *buf = aligned_alloc(BN_PACK_ALIGN, BN_CHUNK_SIZE);
    if (!buf)
        return bn_error_set(err, ENOMEM, "verify", "out of memory");
    int r = bn_pack_reader_open(dir, m, &reader, err);
    if (r < 0)
        return r;
    struct cli_progress *progress = cli_progress_new("verify");
    for (uint32_t i = 0; r == 0 && i < m->n_chunks; i++) {
        struct bn_progress now = {
            .phase = "verify", .done = i * BN_CHUNK_SIZE, .total = m->n_chunks * BN_CHUNK_SIZE};
        cli_progress_update(progress, &now);
        if (!(m->chunks[i].flags & BN_CHUNK_ZERO))
            r = bn_pack_reader_read(reader, i, buf, err);
    }
    cli_progress_free(progress);
    bn_pack_reader_free(reader);
    return r;
}

/* Without a manifest: say which of several things this is. Returns an exit code. */
static int explain(const char *path, int dir, struct bn_error *err)
{
    struct cli_record record;
    int r = cli_record_read(dir, &record);
    bool gpu = r == 0 && record.gpu;
    if (r == 0)
        cli_record_free(&record);
    *err = BN_ERROR_INIT;
    if (gpu)
        bn_error_set(err, EBADMSG, "image",
                     "the checkpoint %s is not complete: its dump was cut off before %s was written", path,
                     BN_MANIFEST_NAME);
    else if (bn_image_has_criu(dir) == 1)
        bn_error_set(err, ENOENT, "image",
                     "%s is a checkpoint of CRIU's without GPU memory in it that Bennu saved", path);
    else
        bn_error_set(err, EBADMSG, "image", "%s is not a checkpoint: it has no %s", path, BN_MANIFEST_NAME);
    return CLI_BAD_IMAGE;
}

static int check_criu_half(const char *path, int dir, struct bn_error *err)
{
    if (bn_image_has_criu(dir) == 1)
        return 0;
    return bn_error_set(err, EBADMSG, "image", "the checkpoint %s is damaged: CRIU's %s is missing", path,
                        CLI_INVENTORY);
}

static int inspect(int argc, char **argv)
{
    struct bn_error err = BN_ERROR_INIT;
    bn_auto_manifest struct bn_manifest *m = NULL;
    bn_auto_fd dir = open(argv[0], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0) {
        int code = errno == ENOTDIR ? CLI_BAD_IMAGE : CLI_FAILED;
        bn_error_set(&err, errno, "directory", "cannot open the checkpoint %s: %m", argv[0]);
        return cli_fail(code, &err, json);
    }
    struct bn_error busy = BN_ERROR_INIT; /* without locks it goes as well */
    bn_auto_fd lock = bn_image_lock(dir, false, &busy);
    if (lock == -EBUSY) {
        bn_error_set(&err, EBUSY, busy.stage, "%s: %s", argv[0], busy.text);
        return cli_fail(CLI_FAILED, &err, json);
    }
    int r = bn_image_load(dir, &m, &err);
    if (r == -ENOENT)
        return cli_fail(explain(argv[0], dir, &err), &err, json);
    if (r == 0)
        r = check_criu_half(argv[0], dir, &err);
    if (r == 0 && verify)
        r = verify_chunks(dir, m, &err);
    if (r == 0 && verify)
        r = bn_host_files_check(dir, m, BN_HOST_FILES_ALL, 0, NULL, NULL, &err);
    if (r < 0) {
        bool image = r == -EBADMSG || r == -EPROTONOSUPPORT || r == -ENOENT || r == -EILSEQ;
        return cli_fail(image ? CLI_BAD_IMAGE : CLI_FAILED, &err, json);
    }
    if (json) {
        print_json(argv[0], m);
    } else {
        print_text(argv[0], m);
        if (verify)
            puts("\nevery stored chunk and each of CRIU's files is as it was written");
    }
    return CLI_OK;
}

const struct cli_command cli_inspect = {
    .name = "inspect",
    .operands = "DIR",
    .summary = "Say what a checkpoint holds",
    .options = options,
    .min = 1,
    .max = 1,
    .needed = "one operand is needed: DIR",
    .run = inspect,
};
