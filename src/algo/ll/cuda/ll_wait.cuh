/*
 * What the low-latency kernels do alike: find words, wait with a deadline, tell what earlier kernels finished, count.
 */
#ifndef EPX_ALGO_LL_CUDA_LL_WAIT_CUH
#define EPX_ALGO_LL_CUDA_LL_WAIT_CUH

#include "algo/ht/cuda/wait.cuh"
#include "algo/ll/cuda/ll_cuda.h"

enum { LL_STOP = 0, LL_CAME = 1, LL_ABSENT = 2 };

#define ALL_LANES 0xffffffffu

/* Is rank r in my domain? Then its window is mapped here; else ll_far.cuh serves it. */
EPX__DEVICE bool ll_near(const ll_common_t &l, int r)
{
    return !l.place || l.place[r] < 0;
}
EPX__DEVICE epx__ll_words_t *ll_words(const ll_common_t &l, char *window, uint64_t slot, int from)
{
    return (epx__ll_words_t *)(window + epx__ll_words_at(&l.c.layout.ll, slot, (uint32_t)from));
}
EPX__DEVICE uint64_t *ll_block(const ll_common_t &l, char *window, uint64_t slot, int source)
{
    return (uint64_t *)(window + epx__ll_block_at(&l.c.layout.ll, slot, (uint32_t)source));
}
/* In a block: words of ids, then of weights. */
EPX__DEVICE uint64_t *ll_ids(const ll_common_t &l, char *window, uint64_t slot, int source)
{
    return ll_block(l, window, slot, source) + 8;
}
EPX__DEVICE uint64_t *ll_weights(const ll_common_t &l, char *window, uint64_t slot, int source)
{
    uint32_t pairs = l.c.layout.ll.tokens_max * l.topk;
    return ll_ids(l, window, slot, source) + (pairs + 1) / 2 * 2;
}
EPX__DEVICE uint64_t ll_stamped(uint32_t value, uint64_t n)
{
    return (uint64_t)value | n << 32;
}
EPX__DEVICE int64_t ll_id(const ll_common_t &l, size_t at)
{
    int64_t id = epx__topk_id(l.topk_idx, l.bits, at);
    return id < 0 || id >= (int64_t)l.map.experts ? -1 : id;
}

/* That rank is given up in call n: masked from now on; it may still write into the slot. */
EPX__DEVICE void ll_give_up(const ll_common_t &l, uint64_t n, int peer)
{
    *(volatile uint32_t *)&l.masked[peer] = 1;
    if (*(volatile uint32_t *)&l.r.asked[peer])
        *(volatile uint64_t *)&l.owed[(n % l.slots) * (uint64_t)l.c.ranks + (uint64_t)peer] = n;
    *(volatile uint32_t *)&l.gave_up[peer] = 1;
}

template <bool stamp>
EPX__DEVICE bool ll_is(uint64_t seen, uint64_t n)
{
    return stamp ? (uint32_t)(seen >> 32) == (uint32_t)n : seen >= n;
}

/* What blocks agreed on in call n: 1 heard, 2 given up. */
EPX__DEVICE uint32_t ll_decision(uint64_t n, uint32_t what)
{
    return (uint32_t)n << 2 | what;
}

/*
 * What all that share a row do alike, however close to the deadline it comes: the first to know decides, in a word with
 * the call's number in its upper half. Only the decision goes by this word: who follows it looks at the flag itself.
 */
EPX__DEVICE uint32_t ll_decide(uint64_t *word, uint64_t n, uint32_t what)
{
    unsigned long long mine = ll_stamped(what, n), seen = *(volatile uint64_t *)word;
    while (!ll_is<true>(seen, n)) { /* of an older call */
        unsigned long long before = atomicCAS((unsigned long long *)word, seen, mine);
        seen = before == seen ? mine : before;
    }
    return (uint32_t)seen;
}

/*
 * It was decided that the row is in: somebody has seen its flag, so there is nothing to wait for but one's own look.
 * With a deadline all the same: no wait is without one.
 */
EPX__DEVICE int ll_follow(const ll_common_t &l, uint64_t n, const uint64_t *flag, int peer)
{
    return ht_wait(l.c, n, flag, n, peer, HT_STAGE_ARRIVAL) ? LL_CAME : LL_STOP;
}

/* Nobody gives up itself, so a rank's own rows have so much longer than the deadline, and are an error then. */
#define OWN_ROWS_NS 60000000000u

/* `left_out`: a word that says that nothing will come, or NULL. `gone`: somebody else's decision, or NULL. */
template <bool stamp>
static __device__ __noinline__ int ll_wait_slow(const ll_common_t &l, uint64_t n, const uint64_t *word, uint64_t want,
                                                int peer, uint32_t stage, const uint64_t *left_out, uint32_t *gone)
{
    uint64_t start = 0;
    for (uint32_t polls = 1;; polls++) {
        /* The word alone, most of the time: each look at something else is time in which it may come. */
        if (ll_is<stamp>(ld_relaxed_sys_u64(word), want)) {
            if (!stamp)
                (void)ld_acquire_sys_u64(word);
            return LL_CAME;
        }
        if ((polls & 63) != 0)
            continue;
        if (start == 0)
            start = globaltimer_ns();
        if (ht_stopped(l.c, n, (polls & 4095) == 0))
            return LL_STOP;
        if (left_out && ld_acquire_sys_u64(left_out) >= n) {
            if (ll_is<stamp>(ld_acquire_sys_u64(word), want))
                return LL_CAME;
            return LL_ABSENT;
        }
        if (gone && *(volatile uint32_t *)gone == ll_decision(n, 2))
            return LL_ABSENT;
        uint64_t waited = globaltimer_ns() - start;
        bool masked = l.mask_on_timeout && *(volatile uint32_t *)&l.masked[peer];
        bool own = l.mask_on_timeout && peer == l.c.rank; /* other blocks of this kernel, which did not get to run */
        uint64_t spare = own ? OWN_ROWS_NS : 0;
        if ((waited <= spare || waited - spare <= l.c.timeout_ns) && !masked)
            continue;
        if (l.mask_on_timeout && !own) {
            if (ll_is<stamp>(ld_acquire_sys_u64(word), want))
                return LL_CAME;
            if (!gone) /* else the caller decides with others */
                ll_give_up(l, n, peer);
            return LL_ABSENT;
        }
        ht_fault_t f = {EPX_E_TIMEOUT, stage, peer, want, ld_relaxed_sys_u64(word), waited};
        ht_fail(l.c, n, f);
        return LL_STOP;
    }
}

EPX__DEVICE int ll_wait_flag(const ll_common_t &l, uint64_t n, const uint64_t *word, int peer, uint32_t stage,
                             const uint64_t *left_out, uint32_t *gone)
{
    return ld_acquire_sys_u64(word) >= n ? LL_CAME : ll_wait_slow<false>(l, n, word, n, peer, stage, left_out, gone);
}

/*
 * The call whose outputs from rank r may still come to that slot, 0: none: the slot's last one, when r was given up in
 * it, or it was released after its send half.
 */
EPX__DEVICE uint64_t ll_owed(const ll_common_t &l, uint64_t slot, int r)
{
    uint64_t at = slot * (uint64_t)l.c.ranks + (uint64_t)r;
    uint64_t owed = *(volatile uint64_t *)&l.owed[at], unread = *(volatile uint64_t *)&l.unread[at];
    return owed > unread ? owed : unread;
}
/* They come no more. */
EPX__DEVICE void ll_settle(const ll_common_t &l, uint64_t slot, int r)
{
    uint64_t at = slot * (uint64_t)l.c.ranks + (uint64_t)r;
    *(volatile uint64_t *)&l.owed[at] = 0;
    *(volatile uint64_t *)&l.unread[at] = 0;
}

/*
 * Until rank r has said that it is done with `call` (ll_owed); else its late outputs would meet those of the slot's
 * next call. It says so at the start of the kernel after its combine, so there may be a moment to wait. At the
 * deadline, words; false: stop. The kernel that waits here tells its own first, or two ranks would wait for each other.
 */
EPX__DEVICE bool ll_settled(const ll_common_t &l, uint64_t n, uint64_t slot, int r, uint64_t call)
{
    const epx__ll_words_t *w = ll_words(l, l.c.window, slot, r);
    uint64_t start = 0;
    for (uint32_t polls = 1; ld_acquire_sys_u64(&w->combined) < call && ld_acquire_sys_u64(&w->left_out) < call;
         polls++) {
        if (polls % 64 != 0)
            continue;
        uint64_t now = globaltimer_ns();
        start = start ? start : now;
        if (ht_stopped(l.c, n, polls % 4096 == 0))
            return false;
        if (now - start <= l.c.timeout_ns)
            continue;
        ht_fault_t f = {EPX_E_BUSY, HT_STAGE_OWED, r, call, ld_relaxed_sys_u64(&w->combined), now - start};
        ht_fail(l.c, n, f);
        return false;
    }
    return true;
}

/* One warp: tell near ranks what earlier kernels of this buffer finished. They are over: one fence, then plain words.
 */
EPX__DEVICE void ll_tell_finished(const ll_common_t &l)
{
    fence_acq_rel_sys();
    for (uint32_t i = threadIdx.x % 32; i < l.slots * (uint32_t)l.c.ranks; i += 32) {
        uint32_t slot = i / (uint32_t)l.c.ranks;
        if (!ll_near(l, (int)(i % (uint32_t)l.c.ranks)))
            continue;
        epx__ll_words_t *to = ll_words(l, l.c.peers[i % (uint32_t)l.c.ranks], slot, l.c.rank);
        if (l.taken[slot])
            st_relaxed_sys_u64(&to->taken, l.taken[slot]);
        if (l.combined[slot])
            st_relaxed_sys_u64(&to->combined, l.combined[slot]);
    }
    __syncwarp();
}

/* One thread: what is said of source r's rows in a part, [begin, end). */
EPX__DEVICE void ll_book_part(const ll_dispatch_t &p, uint32_t part, uint32_t r, uint32_t begin, uint32_t end)
{
    uint32_t ranks = (uint32_t)p.l.c.ranks;
    if (p.layout_range)
        p.layout_range[part * ranks + r] = (int64_t)((uint64_t)begin << 32 | (end - begin));
    if (p.l.ranked)
        p.recv_count[r] = (int32_t)(end - begin);
    else if (r == ranks - 1) {
        p.recv_count[part] = (int32_t)end;
        if (p.expert_stats)
            p.expert_stats[part] += (int32_t)end;
    }
}

#endif
