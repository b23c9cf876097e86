/*
 * Low latency on GPUs, with flags, masking by deadline: a row is in for all pieces of its token, or for none
 * (docs/PROTOCOL-LL.md; src/algo/ll/cuda: agree_on_shares, agree_on_row, ll_decide). One token, PIECES pieces, two ranks
 * that send a row each, K calls in the same slot. Memory is sequentially consistent.
 *
 * The token has three choices: 0 and 1 have the row of rank 0 (by rank), 2 that of rank 1. A piece looks for the flag of
 * each choice on its own, and may run into the deadline at any moment before it has seen it. Then it proposes what it
 * saw, in a word with the call's number.
 *
 * T_name: broken twins.
 */
#ifndef K
#define K 2
#endif
#ifndef PIECES
#define PIECES 2
#endif
#define ROW(choice) ((choice) / 2)
#define ALL 7

byte row[2], flag[2];           /* written by the ranks: whose call's row lies there; it is whole */
byte word_n, word_in;           /* the decision: one word */
byte added[PIECES], call[PIECES]; /* what each piece added, and in which call */
byte busy;                      /* senders and pieces of the call that have not ended */

proctype Sender(byte r, n)
{
    if
    :: row[r] = n; flag[r] = n
    :: skip /* it dies before */
    fi;
    busy--
}

inline look(bit_of)
{
    if
    :: flag[ROW(bit_of)] >= n -> saw = saw | (1 << bit_of)
    :: flag[ROW(bit_of)] < n -> skip /* the deadline */
    fi
}

proctype Piece(byte p, n)
{
    byte saw = 0, seen_n, seen_in, c;
    look(0);
    look(1);
    look(2);
#ifndef T_each_lane
    if :: saw & 3 -> saw = saw | 3 :: else fi;
#endif
#ifdef T_no_decision
    seen_in = saw;
#else
    atomic { seen_n = word_n; seen_in = word_in };
#ifdef T_no_number
    if
    :: seen_n == 0 ->
#else
    if
    :: seen_n != n ->
#endif
#ifdef T_no_swap
        atomic { word_n = n; word_in = saw; seen_in = saw }
#else
        atomic { /* compare and swap */
            if
            :: word_n == seen_n -> word_n = n; word_in = saw; seen_in = saw
            :: else -> seen_in = word_in
            fi
        }
#endif
    :: else
    fi;
#endif
    for (c : 0 .. 2) {
        if
        :: seen_in >> c & 1 ->
            assert(flag[ROW(c)] >= n); /* who follows has nothing to wait for */
            assert(row[ROW(c)] == n)
        :: else
        fi
    }
    assert((seen_in & 1) == (seen_in >> 1 & 1)); /* one row, counted for both or for none */
    added[p] = seen_in;
    call[p] = n;
    busy--
}

init
{
    byte n, p;
    for (n : 1 .. K) {
        atomic {
            busy = 2 + PIECES;
            run Sender(0, n);
            run Sender(1, n);
            for (p : 0 .. PIECES - 1) {
                run Piece(p, n)
            }
        }
        busy == 0; /* the slot is used again when who was given up is done with it */
        for (p : 0 .. PIECES - 1) {
            assert(call[p] == n && added[p] == added[0])
        }
    }
}
