/* Scope-bound clean-up (GNU attribute cleanup). */
#pragma once

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* Close a descriptor and keep errno; negative numbers are nothing. Returns -1, so `fd = bn_close(fd)` reads well. */
static inline int bn_close(int fd)
{
    if (fd >= 0) {
        int saved = errno;
        close(fd);
        errno = saved;
    }
    return -1;
}

static inline void bn_cleanup_fd(int *fd)
{
    bn_close(*fd);
}
static inline void bn_cleanup_free(void *p)
{
    free(*(void **)p);
}
static inline void bn_cleanup_file(FILE **f)
{
    if (*f)
        fclose(*f);
}
static inline void bn_cleanup_dir(DIR **d)
{
    if (*d)
        closedir(*d);
}

#define bn_auto_fd __attribute__((cleanup(bn_cleanup_fd))) int
#define bn_auto_free __attribute__((cleanup(bn_cleanup_free)))
#define bn_auto_file __attribute__((cleanup(bn_cleanup_file)))
#define bn_auto_dir __attribute__((cleanup(bn_cleanup_dir)))

/* Hand ownership out of a scope: `return BN_TAKE_FD(fd);` / `return BN_TAKE_PTR(p);` */
#define BN_TAKE_FD(fd)        \
    ({                        \
        int bn_taken_ = (fd); \
        (fd) = -1;            \
        bn_taken_;            \
    })
#define BN_TAKE_PTR(p)                 \
    ({                                 \
        __typeof__(p) bn_taken_ = (p); \
        (p) = NULL;                    \
        bn_taken_;                     \
    })

#define BN_ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
