/* Which process is meant: by its id, or by the name of the container whose first process it is. */
#include "cli/cli.h"

#include "base/cgroup.h"
#include "base/cleanup.h"

#include <ctype.h>
#include <string.h>
#include <sys/wait.h>

#define PODMAN_MS 30000u
#define NAME_MAX_LENGTH 255u
#define MARK "bennu-pid="

/* As Podman allows names and ids. What begins with a dash, or with a slash, never gets to it. */
static bool is_name(const char *text)
{
    size_t n = strlen(text);
    if (n == 0 || n > NAME_MAX_LENGTH || !isalnum((unsigned char)text[0]))
        return false;
    for (const char *c = text; *c; c++)
        if (!isalnum((unsigned char)*c) && !strchr("_.-", *c))
            return false;
    return true;
}

/* The last line that says something, fit for a message. */
static const char *last_words(char *text)
{
    char *end = text + strlen(text);
    while (end > text && isspace((unsigned char)end[-1]))
        *--end = 0;
    char *line = strrchr(text, '\n');
    line = line ? line + 1 : text;
    for (char *c = line; *c; c++)
        *c = iscntrl((unsigned char)*c) ? ' ' : *c;
    return line;
}

static int read_answer(const char *name, const char *text, pid_t *pid, struct bn_error *err)
{
    char id[16] = "", state[32] = "";
    const char *mark = strstr(text, MARK);
    if (!mark || sscanf(mark, MARK "%15[0-9] %31[a-z]", id, state) != 2)
        return bn_error_set(err, EBADMSG, "container", "Podman's answer about container '%s' makes no sense",
                            name);
    if (cli_parse_pid(id, pid) < 0)
        return bn_error_set(err, ESRCH, "container", "container '%s' does not run: Podman calls it %s", name,
                            state);
    return 0;
}

static int ask_podman(const char *name, pid_t *pid, struct bn_error *err)
{
    char *const argv[] = {
        "podman",     "container", "inspect", "--format", MARK "{{.State.Pid}} {{.State.Status}}",
        (char *)name, NULL};
    bn_auto_free char *text = NULL;
    int status = cli_capture(argv, PODMAN_MS, &text);
    if (status < 0)
        return bn_error_set(err, status, "container", "cannot ask Podman for container '%s': %s", name,
                            strerror(-status));
    if (WIFEXITED(status) && WEXITSTATUS(status) == CLI_NOT_FOUND)
        return bn_error_set(
            err, ENOENT, "container",
            "'%s' is not a process id, and there is no podman here that would know a container of that name",
            name);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        return bn_error_set(err, ENOENT, "container", "Podman knows no container '%s': %s", name,
                            last_words(text));
    return read_answer(name, text, pid, err);
}

int cli_process_operand(const char *text, pid_t *pid, bool as_json)
{
    struct bn_error err = BN_ERROR_INIT;
    if (cli_parse_pid(text, pid) == 0)
        return CLI_OK;
    if (!is_name(text) || strspn(text, "0123456789") == strlen(text))
        return cli_usage("'%s' is neither a process id nor the name of a container", text);
    if (cli_need_root(&err) < 0 || ask_podman(text, pid, &err) < 0)
        return cli_fail(CLI_FAILED, &err, as_json);
    return CLI_OK;
}

int cli_check_thawed(const char *text, pid_t pid, struct bn_error *err)
{
    char folder[512];
    pid_t number;
    if (!bn_cgroup_is_frozen(pid, folder, sizeof(folder)))
        return 0;
    if (cli_parse_pid(text, &number) < 0)
        return bn_error_set(err, EBUSY, "container", "container '%s' is paused: 'podman unpause %s' first",
                            text, text);
    return bn_error_set(err, EBUSY, "process",
                        "process %d is frozen with its cgroup %s: thaw that first ('podman unpause', if it "
                        "is a container)",
                        pid, cli_clean(folder));
}
