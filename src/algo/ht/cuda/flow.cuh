/*
 * Stages in shared memory for the bulk copy engine, and flows: rows of one peer moved in order, batch by batch.
 *
 * A flow has N rows, C of them a batch. A batch may be moved once its gate word allows: the rows have arrived (copying
 * out), or the ring's earlier rows have been read (pushing). When all rows of a batch have been moved, by whichever
 * warps, the last one publishes the batch's word at the peer. Words are kept per batch modulo HT_WORDS and only grow.
 *
 * A warp that serves several peers never waits for one of them: it looks at each in turn (see docs/PROTOCOL-HT.md, why
 * a fixed order can close a circle).
 */
#ifndef EPX_ALGO_HT_CUDA_FLOW_CUH
#define EPX_ALGO_HT_CUDA_FLOW_CUH

#include "algo/ht/cuda/wait.cuh"

/* A warp's stages. Phases are counted by how often a stage was filled. */
typedef struct ht_stages {
    char *memory;
    uint64_t *bars;
    uint32_t bytes;  /* of one stage */
    uint32_t parity; /* bit s: parity of stage s's next completion */
} ht_stages_t;

EPX__DEVICE ht_stages_t stages_init(const ht_cut_t &cut, char *shared)
{
    uint32_t warp = threadIdx.x / 32;
    ht_stages_t s = {shared + (size_t)warp * cut.stages * cut.stage_bytes,
                     (uint64_t *)(shared + cut.bars_offset) + warp * cut.stages, cut.stage_bytes, 0};
    if (threadIdx.x % 32 == 0) {
        for (uint32_t i = 0; i < cut.stages; i++)
            mbarrier_init(&s.bars[i]);
        mbarrier_fence_init();
    }
    __syncwarp();
    return s;
}
EPX__DEVICE char *stage_at(const ht_stages_t &s, uint32_t i)
{
    return s.memory + (size_t)i * s.bytes;
}
/* The bytes of the stage's last fill are there. Local or NVLink memory: this cannot wait long. */
EPX__DEVICE void stage_wait(ht_stages_t &s, uint32_t i)
{
    while (!mbarrier_try_wait(&s.bars[i], s.parity >> i & 1))
        ;
    s.parity ^= 1u << i;
}

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

EPX__DEVICE bool gate_open(const ht_flow_t &f, uint64_t n, uint32_t p)
{
    uint32_t b = p / f.batch;
    if (b < f.gate_lag)
        return true;
    b -= f.gate_lag;
    return ld_acquire_sys_u64(&f.gate[b % HT_WORDS]) >= batch_word(n, b);
}

/* How often a batch of a flow is counted until it is complete: its rows, `times` each. */
EPX__DEVICE uint32_t batch_total(uint32_t rows, uint32_t batch, uint32_t b, uint32_t times)
{
    uint32_t left = rows - b * batch;
    return (left < batch ? left : batch) * times;
}

/* One thread: one more of batch b is done; the last one publishes. What this thread did before is seen with the word.
 */
EPX__DEVICE void count_batch(uint32_t *counts, uint64_t *publish, uint64_t n, uint32_t b, uint32_t total)
{
    fence_proxy_async();
    if (add_acq_rel_gpu_u32(&counts[b % HT_WORDS], 1) != total - 1)
        return;
    counts[b % HT_WORDS] = 0;
    fence_acq_rel_sys();
    fence_proxy_async();
    st_release_sys_u64(&publish[b % HT_WORDS], batch_word(n, b));
}

EPX__DEVICE void flow_count(const ht_flow_t &f, uint64_t n, uint32_t p)
{
    uint32_t b = p / f.batch;
    count_batch(f.counts, f.publish, n, b, batch_total(f.rows, f.batch, b, 1));
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

/* Warp: the payload of one row, through the stages. Leaves the stores of at most the last chunk's group under way. */
EPX__DEVICE void flow_move_x(const ht_flow_t &f, const ht_cut_t &cut, ht_stages_t &s, uint32_t &turn, uint32_t p)
{
    const char *from = f.x + flow_from(f, p) * f.x_stride;
    char *to = f.x_to + flow_to(f, p) * f.x_to_stride;
#if EPX__BULK
    for (uint64_t at = 0; at < f.x_bytes; at += cut.stage_bytes) {
        uint32_t bytes = f.x_bytes - at < cut.stage_bytes ? (uint32_t)(f.x_bytes - at) : cut.stage_bytes;
        uint32_t i = turn++ % cut.stages;
        if (threadIdx.x % 32 == 0) {
            if (cut.stages > 1)
                bulk_wait_read_but_1();
            else
                bulk_wait_read_all();
            fence_proxy_async(); /* the rows were announced by a word: generic before async */
            mbarrier_expect_bytes(&s.bars[i], bytes);
            bulk_load(stage_at(s, i), from + at, bytes, &s.bars[i]);
        }
        stage_wait(s, i);
        if (threadIdx.x % 32 == 0) {
            bulk_store(to + at, stage_at(s, i), bytes);
            bulk_commit();
        }
        __syncwarp();
    }
#else
    for (uint64_t at = threadIdx.x % 32 * 16; at < f.x_bytes; at += 512)
        st_global_16(to + at, ld_global_16(from + at));
#endif
}

/* Warp: as many rows as the gate lets through, from *cursor on in steps. True if any. */
EPX__DEVICE bool flow_drain(const ht_flow_t &f, const ht_cut_t &cut, ht_stages_t &s, uint32_t &turn, uint64_t n,
                            uint32_t *cursor, uint32_t step)
{
    uint32_t p = *cursor, last = 0;
    bool moved = false;
    while (p < f.rows) {
        bool open = gate_open(f, n, p);
        if (!__all_sync(0xffffffffu, open))
            break;
        flow_move_parts(f, p);
        if (f.x_bytes)
            flow_move_x(f, cut, s, turn, p);
        __syncwarp();
        if (f.publish && threadIdx.x % 32 == 0 && moved) {
            /* The row before is written by now, but for the newest group. Rows of several chunks: all but one group. */
            bulk_wait_done_but_1();
            flow_count(f, n, last);
        }
        last = p;
        moved = true;
        p += step;
    }
    if (f.publish && moved && threadIdx.x % 32 == 0) {
        bulk_wait_done();
        flow_count(f, n, last);
    }
    __syncwarp();
    *cursor = p;
    return moved;
}

/*
 * Warp `w` of `warps`: its share of the flows with all peers. make(p, n, peer, &flow) fills in a flow; false: stop.
 * `cursors`: shared memory, [ranks].
 */
template <typename params_t, bool (*make)(const params_t &, uint64_t, int, ht_flow_t *)>
__device__ bool flows_run(const params_t &p, ht_stages_t &s, uint64_t n, uint32_t w, uint32_t warps, uint32_t *cursors)
{
    const ht_common_t &c = p.c;
    uint32_t peers = (uint32_t)c.ranks - 1, mine = w % warps, step = 1, own = 0, turn = 0;
    bool shared = warps >= peers; /* several warps a peer: one cursor in a register */
    if (peers == 0)
        return true;
    if (shared) {
        mine = w % peers;
        own = w / peers;
        step = (warps - mine + peers - 1) / peers;
    } else {
        for (uint32_t i = w + threadIdx.x % 32 * warps; i < peers; i += 32 * warps)
            cursors[i] = 0;
        __syncwarp();
    }
    ht_flow_t f;
    f.peer = -1;
    uint64_t idle_since = 0;
    for (uint32_t rounds = 1;; rounds++) {
        bool left = false, moved = false;
        int waiting = -1;
        for (uint32_t i = mine; i < peers; i += shared ? peers : warps) {
            int peer = (int)(i < (uint32_t)c.rank ? i : i + 1);
            if (f.peer != peer && !make(p, n, peer, &f))
                return false;
            uint32_t cursor = shared ? own : cursors[i];
            if (cursor >= f.rows)
                continue;
            moved = flow_drain(f, p.cut, s, turn, n, &cursor, step) || moved;
            left = left || cursor < f.rows;
            waiting = cursor < f.rows ? peer : waiting;
            if (shared)
                own = cursor;
            else if (threadIdx.x % 32 == 0)
                cursors[i] = cursor;
            __syncwarp();
        }
        if (!left)
            break;
        if (moved) {
            idle_since = 0;
            continue;
        }
        int stop = 0;
        if (threadIdx.x % 32 == 0 && (rounds & 7) == 0) {
            uint64_t now = globaltimer_ns();
            idle_since = idle_since ? idle_since : now;
            if (now - idle_since > c.timeout_ns) {
                ht_fault_t fault = {EPX_E_TIMEOUT, HT_STAGE_ARRIVAL, waiting, 0, 0, now - idle_since};
                if (f.gate_lag)
                    fault.stage = HT_STAGE_CREDIT;
                ht_fail(c, n, fault);
            }
            stop = ht_stopped(c, n, (rounds & 1023) == 0);
        }
        if (__shfl_sync(0xffffffffu, stop, 0))
            return false;
    }
    bulk_wait_done();
    return true;
}

#endif
