/* Halves of one block (a barrier, a check of the ways), and the local layout. */
#include <cuda_runtime.h>

#include "algo/ht/cuda/rail_begin.cuh"

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

extern "C" int epx__ht_load_small(void *stream)
{
    ht_check_t check = {};
    ht_layout_t layout = {};
    ht_barrier_kernel<<<1, 256, 0, (cudaStream_t)stream>>>(check.c);
    ht_check_kernel<<<1, 256, 0, (cudaStream_t)stream>>>(check);
    ht_layout_kernel<<<1, 256, 0, (cudaStream_t)stream>>>(layout);
    return (int)cudaGetLastError();
}
