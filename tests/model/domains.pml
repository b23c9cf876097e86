/*
 * The hand-over between two domains, as src/algo/ht/cpu/rail*.c build it (docs/PROTOCOL-NET.md): one sender S in one
 * domain, its rail R and R's neighbour M in the other. The port channel is taken as tests/model/port.pml proves it: puts
 * land at any time before their signal, signals are applied in order. Here a put lands as soon as it is pushed, which is
 * the worst for whoever still reads what lay there.
 *
 *   S, R    epx__ht_rails_mail (post, hear)                       (rail.c)
 *   S       epx__rail_room, send_step, epx__rail_put              (rail.c, rail_rows.c)
 *   R       arrive_step, free_step, epx__rail_free                (rail_rows.c, rail.c)
 *   R, M    mail among the domain (half.c), pull_step             (rail_rows.c)
 *
 * Halves 2, 3 (and 6, 7) move NR rows from S, wanted by both R and M, through a ring of CELLS rows that odd halves cut into
 * single rows and even halves into one slot of all; the others are mail alone. -DK halves -DINBOX slots of an inbox
 * T_name broken twins; rail_* are EPX__MUTATE(rail_*) in the C code too
 */
#ifndef K
#define K 4
#endif
#ifndef NR
#define NR 3
#endif
#ifndef CELLS
#define CELLS 2
#endif
#ifndef INBOX
#define INBOX 4
#endif
#define PER(n) ((n) & 1 -> 1 : CELLS)  /* rows of a chunk */
#define SLOTS(n) ((n) & 1 -> CELLS : 1)
#define ROWS(n) ((n) & 2 -> NR : 0)
#define CHUNKS(n) (((n) & 2) == 0 -> 0 : ((n) & 1 -> NR : (NR + CELLS - 1) / CELLS))
#define CELL(n, k) ((((k) / PER(n)) % SLOTS(n)) * PER(n) + (k) % PER(n))
#define TAG(n, k) (8 * (n) + (k))
#define END(n, c) ((c) * PER(n) < ROWS(n) -> (c) * PER(n) : ROWS(n)) /* rows in the first c chunks */

/* Network: what lies at the target, and signals under way and applied. */
byte inbox_r[INBOX], inbox_s[INBOX];
byte said_s, said_r, heard_s, heard_r; /* message signals pushed, applied: by S at R, by R at S */
byte ring[CELLS];
byte chunks_put, chunks_in; /* data signals: pushed by S, applied at R */
byte freed_put, freed_in;   /* credit: pushed by R, applied at S */
/* The domain of R and M. */
byte mail_rm[2], mail_mr[2], consumed_rm, consumed_mr; /* consumed_xy: y has read x's mail */
byte arrived;                                          /* rows ever, written by R */
byte taken_r, taken_m;                                 /* rows ever, written by R, M */
byte done;

proctype Net()
{
end:
    do
    :: atomic { heard_s < said_s -> heard_s++ }
    :: atomic { heard_r < said_r -> heard_r++ }
    :: atomic { chunks_in < chunks_put -> chunks_in++ }
    :: atomic { freed_in < freed_put -> freed_in++ }
    od
}

#ifdef T_rail_no_credit
#define CREDIT true
#else
#define CREDIT (chunks_put - freed_in < SLOTS(n))
#endif

proctype S()
{
    byte n, k;
    for (n : 1 .. K) {
        inbox_r[n % INBOX] = n;
        said_s++;
        (heard_r >= n);
        assert(inbox_s[n % INBOX] == n);
        k = 0;
        do
        :: k == ROWS(n) -> break
        :: k < ROWS(n) && (k % PER(n) != 0 || CREDIT) ->
            ring[CELL(n, k)] = TAG(n, k);
            k++;
            if
            :: k == ROWS(n) || k % PER(n) == 0 -> chunks_put++
            :: else
            fi
        od;
        k = 0
    }
    n = 0;
    done++
}

#define BASE(n) (NR * (((n) / 4) * 2 + ((n) % 4 > 2 -> 1 : 0)))

/* One rank's copying: row `next` of this half, as far as they have arrived. */
inline pull(n, next, taken)
{
#ifdef T_rail_taken_first
    taken = BASE(n) + next + 1;
    assert(ring[CELL(n, next)] == TAG(n, next));
    next++
#else
    assert(ring[CELL(n, next)] == TAG(n, next));
    next++;
    taken = BASE(n) + next
#endif
}

#ifdef T_end_before_taken
#define ALL_GONE true
#else
#define ALL_GONE (gone == CHUNKS(n))
#endif

proctype R()
{
    byte n, next, base, gone, rows;
    bool posted, read;
    for (n : 1 .. K) {
        inbox_s[n % INBOX] = n;
        said_r++;
        (heard_s >= n);
        posted = false; read = false; next = 0; gone = 0;
        do
        :: !posted && consumed_rm + 2 >= n -> mail_rm[n & 1] = n; posted = true
        :: !read && mail_mr[n & 1] >= n -> assert(mail_mr[n & 1] == n); consumed_mr = n; read = true
        /* arrive */
        :: arrived < BASE(n) + END(n, chunks_in - base) -> arrived = BASE(n) + END(n, chunks_in - base)
#ifdef T_rail_sum_early
        :: arrived < BASE(n) + END(n, chunks_put - base) -> arrived = BASE(n) + END(n, chunks_put - base) + (chunks_put - base < CHUNKS(n))
#endif
        /* pull */
        :: next < ROWS(n) && arrived > BASE(n) + next -> pull(n, next, taken_r)
        /* free */
        :: gone < CHUNKS(n) && taken_r >= BASE(n) + END(n, gone + 1) && taken_m >= BASE(n) + END(n, gone + 1) ->
            gone++;
            freed_put++
        :: posted && read && next == ROWS(n) && ALL_GONE -> break
        od;
        base = base + CHUNKS(n)
    }
    n = 0; next = 0; base = 0; gone = 0; posted = 0; read = 0;
    done++
}

proctype M()
{
    byte n, next;
    bool posted, read;
    for (n : 1 .. K) {
        posted = false; read = false; next = 0;
        do
        :: !posted && consumed_mr + 2 >= n -> mail_mr[n & 1] = n; posted = true
        :: !read && mail_rm[n & 1] >= n ->
            assert(mail_rm[n & 1] == n);
            assert(inbox_r[n % INBOX] == n); /* the rail's message, read in R's window */
            consumed_rm = n;
            read = true
        :: read && next < ROWS(n) && arrived > BASE(n) + next -> pull(n, next, taken_m)
        :: posted && read && next == ROWS(n) -> break
        od
    }
    n = 0; next = 0; posted = 0; read = 0;
    done++
}

init
{
    atomic {
        run Net();
        run S();
        run R();
        run M()
    }
    (done == 3)
}
