/*
 * What all HT kernels do alike: take their number, find words and messages, wait with a deadline, fail so that
 * everybody hears of it, and finish.
 *
 * Who fails first on this rank (ht_state.fault) writes the host's record, then its error slot and the alarm in every
 * peer's window. Every wait looks at the own window's alarm, so all blocks of all ranks leave within microseconds.
 */
#ifndef EPX_ALGO_HT_CUDA_WAIT_CUH
#define EPX_ALGO_HT_CUDA_WAIT_CUH

#include "algo/ht/cuda/ht_cuda.h"
#include <epx/device/ptx.cuh>

/* In shared memory, one per block. */
#define HT_TURNS 8u /* at least 2: an item is left before the one before it is told */
typedef struct ht_block {
    uint64_t n; /* this half's number */
    uint32_t stop;
    uint32_t last;
    uint32_t ended;                  /* worker warps that are through */
    uint32_t progress[HT_WARPS_MAX]; /* items of each that are written (or read) and can be told */
    uint32_t told[HT_WARPS_MAX];     /* and those that were */
    /* Where items are taken (share.cuh): which ones those are, of each warp's newest. */
    uint32_t item[HT_WARPS_MAX][HT_TURNS];
} ht_block_t;
static_assert(sizeof(ht_block_t) + 256 <= HT_SHARED_OWN, "and a little for others");

/* ---- where things are ---- */

EPX__DEVICE epx__message_t *mail_at(const ht_common_t &c, char *window, int from, uint64_t n)
{
    return (epx__message_t *)(window + c.layout.mail_offset + ((size_t)from * 2 + (n & 1)) * c.layout.message_bytes);
}
EPX__DEVICE epx__words_t *words_at(const ht_common_t &c, char *window, int from)
{
    return (epx__words_t *)(window + c.layout.words_offset) + from;
}
/* Progress words that `from` writes: first those of the rows it puts, then those of the rows it takes. */
EPX__DEVICE uint64_t *put_words(const ht_common_t &c, char *window, int from)
{
    return (uint64_t *)(window + c.layout.chunk_words_offset) + (size_t)from * (2 * HT_WORDS);
}
EPX__DEVICE uint64_t *take_words(const ht_common_t &c, char *window, int from)
{
    return put_words(c, window, from) + HT_WORDS;
}
EPX__DEVICE uint64_t *alarm_of(const ht_common_t &c, char *window)
{
    return ((epx__control_t *)(window + c.layout.control_offset))->alarm;
}
EPX__DEVICE uint64_t batch_word(uint64_t n, uint32_t batch)
{
    return n << HT_WORD_SHIFT | (batch + 1);
}

/* Is rank r in my domain? Only then its window is mapped here. */
EPX__DEVICE bool ht_near(const ht_common_t &c, int r)
{
    return !c.rails || c.rails->domain_of[r] == c.rails->home;
}
/* ... and not myself. */
EPX__DEVICE bool ht_neighbour(const ht_common_t &c, int r)
{
    return r != c.rank && ht_near(c, r);
}

/* ---- failing ---- */

EPX__DEVICE void post_error(const ht_common_t &c, int to, uint32_t status, int about, uint64_t n)
{
    char *window = c.peers[to];
    epx__error_slot_t *slot = (epx__error_slot_t *)(window + c.layout.errors_offset) + c.rank;
    slot->sequence = n;
    slot->peer = about;
    slot->status = (int32_t)status;
    st_release_sys_u64(&slot->word, (uint64_t)status | (uint64_t)c.kind << 8);
    st_release_sys_u64(alarm_of(c, window), 1);
}

typedef struct ht_fault {
    uint32_t status, stage;
    int peer;
    uint64_t expected, seen, waited_ns;
} ht_fault_t;

EPX__DEVICE void write_record(const ht_common_t &c, uint64_t n, const ht_fault_t &f)
{
    volatile ht_host_t *h = c.host;
    h->status = f.status;
    h->kind = c.kind;
    h->stage = f.stage;
    h->peer = f.peer;
    h->sequence = n;
    h->expected = f.expected;
    h->seen = f.seen;
    h->waited_ns = f.waited_ns;
    fence_acq_rel_sys();
    h->ready = 1;
}

static __device__ __noinline__ void ht_fail(const ht_common_t &c, uint64_t n, const ht_fault_t &f)
{
    if (atomicCAS(&c.state->fault, 0u, 1u) != 0u)
        return;
    write_record(c, n, f);
    if (f.stage != HT_STAGE_TOLD) {
        for (int r = 0; r < c.ranks; r++) {
            if (ht_neighbour(c, r))
                post_error(c, r, f.status, f.peer, n);
        }
    }
    st_release_sys_u64(alarm_of(c, c.window), 1);
}

/* Is this rank to stop? A peer's alarm becomes the host's record. The host's own word is across PCIe: asked for rarely;
 * who hears it tells this rank's other blocks and later kernels, so that the half does not end well. One thread. */
EPX__DEVICE bool ht_stopped(const ht_common_t &c, uint64_t n, bool ask_host)
{
    if (ld_relaxed_sys_u64(alarm_of(c, c.window)) != 0) {
        ht_fault_t f = {EPX_E_PEER, HT_STAGE_TOLD, -1, 0, 0, 0};
        ht_fail(c, n, f);
        return true;
    }
    if (!ask_host || ld_relaxed_sys_u32(&c.host->abort) == 0)
        return false;
    st_release_sys_u64(alarm_of(c, c.window), 1);
    return true;
}

/* ---- waiting ---- */

static __device__ __noinline__ bool ht_wait_slow(const ht_common_t &c, uint64_t n, const uint64_t *word, uint64_t want,
                                                 int peer, uint32_t stage)
{
    uint64_t start = globaltimer_ns();
    for (uint32_t polls = 1;; polls++) {
        uint64_t seen = ld_acquire_sys_u64(word);
        if (seen >= want)
            return true;
        if ((polls & 7) != 0)
            continue;
        if (ht_stopped(c, n, (polls & 1023) == 0))
            return false;
        uint64_t waited = globaltimer_ns() - start;
        if (waited > c.timeout_ns) {
            ht_fault_t f = {EPX_E_TIMEOUT, stage, peer, want, seen, waited};
            ht_fail(c, n, f);
            return false;
        }
    }
}

/* Until *word >= want; what its writer wrote before is seen then. False: stop. */
EPX__DEVICE bool ht_wait(const ht_common_t &c, uint64_t n, const uint64_t *word, uint64_t want, int peer,
                         uint32_t stage)
{
    return ld_acquire_sys_u64(word) >= want || ht_wait_slow(c, n, word, want, peer, stage);
}

EPX__DEVICE bool ht_right_kind(const ht_common_t &c, uint64_t n, int from, uint32_t kind, uint32_t generation)
{
    if (kind == c.kind && generation == c.generation)
        return true;
    ht_fault_t f = {EPX_E_MISMATCH, HT_STAGE_KIND, from, c.kind, kind, 0};
    if (kind == c.kind) {
        f.stage = HT_STAGE_HANDLE;
        f.expected = c.generation;
        f.seen = generation;
    }
    ht_fail(c, n, f);
    return false;
}

EPX__DEVICE bool ht_right_shape(const ht_common_t &c, uint64_t n, int from, uint64_t shape)
{
    if (shape == c.shape)
        return true;
    ht_fault_t f = {EPX_E_MISMATCH, HT_STAGE_SHAPE, from, c.shape, shape, 0};
    ht_fail(c, n, f);
    return false;
}

/* The message of `from` for this half, right in kind, handle and shape; NULL: stop. */
EPX__DEVICE const epx__message_t *ht_message(const ht_common_t &c, uint64_t n, int from)
{
    const epx__message_t *m = mail_at(c, c.window, from, n);
    if (!ht_wait(c, n, &m->sequence, n, from, HT_STAGE_MESSAGE))
        return NULL;
    uint32_t kind = ld_relaxed_sys_u32(&m->kind), generation = ld_relaxed_sys_u32(&m->generation);
    uint64_t shape = ld_relaxed_sys_u64(&m->shape);
    return ht_right_kind(c, n, from, kind, generation) && ht_right_shape(c, n, from, shape) ? m : NULL;
}

/* My slot in the mailbox of `to`, free to write: its last message but one has been read. NULL: stop. One thread. */
EPX__DEVICE epx__message_t *ht_slot(const ht_common_t &c, uint64_t n, int to)
{
    const uint64_t *consumed = &words_at(c, c.window, to)->consumed;
    if (n > 2 && !ht_wait(c, n, consumed, n - 2, to, HT_STAGE_MAILBOX))
        return NULL;
    epx__message_t *m = mail_at(c, c.peers[to], c.rank, n);
    m->kind = c.kind;
    m->generation = c.generation;
    m->shape = c.shape;
    return m;
}

/* ---- messages in packets ---- */

/*
 * A message of a few words goes in packets of 16 bytes, each of which says itself that it has come: no fence between
 * words and flag, which would cost as much as the way. Packet 0 is {sequence, kind and generation}, where every message
 * has them; packet i > 0 is {tag, word}. The tag is no value that another kind's message has there.
 */
EPX__DEVICE uint64_t packet_tag(uint64_t n)
{
    return n ^ 0xa5c3000000000000u;
}
EPX__DEVICE void *packet_at(epx__message_t *m, int i)
{
    return (char *)m + 16 * i;
}

/* What the thread that posts a message looks up before: where to, and the peer's `consumed`, which is often enough. */
typedef struct ht_lead {
    char *window;
    uint64_t consumed;
} ht_lead_t;

/* One thread: words[0] is the shape. False: stop. */
EPX__DEVICE bool ht_post_led(const ht_common_t &c, uint64_t n, int to, ht_lead_t lead, const uint64_t *words, int count)
{
    const uint64_t *word = &words_at(c, c.window, to)->consumed;
    if (n > 2 && lead.consumed < n - 2 && !ht_wait(c, n, word, n - 2, to, HT_STAGE_MAILBOX))
        return false;
    epx__message_t *m = mail_at(c, lead.window, c.rank, n);
    /* What the message permits to touch was last used by earlier kernels of this stream: nothing to fence here. */
    for (int i = 0; i < count; i++)
        st_relaxed_sys_pair(packet_at(m, i + 1), packet_tag(n), words[i]);
    st_relaxed_sys_pair(m, n, (uint64_t)c.generation << 32 | c.kind);
    return true;
}

EPX__DEVICE bool ht_post_packets(const ht_common_t &c, uint64_t n, int to, uint64_t consumed, const uint64_t *words,
                                 int count)
{
    return ht_post_led(c, n, to, ht_lead_t{c.peers[to], consumed}, words, count);
}

/* One look at a message: all packets at once, for each look is a way to memory. Are all there? */
EPX__DEVICE bool look_packets(epx__message_t *m, uint64_t n, epx__pair_t *head, uint64_t *words, int count)
{
    uint32_t there = 0;
    *head = ld_relaxed_sys_pair(m);
    for (int i = 0; i < count; i++) {
        epx__pair_t packet = ld_relaxed_sys_pair(packet_at(m, i + 1));
        words[i] = packet.second;
        there += packet.first == packet_tag(n);
    }
    return head->first >= n && there == (uint32_t)count;
}

/* One thread, at its look number `looks`: the head of a message is there, and not all that left before it, which is a
 * matter of a moment. When that wait began, or 0: stop. `start` 0: now. */
static __device__ __noinline__ uint64_t ht_rest_awaited(const ht_common_t &c, uint64_t n, int from, uint32_t looks,
                                                        uint64_t start)
{
    uint64_t now = globaltimer_ns();
    if (ht_stopped(c, n, (looks & 1023) == 0))
        return 0;
    if (start == 0 || now - start <= c.timeout_ns)
        return start ? start : now;
    ht_fault_t f = {EPX_E_TIMEOUT, HT_STAGE_MESSAGE, from, n, n, now - start};
    ht_fail(c, n, f);
    return 0;
}

/* One thread: the packets of `from`, words[0] the shape. False: stop. They permit nothing: no fence. */
EPX__DEVICE bool ht_hear_packets(const ht_common_t &c, uint64_t n, int from, uint64_t *words, int count)
{
    epx__message_t *m = mail_at(c, c.window, from, n);
    epx__pair_t head;
    uint64_t since = 0;
    for (uint32_t looks = 1; !look_packets(m, n, &head, words, count); looks++) {
        if (head.first < n) {
            if (looks >= 16 && !ht_wait(c, n, &m->sequence, n, from, HT_STAGE_MESSAGE))
                return false;
            continue;
        }
        if (!ht_right_kind(c, n, from, (uint32_t)head.second, (uint32_t)(head.second >> 32)))
            return false;
        if ((looks & 7) == 0) {
            since = ht_rest_awaited(c, n, from, looks, since);
            if (since == 0)
                return false;
        }
    }
    if (!ht_right_kind(c, n, from, (uint32_t)head.second, (uint32_t)(head.second >> 32)))
        return false;
    return ht_right_shape(c, n, from, words[0]);
}

/* ... What they permit to touch may be touched. */
EPX__DEVICE bool ht_read_packets(const ht_common_t &c, uint64_t n, int from, uint64_t *words, int count)
{
    bool ok = ht_hear_packets(c, n, from, words, count);
    fence_acq_rel_sys();
    return ok;
}

/* ---- entering and leaving a half ---- */

/* Block: its warps have said nothing yet of how far they are. */
EPX__DEVICE void ht_block_start(ht_block_t *b)
{
    if (threadIdx.x < HT_WARPS_MAX)
        b->progress[threadIdx.x] = b->told[threadIdx.x] = 0;
    if (threadIdx.x == 0)
        b->ended = 0;
}

/* With `lead`: thread r of block 0 also looks up what it needs to post to rank r. All looks are under way together. */
EPX__DEVICE bool ht_enter_led(const ht_common_t &c, ht_block_t *b, ht_lead_t *lead)
{
    if (!c.state)
        return false; /* a first launch, at creation: see epx__ht_load_begin */
    uint64_t alarm = 0, sequence = 0;
    if (threadIdx.x == 0) {
        alarm = ld_relaxed_sys_u64(alarm_of(c, c.window));
        sequence = ld_relaxed_sys_u64(&c.state->sequence);
    }
    if (lead && blockIdx.x == 0 && threadIdx.x < (uint32_t)c.ranks) {
        lead->window = c.peers[threadIdx.x];
        lead->consumed =
            ld_acquire_sys_u64(&words_at(c, c.window, (int)threadIdx.x)->consumed); /* what follows waits */
    }
    ht_block_start(b);
    if (threadIdx.x == 0) {
        b->n = sequence + 1;
        b->stop = alarm != 0 && ht_stopped(c, b->n, false);
    }
    __syncthreads();
    return b->stop == 0;
}
EPX__DEVICE bool ht_enter(const ht_common_t &c, ht_block_t *b)
{
    return ht_enter_led(c, b, NULL);
}

/*
 * True in the last block of the grid, for all its threads: what the other blocks did is seen. Whoever failed, or heard
 * of a failure, has raised the own window's alarm and says so in the upper half of the count: b->stop. With `tell`, and
 * if nobody failed, the peers are told at once that this rank's part of the half is done.
 */
EPX__DEVICE bool ht_count_block(const ht_common_t &c, ht_block_t *b, bool tell)
{
    uint32_t lane = threadIdx.x;
    __syncthreads();
    char *window = tell && lane < 32 && lane < (uint32_t)c.ranks ? c.peers[lane] : NULL; /* looked up meanwhile */
    if (lane == 0) {
        uint32_t stopped = ld_relaxed_sys_u64(alarm_of(c, c.window)) != 0;
        fence_acq_rel_sys();
        uint32_t before = add_relaxed_gpu_u32(&c.state->blocks_done, 1u | stopped << 16);
        b->last = (before & 0xffffu) == gridDim.x - 1;
        b->stop = stopped || before >> 16;
        fence_acq_rel_gpu();
        if (b->last && b->stop)
            ht_stopped(c, b->n, false); /* leaves the host its record */
    }
    if (tell && lane < 32) {
        __syncwarp();
        for (uint32_t r = lane; b->last && !b->stop && r < (uint32_t)c.ranks; r += 32) {
            if (ht_neighbour(c, (int)r))
                st_release_sys_u64(&words_at(c, r < 32 ? window : c.peers[r], c.rank)->consumed, b->n);
        }
    }
    __syncthreads();
    return b->last != 0;
}
EPX__DEVICE bool ht_last_block(const ht_common_t &c, ht_block_t *b)
{
    return ht_count_block(c, b, false);
}

/* Last block: my part of the half is done; tell the peers. */
EPX__DEVICE void ht_tell_end(const ht_common_t &c, uint64_t n)
{
    for (int r = (int)threadIdx.x; r < c.ranks; r += (int)blockDim.x) {
        if (ht_neighbour(c, r))
            st_release_sys_u64(&words_at(c, c.peers[r], c.rank)->consumed, n);
    }
}

/* Last block: wait until all peers have done theirs. The alarm is looked at together with the last look at each word:
 * who fails in this half does not write it. */
EPX__DEVICE bool ht_wait_ends(const ht_common_t &c, ht_block_t *b)
{
    bool ok = true;
    for (int r = (int)threadIdx.x; r < c.ranks && ok; r += (int)blockDim.x) {
        const uint64_t *word = &words_at(c, c.window, r)->consumed, *alarm = alarm_of(c, c.window);
        uint64_t seen = b->n, raised = 0;
        bool near = ht_neighbour(c, r);
        for (int polls = 0; polls < 64 && near; polls++) {
            raised = ld_relaxed_sys_u64(alarm); /* first: what follows an acquire waits for it */
            seen = ld_acquire_sys_u64(word);
            if (seen >= b->n || raised)
                break;
        }
        if (seen < b->n || raised)
            ok = !ht_stopped(c, b->n, false) && ht_wait(c, b->n, word, b->n, r, HT_STAGE_END) &&
                 !ht_stopped(c, b->n, false);
    }
    return __syncthreads_and(ok) != 0;
}

/* Last block, after everything else: the half is over. */
EPX__DEVICE void ht_leave(const ht_common_t &c, ht_block_t *b, bool good)
{
    for (int r = (int)threadIdx.x; r < c.ranks; r += (int)blockDim.x)
        c.taken[r] = 0;
    __syncthreads();
    if (threadIdx.x != 0)
        return;
    c.state->blocks_done = 0;
    c.state->barrier = 0;
    c.state->taken_rows = 0;
    c.state->taken_ids = 0;
    c.state->begun = 0;
    if (good)
        c.state->sequence = b->n;
}

#endif
