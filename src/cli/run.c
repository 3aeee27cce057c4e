/* bennu run: start a program with the agent in it. */
#include "cli/cli.h"

#include "base/cleanup.h"

#include <string.h>

static bool no_agent;

static const struct cli_option options[] = {
    {"no-agent", 0, CLI_FLAG, NULL, &no_agent,
     "leave the agent out: the driver's own, slower path serves the program"},
    {0},
};

static int preload(const char *agent, struct bn_error *err)
{
    if (access(agent, R_OK) < 0)
        return bn_error_set(err, errno, "agent",
                            "cannot read the agent %s (%m): install Bennu, or set BENNU_AGENT to its path",
                            agent);
    /* ld.so(8): both separate the entries of LD_PRELOAD, and nothing quotes them. */
    if (strpbrk(agent, " :"))
        return bn_error_set(err, EINVAL, "agent",
                            "the agent's path has a space or colon in it, which LD_PRELOAD cannot carry: %s",
                            agent);
    const char *before = getenv("LD_PRELOAD");
    bn_auto_free char *value = NULL;
    if (asprintf(&value, "%s%s%s", agent, before && *before ? ":" : "", before ? before : "") < 0) {
        value = NULL;
        return bn_error_set(err, ENOMEM, "agent", "out of memory");
    }
    return setenv("LD_PRELOAD", value, 1) < 0 ? bn_error_set(err, errno, "agent", "cannot set LD_PRELOAD: %m")
                                              : 0;
}

static int run(int argc, char **argv)
{
    struct bn_error err = BN_ERROR_INIT;
    char agent[PATH_MAX];
    bool wanted = !no_agent;
    if (wanted && !cli_have_driver()) {
        fprintf(stderr,
                "%s: this machine has no NVIDIA driver (no libcuda.so.1): %s runs without the agent\n",
                cli_name, argv[0]);
        wanted = false;
    }
    cli_agent_path(agent);
    if (wanted && preload(agent, &err) < 0)
        return cli_fail(CLI_FAILED, &err, false);
    /* libuv takes io_uring where it finds it, which CRIU cannot save; it falls back to threads. */
    setenv("UV_USE_IO_URING", "0", 0);
    execvp(argv[0], argv);
    int code = errno == ENOENT ? CLI_NOT_FOUND : CLI_CANNOT_EXEC;
    fprintf(stderr, "%s: cannot run %s: %m\n", cli_name, argv[0]);
    return code;
}

const struct cli_command cli_run = {
    .name = "run",
    .operands = "[--] PROGRAM [ARGUMENT]...",
    .summary = "Run a program so that its GPU memory can be saved fast",
    .options = options,
    .min = 1,
    .max = -1,
    .needed = "name the program to run",
    .run = run,
};
