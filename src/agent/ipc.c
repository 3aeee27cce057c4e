/* Legacy IPC: memory of other processes, which the driver cannot restore, is counted. */
#include "agent/agent.h"
#include "agent/gate.h"
#include "agent/track.h"

static void opened(CUresult r, const CUdeviceptr *p)
{
    if (r != CUDA_SUCCESS || !p)
        return;
    bn_page_add(&bn_agent_page()->blockers.imported_handles, 1);
}

CUresult bn_wrap_cuIpcOpenMemHandle(CUdeviceptr *pdptr, CUipcMemHandle handle, unsigned int Flags)
{
    BN_GATED();
    CUresult r = bn_real.cuIpcOpenMemHandle(pdptr, handle, Flags);
    opened(r, pdptr);
    return r;
}

CUresult bn_wrap_cuIpcOpenMemHandle_v2(CUdeviceptr *pdptr, CUipcMemHandle handle, unsigned int Flags)
{
    BN_GATED();
    CUresult r = bn_real.cuIpcOpenMemHandle_v2(pdptr, handle, Flags);
    opened(r, pdptr);
    return r;
}

CUresult bn_wrap_cuIpcCloseMemHandle(CUdeviceptr dptr)
{
    BN_GATED();
    CUresult r = bn_real.cuIpcCloseMemHandle(dptr);
    if (r == CUDA_SUCCESS)
        bn_page_add(&bn_agent_page()->blockers.imported_handles, -1);
    return r;
}

CUresult bn_wrap_cuIpcGetMemHandle(CUipcMemHandle *pHandle, CUdeviceptr dptr)
{
    BN_GATED();
    return bn_real.cuIpcGetMemHandle(pHandle, dptr);
}
