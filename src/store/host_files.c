#include "store/host_files.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "base/parallel.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define STAGE "host-files"
#define THREADS_MAX 8u

/* Pieces of 2 MiB, by all threads together: the hash of each is computed, or compared. */
struct run {
    int dirfd;
    const struct bn_manifest *m;
    struct bn_hash_key *key;
    struct bn_hash *out; /* NULL: compare */
    const bool *bad;     /* each file: there is nothing to compare in it; may be NULL */
    unsigned which;
    const bool *cancel;
    bn_verify_fn damaged;
    void *arg;
    pthread_mutex_t lock; /* everything below */
    uint32_t next;
    uint64_t bytes;
};

/* The file that a piece belongs to. */
static const struct bn_image_file *file_of(const struct bn_manifest *m, uint32_t piece)
{
    uint32_t low = 0, high = m->n_files - 1;
    while (low < high) {
        uint32_t mid = low + (high - low + 1) / 2;
        if (m->files[mid].first_hash <= piece)
            low = mid;
        else
            high = mid - 1;
    }
    return &m->files[low];
}

static int open_file(int dirfd, const struct bn_image_file *f, struct bn_error *err)
{
    struct stat st;
    int fd = openat(dirfd, f->name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT)
        return bn_error_set(err, EBADMSG, STAGE, "the checkpoint is damaged: its %s is missing", f->name);
    if (fd < 0)
        return bn_error_set(err, errno, STAGE, "cannot open %s of the checkpoint: %m", f->name);
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (uint64_t)st.st_size == f->length)
        return fd;
    close(fd);
    return bn_error_set(err, EBADMSG, STAGE,
                        "%s is not the file that the checkpoint was made with: it had %llu bytes", f->name,
                        (unsigned long long)f->length);
}

static int look_at(struct run *run, uint32_t piece, void *buffer, struct bn_error *err)
{
    const struct bn_image_file *f = file_of(run->m, piece);
    uint64_t at = (uint64_t)(piece - f->first_hash) * BN_CHUNK_SIZE;
    size_t bytes = f->length - at < BN_CHUNK_SIZE ? f->length - at : BN_CHUNK_SIZE;
    struct bn_hash hash;
    bn_auto_fd fd = open_file(run->dirfd, f, err);
    if (fd < 0)
        return fd;
    int r = bn_pread_full(fd, buffer, bytes, at);
    if (r < 0)
        return bn_error_set(err, r, STAGE, "cannot read %s of the checkpoint: %s", f->name, strerror(-r));
    bn_hash_chunk(run->key, buffer, bytes, &hash);
    pthread_mutex_lock(&run->lock);
    run->bytes += bytes;
    pthread_mutex_unlock(&run->lock);
    if (run->out)
        run->out[piece] = hash;
    else if (!bn_hash_equal(&hash, &run->m->file_hashes[piece]))
        return bn_error_set(err, EBADMSG, STAGE,
                            "%s is damaged: bytes %llu to %llu are not those that the checkpoint was made "
                            "with: restore another checkpoint",
                            f->name, (unsigned long long)at, (unsigned long long)(at + bytes - 1));
    return 0;
}

static bool is_of(const struct bn_image_file *f, unsigned which)
{
    return which & (f->length > BN_CHUNK_SIZE ? BN_HOST_FILES_LARGE : BN_HOST_FILES_SMALL);
}

static bool wanted(const struct run *run, uint32_t piece)
{
    const struct bn_image_file *f = file_of(run->m, piece);
    return is_of(f, run->which) && !(run->bad && run->bad[f - run->m->files]);
}

static int64_t next_piece(struct run *run)
{
    int64_t piece = -1;
    pthread_mutex_lock(&run->lock);
    while (run->next < run->m->n_file_hashes && piece < 0) {
        piece = wanted(run, run->next) ? (int64_t)run->next : -1;
        run->next++;
    }
    pthread_mutex_unlock(&run->lock);
    return piece;
}

static int work(void *ctx, size_t index, struct bn_error *err)
{
    struct run *run = ctx;
    bn_auto_free void *buffer = aligned_alloc(64, BN_CHUNK_SIZE);
    (void)index;
    if (!buffer)
        return bn_error_set(err, ENOMEM, STAGE, "out of memory");
    for (int64_t piece; (piece = next_piece(run)) >= 0;) {
        struct bn_error why = BN_ERROR_INIT;
        if (run->cancel && __atomic_load_n(run->cancel, __ATOMIC_ACQUIRE))
            return bn_error_set(err, ECANCELED, STAGE, "cancelled");
        int r = look_at(run, (uint32_t)piece, buffer, &why);
        if (r < 0 && run->out)
            return bn_error_set(err, r, why.stage, "%s", why.text);
        if (r < 0) {
            pthread_mutex_lock(&run->lock);
            run->damaged(run->arg, &why);
            pthread_mutex_unlock(&run->lock);
        }
    }
    return 0;
}

static int go_through(struct run *run, unsigned threads, uint64_t *bytes, struct bn_error *err)
{
    run->key = bn_hash_key_new(run->m->key);
    if (!run->key)
        return bn_error_set(err, ENOMEM, STAGE, "out of memory");
    pthread_mutex_init(&run->lock, NULL);
    uint32_t n = run->m->n_file_hashes;
    if (threads == 0)
        threads = bn_cores(THREADS_MAX);
    int r = bn_parallel(threads < n ? threads : n, work, run, err);
    pthread_mutex_destroy(&run->lock);
    bn_hash_key_free(run->key);
    *bytes = run->bytes;
    return r;
}

/* ---- noting ---- */

static int is_image(const struct dirent *e)
{
    return bn_image_file_name_ok(e->d_name);
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

static int note_file(int dirfd, const char *name, struct bn_manifest *m, struct bn_error *err)
{
    struct stat st;
    if (fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return bn_error_set(err, errno, STAGE, "cannot look at %s of the checkpoint: %m", name);
    if (!S_ISREG(st.st_mode))
        return 0;
    int r = bn_manifest_add_file(m, name, (uint64_t)st.st_size);
    return r < 0 ? bn_error_set(err, r, STAGE, "cannot note %s of the checkpoint: %s", name, strerror(-r))
                 : 0;
}

int bn_host_files_note(int dirfd, struct bn_manifest *m, const bool *cancel, uint64_t *bytes,
                       struct bn_error *err)
{
    struct dirent **list;
    int n = scandirat(dirfd, ".", &list, is_image, by_name), r = 0;
    if (n < 0)
        return bn_error_set(err, errno, STAGE, "cannot read the image folder: %m");
    for (int i = 0; i < n; i++) {
        r = r < 0 ? r : note_file(dirfd, list[i]->d_name, m, err);
        free(list[i]);
    }
    free(list);
    *bytes = 0;
    if (r < 0 || m->n_file_hashes == 0)
        return r;
    struct run run = {
        .dirfd = dirfd, .m = m, .out = m->file_hashes, .which = BN_HOST_FILES_ALL, .cancel = cancel};
    return go_through(&run, 0, bytes, err);
}

/* ---- comparing ---- */

int bn_host_files_compare(int dirfd, const struct bn_manifest *m, unsigned which, unsigned threads,
                          const bool *cancel, bn_verify_fn damaged, void *arg, uint64_t *bytes,
                          struct bn_error *err)
{
    bn_auto_free bool *bad = calloc(m->n_files ? m->n_files : 1, sizeof(*bad));
    *bytes = 0;
    if (!bad)
        return bn_error_set(err, ENOMEM, STAGE, "out of memory");
    for (uint32_t i = 0; i < m->n_files; i++) {
        struct bn_error why = BN_ERROR_INIT;
        bn_auto_fd fd = is_of(&m->files[i], which) ? open_file(dirfd, &m->files[i], &why) : -1;
        bad[i] = bn_error_is_set(&why);
        if (bad[i])
            damaged(arg, &why);
    }
    if (m->n_file_hashes == 0)
        return 0;
    struct run run = {
        .dirfd = dirfd, .m = m, .bad = bad, .which = which, .cancel = cancel, .damaged = damaged, .arg = arg};
    return go_through(&run, threads, bytes, err);
}

static void keep_first(void *arg, const struct bn_error *what)
{
    struct bn_error *first = arg;
    if (!bn_error_is_set(first))
        *first = *what;
}

int bn_host_files_check(int dirfd, const struct bn_manifest *m, unsigned which, unsigned threads,
                        const bool *cancel, uint64_t *bytes, struct bn_error *err)
{
    struct bn_error first = BN_ERROR_INIT;
    uint64_t unasked;
    int r = bn_host_files_compare(dirfd, m, which, threads, cancel, keep_first, &first,
                                  bytes ? bytes : &unasked, err);
    return r < 0 || !bn_error_is_set(&first) ? r
                                             : bn_error_set(err, first.code, first.stage, "%s", first.text);
}
