/* The plugin's own declarations against CRIU's installed header, and the built plugin as CRIU would look at it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <criu/criu-plugin.h>

#include "criu/criu_abi.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <errno.h>
#include <unistd.h>

#define SAME_OFFSET(field) \
    _Static_assert(offsetof(cr_plugin_desc_t, field) == offsetof(struct bnp_desc, field), #field)
SAME_OFFSET(name);
SAME_OFFSET(init);
SAME_OFFSET(exit);
SAME_OFFSET(version);
SAME_OFFSET(max_hooks);
SAME_OFFSET(hooks);
_Static_assert((int)BNP_STAGE_DUMP == CR_PLUGIN_STAGE__DUMP, "stage");
_Static_assert((int)BNP_STAGE_PRE_DUMP == CR_PLUGIN_STAGE__PRE_DUMP, "stage");
_Static_assert((int)BNP_STAGE_RESTORE == CR_PLUGIN_STAGE__RESTORE, "stage");
_Static_assert((int)BNP_HOOK_DUMP_EXT_FILE == CR_PLUGIN_HOOK__DUMP_EXT_FILE, "hook");
_Static_assert((int)BNP_HOOK_RESTORE_EXT_FILE == CR_PLUGIN_HOOK__RESTORE_EXT_FILE, "hook");
_Static_assert((int)BNP_HOOK_RESUME_DEVICES_LATE == CR_PLUGIN_HOOK__RESUME_DEVICES_LATE, "hook");
_Static_assert((int)BNP_HOOK_PAUSE_DEVICES == CR_PLUGIN_HOOK__PAUSE_DEVICES, "hook");
_Static_assert((int)BNP_HOOK_CHECKPOINT_DEVICES == CR_PLUGIN_HOOK__CHECKPOINT_DEVICES, "hook");
/* CRIU 4.0 refuses more hooks and a newer version; this header is at least that old. */
_Static_assert(BNP_HOOKS == 12 && (int)BNP_HOOKS <= (int)CR_PLUGIN_HOOK__MAX, "hooks");
_Static_assert(BNP_API_VERSION == 0x200 && BNP_API_VERSION <= CRIU_PLUGIN_VERSION, "version");

static void *plugin;

static void descriptor(void **state)
{
    struct bnp_desc *d = dlsym(plugin, "CR_PLUGIN_DESC");
    assert_non_null(d);
    assert_string_equal(d->name, "bennu");
    assert_int_equal(d->version, BNP_API_VERSION);
    assert_int_equal(d->max_hooks, 12);
    assert_non_null(d->hooks[CR_PLUGIN_HOOK__PAUSE_DEVICES]);
    assert_non_null(d->hooks[CR_PLUGIN_HOOK__CHECKPOINT_DEVICES]);
    assert_non_null(d->hooks[CR_PLUGIN_HOOK__RESUME_DEVICES_LATE]);
}

/* Outside CRIU every symbol of CRIU's is missing, as the optional ones are in an old one: nothing may crash or fail. */
static void without_any_symbol_of_criu(void **state)
{
    struct bnp_desc *d = dlsym(plugin, "CR_PLUGIN_DESC");
    int (*pause)(int) = (int (*)(int))d->hooks[BNP_HOOK_PAUSE_DEVICES];
    for (int stage = 0; stage < 3; stage++) {
        assert_int_equal(d->init(stage), 0);
        assert_int_equal(pause(getpid()), -ENOTSUP);
        d->exit(stage, 0);
    }
}

/* Only what CRIU looks up may be visible: anything else could take the place of a function of CRIU's or another plugin's. */
static void exports_one_symbol(void **state)
{
    static const char *const private[] = {"bn_ctl_call", "bnp_log", "bn_error_set", "bnp_dump_pause",
                                          "bn_read_u32"};
    for (size_t i = 0; i < sizeof(private) / sizeof(private[0]); i++)
        assert_null(dlsym(plugin, private[i]));
}

int main(int argc, char **argv)
{
    plugin = argc > 1 ? dlopen(argv[1], RTLD_LAZY) : NULL;
    if (!plugin) {
        fprintf(stderr, "cannot load the plugin: %s\n", argc > 1 ? dlerror() : "no path given");
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(descriptor),
        cmocka_unit_test(without_any_symbol_of_criu),
        cmocka_unit_test(exports_one_symbol),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
