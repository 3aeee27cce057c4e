#include "base/error.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fill(struct bn_error *err, int code, const char *stage, const char *fmt, va_list ap)
{
    struct bn_error e = {.code = code}; /* the new words may be made from the old ones */
    snprintf(e.stage, sizeof(e.stage), "%s", stage ? stage : "");
    vsnprintf(e.text, sizeof(e.text), fmt, ap);
    *err = e;
    return -code;
}

int bn_error_set(struct bn_error *err, int code, const char *stage, const char *fmt, ...)
{
    code = code == 0 ? EIO : abs(code);
    if (!err || err->code != 0)
        return -code;

    va_list ap;
    va_start(ap, fmt);
    int r = fill(err, code, stage, fmt, ap);
    va_end(ap);
    return r;
}

int bn_error_replace(struct bn_error *err, int code, const char *stage, const char *fmt, ...)
{
    code = code == 0 ? EIO : abs(code);
    if (!err)
        return -code;

    va_list ap;
    va_start(ap, fmt);
    int r = fill(err, code, stage, fmt, ap);
    va_end(ap);
    return r;
}
