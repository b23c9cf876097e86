/*
 * begin: from top-k ids (or a mask) to every row's final place.
 *
 *   1  all blocks     tokens in groups of 32, a warp each, a lane a token: which tokens of the group go to rank r (a
 *                     word of bits), how many to each expert
 *      -- grid barrier --
 *   2  all blocks     per rank: sums over the groups. Block 0 posts the totals and the counts of experts as it has them
 *   3  the others     dst_rank, dst_row: tokens of earlier groups + tokens of earlier lanes, while counts are on their
 *                     way
 *   4  block 0        hears all counts, tells the host as they come, first rows by prefix sums into the record
 *      the others     hear what sources before this one send: the first rows
 *   5  all blocks     the first row at its rank is added to each dst_row
 *
 * Several domains: block 0 sends to the rails and hears them before it posts (rail_begin.cuh), and a second grid
 * barrier stands before 5. Everything the host learns is also in the handle's device arrays, so that a replayed graph
 * needs no host. A grid of one block does all.
 */
#include <cuda_runtime.h>

#include "algo/ht/cuda/counts.cuh"

#define BEGIN_THREADS 512
#define HISTOGRAM 1024u /* experts that a block counts in shared memory */

/* All blocks have arrived `nth` times. The grid is resident as a whole (see epx__ht_launch_begin's caller). */
EPX__DEVICE bool grid_barrier(const ht_common_t &c, ht_block_t *b, uint32_t nth)
{
    __syncthreads();
    if (threadIdx.x == 0) {
        add_acq_rel_gpu_u32(&c.state->barrier, 1);
        uint32_t want = nth * gridDim.x;
        uint64_t start = 0;
        for (uint32_t polls = 1; ld_acquire_gpu_u32(&c.state->barrier) < want; polls++) {
            if ((polls & 15) != 0)
                continue;
            uint64_t now = globaltimer_ns();
            if (start == 0)
                start = now;
            /* Block 0 may wait out its own deadline for a peer meanwhile: leave it the time. */
            if (now - start > c.timeout_ns + c.timeout_ns / 2 + (c.rails ? c.timeout_ns : 0)) {
                ht_fault_t f = {EPX_E_TIMEOUT, HT_STAGE_BARRIER, c.rank, want, 0, now - start};
                ht_fail(c, b->n, f);
            }
            if (ht_stopped(c, b->n, (polls & 1023) == 0)) {
                b->stop = 1;
                break;
            }
        }
    }
    __syncthreads();
    return b->stop == 0;
}

EPX__DEVICE int64_t topk_id(const ht_begin_t &p, size_t i)
{
    int64_t id = p.bits == 32 ? (int64_t)((const int32_t *)p.topk_idx)[i] : ((const int64_t *)p.topk_idx)[i];
    return id >= 0 && id < (int64_t)p.map.experts ? id : (id == -1 ? -1 : -2);
}

/* ---- which tokens go where ---- */

/*
 * Lane: which of the ranks r0 .. r0 + 31 its token goes to. The loads of several ids are under way together. `counts`:
 * the ids are counted there, if not NULL.
 */
EPX__DEVICE uint32_t rank_bits(const ht_begin_t &p, uint32_t token, uint32_t r0, uint32_t *counts)
{
    uint32_t bits = 0, bad = 0, ranks = (uint32_t)p.c.ranks;
    for (uint32_t i = 0; p.topk == 0 && i < 32 && r0 + i < ranks; i++)
        bits |= (p.in_rank[(size_t)token * ranks + r0 + i] ? 1u : 0u) << i;
    for (uint32_t k0 = 0; k0 < p.topk; k0 += 8) {
        int64_t id[8];
#pragma unroll
        for (uint32_t i = 0; i < 8; i++)
            id[i] = k0 + i < p.topk ? topk_id(p, (size_t)token * p.topk + k0 + i) : -1;
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            bad += id[i] == -2;
            if (id[i] < 0)
                continue;
            uint32_t rank = (uint32_t)epx__expert_rank(&p.map, id[i]) - r0;
            bits |= rank < 32 ? 1u << rank : 0;
            if (counts)
                atomicAdd(&counts[id[i]], 1u);
        }
    }
    if (bad && counts)
        atomicAdd(&p.c.state->bad_ids, bad);
    return bits;
}

/* `histogram`: shared memory. */
EPX__DEVICE void count_groups(const ht_begin_t &p, uint32_t *histogram)
{
    uint32_t groups = (p.tokens + 31) / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    uint32_t ranks = (uint32_t)p.c.ranks, experts = p.topk && p.map.experts <= HISTOGRAM ? p.map.experts : 0;
    uint32_t *counts = experts ? histogram : p.expert_count;
    for (uint32_t e = threadIdx.x; e < experts; e += blockDim.x)
        histogram[e] = 0;
    __syncthreads();
    for (uint32_t g = threadIdx.x / 32 * gridDim.x + blockIdx.x; g < groups; g += gridDim.x * warps) {
        for (uint32_t r0 = 0; r0 < ranks; r0 += 32) {
            uint32_t bits = 0, mine = 0;
            if (g * 32 + lane < p.tokens)
                bits = rank_bits(p, g * 32 + lane, r0, r0 == 0 ? counts : NULL);
            for (uint32_t i = 0; i < 32 && r0 + i < ranks; i++) {
                uint32_t tokens = __ballot_sync(0xffffffffu, bits >> i & 1);
                mine = lane == i ? tokens : mine;
            }
            if (r0 + lane < ranks)
                p.bit[(size_t)(r0 + lane) * p.groups_max + g] = mine;
        }
    }
    __syncthreads();
    for (uint32_t e = threadIdx.x; e < experts; e += blockDim.x) {
        if (histogram[e])
            atomicAdd(&p.expert_count[e], histogram[e]);
    }
}

/* ---- places ---- */

/* Groups that a block places: consecutive ones. Block 0 has other things to do, unless it is alone. */
typedef struct ht_range {
    uint32_t from, to;
} ht_range_t;

EPX__DEVICE ht_range_t block_range(const ht_begin_t &p)
{
    uint32_t groups = (p.tokens + 31) / 32, blocks = gridDim.x > 1 ? gridDim.x - 1 : 1;
    uint32_t block = gridDim.x > 1 ? blockIdx.x - 1 : 0, each = (groups + blocks - 1) / blocks;
    ht_range_t s = {block * each, block * each + each};
    if (blockIdx.x == 0 && gridDim.x > 1)
        s.from = s.to = 0;
    s.to = s.to < groups ? s.to : groups;
    return s;
}

/* Warp: the total of one rank's bits, and for the groups of the share what those before them have. A lane has four
 * groups at a time. */
EPX__DEVICE uint32_t sum_groups(const ht_begin_t &p, ht_range_t share, int rank)
{
    uint32_t groups = (p.tokens + 31) / 32, lane = threadIdx.x % 32, total = 0;
    const uint32_t *bit = p.bit + (size_t)rank * p.groups_max;
    uint32_t *before = p.before + (size_t)rank * p.groups_max;
    for (uint32_t g0 = 0; g0 < groups; g0 += 128) {
        uint32_t g = g0 + lane * 4, count[4], sum;
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            count[i] = g + i < groups ? (uint32_t)__popc(__ldcg(&bit[g + i])) : 0;
        uint32_t mine = sum = count[0] + count[1] + count[2] + count[3];
        for (uint32_t d = 1; d < 32; d *= 2) {
            uint32_t left = __shfl_up_sync(0xffffffffu, sum, d);
            sum += lane >= d ? left : 0;
        }
        uint32_t at = total + sum - mine;
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            if (g + i >= share.from && g + i < share.to)
                before[g + i] = at;
            at += count[i];
        }
        total += __shfl_sync(0xffffffffu, sum, 31);
    }
    return total;
}

EPX__DEVICE int32_t row_at(const ht_begin_t &p, uint32_t rank, uint32_t group, uint32_t lane)
{
    size_t i = (size_t)rank * p.groups_max + group;
    return (int32_t)(__ldcg(&p.before[i]) + (uint32_t)__popc(__ldcg(&p.bit[i]) & ((1u << lane) - 1u)));
}

/* Lane: a token's ranks, and its rows there, counted from this source's first. */
EPX__DEVICE void place_token(const ht_begin_t &p, uint32_t token, uint32_t group, uint32_t lane)
{
    int32_t *rank_out = p.h.dst_rank + (size_t)token * p.h.slots, *row_out = p.h.dst_row + (size_t)token * p.h.slots;
    uint32_t used = 0;
    for (uint32_t r0 = 0; r0 < (uint32_t)p.c.ranks; r0 += 32) {
        uint32_t bits = rank_bits(p, token, r0, NULL);
        for (; bits && used < p.h.slots; bits &= bits - 1, used++) {
            uint32_t rank = r0 + (uint32_t)__ffs((int)bits) - 1;
            rank_out[used] = (int32_t)rank;
            row_out[used] = row_at(p, rank, group, lane);
        }
    }
    for (; used < p.h.slots; used++)
        rank_out[used] = row_out[used] = -1;
}

EPX__DEVICE void place_groups(const ht_begin_t &p, ht_range_t share)
{
    uint32_t lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (uint32_t g = share.from + threadIdx.x / 32; g < share.to; g += warps) {
        if (g * 32 + lane < p.tokens)
            place_token(p, g * 32 + lane, g, lane);
    }
}

/* The same threads as above. */
EPX__DEVICE void shift_groups(const ht_begin_t &p, ht_range_t share, const uint32_t *first)
{
    uint32_t lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (uint32_t g = share.from + threadIdx.x / 32; g < share.to; g += warps) {
        uint32_t token = g * 32 + lane;
        size_t at = (size_t)token * p.h.slots;
        for (uint32_t slot = 0; token < p.tokens && slot < p.h.slots; slot++) {
            int32_t rank = p.h.dst_rank[at + slot];
            if (rank >= 0)
                p.h.dst_row[at + slot] += (int32_t)first[rank];
        }
    }
}

/* Thread r: prefix sums that concern rank r, and whether its rows fit. */
EPX__DEVICE void place_rank(const ht_begin_t &p, uint64_t n, int r)
{
    const ht_common_t &c = p.c;
    int32_t first = 0, start = 0;
    uint64_t total = 0;
    for (int i = 0; i < c.ranks; i++) {
        int32_t to_r = p.h.matrix[(size_t)i * (uint32_t)c.ranks + (uint32_t)r];
        first += i < c.rank ? to_r : 0;
        total += (uint32_t)to_r;
        start += i < r ? p.h.matrix[(size_t)i * (uint32_t)c.ranks + (uint32_t)c.rank] : 0;
    }
    p.h.first[r] = first;
    p.h.start[r] = start;
    uint64_t room = p.recv_max_of[r] ? p.recv_max_of[r] : 0x7fffffffu;
    if (total > room) {
        ht_fault_t f = {EPX_E_OVERFLOW, HT_STAGE_OVERFLOW, r, room, total, 0};
        ht_fail(c, n, f);
    }
}

/* Block 0. The host is told the last of its words after that: who has them all knows of rows that do not fit. */
EPX__DEVICE void place_ranks(const ht_begin_t &p, uint64_t n)
{
    for (int r = (int)threadIdx.x; r < p.c.ranks; r += (int)blockDim.x)
        place_rank(p, n, r);
    __syncthreads();
    if (threadIdx.x != 0)
        return;
    uint32_t failed = *(volatile uint32_t *)&p.c.state->fault, bad = __ldcg(&p.c.state->bad_ids);
    if (failed)
        fence_acq_rel_sys(); /* the record comes before the word */
    p.c.host->bad_ids = bad;
    tell_host(p, HT_HOST_BAD(p.c.ranks), bad);
}

/* ---- counts ---- */

/* What blocks keep in shared memory. */
typedef struct ht_tables {
    uint32_t *mine;  /* [ranks] my tokens that go there */
    uint32_t *first; /* [ranks] my first row there */
} ht_tables_t;

/* All blocks: sums. Block 0 of a domain that is alone posts what it knows; warps take posting and summing in turn. */
EPX__DEVICE void sum_ranks(const ht_begin_t &p, uint64_t n, ht_range_t share, ht_tables_t t)
{
    int warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32, ranks = p.c.ranks;
    bool posts = blockIdx.x == 0 && !p.c.rails;
    for (int i = warp; i < (posts ? 2 * ranks : ranks); i += warps) {
        if (i >= ranks) {
            if (i - ranks != p.c.rank)
                post_experts(p, n, i - ranks);
            continue;
        }
        uint32_t total = sum_groups(p, share, i);
        if (posts)
            post_total(p.c, n, i, total);
        if (threadIdx.x % 32 == 0) {
            t.mine[i] = total;
            t.first[i] = 0;
        }
    }
    __syncthreads();
}

/* Blocks but the first: my first row at every rank, from what sources before me send there. */
EPX__DEVICE bool hear_before(const ht_begin_t &p, uint64_t n, uint32_t *first)
{
    uint32_t ranks = (uint32_t)p.c.ranks;
    bool ok = true;
    for (uint32_t cell = threadIdx.x; cell < (uint32_t)p.c.rank * ranks && ok; cell += blockDim.x) {
        uint32_t count = 0;
        ok = hear_count(p.c, n, (int)(cell / ranks), cell % ranks, &count);
        atomicAdd(&first[cell % ranks], count);
    }
    return ok;
}

/* One domain. False: stop. */
EPX__DEVICE bool places_near(const ht_begin_t &p, uint64_t n, ht_range_t share, ht_tables_t t)
{
    bool ok;
    if (blockIdx.x == 0) {
        ok = hear_matrix(p, n, t.mine, t.first);
        ok = ok && hear_experts(p, n);
        if (!__syncthreads_and(ok))
            return false;
        place_ranks(p, n);
        place_groups(p, share);
    } else {
        place_groups(p, share);
        if (!__syncthreads_and(hear_before(p, n, t.first)))
            return false;
    }
    shift_groups(p, share, t.first);
    return true;
}

/* Several domains, block 0. False: stop. */
static __device__ __noinline__ bool exchange_far(const ht_begin_t &p, uint64_t n, ht_tables_t t)
{
    const ht_common_t &c = p.c;
    int warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32;
    for (int r = (int)threadIdx.x; r < c.ranks; r += (int)blockDim.x)
        p.h.matrix[(size_t)c.rank * (uint32_t)c.ranks + (uint32_t)r] = (int32_t)t.mine[r];
    __syncthreads();
    if (!rail_begin_out(p, n) || !rail_begin_heard(p, n))
        return false;
    fence_acq_rel_sys(); /* who hears the counts below reads the inbox that is full now */
    for (int r = warp; r < c.ranks; r += warps) {
        post_total(c, n, r, t.mine[r]);
        if (ht_neighbour(c, r))
            post_experts(p, n, r);
    }
    if (!__syncthreads_and(hear_matrix(p, n, t.mine, t.first)))
        return false;
    fence_acq_rel_sys();
    rail_begin_in(p, n);
    __syncthreads();
    rail_begin_lists(p, n);
    for (uint32_t i = threadIdx.x; i < (uint32_t)c.ranks * (uint32_t)c.ranks; i += blockDim.x)
        tell_host(p, i, (uint32_t)p.h.matrix[i]);
    for (uint32_t i = threadIdx.x; i < (uint32_t)c.ranks; i += blockDim.x)
        tell_host(p, HT_HOST_TOKENS(c.ranks) + i, (uint32_t)p.h.tokens_of[i]);
    if (!__syncthreads_and(hear_experts(p, n)))
        return false;
    place_ranks(p, n);
    return true;
}

EPX__DEVICE bool places_far(const ht_begin_t &p, ht_block_t *b, ht_range_t share, ht_tables_t t)
{
    place_groups(p, share);
    if (blockIdx.x == 0 && !exchange_far(p, b->n, t))
        return false;
    if (!grid_barrier(p.c, b, 2))
        return false;
    for (int r = (int)threadIdx.x; r < p.c.ranks; r += (int)blockDim.x)
        t.first[r] = (uint32_t)__ldcg(&p.h.first[r]);
    __syncthreads();
    shift_groups(p, share, t.first);
    return true;
}

/* Shared memory: the tables. */
__global__ void __launch_bounds__(BEGIN_THREADS) ht_begin_kernel(const __grid_constant__ ht_begin_t p)
{
    extern __shared__ __align__(128) char shared[];
    __shared__ ht_block_t b;
    __shared__ uint32_t histogram[HISTOGRAM];
    ht_lead_t lead = {};
    if (!ht_enter_led(p.c, &b, &lead))
        return;
    ht_tables_t t = {(uint32_t *)shared, (uint32_t *)shared + p.c.ranks};
    ht_range_t share = block_range(p);
    bool ok = blockIdx.x != 0 || mail_free(p.c, b.n, lead.consumed);
    count_groups(p, histogram);
    bool passed = grid_barrier(p.c, &b, 1);
    if (__syncthreads_and(ok && passed)) {
        sum_ranks(p, b.n, share, t);
        if (p.c.rails)
            places_far(p, &b, share, t);
        else
            places_near(p, b.n, share, t);
    }
    if (!ht_count_block(p.c, &b, true)) /* all blocks have read the messages */
        return;
    for (uint32_t e = threadIdx.x; p.topk != 0 && e < p.map.experts; e += blockDim.x)
        p.expert_count[e] = 0;
    ht_leave(p.c, &b, b.stop == 0);
}

extern "C" int epx__ht_launch_begin(const ht_begin_t *p, uint32_t blocks, void *stream)
{
    size_t shared = 2 * sizeof(uint32_t) * (uint32_t)p->c.ranks;
    ht_begin_kernel<<<blocks, BEGIN_THREADS, shared, (cudaStream_t)stream>>>(*p);
    return (int)cudaGetLastError();
}

/* The first launch of a kernel may load it and wait for the whole device, where kernels of other ranks wait for this
 * one: so it happens at creation, with nothing to do. */
extern "C" int epx__ht_load_begin(void *stream)
{
    ht_begin_t begin = {};
    ht_begin_kernel<<<1, BEGIN_THREADS, 0, (cudaStream_t)stream>>>(begin);
    return (int)cudaGetLastError();
}
