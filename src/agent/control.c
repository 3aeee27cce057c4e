#include "agent/control.h"

#include "agent/purge.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

/* The gate was closed for a controller that has not touched the memory since. */
static bool untouched;

static void close_all(const int *fds, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        close(fds[i]);
}

/* NULL, or what is wrong with the packet. */
static const char *check(const struct bn_agent_msg *head, size_t len, unsigned nfds)
{
    if (head->count > BN_AGENT_BATCH)
        return "too many records";
    if (len != sizeof(*head) + head->count * sizeof(struct bn_agent_segment))
        return "its size does not fit its count";
    if (nfds != (head->type == BN_AGENT_IMPORT ? head->count : 0))
        return "its descriptors do not fit its count (the process may have too many open)";
    return NULL;
}

bool bn_control_open_alone(void)
{
    return untouched;
}

void bn_control_open(void)
{
    struct bn_answer unsent = {0};
    /* Where it fails, memory is not in place: the gate had better stay closed. */
    if (bn_evict_open(&unsent) == 0)
        untouched = false;
}

static void note(uint32_t type, uint32_t before)
{
    uint32_t now = bn_agent_page()->state;
    if (type == BN_AGENT_CLOSE && before != BN_AGENT_CLOSED && now == BN_AGENT_CLOSED)
        untouched = true;
    else if (now != BN_AGENT_CLOSED || type == BN_AGENT_IMPORT || type == BN_AGENT_MAP)
        untouched = false;
}

static void dispatch(const struct bn_agent_msg *head, const struct bn_agent_segment *segs, const int *fds,
                     struct bn_answer *a)
{
    switch (head->type) {
    case BN_AGENT_HELLO: break;
    case BN_AGENT_CLOSE: bn_evict_close(head->arg, a); break;
    case BN_AGENT_OPEN: bn_evict_open(a); break;
    case BN_AGENT_LIST: bn_evict_list(head->arg, a); break;
    case BN_AGENT_EXPORT: bn_evict_export(head->arg, a); break;
    case BN_AGENT_EVICT: bn_evict_evict(a); break;
    case BN_AGENT_PURGE: a->head.arg = bn_agent_page()->state == BN_AGENT_EVICTED ? bn_purge() : 0; break;
    case BN_AGENT_IMPORT: bn_evict_import(segs, head->count, fds, a); break;
    case BN_AGENT_CREATE: bn_evict_create(segs, head->count, a); break;
    case BN_AGENT_MAP: bn_evict_map(segs, head->count, a); break;
    default:
        bn_answer_fail(a, EOPNOTSUPP, 0, "this agent (%s) does not know request %u",
                       bn_agent_page()->agent_version, head->type);
    }
}

bool bn_control_handle(const void *packet, size_t len, const int *fds, unsigned nfds,
                       struct bn_answer *answer)
{
    struct bn_agent_msg head;
    struct bn_agent_segment segs[BN_AGENT_BATCH];
    memset(answer, 0, sizeof(*answer));
    if (len >= sizeof(head))
        memcpy(&head, packet, sizeof(head));
    if (len < sizeof(head) || head.magic != BN_AGENT_MAGIC || head.reply) {
        close_all(fds, nfds);
        return false;
    }
    answer->head =
        (struct bn_agent_msg){.magic = BN_AGENT_MAGIC, .type = head.type, .reply = 1, .id = head.id};
    const char *wrong = check(&head, len, nfds);
    if (wrong) {
        close_all(fds, nfds);
        bn_answer_fail(answer, EBADMSG, 0, "malformed request: %s", wrong);
        return true;
    }
    memcpy(segs, (const char *)packet + sizeof(head), head.count * sizeof(segs[0]));
    uint32_t before = bn_agent_page()->state;
    dispatch(&head, segs, fds, answer);
    note(head.type, before);
    return true;
}
