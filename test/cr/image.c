/* SPDX-License-Identifier: MIT */

/* Changes a manifest and writes it back with a right checksum: image FILE cc MAJOR.MINOR, image FILE driver VERSION, or
 * image FILE files none, after which it knows nothing of CRIU's files. */
#include "image/manifest.h"

#include "base/cleanup.h"
#include "base/io.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fail(const char *what)
{
    fprintf(stderr, "image: %s\n", what);
    return 1;
}

int main(int argc, char **argv)
{
    bn_auto_manifest struct bn_manifest *m = NULL;
    bn_auto_free void *in = NULL, *out = NULL;
    size_t len;
    struct bn_error err = BN_ERROR_INIT;
    if (argc != 4)
        return fail("usage: image FILE cc MAJOR.MINOR | image FILE driver VERSION | image FILE files none");
    if (bn_read_file_at(AT_FDCWD, argv[1], BN_MANIFEST_BYTES_MAX, &in, &len) < 0)
        return fail("cannot read the file");
    if (bn_manifest_decode(in, len, &m, &err) < 0)
        return fail(err.text);
    if (strcmp(argv[2], "driver") == 0) {
        m->driver_version = (uint32_t)atoi(argv[3]);
    } else if (strcmp(argv[2], "files") == 0) {
        m->n_files = m->n_file_hashes = 0;
    } else {
        for (uint32_t i = 0; i < m->n_gpus; i++)
            if (sscanf(argv[3], "%u.%u", &m->gpus[i].cc_major, &m->gpus[i].cc_minor) != 2)
                return fail("MAJOR.MINOR is wanted");
    }
    if (bn_manifest_encode(m, &out, &len, &err) < 0)
        return fail(err.text);
    bn_auto_fd fd = open(argv[1], O_WRONLY | O_TRUNC | O_CLOEXEC);
    return fd >= 0 && bn_write_full(fd, out, len) == 0 ? 0 : fail("cannot write the file");
}
