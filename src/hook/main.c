/* bennu-oci-hook: a hook of stage "precreate" for Podman. Reads a container's configuration from standard input and writes
 * it, edited or as it was, to standard output.
 *
 * Podman starts no container whose hook fails. So whatever is wrong, the configuration passes through byte for byte and the reason
 * goes to standard error and, since Podman shows that of failed hooks alone, to the system's log. Only where the
 * configuration itself cannot be read or written is the exit status not 0. */
#include "base/cleanup.h"
#include "base/io.h"
#include "config.h"
#include "hook/edit.h"
#include "hook/json.h"

#include <getopt.h>
#include <stdbool.h>
#include <string.h>
#include <syslog.h>

static void report(const char *text)
{
    fprintf(stderr, "bennu-oci-hook: %s\n", text);
    openlog("bennu-oci-hook", LOG_PID, LOG_DAEMON);
    syslog(LOG_WARNING, "%s", text);
    closelog();
}

static void report_errno(const char *what)
{
    char text[200];
    snprintf(text, sizeof(text), "%s: %s", what, strerror(errno));
    report(text);
}

/* All of standard input, at most one byte more than is worth editing: the rest is then still to be read. */
static ssize_t read_input(char **out)
{
    size_t len = 0, cap = 65536;
    char *text = malloc(cap);
    while (text && len <= BN_JSON_TEXT_MAX) {
        if (len == cap) {
            char *more = realloc(text, cap * 2);
            if (!more)
                break;
            text = more;
            cap *= 2;
        }
        ssize_t n = read(STDIN_FILENO, text + len, cap - len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            free(text);
            return -1;
        }
        if (n == 0)
            break;
        len += (size_t)n;
    }
    *out = text;
    return text ? (ssize_t)len : -1;
}

static int pass_rest(void)
{
    char buf[65536];
    for (;;) {
        ssize_t n = read(STDIN_FILENO, buf, sizeof(buf));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return (int)n;
        if (bn_write_full(STDOUT_FILENO, buf, (size_t)n) < 0)
            return -1;
    }
}

static int filter(const struct bn_hook_options *options)
{
    bn_auto_free char *text = NULL, *edited = NULL;
    size_t edited_len = 0;
    char why[400];
    ssize_t len = read_input(&text);
    if (len < 0) {
        report_errno("cannot read the container's configuration");
        return 1;
    }
    int r = bn_hook_edit(text, (size_t)len, options, &edited, &edited_len, why, sizeof(why));
    if (why[0])
        report(why);
    const char *out = r > 0 ? edited : text;
    size_t out_len = r > 0 ? edited_len : (size_t)len;
    int w = bn_write_full(STDOUT_FILENO, out, out_len);
    if (w < 0)
        errno = -w;
    if (w < 0 || pass_rest() < 0) {
        report_errno("cannot pass the container's configuration on");
        return 1;
    }
    return 0;
}

static int usage(FILE *out)
{
    fputs("Usage: bennu-oci-hook [--agent=FILE] <config.json >edited.json\n"
          "A precreate hook for Podman: gives GPU containers Bennu's agent. See bennu-install(1).\n",
          out);
    return out == stdout ? 0 : 2;
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {
        {"agent", required_argument, NULL, 'a'},
        {"help", no_argument, NULL, 'h'},
        {"version", no_argument, NULL, 'V'},
        {0},
    };
    struct bn_hook_options options = {.agent = BENNU_AGENT_PATH};
    for (int c; (c = getopt_long(argc, argv, "hV", longs, NULL)) != -1;) {
        switch (c) {
        case 'a': options.agent = optarg; break;
        case 'h': return usage(stdout);
        case 'V': puts("bennu-oci-hook " BENNU_VERSION); return 0;
        default: return usage(stderr);
        }
    }
    if (optind < argc || options.agent[0] != '/')
        return usage(stderr);
    return filter(&options);
}
