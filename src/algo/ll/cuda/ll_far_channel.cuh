/*
 * Far ranks in kernels: where things are, and the channel to one: room, data, words. One thread at a time pushes on a
 * channel (ll_far.cuh says which), and waits for room by looking, so that alarm and deadline are looked at too.
 */
#ifndef EPX_ALGO_LL_CUDA_LL_FAR_CHANNEL_CUH
#define EPX_ALGO_LL_CUDA_LL_FAR_CHANNEL_CUH

#include "algo/ll/cuda/ll_wait.cuh"

enum { FAR_SEND, FAR_TAKE, FAR_HOME, FAR_BACK };
/* FAR_YES: do it. FAR_GIVEN_UP: just now. FAR_NO: masked, not heard, left out, or gone: nothing to do but words. */
enum { FAR_WAIT = 0, FAR_YES = 1, FAR_GIVEN_UP = 2, FAR_NO = 3, FAR_STOP = 4 };

#define FAR_NO_ROW 0xffffffffu
/* A rank that fails tells why and leaves, over two networks: the reason gets that long. And what a dead rank had handed
 * to its card may still land for a while. As on the CPU (algo/ll/cpu/ll_net.c). */
#define FAR_REST_NS 250000000u

typedef struct ll_far_head {
    uint64_t n, slot, start;
    uint32_t kind, units, bytes_puts;       /* bytes_puts: requests that a YES needs room for */
    uint32_t turn, unit, place, part, what; /* unit: of the block's, the one whose turn it is */
    uint32_t stop;                          /* thread 0: no further turn */
    /* Bits of the block's units. skip: nothing will come; more: home has put a piece of its outputs, and goes on. */
    uint32_t done[LL_FAR_MOST / 32], skip[LL_FAR_MOST / 32], more[LL_FAR_MOST / 32];
    uint32_t index[LL_FAR_THREADS]; /* first row of each token of a tile, or FAR_NO_ROW */
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

EPX__DEVICE bool far_stopped(const ll_common_t &l, const ll_far_head_t &h, uint32_t polls)
{
    return (polls & 7) == 0 && ht_stopped(l.c, h.n, (polls & 63) == 0);
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

#endif
