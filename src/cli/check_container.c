/* bennu check: do containers get the agent? */
#include "cli/check.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "cli/setup.h"
#include "config.h"

#include <fcntl.h>
#include <string.h>

/* How many agents of other days are kept beside the one that new containers get. */
static unsigned count_agents(void)
{
    bn_auto_dir DIR *d = opendir(BENNU_AGENTS_DIR);
    unsigned n = 0;
    for (struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d))
        n += e->d_name[0] != '.';
    return n;
}

static void judge_hook(const char *program, const char *agent, bool chosen)
{
    if (!program || access(program, X_OK) < 0)
        check_add(CHECK_FAIL, "container hook",
                  "Podman starts no container without it: run 'bennu install', or remove " SETUP_HOOK,
                  "%s names %s, which cannot be run", SETUP_HOOK, program ? program : "no program");
    else if (!agent || access(agent, R_OK) < 0)
        check_add(CHECK_FAIL, "container hook", "run 'bennu install'",
                  "%s is missing: containers get no agent", agent ? agent : "the agent's name");
    else
        check_add(CHECK_OK, "container hook", "",
                  "Podman gives GPU containers%s %s (%u versions kept); one that was started without it is "
                  "saved by "
                  "the driver alone, more slowly",
                  chosen ? " with the annotation dev.bennu.agent=on" : "", agent, count_agents());
}

void check_container(void)
{
    static const char option[] = "--agent=";
    bn_auto_free void *text = NULL;
    size_t len, i;
    json_t *item;
    const char *agent = NULL;
    if (bn_read_file_at(AT_FDCWD, SETUP_HOOK, 1u << 20, &text, &len) < 0) {
        check_add(CHECK_OK, "container hook", "",
                  "none: containers get no agent, and the driver alone saves their GPU memory, more slowly; "
                  "'bennu install' adds it");
        return;
    }
    json_t *config = json_loadb(text, len, 0, NULL), *hook = json_object_get(config, "hook");
    json_array_foreach(json_object_get(hook, "args"), i, item)
    {
        const char *arg = json_string_value(item);
        if (arg && strncmp(arg, option, sizeof(option) - 1) == 0)
            agent = arg + sizeof(option) - 1;
    }
    bool chosen = json_object_get(json_object_get(config, "when"), "annotations");
    judge_hook(json_string_value(json_object_get(hook, "path")), agent, chosen);
    json_decref(config);
}
