/* Where a restored container's processes are to be. An imported container has another name, hence another cgroup than at its
 * checkpoint, and CRIU must be told which. runc before 1.2 does so with cgroups of version 1 alone (criuApplyCgroups in its
 * container_linux.go); with version 2 the processes come back in the old container's group: they are outside of the new one's
 * limits and statistics, and its next checkpoint fails, since runc has CRIU freeze a group in which nobody is. runc has put CRIU
 * into the right group before it asks for the restore, so there it can be read. */
#include "criu/plugin.h"

#include "base/cgroup.h"
#include "base/proc.h"
#include "criu/criu_abi.h"
#include "image/manifest.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

void bnp_restore_cgroup(void)
{
    char comm[16], path[4200];
    int dir = criu_get_image_dir ? criu_get_image_dir() : -1;
    if (!new_cg_root_add || dir < 0 || faccessat(dir, BN_MANIFEST_NAME, F_OK, 0) < 0)
        return;
    if (bn_proc_comm(getppid(), comm) < 0 || strcmp(comm, "runc") != 0 ||
        !bn_cgroup_path(getpid(), true, path, sizeof(path)) || strcmp(path, "/") == 0)
        return;
    /* A newer runc has said the very same, which does no harm. */
    int r = new_cg_root_add("", path);
    bnp_log(r < 0 ? BNP_WARN : BNP_INFO, "%s the processes to the cgroup %s",
            r < 0 ? "cannot bring" : "bringing", path);
}
