/*
 * What the in-band kernels do alike: take words, find out who is sent to and heard, tell what earlier kernels finished.
 *
 * Order of memory. A word of payload or ids is one 16-byte relaxed access of system scope: it comes whole, and nothing
 * else has to be seen with it. A place is filled with the empty pattern by the warp that took its word, in the kernel
 * that took it; the credit that lets a peer write there again is told by a later kernel of this rank (`taken`, ids), so
 * the fill is performed before it, and the peer's write comes after. `taken` is read with acquire.
 */
#ifndef EPX_ALGO_LL_CUDA_LL_INBAND_CUH
#define EPX_ALGO_LL_CUDA_LL_INBAND_CUH

#include "algo/ll/cuda/ll_inband.h"
#include "algo/ll/cuda/ll_wait.cuh"

enum { LL_NOBODY = 0, LL_INBAND = 1, LL_FLAGS = 2 }; /* how rows travel between me and a rank */

/* In shared memory, one per block. */
typedef struct ll_entry {
    uint64_t n;
    uint32_t slot;
    uint32_t claimed; /* combine: pieces that some adder of this block has taken */
    char *peer[LL_INBAND_RANKS_MOST];
    uint8_t to[LL_INBAND_RANKS_MOST], from[LL_INBAND_RANKS_MOST];
    uint64_t
        left[LL_INBAND_RANKS_MOST]; /* dispatch, the block that sends ids: its outputs of that call were not added */
} ll_entry_t;

/* ---- words ---- */

EPX__DEVICE bool ll_empty(uint4 v)
{
    return ll_all_ones(v.x, v.y, v.z, v.w);
}
EPX__DEVICE uint4 ll_full(uint4 v)
{
    v.w = ll_never_empty(v.x, v.y, v.z, v.w);
    return v;
}
EPX__DEVICE void ll_refill(void *place)
{
    st_relaxed_sys_16(place, make_uint4(0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu));
}

/* A long wait's look at everything else. Returns 0: stop, 1: nothing will come; else when the wait began, in units of
 * 1024 ns, four of them together (so that it is neither 0 nor 1), that wrap after 73 minutes: a register less in the
 * loops that wait. `start` 0: now. */
static __device__ __noinline__ uint32_t ll_patience(const ll_common_t &l, uint64_t n, int peer,
                                                    const uint64_t *left_out, uint32_t start, uint32_t polls)
{
    uint32_t now = ((uint32_t)(globaltimer_ns() >> 10) & ~3u) | 2; /* never before `start` */
    uint64_t most = l.c.timeout_ns >> 10 < 0xf0000000u ? l.c.timeout_ns >> 10 : 0xf0000000u;
    if (ht_stopped(l.c, n, polls % 4096 == 0))
        return 0;
    if (left_out && ld_acquire_sys_u64(left_out) >= n)
        return 1;
    if (start == 0 || now - start <= most)
        return start ? start : now;
    ht_fault_t f = {EPX_E_TIMEOUT, HT_STAGE_ARRIVAL, peer, n, 0, (uint64_t)(now - start) << 10};
    ht_fail(l.c, n, f);
    return 0;
}

/* ---- telling ---- */

/* One warp: what earlier kernels of this buffer finished. They are over: one fence, then plain words. */
EPX__DEVICE void ll_tell_inband(const ll_common_t &l)
{
    uint32_t ranks = (uint32_t)l.c.ranks;
    fence_acq_rel_sys();
    for (uint32_t i = threadIdx.x % 32; i < l.slots * ranks; i += 32) {
        uint32_t slot = i / ranks, r = i % ranks;
        uint64_t taken = l.taken[slot], combined = l.combined[slot], spoilt = l.spoilt[i];
        epx__ll_words_t *to = ll_words(l, l.c.peers[r], slot, l.c.rank);
        if (taken) /* spoilt > taken: by the call that is under way */
            st_relaxed_sys_u64(&to->taken, ll_credit_word(taken, spoilt && spoilt <= taken));
        if (combined)
            st_relaxed_sys_u64(&to->combined, combined);
    }
    __syncwarp();
}

/* ---- credit ---- */

/* How rows go to rank r in call n, whose credit was `seen` (acquire); stop: *stop. Every block that sends asks for
 * itself, and may hear of a later call of a rank that has given this one up: then nobody looks at what it sends. */
EPX__DEVICE uint8_t ll_way_to(const ll_common_t &l, uint64_t n, uint32_t slot, int r, uint64_t seen, bool *stop)
{
    if (n <= l.slots)
        return LL_INBAND;
    uint64_t want = ll_credit_word(n - l.slots, 0);
    if (seen < want) {
        const uint64_t *taken = &ll_words(l, l.c.window, slot, r)->taken;
        if (ll_wait_slow<false>(l, n, taken, want, r, HT_STAGE_CREDIT, NULL, NULL) != LL_CAME) {
            *stop = true;
            return LL_NOBODY;
        }
        seen = ld_acquire_sys_u64(taken);
    }
    return seen & 1 ? LL_FLAGS : LL_INBAND;
}

#endif
