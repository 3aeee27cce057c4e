/* What the agent asks of the C library, as glibc 2.17 has it: it is loaded into programs of containers that are older than the
 * machine. Included before everything else in each of the agent's sources (meson.build). scripts/check-glibc is the test.
 *
 * Functions that newer C libraries have under a newer version, without any change that matters here, are asked for under the
 * old one. Where they were in libdl and libpthread before 2.34, those are named as needed when the agent is linked. */
#pragma once

#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#define BN_LIBC_FIRST "GLIBC_2.2.5"
#define BN_LIBC_DLINFO "GLIBC_2.3.3"
#elif defined(__aarch64__)
#define BN_LIBC_FIRST "GLIBC_2.17"
#define BN_LIBC_DLINFO "GLIBC_2.17"
#endif

#ifdef BN_LIBC_FIRST
#define BN_LIBC_OLD(name, version) __asm__(".symver " #name "," #name "@" version)
BN_LIBC_OLD(dlopen, BN_LIBC_FIRST);
BN_LIBC_OLD(dlsym, BN_LIBC_FIRST);
BN_LIBC_OLD(dlclose, BN_LIBC_FIRST);
BN_LIBC_OLD(dlinfo, BN_LIBC_DLINFO);
BN_LIBC_OLD(pthread_create, BN_LIBC_FIRST);
BN_LIBC_OLD(pthread_key_create, BN_LIBC_FIRST);
BN_LIBC_OLD(pthread_setspecific, BN_LIBC_FIRST);
BN_LIBC_OLD(pthread_sigmask, BN_LIBC_FIRST);
BN_LIBC_OLD(pthread_attr_setstacksize, BN_LIBC_FIRST);
/* The same function on 64 bits. */
__asm__(".symver fcntl64,fcntl@" BN_LIBC_FIRST);
#endif

/* Before 2.33 these were no functions of the library. Its struct stat is the kernel's on 64 bits. */
static inline int bn_fstat(int fd, struct stat *st)
{
    return (int)syscall(SYS_fstat, fd, st);
}

static inline int bn_stat(const char *path, struct stat *st)
{
    return (int)syscall(SYS_newfstatat, -100 /* AT_FDCWD */, path, st, 0);
}
