#include "cli/cli.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "base/proc.h"
#include "image/manifest.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#define RECORD_VERSION 1
#define RECORD_MAX (1u << 20)

/* Does `pid` hold the end of the pipe `link` that is opposite to `mode` (0400 reads, 0200 writes)? The permission bits of
 * /proc/PID/fd/N tell how the descriptor was opened. */
static bool holds_other_end(pid_t pid, const char *link, mode_t mode)
{
    char path[32], to[64];
    snprintf(path, sizeof(path), "/proc/%d/fd", pid);
    bn_auto_dir DIR *d = opendir(path);
    if (!d)
        return false;
    for (struct dirent *e = readdir(d); e; e = readdir(d)) {
        struct stat st;
        ssize_t n = readlinkat(dirfd(d), e->d_name, to, sizeof(to) - 1);
        if (n < 0)
            continue;
        to[n] = 0;
        if (strcmp(to, link) == 0 && fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
            (st.st_mode & mode) == 0)
            return true;
    }
    return false;
}

/* A pipe whose other end nobody in the tree holds is the program's connection with its caller. CRIU would restore it as a pipe
 * that leads nowhere; instead `restore` puts its own descriptor in its place. */
static void find_stdio(const struct cli_record *r, int fd, char out[64])
{
    char path[48], link[64];
    struct stat st;
    out[0] = 0;
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", r->pids[0], fd);
    ssize_t n = readlink(path, link, sizeof(link) - 1);
    if (n < 0 || lstat(path, &st) < 0)
        return;
    link[n] = 0;
    if (strncmp(link, "pipe:[", 6) != 0)
        return;
    mode_t mode = st.st_mode & 0600;
    for (size_t i = 0; i < r->npids; i++) {
        if (holds_other_end(r->pids[i], link, mode))
            return;
    }
    snprintf(out, 64, "%s", link);
}

int cli_record_make(pid_t root, bool gpu, int criu, struct cli_record *r)
{
    *r = (struct cli_record){.gpu = gpu, .criu = criu};
    int rc = bn_proc_tree(root, &r->pids, &r->npids);
    if (rc < 0)
        return rc;
    for (int fd = 0; fd < 3; fd++)
        find_stdio(r, fd, r->stdio[fd]);
    return 0;
}

int cli_record_write(const struct cli_record *r, int dir)
{
    json_t *pids = json_array();
    for (size_t i = 0; pids && i < r->npids; i++)
        json_array_append_new(pids, json_integer(r->pids[i]));
    json_t *o = json_pack("{s:i, s:b, s:i, s:o, s:[s,s,s]}", "version", RECORD_VERSION, "gpu", r->gpu, "criu",
                          r->criu, "pids", pids, "stdio", r->stdio[0], r->stdio[1], r->stdio[2]);
    bn_auto_free char *text = o ? json_dumps(o, JSON_COMPACT) : NULL;
    json_decref(o);
    return text ? bn_write_file_atomic_at(dir, BN_IMAGE_RECORD_NAME, text, strlen(text)) : -ENOMEM;
}

/* The name goes to CRIU as a key: only what we would have written ourselves. */
static bool is_pipe_name(const char *s)
{
    unsigned long ino;
    char back[64];
    if (sscanf(s, "pipe:[%lu]", &ino) != 1)
        return false;
    snprintf(back, sizeof(back), "pipe:[%lu]", ino);
    return strcmp(back, s) == 0;
}

static int unpack(json_t *o, struct cli_record *r)
{
    int version, gpu;
    json_t *pids;
    const char *s[3];
    if (json_unpack(o, "{s:i, s:b, s:i, s:o, s:[s,s,s]}", "version", &version, "gpu", &gpu, "criu", &r->criu,
                    "pids", &pids, "stdio", &s[0], &s[1], &s[2]) < 0 ||
        version != RECORD_VERSION || !json_is_array(pids))
        return -EBADMSG;
    r->gpu = gpu;
    for (int i = 0; i < 3; i++) {
        if (*s[i] && !is_pipe_name(s[i]))
            return -EBADMSG;
        snprintf(r->stdio[i], sizeof(r->stdio[i]), "%s", s[i]);
    }
    size_t n = json_array_size(pids);
    r->pids = n ? calloc(n, sizeof(pid_t)) : NULL;
    if (!r->pids)
        return n ? -ENOMEM : -EBADMSG;
    for (r->npids = 0; r->npids < n; r->npids++) {
        json_int_t pid = json_integer_value(json_array_get(pids, r->npids));
        if (pid < 1 || pid > INT_MAX)
            return -EBADMSG;
        r->pids[r->npids] = (pid_t)pid;
    }
    return 0;
}

int cli_record_read(int dir, struct cli_record *r)
{
    *r = (struct cli_record){0};
    bn_auto_free void *text = NULL;
    size_t len;
    int rc = bn_read_file_at(dir, BN_IMAGE_RECORD_NAME, RECORD_MAX, &text, &len);
    if (rc < 0)
        return rc == -EFBIG ? -EBADMSG : rc;
    json_t *o = json_loadb(text, len, 0, NULL);
    rc = o ? unpack(o, r) : -EBADMSG;
    json_decref(o);
    if (rc < 0)
        cli_record_free(r);
    return rc;
}

void cli_record_free(struct cli_record *r)
{
    free(r->pids);
    *r = (struct cli_record){0};
}
