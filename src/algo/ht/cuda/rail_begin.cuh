/*
 * begin between domains, all in block 0 between the two grid barriers:
 *
 *   rail_begin_out    which of my tokens cross to each domain: into the record, and with the counts into the outbox;
 * put rail_begin_heard  the rails' messages are here. Only then the domain's mail is written (begin.cu) rail_begin_in
 * the domain's mail is here, so the members' inboxes are full: their rows of the matrix rail_begin_lists  the matrix is
 * whole: my rows in every stream, and the rows of my rails' tokens at every member
 *
 * Not inlined, so that one domain pays no registers. Warps take (member, domain) pairs in turn; a warp goes through a
 * stream 32 tokens at a time.
 */
#ifndef EPX_ALGO_HT_CUDA_RAIL_BEGIN_CUH
#define EPX_ALGO_HT_CUDA_RAIL_BEGIN_CUH

#include "algo/ht/cuda/rail.cuh"

EPX__DEVICE uint32_t lanes_below(uint32_t bits)
{
    return (uint32_t)__popc(bits & ((1u << threadIdx.x % 32) - 1u));
}

/* ---- out ---- */

/* Which tokens of a group go to some rank of domain d. */
EPX__DEVICE uint32_t domain_bits(const ht_begin_t &p, int d, uint32_t group)
{
    const ht_rails_t &r = *p.c.rails;
    uint32_t bits = 0;
    for (int i = 0; i < r.members; i++)
        bits |= __ldcg(&p.bit[(size_t)r.rank_of[d * r.members + i] * p.groups_max + group]);
    return bits;
}

/* Warp: how many of earlier groups cross to d, for each group; the total. */
EPX__DEVICE void count_crossing(const ht_begin_t &p, int d)
{
    uint32_t groups = (p.tokens + 31) / 32, lane = threadIdx.x % 32, total = 0;
    for (uint32_t g0 = 0; g0 < groups; g0 += 32) {
        uint32_t g = g0 + lane, count = g < groups ? (uint32_t)__popc(domain_bits(p, d, g)) : 0, sum = count;
        for (uint32_t step = 1; step < 32; step *= 2) {
            uint32_t left = __shfl_up_sync(0xffffffffu, sum, step);
            sum += lane >= step ? left : 0;
        }
        if (g < groups)
            p.c.rails->before[(size_t)d * p.groups_max + g] = total + sum - count;
        total += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane == 0)
        p.h.cross_count[d] = (int32_t)total;
}

EPX__DEVICE uint32_t message_experts(const ht_begin_t &p)
{
    return p.topk ? p.map.experts : 0;
}
EPX__DEVICE int32_t *message_tokens(const ht_begin_t &p, epx__rail_message_t *m)
{
    return (int32_t *)(m + 1) + p.c.ranks + message_experts(p);
}

/* Warp: one group's crossing tokens, lane by lane, into the record and the message. */
EPX__DEVICE void list_crossing(const ht_begin_t &p, uint64_t n, int d, uint32_t group)
{
    const ht_rails_t &r = *p.c.rails;
    uint32_t bits = domain_bits(p, d, group), lane = threadIdx.x % 32, token = group * 32 + lane;
    size_t list = (size_t)d * r.tokens_max;
    uint32_t k = r.before[(size_t)d * p.groups_max + group] + lanes_below(bits);
    if (token >= p.tokens)
        return;
    bool mine = (bits >> lane & 1) != 0;
    p.h.cross_at[list + token] = mine ? (int32_t)k : -1;
    if (!mine)
        return;
    int32_t *tokens = message_tokens(p, rail_outbox(r, d, n));
    uint8_t *mask = (uint8_t *)(tokens + p.h.cross_count[d]) + (size_t)k * r.layout.mask_bytes;
    p.h.cross_token[list + k] = (int32_t)token;
    tokens[k] = (int32_t)token;
    for (uint32_t byte = 0; byte < (uint32_t)r.layout.mask_bytes; byte++) {
        uint32_t value = 0;
        for (int i = (int)byte * 8; i < r.members && i < (int)byte * 8 + 8; i++) {
            uint32_t goes = __ldcg(&p.bit[(size_t)r.rank_of[d * r.members + i] * p.groups_max + group]);
            value |= (goes >> lane & 1) << (i % 8);
        }
        mask[byte] = (uint8_t)value;
    }
}

/* All threads: my counts for all ranks and experts. */
EPX__DEVICE void message_counts(const ht_begin_t &p, uint64_t n, int d)
{
    int32_t *counts = (int32_t *)(rail_outbox(*p.c.rails, d, n) + 1);
    for (int i = (int)threadIdx.x; i < p.c.ranks; i += (int)blockDim.x)
        counts[i] = p.h.matrix[(size_t)p.c.rank * (uint32_t)p.c.ranks + (uint32_t)i];
    for (uint32_t e = threadIdx.x; e < message_experts(p); e += blockDim.x)
        counts[p.c.ranks + (int)e] = (int32_t)__ldcg(&p.expert_count[e]);
}

EPX__DEVICE bool post_crossing(const ht_begin_t &p, uint64_t n, int d)
{
    const ht_rails_t &r = *p.c.rails;
    epx__rail_message_t header = {};
    header.tokens = p.tokens;
    header.recv_max = p.recv_max;
    header.crossing = (uint32_t)p.h.cross_count[d];
    header.experts = message_experts(p);
    uint64_t bytes = sizeof header + 4 * ((uint64_t)(uint32_t)p.c.ranks + header.experts) +
                     (uint64_t)header.crossing * (4 + r.layout.mask_bytes);
    return rail_post(p.c, n, d, header, bytes);
}

/* Block. The outbox slot is free: see rail.c of the CPU. */
static __device__ __noinline__ bool rail_begin_out(const ht_begin_t &p, uint64_t n)
{
    const ht_rails_t &r = *p.c.rails;
    int warp = (int)threadIdx.x / 32, warps = (int)blockDim.x / 32;
    uint32_t groups = (p.tokens + 31) / 32;
    for (int d = warp; d < r.domains; d += warps) {
        if (d != r.home)
            count_crossing(p, d);
    }
    __syncthreads();
    for (int d = 0; d < r.domains; d++) {
        if (d == r.home)
            continue;
        message_counts(p, n, d);
        for (uint32_t g = (uint32_t)warp; g < groups; g += (uint32_t)warps)
            list_crossing(p, n, d, g);
    }
    __syncthreads();
    bool ok = true;
    for (int d = (int)threadIdx.x; d < r.domains && ok; d += (int)blockDim.x)
        ok = d == r.home || post_crossing(p, n, d);
    return __syncthreads_and(ok) != 0;
}

static __device__ __noinline__ bool rail_begin_heard(const ht_begin_t &p, uint64_t n)
{
    bool ok = true;
    for (int d = (int)threadIdx.x; d < p.c.rails->domains && ok; d += (int)blockDim.x)
        ok = d == p.c.rails->home || rail_hear(p.c, n, d);
    return __syncthreads_and(ok) != 0;
}

/* ---- in ---- */

/* What one rail of member i says, from domain d. */
typedef struct rail_news {
    int source;
    const int32_t *counts, *experts, *token;
    const uint8_t *mask;
    uint32_t crossing;
} rail_news_t;

EPX__DEVICE rail_news_t rail_news(const ht_begin_t &p, uint64_t n, int member, int d)
{
    const ht_rails_t &r = *p.c.rails;
    const epx__rail_message_t *m = rail_inbox(r, member, d, n);
    rail_news_t x;
    uint32_t experts = ld_relaxed_sys_u32(&m->experts), crossing = ld_relaxed_sys_u32(&m->crossing);
    x.source = r.rank_of[d * r.members + member];
    x.counts = (const int32_t *)(m + 1);
    x.experts = x.counts + p.c.ranks;
    x.token = x.experts + experts;
    x.crossing = crossing < r.tokens_max ? crossing : r.tokens_max;
    x.mask = (const uint8_t *)(x.token + x.crossing);
    return x;
}
EPX__DEVICE int32_t news_i32(const int32_t *at)
{
    return (int32_t)ld_relaxed_sys_u32((const uint32_t *)at);
}

/* Block: rows of the matrix that came by the rails of all members. */
static __device__ __noinline__ void rail_begin_in(const ht_begin_t &p, uint64_t n)
{
    const ht_rails_t &r = *p.c.rails;
    int lane = (int)threadIdx.x % 32, warps = (int)blockDim.x / 32;
    for (int s = (int)threadIdx.x / 32; s < r.members * r.domains; s += warps) {
        int member = s / r.domains, d = s % r.domains;
        if (d == r.home)
            continue;
        rail_news_t x = rail_news(p, n, member, d);
        for (int to = lane; to < p.c.ranks; to += 32)
            p.h.matrix[(size_t)x.source * (uint32_t)p.c.ranks + (uint32_t)to] = news_i32(&x.counts[to]);
        if (lane == 0) {
            const epx__rail_message_t *m = rail_inbox(r, member, d, n);
            p.h.tokens_of[x.source] = (int32_t)ld_relaxed_sys_u64(&m->tokens);
            p.recv_max_of[x.source] = ld_relaxed_sys_u64(&m->recv_max);
            p.h.in_count[s] = (int32_t)x.crossing;
        }
    }
}

/* Thread: tokens of ranks elsewhere for my expert with that number here. */
static __device__ __noinline__ uint32_t rail_expert_rows(const ht_begin_t &p, uint64_t n, uint32_t expert)
{
    uint32_t sum = 0;
    for (int s = 0; s < p.c.rails->members * p.c.rails->domains; s++) {
        int d = s % p.c.rails->domains;
        if (d != p.c.rails->home)
            sum += (uint32_t)news_i32(&rail_news(p, n, s / p.c.rails->domains, d).experts[expert]);
    }
    return sum;
}

/* Lane's token k of a stream goes to member i? */
EPX__DEVICE bool news_goes(const ht_rails_t &r, const rail_news_t &x, uint32_t k, int i)
{
    if (k >= x.crossing)
        return false;
    const volatile uint8_t *mask = x.mask + (size_t)k * r.layout.mask_bytes;
    return (mask[i / 8] >> (i % 8) & 1) != 0;
}

/* Warp: which of a stream's rows are mine. */
EPX__DEVICE void list_pulls(const ht_begin_t &p, const rail_news_t &x)
{
    const ht_rails_t &r = *p.c.rails;
    int32_t *row = p.h.pull_row + (size_t)x.source * r.tokens_max,
            *token = p.h.pull_token + (size_t)x.source * r.tokens_max;
    uint32_t found = 0;
    for (uint32_t k0 = 0; k0 < x.crossing; k0 += 32) {
        uint32_t k = k0 + threadIdx.x % 32;
        bool mine = news_goes(r, x, k, r.index);
        uint32_t bits = __ballot_sync(0xffffffffu, mine), at = found + lanes_below(bits);
        if (mine) {
            row[at] = (int32_t)k;
            token[at] = news_i32(&x.token[k]);
        }
        found += (uint32_t)__popc(bits);
    }
}

/* Warp: the row at member e of each token of my rail's. */
EPX__DEVICE void list_sums(const ht_begin_t &p, const rail_news_t &x, int d, int e)
{
    const ht_rails_t &r = *p.c.rails;
    int32_t *out = p.h.sum_row + (size_t)d * r.tokens_max * (uint32_t)r.members + (uint32_t)e;
    int at = r.rank_of[r.home * r.members + e];
    int32_t next = 0; /* rows of sources before it */
    for (int s = 0; s < x.source; s++)
        next += p.h.matrix[(size_t)s * (uint32_t)p.c.ranks + (uint32_t)at];
    if (threadIdx.x % 32 == 0)
        p.h.sum_first[d * r.members + e] = next;
    for (uint32_t k0 = 0; k0 < x.crossing; k0 += 32) {
        uint32_t k = k0 + threadIdx.x % 32;
        bool goes = news_goes(r, x, k, e);
        uint32_t bits = __ballot_sync(0xffffffffu, goes);
        if (k < x.crossing)
            out[(size_t)k * (uint32_t)r.members] = goes ? next + (int32_t)lanes_below(bits) : -1;
        next += __popc(bits);
    }
}

/* Block. */
static __device__ __noinline__ void rail_begin_lists(const ht_begin_t &p, uint64_t n)
{
    const ht_rails_t &r = *p.c.rails;
    int warps = (int)blockDim.x / 32;
    for (int s = (int)threadIdx.x / 32; s < r.members * r.domains; s += warps) {
        int member = s / r.domains, d = s % r.domains;
        if (d == r.home)
            continue;
        list_pulls(p, rail_news(p, n, member, d));
        /* The same number of warps' tasks: (domain, member) of my own rails. */
        list_sums(p, rail_news(p, n, r.index, d), d, member);
    }
}

#endif
