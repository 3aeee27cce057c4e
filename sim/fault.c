/* SPDX-License-Identifier: MIT */

/*
 * Injected failures and the trace.
 *
 * BENNU_SIM_FAIL="cuMemCreate:3=2,cuMemAlloc:1+=2": the third cuMemCreate of this process answers 2, and every
 * cuMemAlloc from the first on. `kill` in place of the code kills the process there. Names carry no version or stream
 * suffix. BENNU_SIM_FAIL_FILE names a file with the same text, looked at on every call: whenever its text changes,
 * its rules replace those in force and counting starts again, so that a running process can be told to fail later.
 * BENNU_SIM_TRACE=path appends "pid tid name code" for each call as it returns.
 */

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sim.h"

#define MAX_RULES 32
#define CODE_KILL (-1)

struct rule {
    char name[56];
    unsigned long nth, seen;
    bool onwards;
    int code;
};

static struct {
    pthread_mutex_t lock;
    bool ready;
    _Atomic bool active;
    char file[PATH_MAX], trace[PATH_MAX];
    char text[2048]; /* what the file said last */
    struct rule rules[MAX_RULES];
    unsigned count;
} fault = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* name:N=code or name:N+=code */
static bool parse_rule(const char *text, size_t len, struct rule *out)
{
    char buffer[128], *colon, *end;
    struct rule rule = {0};

    while (len && strchr(" \t\r\n", *text))
        text++, len--;
    while (len && strchr(" \t\r\n", text[len - 1]))
        len--;
    if (len == 0 || len >= sizeof(buffer))
        return false;
    memcpy(buffer, text, len);
    buffer[len] = '\0';
    colon = strchr(buffer, ':');
    if (!colon || (size_t)(colon - buffer) >= sizeof(rule.name))
        return false;
    memcpy(rule.name, buffer, (size_t)(colon - buffer));
    rule.nth = strtoul(colon + 1, &end, 10);
    if (end == colon + 1 || rule.nth == 0)
        return false;
    if (*end == '+') {
        rule.onwards = true;
        end++;
    }
    if (*end != '=')
        return false;
    rule.code = strcmp(end + 1, "kill") == 0 ? CODE_KILL : atoi(end + 1);
    *out = rule;
    return true;
}

static void parse(const char *text)
{
    fault.count = 0;
    while (*text && fault.count < MAX_RULES) {
        size_t len = strcspn(text, ",;\n");

        if (parse_rule(text, len, &fault.rules[fault.count]))
            fault.count++;
        text += len;
        if (*text)
            text++;
    }
}

void fault_init(void)
{
    pthread_mutex_lock(&fault.lock);
    if (!fault.ready) {
        const char *rules = getenv("BENNU_SIM_FAIL"), *file = getenv("BENNU_SIM_FAIL_FILE"),
                   *trace = getenv("BENNU_SIM_TRACE");

        if (rules)
            parse(rules);
        if (file)
            snprintf(fault.file, sizeof(fault.file), "%s", file);
        if (trace)
            snprintf(fault.trace, sizeof(fault.trace), "%s", trace);
        fault.ready = true;
        fault.active = fault.count || fault.file[0] || fault.trace[0];
    }
    pthread_mutex_unlock(&fault.lock);
}

static void reread(void)
{
    char text[sizeof(fault.text)] = "";
    int fd = open(fault.file, O_RDONLY | O_CLOEXEC);

    if (fd >= 0) {
        ssize_t n = read(fd, text, sizeof(text) - 1);

        text[n > 0 ? n : 0] = '\0';
        close(fd);
    }
    if (strcmp(text, fault.text) == 0)
        return;
    memcpy(fault.text, text, sizeof(text));
    parse(text);
}

CUresult fault_check(const char *name)
{
    int code = 0;

    if (!fault.active)
        return CUDA_SUCCESS;
    pthread_mutex_lock(&fault.lock);
    if (fault.file[0])
        reread();
    for (unsigned i = 0; i < fault.count; i++) {
        struct rule *rule = &fault.rules[i];

        if (strcmp(rule->name, name) != 0)
            continue;
        rule->seen++;
        if (rule->seen == rule->nth || (rule->onwards && rule->seen > rule->nth))
            code = rule->code;
    }
    pthread_mutex_unlock(&fault.lock);
    if (code == CODE_KILL)
        kill(getpid(), SIGKILL);
    return (CUresult)code;
}

void fault_trace(const char *name, CUresult rc)
{
    char line[128];
    int fd, len;

    if (!fault.active || !fault.trace[0])
        return;
    /* Opened each time: nothing of it is left open for CRIU to find. */
    fd = open(fault.trace, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (fd < 0)
        return;
    len = snprintf(line, sizeof(line), "%d %ld %s %d\n", (int)getpid(), syscall(SYS_gettid), name, (int)rc);
    if (len > 0 && write(fd, line, (size_t)len) < 0)
        errno = 0;
    close(fd);
}
