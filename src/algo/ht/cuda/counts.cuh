/*
 * begin: the counts that ranks tell each other and the host.
 *
 * A message's counts are words of 8 bytes behind its packets: the half's number << 28 | the count. Each says itself
 * that it has come, so nothing is fenced and each goes as soon as it is known. Only begin writes that far into a
 * mailbox, so no other kind's words look like one. What the host waits for is alike: ticket << 32 | count, in pinned
 * memory.
 */
#ifndef EPX_ALGO_HT_CUDA_COUNTS_CUH
#define EPX_ALGO_HT_CUDA_COUNTS_CUH

#include "algo/ht/cuda/rail_begin.cuh"

#define COUNT_SHIFT 28 /* fewer than 2^20 tokens, each with 32 choices at most */

/* Words of the packets, after the shape. */
enum { WORD_SHAPE, WORD_TOKENS, WORD_RECV_MAX, WORDS };
static_assert(16 * (WORDS + 1) <= EPX__COUNTS_OFFSET, "packets come before counts");

/* to_rank[ranks], then to_expert[local experts of the reader]. */
EPX__DEVICE uint64_t *counts_at(const ht_common_t &c, char *window, int from, uint64_t n)
{
    return (uint64_t *)((char *)mail_at(c, window, from, n) + EPX__COUNTS_OFFSET);
}
EPX__DEVICE uint64_t count_word(uint64_t n, uint32_t count)
{
    return n << COUNT_SHIFT | count;
}
EPX__DEVICE bool count_came(uint64_t n, uint64_t word)
{
    return word >> COUNT_SHIFT == n << COUNT_SHIFT >> COUNT_SHIFT;
}
EPX__DEVICE void tell_host(const ht_begin_t &p, size_t i, uint32_t count)
{
    st_relaxed_sys_u64(&p.h.host_words[i], (uint64_t)(uint32_t)p.ticket << 32 | count);
}

/* ---- posting ---- */

/* Block 0, all threads: may the peers' mailboxes be written? */
EPX__DEVICE bool mail_free(const ht_common_t &c, uint64_t n, uint64_t consumed)
{
    bool ok = true;
    for (int r = (int)threadIdx.x; r < c.ranks && ok; r += (int)blockDim.x) {
        bool waits = ht_neighbour(c, r) && n > 2 && (r != (int)threadIdx.x || consumed < n - 2);
        ok = !waits || ht_wait(c, n, &words_at(c, c.window, r)->consumed, n - 2, r, HT_STAGE_MAILBOX);
    }
    return ok;
}

/* Warp: how many of my tokens go to rank r, to every peer. */
EPX__DEVICE void post_total(const ht_common_t &c, uint64_t n, int r, uint32_t total)
{
    for (int to = (int)threadIdx.x % 32; to < c.ranks; to += 32) {
        if (ht_neighbour(c, to))
            st_relaxed_sys_u64(counts_at(c, c.peers[to], c.rank, n) + r, count_word(n, total));
    }
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

/* Warp: the packets, and how often each expert of a peer's was chosen. */
EPX__DEVICE void post_experts(const ht_begin_t &p, uint64_t n, int to)
{
    const ht_common_t &c = p.c;
    char *window = c.peers[to];
    uint64_t words[WORDS] = {c.shape, p.tokens, p.recv_max}, *counts = counts_at(c, window, c.rank, n) + c.ranks;
    if (threadIdx.x % 32 == 0)
        ht_post_led(c, n, to, ht_lead_t{window, n}, words, WORDS);
    for (uint32_t i = threadIdx.x % 32; i < experts_at(p, to); i += 32)
        st_relaxed_sys_u64(&counts[i], count_word(n, __ldcg(&p.expert_count[expert_of(p, to, i)])));
}

/* ---- hearing ---- */

static __device__ __noinline__ bool await_count(const ht_common_t &c, uint64_t n, const uint64_t *word, int from,
                                                uint64_t *seen)
{
    const epx__message_t *m = mail_at(c, c.window, from, n);
    uint64_t start = globaltimer_ns();
    for (uint32_t polls = 1;; polls++) {
        *seen = ld_relaxed_sys_u64(word);
        if (count_came(n, *seen))
            return true;
        if ((polls & 7) != 0)
            continue;
        epx__pair_t head = ld_relaxed_sys_pair(m);
        if (head.first >= n && !ht_right_kind(c, n, from, (uint32_t)head.second, (uint32_t)(head.second >> 32)))
            return false;
        if (ht_stopped(c, n, (polls & 1023) == 0))
            return false;
        uint64_t waited = globaltimer_ns() - start;
        if (waited > c.timeout_ns) {
            ht_fault_t f = {EPX_E_TIMEOUT, HT_STAGE_MESSAGE, from, n, head.first, waited};
            ht_fail(c, n, f);
            return false;
        }
    }
}

/* One thread: count i of a neighbour. False: stop. */
EPX__DEVICE bool hear_count(const ht_common_t &c, uint64_t n, int from, uint32_t i, uint32_t *count)
{
    const uint64_t *word = counts_at(c, c.window, from, n) + i;
    uint64_t seen = ld_relaxed_sys_u64(word);
    if (!count_came(n, seen) && !await_count(c, n, word, from, &seen))
        return false;
    *count = (uint32_t)seen & ((1u << COUNT_SHIFT) - 1);
    return true;
}

/* Threads of a block in three crowds, so that what each waits for comes meanwhile: number of this one from `skip` on.
 */
EPX__DEVICE uint32_t thread_after(uint32_t skip)
{
    return threadIdx.x >= skip ? threadIdx.x - skip : threadIdx.x + blockDim.x - skip;
}

/* Thread: tokens of source i, and how many rows it takes. */
EPX__DEVICE bool hear_source(const ht_begin_t &p, uint64_t n, int i)
{
    const ht_common_t &c = p.c;
    uint64_t words[WORDS] = {0, p.tokens, p.recv_max};
    if (i != c.rank && !ht_hear_packets(c, n, i, words, WORDS))
        return false;
    p.h.tokens_of[i] = (int32_t)words[WORD_TOKENS];
    p.recv_max_of[i] = words[WORD_RECV_MAX];
    if (!c.rails)
        tell_host(p, HT_HOST_TOKENS(c.ranks) + (size_t)i, (uint32_t)words[WORD_TOKENS]);
    return true;
}

/* Block: the matrix, as far as the domain says it. `mine`: my row; `first`: grows by what sources before me send. */
EPX__DEVICE bool hear_matrix(const ht_begin_t &p, uint64_t n, const uint32_t *mine, uint32_t *first)
{
    const ht_common_t &c = p.c;
    uint32_t ranks = (uint32_t)c.ranks;
    bool ok = true;
    for (uint32_t cell = threadIdx.x; cell < ranks * ranks && ok; cell += blockDim.x) {
        uint32_t i = cell / ranks, r = cell % ranks, count = mine[r];
        if (!ht_near(c, (int)i))
            continue;
        ok = (int)i == c.rank || hear_count(c, n, (int)i, r, &count);
        p.h.matrix[cell] = (int32_t)count;
        if (c.rails || !ok)
            continue;
        tell_host(p, cell, count);
        if ((int)i < c.rank)
            atomicAdd(&first[r], count);
    }
    for (uint32_t i = thread_after(32); i < ranks && ok; i += blockDim.x)
        ok = !ht_near(c, (int)i) || hear_source(p, n, (int)i);
    return ok;
}

/* Block: pairs (row, local expert) over all sources, rounded up, for the host. */
EPX__DEVICE bool hear_experts(const ht_begin_t &p, uint64_t n)
{
    const ht_common_t &c = p.c;
    bool ok = true;
    for (uint32_t i = thread_after(64); i < experts_at(p, c.rank) && ok; i += blockDim.x) {
        uint32_t sum = __ldcg(&p.expert_count[expert_of(p, c.rank, i)]), count = 0;
        for (int s = 0; s < c.ranks && ok; s++) {
            ok = !ht_neighbour(c, s) || hear_count(c, n, s, (uint32_t)c.ranks + i, &count);
            sum += ok && ht_neighbour(c, s) ? count : 0;
        }
        if (c.rails && ok)
            sum += rail_expert_rows(p, n, expert_of(p, c.rank, i));
        if (ok)
            tell_host(p, HT_HOST_EXPERTS(c.ranks) + i, (uint32_t)epx__align_rows((int32_t)sum, p.alignment));
    }
    return ok;
}

#endif
