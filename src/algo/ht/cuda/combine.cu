/*
 * combine: the owner of a token adds its rows, in rank order in fp32 from +0, then the biases, and rounds once.
 *
 * x in a lease is read in place: adding blocks load the rows of (token, chunk) from the peers' windows into a warp's
 * stage, one buffer a row, while the item before is added. x elsewhere is pushed by other blocks (flow.cuh) into a ring
 * of the owner's reserve, which the owner publishes with its message; the owner's own rows are read where they are.
 * Weights go the same ways.
 *
 * A warp that waits for a pushed row has added and counted all rows of its earlier items, so rings always empty.
 */
#include <cuda_runtime.h>

#include "algo/ht/cuda/flow.cuh"
#include "algo/ht/cuda/sum.cuh"

/* Where the rows of one rank are read. ring 0: by row; else by position among my rows there, modulo the ring. */
typedef struct ht_source {
    const char *x;
    uint64_t x_stride;
    const float *weights;
    uint32_t x_ring, w_ring;
    uint32_t first, rows;
} ht_source_t;
static_assert(sizeof(ht_source_t) == HT_SOURCE_BYTES, "the host sizes the table");

/* Lane's row of one item. */
typedef struct ht_pick {
    int32_t rank, row; /* -1: none */
} ht_pick_t;

EPX__DEVICE bool pushes_x(const ht_combine_t &p)
{
    return p.x_offset == 0;
}
EPX__DEVICE bool pushes_weights(const ht_combine_t &p)
{
    return p.weights && p.weights_offset == 0;
}
EPX__DEVICE uint64_t ring_of(const ht_combine_t &p, int peer)
{
    return p.ring_offset + p.ring_bytes * (uint64_t)(peer < p.c.rank ? peer : peer - 1);
}

/* Words of the message, after the shape. An offset of 0: pushed into the reader's ring. */
enum { WORD_SHAPE, WORD_X, WORD_STRIDE, WORD_WEIGHTS, WORD_RING, WORDS };

EPX__DEVICE void publish_x(const ht_combine_t &p, uint64_t n, ht_lead_t lead)
{
    const ht_common_t &c = p.c;
    for (int r = (int)threadIdx.x; r < c.ranks; r += (int)blockDim.x) {
        if (r == c.rank)
            continue;
        uint64_t words[WORDS] = {c.shape, p.x_offset, p.x_stride, p.weights_offset, ring_of(p, r)};
        if (r != (int)threadIdx.x)
            lead = ht_lead_t{c.peers[r], 0};
        if (!ht_post_led(c, n, r, lead, words, WORDS))
            return;
    }
}

EPX__DEVICE bool read_source(const ht_combine_t &p, uint64_t n, int r, ht_source_t *s)
{
    const ht_common_t &c = p.c;
    s->first = (uint32_t)p.h.first[r];
    s->rows = (uint32_t)p.h.matrix[(size_t)c.rank * (uint32_t)c.ranks + (uint32_t)r];
    s->x_ring = s->w_ring = 0;
    if (r == c.rank) {
        s->x = p.x;
        s->x_stride = p.x_stride;
        s->weights = p.weights;
        return true;
    }
    uint64_t words[WORDS];
    const char *window = c.peers[r]; /* looked up before the message comes */
    if (!ht_read_packets(c, n, r, words, WORDS))
        return false;
    uint64_t x = words[WORD_X], weights = words[WORD_WEIGHTS];
    char *ring = c.window + ring_of(p, r);
    s->x = x ? window + x : ring;
    s->x_stride = x ? words[WORD_STRIDE] : p.row_bytes;
    s->x_ring = x ? 0 : (uint32_t)p.ring_rows;
    s->weights = (const float *)(weights ? window + weights : ring + p.ring_weights);
    s->w_ring = p.weights && !weights ? (uint32_t)p.ring_rows : 0;
    return true;
}

/* ---- pushing ---- */

/* All ranks cut their rings alike, so rows in a ring and rows of a batch are mine as well as the owner's. */
__device__ bool push_flow(const ht_combine_t &p, uint64_t n, int to, ht_flow_t *f)
{
    const ht_common_t &c = p.c;
    uint64_t words[WORDS];
    if (!ht_read_packets(c, n, to, words, WORDS))
        return false;
    char *ring = c.peers[to] + words[WORD_RING];
    f->peer = to;
    f->rows = (uint32_t)p.h.matrix[(size_t)to * (uint32_t)c.ranks + (uint32_t)c.rank];
    f->batch = p.batch;
    f->gate = take_words(c, c.window, to);
    f->gate_lag = (uint32_t)p.ring_rows / p.batch;
    f->publish = put_words(c, c.peers[to], c.rank);
    f->counts = c.produced + (size_t)to * HT_WORDS;
    f->from_first = (uint64_t)(uint32_t)p.h.start[to];
    f->from_ring = 0;
    f->to_first = 0;
    f->to_ring = (uint32_t)p.ring_rows;
    f->x = p.x;
    f->x_to = ring;
    f->x_bytes = pushes_x(p) ? p.row_bytes : 0;
    f->x_stride = p.x_stride;
    f->x_to_stride = p.row_bytes;
    for (int i = 0; i < FLOW_PARTS; i++)
        f->part[i].bytes = 0;
    f->part[0].from = (const char *)p.weights;
    f->part[0].to = ring + p.ring_weights;
    f->part[0].bytes = pushes_weights(p) ? (uint64_t)p.topk * 4 : 0;
    return true;
}

/* ---- adding ---- */

EPX__DEVICE ht_pick_t pick_at(const ht_combine_t &p, uint32_t token, uint32_t slot)
{
    ht_pick_t k = {-1, -1};
    size_t i = (size_t)token * p.h.slots + slot;
    if (slot < p.h.slots && token < p.tokens) {
        k.rank = __ldg(&p.h.dst_rank[i]);
        k.row = __ldg(&p.h.dst_row[i]);
    }
    return k;
}
EPX__DEVICE const char *x_row(const ht_source_t &s, int32_t row)
{
    uint64_t at = s.x_ring ? ((uint32_t)row - s.first) % s.x_ring : (uint64_t)(uint32_t)row;
    return s.x + at * s.x_stride;
}
EPX__DEVICE const float *w_row(const ht_source_t &s, int32_t row, uint32_t topk)
{
    uint64_t at = s.w_ring ? ((uint32_t)row - s.first) % s.w_ring : (uint64_t)(uint32_t)row;
    return s.weights + at * topk;
}
EPX__DEVICE uint32_t chunk_bytes_of(const ht_combine_t &p, uint32_t chunk)
{
    uint32_t left = (uint32_t)p.row_bytes - chunk * p.cut.chunk_bytes;
    return left < p.cut.chunk_bytes ? left : p.cut.chunk_bytes;
}

/* Lane: has its row come? Rows in place have. */
EPX__DEVICE bool row_ready(const ht_combine_t &p, const ht_source_t *sources, uint64_t n, ht_pick_t k, bool wait)
{
    if (k.rank < 0 || (sources[k.rank].x_ring == 0 && sources[k.rank].w_ring == 0))
        return true;
    uint32_t b = ((uint32_t)k.row - sources[k.rank].first) / p.batch;
    const uint64_t *word = put_words(p.c, p.c.window, k.rank) + b % HT_WORDS;
    uint64_t want = batch_word(n, b);
    return wait ? ht_wait(p.c, n, word, want, k.rank, HT_STAGE_ARRIVAL) : ld_acquire_sys_u64(word) >= want;
}

/* Rows of that rank pass through a ring that is too small for all of them: it waits for room. */
EPX__DEVICE bool wants_credit(const ht_combine_t &p, const ht_source_t &s)
{
    return (s.x_ring != 0 || s.w_ring != 0) && s.rows > p.ring_rows;
}

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

EPX__DEVICE bool any_credit(const ht_combine_t &p, const ht_source_t *sources)
{
    bool credit = false;
    for (int r = (int)threadIdx.x % 32; r < p.c.ranks; r += 32)
        credit = credit || (r != p.c.rank && wants_credit(p, sources[r]));
    return __any_sync(0xffffffffu, credit) != 0;
}

template <int dtype>
EPX__DEVICE void add_block(const ht_combine_t &p, ht_block_t *b, char *shared)
{
    ht_source_t *sources = (ht_source_t *)(shared + p.cut.table_offset);
    uint32_t blocks = gridDim.x - p.push_blocks, warp = threadIdx.x / 32, announcer = p.threads / 32 - 1;
    ht_adder_t x = {sources, b, warp * blocks + blockIdx.x - p.push_blocks, blocks * p.cut.warps, p.tokens, false};
    ht_pick_t pick = {-1, -1};
    bool ok = true;
    if (EPX__BULK && p.slots_bulk && warp < p.cut.warps) {
        x.whole = p.tokens / x.warps * x.warps;
        pick = pick_at(p, walk_first(p, x).token, threadIdx.x % 32); /* while the messages are on their way */
    }
    for (int r = (int)threadIdx.x; r < p.c.ranks && ok; r += (int)blockDim.x)
        ok = read_source(p, b->n, r, &sources[r]);
    fence_proxy_async(); /* where rows are was published by ordinary stores */
    if (!__syncthreads_and(ok))
        return;
    x.credit = any_credit(p, sources);
    if (warp == announcer && x.credit) {
        ht_added_t added = {&p, sources};
        announce<ht_added_t, account_added>(added, b, p.cut.warps);
    }
    if (warp >= p.cut.warps)
        return;
    if (EPX__BULK && p.slots_bulk) {
        ht_stages_t s = stages_init(p.cut, shared);
        if (x.credit) {
            x.whole = UINT32_MAX;
            pick = pick_at(p, x.w, threadIdx.x % 32);
        }
        add_tokens<dtype>(p, x, s, pick);
    } else {
        add_tokens_plain<dtype>(p, x);
    }
    tell_ended(b);
}

EPX__DEVICE void push_block(const ht_combine_t &p, ht_block_t *b, char *shared)
{
    const ht_cut_t &cut = p.push_cut;
    uint32_t warp = threadIdx.x / 32, announcer = p.threads / 32 - 1;
    if (warp < cut.warps) {
        ht_stages_t s = stages_init(cut, shared);
        flows_run<ht_combine_t, push_flow>(p, cut, s, b, warp * p.push_blocks + blockIdx.x, p.push_blocks * cut.warps,
                                           (uint32_t *)(shared + cut.table_offset));
        tell_ended(b);
    } else if (warp == announcer) {
        flows_announce<ht_combine_t, push_flow>(p, cut, b, blockIdx.x, p.push_blocks);
    }
}

template <int dtype>
__global__ void __launch_bounds__(HT_WARPS_MAX * 32 + 32, 1) ht_combine_kernel(const __grid_constant__ ht_combine_t p)
{
    extern __shared__ __align__(128) char shared[];
    __shared__ ht_block_t b;
    ht_lead_t lead = {};
    if (!ht_enter_led(p.c, &b, &lead))
        return;
    if (blockIdx.x == 0)
        publish_x(p, b.n, lead);
    if (blockIdx.x < p.push_blocks)
        push_block(p, &b, shared);
    else
        add_block<dtype>(p, &b, shared);
    bulk_wait_done();
    fence_proxy_async();
    if (!ht_count_block(p.c, &b, true))
        return;
    /* The owners of my rows have read them: x may be overwritten. */
    ht_leave(p.c, &b, b.stop == 0 && ht_wait_ends(p.c, &b));
}

static const void *combine_kernel(int dtype)
{
    if (dtype == EPX_FP32)
        return (const void *)ht_combine_kernel<EPX_FP32>;
    return dtype == EPX_FP16 ? (const void *)ht_combine_kernel<EPX_FP16> : (const void *)ht_combine_kernel<EPX_BF16>;
}

extern "C" int epx__ht_launch_combine(const ht_combine_t *p, uint32_t blocks, void *stream)
{
    ht_combine_t params = *p;
    void *arguments[] = {&params};
    return (int)cudaLaunchKernel(combine_kernel(p->dtype), dim3(blocks), dim3(p->threads), arguments, p->shared_bytes,
                                 (cudaStream_t)stream);
}

extern "C" int epx__ht_load_combine(uint32_t shared_bytes, void *stream)
{
    for (int dtype = EPX_BF16; dtype <= EPX_FP32; dtype++) {
        ht_combine_t p = {};
        p.dtype = dtype;
        p.threads = 32;
        p.shared_bytes = shared_bytes;
        cudaError_t error =
            cudaFuncSetAttribute(combine_kernel(dtype), cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
        int launched = error == cudaSuccess ? epx__ht_launch_combine(&p, 1, stream) : (int)error;
        if (launched != 0)
            return launched;
    }
    return 0;
}
