/* One error object for everything that a person may read.
 *
 * Functions inside a module return 0 or a negative errno. Where a failure has a story (which process, which file, what to
 * do), the function also takes a `struct bn_error *` and fills it; the object travels over the wire unchanged and is
 * printed once, by the command line (or by the CRIU plugin into CRIU's log).
 */
#pragma once

#include <stdarg.h>
#include <stdbool.h>

#define BN_ERROR_STAGE_MAX 32 /* bytes, with the closing NUL */
#define BN_ERROR_TEXT_MAX 512 /* bytes, with the closing NUL */

struct bn_error {
    int code;                       /* positive errno; 0 = no error */
    char stage[BN_ERROR_STAGE_MAX]; /* the step that failed: "gate", "driver-checkpoint", … */
    char text[BN_ERROR_TEXT_MAX];   /* names the thing and says what to do; no newline at the end */
};

#define BN_ERROR_INIT \
    (struct bn_error) \
    {                 \
        0             \
    }

/* Fill `err` (may be NULL) unless it already holds an error: the first cause is the one worth reading.
 * `code` is a positive or negative errno; returns it negated to negative, so `return bn_error_set(...)` works. */
int bn_error_set(struct bn_error *err, int code, const char *stage, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* As above, but replaces what is there, from which the arguments may be. */
int bn_error_replace(struct bn_error *err, int code, const char *stage, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

static inline bool bn_error_is_set(const struct bn_error *err)
{
    return err && err->code != 0;
}
