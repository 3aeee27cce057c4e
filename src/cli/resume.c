/* bennu resume: give a suspended tree its GPU memory back. */
#include "cli/cli.h"

static bool json, quiet;

static const struct cli_option options[] = {
    CLI_TRACE_OPTION,
    {"json", 'j', CLI_FLAG, NULL, &json, "print the result as one JSON object"},
    {"quiet", 'q', CLI_FLAG, NULL, &quiet, "print nothing but errors"},
    {0},
};

static int resume(int argc, char **argv)
{
    return cli_suspend_or_resume(BN_CTL_RESUME, argv[0], 0, 0, json, quiet);
}

const struct cli_command cli_resume = {
    .name = "resume",
    .operands = "PID|CONTAINER",
    .summary = "Give a suspended process and its children their GPU memory back",
    .options = options,
    .min = 1,
    .max = 1,
    .needed = "one operand is needed: PID or CONTAINER",
    .run = resume,
};
