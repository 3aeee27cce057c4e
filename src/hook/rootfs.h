/* Looking into a container's root folder before it runs. Symbolic links are followed as the container will follow them. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

/* -1 in place of the descriptor when it cannot be opened. Caller closes. */
int bn_rootfs_open(const char *path);
/* Has it a dynamic loader of glibc's (of this machine's architecture)? */
bool bn_rootfs_has_glibc(int root);
bool bn_rootfs_has_musl(int root);
/* Can a mount point be made in it, or is it there? */
bool bn_rootfs_takes_mounts(int root, const char *folder);
/* Highest first number of the libcuda.so.N.* that the image brings for forward compatibility; 0: none. */
unsigned bn_rootfs_compat_driver(int root);

enum bn_driver_file {
    BN_DRIVER_NONE, /* no file, or none that a program of this architecture loads */
    BN_DRIVER_REAL,
    BN_DRIVER_AGENT, /* the agent itself */
};
/* What the file at `path` of this machine is. *major gets the driver's first number, 0 if its name does not tell. */
enum bn_driver_file bn_driver_file(const char *path, const char *agent, unsigned *major);
/* "libcuda.so", "libcuda.so.1", "libcuda.so.580.65.06" */
bool bn_driver_name(const char *path);
