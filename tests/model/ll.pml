/*
 * Low latency (docs/PROTOCOL-LL.md, src/algo/ll/cpu). Every access to shared memory is a step of its own; memory is
 * sequentially consistent.
 *
 * K calls over a ring of SLOTS slots. All ranks make the same halves in the same order; the order is any in which calls
 * begin by number, a slot is owned by one call at a time, and a call is combined, or released after its receive half or
 * its outputs' send half.
 *
 *   DISPATCH_SEND  epx__ll_cpu_dispatch_send: await_unread, slot_free, send_to   (ll_dispatch.c)
 *   DISPATCH_RECV  epx__ll_cpu_dispatch_recv: read_block, spread, tell_taken
 *   COMBINE_SEND   epx__ll_cpu_combine_send                        (ll_combine.c)
 *   COMBINE_RECV   epx__ll_cpu_combine_recv: combined
 *
 * Not here: masks. -DN ranks, -DK calls, -DSLOTS, -DCOARSE (a place and its word are one step; for three ranks).
 * T_name: broken twins, each also an EPX__MUTATE(ll_name); T_one_word, one word for all slots, is a twin only.
 */
#ifndef N
#define N 2
#endif
#ifndef K
#define K 4
#endif
#ifndef SLOTS
#define SLOTS 2
#endif

#define SEND 0 /* dispatch_send, dispatch_recv, combine_send, combine_recv; a half is 4 * call + which */
#define RECV 1
#define CSEND 2
#define CRECV 3
#define HALVES (4 * K)
#define BACK(n) (128 + (n)) /* tag of call n's outputs */

#ifdef T_one_word
#define WORD(n) 0
#else
#define WORD(n) ((n) % SLOTS)
#endif
#define AT(a, b, s) (((a) * N + (b)) * SLOTS + (s)) /* written by a, in b's window */
#define UP(word, n) word = (word > (n) -> word : (n)) /* words only grow */

byte half[HALVES], halves; /* the programme */
bit unread[K + 1];         /* that call is released between the halves of combine */
byte rows[N * N * SLOTS], back[N * N * SLOTS];
byte dispatched[N * N * SLOTS], taken[N * N * SLOTS], combined[N * N * SLOTS];

#ifdef COARSE
#define BEGIN_ atomic {
#define END_ }
#else
#define BEGIN_
#define END_
#endif

#ifdef T_ll_no_credit
#define FREE(p) true
#else
#define FREE(p) (taken[AT(p, r, WORD(n))] + SLOTS >= n)
#endif
#ifdef T_ll_no_combined
#define OUTPUTS(p) true
#else
#define OUTPUTS(p) (combined[AT(p, r, WORD(n))] >= n)
#endif

proctype Rank(byte r)
{
    byte at, n, p;
    do
    :: at == halves -> break
    :: at < halves ->
       n = half[at] / 4;
       if
       :: half[at] % 4 == SEND ->
          if
          :: n > SLOTS && unread[n - SLOTS] ->
             for (p : 0 .. N - 1) { if :: p != r -> (combined[AT(p, r, WORD(n))] + SLOTS >= n) :: else fi }
          :: else
          fi;
          for (p : 0 .. N - 1) { if :: p != r ->
              (FREE(p));
              BEGIN_
#ifdef T_ll_flag_first
              UP(dispatched[AT(r, p, WORD(n))], n); rows[AT(r, p, n % SLOTS)] = n
#else
              rows[AT(r, p, n % SLOTS)] = n; UP(dispatched[AT(r, p, WORD(n))], n)
#endif
              END_
              :: else fi }
       :: half[at] % 4 == RECV ->
          for (p : 0 .. N - 1) { if :: p != r -> (dispatched[AT(p, r, WORD(n))] >= n) :: else fi }
#ifdef T_ll_taken_first
          for (p : 0 .. N - 1) { if :: p != r -> UP(taken[AT(r, p, WORD(n))], n) :: else fi }
#endif
          for (p : 0 .. N - 1) { if :: p != r -> assert(rows[AT(p, r, n % SLOTS)] == n) :: else fi }
          for (p : 0 .. N - 1) { if :: p != r -> UP(taken[AT(r, p, WORD(n))], n) :: else fi }
       :: half[at] % 4 == CSEND ->
          for (p : 0 .. N - 1) { if :: p != r ->
              BEGIN_
#ifdef T_ll_combined_first
              UP(combined[AT(r, p, WORD(n))], n); back[AT(r, p, n % SLOTS)] = BACK(n)
#else
              back[AT(r, p, n % SLOTS)] = BACK(n); UP(combined[AT(r, p, WORD(n))], n)
#endif
              END_
              :: else fi }
       :: else ->
          for (p : 0 .. N - 1) { if :: p != r -> (OUTPUTS(p)) :: else fi }
          for (p : 0 .. N - 1) { if :: p != r -> assert(back[AT(p, r, n % SLOTS)] == BACK(n)) :: else fi }
       fi;
       skip;
       d_step { at++; n = 0; p = 0 }
    od
}

/* Any programme: begun is the last call sent; next[n] is what call n does next (4: over). Each turn adds one half. */
#define MAY(c) (c <= begun && next[c] < 4)
#define ANY (MAY(1) || MAY(2) || MAY(3) || MAY(4))
init {
    byte begun, n, r;
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
           :: next[n] == CSEND -> next[n] = 4; unread[n] = 1
           :: next[n]++
           fi
        :: begun == K && !ANY -> break
        od;
        for (n : 1 .. K) { next[n] = 0 }
        begun = 0; n = 0;
        for (r : 0 .. N - 1) { run Rank(r) }
        r = 0
    }
}
