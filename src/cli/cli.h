/* What the commands of `bennu` share. One file a command; main.c dispatches by a table; every option of every command
 * stands in one table that parses it, prints --help and is compared with the man page by a test.
 *
 * The program is a thin one: processes are frozen and saved by CRIU with Bennu's plugin, GPU memory by the daemon. What is
 * here: checks before anything is touched, one message a failure, progress, and a table of what happened. */
#pragma once

#include "base/error.h"
#include "wire/control.h"

#include <jansson.h>
#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum cli_exit {
    CLI_OK = 0,
    CLI_FAILED = 1, /* nothing was changed: a process that ran goes on, nothing half-written is left */
    CLI_USAGE = 2,
    CLI_REFUSED = 3,   /* this process cannot be checkpointed */
    CLI_NO_DAEMON = 4, /* bennud does not run */
    CLI_BAD_IMAGE = 5, /* not a checkpoint, or a damaged one */
    CLI_CANNOT_EXEC = 126,
    CLI_NOT_FOUND = 127,
};

/* --- options.c: one table of options a command --------------------------------------------------------------------- */

enum cli_option_type { CLI_FLAG, CLI_STRING, CLI_UINT };

struct cli_option {
    const char *name; /* NULL ends a table */
    char letter;      /* 0: none */
    enum cli_option_type type;
    const char *arg; /* what --help calls the argument; NULL for flags */
    void *value;     /* bool *, const char ** or unsigned * */
    const char *help;
};

struct cli_command {
    const char *name, *operands, *summary;
    const struct cli_option *options;
    int min, max;       /* operands; max -1: any number, and options end at the first one */
    const char *needed; /* for the message when there are too few or too many */
    int (*run)(int argc, char **argv);
};

extern const struct cli_command cli_run, cli_dump, cli_pre_dump, cli_restore, cli_suspend, cli_resume, cli_ps,
    cli_inspect, cli_export, cli_import, cli_check, cli_install, cli_uninstall, cli_store, cli_watch_process;

/* Name of the command under way, for messages: "bennu dump". */
extern const char *cli_name;

/* Parse the options of `cmd`; argv[0] is the command's name. Returns the index of the first operand, or -1 when the program is to
 * end with *exit_code (help was printed, or a message about wrong usage). */
int cli_parse(const struct cli_command *cmd, int argc, char **argv, int *exit_code);
void cli_print_help(const struct cli_command *cmd);
/* "bennu dump: TEXT" and a hint at --help; returns CLI_USAGE. */
int cli_usage(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* --- output.c -------------------------------------------------------------------------------------------------------- */

/* One message on standard error, and with `json` an object {"ok": false, "error": {…}} on standard output. Returns exit_code. */
int cli_fail(int exit_code, const struct bn_error *err, bool json);
/* Print the object on one line and drop the reference to it. */
void cli_print_json(json_t *object);
/* {"ok": true} to be added to. */
json_t *cli_json_ok(void);
json_t *cli_json_phases(const struct bn_phases *phases);
/* Table of phases: when each began, how long it took, what it moved; `total_ns` closes it. */
void cli_print_phases(FILE *out, const struct bn_phases *phases, uint64_t total_ns);
/* "12.3 GB", decimal units. `buf` of 16 bytes at least; returns it. */
char *cli_bytes(uint64_t bytes, char buf[16]);
/* Replace what could disturb a terminal (names come from other processes). Returns s. */
char *cli_clean(char *s);
/* Add a phase; nothing when the table is full. */
void cli_add_phase(struct bn_phases *phases, const char *name, uint64_t start_ns, uint64_t duration_ns);

/* --- progress.c ------------------------------------------------------------------------------------------------------- */

struct cli_progress;
/* A line on standard error that shows how far things are, drawn by a thread of its own from half a second on. NULL where
 * standard error is no terminal; all of these take NULL. */
struct cli_progress *cli_progress_new(const char *what);
void cli_progress_update(struct cli_progress *p, const struct bn_progress *now); /* any thread */
void cli_progress_free(struct cli_progress *p);                                  /* removes the line */
/* For bn_ctl_call: feeds progress events to the struct cli_progress in arg. */
void cli_progress_event(void *arg, const struct bn_ctl_head *head, struct bn_reader *body);

/* --- where.c: where the other parts lie --------------------------------------------------------------------------------- */

/* Root of the build folder that this program runs from; NULL when it is installed. */
const char *cli_build_root(void);
/* Each is the environment's word, else the build folder's, else where it was installed. `out` of PATH_MAX bytes. */
void cli_agent_path(char *out); /* BENNU_AGENT */
void cli_plugin_dir(char *out); /* BENNU_PLUGIN_DIR */
const char *cli_rundir(void);   /* BENNU_RUNDIR */
#define CLI_PLUGIN_FILE "bennu_plugin.so"

/* --- process.c ---------------------------------------------------------------------------------------------------------- */

/* Run a program to its end, at most timeout_ms, standard input empty; *out (may be NULL) gets what it wrote on both outputs, at most
 * 64 KiB; caller frees. Returns the exit status as waitpid(2) gives it, or negative errno. */
int cli_capture(char *const argv[], unsigned timeout_ms, char **out);
/* Run `fn` in a forked child with its standard error to *out as above. Returns the child's exit code, or negative. */
int cli_in_child(int (*fn)(void *arg), void *arg, char **out);
int cli_parse_pid(const char *text, pid_t *pid);
/* Is `pid` a process that we may act on (exists, alive, we are root)? `stops`: CRIU will stop it and all below it, so we must not be
 * among them, and nobody else may trace it. */
int cli_check_process(pid_t pid, bool stops, struct bn_error *err);
/* Bytes of memory of the processes below `root` that CRIU will have to write, roughly. */
uint64_t cli_tree_memory(pid_t root);
int cli_need_root(struct bn_error *err);
/* True if a libcuda.so.1 can be loaded here (or BENNU_DRIVER names one): looked for in a forked child. */
bool cli_have_driver(void);

/* --- container.c --------------------------------------------------------------------------------------------------------- */

/* What a command's operand PID|CONTAINER means: digits are a process id, anything else is asked of Podman (`podman container
 * inspect`), as whose container's first process it is, seen from here. CLI_OK and *pid, or an exit code with the message printed. */
int cli_process_operand(const char *text, pid_t *pid, bool as_json);
/* -EBUSY: its cgroup is frozen (a paused container), so its agent would not answer. `text`: the operand. */
int cli_check_thawed(const char *text, pid_t pid, struct bn_error *err);

/* --- daemon.c ------------------------------------------------------------------------------------------------------------- */

/* Connect and say what to do if nobody answers. Returns a descriptor or negative errno. */
int cli_daemon_connect(struct bn_error *err);
/* Exit code for an error of the daemon's. */
int cli_daemon_exit_code(const struct bn_error *err);
/* True if `err`, of cli_watch_finish, says that nothing was heard of a session's end, not that it failed. */
bool cli_daemon_silent(const struct bn_error *err);

struct cli_watch;
/* Follow the dump of `pid` into the image directory `dirfd` (or, with pid 0, the restore from it), on a connection and a thread of its
 * own. Takes `sock`. */
int cli_watch_start(int sock, pid_t pid, int dirfd, struct cli_progress *progress, struct cli_watch **out,
                    struct bn_error *err);
struct cli_cancel;
/* Wait for the session's end and free the watch. `expected`: a session is known to exist. A signal (`cancel` may be NULL) makes the
 * daemon undo what it does after CRIU's end. 0: it ended well and *phases is filled (empty when there was no session); negative: its
 * error, in *err. */
int cli_watch_finish(struct cli_watch *w, bool expected, const struct cli_cancel *cancel,
                     struct bn_phases *phases, struct bn_error *err);

/* --- cancel.c --------------------------------------------------------------------------------------------------------------- */

/* Block the signals that end a program, but for those that whoever started us has ignored, in this thread and those that it will
 * start. A descriptor of signalfd(2) that tells of them, or negative errno. The caller closes it. */
int cli_signals_fd(void);
/* From now on SIGINT, SIGTERM, SIGHUP and SIGQUIT do not end us but make Bennu's plugin fail CRIU. To be called while there is one
 * thread, and before cli_ignore_signals. They stay blocked in that thread. NULL: out of memory or descriptors. */
struct cli_cancel *cli_cancel_new(void);
/* The first signal that came, or 0. All take NULL. */
int cli_cancel_signal(const struct cli_cancel *c);
int cli_cancel_free(struct cli_cancel *c);

/* --- pre_dump.c --------------------------------------------------------------------------------------------------------- */

/* What was copied ahead of a dump. */
struct cli_ahead {
    struct bn_prepare_reply result;
    struct bn_phases phases;
    uint64_t took; /* ns */
};

/* Bytes a second, with K, M, G or T. NULL: 0, no limit. */
int cli_parse_bandwidth(const char *text, uint64_t *out);
/* BN_CTL_PREPARE on `sock`; `dir` and `parent` may be -1, `cancel` NULL; `level` of compression, 0: none. A signal that `cancel` has
 * seen closes the connection. */
int cli_prepare(int sock, pid_t pid, int dir, int parent, uint64_t per_second, unsigned level,
                struct cli_progress *progress, const struct cli_cancel *cancel, struct cli_ahead *out,
                struct bn_error *err);
json_t *cli_json_ahead(const struct cli_ahead *a);
void cli_print_ahead(const struct cli_ahead *a);

/* --- dump.c ------------------------------------------------------------------------------------------------------------- */

struct cli_dump_options {
    bool leave_running, live, driver_path, allow_no_cuda, no_space_check, sync_disk;
    bool drop_log;       /* CRIU's log of a dump that fails is not kept beside the folder */
    unsigned timeout;    /* of CRIU, in seconds; 0: its own */
    unsigned level;      /* of compression; 0: none */
    uint64_t per_second; /* bytes copied while it runs, before and after its pause; 0: no limit */
    const char *parent;  /* folder of a checkpoint, or NULL */
};

struct cli_dumped {
    char path[PATH_MAX];      /* of the folder, absolute */
    uint32_t cuda, agents;    /* processes */
    uint64_t gpu_bytes, took; /* ns */
    int criu;
    struct bn_phases phases;
    struct cli_ahead ahead; /* live alone */
};

/* Dump `pid` and its children to `path`, which is new or empty. One thread, and once in a process: libcriu, the environment and what
 * CRIU inherits are not cleared away. Signals that end a program undo it, and stay blocked. Returns an exit code: not CLI_OK, nothing is
 * left in `path` and the processes go on, and *err says why; 128 and a signal's number if that was the cause. */
int cli_dump_process(pid_t pid, const char *path, const struct cli_dump_options *o, struct cli_dumped *out,
                     struct bn_error *err);
/* What --json prints of it. */
json_t *cli_json_dumped(pid_t pid, const struct cli_dump_options *o, const struct cli_dumped *d);

/* --- trace.c ---------------------------------------------------------------------------------------------------------- */

extern const char *cli_trace_file; /* NULL: no trace is wanted, and all of these do nothing */
#define CLI_TRACE_OPTION                                                         \
    {                                                                            \
        "trace", 0, CLI_STRING, "FILE", &cli_trace_file,                         \
            "write what was done when to FILE, for Perfetto or chrome://tracing" \
    }

/* Before anything is touched: can the file be written? `command` names it all in the picture. */
int cli_trace_open(const char *command, struct bn_error *err);
/* Takes BN_CTL_EV_TRACE out of what the daemon sends. Any thread. */
void cli_trace_event(const struct bn_ctl_head *head, struct bn_reader *body);
/* CRIU's time (bn_now_ns), and its file of statistics. */
void cli_trace_criu(uint64_t began_ns, uint64_t took_ns, int dir, const char *stats);
/* Write the file, whole or not at all; only the first call does. Returns `exit_code`, or CLI_FAILED with *err if that was CLI_OK and the
 * file cannot be written. */
int cli_trace_end(int exit_code, struct bn_error *err);

/* suspend.c: `type` is BN_CTL_SUSPEND or BN_CTL_RESUME; `operand` names the process; tier and flags are a suspend's. Returns the exit
 * code. */
int cli_suspend_or_resume(uint16_t type, const char *operand, uint32_t tier, uint32_t flags, bool as_json,
                          bool silent);

/* --- criu.c --------------------------------------------------------------------------------------------------------------- */

#define CLI_CRIU_MIN 40000

struct cli_criu {
    char path[PATH_MAX];
    char plugin_dir[PATH_MAX];
    int version;     /* 40101 = 4.1.1 */
    bool lazy_pages; /* a restore: CRIU leaves host memory to the daemon */
};

/* Find CRIU and Bennu's plugin for it. */
int cli_criu_find(struct cli_criu *criu, struct bn_error *err);
/* Find CRIU alone (for `check`). */
int cli_criu_find_program(struct cli_criu *criu, struct bn_error *err);
/* Find the machine's own CRIU, which podman and runc call: never the private copy. Without one *err stays empty. */
int cli_criu_find_system(struct cli_criu *criu, struct bn_error *err);
int cli_criu_plugin_present(const char *dir, struct bn_error *err);
/* Common options of libcriu for both directions; the environment of this process is set for CRIU. */
int cli_criu_setup(const struct cli_criu *criu, int images, int work, const char *log, struct bn_error *err);
/* While CRIU works, a signal from the terminal must not tear it from its tasks: they are ignored meanwhile, in CRIU too. */
void cli_ignore_signals(bool ignore);
/* libcriu writes to the C library's `stderr` when CRIU ends without an answer, as it does on our plugin's word; the one message
 * of a failure is ours. Meanwhile only what goes to the descriptor itself is seen: the progress. */
void cli_hush_libcriu(bool hush);
/* The cause in CRIU's log, as a sentence; empty when it does not say. `out` of `cap` bytes. */
void cli_criu_log_cause(int dir, const char *log, char *out, size_t cap);
void cli_version_text(int version, char out[24]);

/* --- record.c: what the command line itself must remember in a checkpoint --------------------------------------------------- */

#define CLI_INVENTORY "inventory.img" /* CRIU's: every image has it */
#define CLI_RECORD_PIDS 4096

struct cli_record {
    bool gpu; /* GPU state belongs to it: without a manifest it is half a checkpoint */
    int criu;
    size_t npids;
    pid_t *pids; /* root first; owned */
    char stdio
        [3]
        [64]; /* "pipe:[123]" where descriptors 0-2 of the root lead to a pipe out of the tree, else empty */
};

int cli_record_make(pid_t root, bool gpu, int criu, struct cli_record *r);
int cli_record_write(const struct cli_record *r, int dir);
/* -ENOENT: the checkpoint has none. -EBADMSG: damaged. */
int cli_record_read(int dir, struct cli_record *r);
void cli_record_free(struct cli_record *r);

/* --- directory.c ------------------------------------------------------------------------------------------------------------- */

struct cli_directory {
    int fd, parent; /* owned */
    int lock;       /* says that somebody is writing to it, to those who collect what nobody is; owned */
    char *path;     /* absolute; owned */
    bool created;
};

/* Open DIR for a new checkpoint: make it if it is missing; refuse what is not an empty directory that we can write to. */
int cli_directory_prepare(const char *path, struct cli_directory *d, struct bn_error *err);
/* Remove everything in it, and it, too, if it was made by cli_directory_prepare. */
void cli_directory_discard(struct cli_directory *d);
void cli_directory_close(struct cli_directory *d);
/* Bytes free for us in the file system of `fd`. */
uint64_t cli_free_space(int fd);
