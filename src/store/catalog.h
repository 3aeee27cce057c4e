/* A store: a folder of checkpoint folders. What is in it, and what can be said of it without reading packs. One thread. */
#pragma once

#include "base/error.h"
#include "image/manifest.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum bn_entry_state {
    BN_ENTRY_COMPLETE,   /* has a manifest that can be read */
    BN_ENTRY_CRIU,       /* a checkpoint of CRIU's without GPU memory of ours */
    BN_ENTRY_DAMAGED,    /* has a manifest that cannot be read: `why` */
    BN_ENTRY_WRITING,    /* not complete, and somebody holds it (or nobody can tell, for want of locks) */
    BN_ENTRY_INCOMPLETE, /* not complete, and nobody is writing it: what a crash left */
};

struct bn_entry {
    char *name;
    int fd; /* of the folder */
    enum bn_entry_state state;
    struct bn_manifest *m; /* of a complete one, else NULL */
    struct bn_error why;
    uint64_t own,
        shared; /* bytes of packs that go with it when it is removed, and of those that others have, too */
};

struct bn_catalog {
    struct bn_entry *entries; /* the oldest first, those without a manifest last */
    size_t n;
};

/* Look at every folder in `dirfd`; folders that are no checkpoints are left out, symbolic links not followed. Others as open(2),
 * readdir(3). The caller frees it with bn_catalog_free(). */
int bn_catalog_read(int dirfd, struct bn_catalog *out, struct bn_error *err);
/* The same for one folder in it. -ENOENT: no such folder; -EINVAL: it is no checkpoint. */
int bn_catalog_read_one(int dirfd, const char *name, struct bn_catalog *out, struct bn_error *err);
/* Remove a checkpoint with everything in its folder. It disappears at one moment: it gets a name that no checkpoint has
 * (BN_ENTRY_REMOVED and its own), under which bn_collect() finds what is left if this is killed. The caller holds it, and has looked
 * whether it may go. Errors as rename(2) and rmdir(2). */
#define BN_ENTRY_REMOVED ".bennu-removed-"
int bn_entry_remove(int dirfd, const struct bn_entry *e, struct bn_error *err);
void bn_catalog_free(struct bn_catalog *c);

/* Is this the name of a file that Bennu or CRIU writes into a checkpoint? */
bool bn_is_image_file_name(const char *name);
