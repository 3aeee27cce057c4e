/* Control groups, where they can be frozen: version 2, or version 1's hierarchy of the freezer.
 * Files: Documentation/admin-guide/cgroup-v2.rst (cgroup.freeze, cgroup.events), cgroup-v1/freezer-subsystem.rst. Any thread.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

/* Path of the process's group in that hierarchy, as this process sees it ("/.." leads out of what it sees). False: it has none. */
bool bn_cgroup_path(pid_t pid, bool v2, char *out, size_t cap);

/* Folder of the process's group in that hierarchy as it is mounted here, in which the mount point's path has *mount bytes. -ENOENT: there
 * is none, or it lies outside of what is mounted. -ENAMETOOLONG. */
int bn_cgroup_folder(pid_t pid, bool v2, char *out, size_t cap, size_t *mount);

/* Content of a group's file, cut at cap - 1 bytes; "" if it cannot be read. */
void bn_cgroup_read(const char *folder, const char *file, char *out, size_t cap);

/* Does none of the process's threads run because its group, or one above it, is frozen? `folder` then tells its group. */
bool bn_cgroup_is_frozen(pid_t pid, char *folder, size_t cap);
