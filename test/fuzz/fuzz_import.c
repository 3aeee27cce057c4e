/* bennu import: whatever the bytes are, they make a checkpoint in the folder, or none, and nothing outside of it. */
#include "fuzz.h"

#include "base/cleanup.h"
#include "cli/archiving.h"
#include "cli/cli.h"
#include "store/image_dir.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Of the command line's: nobody looks on. */
void cli_progress_update(struct cli_progress *p, const struct bn_progress *now)
{
    (void)p, (void)now;
}

static char outer[64];

static void remove_outer(void)
{
    rmdir(outer);
}

/* The folder in which the one is that is imported to: NULL on a machine without room for it. */
static const char *make_outer(void)
{
    if (!outer[0]) {
        strcpy(outer,
               access("/dev/shm", W_OK) == 0 ? "/dev/shm/bennu-fuzz.XXXXXX" : "/tmp/bennu-fuzz.XXXXXX");
        if (!mkdtemp(outer))
            return NULL;
        atexit(remove_outer);
    }
    return outer;
}

/* Remove what is in there: new regular files, and only with `some`. */
static void empty_folder(int dirfd, bool some)
{
    int fd = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_dir DIR *dir = fdopendir(fd);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        struct stat st;
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
            continue;
        if (!some || fstatat(dirfd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0 || !S_ISREG(st.st_mode) ||
            st.st_nlink != 1 || (st.st_mode & 07777) != 0600 || unlinkat(dirfd, e->d_name, 0) < 0)
            abort();
    }
}

#define BLOCK 512u
#define SUM_AT 148u
#define SUM_LEN 8u
#define MAGIC_AT 257u

/* Headers of files get the checksums that they should have: else nearly nothing would come further than to them. */
static void seal(uint8_t *data, size_t size)
{
    for (size_t at = 0; at + BLOCK <= size; at += BLOCK) {
        char *field = (char *)data + at + SUM_AT;
        unsigned sum = 0;
        if (memcmp(data + at + MAGIC_AT, "ustar", 5) != 0)
            continue;
        memset(field, ' ', SUM_LEN);
        for (unsigned i = 0; i < BLOCK; i++)
            sum += data[at + i];
        snprintf(field, SUM_LEN - 1, "%06o", sum);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    bn_auto_free uint8_t *data = malloc(size ? size : 1);
    if (!data)
        return 0;
    memcpy(data, input, size);
    seal(data, size);
    bn_auto_fd file = memfd_create("archive", MFD_CLOEXEC);
    bn_auto_fd parent = make_outer() ? open(outer, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (file < 0 || parent < 0 || write(file, data, size) != (ssize_t)size || lseek(file, 0, SEEK_SET) != 0 ||
        mkdirat(parent, "in", 0700) < 0)
        return 0;
    bn_auto_fd dir = openat(parent, "in", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir < 0)
        abort();
    struct cli_archive_io io = {.name = "archive", .fd = file, .signals = -1};
    struct bn_manifest *m = NULL;
    struct bn_error err = BN_ERROR_INIT;
    int r = cli_unpack(&io, dir, true, NULL, &m, &err);
    if (r < 0 && (r != -err.code || !err.text[0] || m || bn_image_present(dir) == 1))
        abort();
    if (r >= 0 && (!m || bn_image_present(dir) != 1))
        abort();
    bn_manifest_free(m);
    empty_folder(dir, true);
    if (unlinkat(parent, "in", AT_REMOVEDIR) < 0)
        abort();
    empty_folder(parent, false);
    return 0;
}
