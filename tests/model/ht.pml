/*
 * HT inside one domain, as src/algo/ht/cpu builds it (docs/PROTOCOL-HT.md). Every access to shared memory is a step of
 * its own; memory is sequentially consistent (release and acquire are taken to be right, TSan looks at them).
 *
 * K halves, each one mail to and from every peer, then the half's work. What a half is (kind) all ranks share; where a
 * rank wants its rows (a lease: direct; its own memory: through rings) and where its expert outputs lie (a lease: read
 * in place; elsewhere: staged in rings) every rank chooses by itself, each time anew.
 *
 *   Rank        epx__half_run, run, step                      (half.c)
 *   POST, HEAR  post_mail, read_mail                          (half.c)
 *   SEND        pass_step and pass_end (direct), ring_step    (rows.c)
 *   DRAIN       drain_step                                    (rows.c)
 *   SUM         sum_step: token_ready, sum_part, tell_read    (combine.c)
 *   STAGE       stage_step                                    (combine.c)
 *   ENDED       the DONE of work                              (rows.c, combine.c)
 *   fail        epx__half_fail, tell_peer                     (half.c)
 *
 * -DN ranks, -DK halves, -DNR rows of each (source, destination) that has rows, -DRING rows of a ring
 * -DPROG=1..  the kinds are fixed (see init), else all programmes; -DROUTE fixed, else all
 * -DFAIL=r    rank r's deadline may pass at any moment; its caller then overwrites x at once
 * -DCOARSE    an event of a rank is one step (for three ranks)
 * -DMISM      rank 1's second half is of another kind: it must be reported by somebody, and nobody may hang
 * T_name      broken twins; each is also an EPX__MUTATE(name) in the C code
 */
#ifndef N
#define N 2
#endif
#ifndef K
#define K 3
#endif
#ifndef NR
#define NR 2
#endif
#ifndef RING
#define RING 1
#endif

#define MAIL 1 /* begin, barrier: nothing but mail */
#define ROWS 2
#define COMBINE 3
#define JUNK 255
#define ROWTAG(n, j) (16 * (n) + (j) + 1)
#define XTAG(n, j) (16 * (n) + 8 + (j))

#define AT(a, b) ((a) * N + (b))
#ifdef T_one_deep_mailbox
#define SLOT(n) 0
#else
#define SLOT(n) ((n) & 1)
#endif
#define BOX(s, d, n) (AT(s, d) * 2 + SLOT(n))
#define CELL(r, p, c) (AT(r, p) * RING + (c))
#define LEASE(r, p, j) (AT(r, p) * NR + (j))

/* Who sends to whom, and so whose rows come back: 0 all, 1 to rank 0 only, 2 from rank 0 only. */
byte route;
#define HAS(s, d) (route == 0 || (route == 1 && (d) == 0) || (route == 2 && (s) == 0))
#define COUNT(s, d) (HAS(s, d) -> NR : 0)

byte kind_of[K + 1];

/* Mailboxes of s at d, two deep. */
byte box_seq[N * N * 2], box_val[N * N * 2], box_kind[N * N * 2], box_direct[N * N * 2];
/* Words: [writer, reader]. */
byte consumed[N * N], sent[N * N], taken[N * N], staged[N * N], read_[N * N];
bool alarmed[N];
/* The windows: leases by source, rings by peer. */
byte lease[N * N * NR], ring[N * N * RING];
/* Ghosts: the half that has opened r's lease to writers; a row was read that is not the right one. */
byte open_to[N];
bool bad[N];
byte reported, ended;

#ifdef COARSE /* an event is one step: what lies between its two accesses is looked at with two ranks */
#define EVENT :: atomic {
#define TNEVE }
#else
#define EVENT ::
#define TNEVE
#endif

#define POST(p) EVENT p != r && !posted[p] && CONSUMED(p) -> MAIL_FIRST(p); MAIL_SECOND(p); posted[p] = 1 TNEVE
#if defined(T_no_consumed)
#define CONSUMED(p) true
#elif defined(T_consumed_equal)
#define CONSUMED(p) (n < 3 || consumed[AT(p, r)] + 2 == n)
#else
#define CONSUMED(p) (consumed[AT(p, r)] + 2 >= n)
#endif
#define MAIL_BODY(p) d_step { box_val[BOX(r, p, n)] = n; box_kind[BOX(r, p, n)] = kind; box_direct[BOX(r, p, n)] = direct }
#define MAIL_SEQUENCE(p) box_seq[BOX(r, p, n)] = n
#if defined(T_sequence_first) || defined(WORDS)
#define MAIL_FIRST(p) MAIL_SEQUENCE(p)
#define MAIL_SECOND(p) MAIL_BODY(p)
#else
#define MAIL_FIRST(p) MAIL_BODY(p)
#define MAIL_SECOND(p) MAIL_SEQUENCE(p)
#endif

#ifdef T_stale_mail
#define ARRIVED(p) (box_seq[BOX(p, r, n)] + 2 >= n && box_seq[BOX(p, r, n)] > 0)
#elif defined(WORDS) /* packets and counts on GPUs: nothing orders them, each word says itself that it has come */
#define ARRIVED(p) (box_seq[BOX(p, r, n)] >= n && box_val[BOX(p, r, n)] == n)
#else
#define ARRIVED(p) (box_seq[BOX(p, r, n)] >= n)
#endif
#define READ_BOX(p) d_step { \
    assert(box_val[BOX(p, r, n)] == n); \
    far_direct[p] = box_direct[BOX(p, r, n)]; far_kind = box_kind[BOX(p, r, n)] }
#ifdef T_no_kind_check
#define CHECK_KIND skip
#else
#define CHECK_KIND if :: far_kind != kind -> reported++; goto fail :: else fi
#endif
#ifdef T_consumed_first
#define HEAR(p) EVENT p != r && !heard[p] && ARRIVED(p) -> consumed[AT(r, p)] = n; READ_BOX(p); CHECK_KIND; heard[p] = 1 TNEVE
#else
#define HEAR(p) EVENT p != r && !heard[p] && ARRIVED(p) -> READ_BOX(p); CHECK_KIND; heard[p] = 1; consumed[AT(r, p)] = n TNEVE
#endif

/* Rows to p: direct to the final row, or to the ring, as far as the credit goes. */
#ifdef T_no_credit
#define CREDIT(p) true
#else
#define CREDIT(p) (far_direct[p] || sent[AT(r, p)] - taken[AT(p, r)] < RING)
#endif
#ifdef FAIL
#define OPEN(p) true
#else
#define OPEN(p) (open_to[p] == n)
#endif
#define PUT_ROW(p) d_step { \
    if :: far_direct[p] -> assert(OPEN(p)); lease[LEASE(p, r, out[p])] = ROWTAG(n, out[p]) \
       :: else -> assert(ring[CELL(p, r, out[p] % RING)] == 0); ring[CELL(p, r, out[p] % RING)] = ROWTAG(n, out[p]) fi }
#define PUT_SENT(p) sent[AT(r, p)] = sent[AT(r, p)] + 1
#ifdef T_sent_first
#define SEND(p) EVENT kind == ROWS && p != r && heard[p] && out[p] < COUNT(r, p) && CREDIT(p) -> PUT_SENT(p); PUT_ROW(p); out[p]++ TNEVE
#else
#define SEND(p) EVENT kind == ROWS && p != r && heard[p] && out[p] < COUNT(r, p) && CREDIT(p) -> PUT_ROW(p); PUT_SENT(p); out[p]++ TNEVE
#endif

/* Rows from p: seen in the lease, or copied out of the ring. `in_` counts this half's, `got` all there ever were. */
#define COPY_OUT(p) d_step { \
    if :: direct -> skip \
       :: else -> assert(ring[CELL(r, p, in_[p] % RING)] == ROWTAG(n, in_[p])); ring[CELL(r, p, in_[p] % RING)] = 0 fi }
#ifdef T_taken_direct_missing
#define TELL_TAKEN(p) if :: !direct -> taken[AT(r, p)] = got[p] :: else fi
#else
#define TELL_TAKEN(p) taken[AT(r, p)] = got[p]
#endif
#ifdef T_taken_first
#define DRAIN(p) EVENT kind == ROWS && p != r && in_[p] < COUNT(p, r) && sent[AT(p, r)] > got[p] -> got[p]++; TELL_TAKEN(p); COPY_OUT(p); in_[p]++ TNEVE
#else
#define DRAIN(p) EVENT kind == ROWS && p != r && in_[p] < COUNT(p, r) && sent[AT(p, r)] > got[p] -> COPY_OUT(p); got[p]++; TELL_TAKEN(p); in_[p]++ TNEVE
#endif

/* As owner: token t needs row t of every rank that has rows of mine. */
#define THERE(p) (p == r || !HAS(r, p) || (heard[p] && (far_direct[p] || staged[AT(p, r)] > read_[AT(r, p)])))
#define FETCH(p) if :: p != r && HAS(r, p) -> d_step { \
    if :: far_direct[p] -> if :: lease[LEASE(p, r, token)] != XTAG(n, token) -> bad[r] = 1 :: else fi \
       :: else -> if :: ring[CELL(p, r, token % RING)] != XTAG(n, token) -> bad[r] = 1 :: else fi; \
                  ring[CELL(p, r, token % RING)] = 0 fi } :: else fi
#define TELL_READ(p) if :: p != r && HAS(r, p) -> read_[AT(r, p)] = read_[AT(r, p)] + 1 :: else fi
#if N == 2
#define ALL_THERE (THERE(0) && THERE(1))
#define FETCH_ALL FETCH(0); FETCH(1)
#define TELL_ALL TELL_READ(0); TELL_READ(1)
#define TOKENS ((HAS(r, 0) || HAS(r, 1)) -> NR : 0)
#else
#define ALL_THERE (THERE(0) && THERE(1) && THERE(2))
#define FETCH_ALL FETCH(0); FETCH(1); FETCH(2)
#define TELL_ALL TELL_READ(0); TELL_READ(1); TELL_READ(2)
#define TOKENS ((HAS(r, 0) || HAS(r, 1) || HAS(r, 2)) -> NR : 0)
#endif
#ifdef T_read_first
#define SUM EVENT kind == COMBINE && token < TOKENS && ALL_THERE -> TELL_ALL; FETCH_ALL; token++ TNEVE
#else
#define SUM EVENT kind == COMBINE && token < TOKENS && ALL_THERE -> FETCH_ALL; TELL_ALL; token++ TNEVE
#endif

/* As expert rank: rows for p into p's ring, as far as p has read. */
#ifdef T_stage_no_credit
#define ROOM(p) true
#else
#define ROOM(p) (staged[AT(r, p)] - read_[AT(p, r)] < RING)
#endif
#define FEED(p) d_step { assert(ring[CELL(r, p, out[p] % RING)] == 0); ring[CELL(r, p, out[p] % RING)] = XTAG(n, out[p]) }
#define TELL_STAGED(p) staged[AT(r, p)] = staged[AT(r, p)] + 1
#ifdef T_staged_first
#define STAGE(p) EVENT kind == COMBINE && !direct && p != r && out[p] < COUNT(p, r) && ROOM(p) -> TELL_STAGED(p); FEED(p); out[p]++ TNEVE
#else
#define STAGE(p) EVENT kind == COMBINE && !direct && p != r && out[p] < COUNT(p, r) && ROOM(p) -> FEED(p); TELL_STAGED(p); out[p]++ TNEVE
#endif

#define MAILED(p) (p == r || (posted[p] && heard[p]))
#ifdef T_end_before_received
#define RECEIVED(p) true
#else
#define RECEIVED(p) (in_[p] == COUNT(p, r))
#endif
#ifdef T_x_reused_early
#define ALL_READ(p) (direct || out[p] == COUNT(p, r))
#else
#define ALL_READ(p) (read_[AT(p, r)] == lent[p])
#endif
#define ENDED(p) (MAILED(p) && (p == r || kind == MAIL || (kind == ROWS && out[p] == COUNT(r, p) && RECEIVED(p)) || \
                  (kind == COMBINE && token == TOKENS && ALL_READ(p))))
#if N == 2
#define ALL_ENDED (ENDED(0) && ENDED(1))
#define EVENTS POST(0) POST(1) HEAR(0) HEAR(1) SEND(0) SEND(1) DRAIN(0) DRAIN(1) SUM STAGE(0) STAGE(1)
#else
#define ALL_ENDED (ENDED(0) && ENDED(1) && ENDED(2))
#define EVENTS POST(0) POST(1) POST(2) HEAR(0) HEAR(1) HEAR(2) SEND(0) SEND(1) SEND(2) DRAIN(0) DRAIN(1) DRAIN(2) \
    SUM STAGE(0) STAGE(1) STAGE(2)
#endif

proctype Rank(byte r)
{
    byte n = 1, kind, far_kind, i, j, token;
    bool direct, posted[N], heard[N], far_direct[N];
    byte out[N], in_[N], got[N], lent[N];

    do
    :: n > K -> break
    :: n <= K ->
       /* The caller: a lease is empty and poisoned, or holds x. Local until the mail says so. */
       atomic {
           kind = kind_of[n];
#ifdef MISM
           if :: r == 1 && n == 2 -> kind = (kind == MAIL -> ROWS : MAIL) :: else fi;
#endif
           if :: kind != MAIL -> if :: direct = 1 :: direct = 0 fi :: else -> direct = 0 fi;
           skip;
           d_step {
               i = 0;
               for (i : 0 .. N - 1) {
                   posted[i] = 0; heard[i] = 0; out[i] = 0; in_[i] = 0; far_direct[i] = 0;
                   if :: kind == COMBINE && i != r -> lent[i] = lent[i] + COUNT(i, r) :: else fi;
                   for (j : 0 .. NR - 1) {
                       lease[LEASE(r, i, j)] = (kind == COMBINE && direct && HAS(i, r) -> XTAG(n, j) : 0) } }
               if :: kind == ROWS && direct -> open_to[r] = n :: else fi;
               i = 0; j = 0; token = 0 } }
#ifndef T_staged_direct_missing
       /* Read in place: all rows count as staged, so that `staged` and `read` stay in step (lend, combine.c). */
       if :: kind == COMBINE && direct ->
             for (i : 0 .. N - 1) {
                 if :: i != r && HAS(i, r) -> staged[AT(r, i)] = staged[AT(r, i)] + NR :: else fi }
             i = 0
          :: else fi;
#endif
       do
       :: ALL_ENDED -> break
       EVENTS
#ifdef FAIL
       :: alarmed[r] -> goto fail
       :: r == FAIL -> goto fail
#endif
#ifdef MISM
       :: alarmed[r] -> goto fail
#endif
       od;
#if defined(FAIL) && !defined(T_no_last_look)
       if :: alarmed[r] -> goto fail :: else fi;
#endif
       /* Success is reported: everything must be there, and be right. */
       skip;
       d_step {
           assert(!bad[r]);
           open_to[r] = 0;
           if :: kind == ROWS && direct ->
                 for (i : 0 .. N - 1) { for (j : 0 .. NR - 1) {
                     assert(i == r || !HAS(i, r) || lease[LEASE(r, i, j)] == ROWTAG(n, j)) } }
              :: else fi;
           /* The caller gives the lease back, or writes over x at once. */
           for (i : 0 .. N - 1) { for (j : 0 .. NR - 1) { lease[LEASE(r, i, j)] = JUNK } }
           i = 0; j = 0; kind = 0; far_kind = 0; token = 0; n++ }
    od;
    goto out_;
fail:
    i = 0;
    do
    :: i < N -> alarmed[i] = 1; i++
    :: else -> break
    od;
    skip;
    d_step { /* the call has returned an error: x is the caller's again */
        i = 0;
        for (i : 0 .. N - 1) { for (j : 0 .. NR - 1) { lease[LEASE(r, i, j)] = JUNK } } i = 0; j = 0 }
out_:
    ended++
}

#ifdef MISM
/* When all have ended, somebody has named the mismatch. */
proctype Judge() { (ended == N) -> assert(reported > 0) }
#endif

init {
    byte i;
    atomic {
#ifdef ROUTE
        route = ROUTE;
#else
        if :: route = 0 :: route = 1 :: route = 2 fi;
#endif
        for (i : 1 .. K) {
#ifndef PROG
            if :: kind_of[i] = MAIL :: kind_of[i] = ROWS :: kind_of[i] = COMBINE fi
#elif PROG == 1 /* dispatch, combine, dispatch, ... */
            kind_of[i] = (i % 3 == 1 -> MAIL : (i % 3 == 2 -> ROWS : COMBINE))
#elif PROG == 2 /* rows, combine, rows, combine */
            kind_of[i] = (i % 2 == 1 -> ROWS : COMBINE)
#elif PROG == 3
            kind_of[i] = ROWS
#elif PROG == 4
            kind_of[i] = COMBINE
#elif PROG == 5
            kind_of[i] = MAIL
#endif
        }
        for (i : 0 .. N - 1) { run Rank(i) }
#ifdef MISM
        run Judge();
#endif
        i = 0
    }
}
