/*
 * Low latency: the places where outputs come home, in one slot (docs/PROTOCOL-LL.md, "Masks"). From call to call a place
 * is another rank's. Rank 0 owns it and makes K calls; ranks 1 and 2 return outputs, as late as they like and without
 * waiting for each other (they have masked each other). Memory is sequentially consistent.
 *
 *   Owner   dispatch: await_unread and slot_settled (ll_dispatch.c), await_ranks and settle (ll_send.cuh), far_settle
 *           (ll_far.cuh); combine: who is given up owes; released after its send half, all who were asked do
 *   Writer  dispatch_recv: `taken`; combine: a row and its flag, then `combined`, or `left_out`, which is the same here
 *
 * T_name: broken twins; T_ll_no_unread is an EPX__MUTATE too. T_turns: only the turn of the rank that owes waits.
 */
#ifndef K
#define K 3
#endif
#define AT(r, n) ((r) * (K + 1) + (n))

byte whose[K + 1];                     /* whose place it is in that call */
byte told[3 * (K + 1)];                /* 1: ids went to that rank, 2: it is masked in that call */
byte row, flag, taken[3], combined[3]; /* the number of the call */

proctype Writer(byte r)
{
    byte n;
    for (n : 1 .. K) {
        (told[AT(r, n)] != 0);
        if
        :: told[AT(r, n)] == 1 ->
           taken[r] = n;
           if
           :: whose[n] == r -> row = n; flag = n
           :: else
           fi
        :: else -> taken[r] = n
        fi;
        combined[r] = n
    }
}

#define SETTLED(r) (owed[r] == 0 || combined[r] >= owed[r])

/* Ids to rank r, or it is masked. */
inline serve(r)
{
#ifdef T_turns
    (SETTLED(r));
#endif
    if
    :: (taken[r] + 1 >= n) -> told[AT(r, n)] = 1
    :: told[AT(r, n)] = 2
    fi
}

proctype Owner()
{
    byte n, p, owed[3];
    for (n : 1 .. K) {
        /* dispatch */
#ifndef T_turns
        (SETTLED(1));
        (SETTLED(2));
#endif
#ifndef T_turns
        d_step { owed[1] = 0; owed[2] = 0 }
#endif
        if
        :: serve(1); serve(2)
        :: serve(2); serve(1)
        fi;
        /* combine */
        p = whose[n];
        if
        :: told[AT(p, n)] == 1 ->
           (flag >= n);
           assert(row == n);
           assert(row == n) /* another piece */
        :: told[AT(p, n)] == 1 -> /* given up */
#ifndef T_no_owed
           owed[p] = n
#endif
        :: true -> /* released */
#ifndef T_ll_no_unread
           for (p : 1 .. 2) { if :: told[AT(p, n)] == 1 -> owed[p] = n :: else fi }
#endif
        :: told[AT(p, n)] == 2 -> skip
        fi
    }
}

init {
    byte n;
    atomic {
        for (n : 1 .. K) {
            if
            :: whose[n] = 1
            :: whose[n] = 2
            fi
        }
        run Owner();
        run Writer(1);
        run Writer(2)
    }
}
