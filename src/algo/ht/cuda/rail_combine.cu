/*
 * combine with several domains. Blocks, in this order, all resident:
 *
 * stage: when x or weights lie outside of the leases, my rows for each (reader i, domain d) into a ring of my reserve,
 * one ring each; `staged` to the reader, credit is the reader's `read` (rail_lend.cuh).
 *
 * rail: for each other domain d, my domain's rows of each token of my rail's there, in rank order from +0, rounded
 * once, and their weights' sums, into the send ring; whole chunks are put.
 *
 * owner: my tokens in batches: the domains' sums in domain order, the own domain's in fp32 as it is, the others as they
 * came; then the biases; one rounding.
 *
 * keeper, one warp: looks at what has come from the rails, across PCIe, and tells the owner blocks by a word in GPU
 * memory; credit for the sums of all tokens before the first batch that is not done.
 *
 * stage and rail blocks look at each of their streams in turn and never wait for one. Owner blocks take batches b, b +
 * B, ... in order and wait for what a batch needs; it is no larger than what the rings hold at once, and the first
 * batch that is not done waits for nothing behind it. While anybody stages, one block takes all batches, so that rows
 * of a stream are read in order and `read` is a count.
 *
 * Rows of x in a lease are read in place; my own always. x may be overwritten once every member has told the end of the
 * half.
 */
#include <cuda_runtime.h>

#include "algo/ht/cuda/rail_sum.cuh"

/* ---- owner ---- */

/* How the owner's tokens are cut: the same for owner blocks and the keeper. */
typedef struct owner_cut {
    uint32_t batch, blocks;
} owner_cut_t;

EPX__DEVICE owner_cut_t owner_cut(const ht_rail_combine_t &p, const ht_lender_t *lenders)
{
    uint32_t ring = least_ring(p, lenders), together = epx__rail_together(&p.cut);
    owner_cut_t o = {COMBINE_WARPS, ring ? 1 : p.owner_blocks};
    o.batch = together < o.batch ? together : o.batch;
    o.batch = ring && ring < o.batch ? ring : o.batch;
    return o;
}
/* Batches that owner block `block` has done: its word is behind those of the rail streams. */
EPX__DEVICE uint64_t *owner_word(const ht_rails_t &r, uint32_t block)
{
    return &r.hands[(size_t)r.home * HT_HANDS + block];
}

static_assert(COMBINE_WARPS <= 32, "a lane for each token of a batch");

EPX__DEVICE uint32_t warp_most(uint32_t v)
{
    for (int bits = 16; bits; bits /= 2) {
        uint32_t other = __shfl_xor_sync(0xffffffffu, v, bits);
        v = other > v ? other : v;
    }
    return v;
}

/* Warp: the sums of domain d for tokens [from, to) have come. The keeper knows, and whether the rail is there. */
EPX__DEVICE bool sums_wait(const ht_rail_combine_t &p, uint64_t n, int d, uint32_t from, uint32_t to)
{
    const ht_rails_t &r = *p.c.rails;
    uint32_t lane = threadIdx.x % 32, token = from + lane;
    int32_t k = token < to ? p.h.cross_at[(size_t)d * r.tokens_max + token] : -1;
    uint32_t rows = warp_most((uint32_t)(k + 1));
    bool ok = true;
    if (lane == 0 && rows)
        ok = rail_wait(p.c, n, r.home, &r.state[d].arrived, rail_word(n, rows),
                       rail_channel(r, d, EPX__RAIL_DATA)->peer, HT_STAGE_COME);
    return __all_sync(0xffffffffu, ok) != 0;
}

/* Warp: rows that member e stages for tokens [from, to) are there. */
EPX__DEVICE bool staged_wait(const ht_rail_combine_t &p, uint64_t n, int e, uint32_t from, uint32_t to)
{
    const ht_rails_t &r = *p.c.rails;
    int rank = r.rank_of[r.home * r.members + e];
    uint32_t lane = threadIdx.x % 32, token = from + lane, rows = 0;
    for (uint32_t slot = 0; slot < p.h.slots && token < to; slot++) {
        size_t at = (size_t)token * p.h.slots + slot;
        rows = p.h.dst_rank[at] == rank ? (uint32_t)(p.h.dst_row[at] - p.h.first[rank]) + 1 : rows;
    }
    rows = warp_most(rows);
    bool ok = true;
    if (lane == 0 && rows)
        ok = rail_wait(p.c, n, r.home, &rail_words(r, r.index, e, r.home)->staged, rail_word(n, rows), rank,
                       HT_STAGE_STAGED);
    return __all_sync(0xffffffffu, ok) != 0;
}

/* Block: all that tokens [from, to) need is there. One thread waits for a word: staged ones are across PCIe, and the
 * keeper's would have 496 who look at it if each warp did (31 blocks). */
EPX__DEVICE bool batch_wait(const ht_rail_combine_t &p, const ht_lender_t *lenders, uint64_t n, uint32_t from,
                            uint32_t to)
{
    const ht_rails_t &r = *p.c.rails;
    bool ok = true;
    for (int d = (int)threadIdx.x / 32; d < r.domains && ok; d += COMBINE_WARPS)
        ok = d == r.home || sums_wait(p, n, d, from, to);
    for (int e = (int)threadIdx.x / 32; e < r.members && ok; e += COMBINE_WARPS)
        ok = lender_ring(lenders[e]) == 0 || staged_wait(p, n, e, from, to);
    return __syncthreads_and(ok) != 0;
}

/* The record of domain d's sum of a token; NULL: the token did not go there. */
EPX__DEVICE const char *sum_at(const ht_rail_combine_t &p, int d, uint32_t token)
{
    const ht_rails_t &r = *p.c.rails;
    int32_t k = p.h.cross_at[(size_t)d * r.tokens_max + token];
    return k < 0 ? NULL : rail_receive(r, r.index, d) + epx__rail_at(&p.cut, (uint32_t)k);
}

/* The own domain's row in one slot of a token; x NULL: none. */
EPX__DEVICE rail_from_t home_at(const ht_rail_combine_t &p, const ht_lender_t *lenders, uint32_t token, uint32_t slot)
{
    size_t at = (size_t)token * p.h.slots + slot;
    int rank = p.h.dst_rank[at];
    rail_from_t none = {NULL, NULL};
    if (rank < 0 || !ht_near(p.c, rank))
        return none;
    uint32_t row = (uint32_t)p.h.dst_row[at];
    return row_at(p, lenders[p.c.rails->index_of[rank]], p.c.rails->home, row, row - (uint32_t)p.h.first[rank]);
}

/* Lane: pieces of the own domain's sum of a token, from `v` on, added to `sum` as it is. */
template <int dtype, int pieces>
EPX__DEVICE void home_pieces(const ht_rail_combine_t &p, const ht_lender_t *lenders, uint32_t token, uint64_t v,
                             float (*sum)[8])
{
    float part[pieces][8] = {};
    for (uint32_t slot = 0; slot < p.h.slots; slot++) {
        const char *x = home_at(p, lenders, token, slot).x;
        if (x)
            add_pieces<dtype, pieces>(part, x + v);
    }
#pragma unroll
    for (int i = 0; i < pieces * 8; i++)
        sum[i / 8][i % 8] = __fadd_rn(sum[i / 8][i % 8], part[i / 8][i % 8]);
}

/* Lane: pieces of one token, from `v` on. */
template <int dtype, int pieces>
EPX__DEVICE void owner_pieces(const ht_rail_combine_t &p, const ht_lender_t *lenders, uint32_t token, uint64_t v)
{
    const ht_rails_t &r = *p.c.rails;
    float sum[pieces][8] = {};
    for (int d = 0; d < r.domains; d++) {
        const char *record = d == r.home ? NULL : sum_at(p, d, token);
        if (d == r.home)
            home_pieces<dtype, pieces>(p, lenders, token, v, sum);
        else if (record)
            add_pieces<dtype, pieces>(sum, record + v);
    }
    uint64_t at = token * p.row_bytes + v;
    for (int i = 0; i < 2; i++) {
        if (p.bias[i])
            add_pieces<dtype, pieces>(sum, p.bias[i] + at);
    }
    store_pieces<dtype, pieces>(p.out + at, sum);
}

/* Lane: one weight of one token. */
EPX__DEVICE void owner_weight(const ht_rail_combine_t &p, const ht_lender_t *lenders, uint32_t token, uint32_t k)
{
    const ht_rails_t &r = *p.c.rails;
    float sum = 0.0f;
    for (int d = 0; d < r.domains; d++) {
        if (d == r.home) {
            float part = 0.0f;
            for (uint32_t slot = 0; slot < p.h.slots; slot++) {
                rail_from_t f = home_at(p, lenders, token, slot);
                if (f.x)
                    part = __fadd_rn(part, ld_relaxed_sys_f32((const float *)f.weights + k));
            }
            sum = __fadd_rn(sum, part);
        } else {
            const char *record = sum_at(p, d, token);
            if (record)
                sum = __fadd_rn(sum, ld_relaxed_sys_f32((const float *)(record + p.row_bytes) + k));
        }
    }
    p.out_weights[(size_t)token * p.topk + k] = sum;
}

/* Warp: a token, of which all is there. */
template <int dtype>
EPX__DEVICE void owner_token(const ht_rail_combine_t &p, const ht_lender_t *lenders, uint32_t token)
{
    uint64_t v = threadIdx.x % 32 * 16;
    for (; v + (SUM_PIECES - 1) * 512 < p.row_bytes; v += SUM_PIECES * 512)
        owner_pieces<dtype, SUM_PIECES>(p, lenders, token, v);
    for (; v < p.row_bytes; v += 512)
        owner_pieces<dtype, 1>(p, lenders, token, v);
    if (p.weights && threadIdx.x % 32 < p.topk)
        owner_weight(p, lenders, token, threadIdx.x % 32);
}

/* Thread e: rows of member e that tokens [from, to) had there, when they are staged. */
EPX__DEVICE void owner_read(const ht_rail_combine_t &p, ht_lender_t *lenders, uint64_t n, uint32_t from, uint32_t to)
{
    const ht_rails_t &r = *p.c.rails;
    for (int e = (int)threadIdx.x; e < r.members; e += (int)blockDim.x) {
        int rank = r.rank_of[r.home * r.members + e];
        uint32_t before = lenders[e].read;
        for (uint32_t token = from; token < to && lender_ring(lenders[e]); token++) {
            for (uint32_t slot = 0; slot < p.h.slots; slot++)
                lenders[e].read += p.h.dst_rank[(size_t)token * p.h.slots + slot] == rank;
        }
        if (lenders[e].read != before)
            st_release_sys_u64(&rail_words(r, e, r.index, r.home)->read, rail_word(n, lenders[e].read));
    }
}

template <int dtype>
EPX__DEVICE bool owner_block(const ht_rail_combine_t &p, ht_block_t *b, ht_lender_t *lenders, uint32_t block)
{
    if (!read_lenders(p, b->n, lenders))
        return false;
    owner_cut_t o = owner_cut(p, lenders);
    uint32_t warp = threadIdx.x / 32, done = 0;
    if (block >= o.blocks)
        return true;
    for (uint32_t q = block; q * o.batch < p.tokens; q += o.blocks) {
        uint32_t from = q * o.batch, left = p.tokens - from, to = from + (left < o.batch ? left : o.batch);
        if (!batch_wait(p, lenders, b->n, from, to))
            return false;
        if (warp < to - from)
            owner_token<dtype>(p, lenders, from + warp);
        __syncthreads(); /* all have read what they had to */
        owner_read(p, lenders, b->n, from, to);
        if (threadIdx.x == 0)
            st_release_sys_u64(owner_word(*p.c.rails, block), rail_word(b->n, ++done));
    }
    return true;
}

/* ---- keeper ---- */

/* Lane of domain d: what has come of its sums, to the owner blocks. 1 news, 0 none. */
EPX__DEVICE int keep_come(const ht_rail_combine_t &p, uint64_t n, int d)
{
    const ht_rails_t &r = *p.c.rails;
    uint32_t total = (uint32_t)p.h.cross_count[d], told = rail_count(r.state[d].arrived, n);
    uint32_t come = told < total ? rail_come(r, d, p.cut, total) : told;
    if (come <= told)
        return 0;
    st_release_sys_u64(&r.state[d].arrived, rail_word(n, come));
    return 1;
}

/* Lane of domain d: credit for the sums of tokens before `token`. 1 given, 0 none, -1: stop. */
EPX__DEVICE int keep_sums(const ht_rail_combine_t &p, uint64_t n, int d, uint32_t token)
{
    const ht_rails_t &r = *p.c.rails;
    uint32_t total = (uint32_t)p.h.cross_count[d];
    if (rail_all_freed(r, n, d, p.cut, total))
        return 0;
    uint32_t rows = epx__rail_below(p.h.cross_token + (size_t)d * r.tokens_max, total, (int32_t)token);
    return rail_free(p.c, n, d, p.cut, rows, total);
}

/* Warp: tokens before the first batch that is not done. */
EPX__DEVICE uint32_t tokens_done(const ht_rail_combine_t &p, uint64_t n, const owner_cut_t &o)
{
    uint32_t undone = UINT32_MAX / o.batch;
    for (uint32_t block = threadIdx.x % 32; block < o.blocks; block += 32) {
        uint32_t done = rail_count(ld_acquire_sys_u64(owner_word(*p.c.rails, block)), n);
        uint32_t first = epx__rail_undone(block, o.blocks, done);
        undone = first < undone ? first : undone;
    }
    undone = ~warp_most(~undone); /* the least */
    __syncwarp();                 /* what a lane has seen, all have */
    return undone * o.batch < p.tokens ? undone * o.batch : p.tokens;
}

/* Warp, a round in which nothing moved; `d`: the lane's domain from which more must come, or -1. False: stop. The
 * owners have the deadlines, and say more than one of this warp's. */
EPX__DEVICE bool keeper_patience(const ht_rail_combine_t &p, uint64_t n, rail_idle_t *idle, int d)
{
    bool ok = true;
    if ((idle->rounds & 7) == 0) {
        if (threadIdx.x == 0)
            ok = !ht_stopped(p.c, n, (idle->rounds & 63) == 0);
        ok = ok && (d < 0 || rail_stays(p.c, n, idle, d));
    }
    idle->rounds++;
    return __all_sync(0xffffffffu, ok) != 0;
}

/* Block, of which one warp stays. */
EPX__DEVICE bool combine_keeper(const ht_rail_combine_t &p, ht_block_t *b, ht_lender_t *lenders)
{
    const ht_rails_t &r = *p.c.rails;
    if (!read_lenders(p, b->n, lenders))
        return false;
    owner_cut_t o = owner_cut(p, lenders);
    rail_idle_t idle = {};
    uint32_t freed = 0; /* tokens */
    while (threadIdx.x < 32) {
        uint32_t token = tokens_done(p, b->n, o);
        int left = 0, moved = 0, waits = -1;
        for (int d = (int)threadIdx.x; d < r.domains && moved >= 0; d += 32) {
            uint32_t total = d == r.home ? 0 : (uint32_t)p.h.cross_count[d];
            if (total == 0)
                continue;
            int come = keep_come(p, b->n, d), one = token > freed ? keep_sums(p, b->n, d, token) : 0;
            moved = one < 0 ? -1 : moved | one | come;
            left |= !rail_all_freed(r, b->n, d, p.cut, total);
            waits = rail_count(r.state[d].arrived, b->n) < total ? d : waits;
        }
        freed = token;
        if (__any_sync(0xffffffffu, moved < 0))
            return false;
        if (!__any_sync(0xffffffffu, left != 0))
            return true;
        if (__any_sync(0xffffffffu, moved != 0))
            rail_moved(&idle);
        else if (!keeper_patience(p, b->n, &idle, waits))
            return false;
    }
    return true;
}

/* ---- the half ---- */

template <int dtype>
EPX__DEVICE void combine_role(const ht_rail_combine_t &p, ht_block_t *b, ht_lender_t *lenders)
{
    uint32_t block = blockIdx.x;
    if (block < p.stage_blocks) {
        stage_block(p, b, block, p.stage_blocks);
        return;
    }
    block -= p.stage_blocks;
    if (block < p.rail_blocks) {
        rail_block<dtype>(p, b, lenders, block);
        return;
    }
    block -= p.rail_blocks;
    if (block < p.owner_blocks)
        owner_block<dtype>(p, b, lenders, block);
    else
        combine_keeper(p, b, lenders);
}

template <int dtype>
__global__ void __launch_bounds__(COMBINE_THREADS, 1)
    ht_rail_combine_kernel(const __grid_constant__ ht_rail_combine_t p)
{
    extern __shared__ __align__(128) char shared[];
    __shared__ ht_block_t b;
    if (!ht_enter(p.c, &b))
        return;
    if (blockIdx.x == 0 && rail_mail(p.c, b.n))
        publish_x(p, b.n);
    combine_role<dtype>(p, &b, (ht_lender_t *)shared);
    if (!ht_last_block(p.c, &b))
        return;
    bool good = b.stop == 0;
    if (good) {
        ht_tell_end(p.c, b.n);
        good = ht_wait_ends(p.c, &b); /* the readers of my rows have read them: x may be overwritten */
    }
    const ht_rails_t *r = p.c.rails;
    for (int d = (int)threadIdx.x; good && d < r->domains; d += (int)blockDim.x) {
        if (d != r->home)
            rail_count_on(*r, p.cut, d, (uint32_t)p.h.in_count[r->index * r->domains + d],
                          (uint32_t)p.h.cross_count[d]);
    }
    ht_leave(p.c, &b, good);
}

static int launch(const ht_rail_combine_t *p, uint32_t blocks, cudaStream_t stream)
{
    if (p->dtype == EPX_FP32)
        ht_rail_combine_kernel<EPX_FP32><<<blocks, COMBINE_THREADS, p->shared_bytes, stream>>>(*p);
    else if (p->dtype == EPX_FP16)
        ht_rail_combine_kernel<EPX_FP16><<<blocks, COMBINE_THREADS, p->shared_bytes, stream>>>(*p);
    else
        ht_rail_combine_kernel<EPX_BF16><<<blocks, COMBINE_THREADS, p->shared_bytes, stream>>>(*p);
    return (int)cudaGetLastError();
}

extern "C" int epx__ht_launch_rail_combine(const ht_rail_combine_t *p, uint32_t blocks, void *stream)
{
    return launch(p, blocks, (cudaStream_t)stream);
}

extern "C" int epx__ht_load_rail_combine(uint32_t shared_bytes, void *stream)
{
    static const void *const kernels[] = {(const void *)ht_rail_combine_kernel<EPX_BF16>,
                                          (const void *)ht_rail_combine_kernel<EPX_FP16>,
                                          (const void *)ht_rail_combine_kernel<EPX_FP32>};
    for (int i = 0; i < 3; i++) {
        ht_rail_combine_t p = {};
        p.dtype = EPX_BF16 + i;
        p.shared_bytes = shared_bytes;
        cudaError_t error =
            cudaFuncSetAttribute(kernels[i], cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
        int launched = error == cudaSuccess ? launch(&p, 1, (cudaStream_t)stream) : (int)error;
        if (launched != 0)
            return launched;
    }
    return 0;
}
