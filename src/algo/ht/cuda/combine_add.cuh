/*
 * combine: adding. Warps take tokens, whoever is free the next. A warp loads a piece of all rows of a token into a
 * stage, one buffer a row, while it adds the pieces of the stage before; below sm_90, or with many rows a token, it
 * reads them where they are.
 */
#ifndef EPX_ALGO_HT_CUDA_COMBINE_ADD_CUH
#define EPX_ALGO_HT_CUDA_COMBINE_ADD_CUH

#include "algo/ht/cuda/combine_rows.cuh"
#include "algo/ht/cuda/sum.cuh"

/* An adding warp. */
typedef struct ht_adder {
    const ht_source_t *sources;
    ht_block_t *b;
    uint32_t own, warps; /* it is warp `own` of so many that add from the start; beyond: one that has been pushing */
    uint32_t done;       /* tokens added */
    bool credit;         /* somebody waits for what has been read */
} ht_adder_t;

EPX__DEVICE ht_turns_t adder_turns(const ht_combine_t &p, const ht_adder_t &x)
{
    return turns_first(&p.c.state->taken_rows, x.own, x.warps);
}

/* ---- telling what has been read ---- */

/* Warp: a token has been added. */
EPX__DEVICE void count_added(ht_adder_t &x, uint32_t token)
{
    if (!x.credit)
        return;
    if (threadIdx.x % 32 == 0)
        leave_item(x.b, x.done, token);
    tell_items(x.b, ++x.done);
}

/* For the announcing warp: one token has been read. */
typedef struct ht_added {
    const ht_combine_t *p;
    const ht_source_t *sources;
} ht_added_t;

EPX__DEVICE int added_at(const ht_added_t &x, uint32_t token, uint32_t slot, ht_counted_t *at)
{
    const ht_combine_t &p = *x.p;
    ht_pick_t k = pick_at(p, token, slot);
    if (k.rank < 0)
        return -1;
    const ht_source_t &s = x.sources[k.rank];
    if (k.rank == p.c.rank || !wants_credit(p, s))
        return 0;
    at->batch = ((uint32_t)k.row - s.first) / p.batch;
    at->total = batch_total(s.rows, p.batch, at->batch);
    at->counts = p.c.consumed + (size_t)k.rank * HT_WORDS;
    at->words = take_words(p.c, p.c.peers[k.rank], p.c.rank);
    return 1;
}

/* ---- adding ---- */

/* Biases and the result of one 16-byte piece. */
template <int dtype>
EPX__DEVICE void end_16(const ht_combine_t &p, float *sum, uint64_t at)
{
    for (int b = 0; b < 2; b++) {
        if (p.bias[b])
            add_16<dtype>(sum, *(const uint4 *)(p.bias[b] + at));
    }
    st_global_16(p.out + at, round_16<dtype>(sum));
}

/* Pieces of 16 bytes that a lane adds together, 512 bytes apart, so that each covers the latency of the others. */
#define ADD_PIECES 4

template <int dtype>
EPX__DEVICE void add_pieces_16(float (*sum)[8], const uint4 *v)
{
#pragma unroll
    for (int k = 0; k < ADD_PIECES; k++)
        add_16<dtype>(sum[k], v[k]);
}

/* Lane: its pieces from `at` on, of the first `rows` buffers of a stage, then the biases. `all`: every piece is there;
 * else those before `end`. */
template <int dtype, bool all>
EPX__DEVICE void add_group(const ht_combine_t &p, const char *stage, uint32_t rows, uint32_t at, uint32_t end,
                           uint64_t out)
{
    float sum[ADD_PIECES][8] = {};
    const char *from = stage + at;
    for (uint32_t j = 0; j < rows; j++, from += p.cut.chunk_bytes) {
        uint4 v[ADD_PIECES] = {};
#pragma unroll
        for (int k = 0; k < ADD_PIECES; k++) {
            if (all || at + k * 512 < end)
                v[k] = *(const uint4 *)(from + k * 512);
        }
        add_pieces_16<dtype>(sum, v);
    }
    for (int b = 0; b < 2; b++) {
        if (!p.bias[b])
            continue;
        uint4 v[ADD_PIECES] = {};
#pragma unroll
        for (int k = 0; k < ADD_PIECES; k++) {
            if (all || at + k * 512 < end)
                v[k] = ld_global_16(p.bias[b] + out + at + k * 512);
        }
        add_pieces_16<dtype>(sum, v);
    }
#pragma unroll
    for (int k = 0; k < ADD_PIECES; k++) {
        if (all || at + k * 512 < end)
            st_global_16(p.out + out + at + k * 512, round_16<dtype>(sum[k]));
    }
}

/* Warp: add one chunk of the rows of a token, which are the first `rows` buffers of a stage. */
template <int dtype>
EPX__DEVICE void add_staged(const ht_combine_t &p, const char *stage, uint32_t rows, uint32_t token, uint32_t chunk)
{
    uint32_t end = chunk_bytes_of(p, chunk), lane = threadIdx.x % 32 * 16, at = 0;
    uint64_t out = token * p.row_bytes + chunk * p.cut.chunk_bytes;
    for (; at + ADD_PIECES * 512 <= end; at += ADD_PIECES * 512)
        add_group<dtype, true>(p, stage, rows, lane + at, end, out);
    if (at < end)
        add_group<dtype, false>(p, stage, rows, lane + at, end, out);
}

/* Warp: a token's whole row straight from where its rows are, any number of them. */
template <int dtype>
EPX__DEVICE void add_plain(const ht_combine_t &p, const ht_source_t *sources, uint32_t token)
{
    for (uint32_t v = threadIdx.x % 32 * 16; v < (uint32_t)p.row_bytes; v += 512) {
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (uint32_t j = 0; j < p.h.slots; j++) {
            ht_pick_t k = pick_at(p, token, j);
            if (k.rank < 0)
                break;
            add_16<dtype>(sum, ld_global_16(x_row(sources[k.rank], k.row) + v));
        }
        end_16<dtype>(p, sum, token * p.row_bytes + v);
    }
}

/* Warp: the token's weights, likewise in rank order. */
EPX__DEVICE void add_weights(const ht_combine_t &p, const ht_source_t *sources, uint32_t token)
{
    uint32_t lane = threadIdx.x % 32;
    if (!p.weights || lane >= p.topk)
        return;
    float sum = 0.0f;
    for (uint32_t j = 0; j < p.h.slots; j++) {
        ht_pick_t k = pick_at(p, token, j);
        if (k.rank < 0)
            break;
        sum = __fadd_rn(sum, ld_relaxed_sys_f32(w_row(sources[k.rank], k.row, p.topk) + lane));
    }
    p.out_weights[(size_t)token * p.topk + lane] = sum;
}

/* What an adding warp loads next: where it is, and lane j's row. */
typedef struct ht_loader {
    ht_turns_t at;
    uint32_t chunk, stage;
    bool open;                  /* the token's rows have come, `from` and `rows` are its */
    uint32_t rows;              /* of the token */
    ht_pick_t pick, next;       /* of this token, and of the one after */
    const char *from;           /* lane's row; NULL: none */
    uint32_t in_rows, in_token; /* lane s: what stage s holds */
} ht_loader_t;

/* Warp: where it starts, looked up while messages are on their way. */
EPX__DEVICE ht_loader_t loader_first(const ht_combine_t &p, const ht_adder_t &x)
{
    ht_loader_t l = {adder_turns(p, x), 0, 0, false, 0, {-1, -1}, {-1, -1}, NULL, 0, 0};
    l.pick = pick_at(p, l.at.now, threadIdx.x % 32);
    return l;
}

/* Warp: at a new token, have its rows come? Lane's row is where it says then. 1 yes, 0 not yet, -1 stop. */
EPX__DEVICE int open_token(const ht_combine_t &p, const ht_adder_t &x, ht_loader_t *l, bool wait)
{
    if (!__all_sync(0xffffffffu, row_ready(p, x.sources, x.b->n, l->pick, wait)))
        return wait ? -1 : 0;
    l->from = l->pick.rank < 0 ? NULL : x_row(x.sources[l->pick.rank], l->pick.row);
    l->rows = (uint32_t)__popc(__ballot_sync(0xffffffffu, l->pick.rank >= 0));
    if (l->from && x.sources[l->pick.rank].x_ring)
        fence_proxy_async(); /* announced by a word, read by the engine */
    l->next = pick_at(p, l->at.coming, threadIdx.x % 32);
    l->open = true;
    return 1;
}

/* Warp: start loading one chunk of every row of the token into the next stage. 1 done, 0 nothing (yet), -1 stop. */
EPX__DEVICE int load_chunk(const ht_combine_t &p, const ht_adder_t &x, const ht_stages_t &s, ht_loader_t *l, bool wait)
{
    if (l->at.now >= p.tokens)
        return 0;
    if (!l->open) {
        int opened = open_token(p, x, l, wait);
        if (opened != 1)
            return opened;
    }
    uint32_t bytes = chunk_bytes_of(p, l->chunk), lane = threadIdx.x % 32;
    if (lane == 0)
        mbarrier_expect_bytes(&s.bars[l->stage], l->rows * bytes);
    __syncwarp();
    if (l->from)
        bulk_load(stage_at(s, l->stage) + lane * p.cut.chunk_bytes, l->from + l->chunk * p.cut.chunk_bytes, bytes,
                  &s.bars[l->stage]);
    if (lane == l->stage) {
        l->in_rows = l->rows;
        l->in_token = l->at.now;
    }
    l->stage = l->stage + 1 == p.cut.stages ? 0 : l->stage + 1;
    if (++l->chunk == p.cut.chunks) {
        turns_next(&l->at);
        l->chunk = 0;
        l->pick = l->next;
        l->open = false;
    }
    return 1;
}

/* Warp: all it has to add through the stages, as far ahead as the rows have come. False: stop. */
template <int dtype>
EPX__DEVICE bool add_tokens(const ht_combine_t &p, ht_adder_t &x, ht_stages_t &s, ht_loader_t &l)
{
    uint32_t i = 0, loaded = 0, chunk = 0;
    for (;;) {
        int more = 1;
        while (loaded < p.cut.stages && more == 1) {
            more = load_chunk(p, x, s, &l, loaded == 0);
            loaded += more == 1;
        }
        if (loaded == 0)
            return more == 0;
        uint32_t token = __shfl_sync(0xffffffffu, l.in_token, (int)i);
        stage_wait(s, i);
        add_staged<dtype>(p, stage_at(s, i), __shfl_sync(0xffffffffu, l.in_rows, (int)i), token, chunk);
        __syncwarp();
        i = i + 1 == p.cut.stages ? 0 : i + 1;
        loaded--;
        if (++chunk == p.cut.chunks) {
            chunk = 0;
            add_weights(p, x.sources, token);
            count_added(x, token);
        }
    }
}

template <int dtype>
EPX__DEVICE bool add_tokens_plain(const ht_combine_t &p, ht_adder_t &x)
{
    uint32_t lane = threadIdx.x % 32;
    for (ht_turns_t at = adder_turns(p, x); at.now < p.tokens; turns_next(&at)) {
        bool ok = true;
        for (uint32_t j = lane; j < p.h.slots && ok; j += 32)
            ok = row_ready(p, x.sources, x.b->n, pick_at(p, at.now, j), true);
        if (!__all_sync(0xffffffffu, ok))
            return false;
        __syncwarp(); /* what one lane has seen is seen by all */
        add_plain<dtype>(p, x.sources, at.now);
        add_weights(p, x.sources, at.now);
        count_added(x, at.now);
    }
    return true;
}

#endif
