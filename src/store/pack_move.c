/* Moving a writer's packs into another folder. */
#include "store/pack_writer.h"

#include "base/cleanup.h"
#include "store/image_dir.h"
#include "store/pack_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

/* The pack under the same number in `dirfd`: a descriptor of it, or a negative errno. */
static int put(const struct bn_pack_own *p, int dirfd, uint32_t pack)
{
    int r = bn_pack_file_link(p->fd, dirfd, pack);
    if (r == 0) {
        int fd = fcntl(p->fd, F_DUPFD_CLOEXEC, 3);
        if (fd >= 0)
            return fd;
        r = -errno;
        bn_pack_file_unlink(dirfd, pack);
        return r;
    }
    if (!bn_pack_cannot_link(r))
        return r;
    bn_auto_fd fd = bn_pack_file_create(dirfd, pack);
    if (fd < 0)
        return fd;
    r = bn_pack_file_copy(p->fd, 0, fd, 0, p->length);
    if (r < 0) {
        bn_pack_file_unlink(dirfd, pack);
        return r;
    }
    return BN_TAKE_FD(fd);
}

static int describe(struct bn_error *err, int r, uint32_t pack)
{
    if (r == -EEXIST)
        return bn_error_set(
            err, r, "store",
            "the folder already holds " BN_PACK_NAME " of another checkpoint: choose an empty folder", pack);
    return bn_error_set(err, r, "store", "cannot move " BN_PACK_NAME " into the image folder: %s", pack,
                        strerror(-r));
}

int bn_pack_writer_retarget(struct bn_pack_writer *w, int dirfd, struct bn_error *err)
{
    if (w->finished)
        return bn_error_set(err, EINVAL, "store", "the packs are complete");
    bn_auto_fd to = fcntl(dirfd, F_DUPFD_CLOEXEC, 3);
    if (to < 0)
        return bn_error_set(err, errno, "store", "cannot use the image folder: %s", strerror(errno));
    struct bn_error unlocked = BN_ERROR_INIT;
    bn_auto_fd lock = bn_image_lock(to, false, &unlocked);
    if (lock == -EBUSY)
        return bn_error_set(err, EBUSY, unlocked.stage, "%s", unlocked.text);
    bn_auto_free int *fds = calloc(w->n_packs ? w->n_packs : 1, sizeof(*fds));
    if (!fds)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    int r = bn_pack_lanes_settle(w, err);
    if (r < 0)
        return r;
    uint32_t n = 0;
    for (; r >= 0 && n < w->n_packs; n++)
        fds[n] = r = w->packs[n].fd < 0 ? 0 : put(&w->packs[n], to, n);
    if (r < 0) {
        describe(err, r, n - 1);
        for (uint32_t i = 0; i + 1 < n; i++)
            if (w->packs[i].fd >= 0) {
                bn_pack_file_unlink(to, i);
                bn_close(fds[i]);
            }
        return r;
    }
    for (uint32_t i = 0; i < w->n_packs; i++)
        if (w->packs[i].fd >= 0) {
            bn_pack_file_unlink(w->dirfd, i);
            bn_close(w->packs[i].fd);
            w->packs[i].fd = fds[i];
        }
    for (unsigned i = 0; i < BN_PACK_LANES; i++)
        if (w->lanes[i].pack != BN_NO_PACK)
            w->lanes[i].fd = w->packs[w->lanes[i].pack].fd;
    bn_close(w->dirfd);
    bn_close(w->lock_fd);
    w->dirfd = BN_TAKE_FD(to);
    w->lock_fd = BN_TAKE_FD(lock);
    return 0;
}
