/* The host memory of an image's processes, as CRIU has written it: what of it Bennu can fill in at a restore. Any thread. */
#pragma once

#include "base/error.h"
#include "image/pagemap.h"

#include <stdint.h>
#include <sys/types.h>

/* The pages of one process, by the pid that it saw itself. Returns a descriptor of the pages image, and *out is the caller's
 * (bn_pagemap_free). -ENOENT: no such process in the image; -EBADMSG: damaged, or a file is too short; others as open(2). */
int bn_host_pages_open(int dirfd, pid_t pid, struct bn_pagemap *out, struct bn_error *err);

struct bn_host_pages {
    uint64_t bytes; /* that could be filled in, of all processes */
    uint64_t
        common; /* of these, at addresses that several processes have: forked processes may share the pages themselves */
};

/* Sums up all processes, and looks whether their files are there and long enough: CRIU itself waits for ever at the end of one that is
 * too short. Images on top of others (CRIU's --prev-images-dir) have nothing to be filled in. 0, or an error as above. */
int bn_host_pages_survey(int dirfd, struct bn_host_pages *out, struct bn_error *err);
