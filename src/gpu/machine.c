/* Which GPUs the kernel's driver has, whichever of them this process is shown (CUDA_VISIBLE_DEVICES). */
#include "gpu/driver.h"

#include "base/cleanup.h"
#include "base/io.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FOLDER "/proc/driver/nvidia/gpus"
#define INFORMATION_MAX 4096u

/* "GPU-8f4022ba-e0cb-1298-286e-225c953a7feb". False: nobody has initialised that GPU yet, and question marks stand there. */
static bool parse(const char *text, uint8_t uuid[16])
{
    for (unsigned i = 0; i < 16; i++) {
        unsigned byte;
        int n = 0;
        text += *text == '-';
        if (sscanf(text, "%2x%n", &byte, &n) != 1 || n != 2)
            return false;
        uuid[i] = (uint8_t)byte;
        text += 2;
    }
    return true;
}

static bool read_uuid(int folder, const char *name, uint8_t uuid[16])
{
    static const char key[] = "GPU UUID:";
    char path[300];
    size_t len;
    snprintf(path, sizeof(path), "%s/information", name);
    bn_auto_free char *text = NULL;
    if (bn_read_file_at(folder, path, INFORMATION_MAX, (void **)&text, &len) < 0)
        return false;
    const char *at = strstr(text, key);
    at = at ? at + sizeof(key) - 1 : "";
    at += strspn(at, " \t");
    return strncmp(at, "GPU-", 4) == 0 && parse(at + 4, uuid);
}

unsigned bn_gpu_machine(const struct bn_gpu *gpu, uint8_t (*uuids)[16], unsigned max)
{
    unsigned n = 0;
    for (; n < gpu->count && n < max; n++)
        memcpy(uuids[n], gpu->devices[n].info.uuid, 16);
    const char *path = gpu->simulated ? getenv("BENNU_SIM_PROC") : FOLDER;
    bn_auto_dir DIR *dir = path ? opendir(path) : NULL;
    for (struct dirent *e; dir && n < max && (e = readdir(dir));)
        if (e->d_name[0] != '.' && read_uuid(dirfd(dir), e->d_name, uuids[n]) &&
            bn_gpu_find(gpu, uuids[n]) < 0)
            n++;
    return n;
}
