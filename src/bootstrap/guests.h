/*
 * Strangers at a listening socket, until they have said a hello.
 *
 * There is a fixed number of places. When all are taken, the one that has been silent longest must go: a real rank
 * tries again. Whoever owns the places drops those that take longer than EPX__GUEST_NS.
 */
#ifndef EPX_BOOTSTRAP_GUESTS_H
#define EPX_BOOTSTRAP_GUESTS_H

#include "bootstrap/socket.h"

#define EPX__GUEST_NS 2000000000ull /* to say the hello */

typedef struct epx__guest {
    epx__socket_t socket;
    uint64_t since_ns;
    uint32_t have;
    uint8_t bytes[EPX__HELLO_BYTES];
} epx__guest_t;

/* A place for a connection (which moves there); who has lost its own for it is counted. */
epx__guest_t *epx__guest_enter(epx__guest_t *guests, int places, epx__socket_t *accepted, uint32_t *turned_away);
/* Read what is there: 1 a whole hello; 0 not yet; -1 nobody that belongs here. */
int epx__guest_read(epx__guest_t *guest, epx__hello_t *hello);

#endif
