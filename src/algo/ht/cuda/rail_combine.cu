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
 * keeper, one warp: credit for the sums of all tokens before the first batch that is not done.
 *
 * stage and rail blocks look at each of their streams in turn and never wait for one. Owner blocks take batches b, b +
 * B,
 * ... in order and wait for what a batch needs; it is no larger than what the rings hold at once, and the first batch
 * that is not done waits for nothing behind it. While anybody stages, one block takes all batches, so that rows of a
 * stream are read in order and `read` is a count.
 *
 * Rows of x in a lease are read in place; my own always. x may be overwritten once every member has told the end of the
 * half.
 */
#include <cuda_runtime.h>

#include "algo/ht/cuda/rail_lend.cuh"
#include "algo/ht/cuda/sum.cuh"

/* ---- rail ---- */

/* How far the block is in the stream towards one domain: pushed chunks lie in the state, records in `hands`. */
EPX__DEVICE uint64_t *packed_word(const ht_rails_t &r, int d)
{
    return &r.hands[(size_t)d * HT_HANDS];
}

/* One thread: the records towards d that may be made now: from one chunk, all their rows there. */
EPX__DEVICE rail_step_t sum_step(const ht_rail_combine_t &p, const ht_lender_t *lenders, bool staged, uint64_t n, int d)
{
    const ht_rails_t &r = *p.c.rails;
    uint32_t total = (uint32_t)p.h.in_count[r.index * r.domains + d], packed = rail_count(*packed_word(r, d), n);
    rail_step_t s = {packed < total ? 1 : 0, packed, 0};
    if (packed == total)
        return s;
    uint32_t chunk = packed / p.cut.rows_per_chunk, end = (chunk + 1) * p.cut.rows_per_chunk;
    if (!rail_room(r, n, d, p.cut, chunk))
        return s;
    end = end < total ? end : total;
    uint32_t most = end - packed < COMBINE_WARPS ? end - packed : COMBINE_WARPS;
    if (!staged)
        s.count = most;
    for (; s.count < most; s.count++) {
        const int32_t *row = p.h.sum_row + ((size_t)d * r.tokens_max + packed + s.count) * (uint32_t)r.members;
        for (int e = 0; e < r.members; e++) {
            if (row[e] >= 0 &&
                !row_staged(p, lenders[e], n, e, d, (uint32_t)(row[e] - p.h.sum_first[d * r.members + e])))
                return s;
        }
    }
    return s;
}

/* Warp: the k-th record towards d. */
template <int dtype>
EPX__DEVICE void sum_record(const ht_rail_combine_t &p, const ht_lender_t *lenders, int d, uint32_t k)
{
    const ht_rails_t &r = *p.c.rails;
    const int32_t *row = p.h.sum_row + ((size_t)d * r.tokens_max + k) * (uint32_t)r.members;
    const int32_t *first = p.h.sum_first + d * r.members;
    char *to = rail_send(r, d) + epx__rail_at(&p.cut, k);
    uint32_t lane = threadIdx.x % 32;
    for (uint64_t v = lane * 16; v < p.row_bytes; v += 512) {
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (int e = 0; e < r.members; e++) {
            if (row[e] >= 0)
                add_16<dtype>(
                    sum, ld_global_16(row_at(p, lenders[e], d, (uint32_t)row[e], (uint32_t)(row[e] - first[e])).x + v));
        }
        st_global_16(to + v, round_16<dtype>(sum));
    }
    if (!p.weights || lane >= p.topk)
        return;
    float sum = 0.0f;
    for (int e = 0; e < r.members; e++) {
        if (row[e] < 0)
            continue;
        const char *weights = row_at(p, lenders[e], d, (uint32_t)row[e], (uint32_t)(row[e] - first[e])).weights;
        sum = __fadd_rn(sum, ld_relaxed_sys_f32((const float *)weights + lane));
    }
    ((float *)(to + p.row_bytes))[lane] = sum;
}

/* One thread: tell the members whose rows are staged how many of (d, my index) have been read, records before `packed`.
 */
EPX__DEVICE void tell_read(const ht_rail_combine_t &p, const ht_lender_t *lenders, uint64_t n, int d, uint32_t from,
                           uint32_t to)
{
    const ht_rails_t &r = *p.c.rails;
    for (int e = 0; e < r.members; e++) {
        int32_t last = -1;
        for (uint32_t k = from; k < to && lender_ring(lenders[e]); k++) {
            int32_t row = p.h.sum_row[((size_t)d * r.tokens_max + k) * (uint32_t)r.members + (uint32_t)e];
            last = row > last ? row : last;
        }
        if (last >= 0)
            st_release_sys_u64(&rail_words(r, e, r.index, d)->read,
                               rail_word(n, (uint32_t)(last - p.h.sum_first[d * r.members + e]) + 1));
    }
}

/* One thread, after the records are made: count them, give their rows back, put the chunk if it is whole. */
EPX__DEVICE bool sum_made(const ht_rail_combine_t &p, const ht_lender_t *lenders, uint64_t n, int d,
                          const rail_step_t &s)
{
    const ht_rails_t &r = *p.c.rails;
    uint32_t total = (uint32_t)p.h.in_count[r.index * r.domains + d], to = s.from + s.count;
    *packed_word(r, d) = rail_word(n, to);
    tell_read(p, lenders, n, d, s.from, to);
    if (to != total && to % p.cut.rows_per_chunk != 0)
        return true;
    return rail_put(p.c, n, d, p.cut, s.from / p.cut.rows_per_chunk, total);
}

template <int dtype>
EPX__DEVICE bool rail_block(const ht_rail_combine_t &p, ht_block_t *b, ht_lender_t *lenders, uint32_t block)
{
    __shared__ rail_step_t step;
    const ht_rails_t &r = *p.c.rails;
    rail_idle_t idle = {};
    if (!read_lenders(p, b->n, lenders))
        return false;
    bool staged = least_ring(p, lenders) != 0;
    for (;;) {
        bool left = false, moved = false;
        int waiting = -1;
        for (uint32_t i = block; i < (uint32_t)r.domains - 1; i += p.rail_blocks) {
            int d = rail_other(r, i), ok = 1;
            __syncthreads(); /* `step` has been read by all */
            if (threadIdx.x == 0)
                step = sum_step(p, lenders, staged, b->n, d);
            __syncthreads();
            left = left || step.go != 0;
            waiting = step.go != 0 ? d : waiting;
            if (step.count == 0)
                continue;
            if (threadIdx.x / 32 < step.count)
                sum_record<dtype>(p, lenders, d, step.from + threadIdx.x / 32);
            moved = true;
            __syncthreads();
            if (threadIdx.x == 0)
                ok = sum_made(p, lenders, b->n, d, step);
            if (!__syncthreads_and(ok))
                return false;
        }
        if (!left)
            return true;
        int ok = 1;
        if (moved)
            rail_moved(&idle);
        else if (threadIdx.x == 0)
            ok = rail_patience(p.c, b->n, &idle, waiting, rail_channel(r, waiting, 0)->peer, HT_STAGE_ROOM);
        if (!__syncthreads_and(ok))
            return false;
    }
}

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

/* Warp: all that this token needs is there: sums of other domains by lanes, then staged rows. False: stop. */
EPX__DEVICE bool token_wait(const ht_rail_combine_t &p, const ht_lender_t *lenders, uint64_t n, uint32_t token)
{
    const ht_rails_t &r = *p.c.rails;
    bool ok = true;
    for (int d = (int)threadIdx.x % 32; d < r.domains && ok; d += 32) {
        int32_t k = d == r.home ? -1 : p.h.cross_at[(size_t)d * r.tokens_max + token];
        const epx_port_channel_t *data = rail_channel(r, d, EPX__RAIL_DATA);
        if (k >= 0)
            ok = rail_wait(p.c, n, d, data->signals, r.state[d].freed_base + (uint32_t)k / p.cut.rows_per_chunk + 1,
                           data->peer, HT_STAGE_COME);
    }
    for (uint32_t slot = threadIdx.x % 32; slot < p.h.slots && ok; slot += 32) {
        size_t at = (size_t)token * p.h.slots + slot;
        int rank = p.h.dst_rank[at];
        if (rank < 0 || !ht_near(p.c, rank) || lender_ring(lenders[r.index_of[rank]]) == 0)
            continue;
        uint32_t j = (uint32_t)(p.h.dst_row[at] - p.h.first[rank]);
        ok = rail_wait(p.c, n, r.home, &rail_words(r, r.index, r.index_of[rank], r.home)->staged, rail_word(n, j + 1),
                       rank, HT_STAGE_STAGED);
    }
    return __all_sync(0xffffffffu, ok) != 0;
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

/* Lane: 16 bytes at `v` of one token. */
template <int dtype>
EPX__DEVICE void owner_piece(const ht_rail_combine_t &p, const ht_lender_t *lenders, uint32_t token, uint64_t v)
{
    const ht_rails_t &r = *p.c.rails;
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int d = 0; d < r.domains; d++) {
        if (d == r.home) {
            float part[8] = {0, 0, 0, 0, 0, 0, 0, 0};
            for (uint32_t slot = 0; slot < p.h.slots; slot++) {
                const char *x = home_at(p, lenders, token, slot).x;
                if (x)
                    add_16<dtype>(part, ld_global_16(x + v));
            }
#pragma unroll
            for (int i = 0; i < 8; i++)
                sum[i] = __fadd_rn(sum[i], part[i]);
        } else {
            const char *record = sum_at(p, d, token);
            if (record)
                add_16<dtype>(sum, ld_global_16(record + v));
        }
    }
    uint64_t at = token * p.row_bytes + v;
    for (int i = 0; i < 2; i++) {
        if (p.bias[i])
            add_16<dtype>(sum, *(const uint4 *)(p.bias[i] + at));
    }
    st_global_16(p.out + at, round_16<dtype>(sum));
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

template <int dtype>
EPX__DEVICE bool owner_token(const ht_rail_combine_t &p, const ht_lender_t *lenders, uint64_t n, uint32_t token)
{
    if (!token_wait(p, lenders, n, token))
        return false;
    for (uint64_t v = threadIdx.x % 32 * 16; v < p.row_bytes; v += 512)
        owner_piece<dtype>(p, lenders, token, v);
    if (p.weights && threadIdx.x % 32 < p.topk)
        owner_weight(p, lenders, token, threadIdx.x % 32);
    return true;
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
        bool ok = warp >= to - from || owner_token<dtype>(p, lenders, b->n, from + warp);
        if (!__syncthreads_and(ok)) /* and all have read what they had to */
            return false;
        owner_read(p, lenders, b->n, from, to);
        if (threadIdx.x == 0)
            st_release_sys_u64(owner_word(*p.c.rails, block), rail_word(b->n, ++done));
    }
    return true;
}

/* ---- keeper ---- */

/* Lane of domain d: credit for the sums of tokens before `token`. 1 given, 0 none; *left: not all yet. -1: stop. */
EPX__DEVICE int keep_sums(const ht_rail_combine_t &p, uint64_t n, int d, uint32_t token, int *left)
{
    const ht_rails_t &r = *p.c.rails;
    uint32_t total = (uint32_t)p.h.cross_count[d];
    if (rail_all_freed(r, n, d, p.cut, total))
        return 0;
    uint32_t rows = epx__rail_below(p.h.cross_token + (size_t)d * r.tokens_max, total, (int32_t)token);
    int moved = rail_free(p.c, n, d, p.cut, rows, total);
    *left |= !rail_all_freed(r, n, d, p.cut, total);
    return moved;
}

/* Lane: tokens before the first batch that is not done, as far as this lane's owner blocks say. */
EPX__DEVICE uint32_t tokens_done(const ht_rail_combine_t &p, uint64_t n, const owner_cut_t &o)
{
    uint32_t undone = UINT32_MAX / o.batch;
    for (uint32_t block = 0; block < o.blocks; block++) {
        uint32_t done = rail_count(ld_acquire_sys_u64(owner_word(*p.c.rails, block)), n);
        uint32_t first = epx__rail_undone(block, o.blocks, done);
        undone = first < undone ? first : undone;
    }
    return undone * o.batch < p.tokens ? undone * o.batch : p.tokens;
}

/* Block, of which one warp stays. */
EPX__DEVICE bool combine_keeper(const ht_rail_combine_t &p, ht_block_t *b, ht_lender_t *lenders)
{
    const ht_rails_t &r = *p.c.rails;
    if (!read_lenders(p, b->n, lenders))
        return false;
    owner_cut_t o = owner_cut(p, lenders);
    for (uint32_t round = 0; threadIdx.x < 32; round++) {
        int left = 0, moved = 0;
        uint32_t token = tokens_done(p, b->n, o);
        for (int d = (int)threadIdx.x; d < r.domains && moved >= 0; d += 32) {
            int one = d == r.home ? 0 : keep_sums(p, b->n, d, token, &left);
            moved = one < 0 ? -1 : moved | one;
        }
        if (__any_sync(0xffffffffu, moved < 0))
            return false;
        if (!__any_sync(0xffffffffu, left != 0))
            return true;
        bool ok = true;
        if (threadIdx.x == 0 &&
            (round & 7) == 0) /* the owners have deadlines, which say more than one of this warp's */
            ok = !rail_stopped(p.c, b->n, (round & 63) == 0);
        if (!__all_sync(0xffffffffu, ok))
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
