/* bennu pre-dump: GPU memory is copied ahead of a dump, while the processes run. */
#include "cli/cli.h"

#include "base/cleanup.h"
#include "base/io.h"

#include <string.h>
#include <sys/socket.h>

static bool drop, json, quiet;
static const char *bandwidth;

static const struct cli_option options[] = {
    {"bandwidth", 'b', CLI_STRING, "BYTES", &bandwidth,
     "copy at most so many bytes a second, with K, M, G or T"},
    {"drop", 0, CLI_FLAG, NULL, &drop, "remove what an earlier pre-dump has copied"},
    {"json", 'j', CLI_FLAG, NULL, &json, "print the result as one JSON object"},
    {"quiet", 'q', CLI_FLAG, NULL, &quiet, "print nothing but errors"},
    {0},
};

int cli_parse_bandwidth(const char *text, uint64_t *out)
{
    static const char units[] = "KMGT";
    char *end = NULL;
    *out = 0;
    if (!text)
        return 0;
    errno = 0;
    unsigned long long n = *text >= '0' && *text <= '9' ? strtoull(text, &end, 10) : 0;
    const char *unit = end && *end ? strchr(units, *end) : NULL;
    unsigned shift = unit ? 10 * (unsigned)(unit - units + 1) : 0;
    if (!end || errno || n == 0 || (*end && (!unit || end[1])) || n > UINT64_MAX >> shift)
        return -EINVAL;
    *out = (uint64_t)n << shift;
    return 0;
}

struct listener {
    int sock;
    struct cli_progress *progress;
    const struct cli_cancel *cancel;
};

/* Called ten times a second. To the daemon we have hung up then, so it stops; its answer still comes, when it has cleaned up. */
static void on_event(void *arg, const struct bn_ctl_head *head, struct bn_reader *body)
{
    struct listener *l = arg;
    cli_progress_event(l->progress, head, body);
    if (cli_cancel_signal(l->cancel))
        shutdown(l->sock, SHUT_WR);
}

int cli_prepare(int sock, pid_t pid, int dir, int parent, uint64_t per_second, unsigned level,
                struct cli_progress *progress, const struct cli_cancel *cancel, struct cli_ahead *out,
                struct bn_error *err)
{
    struct listener listener = {sock, progress, cancel};
    struct bn_reader reply;
    bn_auto_writer body = {0};
    bn_auto_free void *buf = malloc(BN_CTL_MSG_MAX);
    int fds[2], nfds = 0;
    if (!buf)
        return bn_error_set(err, ENOMEM, "pre-dump", "out of memory");
    if (dir >= 0)
        fds[nfds++] = dir;
    if (parent >= 0)
        fds[nfds++] = parent;
    bn_write_u32(&body, (uint32_t)pid);
    bn_write_u32(&body, level << BN_CTL_F_LEVEL_SHIFT | BN_CTL_F_PROGRESS | (dir >= 0 ? BN_CTL_F_FOLDER : 0) |
                            (parent >= 0 ? BN_CTL_F_PARENT : 0));
    bn_write_u64(&body, per_second);
    uint64_t began = bn_now_ns();
    int r =
        bn_ctl_call(sock, BN_CTL_PREPARE, &body, fds, (size_t)nfds, on_event, &listener, buf, &reply, err);
    if (r < 0)
        return r;
    out->took = bn_now_ns() - began;
    bn_read_phases(&reply, &out->phases);
    bn_read_prepare_reply(&reply, &out->result);
    return reply.failed ? bn_error_set(err, EBADMSG, "daemon",
                                       "bennud's answer makes no sense: are command and daemon of one "
                                       "version?")
                        : 0;
}

json_t *cli_json_ahead(const struct cli_ahead *a)
{
    json_t *o = json_object();
    json_object_set_new(o, "passes", json_integer(a->result.passes));
    json_object_set_new(o, "gpu_bytes", json_integer((json_int_t)a->result.gpu_bytes));
    json_object_set_new(o, "sent_bytes", json_integer((json_int_t)a->result.sent_bytes));
    json_object_set_new(o, "last_bytes", json_integer((json_int_t)a->result.last_bytes));
    json_object_set_new(o, "gate_closed_s", json_real((double)a->result.gate_ns / 1e9));
    json_object_set_new(o, "duration_s", json_real((double)a->took / 1e9));
    json_object_set_new(o, "phases", cli_json_phases(&a->phases));
    return o;
}

void cli_print_ahead(const struct cli_ahead *a)
{
    char all[16], sent[16], last[16];
    printf("%s on the GPU, %s copied in %u pass%s while it ran (the last one %s), stopped for %.1f ms at "
           "most\n",
           cli_bytes(a->result.gpu_bytes, all), cli_bytes(a->result.sent_bytes, sent), a->result.passes,
           a->result.passes == 1 ? "" : "es", cli_bytes(a->result.last_bytes, last),
           (double)a->result.gate_ns / 1e6);
}

static int forget(int sock, pid_t pid, struct bn_error *err)
{
    struct bn_reader reply;
    bn_auto_writer body = {0};
    bn_auto_free void *buf = malloc(BN_CTL_MSG_MAX);
    if (!buf)
        return bn_error_set(err, ENOMEM, "pre-dump", "out of memory");
    bn_write_u32(&body, (uint32_t)pid);
    int r = bn_ctl_call(sock, BN_CTL_FORGET, &body, NULL, 0, NULL, NULL, buf, &reply, err);
    if (r == 0 && bn_read_u32(&reply) == 0)
        r = bn_error_set(err, ENOENT, "pre-dump", "nothing was copied ahead of a dump of process %d", pid);
    return r;
}

static int run_drop(int sock, pid_t pid)
{
    struct bn_error err = BN_ERROR_INIT;
    if (forget(sock, pid, &err) < 0)
        return cli_fail(CLI_FAILED, &err, json);
    if (json) {
        json_t *o = cli_json_ok();
        json_object_set_new(o, "pid", json_integer(pid));
        cli_print_json(o);
    }
    return CLI_OK;
}

static int pre_dump(int argc, char **argv)
{
    (void)argc;
    pid_t pid;
    uint64_t per_second;
    struct bn_error err = BN_ERROR_INIT;
    struct cli_ahead ahead;
    if (cli_parse_bandwidth(bandwidth, &per_second) < 0)
        return cli_usage("'%s' is no number of bytes a second", bandwidth);
    int code = cli_process_operand(argv[0], &pid, json);
    if (code != CLI_OK)
        return code;
    if (cli_check_process(pid, false, &err) < 0 || (!drop && cli_check_thawed(argv[0], pid, &err) < 0))
        return cli_fail(CLI_FAILED, &err, json);
    bn_auto_fd sock = cli_daemon_connect(&err);
    if (sock < 0)
        return cli_fail(CLI_NO_DAEMON, &err, json);
    if (drop)
        return run_drop(sock, pid);
    struct cli_progress *progress = cli_progress_new("pre-dump");
    int r = cli_prepare(sock, pid, -1, -1, per_second, 0, progress, NULL, &ahead, &err);
    cli_progress_free(progress);
    if (r < 0) /* ENODATA: no CUDA in it */
        return cli_fail(err.code == ENODATA ? CLI_REFUSED : cli_daemon_exit_code(&err), &err, json);
    if (json) {
        json_t *o = cli_json_ok();
        json_object_set_new(o, "pid", json_integer(pid));
        json_t *what = cli_json_ahead(&ahead);
        json_object_update(o, what);
        json_decref(what);
        cli_print_json(o);
    } else if (!quiet) {
        cli_print_phases(stdout, &ahead.phases, ahead.took);
        cli_print_ahead(&ahead);
    }
    return CLI_OK;
}

const struct cli_command cli_pre_dump = {
    .name = "pre-dump",
    .operands = "PID|CONTAINER",
    .summary = "Copy the GPU memory of a process and its children ahead of a dump, while they run",
    .options = options,
    .min = 1,
    .max = 1,
    .needed = "one operand is needed: PID or CONTAINER",
    .run = pre_dump,
};
