/*
 * rows: every token's row, read once, stored at its final row at every destination.
 *
 * Sending blocks: warps take tokens, whoever is free the next, for SMs differ in speed. Lane 0 drives the loads into
 * the warp's stages; lane j sends to the token's j-th destination, each by a bulk store out of the same stage. The
 * loads of the next item run meanwhile, and the first ones start before any peer has published. Side data, ids, weights
 * and source tokens go by ordinary stores.
 *
 * Into a lease nothing else is needed: the last block tells the peers that all is written. Into the caller's memory the
 * rows of peers pass through a lease or ring in the window: the sender publishes a progress word a batch, copying
 * blocks take the rows out as they come (flow.cuh). Own rows go straight to their place. What crosses to other domains
 * and comes from there is for further blocks (rail_rows.cuh).
 */
#include <cuda_runtime.h>

#include "algo/ht/cuda/flow.cuh"
#include "algo/ht/cuda/rail_rows.cuh"
#include "algo/ht/cuda/rows_ids.cuh"

/* ---- sending ---- */

/* A piece of work: a token, and which chunk of its row (one, unless rows are large). */
typedef struct ht_item {
    uint32_t token, chunk;
} ht_item_t;

EPX__DEVICE uint32_t chunk_bytes_of(const ht_rows_t &p, uint32_t chunk)
{
    uint32_t left = (uint32_t)p.row_bytes - chunk * p.cut.chunk_bytes;
    return left < p.cut.chunk_bytes ? left : p.cut.chunk_bytes;
}

/* Lane 0: start loading an item's bytes into stage i. Side data that goes by bulk copies follows the first chunk. */
EPX__DEVICE void send_load(const ht_rows_t &p, const ht_stages_t &s, uint32_t i, ht_item_t item)
{
    uint32_t bytes = chunk_bytes_of(p, item.chunk);
    bool side = item.chunk == 0 && p.side_bulk;
    mbarrier_expect_bytes(&s.bars[i], bytes + (side ? p.side_bytes : 0));
    bulk_load(stage_at(s, i), p.x + item.token * p.x_stride + item.chunk * p.cut.chunk_bytes, bytes, &s.bars[i]);
    if (side)
        bulk_load(stage_at(s, i) + p.cut.chunk_bytes, p.side + (int64_t)item.token * p.side_token_stride, p.side_bytes,
                  &s.bars[i]);
}

/* May this row be written? Ring slots are free once the row a lap earlier has been taken. */
EPX__DEVICE bool send_credit(const ht_rows_t &p, const ht_dest_t &d, uint64_t n, ht_aim_t a, const uint64_t **word,
                             uint64_t *want)
{
    if (!d.ring)
        return true;
    uint32_t b = ((uint32_t)a.row - d.first) / d.batch, lap = d.ring / d.batch;
    if (b < lap)
        return true;
    *word = take_words(p.c, p.c.window, a.rank) + (b - lap) % HT_WORDS;
    *want = batch_word(n, b - lap);
    return ld_acquire_sys_u64(*word) >= *want;
}

/* Lane: the payload chunk (and bulk side data) to its destination. */
EPX__DEVICE void send_store(const ht_rows_t &p, const ht_dest_t &d, const ht_stages_t &s, uint32_t i, ht_item_t item,
                            ht_aim_t a)
{
    uint64_t row = dest_row(d, a.row);
    bulk_store(d.x + row * p.row_bytes + item.chunk * p.cut.chunk_bytes, stage_at(s, i), chunk_bytes_of(p, item.chunk));
    if (item.chunk == 0 && p.side_bulk && d.side)
        bulk_store(d.side + row * p.side_bytes, stage_at(s, i) + p.cut.chunk_bytes, p.side_bytes);
}

/* Warp, below sm_90: the same by ordinary loads and stores. */
EPX__DEVICE void send_plain(const ht_rows_t &p, const ht_dest_t *dests, ht_item_t item, ht_aim_t a)
{
    uint32_t bytes = chunk_bytes_of(p, item.chunk), lane = threadIdx.x % 32, offset = item.chunk * p.cut.chunk_bytes;
    const char *from = p.x + item.token * p.x_stride + offset;
    for (uint32_t left = __ballot_sync(0xffffffffu, a.rank >= 0); left; left &= left - 1) {
        int j = __ffs((int)left) - 1;
        int rank = __shfl_sync(0xffffffffu, a.rank, j), row = __shfl_sync(0xffffffffu, a.row, j);
        char *to = dests[rank].x + dest_row(dests[rank], row) * p.row_bytes + offset;
        for (uint32_t at = lane * 16; at < bytes; at += 512)
            st_global_16(to + at, ld_global_16(from + at));
    }
}

/* Warp: one token's side data to one destination, any strides. */
EPX__DEVICE void send_side(const ht_rows_t &p, char *to, uint32_t token)
{
    uint32_t lane = threadIdx.x % 32, width = p.side_elem_bytes;
    const char *from = p.side + (int64_t)token * p.side_token_stride;
    bool words = p.side_elem_stride == (int64_t)width && (uintptr_t)from % 4 == 0 && (uintptr_t)to % 4 == 0;
    for (uint32_t e = lane; words && e < p.side_bytes / 4; e += 32)
        ((uint32_t *)to)[e] = ((const uint32_t *)from)[e];
    for (uint32_t e = lane; !words && e < p.side_elems; e += 32) {
        const char *at = from + (int64_t)e * p.side_elem_stride;
        if (width == 4)
            ((uint32_t *)to)[e] = *(const uint32_t *)at;
        else if (width == 8)
            ((uint64_t *)to)[e] = *(const uint64_t *)at;
        else if (width == 2)
            ((uint16_t *)to)[e] = *(const uint16_t *)at;
        else
            to[e] = *at;
    }
}

/* A sending warp. Its tokens ascend, and all smaller ones are taken: so whoever has the smallest of those under way
 * waits for nobody's room but what earlier tokens give back. */
typedef struct ht_sender {
    const ht_dest_t *dests;
    ht_block_t *b;
    uint32_t warp, warps, lane;
    uint32_t done; /* tokens put on their way */
    bool counted;  /* some receiver asks for progress words */
} ht_sender_t;

/* Warp: what goes by ordinary stores, to each of (up to 32) destinations in turn. */
EPX__DEVICE void send_rest(const ht_rows_t &p, const ht_sender_t &x, uint32_t token, ht_aim_t a, ht_choice_t c)
{
    bool side = p.side_bytes && !p.side_bulk, ids = p.first && x.counted;
    for (uint32_t left = side || ids ? __ballot_sync(0xffffffffu, a.rank >= 0) : 0; left; left &= left - 1) {
        int j = __ffs((int)left) - 1;
        int rank = __shfl_sync(0xffffffffu, a.rank, j), row = __shfl_sync(0xffffffffu, a.row, j);
        const ht_dest_t &d = x.dests[rank];
        uint64_t to = dest_row(d, row);
        if (side && d.side)
            send_side(p, d.side + to * p.side_bytes, token);
        if (ids)
            send_ids(p, d, to, token, rank, c);
    }
}

/* Warp: wait until every lane's row may be written. What was sent before is told first: the receiver may wait for it.
 */
EPX__DEVICE bool send_gate(const ht_rows_t &p, const ht_sender_t &x, ht_aim_t a)
{
    const uint64_t *word = NULL;
    uint64_t want = 0, n = x.b->n;
    bool open = a.rank < 0 || send_credit(p, x.dests[a.rank], n, a, &word, &want);
    if (!__all_sync(0xffffffffu, open)) {
        bulk_wait_done();
        tell_progress(x.b, x.done);
        open = open || ht_wait(p.c, n, word, want, a.rank, HT_STAGE_CREDIT);
        if (!__all_sync(0xffffffffu, open))
            return false;
    }
    fence_proxy_async(); /* the ring's rows were read; now the engine overwrites them */
    return true;
}

/* Warp: one item's bytes in stage i to (up to 32) destinations, which may be written. */
EPX__DEVICE void send_to(const ht_rows_t &p, const ht_sender_t &x, const ht_stages_t &s, uint32_t i, ht_item_t item,
                         ht_aim_t a, ht_choice_t c)
{
#if EPX__BULK
    if (a.rank >= 0)
        send_store(p, x.dests[a.rank], s, i, item, a);
    bulk_commit();
#else
    send_plain(p, x.dests, item, a);
#endif
    if (item.chunk == 0)
        send_rest(p, x, item.token, a, c);
}

/* Warp: destinations beyond the first 32 of one item (a mask over many ranks). */
EPX__DEVICE bool send_more(const ht_rows_t &p, const ht_sender_t &x, const ht_stages_t &s, uint32_t i, ht_item_t item,
                           ht_choice_t c)
{
    for (uint32_t at = 32; at < p.h.slots; at += 32) {
        ht_aim_t a = aim_at(p, item.token, at + x.lane);
        if (!__any_sync(0xffffffffu, a.rank != -1))
            break;
        if (x.counted && item.chunk == 0 && !send_gate(p, x, a))
            return false;
        send_to(p, x, s, i, item, a, c);
    }
    bulk_wait_done();
    return true;
}

/* Warp: the next item's bytes into a stage whose last bytes have been read. */
EPX__DEVICE void send_ahead(const ht_rows_t &p, const ht_sender_t &x, const ht_stages_t &s, uint32_t i, ht_item_t ahead)
{
    if (EPX__BULK) {
        bulk_wait_read_all();
        __syncwarp();
        if (x.lane == 0)
            send_load(p, s, i, ahead);
    }
}

/* Warp: token number x.done of this warp is on its way; those before it are written. */
EPX__DEVICE void count_token(ht_sender_t &x, uint32_t token)
{
    if (x.lane == 0)
        leave_item(x.b, x.done, token);
    bulk_wait_done_but_1(); /* a token of many chunks a little late */
    tell_progress(x.b, x.done++);
}

/* Warp: all its items. The first one is being loaded into stage 0, if its token goes anywhere; `a` says where, `next`
 * where the token after it goes. */
EPX__DEVICE bool send_items(const ht_rows_t &p, ht_sender_t &x, ht_stages_t &s, ht_aim_t a, ht_aim_t next)
{
    ht_turns_t at = turns_first(&p.c.state->taken_rows, x.warp, x.warps);
    ht_item_t item = {at.now, 0};
    ht_choice_t c = {x.lane, -1, 0.0f};
    uint32_t i = 0;
    bool ok = true;
    while (item.token < p.tokens && ok) {
        bool used = __any_sync(0xffffffffu, aimed(p, a)) != 0, last = !used || item.chunk + 1 == p.cut.chunks;
        uint32_t then = i + 1 == p.cut.stages ? 0 : i + 1;
        ht_item_t ahead = {last ? at.coming : item.token, last ? 0 : item.chunk + 1};
        bool loading = last ? __any_sync(0xffffffffu, aimed(p, next)) != 0 : true;
        if (then != i && loading)
            send_ahead(p, x, s, then, ahead);
        if (used) {
            if (item.chunk == 0 && p.first && x.counted)
                c = choice_at(p, item.token, x.lane);
            if (x.counted && item.chunk == 0) /* while the row is on its way */
                ok = send_gate(p, x, a);
            if (EPX__BULK)
                stage_wait(s, i);
            if (ok)
                send_to(p, x, s, i, item, a, c);
            ok = ok && (p.h.slots <= 32 || send_more(p, x, s, i, item, c));
        }
        if (!used)
            bulk_commit(); /* a group for each token, or the newest would be one of a token before */
        if (last && x.counted && ok)
            count_token(x, item.token);
        if (then == i && loading && ok)
            send_ahead(p, x, s, i, ahead);
        else if (EPX__BULK && loading && !ok && then != i)
            stage_wait(s, then); /* the engine still writes shared memory: do not leave before */
        if (last) {
            a = next;
            turns_next(&at);
            next = aim_at(p, at.coming, x.lane);
        }
        item = ahead;
        i = then;
    }
    bulk_wait_done();
    if (x.counted && ok)
        tell_progress(x.b, x.done);
    return ok;
}

/* For the announcing warp: one token is written everywhere. */
typedef struct ht_sent {
    const ht_rows_t *p;
    const ht_dest_t *dests;
} ht_sent_t;

EPX__DEVICE int sent_at(const ht_sent_t &x, uint32_t token, uint32_t slot, ht_counted_t *at)
{
    const ht_common_t &c = x.p->c;
    ht_aim_t a = aim_at(*x.p, token, slot);
    if (a.rank == -1)
        return -1;
    if (a.rank == AIM_FAR || x.dests[a.rank].batch == 0)
        return 0;
    const ht_dest_t &d = x.dests[a.rank];
    at->batch = ((uint32_t)a.row - d.first) / d.batch;
    at->total = batch_total(d.rows, d.batch, at->batch);
    at->counts = c.produced + (size_t)a.rank * HT_WORDS;
    at->words = put_words(c, c.peers[a.rank], c.rank);
    return 1;
}

/* Does any receiver ask for progress words? */
EPX__DEVICE bool any_counted(const ht_rows_t &p, const ht_dest_t *dests)
{
    bool counted = false;
    for (int r = (int)threadIdx.x % 32; r < p.c.ranks; r += 32)
        counted = counted || dests[r].batch != 0;
    return __any_sync(0xffffffffu, counted) != 0;
}

/* ---- copying out ---- */

EPX__DEVICE void set_part(ht_part_t *part, const char *from, void *to, uint64_t bytes)
{
    part->from = from;
    part->to = (char *)to;
    part->bytes = from && to ? bytes : 0;
}

/* What the announcing warp needs of a flow: who asks for progress, and of what. */
__device__ void copy_told(const ht_rows_t &p, int from, ht_flow_t *f)
{
    const ht_common_t &c = p.c;
    f->peer = from;
    f->rows = ht_near(c, from) ? (uint32_t)p.h.matrix[(size_t)from * (uint32_t)c.ranks + (uint32_t)c.rank] : 0;
    f->batch = p.batch;
    bool ring = !p.direct && f->rows > p.capacity;
    f->publish = ring ? take_words(c, c.peers[from], c.rank) : NULL;
    f->counts = c.consumed + (size_t)from * HT_WORDS;
}
/* The flow of one source's rows from the window into the caller's memory. */
__device__ bool copy_flow(const ht_rows_t &p, uint64_t n, int from, ht_flow_t *f)
{
    const ht_common_t &c = p.c;
    ht_dest_t d;
    place_pointers(p.row_shape, c.window + ring_offset(p, from), p.capacity, &d);
    copy_told(p, from, f);
    f->gate = put_words(c, c.window, from);
    f->gate_lag = 0;
    f->to_first = (uint64_t)(uint32_t)p.h.start[from];
    f->to_ring = 0;
    f->from_first = p.direct ? f->to_first : 0;
    f->from_ring = p.direct ? 0 : (uint32_t)p.capacity;
    f->x = d.x;
    f->x_to = (char *)p.place.x;
    f->x_bytes = f->x_stride = f->x_to_stride = p.row_bytes;
    set_part(&f->part[0], d.side, p.place.side, p.row_shape.side_bytes);
    set_part(&f->part[1], d.idx, p.place.topk_idx, (uint64_t)p.row_shape.topk * p.row_shape.idx_bytes);
    set_part(&f->part[2], d.weights, p.place.topk_weights, (uint64_t)p.row_shape.topk * 4);
    set_part(&f->part[3], p.first ? d.src : NULL, p.h.src_token, 4);
    return true;
}

/* ---- the half ---- */

EPX__DEVICE void send_block(const ht_rows_t &p, ht_block_t *b, char *shared)
{
    ht_dest_t *dests = (ht_dest_t *)(shared + p.cut.table_offset);
    ht_sender_t x = {
        dests, b,    threadIdx.x / 32 * p.send_blocks + blockIdx.x, p.send_blocks * p.send_warps, threadIdx.x % 32,
        0,     false};
    uint32_t warp = threadIdx.x / 32;
    bool worker = warp < p.send_warps, ok = true, loading = false;
    ht_stages_t s = {};
    ht_aim_t a = {-1, -1}, next = a;
    if (worker) {
        s = stages_init(p.cut, shared);
        a = aim_at(p, x.warp, x.lane);
        next = aim_at(p, x.warp + x.warps, x.lane);
        loading = __any_sync(0xffffffffu, aimed(p, a)) != 0;
        if (loading)
            send_ahead(p, x, s, 0, ht_item_t{x.warp, 0}); /* reading one's own x needs nobody's leave */
    }
    for (int r = (int)threadIdx.x; r < p.c.ranks && ok; r += (int)blockDim.x)
        ok = read_place(p, b->n, r, &dests[r]);
    fence_proxy_async(); /* the places were published by ordinary stores */
    if (!__syncthreads_and(ok)) {
        if (EPX__BULK && loading)
            stage_wait(s, 0); /* the engine still writes shared memory: do not leave before */
        return;
    }
    x.counted = any_counted(p, dests);
    ht_sent_t sent = {&p, dests};
    if (worker) {
        ok = send_items(p, x, s, a, next);
        tell_ended(b);
        if (ok && p.first && !x.counted)
            send_ids_aside(p, dests);
        return;
    }
    if (!p.first && warp == p.cut.warps) /* the warp has nothing else to do yet */
        copy_sources(p, false, blockIdx.x * 32 + x.lane, p.send_blocks * 32);
    if (x.counted && warp == p.cut.warps)
        announce<ht_sent_t, count_token_at<ht_sent_t, sent_at>, publish_token_at<ht_sent_t, sent_at>>(sent, b,
                                                                                                      p.send_warps);
    else if (p.first && !x.counted)
        send_ids_aside(p, dests);
}

EPX__DEVICE void copy_block(const ht_rows_t &p, ht_block_t *b, char *shared)
{
    uint32_t blocks = p.near_blocks - p.send_blocks, block = blockIdx.x - p.send_blocks;
    if (threadIdx.x / 32 < p.cut.warps) {
        ht_stages_t s = stages_init(p.cut, shared);
        flows_run<ht_rows_t, copy_flow, true>(p, s, b, threadIdx.x / 32 * blocks + block, blocks * p.cut.warps,
                                              (uint32_t *)(shared + p.cut.table_offset));
        tell_ended(b);
    } else {
        flows_announce<ht_rows_t, copy_told>(p, p.cut.warps, b, block, blocks);
    }
}

__global__ void __launch_bounds__(HT_WARPS_MAX * 32 + 32, 1) ht_rows_kernel(const __grid_constant__ ht_rows_t p)
{
    extern __shared__ __align__(128) char shared[];
    __shared__ ht_block_t b;
    ht_lead_t lead = {};
    if (!ht_enter_led(p.c, &b, &lead))
        return;
    if (blockIdx.x == 0 && (!p.c.rails || rail_mail(p.c, b.n)))
        publish_places(p, b.n, lead);
    if (blockIdx.x < p.send_blocks)
        send_block(p, &b, shared);
    else if (blockIdx.x >= p.near_blocks)
        rail_rows_block(p, &b);
    else
        copy_block(p, &b, shared);
    if (p.tail_to)
        fill_tail(p);
    bulk_wait_done();
    fence_proxy_async();
    if (!ht_count_block(p.c, &b, true))
        return;
    bool good = b.stop == 0;
    if (good) {
        good = ht_wait_ends(p.c, &b);
        if (good && p.first)
            copy_sources(p, !p.own, threadIdx.x, blockDim.x);
        if (good && p.c.rails)
            rail_rows_end(p);
    }
    ht_leave(p.c, &b, good);
}

extern "C" int epx__ht_launch_rows(const ht_rows_t *p, uint32_t blocks, void *stream)
{
    ht_rows_kernel<<<blocks, p->cut.warps * 32 + 32, p->cut.total_bytes, (cudaStream_t)stream>>>(*p);
    return (int)cudaGetLastError();
}

extern "C" int epx__ht_load_rows(uint32_t shared_bytes, void *stream)
{
    ht_rows_t p = {};
    cudaError_t error = cudaFuncSetAttribute((const void *)ht_rows_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             (int)shared_bytes);
    if (error != cudaSuccess)
        return (int)error;
    ht_rows_kernel<<<1, 32, shared_bytes, (cudaStream_t)stream>>>(p);
    return (int)cudaGetLastError();
}
