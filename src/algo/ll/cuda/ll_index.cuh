/*
 * Positions from ids: what every receiving block of dispatch works out on its own. A bitmap a local expert says which
 * (source, token) pairs come to it; the bits before a pair's own are its row. Who was heard is decided once for all
 * blocks.
 */
#ifndef EPX_ALGO_LL_CUDA_LL_INDEX_CUH
#define EPX_ALGO_LL_CUDA_LL_INDEX_CUH

#include "algo/ll/cuda/ll_wait.cuh"

typedef struct ll_head {
    uint64_t n, slot, start;
    uint32_t stop;
    uint32_t again;
    uint32_t go[LL_RANKS_MOST / 32];   /* bits: ranks that dispatch sends to now */
    uint32_t left[LL_RANKS_MOST / 32]; /* later */
} ll_head_t;

/* Where ids, bitmaps and counts lie: in shared memory, or, for large shapes, in global memory. */
typedef struct ll_index {
    uint16_t *ids;    /* [ranks * tokens_max][topk] local experts */
    uint32_t *bits;   /* [parts][words] which (source, token) */
    uint32_t *before; /* [parts][words] set bits of earlier words */
} ll_index_t;

EPX__DEVICE ll_index_t index_at(const ll_dispatch_t &p, char *memory)
{
    uint64_t pairs = (uint64_t)p.l.c.ranks * p.l.c.layout.ll.tokens_max * p.l.topk;
    ll_index_t x;
    x.ids = (uint16_t *)memory;
    x.bits = (uint32_t *)(memory + (pairs * 2 + 15) / 16 * 16);
    x.before = x.bits + (size_t)p.parts * p.words;
    return x;
}
EPX__DEVICE uint32_t place_of(const ll_dispatch_t &p, const ll_index_t &x, uint32_t part, uint32_t u)
{
    size_t w = (size_t)part * p.words + u / 32;
    return x.before[w] + (uint32_t)__popc(x.bits[w] & ((1u << u % 32) - 1));
}

/* The whole block: all ids of `source`. False: they did not come, and it was given up. */
EPX__DEVICE int read_ids(const ll_dispatch_t &p, ll_head_t &h, const ll_index_t &x, int source)
{
    const ll_common_t &l = p.l;
    uint32_t pairs = l.c.layout.ll.tokens_max * l.topk, base = (uint32_t)source * pairs;
    const uint64_t *words = ll_ids(l, l.c.window, h.slot, source);
    int came = LL_CAME;
    for (uint32_t i = threadIdx.x; i < pairs; i += LL_THREADS) {
        uint64_t word = ld_relaxed_sys_u64(&words[i]);
        if (came == LL_CAME && !ll_is<true>(word, h.n)) {
            came = ll_wait_slow<true>(l, h.n, &words[i], h.n, source, HT_STAGE_ARRIVAL, NULL, &l.r.decided[source]);
            word = ld_relaxed_sys_u64(&words[i]);
        }
        int32_t id = came == LL_CAME ? (int32_t)(uint32_t)word : -1;
        bool here = id >= 0 && epx__expert_rank(&l.map, id) == l.c.rank;
        x.ids[base + i] = here ? (uint16_t)epx__expert_local(&l.map, id) : (uint16_t)LL_NONE;
    }
    return came;
}

/*
 * Who was heard is the same for all blocks of the call, also when one of them lost patience, or found the rank `masked`
 * before it looked: by the caller, so all blocks do; or by another block in this call, perhaps after a third has heard
 * it. The first to know decides.
 */
static __device__ void agree_on_heard(const ll_dispatch_t &p, ll_head_t &h, const ll_index_t &x, int source, int came,
                                      bool masked)
{
    const ll_common_t &l = p.l;
    uint32_t pairs = l.c.layout.ll.tokens_max * l.topk, base = (uint32_t)source * pairs;
    int all = __syncthreads_and(came == LL_CAME);
    if (threadIdx.x == 0) {
        uint32_t *word = &l.r.decided[source], mine = ll_decision(h.n, all ? 1 : 2), seen = *(volatile uint32_t *)word;
        while (seen >> 2 != mine >> 2) { /* of an older call */
            uint32_t before = atomicCAS(word, seen, mine);
            seen = before == seen ? mine : before;
        }
        h.again = seen & 3;
        if (h.again == 2 && !masked) /* else that was said by whoever masked it */
            ll_give_up(l, h.n, source);
    }
    __syncthreads();
    uint32_t decided = h.again;
    __syncthreads();
    if (decided == 1 && !all)
        (void)read_ids(p, h, x, source); /* they are there: another block has seen them all */
    for (uint32_t i = threadIdx.x; decided == 2 && i < pairs; i += LL_THREADS)
        x.ids[base + i] = (uint16_t)LL_NONE;
}

static __device__ void mark_bits(const ll_dispatch_t &p, const ll_index_t &x)
{
    const ll_common_t &l = p.l;
    uint32_t all = (uint32_t)l.c.ranks * l.c.layout.ll.tokens_max * l.topk;
    for (uint32_t i = threadIdx.x; i < all; i += LL_THREADS) {
        uint32_t e = x.ids[i], u = i / l.topk;
        if (e != LL_NONE)
            atomicOr(&x.bits[(size_t)(l.ranked ? 0 : e) * p.words + u / 32], 1u << u % 32);
    }
}

static __device__ void count_before(const ll_dispatch_t &p, const ll_index_t &x)
{
    uint32_t lane = threadIdx.x % 32;
    for (uint32_t part = threadIdx.x / 32; part < p.parts; part += LL_THREADS / 32) {
        uint32_t sum = 0;
        for (uint32_t first = 0; first < p.words; first += 32) {
            size_t w = (size_t)part * p.words + first + lane;
            uint32_t n = first + lane < p.words ? (uint32_t)__popc(x.bits[w]) : 0, up = n;
            for (int d = 1; d < 32; d *= 2) {
                uint32_t other = __shfl_up_sync(ALL_LANES, up, d);
                up += lane >= (uint32_t)d ? other : 0;
            }
            if (first + lane < p.words)
                x.before[w] = sum + up - n;
            sum += __shfl_sync(ALL_LANES, up, 31);
        }
    }
}

/* The whole block: is that source masked? The same for all its threads: what follows has barriers. With mask_on_timeout
 * other blocks of the kernel write the word meanwhile, so one look counts; else nobody does. */
EPX__DEVICE bool is_masked(const ll_common_t &l, int source)
{
    if (l.mask_on_timeout)
        return __syncthreads_or(*(volatile uint32_t *)&l.masked[source] != 0) != 0;
    return l.masked[source] != 0;
}

/* The whole block. False: stop. `wait_ns`: add the time waited for each source. */
static __device__ bool make_index(const ll_dispatch_t &p, ll_head_t &h, const ll_index_t &x, int64_t *wait_ns)
{
    const ll_common_t &l = p.l;
    uint32_t pairs = l.c.layout.ll.tokens_max * l.topk;
    bool stop = false;
    for (uint32_t i = threadIdx.x; i < p.parts * p.words; i += LL_THREADS)
        x.bits[i] = 0;
    for (int k = 0; k < l.c.ranks; k++) {
        int source = (l.c.rank + k) % l.c.ranks;
        bool masked = is_masked(l, source);
        if (masked && !l.mask_on_timeout) {
            for (uint32_t i = threadIdx.x; i < pairs; i += LL_THREADS)
                x.ids[(uint32_t)source * pairs + i] = (uint16_t)LL_NONE;
            continue;
        }
        int came = masked ? LL_ABSENT : read_ids(p, h, x, source);
        stop = stop || came == LL_STOP;
        if (l.mask_on_timeout)
            agree_on_heard(p, h, x, source, came, masked);
        if (wait_ns && threadIdx.x == 0 && !masked)
            wait_ns[source] += (int64_t)(globaltimer_ns() - h.start);
    }
    if (__syncthreads_or(stop))
        return false;
    mark_bits(p, x);
    __syncthreads();
    count_before(p, x);
    __syncthreads();
    return true;
}

#endif
