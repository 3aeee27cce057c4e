/* --trace FILE: what was done when, in Chrome's trace format, for Perfetto and chrome://tracing. */
#include "cli/cli.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "image/protobuf.h"
#include "wire/trace.h"

#include <fcntl.h>
#include <libgen.h>
#include <pthread.h>
#include <string.h>
#include <sys/stat.h>

enum { OURS = 1, DAEMON, CRIU }; /* "processes" of the picture; their lanes are its "threads" */
#define LANES_MAX 16u
#define PART_LANE 100

const char *cli_trace_file;

static struct {
    const char *command;
    int dir; /* of the file */
    char *name;
    uint64_t began_ns;
    struct {
        uint64_t began_ns, took_ns;
        json_t *stats;
    } criu;
    pthread_mutex_t lock;
    struct bn_trace *session; /* as the daemon told it; NULL: it has not */
} trace = {.dir = -1, .lock = PTHREAD_MUTEX_INITIALIZER};

int cli_trace_open(const char *command, struct bn_error *err)
{
    if (!cli_trace_file)
        return 0;
    bn_auto_free char *folder = strdup(cli_trace_file), *name = strdup(cli_trace_file);
    trace.name = folder && name ? strdup(basename(name)) : NULL;
    if (!trace.name)
        return bn_error_set(err, ENOMEM, "trace", "out of memory");
    trace.dir = open(dirname(folder), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct stat st;
    if (trace.dir < 0)
        return bn_error_set(err, errno, "trace", "cannot write %s: no folder %s (%m)", cli_trace_file,
                            folder);
    if (faccessat(trace.dir, ".", W_OK | X_OK, AT_EACCESS) < 0)
        return bn_error_set(err, errno, "trace", "cannot write %s: %m", cli_trace_file);
    if (fstatat(trace.dir, trace.name, &st, 0) == 0 && !S_ISREG(st.st_mode))
        return bn_error_set(err, EISDIR, "trace", "cannot write %s: it is there and no regular file",
                            cli_trace_file);
    trace.command = command;
    trace.began_ns = bn_now_ns();
    return 0;
}

void cli_trace_event(const struct bn_ctl_head *head, struct bn_reader *body)
{
    if (head->type != BN_CTL_EV_TRACE || !trace.command)
        return;
    struct bn_trace *t = calloc(1, sizeof(*t));
    if (t)
        bn_read_trace(body, t);
    if (!t || body->failed) {
        free(t);
        return;
    }
    pthread_mutex_lock(&trace.lock);
    free(trace.session);
    trace.session = t;
    pthread_mutex_unlock(&trace.lock);
}

/* ---- CRIU's own statistics: durations, without a place in time ---- */

#define STATS_MAX 65536u

static const struct stats_field {
    uint32_t kind, field; /* 1: of a dump, 2: of a restore */
    const char *name;
} stats_fields[] = {
    {1, 1, "freezing_us"},   {1, 2, "frozen_us"},  {1, 3, "memdump_us"}, {1, 4, "memwrite_us"},
    {1, 7, "pages_written"}, {2, 3, "forking_us"}, {2, 4, "restore_us"}, {2, 5, "pages_restored"},
};

static void read_fields(uint32_t kind, struct bn_reader *r, json_t *out)
{
    struct bn_pb_field f;
    while (bn_reader_left(r) > 0 && bn_pb_next(r, &f))
        for (size_t i = 0; i < BN_ARRAY_SIZE(stats_fields); i++)
            if (stats_fields[i].kind == kind && stats_fields[i].field == f.number && !f.has_body)
                json_object_set_new(out, stats_fields[i].name, json_integer((json_int_t)f.value));
}

/* Two magic numbers, the size, and a message that holds one of two: criu's images/stats.proto. */
static json_t *read_stats(int dir, const char *file)
{
    bn_auto_free void *bytes = NULL;
    size_t len = 0;
    json_t *out = json_object();
    if (bn_read_file_at(dir, file, STATS_MAX, &bytes, &len) < 0)
        return out;
    struct bn_reader r = bn_reader_init(bytes, len);
    bn_read_u64(&r);
    bn_read_u32(&r);
    struct bn_pb_field f;
    while (bn_reader_left(&r) > 0 && bn_pb_next(&r, &f))
        read_fields((uint32_t)f.number, &f.body, out);
    return out;
}

void cli_trace_criu(uint64_t began_ns, uint64_t took_ns, int dir, const char *stats)
{
    if (!trace.command)
        return;
    trace.criu.began_ns = began_ns;
    trace.criu.took_ns = took_ns;
    trace.criu.stats = read_stats(dir, stats);
}

/* ---- writing ---- */

static void add_name(json_t *all, int pid, int tid, const char *what, const char *name)
{
    json_array_append_new(all, json_pack("{s:s, s:s, s:i, s:i, s:{s:s}}", "ph", "M", "name", what, "pid", pid,
                                         "tid", tid, "args", "name", name));
}

/* Consumes `args` (may be NULL). */
static void add_event(json_t *all, int pid, int tid, const char *name, uint64_t start_ns, uint64_t took_ns,
                      json_t *args)
{
    char clean[32];
    snprintf(clean, sizeof(clean), "%s", name);
    json_array_append_new(all,
                          json_pack("{s:s, s:s, s:i, s:i, s:f, s:f, s:o}", "ph", "X", "name",
                                    cli_clean(clean), "pid", pid, "tid", tid, "ts", (double)start_ns / 1e3,
                                    "dur", (double)took_ns / 1e3, "args", args ? args : json_object()));
}

static json_t *bytes_of(uint64_t bytes)
{
    return bytes ? json_pack("{s:I}", "bytes", (json_int_t)bytes) : NULL;
}

/* Phases overlap; in one lane they may only lie behind or inside each other. They come in the order of their beginnings. */
static void add_phases(json_t *all, const struct bn_trace *t)
{
    uint64_t ends[LANES_MAX] = {0};
    for (uint32_t i = 0; i < t->phases.n; i++) {
        const struct bn_phase *p = &t->phases.phase[i];
        unsigned lane = 0;
        while (lane + 1 < LANES_MAX && ends[lane] > p->start_ns)
            lane++;
        ends[lane] = p->start_ns + p->duration_ns;
        add_event(all, DAEMON, (int)lane + 1, p->name, t->began_ns + p->start_ns, p->duration_ns,
                  bytes_of(p->bytes));
    }
}

static void add_parts(json_t *all, const struct bn_trace *t)
{
    for (uint32_t i = 0; i < t->n; i++) {
        const struct bn_trace_part *p = &t->parts[i];
        char name[96];
        if (strcmp(p->name, "criu") == 0) {
            add_event(all, CRIU, 2, "processes", t->began_ns + p->start_ns, p->duration_ns, NULL);
            continue;
        }
        snprintf(name, sizeof(name), "process %u, GPU %u", p->pid, p->gpu);
        add_name(all, DAEMON, PART_LANE + (int)i, "thread_name", name);
        snprintf(name, sizeof(name), "%s", p->name);
        add_event(all, DAEMON, PART_LANE + (int)i, name, t->began_ns + p->start_ns, p->duration_ns,
                  json_pack("{s:I, s:i, s:i}", "bytes", (json_int_t)p->bytes, "process", (int)p->pid, "gpu",
                            (int)p->gpu));
    }
}

static json_t *all_events(uint64_t now)
{
    json_t *all = json_array();
    char name[64];
    snprintf(name, sizeof(name), "bennu %s", trace.command);
    add_name(all, OURS, 1, "process_name", name);
    add_name(all, DAEMON, 1, "process_name", "bennud");
    add_event(all, OURS, 1, trace.command, trace.began_ns, now - trace.began_ns, NULL);
    if (trace.criu.took_ns) {
        add_name(all, CRIU, 1, "process_name", "CRIU");
        add_event(all, CRIU, 1, "criu", trace.criu.began_ns, trace.criu.took_ns, trace.criu.stats);
        trace.criu.stats = NULL;
    }
    pthread_mutex_lock(&trace.lock);
    if (trace.session) {
        add_phases(all, trace.session);
        add_parts(all, trace.session);
    }
    pthread_mutex_unlock(&trace.lock);
    return all;
}

/* One event a line, so that it can be read and compared. */
static char *text_of(json_t *all)
{
    char *out = NULL;
    size_t len = 0, i;
    json_t *e;
    FILE *f = open_memstream(&out, &len);
    if (!f)
        return NULL;
    fputc('[', f);
    json_array_foreach(all, i, e)
    {
        fputs(i ? ",\n" : "\n", f);
        json_dumpf(e, f, JSON_COMPACT | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(16));
    }
    fputs("\n]\n", f);
    if (fclose(f) != 0) {
        free(out);
        return NULL;
    }
    return out;
}

int cli_trace_end(int exit_code, struct bn_error *err)
{
    if (!trace.command)
        return exit_code;
    json_t *all = all_events(bn_now_ns());
    bn_auto_free char *text = text_of(all);
    json_decref(all);
    int r = text ? bn_write_file_atomic_at(trace.dir, trace.name, text, strlen(text)) : -ENOMEM;
    const char *command = trace.command;
    trace.dir = bn_close(trace.dir);
    free(trace.name);
    free(trace.session);
    trace.name = NULL;
    trace.session = NULL;
    trace.command = NULL;
    if (r == 0 || exit_code != CLI_OK)
        return exit_code;
    bn_error_set(err, r, "trace", "the %s is done, but %s cannot be written: %s", command, cli_trace_file,
                 strerror(-r));
    return CLI_FAILED;
}
