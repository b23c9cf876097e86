/*
 * Progress words of a ring on GPUs (docs/PROTOCOL-HT.md, "On GPUs"): one word a batch, kept modulo WORDS, taken out of
 * order by several warps at both ends. As flow.cuh and rows.cu build it; a batch is one row here.
 *
 *   Sender    a warp: the next batch that nobody has; waits until the one a lap earlier has been taken; puts it; its word
 *   Receiver  a warp: the next batch that nobody has; waits for its word; takes what lies there; its word
 *
 * A warp may stop anywhere for as long as it likes, others go on. A ring of LAP batches; K pass through it. With LAP a
 * divisor of WORDS this is right; else a word speaks for a batch that shares it.
 */
#ifndef K
#define K 7
#endif
#ifndef WORDS
#define WORDS 4
#endif
#ifndef LAP
#define LAP 2
#endif
#ifndef WARPS
#define WARPS 3
#endif

byte ring[LAP];                /* which batch lies there, + 1 */
byte put[WORDS], taken[WORDS]; /* words: batch + 1 */
byte next_put, next_taken;
byte over;

proctype Sender()
{
    byte b;
    do
    :: atomic { next_put < K -> b = next_put; next_put++ };
        if
        :: b < LAP
        :: b >= LAP -> taken[(b - LAP) % WORDS] >= b - LAP + 1
        fi;
        ring[b % LAP] = b + 1;
        atomic { assert(put[b % WORDS] < b + 1); put[b % WORDS] = b + 1; b = 0 }
    :: next_put >= K -> break
    od;
    over++
}

proctype Receiver()
{
    byte b;
    do
    :: atomic { next_taken < K -> b = next_taken; next_taken++ };
        put[b % WORDS] >= b + 1;
        assert(ring[b % LAP] == b + 1);
        atomic { assert(taken[b % WORDS] < b + 1); taken[b % WORDS] = b + 1; b = 0 }
    :: next_taken >= K -> break
    od;
    over++
}

init
{
    byte i;
    atomic {
        for (i : 1 .. WARPS) {
            run Sender();
            run Receiver()
        }
    };
    over == 2 * WARPS
}
