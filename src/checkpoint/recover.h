/* After a daemon was killed: from the keeper's records (record.h) to processes that go on. */
#pragma once

#include "checkpoint/record.h"
#include "checkpoint/suspend.h"

/* Take the `n` records of targets, all of one session, up again. Descriptors are taken out of them. Touches no process. *out is
 * NULL when none lives any more. *suspended: they are to stay as they are until somebody resumes them. Records of processes that
 * are gone are dropped; where this fails all are kept. */
int bn_recover_open(struct bn_env *env, struct bn_record *const *records, size_t n, struct bn_suspended **out,
                    bool *suspended, struct bn_error *err);

/* Take up the tree whose memory is in this folder of the disk tier, and which nobody has any more: the folder itself tells of it. The
 * keeper has it again afterwards. *out is NULL when none of its processes lives: the folder is removed then. -ENOENT, -EBADMSG: it tells
 * nothing, or nothing that makes sense. */
int bn_recover_folder(struct bn_env *env, int dirfd, struct bn_suspended **out, struct bn_error *err);

/* Give host memory of killed daemons back to the machine, except what these trees, all there are, have in it. */
void bn_recover_trim(struct bn_suspended *const *trees, size_t n);

/* Wait, as long as it takes, until every process can run or is gone. */
void bn_recover_wait(const struct bn_suspended *s);

/* Bring the processes back from whatever the killed daemon had done to them. On success *s is freed and set NULL; on failure, after
 * several tries, what could be brought back runs and the object is kept, for bn_resume. */
int bn_recover(struct bn_suspended **s, struct bn_report *report, struct bn_error *err);

/* The image of a dump that was under way. First before any new request is served: without a manifest it is removed, for good. Where
 * it has one, this returns false, and wants to be called again when the processes are gone or run: CRIU has ended then, and if it
 * could not report the dump as done, our plugin has taken CRIU's inventory away. Such an image is none either. */
bool bn_recover_image(const struct bn_record *record, bool processes_run);
