/* A process tree that proves that it runs: each of N processes writes a growing number to DIR/<i>.count. The number lives in memory
 * only, so after a restore it goes on from where it was.
 *
 * Usage: counter DIR N MARK [DEVICE]     MARK: "agent" (root holds the agent's memfd), "agents" (everyone does), "none".
 * The root keeps DEVICE open as descriptor 9.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static void count(const char *dir, int i, int mark)
{
    char path[512];
    snprintf(path, sizeof(path), "%s/%d.count", dir, i);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || (mark && memfd_create("bennu-agent", MFD_CLOEXEC) < 0))
        exit(2);
    for (uint64_t n = 1;; n++) {
        uint64_t record[2] = {n, (uint64_t)getpid()};
        if (pwrite(fd, record, sizeof(record), 0) != sizeof(record))
            exit(3);
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    }
}

int main(int argc, char **argv)
{
    if (argc < 4)
        return 1;
    setsid();
    int device = argc > 4 ? open(argv[4], O_RDWR | O_CLOEXEC) : -1;
    if (argc > 4 && (device < 0 || dup3(device, 9, O_CLOEXEC) < 0 || close(device) < 0))
        return 1;
    /* Where the device can be mapped it is; the mapping stays. */
    if (device >= 0)
        (void)!mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, 9, 0);
    for (int i = 1; i < atoi(argv[2]); i++)
        if (fork() == 0)
            count(argv[1], i, strcmp(argv[3], "agents") == 0);
    count(argv[1], 0, strcmp(argv[3], "none") != 0);
}
