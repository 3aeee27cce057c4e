#include "agent/capture.h"

#include "agent/agent.h"
#include "agent/gate.h"
#include "agent/track.h"

/* What names a capturing stream. The per-thread default stream has one name in all threads: the thread is added. */
static uint64_t key_of(CUstream stream, bool per_thread)
{
    if (stream == CU_STREAM_PER_THREAD || (per_thread && !stream))
        return 1ULL << 63 | (uint64_t)syscall(SYS_gettid);
    return (uint64_t)(uintptr_t)stream;
}

static void publish_locked(void)
{
    uint32_t n = (uint32_t)bn_track.captures.count;
    bn_store(&bn_track.capturing, n);
    bn_store(&bn_agent_page()->captures, n);
}

static void add(uint64_t key)
{
    BN_LOCKED();
    if (bn_note_locked(&bn_track.captures, key))
        publish_locked();
}

static void remove_locked(uint64_t key)
{
    if (bn_unnote_locked(&bn_track.captures, key))
        publish_locked();
}

static void forget(uint64_t key)
{
    {
        BN_LOCKED();
        remove_locked(key);
    }
    bn_free_later();
}

bool bn_capture_any(void)
{
    return bn_load(&bn_track.capturing) != 0;
}

CUresult bn_capture_probe(void)
{
    CUdeviceptr p = 0;
    CUresult r = bn_real.cuMemAlloc_v2(&p, 1);
    if (r != CUDA_SUCCESS)
        return r;
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    bool changed = bn_real.cuThreadExchangeStreamCaptureMode &&
                   bn_real.cuThreadExchangeStreamCaptureMode(&mode) == CUDA_SUCCESS;
    bn_real.cuMemFree_v2(p);
    if (changed)
        bn_real.cuThreadExchangeStreamCaptureMode(&mode);
    return CUDA_SUCCESS;
}

static bool ended(CUstream stream)
{
    CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return bn_real.cuStreamIsCapturing && bn_real.cuStreamIsCapturing(stream, &status) == CUDA_SUCCESS &&
           status == CU_STREAM_CAPTURE_STATUS_NONE;
}

unsigned bn_capture_recount(void)
{
    BN_LOCKED();
    BN_TREE_EACH(&bn_track.captures, n)
    if (!(n->key >> 63) && ended((CUstream)(uintptr_t)n->key))
        remove_locked(n->key);
    return (unsigned)bn_track.captures.count;
}

#define BEGIN(name, per_thread, params, args, stream) \
    CUresult bn_wrap_##name params                    \
    {                                                 \
        BN_GATED();                                   \
        CUresult r = bn_real.name args;               \
        if (r == CUDA_SUCCESS)                        \
            add(key_of(stream, per_thread));          \
        return r;                                     \
    }

BEGIN(cuStreamBeginCapture, false, (CUstream hStream), (hStream), hStream)
BEGIN(cuStreamBeginCapture_ptsz, true, (CUstream hStream), (hStream), hStream)
BEGIN(cuStreamBeginCapture_v2, false, (CUstream hStream, CUstreamCaptureMode mode), (hStream, mode), hStream)
BEGIN(cuStreamBeginCapture_v2_ptsz, true, (CUstream hStream, CUstreamCaptureMode mode), (hStream, mode),
      hStream)
BEGIN(cuStreamBeginCaptureToGraph, false,
      (CUstream hStream, CUgraph hGraph, const CUgraphNode *dependencies, const void *dependencyData,
       size_t numDependencies, CUstreamCaptureMode mode),
      (hStream, hGraph, dependencies, dependencyData, numDependencies, mode), hStream)
BEGIN(cuStreamBeginCaptureToGraph_ptsz, true,
      (CUstream hStream, CUgraph hGraph, const CUgraphNode *dependencies, const void *dependencyData,
       size_t numDependencies, CUstreamCaptureMode mode),
      (hStream, hGraph, dependencies, dependencyData, numDependencies, mode), hStream)

/* A capture that was spoilt ends with an error, a call by the wrong thread does not end it: the driver knows. */
static void after_end(CUresult r, CUstream stream, bool per_thread)
{
    if (bn_capture_any() && (r == CUDA_SUCCESS || ended(stream)))
        forget(key_of(stream, per_thread));
}

CUresult bn_wrap_cuStreamEndCapture(CUstream hStream, CUgraph *phGraph)
{
    BN_GATED();
    CUresult r = bn_real.cuStreamEndCapture(hStream, phGraph);
    after_end(r, hStream, false);
    return r;
}

CUresult bn_wrap_cuStreamEndCapture_ptsz(CUstream hStream, CUgraph *phGraph)
{
    BN_GATED();
    CUresult r = bn_real.cuStreamEndCapture_ptsz(hStream, phGraph);
    after_end(r, hStream ? hStream : CU_STREAM_PER_THREAD, true);
    return r;
}

static void stream_gone(CUresult r, CUstream stream)
{
    if (r == CUDA_SUCCESS && bn_capture_any())
        forget(key_of(stream, false));
}

CUresult bn_wrap_cuStreamDestroy(CUstream hStream)
{
    BN_GATED();
    CUresult r = bn_real.cuStreamDestroy(hStream);
    stream_gone(r, hStream);
    return r;
}

CUresult bn_wrap_cuStreamDestroy_v2(CUstream hStream)
{
    BN_GATED();
    CUresult r = bn_real.cuStreamDestroy_v2(hStream);
    stream_gone(r, hStream);
    return r;
}
