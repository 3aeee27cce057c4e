/* Stands in for libFuzzer: gives every file of the named folders to the target, whole, cut off at many lengths, and with single
 * bytes changed. Without a file to give it fails. */
#include "fuzz.h"

#include "base/cleanup.h"
#include "base/io.h"

#include <fcntl.h>
#include <string.h>

#define TRIES 500 /* of each kind, of each file */

static void replay(const uint8_t *data, size_t len)
{
    LLVMFuzzerTestOneInput(data, len);
    size_t step = len / TRIES + 1;
    for (size_t at = 0; at < len; at += step) {
        bn_auto_free uint8_t *copy = malloc(len); /* of the very size, so that ASan sees a read beyond */
        bn_auto_free uint8_t *cut = malloc(at ? at : 1);
        if (!copy || !cut)
            abort();
        memcpy(cut, data, at);
        LLVMFuzzerTestOneInput(cut, at);
        memcpy(copy, data, len);
        copy[at] ^= (uint8_t)(1u << (at % 8));
        LLVMFuzzerTestOneInput(copy, len);
        copy[at] = 0xff;
        LLVMFuzzerTestOneInput(copy, len);
    }
}

int main(int argc, char **argv)
{
    unsigned files = 0;
    for (int i = 1; i < argc; i++) {
        bn_auto_dir DIR *dir = opendir(argv[i]);
        for (struct dirent *e; dir && (e = readdir(dir));) {
            bn_auto_free void *data = NULL;
            size_t len;
            if (e->d_name[0] == '.' || bn_read_file_at(dirfd(dir), e->d_name, 16u << 20, &data, &len) < 0)
                continue;
            replay(data, len);
            files++;
        }
    }
    printf("%u files\n", files);
    return files == 0;
}
