/* The hook's editor of containers' configurations: never crashes, what it makes can be read, and is not edited twice. */
#include "fuzz.h"

#include "base/cleanup.h"
#include "hook/edit.h"
#include "hook/json.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    /* Any file that is there; the corpus mounts /proc/self/exe as the driver, and "/" has a C library. */
    static const struct bn_hook_options options = {.agent = "/bin/sh"};
    bn_auto_free char *out = NULL, *again = NULL, *copy = malloc(size ? size : 1);
    size_t len = 0, again_len = 0;
    char why[64];
    struct bn_json j = {0};
    if (!copy)
        return 0;
    memcpy(copy, data, size); /* exactly as long: a read beyond it is seen */
    int r = bn_hook_edit(copy, size, &options, &out, &len, why, sizeof(why));
    if (r < 0 ? !why[0] || out : r > 1 || (r == 1) != (out != NULL))
        abort();
    if (r == 1) {
        if (bn_json_scan(out, len, &j) < 0)
            abort();
        bn_json_free(&j);
        if (bn_hook_edit(out, len, &options, &again, &again_len, why, sizeof(why)) != 0)
            abort();
    }
    return 0;
}
