/* Stands in for Bennu's CRIU plugin where the command line is tested against a daemon that only pretends: does nothing, or fails
 * CRIU at its start, as CLI_TEST_PLUGIN says. CRIU keeps its environment. */
#include <criu/criu-plugin.h>
#include <stdlib.h>

static int start(int stage)
{
    return getenv("CLI_TEST_PLUGIN_FAILS") ? -1 : 0;
}

static void end(int stage, int result)
{
}

/* By hand: CRIU refuses a plugin that knows more hooks than itself. */
__attribute__((visibility("default"))) extern cr_plugin_desc_t CR_PLUGIN_DESC;
cr_plugin_desc_t CR_PLUGIN_DESC = {
    .name = "cli_test_plugin",
    .init = start,
    .exit = end,
    .version = CRIU_PLUGIN_GEN_VERSION(0, 2, 0),
    .max_hooks = 12,
};
