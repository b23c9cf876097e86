/*
 * Low latency between domains (docs/PROTOCOL-LL.md, src/algo/ll/cpu): two ranks that are far from each other. The near
 * path is ll.pml; that a channel is ordered, reliable and flow-controlled is port.pml. Here a channel is what port.pml
 * leaves of it: a row of requests, of which
 *   a put's bytes are read from the sender's `out` and land in any order, at any time before it is applied;
 *   requests are applied one by one in their order: an add changes its word then, and each gives credit (`acked`).
 *
 * K calls over SLOTS slots, any order of halves that the API allows, the same on both ranks; calls are released too.
 *
 *   DISPATCH_SEND  epx__ll_cpu_dispatch_send: slot_free, send_far   (ll_dispatch.c)
 *   DISPATCH_RECV  epx__ll_cpu_dispatch_recv: read_block, spread, tell_taken, epx__ll_net_settle
 *   COMBINE_SEND   epx__ll_cpu_combine_send: can_go_back, send_back (ll_combine.c)
 *   COMBINE_RECV   epx__ll_cpu_combine_recv: combined
 *   Net            the far proxy: lane.c, and the network
 *   at the end     epx__buffer_ll_net_close: drain, bye; then the rank takes nothing more
 *
 * Not here: masks. -DK calls, -DSLOTS, -DWINDOW requests under way, -DRELEASED: no call is combined. T_name: broken
 * twins; T_ll_... are EPX__MUTATE(ll_...) of the C code too. T_plain_word (a word is a plain put) and T_signal (one
 * running count a kind, no word a slot) are twins only.
 */
#ifndef K
#define K 3
#endif
#ifndef SLOTS
#define SLOTS 2
#endif
#ifndef WINDOW
#define WINDOW 4
#endif

#define SEND 0 /* dispatch_send, dispatch_recv, combine_send, combine_recv; a half is 4 * call + which */
#define RECV 1
#define CSEND 2
#define CRECV 3
#define HALVES (4 * K)
#define BACK(n) (128 + (n)) /* tag of call n's outputs */

#define ROWS 0 /* what a request is about: a place, or a word */
#define OUTPUTS 1
#define DISPATCHED 2
#define TAKEN 3
#define COMBINED 4

#ifdef T_signal
#define SLOT(n) 0
#else
#define SLOT(n) ((n) % SLOTS)
#endif
#define PLACE(r, s) ((r) * SLOTS + (s))
#define Q(r, i) ((r) * WINDOW + (i))

byte half[HALVES], halves; /* the programme */
byte out[2 * SLOTS];       /* of rank r, slot s: its piece for the other */
byte rows[2 * SLOTS], back[2 * SLOTS]; /* of rank r: what came from the other */
byte dispatched[2 * SLOTS], taken[2 * SLOTS], combined[2 * SLOTS];
/* Channel of rank r to the other. */
byte what[2 * WINDOW], slot[2 * WINDOW], add[2 * WINDOW];
bit landed[2 * WINDOW];
byte length[2], issued[2], acked[2];
bit left[2];

#ifdef T_plain_word
#define IS_WORD(i) false
#else
#define IS_WORD(i) (what[i] >= DISPATCHED)
#endif

/* The bytes of request i of r's channel reach the other rank. */
inline land(i)
{
    if
    :: what[i] == ROWS -> rows[PLACE(1 - r, slot[i])] = out[PLACE(r, slot[i])]
    :: what[i] == OUTPUTS -> back[PLACE(1 - r, slot[i])] = out[PLACE(r, slot[i])]
    :: what[i] == DISPATCHED -> dispatched[PLACE(1 - r, slot[i])] = dispatched[PLACE(1 - r, slot[i])] + add[i]
    :: what[i] == TAKEN -> taken[PLACE(1 - r, slot[i])] = taken[PLACE(1 - r, slot[i])] + add[i]
    :: what[i] == COMBINED -> combined[PLACE(1 - r, slot[i])] = combined[PLACE(1 - r, slot[i])] + add[i]
    fi;
    landed[i] = 1
}

proctype Net(byte r)
{
    byte i;
end:
    do
    :: d_step { !left[1 - r] && length[r] > 0 && !IS_WORD(Q(r, 0)) && !landed[Q(r, 0)] -> land(Q(r, 0)) }
    :: d_step { !left[1 - r] && length[r] > 1 && !IS_WORD(Q(r, 1)) && !landed[Q(r, 1)] -> land(Q(r, 1)) }
#if WINDOW > 2
    :: d_step { !left[1 - r] && length[r] > 2 && !IS_WORD(Q(r, 2)) && !landed[Q(r, 2)] -> land(Q(r, 2)) }
#endif
#if WINDOW > 3
    :: d_step { !left[1 - r] && length[r] > 3 && !IS_WORD(Q(r, 3)) && !landed[Q(r, 3)] -> land(Q(r, 3)) }
#endif
    :: d_step {
           !left[1 - r] && length[r] > 0 && (IS_WORD(Q(r, 0)) || landed[Q(r, 0)]) ->
           if
           :: IS_WORD(Q(r, 0)) -> land(Q(r, 0))
           :: else
           fi;
           for (i : 0 .. WINDOW - 2) {
               what[Q(r, i)] = what[Q(r, i + 1)]; slot[Q(r, i)] = slot[Q(r, i + 1)];
               add[Q(r, i)] = add[Q(r, i + 1)]; landed[Q(r, i)] = landed[Q(r, i + 1)]
           }
           what[Q(r, WINDOW - 1)] = 0; slot[Q(r, WINDOW - 1)] = 0;
           add[Q(r, WINDOW - 1)] = 0; landed[Q(r, WINDOW - 1)] = 0;
           length[r]--; acked[r]++; i = 0
       }
    od
}

#ifdef T_ll_net_waits_for_gone
#define GONE false
#else
#define GONE left[1 - r]
#endif
#define ROOM(k) (GONE || length[r] + (k) <= WINDOW)
#ifdef T_ll_net_out_reused
#define PIECE_FREE true
#else
#define PIECE_FREE (GONE || acked[r] >= put_at[n % SLOTS])
#endif
#ifdef T_ll_no_credit
#define FREE true
#else
#ifdef T_signal
#define FREE (taken[PLACE(r, 0)] + SLOTS >= n)
#else
#define FREE (taken[PLACE(r, SLOT(n))] + SLOTS >= n)
#endif
#endif

inline push(kind, where, lacks)
{
    if
    :: left[1 - r]
    :: else ->
       what[Q(r, length[r])] = kind; slot[Q(r, length[r])] = where; add[Q(r, length[r])] = lacks;
       length[r]++; issued[r]++
    fi
}

/* What a word lacks to become n: told[] is what was pushed of it. A signal is one more. */
#ifdef T_signal
#define LACKS(kind) 1
#else
#define LACKS(kind) (n - told[((kind) - DISPATCHED) * SLOTS + SLOT(n)])
#endif
inline word(kind)
{
    d_step { push(kind, SLOT(n), LACKS(kind)); told[(kind - DISPATCHED) * SLOTS + SLOT(n)] = n }
}

inline data(kind, tag)
{
    d_step { out[PLACE(r, n % SLOTS)] = tag; push(kind, n % SLOTS, 0); put_at[n % SLOTS] = issued[r] }
}

inline tell_taken()
{
#ifdef T_ll_net_word_lost
    if
    :: ROOM(1) -> word(TAKEN)
    :: else -> told[(TAKEN - DISPATCHED) * SLOTS + SLOT(n)] = n
    fi
#else
    (ROOM(1)); word(TAKEN)
#endif
}

proctype Rank(byte r)
{
    byte at, n;
    byte told[3 * SLOTS], put_at[SLOTS];
    do
    :: at == halves -> break
    :: at < halves ->
       n = half[at] / 4;
       if
       :: half[at] % 4 == SEND ->
          (FREE && PIECE_FREE && ROOM(2));
#ifdef T_ll_net_word_first
          word(DISPATCHED); data(ROWS, n)
#else
          data(ROWS, n); word(DISPATCHED)
#endif
       :: half[at] % 4 == RECV ->
          (dispatched[PLACE(r, SLOT(n))] >= n);
#ifdef T_ll_taken_first
          tell_taken();
          assert(rows[PLACE(r, n % SLOTS)] == n)
#else
          assert(rows[PLACE(r, n % SLOTS)] == n);
          tell_taken()
#endif
       :: half[at] % 4 == CSEND ->
          (PIECE_FREE && ROOM(2));
#ifdef T_ll_net_word_first
          word(COMBINED); data(OUTPUTS, BACK(n))
#else
          data(OUTPUTS, BACK(n)); word(COMBINED)
#endif
       :: else ->
          (combined[PLACE(r, SLOT(n))] >= n);
          assert(back[PLACE(r, n % SLOTS)] == BACK(n))
       fi;
       skip;
       d_step { at++; n = 0 }
    od;
    (length[r] == 0 || left[1 - r]); /* drain, bye */
    left[r] = 1
}

/* Any programme, as in ll.pml. */
#define MAY(c) (c <= begun && next[c] < 4)
#define ANY (MAY(1) || MAY(2) || MAY(3) || MAY(4))
init {
    byte begun, n;
    byte next[6];
    atomic {
        do
        :: begun < K && (begun < SLOTS || next[begun + 1 - SLOTS] == 4) ->
           begun++; half[halves] = 4 * begun + SEND; halves++; next[begun] = RECV
        :: ANY ->
           if
           :: MAY(1) -> n = 1
           :: MAY(2) -> n = 2
           :: MAY(3) -> n = 3
           :: MAY(4) -> n = 4
           fi;
           half[halves] = 4 * n + next[n]; halves++;
           if
           :: next[n] == RECV -> next[n] = 4 /* released */
#ifndef RELEASED
           :: next[n]++
#endif
           fi
        :: begun == K && !ANY -> break
        od;
        for (n : 1 .. K) { next[n] = 0 }
        begun = 0; n = 0;
        run Net(0); run Net(1); run Rank(0); run Rank(1)
    }
}
