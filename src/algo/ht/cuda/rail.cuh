/*
 * Rails in kernels: a half's message to and from each other domain, the words of the domain's rails windows, chunks
 * through a channel. docs/PROTOCOL-NET.md has the protocol.
 *
 * Rails windows and the counters of channels are host memory: looking at one costs a trip over PCIe, and many looks at
 * one line seem to be served in turn. So it is one thread (or lane) of the GPU that looks, and where many wait, it
 * tells the others by a word in GPU memory. Payload that others wrote there is read by ld_global_16 and the like, which
 * go past L1.
 *
 * What orders what: all threads write; __syncthreads; one thread fences (acq_rel, sys) and pushes the request, whose
 * commit word the proxy acquires. The other way: the proxy's counter is acquired by one thread, then __syncthreads.
 */
#ifndef EPX_ALGO_HT_CUDA_RAIL_CUH
#define EPX_ALGO_HT_CUDA_RAIL_CUH

#include "algo/ht/cuda/copy.cuh"
#include "algo/ht/cuda/wait.cuh"

/* ---- where things are ---- */

EPX__DEVICE const epx_port_channel_t *rail_channel(const ht_rails_t &r, int d, int which)
{
    return &r.channels[d * EPX__RAIL_CHANNELS + which];
}
/* In the window of member `at`: the line that member `by` writes about domain d. */
EPX__DEVICE epx__rail_words_t *rail_words(const ht_rails_t &r, int at, int by, int d)
{
    return (epx__rail_words_t *)(r.member[at] + r.layout.words) + (by * r.domains + d);
}
EPX__DEVICE epx__rail_message_t *rail_inbox(const ht_rails_t &r, int member, int d, uint64_t n)
{
    return (epx__rail_message_t *)(r.member[member] + r.layout.inbox + epx__rail_slot(&r.layout, d, n));
}
EPX__DEVICE epx__rail_message_t *rail_outbox(const ht_rails_t &r, int d, uint64_t n)
{
    return (epx__rail_message_t *)(r.window + r.layout.outbox + epx__rail_slot(&r.layout, d, n));
}
EPX__DEVICE char *rail_receive(const ht_rails_t &r, int member, int d)
{
    return r.member[member] + r.layout.receive + (size_t)d * r.layout.ring_bytes;
}
EPX__DEVICE char *rail_send(const ht_rails_t &r, int d)
{
    return r.window + r.layout.send + (size_t)d * r.layout.ring_bytes;
}
/* The k-th other domain, the next one first: not all begin with the same. */
EPX__DEVICE int rail_other(const ht_rails_t &r, uint32_t k)
{
    return (int)(((uint32_t)r.home + 1 + k) % (uint32_t)r.domains);
}

/* ---- words of a half: sequence << 32 | count ---- */

EPX__DEVICE uint64_t rail_word(uint64_t n, uint32_t count)
{
    return n << 32 | count;
}
/* The count for half n; what an earlier half left is 0. */
EPX__DEVICE uint32_t rail_count(uint64_t word, uint64_t n)
{
    return word >> 32 == (n & 0xffffffffu) ? (uint32_t)word : 0;
}

/* ---- waiting ---- */

EPX__DEVICE void rail_fail(const ht_common_t &c, uint64_t n, uint32_t status, uint32_t stage, int peer, uint64_t want,
                           uint64_t seen, uint64_t waited)
{
    ht_fault_t f = {status, stage, peer, want, seen, waited};
    ht_fail(c, n, f);
}

/* Why the rail is waited for no more: it has left, or is out of reach; else 0. Its last words were told before. */
EPX__DEVICE uint64_t rail_gone(const ht_common_t &c, int d)
{
    return ld_acquire_sys_u64(rail_channel(*c.rails, d, EPX__RAIL_MESSAGES)->fault);
}
/* One thread: something is missing that the rail never said. */
EPX__DEVICE void rail_fail_gone(const ht_common_t &c, uint64_t n, int d, uint64_t fault)
{
    int peer = rail_channel(*c.rails, d, EPX__RAIL_MESSAGES)->peer;
    rail_fail(c, n, EPX_E_PEER, HT_STAGE_GONE, peer, 0, fault, 0);
}

/* One thread, for a word about domain d: until *word >= want. False: stop. With the own domain nobody asks whether a
 * rail has left, and the host, across PCIe, is asked rarely: many may wait for a word of the keeper's in GPU memory. */
static __device__ __noinline__ bool rail_wait(const ht_common_t &c, uint64_t n, int d, const uint64_t *word,
                                              uint64_t want, int peer, uint32_t stage)
{
    uint64_t start = 0;
    uint32_t rarely = d == c.rails->home ? 1023 : 63;
    for (uint32_t polls = 1;; polls++) {
        uint64_t seen = ld_acquire_sys_u64(word);
        if (seen >= want)
            return true;
        if ((polls & 7) != 0)
            continue;
        if (ht_stopped(c, n, (polls & rarely) == 0))
            return false;
        uint64_t now = globaltimer_ns();
        start = start ? start : now;
        if (now - start > c.timeout_ns) {
            rail_fail(c, n, EPX_E_TIMEOUT, stage, peer, want, seen, now - start);
            return false;
        }
        uint64_t gone = (polls & 63) == 0 && d != c.rails->home ? rail_gone(c, d) : 0;
        if (gone &&
            ld_acquire_sys_u64(word) < want) { /* after that look, for it may have said its last words and left */
            rail_fail_gone(c, n, d, gone);
            return false;
        }
    }
}

/* A block (or warp) that looks at several things in turn and has found nothing to do. */
typedef struct rail_idle {
    uint64_t since;
    uint32_t rounds;
    uint32_t gone; /* the rail had left at the last look, and nothing has moved since */
} rail_idle_t;

/* One thread: nothing moved in a whole round, and more must come from domain d. False: its rail has left, and all is
 * said. */
EPX__DEVICE bool rail_stays(const ht_common_t &c, uint64_t n, rail_idle_t *idle, int d)
{
    uint64_t gone = rail_gone(c, d);
    if (gone && idle->gone) {
        rail_fail_gone(c, n, d, gone);
        return false;
    }
    idle->gone = gone != 0; /* its last words may have come since the round's look: one more round */
    return true;
}

/* One thread: nothing moved in a whole round, `peer` is waited for; d: its domain when it is the own rail there, else
 * -1. (A rail may leave when its part is done: that ends no wait for somebody else.) False: stop. */
EPX__DEVICE bool rail_patience(const ht_common_t &c, uint64_t n, rail_idle_t *idle, int d, int peer, uint32_t stage)
{
    if ((idle->rounds++ & 7) != 0)
        return true;
    if (ht_stopped(c, n, (idle->rounds & 63) == 1))
        return false;
    uint64_t now = globaltimer_ns();
    idle->since = idle->since ? idle->since : now;
    if (now - idle->since > c.timeout_ns) {
        rail_fail(c, n, EPX_E_TIMEOUT, stage, peer, 0, 0, now - idle->since);
        return false;
    }
    return d < 0 || d == c.rails->home || rail_stays(c, n, idle, d);
}
EPX__DEVICE void rail_moved(rail_idle_t *idle)
{
    idle->since = 0;
    idle->rounds = 0;
    idle->gone = 0;
}

/* The whole block, after a round in which something moved or nothing did: the latter as rail_patience. */
EPX__DEVICE bool rail_go_on(const ht_common_t &c, uint64_t n, bool moved, rail_idle_t *idle, int d, int peer,
                            uint32_t stage)
{
    int ok = 1;
    if (moved)
        rail_moved(idle);
    else if (threadIdx.x == 0)
        ok = rail_patience(c, n, idle, d, peer, stage);
    return __syncthreads_and(ok) != 0;
}

/* One thread: a push that failed ends the half. */
EPX__DEVICE bool rail_pushed(const ht_common_t &c, uint64_t n, int d, epx_status_t status)
{
    if (status == EPX_OK)
        return true;
    const epx_port_channel_t *channel = rail_channel(*c.rails, d, EPX__RAIL_DATA);
    rail_fail(c, n, status == EPX_E_TIMEOUT ? EPX_E_TIMEOUT : EPX_E_PEER, HT_STAGE_GONE, channel->peer, 0,
              (uint64_t)status, 0);
    return false;
}

/* ---- a half's messages ---- */

/* One thread: the header, and the put of `bytes` in all; what follows it has been written by everybody before. */
EPX__DEVICE bool rail_post(const ht_common_t &c, uint64_t n, int d, const epx__rail_message_t &header, uint64_t bytes)
{
    const ht_rails_t &r = *c.rails;
    epx__rail_message_t *out = rail_outbox(r, d, n);
    *out = header;
    out->sequence = n;
    out->kind = c.kind;
    out->generation = c.generation;
    out->shape = c.shape;
    fence_acq_rel_sys();
    uint64_t from = (uint64_t)((char *)out - r.window);
    uint64_t to = r.layout.inbox + epx__rail_slot(&r.layout, r.home, n);
    return rail_pushed(c, n, d, epx_port_put_signal(rail_channel(r, d, EPX__RAIL_MESSAGES), 0, to, from, bytes));
}

/* One thread: the message of the rail in domain d has come, and is right. False: stop. */
EPX__DEVICE bool rail_hear(const ht_common_t &c, uint64_t n, int d)
{
    const ht_rails_t &r = *c.rails;
    const epx_port_channel_t *channel = rail_channel(r, d, EPX__RAIL_MESSAGES);
    if (!rail_wait(c, n, d, channel->signals, n, channel->peer, HT_STAGE_RAIL))
        return false;
    const epx__rail_message_t *m = rail_inbox(r, r.index, d, n);
    uint64_t sequence = ld_relaxed_sys_u64(&m->sequence);
    if (sequence != n) {
        rail_fail(c, n, EPX_E_NET, HT_STAGE_RAIL, channel->peer, n, sequence, 0);
        return false;
    }
    return ht_right_kind(c, n, channel->peer, ld_relaxed_sys_u32(&m->kind), ld_relaxed_sys_u32(&m->generation)) &&
           ht_right_shape(c, n, channel->peer, ld_relaxed_sys_u64(&m->shape));
}

/* Block: messages that are a header alone, to and from every rail. Then the domain's mail may be written. */
static __device__ __noinline__ bool rail_mail(const ht_common_t &c, uint64_t n)
{
    bool ok = true;
    if (!c.rails)
        return true;
    epx__rail_message_t header = {};
    for (int d = (int)threadIdx.x; d < c.rails->domains && ok; d += (int)blockDim.x)
        ok = d == c.rails->home || rail_post(c, n, d, header, sizeof header);
    for (int d = (int)threadIdx.x; d < c.rails->domains && ok; d += (int)blockDim.x)
        ok = d == c.rails->home || rail_hear(c, n, d);
    return __syncthreads_and(ok) != 0;
}

/* ---- streams ---- */

/* One thread: may chunk `chunk` of this half be written into the send ring towards d? The rail's message of this half
 * says that its ring is empty and ours has been read; after that, credit counts. */
EPX__DEVICE bool rail_room(const ht_rails_t &r, uint64_t n, int d, const epx__rail_cut_t &cut, uint32_t chunk)
{
    if (ld_acquire_sys_u64(rail_channel(r, d, EPX__RAIL_MESSAGES)->signals) < n)
        return false;
    uint64_t away = r.state[d].sent_base + chunk - ld_acquire_sys_u64(rail_channel(r, d, EPX__RAIL_CREDIT)->signals);
    return away < cut.slots;
}
/* One thread, after all of the chunk is written: put it. False: stop. */
EPX__DEVICE bool rail_put(const ht_common_t &c, uint64_t n, int d, const epx__rail_cut_t &cut, uint32_t chunk,
                          uint32_t total)
{
    const ht_rails_t &r = *c.rails;
    uint32_t first = chunk * cut.rows_per_chunk, left = total - first;
    uint64_t at = epx__rail_at(&cut, first), rows = left < cut.rows_per_chunk ? left : cut.rows_per_chunk;
    fence_acq_rel_sys();
    return rail_pushed(c, n, d,
                       epx_port_put_signal(rail_channel(r, d, EPX__RAIL_DATA), 0,
                                           r.layout.receive + (uint64_t)r.home * r.layout.ring_bytes + at,
                                           r.layout.send + (uint64_t)d * r.layout.ring_bytes + at, rows * cut.stride));
}
/* One thread: rows of this half that have come from domain d into my receive ring. */
EPX__DEVICE uint32_t rail_come(const ht_rails_t &r, int d, const epx__rail_cut_t &cut, uint32_t total)
{
    uint64_t chunks = ld_acquire_sys_u64(rail_channel(r, d, EPX__RAIL_DATA)->signals) - r.state[d].freed_base;
    return epx__rail_come(&cut, chunks, total);
}
/* One thread: give back chunks up to those that `rows` done rows make. 1 something, 0 nothing, -1 stop. */
EPX__DEVICE int rail_free(const ht_common_t &c, uint64_t n, int d, const epx__rail_cut_t &cut, uint32_t rows,
                          uint32_t total)
{
    ht_rail_state_t *s = &c.rails->state[d];
    uint32_t chunks = epx__rail_whole_chunks(&cut, rows, total), freed = rail_count(s->freed, n);
    int moved = 0;
    for (; freed < chunks; freed++, moved = 1) {
        if (!rail_pushed(c, n, d, epx_port_signal(rail_channel(*c.rails, d, EPX__RAIL_CREDIT))))
            return -1;
        s->freed = rail_word(n, freed + 1);
    }
    return moved;
}
EPX__DEVICE bool rail_all_freed(const ht_rails_t &r, uint64_t n, int d, const epx__rail_cut_t &cut, uint32_t total)
{
    return rail_count(r.state[d].freed, n) == epx__rail_chunks(&cut, total);
}

/* One thread a domain, last block, when the half has ended well: its chunks have passed. `out`, `in`: rows. */
EPX__DEVICE void rail_count_on(const ht_rails_t &r, const epx__rail_cut_t &cut, int d, uint32_t out, uint32_t in)
{
    r.state[d].sent_base += epx__rail_chunks(&cut, out);
    r.state[d].freed_base += epx__rail_chunks(&cut, in);
}

/* ---- bytes ---- */

/* Warp: by words where all is aligned, else byte by byte. Reads past L1. */
EPX__DEVICE void rail_copy(char *to, const char *from, uint32_t bytes)
{
    uint32_t lane = threadIdx.x % 32;
    if ((((uintptr_t)to | (uintptr_t)from | bytes) & 3) == 0) {
        for (uint32_t i = lane; i < bytes / 4; i += 32)
            ((uint32_t *)to)[i] = ld_relaxed_sys_u32((const uint32_t *)from + i);
    } else {
        for (uint32_t i = lane; i < bytes; i += 32)
            to[i] = ((const volatile char *)from)[i];
    }
}

#endif
