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

#include "algo/ll/cuda/ll_row.cuh"

enum { FAR_SEND, FAR_TAKE, FAR_HOME, FAR_BACK };
/* FAR_YES: do it. FAR_GIVEN_UP: just now. FAR_NO: masked, not heard, left out, or gone: nothing to do but words. */
enum { FAR_WAIT = 0, FAR_YES = 1, FAR_GIVEN_UP = 2, FAR_NO = 3, FAR_STOP = 4 };

#define FAR_NO_ROW 0xffffffffu
/* A rank that fails tells why and leaves, over two networks: the reason gets that long. And what a dead rank had handed
 * to its card may still land for a while. As on the CPU (algo/ll/cpu/ll_net.c). */
#define FAR_REST_NS 250000000u

typedef struct ll_far_head {
    uint64_t n, slot, start;
    uint32_t kind, units, bytes_puts; /* bytes_puts: requests that a YES needs room for */
    uint32_t turn, place, part, what;
    uint32_t stop;                                           /* thread 0: no further turn */
    uint32_t done[LL_FAR_MOST / 32], skip[LL_FAR_MOST / 32]; /* of the block's units; skip: nothing will come */
    uint32_t index[LL_FAR_THREADS];                          /* first row of each token of a tile, or FAR_NO_ROW */
    uint32_t sums[LL_FAR_WARPS];
    epx__ll_block_t block;
} ll_far_head_t;

/* ---- where things are ---- */

EPX__DEVICE char *far_staging(const ll_common_t &l, size_t window_offset)
{
    return l.far.staging + (window_offset - l.c.layout.ll.words_offset);
}
EPX__DEVICE const epx__ll_words_t *far_words(const ll_common_t &l, const ll_far_head_t &h, uint32_t place)
{
    return (const epx__ll_words_t *)far_staging(
        l, epx__ll_words_at(&l.c.layout.ll, h.slot, (uint32_t)l.far.rank_of[place]));
}
EPX__DEVICE ll_line_t *far_line(const ll_common_t &l, uint64_t slot, uint32_t place)
{
    return &l.far.lines[slot * l.far.count + place];
}
EPX__DEVICE uint64_t far_out_at(const ll_common_t &l, uint64_t slot, uint32_t place)
{
    return (slot * l.far.count + place) * l.far.piece_bytes;
}

/* ---- the channel, one thread ---- */

EPX__DEVICE bool far_room(const epx_port_channel_t *channel, uint64_t requests)
{
    uint64_t acked = ld_acquire_sys_u64(channel->acked);
    return ld_relaxed_sys_u64(channel->issued) - acked + requests <= channel->window;
}
/* It takes nothing more: it has left, or is out of reach. */
EPX__DEVICE bool far_gone(const ll_common_t &l, uint32_t place)
{
    return ld_acquire_sys_u64(l.far.channels[place].fault) != 0;
}
/* The same, and if it failed its reason would be here by now. */
EPX__DEVICE bool far_left(const ll_common_t &l, uint32_t place)
{
    volatile uint64_t *since = &l.far.left_ns[place];
    uint64_t now = globaltimer_ns();
    if (!far_gone(l, place))
        return false;
    if (*since == 0)
        *since = now;
    return now - *since >= FAR_REST_NS;
}

EPX__DEVICE bool far_fail(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, uint32_t status, uint32_t stage,
                          uint64_t expected, uint64_t seen)
{
    ht_fault_t f = {status, stage, l.far.rank_of[place], expected, seen, globaltimer_ns() - h.start};
    ht_fail(l.c, h.n, f);
    return false;
}

/* Stop? An interrupted rank also tells its own later kernels, which look at the alarm first. */
EPX__DEVICE bool far_stopped(const ll_common_t &l, const ll_far_head_t &h, uint32_t polls)
{
    if ((polls & 7) != 0 || !ht_stopped(l.c, h.n, (polls & 63) == 0))
        return false;
    st_release_sys_u64(alarm_of(l.c, l.c.window), 1);
    return true;
}

/* After a push: what does not go because the rank has gone is no failure of ours. False: stop. */
EPX__DEVICE bool far_pushed(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, epx_status_t status,
                            uint64_t bytes, uint64_t puts)
{
    if (status != EPX_OK)
        return far_gone(l, place) || far_fail(l, h, place, (uint32_t)status, HT_STAGE_CHANNEL, 0, 0);
    volatile uint64_t *sent = &l.far.sent[2 * place];
    sent[0] = sent[0] + bytes;
    sent[1] = sent[1] + puts;
    return true;
}

/* The first `bytes` of the slot's piece of `out` to `offset` of the window there. All of them have been written. */
static __device__ __noinline__ bool far_put(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, size_t offset,
                                            uint64_t bytes)
{
    const epx_port_channel_t *channel = &l.far.channels[place];
    if (bytes == 0 || far_gone(l, place))
        return true;
    epx_status_t status = epx_port_put(channel, epx_port_memories(EPX__LL_NET_WINDOW, EPX__LL_NET_OUT),
                                       offset - l.c.layout.ll.words_offset, far_out_at(l, h.slot, place), bytes);
    *(volatile uint64_t *)&far_line(l, h.slot, place)->put = ld_relaxed_sys_u64(channel->issued);
    return far_pushed(l, h, place, status, bytes, (bytes + channel->put_bytes_max - 1) / channel->put_bytes_max);
}

/* Every word that this line lacks, as far as there is room. `all`: it lacks nothing more. False: stop. */
EPX__DEVICE bool far_push_line(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, uint64_t slot, bool *all)
{
    /* As on the CPU: what ends a call's part goes last, and `left_out` before a later call's `combined`. */
    const int order[LL_WORDS] = {LL_TAKEN, LL_LEFT_OUT, LL_COMBINED, LL_DISPATCHED};
    const epx_port_channel_t *channel = &l.far.channels[place];
    volatile ll_line_t *line = far_line(l, slot, place);
    size_t at = epx__ll_words_at(&l.c.layout.ll, slot, (uint32_t)l.c.rank) - l.c.layout.ll.words_offset;
    bool gone = far_gone(l, place);
    for (int i = 0; i < LL_WORDS; i++) {
        int word = order[i];
        uint64_t want = line->want[word], lacks = want - line->told[word];
        if (lacks == 0)
            continue;
        if (!gone && !far_room(channel, 1)) {
            *all = false;
            return true;
        }
        if (!gone &&
            !far_pushed(l, h, place,
                        epx_port_atomic_add(channel, EPX__LL_NET_WINDOW, at + 8 * (size_t)word, (int64_t)lacks), 32, 1))
            return false;
        line->told[word] = want;
    }
    return true;
}

EPX__DEVICE bool far_push_all(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, bool *all)
{
    bool others = *(volatile uint32_t *)&l.far.pending[place] != 0;
    *all = true;
    bool good = far_push_line(l, h, place, h.slot, all);
    for (uint64_t slot = 0; good && others && slot < l.slots; slot++)
        good = far_push_line(l, h, place, slot, all);
    *(volatile uint32_t *)&l.far.pending[place] = !*all;
    return good;
}

/*
 * The end of a rank's part: all words that it lacks. What has no room stays for a later kernel when the rank is masked;
 * with any other there was room when its part began, or it comes. False: stop.
 */
static __device__ __noinline__ bool far_tell(const ll_common_t &l, const ll_far_head_t &h, uint32_t place)
{
    int rank = l.far.rank_of[place];
    bool all, good = far_push_all(l, h, place, &all);
    for (uint32_t polls = 1; good && !all && !*(volatile uint32_t *)&l.masked[rank]; polls++) {
        if (far_room(&l.far.channels[place], 1) || far_gone(l, place))
            good = far_push_all(l, h, place, &all);
        else if (far_stopped(l, h, polls))
            return false;
        else if (globaltimer_ns() - h.start <= l.c.timeout_ns)
            continue;
        else if (l.mask_on_timeout)
            ll_give_up(l, h.n, rank);
        else
            return far_fail(l, h, place, EPX_E_TIMEOUT, HT_STAGE_CHANNEL, 0, 0);
    }
    *(volatile uint64_t *)&l.far.sent_too[2 * place] = l.far.sent[2 * place];
    *(volatile uint64_t *)&l.far.sent_too[2 * place + 1] = l.far.sent[2 * place + 1];
    return good;
}

EPX__DEVICE void far_want(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, int word)
{
    *(volatile uint64_t *)&far_line(l, h.slot, place)->want[word] = h.n;
}

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
    volatile uint64_t *owes = &l.owed[h.slot * (uint64_t)l.c.ranks + (uint64_t)rank];
    uint64_t owed = *owes;
    *stage = HT_STAGE_OWED; /* given up in the slot's last call: it may still put there until it is done with that */
    if (owed && ld_acquire_sys_u64(&words->combined) < owed && ld_acquire_sys_u64(&words->left_out) < owed &&
        !far_left(l, place))
        return FAR_WAIT;
    if (owed)
        *owes = 0;
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

/* ---- whom to serve next ---- */

/* Nothing came in time, or never will: FAR_GIVEN_UP, FAR_STOP, or FAR_WAIT: not yet. */
EPX__DEVICE uint32_t far_late(const ll_common_t &l, const ll_far_head_t &h, uint32_t place, uint32_t stage)
{
    bool left = stage == HT_STAGE_GONE && far_left(l, place);
    if (!left && globaltimer_ns() - h.start <= l.c.timeout_ns)
        return FAR_WAIT;
    if (stage == HT_STAGE_OWED) {
        int rank = l.far.rank_of[place];
        uint64_t owed = l.owed[h.slot * (uint64_t)l.c.ranks + (uint64_t)rank];
        far_fail(l, h, place, EPX_E_BUSY, stage, owed, far_words(l, h, place)->combined);
        return FAR_STOP;
    }
    if (l.mask_on_timeout)
        return FAR_GIVEN_UP;
    if (left)
        far_fail(l, h, place, EPX_E_PEER, HT_STAGE_GONE, 0, ld_relaxed_sys_u64(l.far.channels[place].fault));
    else
        far_fail(l, h, place, EPX_E_TIMEOUT, stage == HT_STAGE_GONE ? HT_STAGE_ARRIVAL : stage, h.n, 0);
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
            uint32_t place = u % l.far.count, stage = 0, what = far_agreed(l, h, place);
            all = false;
            if (what == FAR_WAIT)
                what = far_look(l, h, place, h.skip[i / 32] >> i % 32 & 1, &stage);
            if (what == FAR_WAIT && (polls & 7) == 0)
                what = far_late(l, h, place, stage);
            if (what == FAR_STOP)
                return FAR_STOP;
            if (what == FAR_WAIT)
                continue;
            h.what = far_agree(l, h, place, what);
            h.done[i / 32] |= 1u << i % 32;
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
        h.done[i] = h.skip[i] = 0;
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

/* A warp: whole 16-byte words, four of a lane under way at a time. Reads past L1. */
EPX__DEVICE void far_copy(char *to, const char *from, uint32_t bytes)
{
    uint32_t at = threadIdx.x % 32 * 16;
    for (; at + 3 * 512 < bytes; at += 4 * 512) {
        uint4 v[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            v[i] = ld_global_16(from + at + i * 512);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            st_global_16(to + at + i * 512, v[i]);
    }
    for (; at < bytes; at += 512)
        st_global_16(to + at, ld_global_16(from + at));
}

#endif
