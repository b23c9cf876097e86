/*
 * Rows past the rings between two domains of one rank (docs/PROTOCOL-NET.md, "Straight"), as rail_straight.c and
 * rail_rows.c build it. The port channel is taken as tests/model/port.pml proves it: a put reads its source and lands at
 * any time before the signal that follows it is applied, signals are applied in order, and `applied` follows.
 *
 *   Source   epx__ht_rails_mail (hear), epx__rail_put_x, epx__rail_put_from, epx__rail_let_go, then the caller again
 *   Target   epx__rail_rows_fill (post), epx__rail_look, then the caller again
 *   Net      the proxies and the network
 *
 * Each of K halves moves one chunk of ROWS rows from the caller's memory `x` into the lease that the target publishes.
 * The caller poisons x as soon as the half has ended at the source, the lease as soon as it has read it.
 * T_name broken twins; they are EPX__MUTATE(name) in the C code too, but for T_place_early
 */
#ifndef K
#define K 3
#endif
#define ROWS 2
#define POISON 99

byte x[ROWS], lease[ROWS];
byte place;            /* the last half whose place the target has published (its message) */
byte pushed, applied;  /* halves whose chunk was pushed at the source, applied at the target */
byte told;             /* of those, known as applied at the source */
bool put_open[ROWS];   /* pushed and not landed */
bool signal_open;      /* pushed and not applied */
byte behind;           /* puts that were pushed before the signal */
byte done;

/* Puts land in any order; a signal is applied when the puts pushed before it have landed; then the source is told. */
proctype Net()
{
end:
    do
    :: atomic { put_open[0] -> lease[0] = x[0]; put_open[0] = false; if :: behind > 0 -> behind-- :: else fi }
    :: atomic { put_open[ROWS - 1] -> lease[ROWS - 1] = x[ROWS - 1]; put_open[ROWS - 1] = false; if :: behind > 0 -> behind-- :: else fi }
    :: atomic { signal_open && behind == 0 -> signal_open = false; applied++ }
    :: atomic { told < applied && !put_open[0] && !put_open[ROWS - 1] -> told++ }
    od
}

inline push_puts()
{
    put_open[0] = true; put_open[ROWS - 1] = true
}

proctype Source()
{
    byte n = 1;
    do
    :: n > K -> break
    :: else ->
        atomic { x[0] = n; x[ROWS - 1] = n }
#ifndef T_place_early
        place >= n; /* its message of this half */
#endif
#ifdef T_rail_x_late
        atomic { signal_open = true; behind = 0; pushed++ }
        atomic { push_puts() }
#else
        atomic { push_puts(); behind = 2 }
        atomic { signal_open = true; pushed++ }
#endif
#ifndef T_rail_let_go_early
        told >= n;
#endif
        atomic { x[0] = POISON; x[ROWS - 1] = POISON } /* the caller's again */
        n++
    od;
    done++
}

proctype Target()
{
    byte n = 1;
    do
    :: n > K -> break
    :: else ->
        place = n;
        applied >= n;
        assert(lease[0] == n && lease[ROWS - 1] == n);
        atomic { lease[0] = POISON; lease[ROWS - 1] = POISON } /* the caller's again: what it holds now stays */
        n++
    od;
    done++
}

init
{
    atomic { run Net(); run Source(); run Target() };
    done == 2;
    assert(lease[0] == POISON && lease[ROWS - 1] == POISON)
}
