/*
 * Positions from ids, as in ll_index.cuh, shorter: ids come six to a word, each is marked as it is read, and a row's
 * position is counted from the bitmap where it is needed. For buffers on which a missed deadline is an error, so that
 * the blocks have nothing to agree on.
 */
#ifndef EPX_ALGO_LL_CUDA_LL_INBAND_INDEX_CUH
#define EPX_ALGO_LL_CUDA_LL_INBAND_INDEX_CUH

#include "algo/ll/cuda/ll_inband.cuh"

/* In shared memory; the layout that ll_inband_index_bytes measures. */
typedef struct ll_ids {
    uint16_t *ids;  /* [ranks * tokens_max][topk] global experts, LL_NO_ID */
    uint32_t *bits; /* [parts][words] which (source, token) */
} ll_ids_t;

EPX__DEVICE ll_ids_t ids_at(const ll_dispatch_t &p)
{
    extern __shared__ __align__(16) char memory[];
    uint32_t pairs = (uint32_t)p.l.c.ranks * p.l.c.layout.ll.tokens_max * p.l.topk;
    ll_ids_t x;
    x.ids = (uint16_t *)memory;
    x.bits = (uint32_t *)(memory + (pairs * 2 + 15) / 16 * 16);
    return x;
}

/* The local expert that an id means here, or LL_NONE. */
EPX__DEVICE uint32_t local_of(const ll_common_t &l, uint32_t id)
{
    if (!l.map.rank_of)
        return ll_local_of(id, (uint32_t)l.c.rank, l.map.per_rank, LL_NONE);
    if (id == LL_NO_ID || l.map.rank_of[id] != l.c.rank)
        return LL_NONE;
    return (uint32_t)l.map.local_of[id];
}
EPX__DEVICE uint32_t part_of(const ll_common_t &l, uint32_t e)
{
    return l.ranked ? 0 : e;
}

/* One thread: a word of a source's ids, into the index. */
EPX__DEVICE void mark_word(const ll_dispatch_t &p, const ll_ids_t &x, uint32_t source, uint32_t w, ll_word_t word)
{
    const ll_common_t &l = p.l;
    uint32_t places = l.c.layout.ll.tokens_max, pairs = places * l.topk, first = w * LL_IDS_IN_WORD;
    uint32_t t = first / l.topk, k = first - t * l.topk;
#pragma unroll 1
    for (uint32_t i = 0; i < LL_IDS_IN_WORD && first + i < pairs; i++) {
        uint32_t id = ll_unpack_id(word, i), e = local_of(l, id), u = source * places + t;
        x.ids[source * pairs + first + i] = (uint16_t)id;
        if (e != LL_NONE)
            atomicOr(&x.bits[part_of(l, e) * p.words + u / 32], 1u << u % 32);
        if (++k == l.topk) {
            k = 0;
            t++;
        }
    }
}

/* The whole block: words [first, end) of all sources' words. False: stop (in some thread). */
EPX__DEVICE bool read_words(const ll_dispatch_t &p, const ll_entry_t &e, const ll_ids_t &x, uint32_t first,
                            uint32_t end)
{
    const ll_common_t &l = p.l;
    uint32_t each = ll_id_words(l.c.layout.ll.tokens_max * l.topk);
    for (uint32_t i = first + threadIdx.x; i < end; i += LL_INBAND_THREADS) {
        uint32_t source = i / each, w = i - source * each;
        ll_word_t word = {~0ull, ~0ull};
        if (e.from[source] != LL_NOBODY) {
            const uint64_t *at = ll_ids(l, l.c.window, e.slot, (int)source) + 2 * w;
            epx__pair_t seen = ld_relaxed_sys_pair(at);
            for (uint32_t polls = 1; !ll_is<true>(seen.second, e.n); polls++) {
                if (polls % 256 == 0 &&
                    ll_wait_slow<true>(l, e.n, at + 1, e.n, (int)source, HT_STAGE_ARRIVAL, NULL, NULL) != LL_CAME)
                    return false;
                seen = ld_relaxed_sys_pair(at);
            }
            word.first = seen.first;
            word.second = seen.second;
        }
        mark_word(p, x, source, w, word);
    }
    return true;
}

/* The whole block; bits are zero, and all threads know it. False: stop. `wait_ns`: of each source, one by one. */
static __device__ bool make_ids(const ll_dispatch_t &p, const ll_entry_t &e, const ll_ids_t &x, int64_t *wait_ns)
{
    const ll_common_t &l = p.l;
    uint32_t each = ll_id_words(l.c.layout.ll.tokens_max * l.topk), ranks = (uint32_t)l.c.ranks;
    uint64_t start = wait_ns ? globaltimer_ns() : 0;
    for (uint32_t k = 0; k < (wait_ns ? ranks : 1); k++) {
        uint32_t source = ((uint32_t)l.c.rank + k) % ranks;
        uint32_t first = wait_ns ? source * each : 0, end = wait_ns ? first + each : ranks * each;
        if (!__syncthreads_and(read_words(p, e, x, first, end)))
            return false;
        if (wait_ns && threadIdx.x == 0 && e.from[source] != LL_NOBODY)
            wait_ns[source] += (int64_t)(globaltimer_ns() - start);
    }
    return true;
}

/* How many rows of that part come before pair u: that row's position. */
EPX__DEVICE uint32_t place_of(const ll_dispatch_t &p, const ll_ids_t &x, uint32_t part, uint32_t u)
{
    const uint4 *bits = (const uint4 *)(x.bits + (size_t)part * p.words);
    uint32_t sum = 0, last = u / 128, rest = u % 128;
    for (uint32_t i = 0; i < last; i++) {
        uint4 v = bits[i];
        sum += (uint32_t)(__popc(v.x) + __popc(v.y) + __popc(v.z) + __popc(v.w));
    }
    uint4 v = bits[last];
    return sum + (uint32_t)(__popc(v.x & ll_bits_below(rest, 0)) + __popc(v.y & ll_bits_below(rest, 1)) +
                            __popc(v.z & ll_bits_below(rest, 2)) + __popc(v.w & ll_bits_below(rest, 3)));
}

#endif
