/* bennu import: make a checkpoint of what `bennu export` has written. */
#include "cli/archiving.h"
#include "cli/cli.h"

#include "base/cleanup.h"

#include <fcntl.h>
#include <string.h>

static bool json, no_verify;

static const struct cli_option options[] = {
    {"no-verify", 0, CLI_FLAG, NULL, &no_verify,
     "do not read what was imported once more to compare its checksums"},
    {"json", 'j', CLI_FLAG, NULL, &json, "print the result as one JSON object"},
    {0},
};

static int unpack(const char *path, struct cli_archive_io *io, struct bn_error *err)
{
    struct cli_directory d;
    bn_auto_manifest struct bn_manifest *m = NULL;
    int r = cli_directory_prepare(path, &d, err);
    if (r < 0)
        return r;
    struct cli_progress *progress = cli_progress_new("import");
    r = cli_unpack(io, d.fd, !no_verify, progress, &m, err);
    cli_progress_free(progress);
    if (r < 0)
        cli_directory_discard(&d);
    cli_directory_close(&d);
    if (r == 0 && json) {
        json_t *o = cli_json_ok();
        json_t *name = json_string(path);
        json_object_set_new(o, "directory", name ? name : json_null()); /* null: not UTF-8 */
        json_object_set_new(o, "gpu_bytes", json_integer((json_int_t)bn_manifest_bytes(m)));
        json_object_set_new(o, "verified", json_boolean(!no_verify));
        cli_print_json(o);
    }
    return r;
}

static int import(int argc, char **argv)
{
    (void)argc;
    bool standard = strcmp(argv[0], "-") == 0;
    struct bn_error err = BN_ERROR_INIT;
    struct cli_archive_io io = {.name = standard ? "standard input" : argv[0], .signals = -1};
    bn_auto_fd fd = standard ? STDIN_FILENO : open(argv[0], O_RDONLY | O_CLOEXEC);
    io.fd = fd;
    if (fd < 0) {
        bn_error_set(&err, errno, "import", "cannot open the archive %s: %m", argv[0]);
        return cli_fail(CLI_FAILED, &err, json);
    }
    if (isatty(fd))
        return cli_usage("%s is a terminal: an archive comes from a file or a pipe", io.name);
    bn_auto_fd signals = cli_signals_fd();
    io.signals = signals;
    if (signals < 0) {
        bn_error_set(&err, signals, "import", "cannot watch for signals: %s", strerror(-signals));
        return cli_fail(CLI_FAILED, &err, json);
    }
    int r = unpack(argv[1], &io, &err);
    if (r == 0)
        return CLI_OK;
    bool image = r == -EBADMSG || r == -EPROTONOSUPPORT;
    return cli_fail(io.signal ? 128 + io.signal : image ? CLI_BAD_IMAGE : CLI_FAILED, &err, json);
}

const struct cli_command cli_import = {
    .name = "import",
    .operands = "FILE DIR",
    .summary = "Make a checkpoint of what export has written",
    .options = options,
    .min = 2,
    .max = 2,
    .needed = "two operands are needed: FILE and DIR",
    .run = import,
};
