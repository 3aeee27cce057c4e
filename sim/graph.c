/* SPDX-License-Identifier: MIT */

/* Graphs in their smallest form: what one stream was asked for between the begin and the end of a capture. */

#include <stdlib.h>
#include <string.h>

#include "sim.h"

/* Both CUgraph and CUgraphExec. */
struct sim_graph {
    struct sim_graph *next;
    bool exec;
    struct op *head, **tail;
    size_t count;
};

static struct sim_graph *graphs;

static struct sim_graph *graph_new(bool exec)
{
    struct sim_graph *graph = calloc(1, sizeof(*graph));

    if (!graph)
        return NULL;
    graph->exec = exec;
    graph->tail = &graph->head;
    graph->next = graphs;
    graphs = graph;
    return graph;
}

static void graph_free(struct sim_graph *graph)
{
    for (struct sim_graph **p = &graphs; *p; p = &(*p)->next)
        if (*p == graph) {
            *p = graph->next;
            break;
        }
    while (graph->head) {
        struct op *op = graph->head;

        graph->head = op->next;
        op_free(op);
    }
    free(graph);
}

static struct sim_graph *graph_find(const void *handle, bool exec)
{
    for (struct sim_graph *g = graphs; g; g = g->next)
        if (g == handle && g->exec == exec)
            return g;
    return NULL;
}

CUresult graph_record(struct sim_graph *graph, struct op *op)
{
    if (op->kind == OP_EVENT)
        op->kind = OP_NOP;
    op->next = NULL;
    *graph->tail = op;
    graph->tail = &op->next;
    graph->count++;
    return CUDA_SUCCESS;
}

static struct op *op_clone(const struct op *op)
{
    struct op *copy = op_new(op->kind, op->ctx);

    if (!copy)
        return NULL;
    *copy = *op;
    copy->next = NULL;
    copy->deps = NULL;
    copy->dep_count = 0;
    copy->stage = NULL;
    return copy;
}

static CUresult find_stream(CUstream handle, struct sim_stream **stream)
{
    struct sim_ctx *ctx;
    CUresult rc = ctx_current(&ctx);

    return rc == CUDA_SUCCESS ? stream_resolve(handle, ctx, stream) : rc;
}

SIM_FN_STREAM(cuStreamBeginCapture, 0, (CUstream hStream, CUstreamCaptureMode mode), (hStream, mode))
{
    struct sim_stream *stream;

    SIM_LOCKED();
    CUresult rc = find_stream(hStream, &stream);

    if (rc != CUDA_SUCCESS)
        return rc;
    if ((unsigned)mode > CU_STREAM_CAPTURE_MODE_RELAXED)
        return CUDA_ERROR_INVALID_VALUE;
    if (stream == stream->ctx->null_stream)
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream->capture)
        return CUDA_ERROR_ILLEGAL_STATE;
    stream->capture = graph_new(false);
    if (!stream->capture)
        return CUDA_ERROR_OUT_OF_MEMORY;
    stream->capture_mode = mode;
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuStreamBeginCapture_v2, cuStreamBeginCapture);
SIM_ALIAS(cuStreamBeginCapture_v2_ptsz, cuStreamBeginCapture_ptsz);

SIM_FN_STREAM(cuStreamEndCapture, 0, (CUstream hStream, CUgraph *out), (hStream, out))
{
    struct sim_stream *stream;

    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = find_stream(hStream, &stream);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (!stream->capture)
        return CUDA_ERROR_ILLEGAL_STATE;
    *out = (CUgraph)stream->capture;
    stream->capture = NULL;
    return CUDA_SUCCESS;
}

SIM_FN_STREAM(cuStreamIsCapturing, 0, (CUstream hStream, CUstreamCaptureStatus *status), (hStream, status))
{
    struct sim_stream *stream;

    if (!status)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = find_stream(hStream, &stream);

    if (rc == CUDA_SUCCESS)
        *status = stream->capture ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return rc;
}

SIM_FN(cuGraphCreate, 0, (CUgraph * out, unsigned flags), (out, flags))
{
    if (!out || flags)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    struct sim_graph *graph = graph_new(false);

    if (!graph)
        return CUDA_ERROR_OUT_OF_MEMORY;
    *out = (CUgraph)graph;
    return CUDA_SUCCESS;
}

SIM_FN(cuGraphGetNodes, 0, (CUgraph handle, CUgraphNode *nodes, size_t *count), (handle, nodes, count))
{
    SIM_LOCKED();
    struct sim_graph *graph = graph_find(handle, false);

    if (!graph || !count)
        return CUDA_ERROR_INVALID_VALUE;
    if (nodes)
        return CUDA_ERROR_NOT_SUPPORTED;
    *count = graph->count;
    return CUDA_SUCCESS;
}

static CUresult instantiate(CUgraphExec *out, CUgraph handle)
{
    SIM_LOCKED();
    struct sim_graph *graph = graph_find(handle, false), *exec;

    if (!out || !graph)
        return CUDA_ERROR_INVALID_VALUE;
    exec = graph_new(true);
    if (!exec)
        return CUDA_ERROR_OUT_OF_MEMORY;
    for (struct op *op = graph->head; op; op = op->next) {
        struct op *copy = op_clone(op);

        if (!copy) {
            graph_free(exec);
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
        graph_record(exec, copy);
    }
    *out = (CUgraphExec)exec;
    return CUDA_SUCCESS;
}

SIM_FN(cuGraphInstantiateWithFlags, 0, (CUgraphExec * out, CUgraph graph, unsigned long long flags),
       (out, graph, flags))
{
    (void)flags;
    return instantiate(out, graph);
}

/* The first two forms report an error's node and text; there is never one to report. */
SIM_FN(cuGraphInstantiate, 0, (CUgraphExec * out, CUgraph graph, CUgraphNode *node, char *text, size_t size),
       (out, graph, node, text, size))
{
    if (node)
        *node = NULL;
    if (text && size)
        *text = '\0';
    return instantiate(out, graph);
}
SIM_ALIAS(cuGraphInstantiate_v2, cuGraphInstantiate);

SIM_FN_STREAM(cuGraphLaunch, 0, (CUgraphExec handle, CUstream hStream), (handle, hStream))
{
    struct sim_stream *stream;

    SIM_LOCKED();
    CUresult rc = find_stream(hStream, &stream);
    struct sim_graph *exec = graph_find(handle, true);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (!exec)
        return CUDA_ERROR_INVALID_VALUE;
    for (struct op *op = exec->head; op && rc == CUDA_SUCCESS; op = op->next) {
        struct op *copy = op_clone(op);

        rc = copy ? stream_enqueue(stream, copy) : CUDA_ERROR_OUT_OF_MEMORY;
    }
    return rc;
}

SIM_FN_STREAM(cuGraphUpload, 0, (CUgraphExec handle, CUstream hStream), (handle, hStream))
{
    SIM_LOCKED();
    (void)hStream;
    return graph_find(handle, true) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

static CUresult destroy(const void *handle, bool exec)
{
    SIM_LOCKED();
    struct sim_graph *graph = graph_find(handle, exec);

    if (!graph)
        return CUDA_ERROR_INVALID_VALUE;
    graph_free(graph);
    return CUDA_SUCCESS;
}

SIM_FN(cuGraphDestroy, 0, (CUgraph handle), (handle))
{
    return destroy(handle, false);
}

SIM_FN(cuGraphExecDestroy, 0, (CUgraphExec handle), (handle))
{
    return destroy(handle, true);
}
