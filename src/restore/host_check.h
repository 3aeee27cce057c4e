/* Are CRIU's files what they were when the checkpoint was made? Asked beside all else that a restore does, and answered before CRIU lets any process go.
 * One thread at a time per object. */
#pragma once

#include "base/error.h"
#include "checkpoint/report.h"
#include "image/manifest.h"

struct bn_host_check;

/* Compare the small files, of which CRIU makes the processes, at once, and begin with the large ones, which are host memory. `dirfd` is duplicated;
 * manifest and report must outlive the check. -EBADMSG: one is damaged, and the text says which; -ENOMEM. */
int bn_host_check_start(int dirfd, const struct bn_manifest *m, struct bn_report *report,
                        struct bn_host_check **out, struct bn_error *err);
/* Wait for its end: 0, or what is damaged. May be asked again. */
int bn_host_check_wait(struct bn_host_check *c, struct bn_error *err);
/* Stops it where need be. Takes NULL. */
void bn_host_check_free(struct bn_host_check *c);
