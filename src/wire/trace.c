#include "wire/trace.h"

void bn_write_trace(struct bn_writer *w, const struct bn_trace *t)
{
    bn_write_u64(w, t->began_ns);
    bn_write_phases(w, &t->phases);
    bn_write_u32(w, t->n);
    for (uint32_t i = 0; i < t->n; i++) {
        const struct bn_trace_part *p = &t->parts[i];
        bn_write_string(w, p->name);
        bn_write_u32(w, p->pid);
        bn_write_u32(w, p->gpu);
        bn_write_u64(w, p->start_ns);
        bn_write_u64(w, p->duration_ns);
        bn_write_u64(w, p->bytes);
    }
}

void bn_read_trace(struct bn_reader *r, struct bn_trace *t)
{
    t->began_ns = bn_read_u64(r);
    bn_read_phases(r, &t->phases);
    t->n = 0;
    uint32_t n = bn_read_u32(r);
    if (n > BN_TRACE_PARTS_MAX)
        r->failed = true;
    for (uint32_t i = 0; i < n && !r->failed; i++) {
        struct bn_trace_part *p = &t->parts[i];
        bn_read_string(r, p->name, sizeof(p->name));
        p->pid = bn_read_u32(r);
        p->gpu = bn_read_u32(r);
        p->start_ns = bn_read_u64(r);
        p->duration_ns = bn_read_u64(r);
        p->bytes = bn_read_u64(r);
        t->n = i + 1;
    }
}
