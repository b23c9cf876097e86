/*
 * combine: adding. A warp loads a piece of all rows of a token into a stage, one buffer a row, while it adds the pieces
 * of the stage before; below sm_90, or with many rows a token, it reads them where they are.
 */
#ifndef EPX_ALGO_HT_CUDA_COMBINE_ADD_CUH
#define EPX_ALGO_HT_CUDA_COMBINE_ADD_CUH

#include "algo/ht/cuda/combine_rows.cuh"
#include "algo/ht/cuda/sum.cuh"

/* For the announcing warp: one token of one adding warp has been read. */
typedef struct ht_added {
    const ht_combine_t *p;
    const ht_source_t *sources;
} ht_added_t;

EPX__DEVICE void account_added(const ht_added_t &x, uint64_t n, uint32_t warp, uint32_t i)
{
    const ht_combine_t &p = *x.p;
    uint32_t blocks = gridDim.x - p.push_blocks;
    uint32_t token = warp * blocks + blockIdx.x - p.push_blocks + i * blocks * p.cut.warps;
    for (uint32_t slot = 0; slot < p.h.slots; slot++) {
        ht_pick_t k = pick_at(p, token, slot);
        if (k.rank < 0)
            break;
        const ht_source_t &s = x.sources[k.rank];
        if (k.rank == p.c.rank || !wants_credit(p, s))
            continue;
        uint32_t b = ((uint32_t)k.row - s.first) / p.batch;
        count_batch(p.c.consumed + (size_t)k.rank * HT_WORDS, take_words(p.c, p.c.peers[k.rank], p.c.rank), n, b,
                    batch_total(s.rows, p.batch, b));
    }
}

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

/* Warp: add the first `rows` buffers of a stage. Two pieces a lane at a time: each covers the other's latency. */
template <int dtype>
EPX__DEVICE void add_staged(const ht_combine_t &p, const char *stage, uint32_t rows, uint32_t token, uint32_t chunk)
{
    uint32_t bytes = chunk_bytes_of(p, chunk), step = p.cut.chunk_bytes;
    uint64_t out = token * p.row_bytes + chunk * p.cut.chunk_bytes;
    uint32_t v = threadIdx.x % 32 * 16;
    for (; v + 512 < bytes; v += 1024) {
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0}, more[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        const char *from = stage + v;
        for (uint32_t j = 0; j < rows; j++, from += step) {
            uint4 a = *(const uint4 *)from, b = *(const uint4 *)(from + 512);
            add_16<dtype>(sum, a);
            add_16<dtype>(more, b);
        }
        end_16<dtype>(p, sum, out + v);
        end_16<dtype>(p, more, out + v + 512);
    }
    if (v < bytes) {
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (uint32_t j = 0; j < rows; j++)
            add_16<dtype>(sum, *(const uint4 *)(stage + j * step + v));
        end_16<dtype>(p, sum, out + v);
    }
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

/* An adding warp: every `warps`-th token from `w` on, below `whole`; what is left is dealt out chunk by chunk. */
typedef struct ht_adder {
    const ht_source_t *sources;
    ht_block_t *b;
    uint32_t w, warps;
    uint32_t whole;
    bool credit; /* somebody waits for what has been read */
} ht_adder_t;

/*
 * A warp's way. The tokens do not divide evenly among the warps: were the last ones dealt out whole, some warps would
 * work a whole token longer than others. Where progress is told, it is told by whole tokens.
 */
typedef struct ht_walk {
    uint32_t token, chunk;
    uint32_t piece; /* number among the chunks that are left over */
} ht_walk_t;

EPX__DEVICE ht_walk_t walk_left(const ht_combine_t &p, const ht_adder_t &x, uint32_t piece)
{
    return ht_walk_t{x.whole + piece / p.cut.chunks, piece % p.cut.chunks, piece};
}
EPX__DEVICE ht_walk_t walk_first(const ht_combine_t &p, const ht_adder_t &x)
{
    return x.w < x.whole ? ht_walk_t{x.w, 0, 0} : walk_left(p, x, x.w);
}
EPX__DEVICE bool walk_stays(const ht_combine_t &p, const ht_adder_t &x, const ht_walk_t &at)
{
    return at.token < x.whole && at.chunk + 1 < p.cut.chunks;
}
/* The first chunk of what comes after this token (or left-over chunk). */
EPX__DEVICE ht_walk_t walk_after(const ht_combine_t &p, const ht_adder_t &x, const ht_walk_t &at)
{
    if (at.token >= x.whole)
        return walk_left(p, x, at.piece + x.warps);
    return at.token + x.warps < x.whole ? ht_walk_t{at.token + x.warps, 0, 0} : walk_left(p, x, x.w);
}

/* What an adding warp loads next: where it is, and lane j's row. */
typedef struct ht_loader {
    ht_walk_t at;
    bool open;            /* the token's rows have come, `from` and `rows` are its */
    uint32_t stage, rows; /* rows: of the token */
    uint32_t rows_in;     /* rows in each stage, 8 bits each */
    ht_pick_t pick, next; /* of this token, and of the one after */
    const char *from;     /* lane's row; NULL: none */
} ht_loader_t;

/* Warp: at a new token, have its rows come? Lane's row is where it says then. 1 yes, 0 not yet, -1 stop. */
EPX__DEVICE int open_token(const ht_combine_t &p, const ht_adder_t &x, ht_loader_t *l, bool wait)
{
    if (!__all_sync(0xffffffffu, row_ready(p, x.sources, x.b->n, l->pick, wait)))
        return wait ? -1 : 0;
    l->from = l->pick.rank < 0 ? NULL : x_row(x.sources[l->pick.rank], l->pick.row);
    l->rows = (uint32_t)__popc(__ballot_sync(0xffffffffu, l->pick.rank >= 0));
    if (l->from && x.sources[l->pick.rank].x_ring)
        fence_proxy_async(); /* announced by a word, read by the engine */
    l->next = pick_at(p, walk_after(p, x, l->at).token, threadIdx.x % 32);
    l->open = true;
    return 1;
}

/* Warp: start loading one chunk of every row of the token into the next stage. 1 done, 0 nothing (yet), -1 stop. */
EPX__DEVICE int load_chunk(const ht_combine_t &p, const ht_adder_t &x, const ht_stages_t &s, ht_loader_t *l, bool wait)
{
    if (l->at.token >= p.tokens)
        return 0;
    if (!l->open) {
        int opened = open_token(p, x, l, wait);
        if (opened != 1)
            return opened;
    }
    uint32_t bytes = chunk_bytes_of(p, l->at.chunk), lane = threadIdx.x % 32;
    if (lane == 0)
        mbarrier_expect_bytes(&s.bars[l->stage], l->rows * bytes);
    __syncwarp();
    if (l->from)
        bulk_load(stage_at(s, l->stage) + lane * p.cut.chunk_bytes, l->from + l->at.chunk * p.cut.chunk_bytes, bytes,
                  &s.bars[l->stage]);
    l->rows_in = (l->rows_in & ~(0xffu << 8 * l->stage)) | l->rows << 8 * l->stage;
    l->stage = l->stage + 1 == p.cut.stages ? 0 : l->stage + 1;
    if (walk_stays(p, x, l->at)) {
        l->at.chunk++;
    } else {
        l->at = walk_after(p, x, l->at);
        l->pick = l->next;
        l->open = false;
    }
    return 1;
}

/* Warp: all it has to add through the stages, as far ahead as the rows have come. `pick`: of its first token. */
template <int dtype>
EPX__DEVICE bool add_tokens(const ht_combine_t &p, const ht_adder_t &x, ht_stages_t &s, ht_pick_t pick)
{
    ht_walk_t at = walk_first(p, x);
    ht_loader_t l = {at, false, 0, 0, 0, pick, {-1, -1}, NULL};
    uint32_t i = 0, loaded = 0, done = 0;
    while (at.token < p.tokens) {
        int more = 1;
        while (loaded < p.cut.stages && more == 1) {
            more = load_chunk(p, x, s, &l, loaded == 0);
            loaded += more == 1;
        }
        if (loaded == 0)
            return false;
        stage_wait(s, i);
        add_staged<dtype>(p, stage_at(s, i), l.rows_in >> 8 * i & 0xffu, at.token, at.chunk);
        __syncwarp();
        i = i + 1 == p.cut.stages ? 0 : i + 1;
        loaded--;
        if (at.chunk + 1 == p.cut.chunks) {
            add_weights(p, x.sources, at.token);
            if (x.credit)
                tell_progress(x.b, ++done);
        }
        if (walk_stays(p, x, at))
            at.chunk++;
        else
            at = walk_after(p, x, at);
    }
    return true;
}

template <int dtype>
EPX__DEVICE bool add_tokens_plain(const ht_combine_t &p, const ht_adder_t &x)
{
    uint32_t lane = threadIdx.x % 32, done = 0;
    for (uint32_t token = x.w; token < p.tokens; token += x.warps) {
        bool ok = true;
        for (uint32_t j = lane; j < p.h.slots && ok; j += 32)
            ok = row_ready(p, x.sources, x.b->n, pick_at(p, token, j), true);
        if (!__all_sync(0xffffffffu, ok))
            return false;
        add_plain<dtype>(p, x.sources, token);
        add_weights(p, x.sources, token);
        if (x.credit)
            tell_progress(x.b, ++done);
    }
    return true;
}

#endif
