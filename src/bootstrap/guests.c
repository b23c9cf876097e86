/* Strangers at a listening socket: see guests.h. */
#include "bootstrap/guests.h"

#include <errno.h>
#include <sys/socket.h>

/* A free place; when there is none, that of the oldest of the silent, else of the oldest. */
static epx__guest_t *find_place(epx__guest_t *guests, int places)
{
    epx__guest_t *worst = NULL;
    for (int i = 0; i < places; i++) {
        epx__guest_t *guest = &guests[i];
        if (!guest->socket.open)
            return guest;
        bool silent = guest->have == 0, worst_silent = worst && worst->have == 0;
        if (!worst || (silent && !worst_silent) || (silent == worst_silent && guest->since_ns < worst->since_ns))
            worst = guest;
    }
    return worst;
}

epx__guest_t *epx__guest_enter(epx__guest_t *guests, int places, epx__socket_t *accepted, uint32_t *turned_away)
{
    epx__guest_t *guest = find_place(guests, places);
    *turned_away += guest->socket.open;
    epx__socket_close(&guest->socket);
    epx__socket_move(&guest->socket, accepted);
    guest->have = 0;
    guest->since_ns = epx__now_ns();
    return guest;
}

int epx__guest_read(epx__guest_t *guest, epx__hello_t *hello)
{
    ssize_t got = recv(guest->socket.fd, guest->bytes + guest->have, EPX__HELLO_BYTES - guest->have, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (got <= 0)
        return -1;
    guest->have += (uint32_t)got;
    if (!epx__hello_begins(guest->bytes, guest->have))
        return -1;
    if (guest->have < EPX__HELLO_BYTES)
        return 0;
    return epx__hello_parse(guest->bytes, hello) ? -1 : 1;
}
