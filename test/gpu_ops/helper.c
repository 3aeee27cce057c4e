/* The second process of the tests. Descriptor 3 is a socket to the first; it ends when the socket does. */
#include "common.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#define SOCK 3

static struct bn_copier *copier(void)
{
    struct bn_copier *c;
    struct bn_copier_config config = {.buffer = 2 * MIB, .workers = 2};
    struct bn_error err = BN_ERROR_INIT;
    if (bn_copier_new(gpu, &config, &c, &err) < 0) {
        fprintf(stderr, "helper: %s\n", err.text);
        exit(1);
    }
    return c;
}

struct order {
    uint64_t size[64];
    uint64_t expect, leave; /* seeds of the pattern found and of the one to leave behind */
    uint32_t n;
};

/* Import blocks, check them, write something else into them. */
static int import(void)
{
    struct order o;
    int fds[64];
    struct bn_gpu_block blocks[64];
    struct bn_gpu_set *set;
    struct bn_error err = BN_ERROR_INIT;
    uint32_t n;
    if (hear(SOCK, &n, sizeof(n), NULL, 0) != sizeof(n) || n > 64 ||
        hear(SOCK, &o, sizeof(o), fds, n) != sizeof(o))
        return 1;
    for (uint32_t i = 0; i < n; i++)
        blocks[i] = (struct bn_gpu_block){o.size[i], 0, fds[i]};
    if (bn_gpu_set_import(gpu, 0, blocks, n, &set, &err) < 0) {
        fprintf(stderr, "helper: %s\n", err.text);
        return 1;
    }
    struct bn_copier *c = copier();
    int r = set_check(c, set, o.expect);
    if (r == 0)
        r = set_fill(c, set, o.leave);
    bn_copier_free(c);
    say(SOCK, &r, sizeof(r), NULL, 0);
    char byte;
    while (hear(SOCK, &byte, 1, NULL, 0) > 0) /* keeps it mapped until the other side has seen enough */
        ;
    bn_gpu_set_free(set);
    return 0;
}

/* A process that uses CUDA: says hello, checks its memory whenever it is told to. */
static int cuda(void)
{
    struct bn_gpu_block block = {.size = 8 * MIB};
    struct bn_gpu_set *set;
    struct bn_error err = BN_ERROR_INIT;
    struct bn_copier *c = copier();
    if (bn_gpu_set_create(gpu, 0, &block, 1, &set, &err) < 0 || set_fill(c, set, 5) < 0) {
        fprintf(stderr, "helper: %s\n", err.text);
        return 1;
    }
    int r = 0;
    do {
        say(SOCK, &r, sizeof(r), NULL, 0);
        char byte;
        if (hear(SOCK, &byte, 1, NULL, 0) == 0)
            break;
        r = set_check(c, set, 5);
    } while (1);
    bn_copier_free(c);
    bn_gpu_set_free(set);
    return r == 0 ? 0 : 1;
}

/* Never touches CUDA. */
static int plain(void)
{
    int r = 0;
    char byte;
    say(SOCK, &r, sizeof(r), NULL, 0);
    while (hear(SOCK, &byte, 1, NULL, 0) > 0)
        ;
    return 0;
}

/* Holds what looks like the GPU's device file, in a mount namespace of its own, as in a container. Says 77
 * where that takes more privilege than there is. */
static int files(void)
{
    int r = 0, fd = -1;
    char byte;
    if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount("tmpfs", "/dev", "tmpfs", 0, NULL) < 0)
        r = 77;
    else if ((fd = open("/dev/nvidiactl", O_RDWR | O_CREAT | O_CLOEXEC, 0600)) < 0)
        r = 1;
    say(SOCK, &r, sizeof(r), NULL, 0);
    while (hear(SOCK, &byte, 1, NULL, 0) > 0)
        ;
    bn_close(fd);
    return 0;
}

int main(int argc, char **argv)
{
    struct bn_error err = BN_ERROR_INIT;
    if (argc < 2)
        return 2;
    if (strcmp(argv[1], "plain") == 0)
        return plain();
    if (strcmp(argv[1], "files") == 0)
        return files();
    if (bn_gpu_open(driver_path(), &gpu, &err) < 0) {
        fprintf(stderr, "helper: %s\n", err.text);
        return 1;
    }
    int r = strcmp(argv[1], "import") == 0 ? import() : strcmp(argv[1], "cuda") == 0 ? cuda() : 2;
    bn_gpu_close(gpu);
    return r;
}
