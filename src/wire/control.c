#include "wire/control.h"

#include "base/cleanup.h"
#include "config.h"
#include "wire/packet.h"

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

const char *const bn_tier_names[BN_TIERS] = {
    [BN_TIER_HOST] = "host",
    [BN_TIER_GPU] = "gpu",
    [BN_TIER_DISK] = "disk",
};

int bn_ctl_send(int sock, uint16_t type, bool reply, const struct bn_error *err, const struct bn_writer *body,
                const int *fds, size_t nfds)
{
    struct bn_ctl_head head = {
        .magic = BN_CTL_MAGIC, .version = BN_CTL_VERSION, .type = type, .reply = reply};
    if (bn_error_is_set(err)) {
        head.error = err->code;
        memcpy(head.stage, err->stage, sizeof(head.stage));
        memcpy(head.text, err->text, sizeof(head.text));
    }
    if (body && (body->failed || body->len > BN_CTL_MSG_MAX - sizeof(head)))
        return body->failed ? -ENOMEM : -EMSGSIZE;
    struct iovec iov[2] = {{&head, sizeof(head)}, {body ? body->buf : NULL, body ? body->len : 0}};
    return bn_packet_send(sock, iov, body && body->len ? 2 : 1, fds, nfds);
}

int bn_ctl_recv(int sock, void *buf, struct bn_ctl_head *head, struct bn_reader *body, int *fds, size_t max,
                size_t *nfds)
{
    size_t len;
    int r = bn_packet_recv(sock, buf, BN_CTL_MSG_MAX, &len, fds, max, nfds);
    if (r < 0)
        return r;
    bool ok = len >= sizeof(*head);
    if (ok) {
        memcpy(head, buf, sizeof(*head));
        ok = head->magic == BN_CTL_MAGIC && head->error >= 0;
        head->stage[sizeof(head->stage) - 1] = 0;
        head->text[sizeof(head->text) - 1] = 0;
    }
    if (ok && head->version != BN_CTL_VERSION)
        r = -EPROTONOSUPPORT;
    else if (!ok)
        r = -EBADMSG;
    if (r < 0) {
        bn_close_all(fds, nfds ? *nfds : 0);
        if (nfds)
            *nfds = 0;
        return r;
    }
    *body = bn_reader_init((uint8_t *)buf + sizeof(*head), len - sizeof(*head));
    return 0;
}

int bn_ctl_connect(const char *rundir, struct bn_error *err)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    if (!rundir)
        rundir = secure_getenv("BENNU_RUNDIR");
    if (!rundir)
        rundir = BENNU_RUNDIR;
    if (snprintf(sa.sun_path, sizeof(sa.sun_path), "%s/%s", rundir, BN_CTL_SOCKET) >=
        (int)sizeof(sa.sun_path))
        return bn_error_set(err, ENAMETOOLONG, "daemon", "the run folder's name is too long: %s", rundir);

    bn_auto_fd sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (sock < 0)
        return bn_error_set(err, errno, "daemon", "cannot make a socket: %m");
    if (connect(sock, (struct sockaddr *)&sa, sizeof(sa)) < 0) {
        if (errno == EACCES || errno == EPERM)
            return bn_error_set(err, errno, "daemon", "no access to bennud at %s: run this as root",
                                sa.sun_path);
        return bn_error_set(err, errno, "daemon",
                            "bennud is not running (%s: %m): start it with 'systemctl start bennud', or "
                            "run " BENNU_DAEMON_PATH " as root",
                            sa.sun_path);
    }
    return BN_TAKE_FD(sock);
}

int bn_ctl_call(int sock, uint16_t type, const struct bn_writer *body, const int *fds, size_t nfds,
                bn_ctl_event_fn on_event, void *arg, void *buf, struct bn_reader *reply, struct bn_error *err)
{
    int r = bn_ctl_send(sock, type, false, NULL, body, fds, nfds);
    if (r < 0)
        return bn_error_set(err, r, "daemon", "cannot send to bennud: %s", strerror(-r));
    return bn_ctl_answer(sock, type, on_event, arg, buf, reply, err);
}

int bn_ctl_answer(int sock, uint16_t type, bn_ctl_event_fn on_event, void *arg, void *buf,
                  struct bn_reader *reply, struct bn_error *err)
{
    for (;;) {
        struct bn_ctl_head head;
        int r = bn_ctl_recv(sock, buf, &head, reply, NULL, 0, NULL);
        if (r == -EPIPE || r == -ECONNRESET)
            return bn_error_set(err, EPIPE, "daemon", "bennud ended before it answered: see its log");
        if (r < 0)
            return bn_error_set(err, r, "daemon",
                                "cannot understand bennud (%s): are command and daemon of one version?",
                                strerror(-r));
        if (!head.reply) {
            if (on_event)
                on_event(arg, &head, reply);
            continue;
        }
        if (head.type != type)
            return bn_error_set(err, EPROTO, "daemon", "bennud answered something else than it was asked");
        if (head.error)
            return bn_error_set(err, head.error, head.stage, "%s", head.text);
        return 0;
    }
}

void bn_write_progress(struct bn_writer *w, const struct bn_progress *p)
{
    bn_write_string(w, p->phase);
    bn_write_u64(w, p->done);
    bn_write_u64(w, p->total);
}

void bn_read_progress(struct bn_reader *r, struct bn_progress *p)
{
    bn_read_string(r, p->phase, sizeof(p->phase));
    p->done = bn_read_u64(r);
    p->total = bn_read_u64(r);
}

void bn_write_phases(struct bn_writer *w, const struct bn_phases *p)
{
    bn_write_u32(w, p->n);
    for (uint32_t i = 0; i < p->n; i++) {
        bn_write_string(w, p->phase[i].name);
        bn_write_u64(w, p->phase[i].start_ns);
        bn_write_u64(w, p->phase[i].duration_ns);
        bn_write_u64(w, p->phase[i].bytes);
    }
}

void bn_read_phases(struct bn_reader *r, struct bn_phases *p)
{
    *p = (struct bn_phases){0};
    uint32_t n = bn_read_u32(r);
    if (n > BN_PHASES_MAX)
        r->failed = true;
    for (uint32_t i = 0; i < n && !r->failed; i++) {
        bn_read_string(r, p->phase[i].name, sizeof(p->phase[i].name));
        p->phase[i].start_ns = bn_read_u64(r);
        p->phase[i].duration_ns = bn_read_u64(r);
        p->phase[i].bytes = bn_read_u64(r);
        p->n = i + 1;
    }
}

void bn_write_prepare_reply(struct bn_writer *w, const struct bn_prepare_reply *p)
{
    bn_write_u32(w, p->passes);
    bn_write_u64(w, p->gpu_bytes);
    bn_write_u64(w, p->sent_bytes);
    bn_write_u64(w, p->last_bytes);
    bn_write_u64(w, p->gate_ns);
}

void bn_read_prepare_reply(struct bn_reader *r, struct bn_prepare_reply *p)
{
    p->passes = bn_read_u32(r);
    p->gpu_bytes = bn_read_u64(r);
    p->sent_bytes = bn_read_u64(r);
    p->last_bytes = bn_read_u64(r);
    p->gate_ns = bn_read_u64(r);
}

void bn_write_daemon_info(struct bn_writer *w, const struct bn_daemon_info *i)
{
    bn_write_string(w, i->version);
    bn_write_string(w, i->driver_path);
    bn_write_u32(w, i->driver_version);
    bn_write_u8(w, i->simulated);
    bn_write_u32(w, i->pid);
    bn_write_u32(w, i->gpus);
    for (uint32_t g = 0; g < i->gpus && g < BN_ARRAY_SIZE(i->gpu); g++) {
        bn_write_string(w, i->gpu[g].name);
        bn_write_bytes(w, i->gpu[g].uuid, sizeof(i->gpu[g].uuid));
        bn_write_u32(w, i->gpu[g].cc);
        bn_write_u64(w, i->gpu[g].total);
        bn_write_u64(w, i->gpu[g].free);
        bn_write_string(w, i->gpu[g].no_hash);
    }
    bn_write_u64(w, i->host_limit);
    bn_write_u64(w, i->host_used);
}

void bn_read_daemon_info(struct bn_reader *r, struct bn_daemon_info *i)
{
    *i = (struct bn_daemon_info){0};
    bn_read_string(r, i->version, sizeof(i->version));
    bn_read_string(r, i->driver_path, sizeof(i->driver_path));
    i->driver_version = bn_read_u32(r);
    i->simulated = bn_read_u8(r);
    i->pid = bn_read_u32(r);
    i->gpus = bn_read_u32(r);
    if (i->gpus > BN_ARRAY_SIZE(i->gpu))
        r->failed = true;
    for (uint32_t g = 0; g < i->gpus && !r->failed; g++) {
        bn_read_string(r, i->gpu[g].name, sizeof(i->gpu[g].name));
        const void *uuid = bn_read_bytes(r, sizeof(i->gpu[g].uuid));
        if (uuid)
            memcpy(i->gpu[g].uuid, uuid, sizeof(i->gpu[g].uuid));
        i->gpu[g].cc = bn_read_u32(r);
        i->gpu[g].total = bn_read_u64(r);
        i->gpu[g].free = bn_read_u64(r);
        bn_read_string(r, i->gpu[g].no_hash, sizeof(i->gpu[g].no_hash));
    }
    i->host_limit = bn_read_u64(r);
    i->host_used = bn_read_u64(r);
}

void bn_write_ps_entry(struct bn_writer *w, const struct bn_ps_entry *e)
{
    bn_write_u32(w, e->pid);
    bn_write_string(w, e->comm);
    bn_write_u32(w, e->state);
    bn_write_u64(w, e->gpu_bytes);
    bn_write_u64(w, e->host_bytes);
    bn_write_u64(w, e->allocations);
    bn_write_u32(w, e->unknown);
    bn_write_string(w, e->note);
    bn_write_u64(w, e->disk_bytes);
    bn_write_u32(w, e->tier);
}

void bn_read_ps_entry(struct bn_reader *r, struct bn_ps_entry *e)
{
    e->pid = bn_read_u32(r);
    bn_read_string(r, e->comm, sizeof(e->comm));
    e->state = bn_read_u32(r);
    e->gpu_bytes = bn_read_u64(r);
    e->host_bytes = bn_read_u64(r);
    e->allocations = bn_read_u64(r);
    e->unknown = bn_read_u32(r);
    bn_read_string(r, e->note, sizeof(e->note));
    e->disk_bytes = bn_read_u64(r);
    e->tier = bn_read_u32(r);
}
