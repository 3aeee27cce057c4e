#include "restore/host_check.h"

#include "base/cleanup.h"
#include "base/parallel.h"
#include "store/host_files.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>

/* Beside CRIU and the threads that load GPU memory. */
#define THREADS 4u

struct bn_host_check {
    int dirfd;
    const struct bn_manifest *manifest;
    struct bn_report *report;
    pthread_t thread;
    bool runs, stop;
    struct bn_error err; /* the first that was found */
};

static void compare(struct bn_host_check *c, unsigned which, unsigned threads)
{
    uint64_t bytes = 0;
    int phase = bn_report_begin(c->report, "host-verify");
    bn_host_files_check(c->dirfd, c->manifest, which, threads, &c->stop, &bytes, &c->err);
    bn_report_end(c->report, phase, bytes);
}

static void *compare_large(void *arg)
{
    compare(arg, BN_HOST_FILES_LARGE, bn_cores(THREADS));
    return NULL;
}

static int result(const struct bn_host_check *c, struct bn_error *err)
{
    return bn_error_is_set(&c->err) ? bn_error_set(err, c->err.code, c->err.stage, "%s", c->err.text) : 0;
}

int bn_host_check_start(int dirfd, const struct bn_manifest *m, struct bn_report *report,
                        struct bn_host_check **out, struct bn_error *err)
{
    struct bn_host_check *c = calloc(1, sizeof(*c));
    if (!c)
        return bn_error_set(err, ENOMEM, "host-files", "out of memory");
    *c = (struct bn_host_check){.dirfd = fcntl(dirfd, F_DUPFD_CLOEXEC, 3), .manifest = m, .report = report};
    int r = c->dirfd < 0 ? bn_error_set(err, errno, "host-files", "cannot use the image folder: %m") : 0;
    if (r == 0) {
        compare(c, BN_HOST_FILES_SMALL, 1);
        r = result(c, err);
    }
    if (r < 0) {
        bn_host_check_free(c);
        return r;
    }
    c->runs = pthread_create(&c->thread, NULL, compare_large, c) == 0;
    if (!c->runs)
        compare_large(c);
    *out = c;
    return 0;
}

int bn_host_check_wait(struct bn_host_check *c, struct bn_error *err)
{
    if (c->runs)
        pthread_join(c->thread, NULL);
    c->runs = false;
    return result(c, err);
}

void bn_host_check_free(struct bn_host_check *c)
{
    if (!c)
        return;
    __atomic_store_n(&c->stop, true, __ATOMIC_RELEASE);
    bn_host_check_wait(c, NULL);
    bn_close(c->dirfd);
    free(c);
}
