/*
 * begin: from top-k ids (or a mask) to every row's final place.
 *
 *   1  all blocks   tokens in groups of 32, a warp each, a lane a token: which tokens of the group go to rank r (a word
 * of bits), how many to each expert
 *      -- grid barrier --
 *   2  block 0      per rank: sums over the groups; posts the counts to every peer, reads theirs; first rows by prefix
 * sums; counts into host memory. Several domains: to and from the rails first, see rail_begin.cuh
 *      -- grid barrier --
 *   3  all blocks   dst_rank, dst_row: first row at that rank + tokens of earlier groups + tokens of earlier lanes
 *
 * Everything the host learns is also in the handle's device arrays, so that a replayed graph needs no host.
 */
#include <cuda_runtime.h>

#include "algo/ht/cuda/rail_begin.cuh"

#define BEGIN_THREADS 512

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

/* ---- stage 1 ---- */

EPX__DEVICE void count_token(const ht_begin_t &p, uint32_t token, uint32_t group, uint32_t mine)
{
    if (p.topk == 0) {
        for (int r = 0; r < p.c.ranks; r++) {
            if (p.in_rank[(size_t)token * (uint32_t)p.c.ranks + (uint32_t)r])
                atomicOr(&p.bit[(size_t)r * p.groups_max + group], mine);
        }
        return;
    }
    uint32_t bad = 0;
    for (uint32_t k = 0; k < p.topk; k++) {
        int64_t id = topk_id(p, (size_t)token * p.topk + k);
        bad += id == -2;
        if (id < 0)
            continue;
        atomicOr(&p.bit[(size_t)epx__expert_rank(&p.map, id) * p.groups_max + group], mine);
        atomicAdd(&p.expert_count[id], 1u);
    }
    if (bad)
        atomicAdd(&p.c.state->bad_ids, bad);
}

EPX__DEVICE void count_groups(const ht_begin_t &p)
{
    uint32_t groups = (p.tokens + 31) / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (uint32_t g = threadIdx.x / 32 * gridDim.x + blockIdx.x; g < groups; g += gridDim.x * warps) {
        for (uint32_t r = lane; r < (uint32_t)p.c.ranks; r += 32)
            p.bit[(size_t)r * p.groups_max + g] = 0;
        __syncwarp();
        uint32_t token = g * 32 + lane;
        if (token < p.tokens)
            count_token(p, token, g, 1u << lane);
    }
}

/* ---- stage 2 ---- */

/* Warp: sums of one rank's bits over the groups, and the total. */
EPX__DEVICE uint32_t sum_groups(const ht_begin_t &p, int rank)
{
    uint32_t groups = (p.tokens + 31) / 32, lane = threadIdx.x % 32, total = 0;
    for (uint32_t g0 = 0; g0 < groups; g0 += 32) {
        uint32_t g = g0 + lane;
        uint32_t count = g < groups ? (uint32_t)__popc(__ldcg(&p.bit[(size_t)rank * p.groups_max + g])) : 0,
                 sum = count;
        for (uint32_t d = 1; d < 32; d *= 2) {
            uint32_t left = __shfl_up_sync(0xffffffffu, sum, d);
            sum += lane >= d ? left : 0;
        }
        if (g < groups)
            p.before[(size_t)rank * p.groups_max + g] = total + sum - count;
        total += __shfl_sync(0xffffffffu, sum, 31);
    }
    return total;
}

EPX__DEVICE uint32_t experts_at(const ht_begin_t &p, int rank)
{
    if (p.topk == 0)
        return 0;
    return p.expert_list ? (uint32_t)(p.expert_start[rank + 1] - p.expert_start[rank]) : p.map.per_rank;
}
EPX__DEVICE uint32_t expert_of(const ht_begin_t &p, int rank, uint32_t local)
{
    return p.expert_list ? (uint32_t)p.expert_list[p.expert_start[rank] + (int32_t)local]
                         : (uint32_t)rank * p.map.per_rank + local;
}
EPX__DEVICE const int32_t *expert_counts(const ht_common_t &c, const epx__message_t *m)
{
    return (const int32_t *)(m + 1) + c.ranks;
}

/* Warp: my counts to one peer. */
EPX__DEVICE bool post_counts(const ht_begin_t &p, uint64_t n, int to)
{
    const ht_common_t &c = p.c;
    uint32_t lane = threadIdx.x % 32;
    int ok = 1;
    if (lane == 0) {
        epx__message_t *m = ht_slot(c, n, to);
        ok = m != NULL;
        if (m) {
            m->tokens = p.tokens;
            m->recv_max = p.recv_max;
        }
    }
    if (!__shfl_sync(0xffffffffu, ok, 0))
        return false;
    epx__message_t *m = mail_at(c, c.peers[to], c.rank, n);
    int32_t *to_rank = (int32_t *)(m + 1), *to_expert = to_rank + c.ranks;
    for (int r = (int)lane; r < c.ranks; r += 32)
        to_rank[r] = p.h.matrix[(size_t)c.rank * (uint32_t)c.ranks + (uint32_t)r];
    uint32_t experts = experts_at(p, to);
    for (uint32_t i = lane; i < experts; i += 32)
        to_expert[i] = (int32_t)__ldcg(&p.expert_count[expert_of(p, to, i)]);
    __syncwarp();
    if (lane == 0)
        st_release_sys_u64(&m->sequence, n);
    return true;
}

/* Warp: one peer's counts. */
EPX__DEVICE bool read_counts(const ht_begin_t &p, uint64_t n, int from)
{
    const ht_common_t &c = p.c;
    uint32_t lane = threadIdx.x % 32;
    int ok = 1;
    if (lane == 0)
        ok = ht_message(c, n, from) != NULL;
    if (!__shfl_sync(0xffffffffu, ok, 0))
        return false;
    const epx__message_t *m = mail_at(c, c.window, from, n);
    const uint32_t *to_rank = (const uint32_t *)(m + 1);
    for (int r = (int)lane; r < c.ranks; r += 32)
        p.h.matrix[(size_t)from * (uint32_t)c.ranks + (uint32_t)r] = (int32_t)ld_relaxed_sys_u32(&to_rank[r]);
    if (lane == 0) {
        p.h.tokens_of[from] = (int32_t)ld_relaxed_sys_u64(&m->tokens);
        p.recv_max_of[from] = ld_relaxed_sys_u64(&m->recv_max);
    }
    return true;
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

/* Pairs (row, local expert) over all sources, rounded up: into host memory. */
EPX__DEVICE void tell_experts(const ht_begin_t &p, uint64_t n)
{
    const ht_common_t &c = p.c;
    uint32_t experts = experts_at(p, c.rank);
    for (uint32_t i = threadIdx.x; i < experts; i += blockDim.x) {
        uint32_t sum = __ldcg(&p.expert_count[expert_of(p, c.rank, i)]);
        for (int s = 0; s < c.ranks; s++) {
            if (ht_neighbour(c, s))
                sum += ld_relaxed_sys_u32((const uint32_t *)expert_counts(c, mail_at(c, c.window, s, n)) + i);
        }
        if (c.rails)
            sum += rail_expert_rows(p, n, expert_of(p, c.rank, i));
        p.h.host_experts[i] = epx__align_rows((int32_t)sum, p.alignment);
    }
}

EPX__DEVICE void tell_host(const ht_begin_t &p, uint64_t n)
{
    const ht_common_t &c = p.c;
    uint32_t cells = (uint32_t)c.ranks * (uint32_t)c.ranks;
    for (uint32_t i = threadIdx.x; i < cells; i += blockDim.x)
        p.h.host_matrix[i] = p.h.matrix[i];
    for (uint32_t i = threadIdx.x; i < (uint32_t)c.ranks; i += blockDim.x)
        p.h.host_tokens[i] = p.h.tokens_of[i];
    tell_experts(p, n);
    __syncthreads();
    if (threadIdx.x == 0) {
        c.host->bad_ids = c.state->bad_ids;
        st_release_sys_u64(p.h.ticket, p.ticket);
    }
}

/* Block 0. False: stop. */
EPX__DEVICE bool exchange_counts(const ht_begin_t &p, ht_block_t *b)
{
    const ht_common_t &c = p.c;
    int warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32;
    bool ok = true;
    for (int r = warp; r < c.ranks; r += warps) {
        uint32_t total = sum_groups(p, r);
        if (threadIdx.x % 32 == 0)
            p.h.matrix[(size_t)c.rank * (uint32_t)c.ranks + (uint32_t)r] = (int32_t)total;
    }
    if (threadIdx.x == 0) {
        p.h.tokens_of[c.rank] = (int32_t)p.tokens;
        p.recv_max_of[c.rank] = p.recv_max;
    }
    __syncthreads();
    if (c.rails && !(rail_begin_out(p, b->n) && rail_begin_heard(p, b->n)))
        return false;
    for (int r = warp; r < c.ranks && ok; r += warps)
        ok = !ht_neighbour(c, r) || post_counts(p, b->n, r);
    for (int r = warp; r < c.ranks && ok; r += warps)
        ok = !ht_neighbour(c, r) || read_counts(p, b->n, r);
    if (!__syncthreads_and(ok))
        return false;
    if (c.rails) {
        rail_begin_in(p, b->n);
        __syncthreads();
        rail_begin_lists(p, b->n);
    }
    for (int r = (int)threadIdx.x; r < c.ranks; r += (int)blockDim.x)
        place_rank(p, b->n, r);
    __syncthreads();
    tell_host(p, b->n);
    __syncthreads();
    ht_tell_end(c, b->n); /* their messages have been read */
    return true;
}

/* ---- stage 3 ---- */

EPX__DEVICE int32_t row_at(const ht_begin_t &p, int32_t rank, uint32_t group, uint32_t lane)
{
    size_t i = (size_t)rank * p.groups_max + group;
    return __ldcg(&p.h.first[rank]) +
           (int32_t)(__ldcg(&p.before[i]) + (uint32_t)__popc(__ldcg(&p.bit[i]) & ((1u << lane) - 1u)));
}

EPX__DEVICE void place_token(const ht_begin_t &p, uint32_t token, uint32_t group, uint32_t lane)
{
    int32_t *rank_out = p.h.dst_rank + (size_t)token * p.h.slots, *row_out = p.h.dst_row + (size_t)token * p.h.slots;
    uint32_t used = 0;
    if (p.topk == 0) {
        for (int32_t r = 0; r < p.c.ranks && used < p.h.slots; r++) {
            if (!p.in_rank[(size_t)token * (uint32_t)p.c.ranks + (uint32_t)r])
                continue;
            rank_out[used] = r;
            row_out[used++] = row_at(p, r, group, lane);
        }
    } else {
        int32_t ranks[EPX_TOPK_MAX];
        uint32_t bad = 0;
        int n = epx__token_ranks(&p.map, p.topk_idx, p.bits, token, p.topk, ranks, &bad);
        for (; used < (uint32_t)n && used < p.h.slots; used++) {
            rank_out[used] = ranks[used];
            row_out[used] = row_at(p, ranks[used], group, lane);
        }
    }
    for (; used < p.h.slots; used++)
        rank_out[used] = row_out[used] = -1;
}

__global__ void __launch_bounds__(BEGIN_THREADS) ht_begin_kernel(const __grid_constant__ ht_begin_t p)
{
    __shared__ ht_block_t b;
    if (!ht_enter(p.c, &b))
        return;
    count_groups(p);
    bool ok = grid_barrier(p.c, &b, 1);
    if (ok && blockIdx.x == 0)
        ok = exchange_counts(p, &b);
    ok = ok && grid_barrier(p.c, &b, 2);
    uint32_t groups = (p.tokens + 31) / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (uint32_t g = threadIdx.x / 32 * gridDim.x + blockIdx.x; ok && g < groups; g += gridDim.x * warps) {
        if (g * 32 + lane < p.tokens)
            place_token(p, g * 32 + lane, g, lane);
    }
    if (!ht_last_block(p.c, &b))
        return;
    for (uint32_t e = threadIdx.x; p.topk != 0 && e < p.map.experts; e += blockDim.x)
        p.expert_count[e] = 0;
    ht_leave(p.c, &b, b.stop == 0);
}

extern "C" int epx__ht_launch_begin(const ht_begin_t *p, uint32_t blocks, void *stream)
{
    ht_begin_kernel<<<blocks, BEGIN_THREADS, 0, (cudaStream_t)stream>>>(*p);
    return (int)cudaGetLastError();
}

/* ---- halves of one block, and the local layout ---- */

__global__ void __launch_bounds__(256) ht_barrier_kernel(const __grid_constant__ ht_common_t c)
{
    __shared__ ht_block_t b;
    if (!ht_enter(c, &b))
        return;
    bool ok = rail_mail(c, b.n);
    for (int r = (int)threadIdx.x; r < c.ranks && ok; r += (int)blockDim.x) {
        bool near = ht_neighbour(c, r);
        epx__message_t *m = near ? ht_slot(c, b.n, r) : NULL;
        ok = !near || m != NULL;
        if (m)
            st_release_sys_u64(&m->sequence, b.n);
    }
    for (int r = (int)threadIdx.x; r < c.ranks && ok; r += (int)blockDim.x)
        ok = !ht_neighbour(c, r) || ht_message(c, b.n, r) != NULL;
    bool good = __syncthreads_and(ok) != 0;
    if (good)
        ht_tell_end(c, b.n);
    ht_leave(c, &b, good && !ht_stopped(c, b.n, false));
}

/* What rank `from` writes into its slot `n & 1` at rank `to`. */
EPX__DEVICE uint64_t check_pattern(int from, int to, uint64_t n)
{
    uint64_t v = ((uint64_t)(uint32_t)from << 33 | (uint64_t)(uint32_t)to << 1 | (n & 1)) + 1;
    v *= 0x9e3779b97f4a7c15u;
    return v ^ v >> 29;
}

__global__ void __launch_bounds__(256) ht_check_kernel(const __grid_constant__ ht_check_t p)
{
    const ht_common_t &c = p.c;
    __shared__ ht_block_t b;
    if (!ht_enter(c, &b))
        return;
    bool ok = rail_mail(c, b.n);
    for (int r = (int)threadIdx.x; r < c.ranks && ok; r += (int)blockDim.x) {
        if (!ht_neighbour(c, r))
            continue;
        epx__message_t *m = ht_slot(c, b.n, r);
        ok = m != NULL;
        if (!m)
            break;
        m->tokens = check_pattern(c.rank, r, b.n);
        uint64_t *put = put_words(c, c.peers[r], c.rank);
        for (uint32_t i = 0; i < 2 * HT_WORDS; i++)
            st_relaxed_sys_u64(&put[i], batch_word(b.n, i));
        st_release_sys_u64(&m->sequence, b.n);
    }
    for (int r = (int)threadIdx.x; r < c.ranks && ok; r += (int)blockDim.x) {
        bool near = ht_neighbour(c, r);
        const epx__message_t *m = near ? ht_message(c, b.n, r) : NULL;
        bool right = near && (m && ld_relaxed_sys_u64(&m->tokens) == check_pattern(r, c.rank, b.n));
        const uint64_t *put = put_words(c, c.window, r);
        for (uint32_t i = 0; m && i < 2 * HT_WORDS; i++)
            right = right && ld_relaxed_sys_u64(&put[i]) == batch_word(b.n, i);
        if (right)
            ((volatile uint32_t *)p.works)[r] += 1;
        ok = !near || m != NULL;
    }
    bool good = __syncthreads_and(ok) != 0;
    if (good) {
        ht_tell_end(c, b.n);
        good = ht_wait_ends(c, &b); /* the words are looked at before the next half writes them */
    }
    ht_leave(c, &b, good);
}

__global__ void __launch_bounds__(256) ht_layout_kernel(const __grid_constant__ ht_layout_t p)
{
    for (uint32_t t = blockIdx.x * blockDim.x + threadIdx.x; t < p.tokens; t += gridDim.x * blockDim.x) {
        int32_t ranks[EPX_TOPK_MAX];
        uint32_t bad = 0;
        int n = epx__token_ranks(&p.map, p.topk_idx, p.bits, t, p.topk, ranks, &bad);
        for (uint32_t k = 0; p.tokens_per_expert && k < p.topk; k++) {
            int64_t id = epx__topk_id(p.topk_idx, p.bits, (size_t)t * p.topk + k);
            if (id >= 0 && id < (int64_t)p.map.experts)
                atomicAdd(&p.tokens_per_expert[id], 1);
        }
        for (int i = 0; i < n; i++) {
            bool seen = false;
            for (int j = 0; j < i; j++)
                seen = seen || p.domain_of[ranks[j]] == p.domain_of[ranks[i]];
            if (p.tokens_per_rank)
                atomicAdd(&p.tokens_per_rank[ranks[i]], 1);
            if (p.tokens_per_domain && !seen)
                atomicAdd(&p.tokens_per_domain[p.domain_of[ranks[i]]], 1);
        }
        if (!p.in_rank)
            continue;
        for (uint32_t r = 0; r < p.ranks; r++)
            p.in_rank[(size_t)t * p.ranks + r] = 0;
        for (int i = 0; i < n; i++)
            p.in_rank[(size_t)t * p.ranks + (uint32_t)ranks[i]] = 1;
    }
}

extern "C" int epx__ht_launch_barrier(const ht_common_t *c, void *stream)
{
    ht_barrier_kernel<<<1, 256, 0, (cudaStream_t)stream>>>(*c);
    return (int)cudaGetLastError();
}
extern "C" int epx__ht_launch_check(const ht_check_t *p, void *stream)
{
    ht_check_kernel<<<1, 256, 0, (cudaStream_t)stream>>>(*p);
    return (int)cudaGetLastError();
}
extern "C" int epx__ht_launch_layout(const ht_layout_t *p, void *stream)
{
    if (p->tokens == 0)
        return 0;
    uint32_t blocks = (p->tokens + 255) / 256;
    blocks = blocks > 64 ? 64 : blocks;
    ht_layout_kernel<<<blocks, 256, 0, (cudaStream_t)stream>>>(*p);
    return (int)cudaGetLastError();
}

/* The first launch of a kernel may load it and wait for the whole device, where kernels of other ranks wait for this
 * one: so it happens at creation, with nothing to do. */
extern "C" int epx__ht_load_begin(void *stream)
{
    ht_begin_t begin = {};
    ht_check_t check = {};
    ht_layout_t layout = {};
    ht_begin_kernel<<<1, BEGIN_THREADS, 0, (cudaStream_t)stream>>>(begin);
    ht_barrier_kernel<<<1, 256, 0, (cudaStream_t)stream>>>(check.c);
    ht_check_kernel<<<1, 256, 0, (cudaStream_t)stream>>>(check);
    ht_layout_kernel<<<1, 256, 0, (cudaStream_t)stream>>>(layout);
    return (int)cudaGetLastError();
}
