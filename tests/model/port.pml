/*
 * Port channels between two ranks, one channel each way, as src/channel and include/epx/device/port.h build them
 * (docs/PROTOCOL-NET.md). Every access to a shared word is a step of its own; memory is sequentially consistent.
 *
 *   Push      epx_port_push: credit, ticket, words, commit            (port.h)
 *   SEND      take_requests, send, fill_put, fill_add                 (proxy.c)
 *   Net       what net.h allows: sources are read when data lands, data lands at any time, notices in any order
 *   HEAR      epx__lane_notice                                        (lane.c)
 *   APPLY     apply, carry_out, carry_out_add                         (lane.c)
 *   TELL      epx__lane_tell, take_credit                             (lane.c)
 *
 * Rank 0 puts ROWS numbered rows into a ring of PLACES places at rank 1, each with a signal, and rewrites its source as
 * soon as rank 1's signal says that the place is free; a second producer of rank 0 makes ADDS atomic adds (0 among them)
 * on the same channel. Rank 1 reads, and signals back. At the end rank 0 flushes, and all adds must have been carried out.
 *
 * -DW window (the space is 2 W), -DF slots of a FIFO, -DROWS, -DADDS, -DPLACES
 * T_name    broken twins. port_* are EPX__MUTATE(port_*) in the C code too
 */
#ifndef W
#define W 2
#endif
#ifndef F
#define F 2
#endif
#ifndef ROWS
#define ROWS 3
#endif
#ifndef ADDS
#define ADDS 2
#endif
#ifndef PLACES
#define PLACES 2
#endif
#ifdef T_space_is_window
#define SPACE W
#else
#define SPACE (2 * W)
#endif

#define SIGNAL 1
#define PUT_SIGNAL 2
#define ADD 3
#define JUNK 99
#define VALUE(i) ((i) % 2 -> 0 : 5) /* of add i: 0, 5, 0 ... */
#define PARITY(t) ((((t) / F) + 1) & 1)
#define SLOT(n, t) ((n) * F + ((t) % F))
#define MSG(n, s) ((n) * W + ((s) % W))
#define MARK(n, s) ((n) * SPACE + ((s) % SPACE))

/* Producers' side, of the channel that begins at rank n. */
byte issued[2], head[2];
/* FIFO. A commit word is kind * 2 + parity; 0 is as made. */
byte commit[2 * F], arg[2 * F], tail[2];
/* Proxy: sending. */
byte sent[2], acked[2];
byte add_out[2 * W];
/* Network, at most W messages a direction: 0 none, 1 data under way, 2 notice under way. */
byte state[2 * W], nkind[2 * W], nseq[2 * W], nplace[2 * W];
byte credit[2]; /* on its way to rank n: a sum, so in any order */
/* Proxy: receiving what rank n sends. */
byte arrived[2 * SPACE], next[2], owed[2], signals[2];
byte add_in[2 * W], total, adds;
/* Memory of the users. */
byte source[PLACES], place[PLACES];

/* ---- producer ---- */

inline push(n, kind, value)
{
    atomic { issued[n] - acked[n] < W -> issued[n]++ }
#ifdef T_no_room_check
    atomic { ticket = head[n]; head[n]++ }
#else
    atomic { head[n] - tail[n] < F -> ticket = head[n]; head[n]++ }
#endif
#ifdef T_commit_first
    commit[SLOT(n, ticket)] = kind * 2 + PARITY(ticket);
    arg[SLOT(n, ticket)] = value;
#else
    arg[SLOT(n, ticket)] = value;
    commit[SLOT(n, ticket)] = kind * 2 + PARITY(ticket);
#endif
    ticket = 0
}

proctype Rows()
{
    byte i, ticket;
    for (i : 0 .. ROWS - 1) {
#ifndef T_no_free_signal
        if
        :: i >= PLACES -> (signals[1] >= i - PLACES + 1) /* what rank 1 has signalled */
        :: else
        fi;
#endif
        source[i % PLACES] = i + 1;
        push(0, PUT_SIGNAL, i % PLACES)
    }
    i = 0;
    (acked[0] == issued[0] && adds == ADDS); /* flush */
    assert(total == 5 * ((ADDS + 1) / 2))
}

proctype Adds()
{
    byte i, ticket;
    for (i : 0 .. ADDS - 1) {
        push(0, ADD, VALUE(i))
    }
    i = 0
}

proctype Reader()
{
    byte i, ticket;
    for (i : 0 .. ROWS - 1) {
        (signals[0] >= i + 1);
        assert(place[i % PLACES] == i + 1);
        place[i % PLACES] = JUNK;
        push(1, SIGNAL, 0)
    }
    i = 0
}

/* ---- proxy ---- */

#ifdef T_port_zero_empty
#define READY(n) (arg[SLOT(n, tail[n])] != 0) /* "an empty slot is a zero word" */
#else
#define READY(n) (commit[SLOT(n, tail[n])] > 1 && (commit[SLOT(n, tail[n])] & 1) == PARITY(tail[n]))
#endif

inline carry_out(n, kind, seq)
{
    if
    :: kind == ADD -> total = total + add_in[MSG(n, seq)]; adds++
    :: kind == SIGNAL || kind == PUT_SIGNAL -> signals[n]++
    :: else
    fi;
    next[n]++;
    owed[n]++
}

#ifdef T_port_credit_batch
#define ENOUGH(n) (owed[n] >= 2)
#define SAY(n) 2
#else
#define ENOUGH(n) (owed[n] > 0)
#define SAY(n) owed[n]
#endif

proctype Proxy(byte me)
{
    byte k, s, m;
end:
    do
    /* SEND: credit was taken by the producer, so there is always room in the network's window */
    :: atomic {
           READY(me) ->
           k = commit[SLOT(me, tail[me])] / 2;
           m = MSG(me, sent[me]);
           assert(state[m] == 0);
           nkind[m] = k;
           nseq[m] = sent[me] % SPACE;
           nplace[m] = 0;
           if
           :: k == ADD -> add_out[m] = arg[SLOT(me, tail[me])]; state[m] = 1
           :: k == PUT_SIGNAL -> nplace[m] = arg[SLOT(me, tail[me])]; state[m] = 1
           :: else -> state[m] = 2
           fi;
           sent[me]++;
           k = 0; m = 0
       };
#ifdef T_port_zero_empty
       arg[SLOT(me, tail[me])] = 0;
#endif
       tail[me]++
    /* HEAR: any notice */
    :: atomic {
           if
           :: state[MSG(1 - me, 0)] == 2 -> m = MSG(1 - me, 0)
#if W > 1
           :: state[MSG(1 - me, 1)] == 2 -> m = MSG(1 - me, 1)
#endif
#if W > 2
           :: state[MSG(1 - me, 2)] == 2 -> m = MSG(1 - me, 2)
           :: state[MSG(1 - me, 3)] == 2 -> m = MSG(1 - me, 3)
#endif
           fi;
           k = nkind[m];
           s = nseq[m];
           state[m] = 0; nkind[m] = 0; nseq[m] = 0; nplace[m] = 0;
#ifdef T_port_arrival_order
           carry_out(1 - me, k, next[1 - me]);
#else
           assert(arrived[MARK(1 - me, s)] == 0);
           arrived[MARK(1 - me, s)] = k;
#endif
           k = 0; s = 0; m = 0
       }
    /* APPLY: in sequence */
    :: atomic {
           arrived[MARK(1 - me, next[1 - me])] != 0 ->
           k = arrived[MARK(1 - me, next[1 - me])];
           arrived[MARK(1 - me, next[1 - me])] = 0;
           carry_out(1 - me, k, next[1 - me]);
           k = 0
       }
    /* TELL: how many more */
    :: atomic { ENOUGH(1 - me) -> credit[1 - me] = credit[1 - me] + SAY(1 - me); owed[1 - me] = owed[1 - me] - SAY(1 - me) }
    /* take some of the credit that is on its way */
    :: atomic { credit[me] > 0 -> credit[me]--; acked[me]++; assert(acked[me] <= sent[me]) }
    od
}

proctype Net()
{
end:
    do
#define LAND(m)                                                                   \
    :: atomic {                                                                   \
           state[m] == 1 ->                                                       \
           if                                                                     \
           :: nkind[m] == ADD -> add_in[m] = add_out[m]                           \
           :: else -> place[nplace[m]] = source[nplace[m]]                        \
           fi;                                                                    \
           state[m] = 2                                                           \
       }
    LAND(MSG(0, 0))
#if W > 1
    LAND(MSG(0, 1))
#endif
#if W > 2
    LAND(MSG(0, 2))
    LAND(MSG(0, 3))
#endif
#ifdef T_notice_first
    /* the network breaks its promise: the notice overtakes the data */
    :: atomic { state[MSG(0, 0)] == 1 && nkind[MSG(0, 0)] == PUT_SIGNAL && arrived[MARK(0, nseq[MSG(0, 0)])] == 0 ->
                arrived[MARK(0, nseq[MSG(0, 0)])] = SIGNAL }
#endif
    od
}

init
{
    atomic {
        run Proxy(0);
        run Proxy(1);
        run Net();
        run Rows();
        run Reader();
        run Adds()
    }
}
