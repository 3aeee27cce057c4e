#include "cli/cli.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "cli/setup.h"
#include "config.h"

#include <fcntl.h>
#include <string.h>

/* This program is ROOT/src/cli/bennu in a build folder. The folder may have been moved since it was configured, so its place
 * is told from the program's own, and the file that ninja keeps there tells it from any other folder of that name. */
static char *find_build_root(void)
{
    static const char tail[] = "/src/cli/bennu";
    static char exe[PATH_MAX];
    ssize_t len = readlink("/proc/self/exe", exe, sizeof(exe) - 1);
    if (len <= (ssize_t)strlen(tail))
        return NULL;
    exe[len] = 0;
    char *end = exe + len - strlen(tail);
    if (strcmp(end, tail) != 0)
        return NULL;
    *end = 0;
    return exe;
}

const char *cli_build_root(void)
{
    static bool looked;
    static const char *root;
    if (!looked)
        root = find_build_root();
    looked = true;
    return root;
}

static void resolve(const char *variable, const char *in_build, const char *installed, char *out)
{
    const char *given = getenv(variable);
    const char *root = cli_build_root();
    if (given && *given)
        snprintf(out, PATH_MAX, "%s", given);
    else if (root)
        snprintf(out, PATH_MAX, "%s/%s", root, in_build);
    else
        snprintf(out, PATH_MAX, "%s", installed);
}

void cli_agent_path(char *out)
{
    bn_auto_free void *data = NULL;
    size_t len;
    char id[64], kept[PATH_MAX];
    resolve("BENNU_AGENT", "src/agent/libbennu.so", BENNU_AGENT_PATH, out);
    if (strcmp(out, BENNU_AGENT_PATH) != 0 || bn_read_file_at(AT_FDCWD, out, SETUP_FILE_MAX, &data, &len) < 0)
        return;
    /* The copy that outlives an upgrade, if 'bennu install' has made it: CRIU restores a process with the very file it had. */
    setup_agent_id(data, len, id);
    snprintf(kept, sizeof(kept), "%s/%s/libbennu.so", BENNU_AGENTS_DIR, id);
    if (access(kept, R_OK) == 0)
        snprintf(out, PATH_MAX, "%s", kept);
}

void cli_plugin_dir(char *out)
{
    resolve("BENNU_PLUGIN_DIR", "src/criu", BENNU_PLUGIN_DIR, out);
}

const char *cli_rundir(void)
{
    const char *given = getenv("BENNU_RUNDIR");
    return given && *given ? given : BENNU_RUNDIR;
}
