/*
 * Low latency with ranks of other domains, in kernels of their own around those of the domain (docs/PROTOCOL-LL.md,
 * "Between domains of GPUs"). What they do alike: whom to serve next, words, room, pushing.
 *
 *   send   my record for d into `out`, put; `dispatched`               before the domain's send
 *   take   s's record out of `staging` into my window; `taken`         before the domain's receive
 *   home   my outputs for o into `out`, put; `combined`, `left_out`    before the domain's combine_send
 *   back   e's outputs out of `staging` into my window                 before the domain's combine_recv
 *
 * A far rank's part of a kernel is shared by `parts` blocks. Thread 0 of a block does all looking and waiting; what is
 * to be done with a rank is agreed on by a word that the first to know writes. The last part to be done pushes: one
 * thread in a kernel pushes on a channel, so that room seen is room there.
 */
#ifndef EPX_ALGO_LL_CUDA_LL_FAR_CUH
#define EPX_ALGO_LL_CUDA_LL_FAR_CUH

#include "algo/ht/cuda/copy.cuh"
#include "algo/ll/cuda/ll_far_channel.cuh"
#include "algo/ll/cuda/ll_row.cuh"

/* ---- is a rank's part ready? One look of one thread; FAR_WAIT: *stage says for what ---- */

EPX__DEVICE bool far_out_free(const ll_common_t &l, const ll_far_head_t &h, uint32_t place)
{
    uint64_t put = *(volatile uint64_t *)&far_line(l, h.slot, place)->put;
    return ld_acquire_sys_u64(l.far.channels[place].acked) >= put;
}

EPX__DEVICE uint32_t look_send(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, uint32_t *stage)
{
    int rank = l.far.rank_of[place];
    const epx__ll_words_t *words = far_words(l, h, place);
    if (*(volatile uint32_t *)&l.masked[rank] || far_gone(l, place))
        return FAR_NO;
    *stage = HT_STAGE_CREDIT;
    if (h.n > l.slots && ld_acquire_sys_u64(&words->taken) < h.n - l.slots)
        return FAR_WAIT;
    *stage = HT_STAGE_CHANNEL;
    return far_out_free(l, h, place) && far_room(&l.far.channels[place], h.bytes_puts) ? FAR_YES : FAR_WAIT;
}

EPX__DEVICE uint32_t look_take(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, uint32_t *stage)
{
    const uint64_t *word = &far_words(l, h, place)->dispatched;
    if (*(volatile uint32_t *)&l.masked[l.far.rank_of[place]])
        return FAR_NO;
    bool gone = far_gone(l, place); /* before the word: it may have done its part first */
    if (ld_acquire_sys_u64(word) < h.n) {
        *stage = gone ? HT_STAGE_GONE : HT_STAGE_ARRIVAL;
        return FAR_WAIT;
    }
    *stage = HT_STAGE_CHANNEL;
    return gone || far_room(&l.far.channels[place], 1) ? FAR_YES : FAR_WAIT; /* more than one: far_tell waits */
}

EPX__DEVICE bool far_heard(const ll_common_t &l, const ll_far_head_t &h, int rank)
{
    return *(volatile uint32_t *)&l.r.decided[rank] == ll_decision(h.n, 1);
}

EPX__DEVICE uint32_t look_home(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, uint32_t *stage)
{
    int rank = l.far.rank_of[place];
    if (!far_heard(l, h, rank) || *(volatile uint32_t *)&l.masked[rank] || far_gone(l, place))
        return FAR_NO;
    *stage = HT_STAGE_CHANNEL;
    return far_out_free(l, h, place) && far_room(&l.far.channels[place], h.bytes_puts) ? FAR_YES : FAR_WAIT;
}

/* ... and for the next piece, which is of nobody's concern but this block's. */
EPX__DEVICE uint32_t look_piece(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, uint32_t *stage)
{
    *stage = HT_STAGE_CHANNEL;
    return far_gone(l, place) || far_out_free(l, h, place) ? FAR_YES : FAR_WAIT; /* then the channel is empty */
}

EPX__DEVICE uint32_t look_back(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, bool skip, uint32_t *stage)
{
    int rank = l.far.rank_of[place];
    const epx__ll_words_t *words = far_words(l, h, place);
    bool masked = *(volatile uint32_t *)&l.masked[rank] != 0;
    if (skip || !*(volatile uint32_t *)&l.r.asked[rank] || (masked && !l.mask_on_timeout))
        return FAR_NO;
    bool gone = far_gone(l, place);
    /* What is said last is looked at first. When it has left me out of the slot's next call already, only an exact
     * `combined` says that this one was whole. */
    uint64_t left_out = ld_acquire_sys_u64(&words->left_out), combined = ld_acquire_sys_u64(&words->combined);
    if (combined == h.n || (combined > h.n && left_out < h.n))
        return FAR_YES;
    if (combined > h.n || left_out >= h.n)
        return FAR_NO;
    *stage = gone ? HT_STAGE_GONE : HT_STAGE_ARRIVAL;
    return masked ? FAR_GIVEN_UP : FAR_WAIT; /* masked by an earlier deadline */
}

EPX__DEVICE uint32_t far_look(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, bool skip, uint32_t *stage)
{
    switch (h.kind) {
    case FAR_SEND:
        return look_send(l, h, place, stage);
    case FAR_TAKE:
        return look_take(l, h, place, stage);
    case FAR_HOME:
        return look_home(l, h, place, stage);
    default:
        return look_back(l, h, place, skip, stage);
    }
}

/* ---- agreeing ---- */

EPX__DEVICE uint32_t far_key(const ll_far_head_t &h)
{
    return (uint32_t)h.n << 2 | h.kind;
}
EPX__DEVICE uint32_t far_agreed(const ll_common_t &l, const ll_far_head_t &h, uint32_t place)
{
    uint32_t seen = *(volatile uint32_t *)&l.far.agreed[place];
    return seen >> 2 == (far_key(h) & 0x3fffffffu) ? seen & 3 : FAR_WAIT;
}
/* The first to know decides for all parts; what it saw is seen by all. */
EPX__DEVICE uint32_t far_agree(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, uint32_t what)
{
    uint32_t seen = *(volatile uint32_t *)&l.far.agreed[place];
    fence_acq_rel_sys();
    for (;;) {
        uint32_t agreed = far_agreed(l, h, place);
        if (agreed == FAR_WAIT) {
            uint32_t mine = far_key(h) << 2 | what, before = atomicCAS(&l.far.agreed[place], seen, mine);
            agreed = before == seen ? what : FAR_WAIT;
            seen = before;
        }
        if (agreed != FAR_WAIT) {
            fence_acq_rel_sys();
            return agreed;
        }
    }
}

/* What follows for the rank; the same from all parts. */
EPX__DEVICE void far_note(const ll_common_t &l, const ll_far_head_t &h, int rank, uint32_t what)
{
    bool given_up = what == FAR_GIVEN_UP;
    if (h.kind == FAR_SEND && given_up)
        *(volatile uint32_t *)&l.r.asked[rank] = 0;
    if (h.kind == FAR_TAKE && what != FAR_NO)
        *(volatile uint32_t *)&l.r.decided[rank] = ll_decision(h.n, what);
    if (h.kind == FAR_BACK && given_up)
        *(volatile uint32_t *)&l.r.gone[rank] = ll_decision(h.n, 2);
    if (given_up)
        ll_give_up(l, h.n, rank);
}

/* ---- before anybody is served ---- */

/* One thread: until that rank, if it owes, has said that it puts nothing more of the slot's last call, or is gone.
 * False: stop. */
EPX__DEVICE bool far_settled(const ll_common_t &l, const ll_far_head_t &h, uint32_t place)
{
    const epx__ll_words_t *words = far_words(l, h, place);
    uint64_t owed = ll_owed(l, h.slot, l.far.rank_of[place]);
    for (uint32_t polls = 1; owed && ld_acquire_sys_u64(&words->combined) < owed &&
                             ld_acquire_sys_u64(&words->left_out) < owed && !far_left(l, place);
         polls++) {
        if (far_stopped(l, h, polls))
            return false;
        if ((polls & 7) == 0 && globaltimer_ns() - h.start > l.c.timeout_ns)
            return far_fail(l, h, place, EPX_E_BUSY, HT_STAGE_OWED, owed, ld_relaxed_sys_u64(&words->combined));
    }
    if (owed)
        ll_settle(l, h.slot, l.far.rank_of[place]); /* by each block alike */
    return true;
}

/* The block: all far ranks. Whoever gets a record may put outputs where one that owes still does. False: stop. */
EPX__DEVICE bool far_settle(const ll_common_t &l, const ll_far_head_t &h)
{
    bool good = true;
    for (uint32_t place = threadIdx.x; place < l.far.count; place += LL_FAR_THREADS)
        good = far_settled(l, h, place) && good;
    return !__syncthreads_or(!good);
}

/* ---- whom to serve next ---- */

/* The word that is waited for in that stage. */
EPX__DEVICE uint64_t far_seen(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, uint32_t stage)
{
    const epx__ll_words_t *words = far_words(l, h, place);
    if (stage == HT_STAGE_CHANNEL)
        return ld_relaxed_sys_u64(l.far.channels[place].acked);
    if (stage == HT_STAGE_CREDIT)
        return ld_relaxed_sys_u64(&words->taken);
    return ld_relaxed_sys_u64(h.kind == FAR_BACK ? &words->combined : &words->dispatched);
}

/* Nothing came in time, or never will: FAR_GIVEN_UP, FAR_STOP, or FAR_WAIT: not yet. */
EPX__DEVICE uint32_t far_late(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, uint32_t stage)
{
    bool left = stage == HT_STAGE_GONE && far_left(l, place);
    if (!left && globaltimer_ns() - h.start <= l.c.timeout_ns)
        return FAR_WAIT;
    if (l.mask_on_timeout)
        return FAR_GIVEN_UP;
    if (left)
        far_fail(l, h, place, EPX_E_PEER, HT_STAGE_GONE, 0, ld_relaxed_sys_u64(l.far.channels[place].fault));
    else
        far_fail(l, h, place, EPX_E_TIMEOUT, stage == HT_STAGE_GONE ? HT_STAGE_ARRIVAL : stage, h.n,
                 far_seen(l, h, place, stage));
    return FAR_STOP;
}

/* Thread 0: the next of the block's ranks whose part is ready, into the head. FAR_YES; FAR_NO: all are done; FAR_STOP.
 */
static __device__ __noinline__ uint32_t far_pick(const ll_common_t &l, ll_far_head_t &h)
{
    for (uint32_t polls = 1;; polls++) {
        bool all = true;
        for (uint32_t i = 0, u = blockIdx.x; u < h.units; i++, u += gridDim.x) {
            if (h.done[i / 32] >> i % 32 & 1)
                continue;
            bool more = h.more[i / 32] >> i % 32 & 1;
            uint32_t place = u % l.far.count, stage = 0;
            uint32_t what = more ? look_piece(l, h, place, &stage) : far_agreed(l, h, place);
            all = false;
            if (what == FAR_WAIT && !more)
                what = far_look(l, h, place, h.skip[i / 32] >> i % 32 & 1, &stage);
            if (what == FAR_WAIT && (polls & 7) == 0)
                what = far_late(l, h, place, stage);
            if (what == FAR_STOP)
                return FAR_STOP;
            if (what == FAR_WAIT)
                continue;
            h.what = more ? what : far_agree(l, h, place, what);
            h.done[i / 32] |= 1u << i % 32;
            h.unit = i;
            h.place = place;
            h.part = u / l.far.count;
            far_note(l, h, l.far.rank_of[place], h.what);
            return FAR_YES;
        }
        if (all)
            return FAR_NO;
        if (far_stopped(l, h, polls))
            return FAR_STOP;
    }
}

/* The block: serve another rank? Then the head says which, which part of it, and what to do. */
EPX__DEVICE bool far_turn(const ll_common_t &l, ll_far_head_t &h)
{
    __syncthreads();
    if (threadIdx.x == 0)
        h.turn = h.stop ? FAR_STOP : far_pick(l, h);
    __syncthreads();
    return h.turn == FAR_YES;
}

/* The block has done its part of the rank. True, for thread 0 of the last part's block: push. */
EPX__DEVICE bool far_last(const ll_common_t &l, ll_far_head_t &h, uint32_t parts)
{
    __syncthreads();
    if (threadIdx.x != 0)
        return false;
    fence_acq_rel_sys();
    if (add_relaxed_gpu_u32(&l.far.arrived[h.place], 1) != parts - 1)
        return false;
    *(volatile uint32_t *)&l.far.arrived[h.place] = 0;
    fence_acq_rel_sys();
    return true;
}

/* The block; `n`: the call. False: stop. */
EPX__DEVICE bool far_enter(const ll_common_t &l, ll_far_head_t &h, uint32_t kind, uint64_t n, uint32_t parts,
                           uint64_t bytes)
{
    for (uint32_t i = threadIdx.x; i < LL_FAR_MOST / 32; i += LL_FAR_THREADS)
        h.done[i] = h.skip[i] = h.more[i] = 0;
    if (threadIdx.x == 0) {
        h.n = n;
        h.slot = n % l.slots;
        h.start = globaltimer_ns();
        h.kind = kind;
        h.units = l.far.count * parts;
        h.bytes_puts = (bytes ? (uint32_t)(bytes / l.far.channels[0].put_bytes_max) + 1 : 0) + EPX__LL_NET_WORDS;
        h.stop = ht_stopped(l.c, n, false);
    }
    __syncthreads();
    bool stop = h.stop;
    if (!stop && blockIdx.x == 0 && threadIdx.x < 32)
        ll_tell_finished(l); /* the buffer's next kernel, whichever it is */
    return !stop;
}

#endif
