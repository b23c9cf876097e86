/*
 * Low latency with in-band arrival (docs/PROTOCOL-LL.md, src/algo/ll/cuda/ll_inband_*): a place is empty until its row
 * comes, and nothing in a row says of which call it is. Two ranks, one row each way a call. Memory is sequentially
 * consistent, but a kernel's stores to the peer (rows, outputs) land at any time before it ends.
 *
 *   dispatch  ll_inband_dispatch: send_ids, send_rows, permit_outputs (left_behind), take_rows, keep_counts (same_shape)
 *   combine   ll_inband_combine: tell, push, add
 *
 * Each call is of a kind, any sequence of kinds:
 *   TOGETHER
 *   APART   the ranks mask each other, rank 0 perhaps after it has sent (LATE)
 *   DROPPED rank 1 masks rank 0 between dispatch and combine
 *   RELEASED after dispatch, and not combined
 *
 * -DK calls, -DSLOTS; -DMASKS: APART and LATE, else DROPPED (together they are too many). T_name: broken twins; tests/gpu/ll_slots.h on the emulated kernels catches most of them too.
 */
#ifndef K
#define K 4
#endif
#ifndef SLOTS
#define SLOTS 2
#endif
#define TOGETHER 0
#define APART 1
#define LATE 2
#define DROPPED 3
#define RELEASED 4
#define AT(r, n) ((r) * SLOTS + (n) % SLOTS)
#define UP(word, n) word = (word > (n) -> word : (n)) /* words only grow */

byte kind[K + 1];
/* Written by r, in the other's window. 0: empty. */
byte row[2 * SLOTS], flag[2 * SLOTS], ids[2 * SLOTS], back[2 * SLOTS];
byte may_come[2 * SLOTS]; /* the word with the shape: outputs of that call may come */
byte taken[2 * SLOTS], flags[2 * SLOTS], combined[2 * SLOTS], left_out[2 * SLOTS];
/* r's own: to be told by its next kernel, and its notes about the other. */
byte my_taken[2 * SLOTS], my_combined[2 * SLOTS], spoilt[2 * SLOTS], owed[2 * SLOTS];
byte under_way[2]; /* stores that have not landed */

proctype Row(byte r, n; bool with_flag)
{
#ifdef T_flag_first
    if :: with_flag -> flag[AT(r, n)] = n :: else fi;
#endif
    row[AT(r, n)] = n;
    if :: with_flag -> UP(flag[AT(r, n)], n) :: else fi;
    under_way[r]--
}
proctype Output(byte r, n)
{
    back[AT(r, n)] = n;
    under_way[r]--
}

/* Outputs of an older call may come: until they have, or will not. A block of its own, which waits for a kernel of the
 * other rank while the others send and take. */
proctype Permit(byte r, n; bool tells)
{
    byte o = 1 - r;
#ifdef T_open_first
    if :: tells -> may_come[AT(r, n)] = n :: else fi;
#endif
    (combined[AT(o, n)] >= owed[AT(r, n)] || left_out[AT(o, n)] >= owed[AT(r, n)]);
    d_step {
#ifndef T_no_left
        back[AT(o, n)] = 0;
#endif
        owed[AT(r, n)] = 0;
        if :: tells -> may_come[AT(r, n)] = n :: else fi;
        under_way[r]--
    }
}

/* Number and flags are one word; that the words come one by one is ll.pml's matter. */
inline tell()
{
    d_step {
        for (i : 0 .. SLOTS - 1) {
            UP(taken[AT(r, i)], my_taken[AT(r, i)]);
            flags[AT(r, i)] = (spoilt[AT(r, i)] && spoilt[AT(r, i)] <= my_taken[AT(r, i)]);
            UP(combined[AT(r, i)], my_combined[AT(r, i)])
        }
        i = 0
    }
}

#ifdef T_no_credit
#define CREDIT true
#else
#define CREDIT (taken[AT(o, n)] + SLOTS >= n)
#endif
#define MASKED (kind[n] == APART || (kind[n] == LATE && r == 1))

proctype Rank(byte r)
{
    byte n, i, o = 1 - r;
    bool asked, masked, way;
    for (n : 1 .. K) {
        /* ---- dispatch: one kernel ---- */
        tell();
        asked = false;
        masked = MASKED;
        if
        :: !masked ->
           atomic { CREDIT; way = flags[AT(o, n)] }
           asked = true;
           ids[AT(r, n)] = n;
           under_way[r]++;
           run Row(r, n, way)
        :: else
        fi;
        if
        :: owed[AT(r, n)] ->
           atomic { under_way[r]++; run Permit(r, n, !masked) }
        :: else ->
           if :: !masked -> may_come[AT(r, n)] = n :: else fi
        fi;
        masked = masked || kind[n] == LATE; /* now rank 0 too */
#ifdef T_taken_early
        my_taken[AT(r, n)] = n; tell();
#endif
        if
        :: masked -> if :: spoilt[AT(r, n)] == 0 -> spoilt[AT(r, n)] = n :: else fi
        :: else ->
           (ids[AT(o, n)] == n);
#ifndef T_no_flags
           if
           :: spoilt[AT(r, n)] && spoilt[AT(r, n)] < n -> (flag[AT(o, n)] >= n)
           :: else
           fi;
#endif
           (row[AT(o, n)] != 0);
           assert(row[AT(o, n)] == n);
#ifndef T_no_refill
           row[AT(o, n)] = 0;
#endif
#ifndef T_open_unread
           (may_come[AT(o, n)] == n)
#endif
        fi;
        my_taken[AT(r, n)] = n;
        (under_way[r] == 0);
        if
        :: kind[n] == RELEASED -> skip
        :: else ->
           /* ---- combine: one kernel ---- */
           tell();
           if
           :: !masked && !(kind[n] == DROPPED && r == 1) ->
              under_way[r]++;
              run Output(r, n)
           :: else -> UP(left_out[AT(r, n)], n)
           fi;
           my_combined[AT(r, n)] = n;
           if
           :: asked && (masked || (kind[n] == DROPPED && r == 1)) ->
#ifndef T_no_owed
              owed[AT(r, n)] = n
#endif
           :: asked && !masked && !(kind[n] == DROPPED && r == 1) ->
              (back[AT(o, n)] != 0 || left_out[AT(o, n)] >= n);
              if
              :: back[AT(o, n)] != 0 ->
                 assert(back[AT(o, n)] == n);
#ifndef T_no_refill
                 back[AT(o, n)] = 0
#endif
              :: else
              fi
           :: else
           fi;
           (under_way[r] == 0)
        fi;
        d_step { asked = false; masked = false; way = false }
    }
    tell() /* the next kernel, whatever it is */
}

init {
    byte n;
    atomic {
        for (n : 1 .. K) {
            if
            :: kind[n] = TOGETHER
#ifdef MASKS
            :: kind[n] = APART
            :: kind[n] = LATE
#else
            :: kind[n] = DROPPED
#endif
            :: kind[n] = RELEASED
            fi
        }
        run Rank(0);
        run Rank(1)
    }
}
