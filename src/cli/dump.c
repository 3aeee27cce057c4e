/* bennu dump: checkpoint a process and its children into a directory, with CRIU and Bennu's plugin. */
#include "cli/cli.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "store/encoding.h"
#include "store/image_dir.h"

#include <criu/criu.h>
#include <fcntl.h>
#include <string.h>

#define LOG_FILE "dump.log"

static struct cli_dump_options wanted;
static bool json, quiet;
static const char *bandwidth;

static const struct cli_option options[] = {
    {"leave-running", 'R', CLI_FLAG, NULL, &wanted.leave_running,
     "let the process go on afterwards; else it is ended"},
    {"live", 'l', CLI_FLAG, NULL, &wanted.live,
     "copy GPU memory while the process runs, so that it is stopped for less time"},
    {"bandwidth", 'b', CLI_STRING, "BYTES", &bandwidth,
     "while the process runs, copy at most so many bytes a second, with K, M, G or T"},
    {"parent", 'p', CLI_STRING, "PARENT", &wanted.parent,
     "share the GPU memory that this earlier checkpoint has already"},
    {"compress", 'z', CLI_UINT, "LEVEL", &wanted.level,
     "compress GPU memory with zstd, from 1 (fast) to 19 (small)"},
    {"driver-path", 0, CLI_FLAG, NULL, &wanted.driver_path,
     "ignore the agents: save GPU memory through the driver alone"},
    {"allow-no-cuda", 0, CLI_FLAG, NULL, &wanted.allow_no_cuda, "also dump a process that does not use CUDA"},
    {"no-space-check", 0, CLI_FLAG, NULL, &wanted.no_space_check, "begin even if the disk looks too small"},
    {"sync", 0, CLI_FLAG, NULL, &wanted.sync_disk, "have it all on the disk before the process is ended"},
    {"timeout", 't', CLI_UINT, "SECONDS", &wanted.timeout,
     "how long CRIU may take to stop the processes (default 10)"},
    CLI_TRACE_OPTION,
    {"json", 'j', CLI_FLAG, NULL, &json, "print the result as one JSON object"},
    {"quiet", 'q', CLI_FLAG, NULL, &quiet, "print nothing but errors"},
    {0},
};

struct dump {
    pid_t pid;
    const struct cli_dump_options *o;
    struct cli_criu criu;
    struct cli_directory dir;
    struct cli_dumped *out;
    char log_kept[PATH_MAX], parent[PATH_MAX];
    struct cli_cancel *cancel;
    bool complete; /* it failed, but what is there is a checkpoint */
};

/* What the daemon would refuse in a dump of this tree. Returns an exit code. */
static int ask_daemon(struct dump *d, int sock, struct bn_error *err)
{
    struct bn_reader reply;
    bn_auto_writer body = {0};
    bn_auto_free void *buf = malloc(BN_CTL_MSG_MAX);
    bn_write_u32(&body, (uint32_t)d->pid);
    if (!buf) {
        bn_error_set(err, ENOMEM, "check", "out of memory");
        return CLI_FAILED;
    }
    if (bn_ctl_call(sock, BN_CTL_CHECK, &body, NULL, 0, NULL, NULL, buf, &reply, err) < 0)
        return cli_daemon_exit_code(err);
    d->out->cuda = bn_read_u32(&reply);
    d->out->agents = bn_read_u32(&reply);
    d->out->gpu_bytes = bn_read_u64(&reply);
    if (reply.failed) {
        bn_error_set(err, EBADMSG, "check",
                     "bennud's answer makes no sense: are command and daemon of one version?");
        return CLI_FAILED;
    }
    if (d->out->cuda == 0 && !d->o->allow_no_cuda) {
        bn_error_set(err, ENOTSUP, "check",
                     "process %d does not use CUDA, nor do its children: plain 'criu dump' saves it, or give "
                     "--allow-no-cuda",
                     d->pid);
        return CLI_REFUSED;
    }
    return CLI_OK;
}

static int check_space(const struct dump *d, struct bn_error *err)
{
    char need[16], have[16];
    /* With a parent nobody knows yet how little of the GPU's memory is new. */
    uint64_t needed = (d->o->parent ? 0 : d->out->gpu_bytes) + cli_tree_memory(d->pid),
             is_free = cli_free_space(d->dir.fd);
    if (d->o->no_space_check || needed <= is_free)
        return 0;
    return bn_error_set(err, ENOSPC, "directory",
                        "%s has %s free and up to %s may be needed: free some, name another place, or give "
                        "--no-space-check",
                        d->dir.path, cli_bytes(is_free, have), cli_bytes(needed, need));
}

/* The plugin runs in CRIU, which inherits our environment. */
static void tell_plugin(const char *variable, bool yes)
{
    if (yes)
        setenv(variable, "1", 1);
    else
        unsetenv(variable);
}

static int criu_options(const struct dump *d, struct bn_error *err)
{
    char text[24];
    int r = cli_criu_setup(&d->criu, d->dir.fd, d->dir.fd, LOG_FILE, err);
    if (r < 0)
        return r;
    criu_set_pid(d->pid);
    criu_set_leave_running(d->o->leave_running);
    if (d->o->timeout)
        criu_set_timeout(d->o->timeout);
    if (access("/usr/sbin/iptables", X_OK) < 0 && access("/sbin/iptables", X_OK) < 0)
        criu_set_network_lock(CRIU_NETWORK_LOCK_NFTABLES);
    tell_plugin("BENNU_DRIVER_PATH", d->o->driver_path);
    tell_plugin("BENNU_SYNC", d->o->sync_disk);
    tell_plugin("BENNU_LEAVE_RUNNING", d->o->leave_running);
    snprintf(text, sizeof(text), "%u", d->o->level);
    setenv("BENNU_COMPRESS", text, 1);
    snprintf(text, sizeof(text), "%llu", (unsigned long long)d->o->per_second);
    setenv("BENNU_BANDWIDTH", text, 1);
    if (d->o->parent && !d->o->live) /* else what was copied ahead is of its family already */
        setenv("BENNU_PARENT", d->parent, 1);
    else
        unsetenv("BENNU_PARENT");
    return 0;
}

/* The daemon's word first: it says what is wrong with the GPU half. CRIU's log otherwise. */
static void describe_failure(struct dump *d, int result, const struct bn_error *session, struct bn_error *err)
{
    char cause[300];
    if (bn_error_is_set(session)) {
        bn_error_set(err, session->code, session->stage, "%s", session->text);
        return;
    }
    cli_criu_log_cause(d->dir.fd, LOG_FILE, cause, sizeof(cause));
    if (*cause)
        bn_error_set(err, EIO, "criu", "CRIU cannot save process %d: %s", d->pid, cause);
    else
        bn_error_set(err, EIO, "criu", "CRIU (%s) failed and did not say why (error %d)", d->criu.path,
                     result);
}

/* Keep CRIU's log beside DIR, as DIR.log: in DIR nothing may look like a checkpoint. */
static void keep_log(struct dump *d)
{
    char name[NAME_MAX + 1];
    const char *base = strrchr(d->dir.path, '/');
    if (!base || !base[1] || snprintf(name, sizeof(name), "%s.log", base + 1) >= (int)sizeof(name))
        return;
    if (renameat(d->dir.fd, LOG_FILE, d->dir.parent, name) == 0)
        snprintf(d->log_kept, sizeof(d->log_kept), "%.*s.log", PATH_MAX - 8, d->dir.path);
}

/* By a signal: there is nothing to look into. */
static int interrupted(struct dump *d, int sig, struct bn_error *err)
{
    cli_directory_discard(&d->dir);
    *err = BN_ERROR_INIT;
    bn_error_set(err, ECANCELED, "cancel", "interrupted: nothing was saved, and process %d goes on", d->pid);
    return 128 + sig;
}

static int failed(struct dump *d, int exit_code, struct bn_error *err)
{
    int sig = cli_cancel_signal(d->cancel);
    if (sig)
        return interrupted(d, sig, err);
    if (!d->o->drop_log)
        keep_log(d);
    cli_directory_discard(&d->dir);
    if (*d->log_kept) {
        size_t used = strlen(err->text);
        snprintf(err->text + used, sizeof(err->text) - used, " (CRIU's log: %s)", d->log_kept);
    }
    return exit_code;
}

/* CRIU reports success only when our plugin let it; with --leave-running the daemon then still had to finish. This is the last look
 * before success is claimed. */
static int check_result(struct dump *d, const struct bn_error *session, struct bn_error *err)
{
    /* One without CUDA may have begun to use it after it was asked; a late failure takes CRIU's inventory away again. */
    if (d->out->cuda == 0 && (!session || cli_daemon_silent(session)) && bn_image_has_criu(d->dir.fd) == 1)
        return 0;
    bn_auto_manifest struct bn_manifest *m = NULL;
    struct bn_error unread = BN_ERROR_INIT;
    int r = bn_image_load(d->dir.fd, &m, &unread);
    if (r < 0 && r != -ENOENT)
        return bn_error_set(err, unread.code, unread.stage, "%s", unread.text);
    if (r == 0) {
        d->out->gpu_bytes = bn_manifest_bytes(m); /* it may have allocated since it was asked */
        if (!session || !d->o->leave_running || cli_daemon_silent(session))
            return 0;
        d->complete = true;
        return bn_error_set(
            err, session->code, session->stage,
            "the checkpoint in %s is complete, but the process was not brought back (%s): 'bennu resume "
            "%d' tries again",
            d->dir.path, session->text, d->pid);
    }
    if (session)
        return bn_error_set(err, session->code, session->stage, "%s", session->text);
    return bn_error_set(
        err, EIO, "criu",
        "CRIU finished but Bennu's plugin wrote no manifest to %s: this is no complete checkpoint",
        d->dir.path);
}

/* The daemon keeps what it copied as long as `sock` is open, and the session that our plugin begins uses it. Returns an exit
 * code. */
static int copy_ahead(struct dump *d, int *sock, struct bn_error *err)
{
    bn_auto_fd from = d->o->parent ? open(d->parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (d->o->parent && from < 0) {
        bn_error_set(err, errno, "parent", "cannot open the parent checkpoint %s: %m", d->parent);
        return CLI_FAILED;
    }
    *sock = cli_daemon_connect(err);
    if (*sock < 0)
        return CLI_NO_DAEMON;
    struct cli_progress *progress = cli_progress_new("dump");
    int r = cli_prepare(*sock, d->pid, d->dir.fd, from, d->o->per_second, d->o->level, progress, d->cancel,
                        &d->out->ahead, err);
    cli_progress_free(progress);
    return r < 0 ? cli_daemon_exit_code(err) : CLI_OK;
}

static int checkpoint(struct dump *d, int *sock, struct bn_error *err)
{
    struct cli_record record;
    struct cli_watch *watch = NULL;
    struct bn_error session = BN_ERROR_INIT;
    int r = cli_record_make(d->pid, d->out->cuda > 0, d->criu.version, &record);
    if (r == 0)
        r = cli_record_write(&record, d->dir.fd);
    cli_record_free(&record);
    if (r < 0) {
        bn_error_set(err, r, "directory", "cannot write to %s: %s", d->dir.path, strerror(-r));
        return failed(d, CLI_FAILED, err);
    }
    if (criu_options(d, err) < 0)
        return failed(d, CLI_FAILED, err);
    cli_ignore_signals(true);
    struct cli_progress *progress = cli_progress_new("dump");
    if (cli_watch_start(BN_TAKE_FD(*sock), d->pid, d->dir.fd, progress, &watch, err) < 0) {
        cli_progress_free(progress);
        return failed(d, CLI_FAILED, err);
    }
    uint64_t began = bn_now_ns();
    cli_hush_libcriu(true);
    int result = criu_dump();
    cli_hush_libcriu(false);
    uint64_t criu_took = bn_now_ns() - began;
    cli_trace_criu(began, criu_took, d->dir.fd, "stats-dump");
    int watched = cli_watch_finish(watch, result >= 0 && d->out->cuda > 0, result >= 0 ? d->cancel : NULL,
                                   &d->out->phases, &session);
    d->out->took = bn_now_ns() - began;
    cli_progress_free(progress);
    criu_free_opts();
    cli_add_phase(&d->out->phases, "CRIU, all of it", 0, criu_took);
    if (result < 0) {
        describe_failure(d, result, watched < 0 ? &session : NULL, err);
        return failed(d, cli_daemon_exit_code(err), err);
    }
    if (check_result(d, watched < 0 ? &session : NULL, err) <
        0) /* of a process that was ended it is all there is */
        return d->o->leave_running && !d->complete ? failed(d, cli_daemon_exit_code(err), err) : CLI_FAILED;
    return CLI_OK;
}

json_t *cli_json_dumped(pid_t pid, const struct cli_dump_options *o, const struct cli_dumped *d)
{
    char version[24];
    cli_version_text(d->criu, version);
    json_t *j = cli_json_ok();
    json_object_set_new(j, "pid", json_integer(pid));
    json_object_set_new(j, "directory", json_string(d->path));
    json_object_set_new(j, "left_running", json_boolean(o->leave_running));
    json_object_set_new(j, "cuda_processes", json_integer(d->cuda));
    json_object_set_new(j, "agents", json_integer(d->agents));
    json_object_set_new(j, "gpu_bytes", json_integer((json_int_t)d->gpu_bytes));
    json_object_set_new(j, "criu_version", json_string(version));
    json_object_set_new(j, "duration_s", json_real((double)d->took / 1e9));
    json_object_set_new(j, "phases", cli_json_phases(&d->phases));
    if (o->live)
        json_object_set_new(j, "live", cli_json_ahead(&d->ahead));
    return j;
}

static void report(pid_t pid, const struct cli_dumped *d)
{
    char bytes[16];
    if (json) {
        cli_print_json(cli_json_dumped(pid, &wanted, d));
    } else if (!quiet) {
        if (wanted.live)
            cli_print_ahead(&d->ahead);
        cli_print_phases(stdout, &d->phases, d->took);
        printf("process %d (%u with CUDA, %s on the GPU) is in %s%s\n", pid, d->cuda,
               cli_bytes(d->gpu_bytes, bytes), d->path, wanted.leave_running ? " and goes on" : "");
    }
}

static int check_parent(struct dump *d, struct bn_error *err)
{
    const char *parent = d->o->parent;
    bn_auto_manifest struct bn_manifest *m = NULL;
    bn_auto_fd fd = parent ? open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (!parent)
        return CLI_OK;
    if (fd < 0 || !realpath(parent, d->parent)) {
        bn_error_set(err, errno, "parent", "cannot open the parent checkpoint %s: %m", parent);
        return CLI_FAILED;
    }
    struct bn_error why = BN_ERROR_INIT;
    if (bn_image_load(fd, &m, &why) == 0)
        return CLI_OK;
    bn_error_set(err, why.code, "parent", "the parent checkpoint %s: %s", parent, why.text);
    return CLI_BAD_IMAGE;
}

/* Everything that can be checked before anything is touched. Returns an exit code. */
static int prepare(struct dump *d, const char *path, int *sock, struct bn_error *err)
{
    if (cli_check_process(d->pid, true, err) < 0 || cli_directory_prepare(path, &d->dir, err) < 0)
        return CLI_FAILED;
    int code = check_parent(d, err);
    if (code == CLI_OK && cli_criu_find(&d->criu, err) < 0)
        code = CLI_FAILED;
    if (code == CLI_OK && (*sock = cli_daemon_connect(err)) < 0)
        code = CLI_NO_DAEMON;
    if (code == CLI_OK)
        code = ask_daemon(d, *sock, err);
    if (code == CLI_OK && check_space(d, err) < 0)
        code = CLI_FAILED;
    if (code != CLI_OK)
        cli_directory_discard(&d->dir);
    return code;
}

int cli_dump_process(pid_t pid, const char *path, const struct cli_dump_options *o, struct cli_dumped *out,
                     struct bn_error *err)
{
    *out = (struct cli_dumped){0};
    struct dump d = {.pid = pid, .o = o, .out = out, .dir = {.fd = -1, .parent = -1, .lock = -1}};
    bn_auto_fd sock = -1;
    bn_auto_fd ahead = -1;
    d.cancel = cli_cancel_new();
    int code = prepare(&d, path, &sock, err);
    if (code == CLI_OK && o->live && out->cuda > 0 && (code = copy_ahead(&d, &ahead, err)) != CLI_OK)
        code = failed(&d, code, err);
    if (code == CLI_OK)
        code = checkpoint(&d, &sock, err);
    cli_cancel_free(d.cancel);
    out->criu = d.criu.version;
    if (code == CLI_OK)
        snprintf(out->path, sizeof(out->path), "%s", d.dir.path);
    cli_directory_close(&d.dir);
    return code;
}

static int dump(int argc, char **argv)
{
    (void)argc;
    pid_t pid;
    struct bn_error err = BN_ERROR_INIT;
    struct cli_dumped dumped;
    if (cli_parse_pid(argv[0], &pid) < 0)
        return cli_usage("'%s' is not a process id", argv[0]);
    if (wanted.level > BN_COMPRESS_MAX)
        return cli_usage("--compress takes a level from 1 to %u, not %u", BN_COMPRESS_MAX, wanted.level);
    if (bandwidth && !wanted.live && !wanted.leave_running)
        return cli_usage("--bandwidth is for what --live or --leave-running copies beside the process");
    if (wanted.live && wanted.driver_path)
        return cli_usage("--live needs the agents that --driver-path ignores");
    if (cli_parse_bandwidth(bandwidth, &wanted.per_second) < 0)
        return cli_usage("'%s' is no number of bytes a second", bandwidth);
    if (cli_trace_open("dump", &err) < 0)
        return cli_fail(CLI_FAILED, &err, json);
    int code = cli_dump_process(pid, argv[1], &wanted, &dumped, &err);
    code = cli_trace_end(code, &err);
    if (code == CLI_OK)
        report(pid, &dumped);
    else
        cli_fail(code, &err, json);
    return code;
}

const struct cli_command cli_dump = {
    .name = "dump",
    .operands = "PID DIR",
    .summary = "Save a process and its children, GPU memory included, to a directory",
    .options = options,
    .min = 2,
    .max = 2,
    .needed = "two operands are needed: PID and DIR",
    .run = dump,
};
