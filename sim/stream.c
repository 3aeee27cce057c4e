/* SPDX-License-Identifier: MIT */

/*
 * Streams are queues with one worker thread each, started with the first work. What orders work between streams is a
 * list of (stream, number) that an operation waits for: the legacy default stream's rule, events and nothing else.
 */

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

#include "sim.h"

struct op *op_new(enum op_kind kind, struct sim_ctx *ctx)
{
    struct op *op = calloc(1, sizeof(*op));

    if (op) {
        op->kind = kind;
        op->ctx = ctx;
    }
    return op;
}

void op_free(struct op *op)
{
    if (!op)
        return;
    free(op->deps);
    free(op->stage);
    free(op);
}

static bool deps_done(const struct op *op)
{
    for (unsigned i = 0; i < op->dep_count; i++)
        if (op->deps[i].stream->completed < op->deps[i].seq)
            return false;
    return true;
}

static bool dep_add(struct op *op, struct sim_stream *stream, uint64_t seq)
{
    if (stream->completed >= seq)
        return true;

    struct dep *deps = realloc(op->deps, (op->dep_count + 1) * sizeof(*deps));

    if (!deps)
        return false;
    op->deps = deps;
    deps[op->dep_count++] = (struct dep){stream, seq};
    return true;
}

static void event_done(struct op *op);

static void *worker_main(void *arg)
{
    struct sim_stream *stream = arg;

    prctl(PR_SET_NAME, "cuda-sim-stream");
    pthread_mutex_lock(&sim.lock);
    for (;;) {
        struct op *op = stream->head;

        if (!op || !deps_done(op)) {
            pthread_cond_wait(&sim.changed, &sim.lock);
            continue;
        }
        pthread_mutex_unlock(&sim.lock);

        CUresult rc = op->ctx->sticky == CUDA_SUCCESS || op->kind == OP_EVENT ? op_execute(op) : CUDA_SUCCESS;

        pthread_mutex_lock(&sim.lock);
        if (rc != CUDA_SUCCESS && op->ctx->sticky == CUDA_SUCCESS)
            op->ctx->sticky = rc;
        if (op->kind == OP_EVENT)
            event_done(op);
        if (op->kind == OP_FREE)
            native_free(op->free_.alloc);
        stream->head = op->next;
        if (!stream->head)
            stream->tail = &stream->head;
        stream->completed = op->seq;
        op_free(op);
        pthread_cond_broadcast(&sim.changed);
    }
    return NULL;
}

static bool start_worker(struct sim_stream *stream)
{
    sigset_t all, old;
    pthread_t thread;
    int err;

    if (stream->worker)
        return true;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    err = pthread_create(&thread, NULL, worker_main, stream);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (err)
        return false;
    pthread_detach(thread);
    stream->worker = true;
    return true;
}

struct sim_stream *stream_new(struct sim_ctx *ctx, unsigned flags, int priority)
{
    struct sim_stream *s;

    for (s = sim.streams; s; s = s->next)
        if (!s->alive && s->queued == s->completed)
            break;
    if (!s) {
        s = calloc(1, sizeof(*s));
        if (!s)
            return NULL;
        s->tail = &s->head;
        s->next = sim.streams;
        sim.streams = s;
    }
    s->ctx = ctx;
    s->alive = true;
    s->blocking = !(flags & CU_STREAM_NON_BLOCKING);
    s->flags = flags;
    s->priority = priority;
    s->id = sim.next_id++;
    s->capture = NULL;
    return s;
}

CUresult stream_resolve(CUstream handle, struct sim_ctx *ctx, struct sim_stream **out)
{
    if (!handle || handle == CU_STREAM_LEGACY) {
        *out = ctx->null_stream;
        return CUDA_SUCCESS;
    }
    if (handle == CU_STREAM_PER_THREAD) {
        *out = ctx->thread_stream;
        return CUDA_SUCCESS;
    }
    for (struct sim_stream *s = sim.streams; s; s = s->next)
        if (s == (struct sim_stream *)handle) {
            if (!s->alive)
                return CUDA_ERROR_INVALID_HANDLE;
            if (s->ctx != ctx)
                return CUDA_ERROR_INVALID_HANDLE;
            *out = s;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_HANDLE;
}

CUresult stream_enqueue(struct sim_stream *stream, struct op *op)
{
    bool ok = true;

    if (stream->capture) {
        CUresult rc =
            op->kind == OP_FREE ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : graph_record(stream->capture, op);

        if (rc != CUDA_SUCCESS)
            op_free(op);
        return rc;
    }
    if (stream == stream->ctx->null_stream) {
        for (struct sim_stream *s = sim.streams; s; s = s->next)
            if (s->ctx == stream->ctx && s->blocking && s != stream)
                ok = ok && dep_add(op, s, s->queued);
    } else if (stream->blocking) {
        ok = dep_add(op, stream->ctx->null_stream, stream->ctx->null_stream->queued);
    }
    if (!ok || !start_worker(stream)) {
        op_free(op);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    op->seq = ++stream->queued;
    op->next = NULL;
    *stream->tail = op;
    stream->tail = &op->next;
    pthread_cond_broadcast(&sim.changed);
    return CUDA_SUCCESS;
}

void stream_wait(struct sim_stream *stream, uint64_t seq)
{
    while (stream->completed < seq)
        pthread_cond_wait(&sim.changed, &sim.lock);
}

void stream_wait_ctx(struct sim_ctx *ctx)
{
    /* Waiting for a primary context is waiting for its green ones. */
    for (struct sim_stream *s = sim.streams; s; s = s->next)
        if (s->ctx == ctx || s->ctx->home == ctx)
            stream_wait(s, s->queued);
}

void stream_wait_legacy(struct sim_ctx *ctx)
{
    for (struct sim_stream *s = sim.streams; s; s = s->next)
        if (s->ctx == ctx && s->blocking)
            stream_wait(s, s->queued);
}

void stream_close_ctx(struct sim_ctx *ctx)
{
    for (struct sim_stream *s = sim.streams; s; s = s->next)
        if (s->ctx == ctx)
            s->alive = false;
}

bool streams_drain(uint64_t deadline_ns)
{
    for (struct sim_stream *s = sim.streams; s; s = s->next)
        while (s->completed < s->queued) {
            struct timespec ts;

            if (deadline_ns && sim_now_ns() >= deadline_ns)
                return false;
            clock_gettime(CLOCK_REALTIME, &ts);
            ts.tv_nsec += 20 * 1000 * 1000;
            if (ts.tv_nsec >= 1000000000) {
                ts.tv_sec++;
                ts.tv_nsec -= 1000000000;
            }
            pthread_cond_timedwait(&sim.changed, &sim.lock, &ts);
        }
    return true;
}

bool streams_capturing(const struct sim_ctx *ctx)
{
    for (struct sim_stream *s = sim.streams; s; s = s->next)
        if (s->ctx == ctx && s->alive && s->capture)
            return true;
    return false;
}

/* Finds the stream a call names; the capture of another stream does not matter to it. */
static CUresult find(CUstream handle, struct sim_ctx **ctx, struct sim_stream **stream)
{
    CUresult rc = ctx_current(ctx);

    return rc == CUDA_SUCCESS ? stream_resolve(handle, *ctx, stream) : rc;
}

/* The real driver takes device memory for a stream, and cannot make one on a full device. Here it has to be free, and is not taken. */
#define STREAM_BYTES ((uint64_t)2 << 20)

SIM_FN(cuStreamCreateWithPriority, 0, (CUstream * out, unsigned flags, int priority), (out, flags, priority))
{
    struct sim_ctx *ctx;

    if (!out || flags & ~(unsigned)CU_STREAM_NON_BLOCKING)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (!capacity_has(sim.physical[ctx->ordinal], STREAM_BYTES))
        return CUDA_ERROR_OUT_OF_MEMORY;
    struct sim_stream *stream = stream_new(ctx, flags, priority < -5 ? -5 : priority > 0 ? 0 : priority);

    if (!stream)
        return CUDA_ERROR_OUT_OF_MEMORY;
    *out = (CUstream)stream;
    return CUDA_SUCCESS;
}

SIM_FN(cuStreamCreate, 0, (CUstream * out, unsigned flags), (out, flags))
{
    return body_cuStreamCreateWithPriority(out, flags, 0);
}

SIM_FN(cuStreamDestroy, 0, (CUstream handle), (handle))
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;

    SIM_LOCKED();
    CUresult rc = find(handle, &ctx, &stream);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (stream == ctx->null_stream || stream == ctx->thread_stream)
        return CUDA_ERROR_INVALID_HANDLE;
    stream->alive = false; /* what is queued still runs */
    stream->capture = NULL;
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuStreamDestroy_v2, cuStreamDestroy);

SIM_FN_STREAM(cuStreamSynchronize, 0, (CUstream hStream), (hStream))
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;

    SIM_LOCKED();
    CUresult rc = find(hStream, &ctx, &stream);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (stream->capture)
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream == ctx->null_stream)
        stream_wait_legacy(ctx);
    else
        stream_wait(stream, stream->queued);
    return ctx->sticky;
}

SIM_FN_STREAM(cuStreamQuery, 0, (CUstream hStream), (hStream))
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;

    SIM_LOCKED();
    CUresult rc = find(hStream, &ctx, &stream);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (stream->capture)
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream->completed < stream->queued)
        return CUDA_ERROR_NOT_READY;
    if (stream == ctx->null_stream)
        for (struct sim_stream *s = sim.streams; s; s = s->next)
            if (s->ctx == ctx && s->blocking && s->completed < s->queued)
                return CUDA_ERROR_NOT_READY;
    return CUDA_SUCCESS;
}

SIM_FN_STREAM(cuStreamGetFlags, 0, (CUstream hStream, unsigned *flags), (hStream, flags))
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;

    if (!flags)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = find(hStream, &ctx, &stream);

    if (rc == CUDA_SUCCESS)
        *flags = stream->flags;
    return rc;
}

SIM_FN_STREAM(cuStreamGetPriority, 0, (CUstream hStream, int *priority), (hStream, priority))
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;

    if (!priority)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = find(hStream, &ctx, &stream);

    if (rc == CUDA_SUCCESS)
        *priority = stream->priority;
    return rc;
}

SIM_FN_STREAM(cuStreamGetCtx, 0, (CUstream hStream, CUcontext *out), (hStream, out))
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;

    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = find(hStream, &ctx, &stream);

    if (rc == CUDA_SUCCESS)
        *out = (CUcontext)stream->ctx;
    return rc;
}

SIM_FN_STREAM(cuStreamGetCtx_v2, 0, (CUstream hStream, CUcontext *out, CUgreenCtx *green),
              (hStream, out, green))
{
    if (green)
        *green = NULL;
    return body_cuStreamGetCtx(hStream, out);
}

SIM_FN_STREAM(cuStreamGetId, 0, (CUstream hStream, unsigned long long *id), (hStream, id))
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;

    if (!id)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = find(hStream, &ctx, &stream);

    if (rc == CUDA_SUCCESS)
        *id = stream->id;
    return rc;
}

static CUresult enqueue(CUstream handle, enum op_kind kind, struct op *fill)
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;
    CUresult rc = find(handle, &ctx, &stream);

    if (rc != CUDA_SUCCESS)
        return rc;
    struct op *op = op_new(kind, ctx);

    if (!op)
        return CUDA_ERROR_OUT_OF_MEMORY;
    op->host = fill->host;
    if (kind == OP_CALLBACK)
        op->callback = fill->callback;
    return stream_enqueue(stream, op);
}

SIM_FN_STREAM(cuLaunchHostFunc, 0, (CUstream hStream, CUhostFn fn, void *data), (hStream, fn, data))
{
    struct op fill = {.host = {fn, data}};

    if (!fn)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    return enqueue(hStream, OP_HOST, &fill);
}

SIM_FN_STREAM(cuStreamAddCallback, 0, (CUstream hStream, CUstreamCallback fn, void *data, unsigned flags),
              (hStream, fn, data, flags))
{
    struct op fill = {.callback = {fn, hStream, data}};

    if (!fn || flags)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    return enqueue(hStream, OP_CALLBACK, &fill);
}

/* ---- Events ---- */

struct sim_event {
    struct sim_event *next;
    struct sim_ctx *ctx;
    bool alive, recorded;
    unsigned flags;
    uint64_t generation; /* of the latest record */
    struct sim_stream *stream;
    uint64_t seq, time_ns;
};

static struct sim_event *events; /* kept and used again, as streams are */

static bool event_complete(const struct sim_event *event)
{
    return !event->recorded || event->stream->completed >= event->seq;
}

static void event_done(struct op *op)
{
    if (op->event.event->generation == op->event.generation)
        op->event.event->time_ns = sim_now_ns();
}

static CUresult event_find(CUevent handle, struct sim_event **out)
{
    for (struct sim_event *e = events; e; e = e->next)
        if (e == (struct sim_event *)handle && e->alive) {
            *out = e;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_HANDLE;
}

SIM_FN(cuEventCreate, 0, (CUevent * out, unsigned flags), (out, flags))
{
    struct sim_ctx *ctx;
    struct sim_event *event;

    if (!out || flags & ~7u)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    for (event = events; event; event = event->next)
        if (!event->alive && event_complete(event))
            break;
    if (!event) {
        event = calloc(1, sizeof(*event));
        if (!event)
            return CUDA_ERROR_OUT_OF_MEMORY;
        event->next = events;
        events = event;
    }
    event->ctx = ctx;
    event->flags = flags;
    event->alive = true;
    event->recorded = false;
    event->generation++;
    *out = (CUevent)event;
    return CUDA_SUCCESS;
}

SIM_FN(cuEventDestroy, 0, (CUevent handle), (handle))
{
    struct sim_event *event;

    SIM_LOCKED();
    CUresult rc = event_find(handle, &event);

    if (rc == CUDA_SUCCESS)
        event->alive = false;
    return rc;
}
SIM_ALIAS(cuEventDestroy_v2, cuEventDestroy);

static CUresult event_record(CUevent handle, CUstream hStream)
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;
    struct sim_event *event;

    SIM_LOCKED();
    CUresult rc = find(hStream, &ctx, &stream);

    if (rc == CUDA_SUCCESS)
        rc = event_find(handle, &event);
    if (rc != CUDA_SUCCESS)
        return rc;
    if (event->ctx != ctx)
        return CUDA_ERROR_INVALID_HANDLE;
    struct op *op = op_new(OP_EVENT, ctx);

    if (!op)
        return CUDA_ERROR_OUT_OF_MEMORY;
    op->event.event = event;
    op->event.generation = event->generation + 1;
    bool captured = stream->capture != NULL;

    rc = stream_enqueue(stream, op);
    if (rc != CUDA_SUCCESS || captured)
        return rc;
    event->generation++;
    event->recorded = true;
    event->stream = stream;
    event->seq = stream->queued;
    return CUDA_SUCCESS;
}

SIM_FN_STREAM(cuEventRecord, 0, (CUevent handle, CUstream hStream), (handle, hStream))
{
    return event_record(handle, hStream);
}

SIM_FN_STREAM(cuEventRecordWithFlags, 0, (CUevent handle, CUstream hStream, unsigned flags),
              (handle, hStream, flags))
{
    if (flags > 1)
        return CUDA_ERROR_INVALID_VALUE;
    return event_record(handle, hStream);
}

SIM_FN(cuEventQuery, 0, (CUevent handle), (handle))
{
    struct sim_event *event;

    SIM_LOCKED();
    CUresult rc = event_find(handle, &event);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (event->ctx->sticky != CUDA_SUCCESS)
        return event->ctx->sticky;
    return event_complete(event) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

SIM_FN(cuEventSynchronize, 0, (CUevent handle), (handle))
{
    struct sim_event *event;

    SIM_LOCKED();
    CUresult rc = event_find(handle, &event);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (event->recorded)
        stream_wait(event->stream, event->seq);
    return event->ctx->sticky;
}

SIM_FN(cuEventElapsedTime, 0, (float *ms, CUevent start_handle, CUevent end_handle),
       (ms, start_handle, end_handle))
{
    struct sim_event *start, *end;

    if (!ms)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = event_find(start_handle, &start);

    if (rc == CUDA_SUCCESS)
        rc = event_find(end_handle, &end);
    if (rc != CUDA_SUCCESS)
        return rc;
    if (!start->recorded || !end->recorded || (start->flags | end->flags) & CU_EVENT_DISABLE_TIMING)
        return CUDA_ERROR_INVALID_HANDLE;
    if (!event_complete(start) || !event_complete(end))
        return CUDA_ERROR_NOT_READY;
    *ms = (float)((double)((int64_t)end->time_ns - (int64_t)start->time_ns) / 1e6);
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuEventElapsedTime_v2, cuEventElapsedTime);

SIM_FN_STREAM(cuStreamWaitEvent, 0, (CUstream hStream, CUevent handle, unsigned flags),
              (hStream, handle, flags))
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;
    struct sim_event *event;

    if (flags > 1)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = find(hStream, &ctx, &stream);

    if (rc == CUDA_SUCCESS)
        rc = event_find(handle, &event);
    if (rc != CUDA_SUCCESS || event_complete(event))
        return rc;
    struct op *op = op_new(OP_NOP, ctx);

    if (!op)
        return CUDA_ERROR_OUT_OF_MEMORY;
    if (!stream->capture && !dep_add(op, event->stream, event->seq)) {
        op_free(op);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    return stream_enqueue(stream, op);
}
