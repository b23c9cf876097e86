/*
 * Leaving port channels (docs/PROTOCOL-NET.md, "Bye"; src/channel: epx__lane_bye, epx__lane_answer, epx__lane_parted).
 * Two ranks push up to N requests each and may leave, at any time, either or both. A rank that does not leave goes on
 * for ever, and its proxy answers.
 *
 * The network brings what it carries in any order; a put is "under way" to who made it until it is there. Who has parted
 * closes its endpoint: nothing may be on its way to it then, or ever after. And who leaves does come to that.
 *
 * T_name: broken twins.
 */
#ifndef N
#define N 2
#endif

byte fifo[2], sent[2], applied[2], acked[2]; /* requests: of rank r; applied: of r's, at its peer, and told r */
byte owed[2];                                /* credit that r owes */
byte puts[2], credits[2], byes[2], told[2];  /* on their way to r; told: what the bye brings */
bool leaving[2], said[2], heard[2], dead[2], closed[2];

#define UNDER_WAY(to) (puts[to] + credits[to] + byes[to])
#define APPLIED (fifo[me] == 0 && (dead[me] || sent[me] == acked[me]))

#ifdef T_bye_early
#define MAY_SAY APPLIED
#else
#define MAY_SAY (APPLIED && UNDER_WAY(peer) == 0)
#endif
#ifdef T_answer_early
#define MAY_ANSWER (heard[me])
#else
#define MAY_ANSWER (heard[me] && UNDER_WAY(peer) == 0)
#endif
#ifdef T_closes_at_once
#define MAY_CLOSE (said[me] && byes[peer] == 0)
#else
#define MAY_CLOSE (said[me] && byes[peer] == 0 && heard[me])
#endif
#ifdef T_credit_after_bye
#define MAY_CREDIT (owed[me])
#else
#define MAY_CREDIT (owed[me] && !said[me] && !heard[me])
#endif

inline use(to)
{
    assert(!closed[to])
}

proctype User(byte me)
{
    byte n = 0;
    do
    :: n < N && !leaving[me] -> fifo[me]++; n++
    :: leaving[me] = true; break /* destroy: nothing is pushed after */
    :: break                     /* never leaves */
    od
}

proctype Proxy(byte me)
{
    byte peer = 1 - me;
end:
    do
    :: closed[me] -> break
    :: atomic { !closed[me] && fifo[me] && dead[me] -> fifo[me]-- }
    :: atomic { !closed[me] && fifo[me] && !dead[me] -> use(peer); fifo[me]--; puts[peer]++; sent[me]++ }
    :: atomic { !closed[me] && puts[me] -> puts[me]--; owed[me]++; applied[peer]++ }
    :: atomic { !closed[me] && credits[me] -> credits[me]--; acked[me]++ }
    :: atomic { !closed[me] && MAY_CREDIT -> use(peer); owed[me]--; credits[peer]++ }
    :: atomic {
        !closed[me] && byes[me] -> byes[me]--; heard[me] = true; dead[me] = true;
        if :: told[me] > acked[me] -> acked[me] = told[me] :: else fi
    }
    :: atomic { /* leaving: all that was pushed is applied, and nothing of ours is on its way */
        !closed[me] && leaving[me] && !said[me] && MAY_SAY ->
        use(peer); told[peer] = applied[peer]; byes[peer]++; said[me] = true; dead[me] = true
    }
#ifndef T_no_answer
    :: atomic { /* the answer: what is in the FIFO still is dropped */
        !closed[me] && !said[me] && MAY_ANSWER ->
        use(peer); told[peer] = applied[peer]; byes[peer]++; said[me] = true
    }
#endif
    :: atomic { !closed[me] && leaving[me] && MAY_CLOSE -> assert(UNDER_WAY(me) == 0); closed[me] = true }
    od
}

/* When nothing can happen any more, who wanted to leave has left. */
active proctype Watch()
{
    timeout -> assert(!leaving[0] || closed[0]);
    assert(!leaving[1] || closed[1])
}

init
{
    atomic {
        run User(0);
        run User(1);
        run Proxy(0);
        run Proxy(1)
    }
}
