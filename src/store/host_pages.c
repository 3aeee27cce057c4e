#include "store/host_pages.h"

#include "base/cleanup.h"
#include "base/io.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define PAGEMAP "pagemap-%d.img"
#define PAGEMAP_MAX ((size_t)256 << 20) /* bytes: more than 10 million ranges */

static int read_pagemap(int dirfd, const char *name, struct bn_pagemap *out, struct bn_error *err)
{
    bn_auto_free void *bytes = NULL;
    size_t len = 0;
    int r = bn_read_file_at(dirfd, name, PAGEMAP_MAX, &bytes, &len);
    if (r < 0)
        return bn_error_set(err, r, "host-memory", "cannot read %s of the checkpoint: %s", name,
                            strerror(-r));
    return bn_pagemap_decode(bytes, len, out, err);
}

static int open_pages(int dirfd, const struct bn_pagemap *m, struct bn_error *err)
{
    char name[32];
    struct stat st;
    snprintf(name, sizeof(name), "pages-%u.img", m->pages_id);
    bn_auto_fd fd = openat(dirfd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0 && errno == ENOENT)
        return bn_error_set(err, EBADMSG, "host-memory", "%s of the checkpoint is missing", name);
    if (fd < 0 || fstat(fd, &st) < 0)
        return bn_error_set(err, errno, "host-memory", "cannot open %s of the checkpoint: %m", name);
    if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size < m->pages_bytes)
        return bn_error_set(err, EBADMSG, "host-memory", "%s of the checkpoint is shorter than it should be",
                            name);
    return BN_TAKE_FD(fd);
}

int bn_host_pages_open(int dirfd, pid_t pid, struct bn_pagemap *out, struct bn_error *err)
{
    char name[32];
    snprintf(name, sizeof(name), PAGEMAP, pid);
    int r = read_pagemap(dirfd, name, out, err);
    if (r < 0)
        return r;
    r = open_pages(dirfd, out, err);
    if (r < 0)
        bn_pagemap_free(out);
    return r;
}

/* ---- all of them ---- */

struct ranges {
    struct bn_page_range *v;
    size_t n;
};

static int add_all(struct ranges *all, const struct bn_pagemap *m)
{
    if (m->n == 0)
        return 0;
    struct bn_page_range *grown = reallocarray(all->v, all->n + m->n, sizeof(*grown));
    if (!grown)
        return -ENOMEM;
    memcpy(grown + all->n, m->ranges, m->n * sizeof(*grown));
    all->v = grown;
    all->n += m->n;
    return 0;
}

static int by_address(const void *a, const void *b)
{
    const struct bn_page_range *x = a, *y = b;
    return (x->va > y->va) - (x->va < y->va);
}

static struct bn_host_pages sum_up(struct ranges *all)
{
    struct bn_host_pages sum = {0};
    uint64_t end = 0, distinct = 0;
    if (all->n > 0)
        qsort(all->v, all->n, sizeof(*all->v), by_address);
    for (size_t i = 0; i < all->n; i++) {
        uint64_t from = all->v[i].va, to = from + all->v[i].bytes;
        sum.bytes += to - from;
        from = from > end ? from : end;
        distinct += to > from ? to - from : 0;
        end = to > end ? to : end;
    }
    sum.common = sum.bytes - distinct;
    return sum;
}

/* The pid, or 0: not its name. */
static pid_t pid_of(const char *file)
{
    char name[32];
    int pid = strncmp(file, "pagemap-", 8) == 0 ? atoi(file + 8) : 0;
    snprintf(name, sizeof(name), PAGEMAP, pid);
    return pid > 0 && strcmp(file, name) == 0 ? pid : 0;
}

int bn_host_pages_survey(int dirfd, struct bn_host_pages *out, struct bn_error *err)
{
    *out = (struct bn_host_pages){0};
    if (faccessat(dirfd, "parent", F_OK, AT_SYMLINK_NOFOLLOW) == 0)
        return 0;
    bn_auto_fd own = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_dir DIR *dir = own >= 0 ? fdopendir(own) : NULL;
    if (!dir)
        return bn_error_set(err, errno, "host-memory", "cannot list the checkpoint: %m");
    own = -1;
    struct ranges all = {0};
    int r = 0;
    for (struct dirent *e; r == 0 && (e = readdir(dir)) != NULL;) {
        struct bn_pagemap m = {0};
        pid_t pid = pid_of(e->d_name);
        if (pid == 0)
            continue;
        bn_auto_fd pages = bn_host_pages_open(dirfd, pid, &m, err);
        r = pages < 0 ? pages : 0;
        if (r == 0 && add_all(&all, &m) < 0)
            r = bn_error_set(err, ENOMEM, "host-memory", "out of memory");
        bn_pagemap_free(&m);
    }
    if (r == 0)
        *out = sum_up(&all);
    free(all.v);
    return r;
}
