/* A second plugin beside Bennu's: writes down which hooks reach it, and claims nothing. Built from CRIU's own header, as any other
 * plugin would be. In a file called cuda_plugin.so it leaves that name in the image, as CRIU's own does. */
#include <criu/criu-plugin.h>

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern int add_inventory_plugin(const char *name);

static int note(const char *what, int pid)
{
    Dl_info info;
    const char *path = getenv("OTHER_PLUGIN_LOG");
    FILE *f = path ? fopen(path, "a") : NULL;
    if (f && dladdr(&CR_PLUGIN_DESC, &info)) {
        fprintf(f, "%s %s %d\n", info.dli_fname, what, pid);
        fclose(f);
    }
    return -ENOTSUP;
}

static int on_pause(int pid)
{
    static bool added;
    Dl_info info;
    if (!added && dladdr(&CR_PLUGIN_DESC, &info) && strstr(info.dli_fname, "/cuda_plugin.so"))
        added = add_inventory_plugin("cuda_plugin") == 0;
    return note("pause", pid);
}
static int on_checkpoint(int pid)
{
    return note("checkpoint", pid);
}

__attribute__((visibility("default"))) cr_plugin_desc_t CR_PLUGIN_DESC = {
    .name = "other",
    .init = cr_plugin_dummy_init,
    .exit = cr_plugin_dummy_exit,
    .version = CRIU_PLUGIN_GEN_VERSION(0, 2, 0),
    .max_hooks = 12,
    .hooks =
        {[CR_PLUGIN_HOOK__PAUSE_DEVICES] = on_pause, [CR_PLUGIN_HOOK__CHECKPOINT_DEVICES] = on_checkpoint},
};
