/* bennu suspend: GPU memory of a running tree to one of the tiers; the processes stay. */
#include "cli/cli.h"

#include "base/cleanup.h"
#include "base/io.h"

#include <string.h>

static bool json, quiet;
static bool keep_context;
static const char *to = "host";

static const struct cli_option options[] = {
    {"to", 't', CLI_STRING, "TIER", &to, "where the memory goes: gpu, host (default) or disk"},
    {"keep-context", 'c', CLI_FLAG, NULL, &keep_context,
     "take only the memory: contexts stay on the GPU (for MPS)"},
    CLI_TRACE_OPTION,
    {"json", 'j', CLI_FLAG, NULL, &json, "print the result as one JSON object"},
    {"quiet", 'q', CLI_FLAG, NULL, &quiet, "print nothing but errors"},
    {0},
};

/* Both are one request that is answered with a table of phases. */
int cli_suspend_or_resume(uint16_t type, const char *operand, uint32_t tier, uint32_t flags, bool as_json,
                          bool silent)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_reader reply;
    struct bn_phases phases;
    bn_auto_writer body = {0};
    bn_auto_free void *buf = malloc(BN_CTL_MSG_MAX);
    bn_auto_fd sock = -1;
    pid_t pid;
    if (!buf)
        return CLI_FAILED;
    int code = cli_process_operand(operand, &pid, as_json);
    if (code != CLI_OK)
        return code;
    const char *name = type == BN_CTL_SUSPEND ? "suspend" : "resume";
    if (cli_trace_open(name, &err) < 0 || cli_check_process(pid, false, &err) < 0 ||
        cli_check_thawed(operand, pid, &err) < 0)
        return cli_fail(CLI_FAILED, &err, as_json);
    sock = cli_daemon_connect(&err);
    if (sock < 0)
        return cli_fail(CLI_NO_DAEMON, &err, as_json);
    bn_write_u32(&body, (uint32_t)pid);
    if (type == BN_CTL_SUSPEND) {
        bn_write_u32(&body, tier);
        bn_write_u32(&body, BN_CTL_F_PROGRESS | flags);
    }
    uint64_t began = bn_now_ns();
    struct cli_progress *progress = cli_progress_new(name);
    int r = bn_ctl_call(sock, type, &body, NULL, 0, cli_progress_event, progress, buf, &reply, &err);
    uint64_t took = bn_now_ns() - began;
    cli_progress_free(progress);
    if (r < 0) /* ENODATA: no CUDA in it */
        code = err.code == ENODATA ? CLI_REFUSED : cli_daemon_exit_code(&err);
    else
        bn_read_phases(&reply, &phases);
    if (r == 0 && reply.failed) {
        bn_error_set(&err, EBADMSG, "daemon",
                     "bennud's answer makes no sense: are command and daemon of one version?");
        code = CLI_FAILED;
    }
    code = cli_trace_end(code, &err);
    if (code != CLI_OK)
        return cli_fail(code, &err, as_json);
    if (as_json) {
        json_t *o = cli_json_ok();
        json_object_set_new(o, "pid", json_integer(pid));
        json_object_set_new(o, "duration_s", json_real((double)took / 1e9));
        json_object_set_new(o, "phases", cli_json_phases(&phases));
        cli_print_json(o);
    } else if (!silent) {
        cli_print_phases(stdout, &phases, took);
    }
    return CLI_OK;
}

static uint32_t tier_of(const char *name)
{
    for (uint32_t id = 0; id < BN_TIERS; id++)
        if (bn_tier_names[id] && strcmp(bn_tier_names[id], name) == 0)
            return id;
    return 0;
}

static int suspend(int argc, char **argv)
{
    uint32_t tier = tier_of(to);
    if (!tier)
        return cli_usage("'%s' is no tier: gpu, host and disk are", to);
    return cli_suspend_or_resume(BN_CTL_SUSPEND, argv[0], tier, keep_context ? BN_CTL_F_KEEP_CONTEXT : 0,
                                 json, quiet);
}

const struct cli_command cli_suspend = {
    .name = "suspend",
    .operands = "PID|CONTAINER",
    .summary = "Stop a process and its children and take their GPU memory away",
    .options = options,
    .min = 1,
    .max = 1,
    .needed = "one operand is needed: PID or CONTAINER",
    .run = suspend,
};
