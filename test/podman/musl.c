/* SPDX-License-Identifier: MIT */

/* A program of musl's, for which libbennu.so is not meant: it counts in 8 MiB of memory and reports "round N".
 * Linked with the library alone, as there may be no compiler for musl; so what is used of it is declared here. x86-64. */
#include <stddef.h>

extern int printf(const char *fmt, ...);
extern int fflush(void *stream);
extern void *malloc(size_t size);
extern int usleep(unsigned us);
extern int __libc_start_main(int (*main)(int, char **, char **), int argc, char **argv, void (*init)(void),
                             void (*fini)(void), void (*ldso_fini)(void));
void start(long *stack);

#define WORDS ((size_t)1 << 20)

static int run(int argc, char **argv, char **envp)
{
    unsigned long *words = malloc(WORDS * sizeof(*words));
    if (!words)
        return 1;
    for (size_t i = 0; i < WORDS; i++)
        words[i] = i;
    for (unsigned long round = 1;; round++) {
        for (size_t i = 0; i < WORDS; i++) {
            if (words[i] != i + round - 1) {
                printf("WRONG: round %lu, word %lu\n", round, (unsigned long)i);
                return 1;
            }
            words[i]++;
        }
        printf("round %lu\n", round);
        fflush(NULL);
        usleep(5000);
    }
}

static void nothing(void)
{
}

void start(long *stack)
{
    __libc_start_main(run, (int)stack[0], (char **)(stack + 1), nothing, nothing, NULL);
}

__asm__(".globl _start\n_start:\n xor %ebp,%ebp\n mov %rsp,%rdi\n and $-16,%rsp\n call start\n hlt\n");
