/* What `bennu install` and `bennu uninstall` share: the places of a machine that are not Bennu's own, and the record of what was put
 * there. Programs below the prefix are the package's or `make install`'s; these two commands tie them to CRIU, Podman, CDI and
 * systemd. From a build folder `bennu install` has meson install the programs first. */
#pragma once

#include "cli/cli.h"

#define SETUP_RECORD "/var/lib/bennu/install.json"
#define SETUP_HOOK "/usr/share/containers/oci/hooks.d/50-bennu.json"
#define SETUP_CDI "/etc/cdi/bennu.json"
#define SETUP_CRIU_CONFIG "/etc/criu/default.conf"
#define SETUP_STOCK_PLUGIN "cuda_plugin.so"
#define SETUP_BLOCK_BEGIN "# BEGIN bennu: written by 'bennu install', taken away by 'bennu uninstall'\n"
#define SETUP_BLOCK_END "# END bennu\n"
#define SETUP_FILE_MAX (64u << 20)

struct setup {
    const char *root; /* "" or a folder without a slash at its end: every path below is put behind it */
    bool dry_run, json, failed;
    bool chosen;      /* of the record: only containers that ask for the agent get it */
    json_t *items;    /* what was done: {"action", "path", "note"} */
    json_t *files;    /* of the record: path to hash of what was written there */
    json_t *programs; /* … paths that meson installed for us */
    json_t *dirs;     /* … folders that were made, outer ones first */
};

/* Check the rights and read the record; a missing one is empty. */
int setup_open(struct setup *s, const char *root, struct bn_error *err);
/* Write the record as it is now. */
int setup_save(struct setup *s, struct bn_error *err);
/* Write the record (an empty one is removed), print the object for --json, free. Returns the exit code. */
int setup_close(struct setup *s);

/* One line: ACTION PATH (NOTE). In a dry run the action is what would be done. */
void setup_say(struct setup *s, const char *action, const char *path, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* The same for a failure: errno's text, and the exit code is CLI_FAILED. */
void setup_fail(struct setup *s, const char *path, int error);

/* root + path. `out` of PATH_MAX bytes; returns it. */
char *setup_path(const struct setup *s, const char *path, char *out);
/* Contents of a file; caller frees. */
int setup_read(const struct setup *s, const char *path, void **out, size_t *len);
bool setup_exists(const struct setup *s, const char *path);

enum setup_kind {
    SETUP_OURS, /* nobody edits it: a difference is an old version */
    SETUP_TEXT, /* an administrator may have edited it: then it is kept, and ours goes beside it */
};
/* Put a file there unless it is there already. Remembers it. */
void setup_put(struct setup *s, const char *path, const void *data, size_t len, mode_t mode,
               enum setup_kind kind);
/* Remove a file that setup_put has put there. An edited one is kept beside as PATH.saved. */
void setup_remove(struct setup *s, const char *path, enum setup_kind kind);
/* Make the folders above `path`, and remember those that were not there. */
int setup_make_parents(struct setup *s, const char *path);
void setup_note_dir(struct setup *s, const char *path);
void setup_note_missing_parents(struct setup *s, const char *path);
/* Remove the remembered folders that are empty. */
void setup_remove_dirs(struct setup *s);

/* "0.1.0-0123456789abcdef": two builds are two agents. CRIU restores a process with the very file that it had. */
void setup_agent_id(const void *data, size_t len, char out[64]);

/* setup_criu.c: the plugin and CRIU's configuration. */
/* Value of an option in the text of one ("option value" or "option=value" on a line of its own); the last one counts, as for CRIU. */
bool setup_criu_option(const char *text, const char *option, char *out, size_t cap);
void setup_criu_install(struct setup *s, const char *plugin_source);
void setup_criu_uninstall(struct setup *s);
