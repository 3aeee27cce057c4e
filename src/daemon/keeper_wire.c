/* Records in packets. */
#include "daemon/keeper.h"

#include "base/cleanup.h"
#include "wire/packet.h"

#include <stdlib.h>
#include <string.h>

int keeper_send(int sock, uint16_t type, uint64_t key, uint32_t seq, int error)
{
    struct keeper_head head = {.magic = KEEPER_MAGIC, .type = type, .key = key, .error = error, .seq = seq};
    return bn_packet_send(sock, &(struct iovec){&head, sizeof(head)}, 1, NULL, 0);
}

int keeper_send_record(int sock, const struct bn_record *r, uint32_t seq)
{
    if (r->nbytes > KEEPER_RECORD_MAX || r->nfds > KEEPER_FDS_MAX)
        return -E2BIG;
    struct keeper_head head = {.magic = KEEPER_MAGIC,
                               .type = KEEPER_PUT,
                               .kind = (uint16_t)r->kind,
                               .key = r->key,
                               .nbytes = r->nbytes,
                               .nfds = (uint32_t)r->nfds,
                               .first = 1,
                               .seq = seq};
    size_t bytes = 0, fds = 0;
    do {
        size_t b = r->nbytes - bytes < KEEPER_BYTES ? r->nbytes - bytes : KEEPER_BYTES;
        size_t f = r->nfds - fds < BN_PACKET_FDS_MAX ? r->nfds - fds : BN_PACKET_FDS_MAX;
        struct iovec iov[2] = {{&head, sizeof(head)}, {(uint8_t *)r->bytes + bytes, b}};
        int rc = bn_packet_send(sock, iov, 2, r->fds + fds, f);
        if (rc < 0)
            return rc;
        bytes += b;
        fds += f;
        head.first = 0;
    } while (bytes < r->nbytes || fds < r->nfds);
    return 0;
}

void keeper_inbox_clear(struct keeper_inbox *in)
{
    in->record.nfds = in->fds; /* those that came */
    bn_record_clear(&in->record);
    *in = (struct keeper_inbox){0};
}

static int begin(struct keeper_inbox *in, const struct keeper_head *head)
{
    keeper_inbox_clear(in);
    if (head->nbytes > KEEPER_RECORD_MAX || head->nfds > KEEPER_FDS_MAX)
        return -EBADMSG;
    in->record.key = head->key;
    in->record.kind = head->kind;
    in->record.bytes = malloc(head->nbytes + 1);
    in->record.fds = calloc(head->nfds + 1, sizeof(int));
    if (!in->record.bytes || !in->record.fds) {
        keeper_inbox_clear(in);
        return -ENOMEM;
    }
    in->record.nbytes = head->nbytes;
    in->record.nfds = head->nfds;
    return 0;
}

/* Takes fds over. */
static int add(struct keeper_inbox *in, const struct keeper_head *head, const void *bytes, size_t n,
               const int *fds, size_t nfds, bool *whole)
{
    struct bn_record *r = &in->record;
    int rc = head->first ? begin(in, head) : 0;
    if (!r->bytes || r->key != head->key) { /* the rest of one whose beginning did not arrive */
        bn_close_all(fds, nfds);
        return rc;
    }
    if (rc == 0 && (r->nbytes != head->nbytes || r->nfds != head->nfds || n > r->nbytes - in->bytes ||
                    nfds > r->nfds - in->fds))
        rc = -EBADMSG;
    if (rc < 0) {
        bn_close_all(fds, nfds);
        keeper_inbox_clear(in);
        return rc;
    }
    memcpy((uint8_t *)r->bytes + in->bytes, bytes, n);
    memcpy(r->fds + in->fds, fds, nfds * sizeof(int));
    in->bytes += n;
    in->fds += nfds;
    *whole = in->bytes == r->nbytes && in->fds == r->nfds;
    return 0;
}

int keeper_recv(int sock, struct keeper_inbox *in, struct keeper_head *head, bool *whole)
{
    uint8_t buf[sizeof(*head) + KEEPER_BYTES];
    int fds[BN_PACKET_FDS_MAX];
    size_t len = 0, nfds = 0;
    *whole = false;
    int r = bn_packet_recv(sock, buf, sizeof(buf), &len, fds, BN_PACKET_FDS_MAX, &nfds);
    if (r ==
        -ECONNRESET) /* said once, of answers that the dead peer had not read; what it sent before is still to come */
        r = bn_packet_recv(sock, buf, sizeof(buf), &len, fds, BN_PACKET_FDS_MAX, &nfds);
    if (len >= sizeof(*head))
        memcpy(head, buf, sizeof(*head));
    if (r == -EMSGSIZE && len >= sizeof(*head) && head->magic == KEEPER_MAGIC) {
        keeper_inbox_clear(in);
        return -EMFILE;
    }
    if (r < 0)
        return r;
    if (len < sizeof(*head) || head->magic != KEEPER_MAGIC) {
        bn_close_all(fds, nfds);
        return -EBADMSG;
    }
    if (head->type == KEEPER_PUT)
        return add(in, head, buf + sizeof(*head), len - sizeof(*head), fds, nfds, whole);
    bn_close_all(fds, nfds);
    return 0;
}
