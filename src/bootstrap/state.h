/*
 * The inside of a bootstrap, shared by the files of this folder.
 *
 * One lock guards all but what is marked. The watcher thread is the only one that reads sockets; any thread that holds
 * the lock may write to them (epx__connection_flush). Words from one rank to another keep their order, since each
 * connection has one queue and the middle (rank 0) relays in the order of arrival; so news that rank k has left or died
 * reaches a rank after everything that k sent to it. When rank 0 is gone, another takes the middle: succession.c.
 *
 * Collectives: every rank sends its part to rank 0 under the operation's number (GATHER); rank 0 holds one part per
 * rank (`parts`) and, when all are there, sends the whole to all (RESULT), or words to all whose part it holds (ABORT).
 * This is done by whichever thread of rank 0 brings the last part, so rank 0's caller need not be there for news to
 * travel. A number is (operation << 32 | chunk): a rank that gave up on one operation is never matched with the next.
 */
#ifndef EPX_BOOTSTRAP_STATE_H
#define EPX_BOOTSTRAP_STATE_H

#include <poll.h>
#include <pthread.h>
#include <sys/types.h>

#include "bootstrap/bootstrap.h"
#include "bootstrap/guests.h"
#include "bootstrap/socket.h"
#include "bootstrap/wire.h"

enum {
    EPX__LISTENERS_MAX = 64,
    EPX__KEPT_NOTICES_MAX = 32,       /* for listeners that come later */
    EPX__CLOSE_NS = 1000000000,       /* the longest that a leave may take */
    EPX__QUEUE_BYTES_MAX = 256 << 20, /* a send waits while more is queued */
    EPX__GUESTS = 16,                 /* strangers at the successor's socket at a time */
};

typedef enum epx__rank_state { EPX__RANK_HERE = 0, EPX__RANK_LEFT = 1, EPX__RANK_DEAD = 2 } epx__rank_state_t;

typedef enum epx__kind { EPX__KIND_ALLGATHER = 1, EPX__KIND_BARRIER = 2 } epx__kind_t;

/* A frame with its payload; in several queues at once when it goes to several ranks. */
typedef struct epx__message {
    uint32_t references; /* atomic */
    epx__frame_t frame;
    struct epx__message *next; /* in the inbox or among the notices */
    uint8_t header[EPX__FRAME_BYTES];
    uint8_t payload[];
} epx__message_t;

typedef struct epx__queued {
    struct epx__queued *next;
    epx__message_t *message;
    bool embedded; /* part of its connection: not freed */
} epx__queued_t;

typedef struct epx__connection {
    epx__socket_t socket;
    bool to_middle; /* the other end relays, and may be succeeded */
    bool awaited;   /* it does not stand yet, but should soon: what is queued is kept until then */
    /* Outgoing. */
    epx__queued_t *first, *last;
    size_t first_sent; /* of header and payload of `first` */
    size_t queued_bytes;
    epx__queued_t bye_entry, spare_entry; /* so that leaving and giving up need no memory */
    epx__queued_t outcome_entry;          /* so that the outcome of a collective reaches all or none */
    bool half_close;                      /* shut down for writing once the queue is empty */
    bool shut;                            /* that is done: nothing more can be sent */
    bool ended;                           /* the peer sends no more, yet may still read (while rank 0 leaves) */
    bool failed;                          /* a send failed: the watcher will find out and close */
    /* Incoming: a header, then a message. */
    uint8_t header[EPX__FRAME_BYTES];
    size_t have;
    epx__message_t *incoming;
    /* For the outcome of the collective under way, made before our part was sent: whoever takes part can hear how it
     * ended. NULL when there is none, or it is in use. */
    epx__message_t *room;
    size_t room_bytes;
} epx__connection_t;

typedef struct epx__listener {
    bool used;
    epx__bootstrap_death_fn death;
    epx__bootstrap_notice_fn notice;
    uint32_t tag;
    void *context;
} epx__listener_t;

struct epx__bootstrap {
    int rank, ranks;
    uint64_t timeout_ms;
    pid_t pid; /* a forked child may only let go */

    pthread_mutex_t lock;
    pthread_cond_t changed; /* anything below that a caller may wait for */
    pthread_t watcher;
    bool watched;         /* the thread exists */
    int wake_fd;          /* eventfd: makes the watcher look again */
    struct pollfd *polls; /* and as much again to scratch in */

    int links;               /* `ranks`, or 0 in a group of one */
    epx__connection_t *link; /* [links] by rank: the middle has one to each other, the others one to the middle */
    uint8_t *state;          /* [ranks] epx__rank_state_t, atomic */

    /* Succession; written by the watcher. */
    uint32_t middle;        /* who relays: rank 0 first */
    int before;             /* the middle that has said bye and whose last words are still on their way, or -1 */
    epx__endpoint_t *peers; /* [ranks] where each would take the middle's place */
    epx__socket_t standby;  /* where this rank would; nobody is let in before */
    epx__hello_t hello;     /* what this rank says to a new middle */
    epx__guest_t *guests;   /* [EPX__GUESTS] */
    uint8_t *tried;         /* [ranks] 1: it refuses connections, so it is gone, and a new middle will say how */
    bool succeeded;         /* rank 0 is the middle no more */
    uint64_t before_until_ns, try_ns, seek_until_ns, probe_ns, awaited_since_ns;
    int probe_next; /* the rank to be probed next */

    epx_status_t failed; /* this rank itself can go on no more, and why */
    char failed_words[256];
    bool closing; /* epx__bootstrap_close has begun */
    uint64_t close_by_ns;
    epx__message_t *bye, *spare; /* made at the start */

    epx__message_t *inbox_first, *inbox_last; /* DATA */

    bool busy; /* a collective of this rank is under way */
    uint64_t operation;
    uint64_t waiting_for;                /* its number; 0 is none */
    epx__message_t *outcome;             /* RESULT or ABORT of that number */
    uint8_t present[EPX__RANKS_MAX / 8]; /* ANSWER for that number */
    bool answered;

    epx__message_t **parts; /* rank 0: [ranks] */
    uint64_t *reached;      /* rank 0: [ranks] the rank has given up all unfinished operations below this number */

    epx__message_t *notices_first, *notices_last; /* not yet handed out */

    /* Guarded by listeners_lock, which the watcher holds while it calls a listener; taken before `lock`. */
    pthread_mutex_t listeners_lock;
    epx__listener_t listeners[EPX__LISTENERS_MAX];
    uint64_t *told; /* [ranks] bit per listener */
    epx__message_t *kept_first, *kept_last;
    uint32_t kept_count;
};

/* ---- connection.c: messages and queues; with the lock held ------------------------------------ */

epx__message_t *epx__message_create(const epx__frame_t *frame, const void *payload); /* NULL: no memory */
void epx__message_release(epx__message_t *message);                                  /* NULL is fine */
void epx__message_append(epx__message_t **first, epx__message_t **last, epx__message_t *message);

/* Queue (takes a reference of its own) and send what can be sent now. False: no memory for the entry. */
bool epx__connection_queue(epx__connection_t *link, epx__message_t *message, epx__queued_t *embedded);
void epx__connection_flush(epx__connection_t *link);
void epx__connection_close(epx__connection_t *link);
void epx__connection_pop(epx__connection_t *link); /* drop the first message of the queue */
/* A connection that can be used (again), its queue as it is. */
void epx__connection_renew(epx__connection_t *link);
/* What is still unsent goes to the front of another queue, except parts of collectives, which die with rank 0. */
void epx__connection_move(epx__connection_t *to, epx__connection_t *from);

/* Read what is there, one message at most: 1 a whole one is in *message (the caller's), 0 not yet, -1 the end (words
 * in *wrong, or NULL when the peer just closed), -2 no memory. */
int epx__connection_read(epx__connection_t *link, uint32_t ranks, epx__message_t **message, const char **wrong);

/* ---- relay.c: what a frame does; with the lock held -------------------------------------------- */

void epx__relay_take(epx__bootstrap_t *b, uint32_t from, epx__message_t *message); /* owns the message */
/* A message to a rank: relayed, or into the inbox. False: no memory. */
bool epx__relay_to(epx__bootstrap_t *b, uint32_t to, epx__message_t *message);
bool epx__relay_to_others(epx__bootstrap_t *b, uint32_t except, epx__message_t *message);
/* The connection to a rank has ended: death, unless it had said bye. */
void epx__relay_lost(epx__bootstrap_t *b, uint32_t rank, const char *wrong);
/* This rank itself cannot go on. Closes all connections, so that the others notice. */
void epx__bootstrap_fail(epx__bootstrap_t *b, epx_status_t status, const char *words);
void epx__bootstrap_wake(epx__bootstrap_t *b);
/* The middle: a rank is gone, tell the others. */
void epx__relay_gone(epx__bootstrap_t *b, uint32_t rank, epx__rank_state_t how);
/* The connection over which messages for that rank go. */
epx__connection_t *epx__relay_way(const epx__bootstrap_t *b, uint32_t to);

/* ---- succession.c: who relays when the middle is gone; by the watcher, with the lock held ------------- */

/* The middle has left or died, or does not take us: choose the next. `unsent`: its connection, or NULL. */
void epx__succession_begin(epx__bootstrap_t *b, epx__connection_t *unsent);
void epx__succession_inherit(epx__bootstrap_t *b, epx__connection_t *unsent); /* what the last one has not taken */
/* What is due: connect to the new middle, or look for those who should have come. Lets go of the lock meanwhile. */
void epx__succession_turn(epx__bootstrap_t *b);
uint64_t epx__succession_due_ns(const epx__bootstrap_t *b); /* when the next turn is, UINT64_MAX: no need */
/* The new middle: somebody is at the door; somebody there has spoken. */
bool epx__succession_receives(const epx__bootstrap_t *b);
void epx__succession_accept(epx__bootstrap_t *b);
void epx__succession_hear(epx__bootstrap_t *b, epx__guest_t *guest);
/* The new middle has taken us. Or it has hung up before. */
void epx__succession_welcomed(epx__bootstrap_t *b);
void epx__succession_turned_away(epx__bootstrap_t *b);
/* Nobody is awaited any more to whom a bye should be said, or from whom one is heard. */
bool epx__succession_settled(const epx__bootstrap_t *b);
/* Bye to all, or to the middle. */
void epx__say_bye(epx__bootstrap_t *b);

/* ---- collective.c ------------------------------------------------------------------------------- */

/* Rank 0, with the lock held: a part has come (owned), a rank cannot take part, or somebody is gone. */
void epx__collective_part(epx__bootstrap_t *b, uint32_t rank, epx__message_t *part);
void epx__collective_giveup(epx__bootstrap_t *b, uint32_t rank, uint64_t sequence, epx_status_t status);
void epx__collective_look(epx__bootstrap_t *b);
void epx__collective_present(const epx__bootstrap_t *b, uint64_t sequence, uint8_t present[EPX__RANKS_MAX / 8]);

/* Wait for `changed` until `deadline_ns`; false when it has passed. */
bool epx__bootstrap_wait(epx__bootstrap_t *b, uint64_t deadline_ns);
/* Why nothing can be had from that rank (or through rank 0) any more: in words; EPX_OK when it is here. */
epx_status_t epx__bootstrap_reachable(epx__bootstrap_t *b, int rank, const char *what);

/* ---- watcher.c, listeners.c ---------------------------------------------------------------------- */

void *epx__watcher_main(void *bootstrap);
void epx__listeners_tell(epx__bootstrap_t *b); /* by the watcher, without the lock */

/* ---- join_root.c, join_leaf.c -------------------------------------------------------------------- */

typedef struct epx__join {
    epx__id_t where;
    epx__hello_t hello;     /* this rank's own */
    epx__socket_t *standby; /* opened on the way, its endpoint told to rank 0; NULL: none */
    bool *unheard;          /* set when there was no socket even to speak with; may be NULL */
    uint64_t deadline_ns, timeout_ms;
} epx__join_t;

/* Rank 0: gather all; on success each connection b->link[r] is open and waits for WELCOME. `b` NULL: there was no
 * memory, tell all who come. */
epx_status_t epx__join_root(const epx__join_t *join, epx__socket_t *listener, epx__bootstrap_t *b);
epx_status_t epx__join_leaf(const epx__join_t *join, epx__socket_t *connected);
/* A REFUSE frame with these words, whole; returns its length. */
size_t epx__join_refusal(epx_status_t status, const char *words, uint8_t bytes[EPX__FRAME_BYTES + EPX__WORDS_MAX]);

#endif
