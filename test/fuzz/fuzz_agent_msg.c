/* What a controller may send to the agent: any bytes, in any order, with any descriptors. Never crashes, keeps no descriptor it
 * should not, and a process whose memory is whole can always go on. The driver behind it says yes to everything, or, when the
 * input says so, no. */
#include "fuzz.h"

#include "agent/control.h"
#include "agent/gate.h"
#include "agent/track.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SEGMENTS 5

static unsigned fail_in; /* the call that fails, counted down; 0: none */
static uint64_t next_handle = 1, next_va = 1ULL << 40;

static CUresult verdict(void)
{
    return fail_in && --fail_in == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
static CUresult fake_count(int *n)
{
    *n = 1;
    return CUDA_SUCCESS;
}
static CUresult fake_device(CUdevice *dev, int ordinal)
{
    *dev = ordinal;
    return CUDA_SUCCESS;
}
static CUresult fake_uuid(CUuuid *uuid, CUdevice dev)
{
    memset(uuid, dev + 1, sizeof(*uuid));
    return CUDA_SUCCESS;
}
static CUresult fake_attribute(int *value, CUdevice_attribute which, CUdevice dev)
{
    *value = 1;
    return CUDA_SUCCESS;
}
static CUresult fake_granularity(size_t *out, const CUmemAllocationProp *prop,
                                 CUmemAllocationGranularity_flags option)
{
    *out = 2 << 20;
    return CUDA_SUCCESS;
}
static CUresult fake_reserve(CUdeviceptr *va, size_t size, size_t align, CUdeviceptr at,
                             unsigned long long flags)
{
    *va = next_va;
    next_va += size;
    return CUDA_SUCCESS;
}
static CUresult fake_address_free(CUdeviceptr va, size_t size)
{
    return CUDA_SUCCESS;
}
static CUresult fake_create(CUmemGenericAllocationHandle *h, size_t size, const CUmemAllocationProp *prop,
                            unsigned long long flags)
{
    *h = next_handle++;
    return verdict();
}
static CUresult fake_release(CUmemGenericAllocationHandle h)
{
    return CUDA_SUCCESS;
}
static CUresult fake_map(CUdeviceptr va, size_t size, size_t offset, CUmemGenericAllocationHandle h,
                         unsigned long long flags)
{
    return verdict();
}
static CUresult fake_unmap(CUdeviceptr va, size_t size)
{
    return verdict();
}
static CUresult fake_access(CUdeviceptr va, size_t size, const CUmemAccessDesc *desc, size_t n)
{
    return verdict();
}
static CUresult fake_export(void *out, CUmemGenericAllocationHandle h, CUmemAllocationHandleType type,
                            unsigned long long flags)
{
    CUresult r = verdict();
    if (r == CUDA_SUCCESS)
        *(int *)out = open("/dev/null", O_RDWR | O_CLOEXEC);
    return r;
}
static CUresult fake_import(CUmemGenericAllocationHandle *h, void *fd, CUmemAllocationHandleType type)
{
    CUresult r = verdict();
    if (r == CUDA_SUCCESS)
        *h = next_handle++;
    return r;
}
static CUresult fake_ctx_device(CUdevice *dev)
{
    *dev = 0;
    return CUDA_SUCCESS;
}
static CUresult fake_get_current(CUcontext *ctx)
{
    *ctx = (CUcontext)8;
    return CUDA_SUCCESS;
}
static CUresult fake_ctx(CUcontext ctx)
{
    return CUDA_SUCCESS;
}
static CUresult fake_pop(CUcontext *ctx)
{
    return CUDA_SUCCESS;
}
static CUresult fake_synchronize(void)
{
    return CUDA_SUCCESS;
}

static void set_up(void)
{
    bn_real.cuDeviceGetCount = fake_count;
    bn_real.cuDeviceGet = fake_device;
    bn_real.cuDeviceGetUuid_v2 = fake_uuid;
    bn_real.cuDeviceGetAttribute = fake_attribute;
    bn_real.cuMemGetAllocationGranularity = fake_granularity;
    bn_real.cuMemAddressReserve = fake_reserve;
    bn_real.cuMemAddressFree = fake_address_free;
    bn_real.cuMemCreate = fake_create;
    bn_real.cuMemRelease = fake_release;
    bn_real.cuMemMap = fake_map;
    bn_real.cuMemUnmap = fake_unmap;
    bn_real.cuMemSetAccess = fake_access;
    bn_real.cuMemExportToShareableHandle = fake_export;
    bn_real.cuMemImportFromShareableHandle = fake_import;
    bn_real.cuCtxGetDevice = fake_ctx_device;
    bn_real.cuCtxGetCurrent = fake_get_current;
    bn_real.cuCtxSetCurrent = fake_ctx;
    bn_real.cuCtxPushCurrent_v2 = fake_ctx;
    bn_real.cuCtxPopCurrent_v2 = fake_pop;
    bn_real.cuCtxSynchronize = fake_synchronize;
    bn_real_ready = 1;
    bn_agent_start();
    if (!bn_agent_converting())
        abort();
    for (int i = 0; i < SEGMENTS; i++) {
        CUdeviceptr p;
        if (bn_wrap_cuMemAlloc_v2(&p, (size_t)(i + 1) << 21) != CUDA_SUCCESS)
            abort();
    }
}

static struct bn_answer answer;

static bool handle(const void *packet, size_t len, unsigned nfds)
{
    int fds[BN_AGENT_BATCH];
    for (unsigned i = 0; i < nfds; i++)
        fds[i] = open("/dev/null", O_RDWR | O_CLOEXEC);
    bool answered = bn_control_handle(packet, len, fds, nfds, &answer);
    if (!answered)
        return false;
    bool gives = answer.head.type == BN_AGENT_EXPORT || answer.head.type == BN_AGENT_CREATE;
    if (!answer.head.error && answer.nfds != (gives ? answer.head.count : 0))
        abort();
    for (unsigned i = 0; i < answer.nfds; i++)
        if (close(answer.fds[i]) < 0)
            abort();
    if (answer.head.count > BN_AGENT_BATCH || !memchr(answer.head.text, 0, sizeof(answer.head.text)) ||
        (answer.head.error != 0) != (answer.head.text[0] != 0))
        abort();
    return true;
}

static void request(uint16_t type, uint64_t arg)
{
    struct bn_agent_msg head = {.magic = BN_AGENT_MAGIC, .type = type, .arg = arg};
    handle(&head, sizeof(head), 0);
}

/* Whatever was done: bring the memory back and open the gate, as a daemon would. */
static void recover(void)
{
    struct {
        struct bn_agent_msg head;
        struct bn_agent_segment segs[SEGMENTS];
    } m = {{.magic = BN_AGENT_MAGIC, .type = BN_AGENT_IMPORT, .count = SEGMENTS}, {{0}}};
    fail_in = 0;
    if (bn_agent_page()->state == BN_AGENT_ACTIVE)
        return;
    request(BN_AGENT_LIST, 0);
    if (answer.head.count != SEGMENTS)
        abort();
    memcpy(m.segs, answer.segs, sizeof(m.segs));
    if (bn_agent_page()->state == BN_AGENT_EVICTED) {
        handle(&m, sizeof(m), SEGMENTS);
        if (answer.head.error)
            abort();
    }
    request(BN_AGENT_OPEN, 0);
    if (answer.head.error || bn_agent_page()->state != BN_AGENT_ACTIVE)
        abort();
}

/* Input: packets, each behind four bytes: type of help, descriptors, the call that fails, length of the rest / 4. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static bool ready;
    static char packet[BN_AGENT_MSG_MAX];
    if (!ready)
        set_up();
    ready = true;
    while (size >= 4) {
        uint8_t help = data[0], nfds = data[1] % (BN_AGENT_BATCH + 1), bad = data[2];
        size_t len = (size_t)data[3] * 4;
        data += 4;
        size -= 4;
        len = len < size ? len : size;
        memset(packet, 0, sizeof(packet));
        memcpy(packet, data, len);
        if (help & 1) {
            /* A head that passes the first check, so that the rest is reached. */
            struct bn_agent_msg head;
            memcpy(&head, packet, sizeof(head));
            head.magic = BN_AGENT_MAGIC;
            head.reply = 0;
            head.type %= 11;
            head.count %= BN_AGENT_BATCH + 2;
            memcpy(packet, &head, sizeof(head));
            if (help & 2)
                nfds =
                    (uint8_t)(head.type == BN_AGENT_IMPORT && head.count <= BN_AGENT_BATCH ? head.count : 0);
            handle(packet, sizeof(head) + head.count * sizeof(struct bn_agent_segment), nfds);
        } else {
            fail_in = help & 4 ? bad : 0;
            handle(packet, len, nfds);
        }
        fail_in = help & 4 ? bad % 40 : 0;
        data += len;
        size -= len;
    }
    recover();
    return 0;
}
