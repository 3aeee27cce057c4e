/* bennu ps: processes with an agent or a session. */
#include "cli/cli.h"

#include "base/cleanup.h"

#include <string.h>

static bool json;

static const struct cli_option options[] = {
    {"json", 'j', CLI_FLAG, NULL, &json, "print the list as one JSON object"},
    {0},
};

static const char *state_name(uint32_t state)
{
    static const char *const name[] = {
        [BN_PS_RUNNING] = "running",   [BN_PS_GATED] = "gated",         [BN_PS_SUSPENDED] = "suspended",
        [BN_PS_DUMPING] = "dumping",   [BN_PS_RESTORING] = "restoring", [BN_PS_LOST] = "lost",
        [BN_PS_NO_AGENT] = "no agent",
    };
    return state < BN_ARRAY_SIZE(name) ? name[state] : "unknown";
}

/* NULL: in none. */
static const char *tier_name(uint32_t tier)
{
    return tier < BN_TIERS ? bn_tier_names[tier] : NULL;
}

struct list {
    struct bn_ps_entry *entry;
    size_t n;
    int error;
};

static void on_event(void *arg, const struct bn_ctl_head *head, struct bn_reader *body)
{
    struct list *l = arg;
    struct bn_ps_entry e;
    if (head->type != BN_CTL_EV_PROCESS)
        return;
    bn_read_ps_entry(body, &e);
    struct bn_ps_entry *more = reallocarray(l->entry, l->n + 1, sizeof(e));
    if (body->failed || !more) {
        l->error = body->failed ? -EBADMSG : -ENOMEM;
        return;
    }
    cli_clean(e.comm);
    cli_clean(e.note);
    l->entry = more;
    l->entry[l->n++] = e;
}

static void print_table(const struct list *l)
{
    char gpu[16], host[16], disk[16];
    printf("%7s %-15s %-10s %-4s %9s %9s %9s %7s  %s\n", "PID", "COMMAND", "STATE", "TIER", "GPU", "HOST",
           "DISK", "ALLOCS", "NOTE");
    for (size_t i = 0; i < l->n; i++) {
        const struct bn_ps_entry *e = &l->entry[i];
        const char *tier = tier_name(e->tier);
        printf("%7u %-15s %-10s %-4s %9s %9s %9s %7llu  %s\n", e->pid, e->comm, state_name(e->state),
               tier ? tier : "-", cli_bytes(e->gpu_bytes, gpu), cli_bytes(e->host_bytes, host),
               cli_bytes(e->disk_bytes, disk), (unsigned long long)e->allocations, e->note);
    }
}

static json_t *to_json(const struct list *l)
{
    json_t *processes = json_array(), *o = cli_json_ok();
    for (size_t i = 0; i < l->n; i++) {
        const struct bn_ps_entry *e = &l->entry[i];
        json_t *p = json_object();
        json_object_set_new(p, "pid", json_integer(e->pid));
        /* A name that is no UTF-8 becomes null rather than spoiling the whole answer. */
        json_t *comm = json_string(e->comm), *note = json_string(e->note);
        json_object_set_new(p, "command", comm ? comm : json_null());
        json_object_set_new(p, "state", json_string(state_name(e->state)));
        json_object_set_new(p, "gpu_bytes", json_integer((json_int_t)e->gpu_bytes));
        json_object_set_new(p, "host_bytes", json_integer((json_int_t)e->host_bytes));
        json_object_set_new(p, "disk_bytes", json_integer((json_int_t)e->disk_bytes));
        const char *tier = tier_name(e->tier);
        json_object_set_new(p, "tier", tier ? json_string(tier) : json_null());
        json_object_set_new(p, "allocations", json_integer((json_int_t)e->allocations));
        json_object_set_new(p, "unknown_functions", json_integer(e->unknown));
        json_object_set_new(p, "note", note ? note : json_null());
        json_array_append_new(processes, p);
    }
    json_object_set_new(o, "processes", processes);
    return o;
}

static int ps(int argc, char **argv)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_reader reply;
    struct list l = {0};
    bn_auto_free void *buf = malloc(BN_CTL_MSG_MAX);
    bn_auto_fd sock = buf ? cli_daemon_connect(&err) : -1;
    if (sock < 0)
        return cli_fail(CLI_NO_DAEMON, &err, json);
    int r = bn_ctl_call(sock, BN_CTL_PS, NULL, NULL, 0, on_event, &l, buf, &reply, &err);
    if (r == 0 && l.error < 0)
        r = bn_error_set(&err, l.error, "daemon", "cannot read bennud's list: %s", strerror(-l.error));
    if (r == 0 && json)
        cli_print_json(to_json(&l));
    else if (r == 0)
        print_table(&l);
    free(l.entry);
    return r < 0 ? cli_fail(CLI_FAILED, &err, json) : CLI_OK;
}

const struct cli_command cli_ps = {
    .name = "ps",
    .operands = "",
    .summary = "List the processes that Bennu knows of",
    .options = options,
    .min = 0,
    .max = 0,
    .needed = "it takes none",
    .run = ps,
};
