/* bennud is two processes. The worker does everything; it can crash, or be killed. The keeper, its parent, has no GPU, no threads and
 * nearly no code: it holds the listening socket, the lock of the run folder and the records (checkpoint/record.h) with their
 * descriptors, so that nothing is lost with a worker. It starts the next one and hands it everything.
 *
 * They talk over a SOCK_SEQPACKET pair. A record travels as one or more packets: each has the head, up to KEEPER_BYTES of the
 * record's content and up to 64 of its descriptors. The keeper answers each whole record from the worker, and DROP not at all.
 */
#pragma once

#include "base/error.h"
#include "checkpoint/record.h"

#include <stdbool.h>
#include <stdint.h>

#define KEEPER_MAGIC 0x7065656bu
#define KEEPER_BYTES 32768u

enum keeper_type {
    KEEPER_PUT = 1,  /* a part of a record, either way */
    KEEPER_DROP = 2, /* worker -> keeper: key */
    KEEPER_DONE = 3, /* keeper -> worker: the record `key` is kept, or not: error */
    KEEPER_LAST = 4, /* keeper -> worker: no more records */
    KEEPER_UP = 5,   /* worker -> keeper: it serves */
};

struct keeper_head {
    uint32_t magic;
    uint16_t type, kind;
    uint64_t key;
    uint64_t nbytes; /* of the whole record */
    uint32_t nfds;   /* of the whole record */
    uint32_t first;  /* 1: a record begins */
    int32_t error;
    uint32_t seq; /* of a put, which the answer repeats: one that comes too late answers no later put */
};

#define KEEPER_RECORD_MAX (64u << 20)
#define KEEPER_FDS_MAX (1u << 20)

/* ---- packets (keeper_wire.c), for both sides ---- */

/* Blocking. 0 or negative errno. */
int keeper_send(int sock, uint16_t type, uint64_t key, uint32_t seq, int error);
int keeper_send_record(int sock, const struct bn_record *r, uint32_t seq);

/* A record that is coming in. Zeroed at first. */
struct keeper_inbox {
    struct bn_record record;
    size_t bytes, fds; /* here so far */
};

/* One packet. For PUT, *whole says whether in->record is complete now: then it is the caller's, who zeroes it. -EPIPE: the peer is
 * gone; -EMFILE: descriptors of the record head->key did not arrive; -EBADMSG. */
int keeper_recv(int sock, struct keeper_inbox *in, struct keeper_head *head, bool *whole);
void keeper_inbox_clear(struct keeper_inbox *in);

/* ---- the keeper (keeper.c) ---- */

struct keeper_options {
    char **argv;    /* bennud's own, handed on */
    int listen_fd;  /* -1: private */
    int lock_fd;    /* -1: systemd made the socket, or private */
    int private_fd; /* the one connection, for the first worker alone */
};

/* Runs workers until they need not be run any more; returns bennud's exit status. Single-threaded process. */
int bn_keeper_run(const struct keeper_options *o);

/* ---- the worker's side (guard.c) ---- */

/* sock is taken over. Reads the records of earlier workers; *records is malloced, the caller clears them. */
int bn_guard_open(int sock, struct bn_guard **out, struct bn_record **records, size_t *n,
                  struct bn_error *err);
void bn_guard_free(struct bn_guard *g);
/* The worker is ready to serve. */
void bn_guard_up(struct bn_guard *g);
/* To watch for the keeper's end. */
int bn_guard_fd(const struct bn_guard *g);
/* The keeper is gone: from now on nothing is kept. Says so once in the log. */
void bn_guard_lost(struct bn_guard *g);
