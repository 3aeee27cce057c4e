/* The CRIU plugin: entry points and descriptor. docs/ARCHITECTURE.md shows where each hook lies in a dump and a restore. */
#include "criu/plugin.h"

#include "criu/criu_abi.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

/* Hooks are called in every stage, also in a pre-dump, which never calls exit(): nothing may stay paused after one. */
static int stage_now = -1;

void bnp_log(enum bnp_level level, const char *fmt, ...)
{
    static const char *const prefix[] = {"", "Error (bennu): ", "Warn  (bennu): ", "bennu: ", "bennu: "};
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    if (print_on_level)
        print_on_level(level, "%s%s\n", prefix[level], text);
    else if (level <= BNP_WARN)
        fprintf(stderr, "%s%s\n", prefix[level], text);
}

/* A non-zero answer fails every dump of the machine, GPU or not: only a restore of an image that needs us may fail here. */
static int on_init(int stage)
{
    stage_now = stage;
    bnp_dump_reset();
    bnp_cancel_init();
    if (stage != BNP_STAGE_RESTORE)
        return 0;
    bnp_restore_cgroup();
    return bnp_restore_init();
}

static void on_exit(int stage, int ret)
{
    if (stage == BNP_STAGE_DUMP)
        bnp_dump_exit(ret);
    else if (stage == BNP_STAGE_RESTORE)
        bnp_restore_exit(ret);
    stage_now = -1;
}

/* A pre-dump saves host memory of a program that goes on, and the dump leaves out what was not written since. The kernel learns of writes by
 * faults, and what a GPU writes into pinned host memory faults nowhere: it would be missing. Nor can CRIU pass over what a process has
 * mapped of a GPU; it would fail at that without a reason that anybody understands, when it has stopped everything. */
static int on_pre_dump(int pid)
{
    if (!bnp_maps_gpu(pid))
        return -ENOTSUP;
    bnp_log(BNP_ERROR,
            "process %d has a GPU in its memory, so CRIU cannot save that ahead of a checkpoint: make one "
            "without --pre-checkpoint",
            pid);
    return -EBUSY;
}

static int on_pause(int pid)
{
    if (stage_now == BNP_STAGE_PRE_DUMP)
        return on_pre_dump(pid);
    return stage_now == BNP_STAGE_DUMP ? bnp_dump_pause(pid) : -ENOTSUP;
}

static int on_checkpoint(int pid)
{
    return stage_now == BNP_STAGE_DUMP ? bnp_dump_checkpoint(pid) : -ENOTSUP;
}

static int on_resume(int pid)
{
    return stage_now == BNP_STAGE_RESTORE ? bnp_restore_resume(pid) : -ENOTSUP;
}

static int on_dump_ext_file(int fd, int id)
{
    return stage_now == BNP_STAGE_DUMP && bnp_dump_active() ? bnp_dump_ext_file(fd, id) : -ENOTSUP;
}

/* By hand, and not by the header's macros: see criu_abi.h. The name is compared as a prefix by CRIU: it must be the beginning of
 * no other plugin's name. */
__attribute__((visibility("default"))) struct bnp_desc CR_PLUGIN_DESC = {
    .name = "bennu",
    .init = on_init,
    .exit = on_exit,
    .version = BNP_API_VERSION,
    .max_hooks = BNP_HOOKS,
    .hooks =
        {
            [BNP_HOOK_DUMP_EXT_FILE] = on_dump_ext_file,
            [BNP_HOOK_RESTORE_EXT_FILE] = bnp_restore_ext_file,
            [BNP_HOOK_RESUME_DEVICES_LATE] = on_resume,
            [BNP_HOOK_PAUSE_DEVICES] = on_pause,
            [BNP_HOOK_CHECKPOINT_DEVICES] = on_checkpoint,
        },
};
