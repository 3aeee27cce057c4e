#include "cli/cli.h"

#include "base/cleanup.h"

#include <ctype.h>
#include <string.h>

char *cli_clean(char *s)
{
    for (char *p = s; *p; p++) {
        if (iscntrl((unsigned char)*p))
            *p = '?';
    }
    return s;
}

void cli_print_json(json_t *object)
{
    if (!object) {
        fprintf(stderr, "%s: out of memory\n", cli_name);
        return;
    }
    json_dumpf(object, stdout, JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(9));
    putchar('\n');
    json_decref(object);
}

json_t *cli_json_ok(void)
{
    return json_pack("{s:b}", "ok", true);
}

int cli_fail(int exit_code, const struct bn_error *err, bool json)
{
    struct bn_error copy = *err;
    cli_clean(copy.text);
    cli_clean(copy.stage);
    fprintf(stderr, "%s: %s\n", cli_name, copy.text);
    if (json)
        cli_print_json(json_pack("{s:b, s:{s:i, s:i, s:s%, s:s%}}", "ok", false, "error", "exit_code",
                                 exit_code, "errno", copy.code, "stage", copy.stage, strlen(copy.stage),
                                 "message", copy.text, strlen(copy.text)));
    return exit_code;
}

char *cli_bytes(uint64_t bytes, char buf[16])
{
    static const char *const unit[] = {"B", "kB", "MB", "GB", "TB", "PB"};
    double v = (double)bytes;
    size_t u = 0;
    while (v >= 999.5 && u + 1 < BN_ARRAY_SIZE(unit)) {
        v /= 1000;
        u++;
    }
    snprintf(buf, 16, u == 0 || v >= 99.95 ? "%.0f %s" : "%.1f %s", v, unit[u]);
    return buf;
}

void cli_add_phase(struct bn_phases *phases, const char *name, uint64_t start_ns, uint64_t duration_ns)
{
    if (phases->n >= BN_PHASES_MAX)
        return;
    struct bn_phase *p = &phases->phase[phases->n++];
    *p = (struct bn_phase){.start_ns = start_ns, .duration_ns = duration_ns};
    snprintf(p->name, sizeof(p->name), "%s", name);
}

static double rate(const struct bn_phase *p)
{
    return p->duration_ns ? (double)p->bytes / (double)p->duration_ns : 0; /* bytes a nanosecond = GB/s */
}

void cli_print_phases(FILE *out, const struct bn_phases *phases, uint64_t total_ns)
{
    char buf[16];
    fprintf(out, "%-28s %9s %9s %10s %8s\n", "phase", "start", "time", "bytes", "GB/s");
    for (uint32_t i = 0; i < phases->n; i++) {
        struct bn_phase p = phases->phase[i];
        fprintf(out, "%-28s %7.3f s %7.3f s", cli_clean(p.name), (double)p.start_ns / 1e9,
                (double)p.duration_ns / 1e9);
        if (p.bytes)
            fprintf(out, " %10s %8.2f", cli_bytes(p.bytes, buf), rate(&p));
        fputc('\n', out);
    }
    fprintf(out, "%-28s %9s %7.3f s\n", "total", "", (double)total_ns / 1e9);
}

json_t *cli_json_phases(const struct bn_phases *phases)
{
    json_t *list = json_array();
    for (uint32_t i = 0; list && i < phases->n; i++) {
        struct bn_phase p = phases->phase[i];
        cli_clean(p.name);
        json_array_append_new(list, json_pack("{s:s, s:f, s:f, s:I}", "name", p.name, "start_s",
                                              (double)p.start_ns / 1e9, "duration_s",
                                              (double)p.duration_ns / 1e9, "bytes", (json_int_t)p.bytes));
    }
    return list;
}
