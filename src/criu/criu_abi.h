/* What the plugin uses of CRIU, declared here and not taken from criu-plugin.h: that header changes with CRIU (the number
 * of hooks, the arguments of one), and a plugin built with a newer one makes an older CRIU refuse every dump. This is the
 * interface of CRIU 4.0, API version 0.2.0 with 12 hooks, which every later CRIU accepts too. test/criu compares it with the
 * header where that is installed.
 *
 * Every function is weak: which of them a CRIU exports differs between versions, and a missing one must cost no dump.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

enum bnp_stage { BNP_STAGE_DUMP = 0, BNP_STAGE_PRE_DUMP = 1, BNP_STAGE_RESTORE = 2 };

enum bnp_hook {
    BNP_HOOK_DUMP_EXT_FILE = 2,
    BNP_HOOK_RESTORE_EXT_FILE = 3,
    BNP_HOOK_RESUME_DEVICES_LATE = 9,
    BNP_HOOK_PAUSE_DEVICES = 10,
    BNP_HOOK_CHECKPOINT_DEVICES = 11,
    BNP_HOOKS = 12,
};

#define BNP_API_VERSION (0u << 16 | 2u << 8 | 0u)

/* Layout of cr_plugin_desc_t. */
struct bnp_desc {
    const char *name;
    int (*init)(int stage);
    void (*exit)(int stage, int ret);
    unsigned int version;
    unsigned int max_hooks;
    void *hooks[BNP_HOOKS];
};

/* Task state in CRIU's images, hence the same in every version. */
#define BNP_TASK_ALIVE 1

#define BNP_WEAK __attribute__((weak, visibility("default")))

extern BNP_WEAK int criu_get_image_dir(void);
extern BNP_WEAK void print_on_level(unsigned int level, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
extern BNP_WEAK int log_get_fd(void);
/* Since 4.1. */
extern BNP_WEAK int add_inventory_plugin(const char *name);
extern BNP_WEAK bool check_and_remove_inventory_plugin(const char *name, size_t n);
/* What CRIU itself calls when a dump has failed (cr_dump_finish). */
extern BNP_WEAK int unsuspend_lsm(void);
extern BNP_WEAK void network_unlock(void);
extern BNP_WEAK void delete_link_remaps(void);
extern BNP_WEAK void clean_cr_time_mounts(void);
/* `controller`: "" for cgroups of version 2. Copies both. What CRIU does with a request's cg_root (cr-service.c). */
extern BNP_WEAK int new_cg_root_add(char *controller, char *newroot);
struct pstree_item;
extern BNP_WEAK struct pstree_item *root_item;
extern BNP_WEAK void pstree_switch_state(struct pstree_item *root, int state);
