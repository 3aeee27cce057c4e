/* CRIU's list of open files: never crashes, never reads beyond, and every name has a port. */
#include "fuzz.h"

#include "image/sockets.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_tcp_names names = {0};
    int r = bn_tcp_names_decode(data, size, &names, &err);
    if (r < 0) {
        if (names.v || err.code != -r || !err.text[0])
            abort();
        return 0;
    }
    for (size_t i = 0; i < names.n; i++)
        if (names.v[i].port == 0 || !bn_tcp_names_have(&names, names.v[i].addr, names.v[i].port))
            abort();
    bn_tcp_names_free(&names);
    return 0;
}
