/*
 * Who is in the group, and small collective steps among them over TCP.
 *
 * A star: rank 0 listens, every other rank keeps one connection to it; messages between two others pass through rank 0.
 * When rank 0 is gone, the lowest rank that is still here takes its place. A watcher thread per rank owns the sockets:
 * it receives, relays, and notices deaths (a connection that ends without "bye"), of which all are told.
 */
#ifndef EPX_BOOTSTRAP_BOOTSTRAP_H
#define EPX_BOOTSTRAP_BOOTSTRAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <epx/epx.h>

typedef struct epx__bootstrap epx__bootstrap_t;

typedef struct epx__bootstrap_config {
    int rank, ranks;            /* -1, 0: from the environment */
    const epx_unique_id_t *id;  /* or NULL */
    epx_allgather_fn allgather; /* or NULL: carries rank 0's unique id, then TCP as always */
    void *allgather_context;
    uint64_t config_hash; /* must be equal on all ranks; `config_words` says what it covers */
    const char *config_words;
    uint64_t timeout_ms;
    epx_status_t failure; /* this rank cannot take part: it comes only to say so, and the open fails with that */
} epx__bootstrap_config_t;

/* Join. Exchanges version, struct sizes (hash of sizeof of the wire and public structs) and config_hash first. */
epx_status_t epx__bootstrap_open(const epx__bootstrap_config_t *config, epx__bootstrap_t **bootstrap);

/* Say bye and leave; at most about a second; NULL is fine. What was under way still arrives. */
void epx__bootstrap_close(epx__bootstrap_t *bootstrap);

/* A forked child must let its parent's things be: false there. */
bool epx__bootstrap_ours(const epx__bootstrap_t *bootstrap);
int epx__bootstrap_rank(const epx__bootstrap_t *bootstrap);
int epx__bootstrap_ranks(const epx__bootstrap_t *bootstrap);

/* Collective. timeout_ms 0 is the bootstrap's. Errors name the rank that is missing or gone. */
epx_status_t epx__bootstrap_allgather(epx__bootstrap_t *bootstrap, const void *mine, size_t bytes, void *all,
                                      uint64_t timeout_ms);
epx_status_t epx__bootstrap_barrier(epx__bootstrap_t *bootstrap, uint64_t timeout_ms);

/* This rank cannot take part in the next `count` collectives, and tells the others in them. Never waits. */
void epx__bootstrap_skip(epx__bootstrap_t *bootstrap, int count, epx_status_t why);

/* Tagged messages; order kept per (from, to, tag). A receive whose message has another size: EPX_E_MISMATCH. */
epx_status_t epx__bootstrap_send(epx__bootstrap_t *bootstrap, int to, uint32_t tag, const void *data, size_t bytes);
epx_status_t epx__bootstrap_recv(epx__bootstrap_t *bootstrap, int from, uint32_t tag, void *data, size_t bytes,
                                 uint64_t timeout_ms);

/* Called by the watcher thread, once per lost rank (also for ranks lost before the call), until closed or replaced by
 * NULL. Must not block, nor call the bootstrap. Several listeners: `slot` in [0, 63], one each. */
typedef void (*epx__bootstrap_death_fn)(void *context, int rank);
epx_status_t epx__bootstrap_on_death(epx__bootstrap_t *bootstrap, epx__bootstrap_death_fn fn, void *context, int *slot);
void epx__bootstrap_off_death(epx__bootstrap_t *bootstrap, int slot);
bool epx__bootstrap_dead(const epx__bootstrap_t *bootstrap, int rank);

/* A short notice to every other rank at once, outside all order ("rank 3 failed in operation 17: ..."): each rank's
 * watcher hands it to its notice listeners (the last 32 that nobody listens for yet are kept for who comes later).
 * Errors of one rank reach ranks of other domains this way. Never blocks long. */
typedef void (*epx__bootstrap_notice_fn)(void *context, int from, const void *data, size_t bytes);
epx_status_t epx__bootstrap_on_notice(epx__bootstrap_t *bootstrap, uint32_t tag, epx__bootstrap_notice_fn fn,
                                      void *context, int *slot);
void epx__bootstrap_off_notice(epx__bootstrap_t *bootstrap, int slot);
void epx__bootstrap_notify(epx__bootstrap_t *bootstrap, uint32_t tag, const void *data, size_t bytes); /* <= 1024 */

/* src/bootstrap/id.c: epx_unique_id_create's work. */
epx_status_t epx__unique_id_create(const char *address, epx_unique_id_t *id);

#endif
