#include "cli/cli.h"

#include "base/cleanup.h"

#include <ctype.h>
#include <getopt.h>
#include <stdarg.h>
#include <string.h>

#define OPTIONS_MAX 16
#define LONG_ONLY 256 /* getopt's value of the i-th option is LONG_ONLY + i */
#define HELP (LONG_ONLY + OPTIONS_MAX)

const char *cli_name = "bennu";

int cli_usage(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "%s: ", cli_name);
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, "; see '%s --help'\n", cli_name);
    va_end(ap);
    return CLI_USAGE;
}

void cli_print_help(const struct cli_command *cmd)
{
    printf("Usage: bennu %s%s%s%s\n\n%s.\n\nOptions:\n", cmd->name, cmd->options->name ? " [OPTION]..." : "",
           *cmd->operands ? " " : "", cmd->operands, cmd->summary);
    for (const struct cli_option *o = cmd->options; o->name; o++) {
        char left[64], letter[8] = "    ";
        if (o->letter)
            snprintf(letter, sizeof(letter), "-%c, ", o->letter);
        snprintf(left, sizeof(left), "%s--%s%s%s", letter, o->name, o->arg ? "=" : "", o->arg ? o->arg : "");
        printf("  %-26s %s\n", left, o->help);
    }
    printf("  %-26s %s\n\nSee bennu-%s(1).\n", "-h, --help", "print this and exit", cmd->name);
}

static int parse_uint(const char *text, unsigned *out)
{
    char *end;
    errno = 0;
    unsigned long v = strtoul(text, &end, 10);
    if (errno || *end || !isdigit((unsigned char)text[0]) || v > UINT_MAX)
        return -EINVAL;
    *out = (unsigned)v;
    return 0;
}

static int store(const struct cli_option *o, const char *arg)
{
    switch (o->type) {
    case CLI_FLAG: *(bool *)o->value = true; return 0;
    case CLI_STRING: *(const char **)o->value = arg; return 0;
    case CLI_UINT: return parse_uint(arg, o->value);
    }
    return -EINVAL;
}

static size_t tables_for_getopt(const struct cli_command *cmd, struct option *longs, char *shorts)
{
    size_t n = 0;
    /* ':' first: we word the errors ourselves. '+': a program's own options are not ours. */
    if (cmd->max < 0)
        *shorts++ = '+';
    *shorts++ = ':';
    *shorts++ = 'h';
    for (const struct cli_option *o = cmd->options; o->name && n < OPTIONS_MAX; o++, n++) {
        longs[n] =
            (struct option){o->name, o->arg ? required_argument : no_argument, NULL, LONG_ONLY + (int)n};
        if (o->letter) {
            *shorts++ = o->letter;
            if (o->arg)
                *shorts++ = ':';
        }
    }
    longs[n] = (struct option){"help", no_argument, NULL, HELP};
    *shorts = 0;
    return n;
}

static const struct cli_option *option_of(const struct cli_command *cmd, size_t n, int c)
{
    if (c >= LONG_ONLY)
        return &cmd->options[c - LONG_ONLY];
    for (size_t i = 0; i < n; i++) {
        if (cmd->options[i].letter == c)
            return &cmd->options[i];
    }
    return NULL;
}

static int check_operands(const struct cli_command *cmd, int given)
{
    if (given < cmd->min)
        return cli_usage("%s", cmd->needed);
    if (cmd->max >= 0 && given > cmd->max)
        return cli_usage("too many operands: %s", cmd->needed);
    return CLI_OK;
}

int cli_parse(const struct cli_command *cmd, int argc, char **argv, int *exit_code)
{
    struct option longs[OPTIONS_MAX + 2] = {0};
    char shorts[2 * OPTIONS_MAX + 8];
    size_t n = tables_for_getopt(cmd, longs, shorts);
    opterr = 0;
    *exit_code = CLI_OK;
    for (int c; (c = getopt_long(argc, argv, shorts, longs, NULL)) != -1;) {
        if (c == 'h' || c == HELP) {
            cli_print_help(cmd);
            return -1;
        }
        if (c == '?' || c == ':') {
            const char *given = argv[optind - 1];
            *exit_code =
                c == ':' ? cli_usage("%s needs an argument", given) : cli_usage("unknown option %s", given);
            return -1;
        }
        const struct cli_option *o = option_of(cmd, n, c);
        if (!o || store(o, optarg) < 0) {
            *exit_code = cli_usage("--%s takes a number, not '%s'", o ? o->name : "?", optarg);
            return -1;
        }
    }
    *exit_code = check_operands(cmd, argc - optind);
    return *exit_code == CLI_OK ? optind : -1;
}
