#include "cli/archiving.h"

#include "base/cleanup.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

bool cli_archive_name_ok(const char *name)
{
    static const char allowed[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-_";
    size_t len = strlen(name);
    return len > 0 && len <= CLI_ARCHIVE_NAME_MAX && strspn(name, allowed) == len && !strchr(".-_", name[0]);
}

/* ---- the list ---- */

static const char head[] = "bennu archive 1\n";

struct cli_archive_list {
    uint8_t bytes[BN_HASH_KEY_SIZE];
    struct bn_hash_key *key;
    /* Of the file under way. */
    struct bn_hash *values; /* of its pieces */
    size_t n, cap;
    uint64_t length;
    char *text;
    size_t text_len, text_cap;
};

struct cli_archive_list *cli_archive_list_new(const uint8_t key[BN_HASH_KEY_SIZE])
{
    struct cli_archive_list *l = calloc(1, sizeof(*l));
    if (!l)
        return NULL;
    memcpy(l->bytes, key, sizeof(l->bytes));
    l->key = bn_hash_key_new(key);
    l->text = strdup(head);
    l->text_len = sizeof(head) - 1;
    l->text_cap = sizeof(head);
    if (!l->key || !l->text) {
        cli_archive_list_free(l);
        return NULL;
    }
    return l;
}

void cli_archive_list_free(struct cli_archive_list *l)
{
    if (!l)
        return;
    bn_hash_key_free(l->key);
    free(l->values);
    free(l->text);
    free(l);
}

int cli_archive_list_add(struct cli_archive_list *l, const void *data, size_t len)
{
    if (l->n == l->cap) {
        size_t cap = l->cap ? 2 * l->cap : 64;
        struct bn_hash *more = realloc(l->values, cap * sizeof(*more));
        if (!more)
            return -ENOMEM;
        l->values = more;
        l->cap = cap;
    }
    bn_hash_chunk(l->key, data, len, &l->values[l->n++]);
    l->length += len;
    return 0;
}

int cli_archive_list_end(struct cli_archive_list *l, const char *name)
{
    size_t most = 2 * BN_HASH_SIZE + 1 + 20 + 1 + strlen(name) + 2;
    if (l->text_cap - l->text_len < most) {
        size_t cap = 2 * l->text_cap + most;
        char *more = realloc(l->text, cap);
        if (!more)
            return -ENOMEM;
        l->text = more;
        l->text_cap = cap;
    }
    struct bn_hash h;
    if (bn_hash_long(l->bytes, l->n ? (const void *)l->values : "", l->n * sizeof(*l->values), &h) < 0)
        return -ENOMEM;
    char *p = l->text + l->text_len;
    for (unsigned i = 0; i < BN_HASH_SIZE; i++)
        p += sprintf(p, "%02x", h.b[i]);
    p += sprintf(p, " %llu %s\n", (unsigned long long)l->length, name);
    l->text_len = (size_t)(p - l->text);
    l->n = 0;
    l->length = 0;
    return 0;
}

const char *cli_archive_list_text(const struct cli_archive_list *l, size_t *len)
{
    *len = l->text_len;
    return l->text;
}

bool cli_archive_list_differs(const struct cli_archive_list *l, const char *other, size_t len,
                              char name[CLI_ARCHIVE_NAME_MAX + 1])
{
    for (size_t at = 0; at < l->text_len;) {
        const char *line = l->text + at, *end = memchr(line, '\n', l->text_len - at);
        size_t n = (size_t)(end - line) + 1;
        if (n > len - at || memcmp(line, other + at, n) != 0) {
            const char *from = memrchr(line, ' ', n);
            size_t size = from ? (size_t)(end - from) - 1 : 0;
            memcpy(name, from ? from + 1 : "", size);
            name[size] = 0;
            return true;
        }
        at += n;
    }
    return false;
}

/* ---- reading and writing ---- */

bool cli_archive_interrupted(struct cli_archive_io *io)
{
    struct signalfd_siginfo info;
    if (io->signal == 0 && io->signals >= 0 && read(io->signals, &info, sizeof(info)) == sizeof(info))
        io->signal = (int)info.ssi_signo;
    return io->signal != 0;
}

ssize_t cli_archive_read(struct cli_archive_io *io, void *buf, size_t cap)
{
    for (;;) {
        struct pollfd p[2] = {{.fd = io->fd, .events = POLLIN}, {.fd = io->signals, .events = POLLIN}};
        if (poll(p, 2, -1) < 0 && errno != EINTR) /* a pipe may be silent for as long as it likes */
            break;
        if (cli_archive_interrupted(io)) {
            errno = EINTR;
            break;
        }
        ssize_t n = p[0].revents ? read(io->fd, buf, cap) : -1;
        if (n >= 0)
            return n;
        if (p[0].revents && errno != EINTR && errno != EAGAIN)
            break;
    }
    io->error = errno;
    return -1;
}

ssize_t cli_archive_write(struct cli_archive_io *io, const void *buf, size_t len)
{
    for (size_t done = 0; done < len;) {
        if (cli_archive_interrupted(io))
            errno = EINTR;
        else {
            ssize_t n = write(io->fd, (const char *)buf + done, len - done);
            if (n >= 0) {
                done += (size_t)n;
                continue;
            }
            if (errno == EINTR)
                continue;
        }
        io->error = errno;
        return -1;
    }
    return (ssize_t)len;
}
