/*
 * Flows: rows of one peer moved in order, batch by batch.
 *
 * A flow has N rows, C of them a batch. Warps take rows in ascending order, whoever is free the next; with fewer warps
 * than peers a warp moves all rows of its peers. A batch may be moved once its gate word allows: the rows have arrived
 * (copying out), or the ring's earlier rows have been read (pushing). When all rows of a batch have been moved, by
 * whichever warps, the last one publishes the batch's word at the peer. Words are kept per batch modulo HT_WORDS and
 * only grow: of two batches that share one, the later waits for the earlier, since laps divide HT_WORDS (halves.c).
 *
 * A warp that serves several peers never waits for one of them: it looks at each in turn (see docs/PROTOCOL-HT.md, why
 * a fixed order can close a circle).
 */
#ifndef EPX_ALGO_HT_CUDA_FLOW_CUH
#define EPX_ALGO_HT_CUDA_FLOW_CUH

#include "algo/ht/cuda/copy.cuh"
#include "algo/ht/cuda/share.cuh"

/* ---- flows ---- */

typedef struct ht_part {
    const char *from;
    char *to;
    uint64_t bytes; /* a row; a multiple of 4. 0: absent */
} ht_part_t;

#define FLOW_PARTS 4

typedef struct ht_flow {
    int peer;
    uint32_t rows, batch, lap; /* lap: batches in the ring; a pushing flow may be that far ahead */
    const uint64_t *gate;      /* [HT_WORDS] */
    uint32_t gate_lag;         /* 0: batch b waits for word b; else batch b waits for word b - lag */
    uint64_t *publish;         /* [HT_WORDS] at the peer; NULL: nobody asks */
    uint32_t *counts;          /* [HT_WORDS] */
    /* row p is read at from_first + p % from_ring and goes to to_first + p % to_ring (ring 0: no modulo) */
    uint64_t from_first, to_first;
    uint32_t from_ring, to_ring;
    const char *x;
    char *x_to;
    uint64_t x_bytes, x_stride, x_to_stride; /* x_bytes 0: no payload */
    ht_part_t part[FLOW_PARTS];
} ht_flow_t;

EPX__DEVICE uint64_t flow_from(const ht_flow_t &f, uint32_t p)
{
    return f.from_first + (f.from_ring ? p % f.from_ring : p);
}
EPX__DEVICE uint64_t flow_to(const ht_flow_t &f, uint32_t p)
{
    return f.to_first + (f.to_ring ? p % f.to_ring : p);
}

/* Warp: may row p be moved? Each lane looks at one batch, so that a look, which is a way to memory, serves 32 of them:
 * all before batch *open are known to be. */
EPX__DEVICE bool gate_open(const ht_flow_t &f, uint64_t n, uint32_t p, uint32_t *open)
{
    uint32_t b = p / f.batch, mine = b - f.gate_lag + threadIdx.x % 32;
    if (b < f.gate_lag || b - f.gate_lag < *open)
        return true;
    bool last = mine >= (f.rows + f.batch - 1) / f.batch; /* no such batch */
    uint32_t shut =
        __ballot_sync(0xffffffffu, !last && ld_acquire_sys_u64(&f.gate[mine % HT_WORDS]) < batch_word(n, mine));
    __syncwarp(); /* what one lane has seen is seen by all */
    *open = b - f.gate_lag + (shut ? (uint32_t)__ffs((int)shut) - 1 : 32);
    return (shut & 1) == 0;
}

/* Rows of batch b. */
EPX__DEVICE uint32_t batch_total(uint32_t rows, uint32_t batch, uint32_t b)
{
    uint32_t left = rows - b * batch;
    return left < batch ? left : batch;
}

/*
 * One thread: one more of batch b is done. True: it was the last one, and the caller publishes the batch. It fences
 * before it counts (what is told must be written for all) and before it publishes (what others counted, too).
 */
EPX__DEVICE bool count_batch(uint32_t *counts, uint32_t b, uint32_t total)
{
    if (add_relaxed_gpu_u32(&counts[b % HT_WORDS], 1) != total - 1)
        return false;
    counts[b % HT_WORDS] = 0;
    return true;
}
EPX__DEVICE void publish_batch(uint64_t *words, uint64_t n, uint32_t b)
{
    st_relaxed_sys_u64(&words[b % HT_WORDS], batch_word(n, b));
}

EPX__DEVICE uint32_t flow_count(const ht_flow_t &f, uint64_t n, uint32_t p)
{
    uint32_t b = p / f.batch;
    return count_batch(f.counts, b, batch_total(f.rows, f.batch, b));
}
EPX__DEVICE void flow_publish(const ht_flow_t &f, uint64_t n, uint32_t p, uint32_t complete)
{
    if (complete)
        publish_batch(f.publish, n, p / f.batch);
}

/* Where one of a token's rows is counted. */
typedef struct ht_counted {
    uint32_t batch, total; /* total: rows of the batch */
    uint32_t *counts;
    uint64_t *words; /* where the batch is published */
} ht_counted_t;

/* For announce, of a context that has params p: the token's rows, each counted in its batch. at(context, token, slot,
 * &where): 1, where the row in that slot is counted; 0 it is not; -1 no more rows. */
template <typename context_t, int (*at)(const context_t &, uint32_t, uint32_t, ht_counted_t *)>
__device__ uint32_t count_token_at(const context_t &x, uint64_t n, uint32_t token)
{
    uint32_t complete = 0;
    ht_counted_t where = {};
    for (uint32_t slot = 0; slot < x.p->h.slots; slot++) {
        int counted = at(x, token, slot, &where);
        if (counted < 0)
            break;
        if (!counted || !count_batch(where.counts, where.batch, where.total))
            continue;
        if (slot < 32) {
            complete |= 1u << slot;
        } else { /* a mask over many ranks */
            fence_acq_rel_sys();
            publish_batch(where.words, n, where.batch);
        }
    }
    return complete;
}
template <typename context_t, int (*at)(const context_t &, uint32_t, uint32_t, ht_counted_t *)>
__device__ void publish_token_at(const context_t &x, uint64_t n, uint32_t token, uint32_t complete)
{
    ht_counted_t where = {};
    for (; complete; complete &= complete - 1) {
        at(x, token, (uint32_t)__ffs((int)complete) - 1, &where);
        publish_batch(where.words, n, where.batch);
    }
}

/* Warp: everything but the payload. */
EPX__DEVICE void flow_move_parts(const ht_flow_t &f, uint32_t p)
{
    uint32_t lane = threadIdx.x % 32;
    uint64_t from = flow_from(f, p), to = flow_to(f, p);
    for (int i = 0; i < FLOW_PARTS; i++) {
        const ht_part_t &part = f.part[i];
        const uint32_t *src = (const uint32_t *)(part.from + from * part.bytes);
        uint32_t *dst = (uint32_t *)(part.to + to * part.bytes);
        for (uint32_t w = lane; w < part.bytes / 4; w += 32)
            dst[w] = ld_relaxed_sys_u32(&src[w]);
    }
}

/* Which peers a warp serves. */
typedef struct ht_share {
    uint32_t first, next; /* peers first, first + next, ... in the list of peers */
    uint32_t own, warps;  /* it is warp `own` of so many that serve the peer */
    bool several;         /* peers this warp may have to serve, each alone: it counts rows itself */
} ht_share_t;

EPX__DEVICE ht_share_t share_of(uint32_t w, uint32_t warps, uint32_t peers)
{
    ht_share_t s = {w, warps, 0, 1, true};
    if (warps >= peers) {
        s.first = w % peers;
        s.next = peers;
        s.own = w / peers;
        s.warps = (warps - s.first + peers - 1) / peers;
        s.several = false;
    }
    return s;
}
EPX__DEVICE int peer_at(const ht_common_t &c, uint32_t i)
{
    return (int)(i < (uint32_t)c.rank ? i : i + 1);
}

/* A warp on its flows. */
typedef struct ht_runner {
    ht_block_t *b;
    ht_share_t share;
    ht_turns_t at; /* rows of the flow it is at */
    uint32_t open; /* its batches whose gates are known to be open */
    uint32_t done; /* rows moved, in all */
} ht_runner_t;

/* Warp: rows have been moved, the last of them `last`. When they are written, tell, or count them itself. */
template <bool engine>
EPX__DEVICE void rows_moved(const ht_flow_t &f, ht_runner_t &r, uint32_t last)
{
    if (engine)
        bulk_wait_done();
    if (!r.share.several) {
        if (engine)
            tell_progress(r.b, r.done);
        else
            tell_items(r.b, r.done);
    } else {
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            fence_proxy_async();
            fence_acq_rel_sys();
            if (flow_count(f, r.b->n, last)) {
                fence_acq_rel_sys();
                flow_publish(f, r.b->n, last, 1);
            }
        }
    }
}

/* Warp: the payload of one row by ordinary loads and stores. Called, so that its registers are its own. */
static __device__ __noinline__ void flow_copy_x(char *to, const char *from, uint64_t bytes)
{
    copy_16<14>(to, from, bytes);
}

/* Warp: the payload of one row by the copy engine: as many pieces as there are stages are loaded together, then stored
 * one by one; there is a payload. Leaves stores under way. The row before, if `tell`, is told while the first pieces
 * are on their way. */
EPX__DEVICE void flow_move_x(const ht_flow_t &f, const ht_cut_t &cut, ht_stages_t &s, ht_runner_t &r, uint32_t p,
                             bool tell, uint32_t last)
{
    const char *from = f.x + flow_from(f, p) * f.x_stride;
    char *to = f.x_to + flow_to(f, p) * f.x_to_stride;
    uint32_t left = (uint32_t)f.x_bytes, lane = threadIdx.x % 32;
    while (left) {
        uint32_t pieces = (left + cut.stage_bytes - 1) / cut.stage_bytes;
        pieces = pieces < cut.stages ? pieces : cut.stages;
        bulk_wait_read_all();
        fence_proxy_async(); /* the rows were announced by a word: generic before async */
        for (uint32_t i = 0; lane == 0 && i < pieces; i++) {
            uint32_t bytes =
                left - i * cut.stage_bytes < cut.stage_bytes ? left - i * cut.stage_bytes : cut.stage_bytes;
            mbarrier_expect_bytes(&s.bars[i], bytes);
            bulk_load(stage_at(s, i), from + i * cut.stage_bytes, bytes, &s.bars[i]);
        }
        if (tell)
            rows_moved<true>(f, r, last);
        tell = false;
        for (uint32_t i = 0; i < pieces; i++) {
            uint32_t bytes = left < cut.stage_bytes ? left : cut.stage_bytes;
            stage_wait(s, i);
            if (lane == 0)
                bulk_store(to, stage_at(s, i), bytes);
            from += bytes;
            to += bytes;
            left -= bytes;
        }
        bulk_commit();
        __syncwarp();
    }
}

/* Warp: row p is next to be moved; for the announcing warp it is item number r.done of this one. */
EPX__DEVICE void row_taken(const ht_flow_t &f, ht_runner_t &r, uint32_t p)
{
    if (f.publish && !r.share.several && threadIdx.x % 32 == 0)
        leave_item(r.b, r.done, p);
    r.done++;
    if (r.share.several)
        r.at.now++;
    else
        turns_next(&r.at);
}

/* Warp: as many of its rows as the gate lets through. True if any. */
template <bool engine>
EPX__DEVICE bool flow_drain(const ht_flow_t &f, const ht_cut_t &cut, ht_stages_t &s, ht_runner_t &r)
{
    uint32_t last = 0;
    bool moved = false, untold = false;
    while (r.at.now < f.rows && gate_open(f, r.b->n, r.at.now, &r.open)) {
        uint32_t p = r.at.now;
        if (engine)
            flow_move_x(f, cut, s, r, p, untold, last);
        else
            flow_copy_x(f.x_to + flow_to(f, p) * f.x_to_stride, f.x + flow_from(f, p) * f.x_stride, f.x_bytes);
        flow_move_parts(f, p);
        row_taken(f, r, p);
        last = p;
        moved = true;
        untold = f.publish != NULL;
        if (!engine && untold) {
            rows_moved<false>(f, r, last);
            untold = false;
        }
    }
    if (untold)
        rows_moved<engine>(f, r, last);
    __syncwarp();
    return moved;
}

/* All lanes: is it over, after so many rounds in which nothing moved? */
EPX__DEVICE bool flows_stuck(const ht_common_t &c, uint64_t n, const ht_flow_t &f, int waiting, uint32_t rounds,
                             uint64_t *idle_since)
{
    int stop = 0;
    if (threadIdx.x % 32 == 0 && (rounds & 7) == 0) {
        uint64_t now = globaltimer_ns();
        *idle_since = *idle_since ? *idle_since : now;
        if (now - *idle_since > c.timeout_ns) {
            ht_fault_t fault = {EPX_E_TIMEOUT, HT_STAGE_ARRIVAL, waiting, 0, 0, now - *idle_since};
            if (f.gate_lag)
                fault.stage = HT_STAGE_CREDIT;
            ht_fail(c, n, fault);
        }
        stop = ht_stopped(c, n, (rounds & 1023) == 0);
    }
    return __shfl_sync(0xffffffffu, stop, 0) != 0;
}

/*
 * Warp `w` of `warps`: its share of the flows with all peers. make(p, n, peer, &flow) fills in a flow, by any lanes;
 * false: stop. `cursors`: shared memory, [ranks]. `engine`: by the copy engine through its stages `s`, which are cut as
 * p.cut says: more bytes a second of an SM near memory (49 GB/s on an H200, 35 by loads and stores), but a row is told
 * late where a link is full, for all of an SM's rows wait for each other. Else `s` is not looked at.
 */
template <typename params_t, bool (*make)(const params_t &, uint64_t, int, ht_flow_t *), bool engine>
__device__ bool flows_run(const params_t &p, ht_stages_t &s, ht_block_t *b, uint32_t w, uint32_t warps,
                          uint32_t *cursors)
{
    const ht_common_t &c = p.c;
    uint32_t peers = (uint32_t)c.ranks - 1;
    if (peers == 0)
        return true;
    ht_runner_t r = {b, share_of(w, warps, peers), {}, 0, 0};
    for (uint32_t i = r.share.first + threadIdx.x % 32 * r.share.next; r.share.several && i < peers;
         i += 32 * r.share.next)
        cursors[i] = 0;
    __syncwarp();
    if (!r.share.several)
        r.at = turns_first(&c.taken[peer_at(c, r.share.first)], r.share.own, r.share.warps);
    ht_flow_t f = {};
    f.peer = -1;
    uint64_t idle_since = 0;
    for (uint32_t rounds = 1;; rounds++) {
        bool left = false, moved = false;
        int waiting = -1;
        for (uint32_t i = r.share.first; i < peers; i += r.share.next) {
            int peer = peer_at(c, i);
            if (f.peer != peer && !__all_sync(0xffffffffu, make(p, b->n, peer, &f)))
                return false;
            if (r.share.several) {
                r.at.now = cursors[i];
                r.open = 0;
            }
            if (r.at.now >= f.rows)
                continue;
            moved = flow_drain < engine && EPX__BULK > (f, p.cut, s, r) || moved;
            left = left || r.at.now < f.rows;
            waiting = r.at.now < f.rows ? peer : waiting;
            __syncwarp();
            if (r.share.several && threadIdx.x % 32 == 0)
                cursors[i] = r.at.now;
            __syncwarp();
        }
        if (!left)
            return true;
        if (moved)
            idle_since = 0;
        else if (flows_stuck(c, b->n, f, waiting, rounds, &idle_since))
            return false;
    }
}

/* Announcing warp of a block that runs flows, number `block` of `blocks`. told(p, peer, &flow) fills in what flow_count
 * needs; it must not wait, for the other warps wait for this one (leave_item). */
template <typename params_t, void (*told)(const params_t &, int, ht_flow_t *)>
__device__ void flows_announce(const params_t &p, uint32_t workers, ht_block_t *b, uint32_t block, uint32_t blocks)
{
    uint32_t peers = (uint32_t)p.c.ranks - 1, lane = threadIdx.x % 32, warps = blocks * workers;
    if (peers == 0 || warps < peers)
        return;
    ht_flow_t f = {};
    told(p, peer_at(p.c, share_of((lane < workers ? lane : 0) * blocks + block, warps, peers).first), &f);
    if (__any_sync(0xffffffffu, f.publish != NULL))
        announce<ht_flow_t, flow_count, flow_publish>(f, b, workers);
}

#endif
