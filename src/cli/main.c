/* bennu: checkpoint and restore processes that use an NVIDIA GPU. */
#include "cli/cli.h"

#include "base/cleanup.h"
#include "config.h"

#include <string.h>

static const struct cli_command *const commands[] = {
    &cli_run,    &cli_dump,    &cli_pre_dump,  &cli_restore, &cli_suspend,
    &cli_resume, &cli_ps,      &cli_inspect,   &cli_export,  &cli_import,
    &cli_check,  &cli_install, &cli_uninstall, &cli_store,   &cli_watch_process};

static void print_help(FILE *out)
{
    fprintf(out, "Usage: bennu COMMAND [OPTION]... [OPERAND]...\n"
                 "       bennu --help | --version\n\n"
                 "Checkpoint and restore processes that use an NVIDIA GPU.\n\nCommands:\n");
    for (size_t i = 0; i < BN_ARRAY_SIZE(commands); i++)
        fprintf(out, "  %-9s %s\n", commands[i]->name, commands[i]->summary);
    fprintf(
        out,
        "\nOptions:\n  -h, --help     print this and exit\n  -V, --version  print the version and exit\n\n"
        "'bennu COMMAND --help' says more of each; see also bennu(1).\n");
}

static const struct cli_command *find_command(const char *name)
{
    for (size_t i = 0; i < BN_ARRAY_SIZE(commands); i++) {
        if (strcmp(commands[i]->name, name) == 0)
            return commands[i];
    }
    return NULL;
}

/* A full disk or a closed pipe behind standard output must not pass for success. */
static int flush_output(int code)
{
    if ((fflush(stdout) != 0 || ferror(stdout)) && errno != EPIPE) {
        fprintf(stderr, "%s: cannot write to standard output: %m\n", cli_name);
        return code == CLI_OK ? CLI_FAILED : code;
    }
    return code;
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        print_help(stderr);
        return CLI_USAGE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0) {
        print_help(stdout);
        return flush_output(CLI_OK);
    }
    if (strcmp(argv[1], "--version") == 0 || strcmp(argv[1], "-V") == 0) {
        puts("bennu " BENNU_VERSION);
        return flush_output(CLI_OK);
    }
    const struct cli_command *cmd = find_command(argv[1]);
    if (!cmd)
        return cli_usage("there is no %s '%s'", argv[1][0] == '-' ? "option" : "command", argv[1]);

    static char name[32];
    snprintf(name, sizeof(name), "bennu %s", cmd->name);
    cli_name = name;
    int code;
    int first = cli_parse(cmd, argc - 1, argv + 1, &code);
    if (first >= 0)
        code = cmd->run(argc - 1 - first, argv + 1 + first);
    return flush_output(code);
}
