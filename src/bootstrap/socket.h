/*
 * TCP sockets that this process owns.
 *
 * Each is entered in one list of the process, so that a forked child can close its copies at once: else a child
 * that outlives a killed parent would keep the connection alive and hide the death. All are non-blocking,
 * close-on-exec, without delay, with keepalive.
 */
#ifndef EPX_BOOTSTRAP_SOCKET_H
#define EPX_BOOTSTRAP_SOCKET_H

#include <poll.h>

#include "base/clock.h"
#include "bootstrap/wire.h"

typedef struct epx__socket {
    int fd; /* valid while `open` */
    bool open;
    struct epx__socket *previous, *next;
} epx__socket_t;

/* Keep one descriptor; closing it makes room for another. False: none to be had (errno). */
bool epx__socket_reserve(epx__socket_t *reserved);
/* Listen at the endpoint; port 0 is any, and the one taken is written back. */
epx_status_t epx__socket_listen(epx__socket_t *listener, epx__endpoint_t *endpoint);
/* The address of this end of a connection, its port left out. */
bool epx__socket_here(const epx__socket_t *connected, epx__endpoint_t *endpoint);
/* One connection that waits, or false (errno says why). */
bool epx__socket_accept(epx__socket_t *listener, epx__socket_t *accepted);
/* One attempt, at most until `deadline` (ns, monotonic): 0 or errno. EPX_E_SYSTEM alone when no socket can be had. */
epx_status_t epx__socket_connect(epx__socket_t *connected, const epx__endpoint_t *endpoint, uint64_t deadline_ns,
                                 int *error);
void epx__socket_close(epx__socket_t *owned);
void epx__socket_move(epx__socket_t *to, epx__socket_t *from);

/* Send all of a small message at once; false when the connection cannot take it. */
bool epx__socket_send_now(const epx__socket_t *to, const void *data, size_t bytes);
/* Receive exactly `bytes`: 1; 0 the peer has closed; -1 the deadline passed; -2 an error (errno). */
int epx__socket_receive(const epx__socket_t *from, void *data, size_t bytes, uint64_t deadline_ns);

/* poll(2) over those whose fd is not -1 (it refuses more entries than the process may have descriptors, open or not).
 * `scratch` has room for `count`. All revents are written, also on failure. */
int epx__poll(struct pollfd *polls, struct pollfd *scratch, int count, int timeout_ms);

/* How many descriptors this process can have now, `wanted` at most; none is kept. */
uint32_t epx__descriptors_spare(uint32_t wanted);

/* Whole milliseconds until `deadline_ns`, rounded up, for poll(2). */
int epx__milliseconds_until(uint64_t deadline_ns);

/* src/bootstrap/id.c: the socket that listens behind an id of this process, once. */
epx_status_t epx__unique_id_take(const epx_unique_id_t *id, epx__socket_t *listener);
bool epx__random_bytes(void *bytes, size_t count);

#endif
