/*
 * Low-latency combine between domains: `home` and `back` (ll_far.cuh). Outputs travel as the CPU puts them: those of
 * one rank one after the other, by (token, top-k place), or by token when that rank adds first, from the row of the
 * owner's `back` on that its record named. In the owner's window they get the places and flags that a near rank's have.
 */
#include <cuda_runtime.h>
#include <string.h>

#include "algo/ll/cuda/ll_far.cuh"

/* ---- home ---- */

/* One thread: rows that go back for pair (source, token). */
EPX__DEVICE uint32_t rows_of(const ll_far_combine_t &p, uint32_t pair)
{
    const ll_common_t &l = p.c.l;
    uint32_t n = 0;
    for (uint32_t k = 0; k < l.topk; k++)
        n += l.r.pos[(size_t)pair * l.topk + k] >= 0;
    return p.c.by_rank ? n > 0 : n;
}

/* A warp: the rows of a pair that lie in [from, from + most), to `out`; the pair's first is row `at`. */
EPX__DEVICE void stage_outputs(const ll_far_combine_t &p, uint32_t pair, uint32_t at, uint32_t from, uint32_t most,
                               char *out)
{
    const ll_common_t &l = p.c.l;
    uint32_t lane = threadIdx.x % 32;
    size_t stride = (size_t)l.hidden * 2;
    if (p.c.by_rank) {
        char *to = out + (size_t)(at - from) * stride;
        if (at - from >= most)
            return;
        if (p.c.pre_reduced)
            push_sum(p.c, 0, 1, (int32_t)pair, to);
        else
            push_plain(p.c, 0, 1, ranked_row(p.c, (int32_t)pair), to);
        return;
    }
    int32_t pos = lane < l.topk ? l.r.pos[(size_t)pair * l.topk + lane] : -1;
    for (uint32_t m = __ballot_sync(ALL_LANES, pos >= 0); m; m &= m - 1, at++) {
        int32_t row = __shfl_sync(ALL_LANES, pos, __ffs((int)m) - 1);
        if (at - from < most)
            push_plain(p.c, 0, 1, row, out + (size_t)(at - from) * stride);
    }
}

/*
 * The block: those of the source's rows in [from, from + most) that are of tokens of `part` of `parts`, to `out`; with
 * most 0 nothing. Returns how many rows the source has in all.
 */
static __device__ uint32_t each_row(const ll_far_combine_t &p, ll_far_head_t &h, uint32_t source, uint32_t part,
                                    uint32_t parts, uint32_t from, uint32_t most, char *out)
{
    uint32_t places = p.c.l.c.layout.ll.tokens_max, rows = 0, total;
    for (uint32_t tile = 0; tile < places; tile += LL_FAR_THREADS, rows += total) {
        uint32_t t = tile + threadIdx.x, n = t < places ? rows_of(p, source * places + t) : 0;
        uint32_t at = rows + scan_block<LL_FAR_WARPS>(n, h.sums, &total);
        bool mine = n && t % parts == part && at + n > from && at < from + most;
        h.index[threadIdx.x] = mine ? at : FAR_NO_ROW;
        __syncthreads();
        for (uint32_t i = threadIdx.x / 32; i < LL_FAR_THREADS; i += LL_FAR_WARPS)
            if (h.index[i] != FAR_NO_ROW)
                stage_outputs(p, source * places + tile + i, h.index[i], from, most, out);
        __syncthreads();
    }
    return rows;
}

/* The block: the next piece of the source's `rows` outputs. If it is not the last one, the unit gets another turn when
 * the piece is free: until then the block serves its other ranks, which must not wait for this one. */
static __device__ void put_piece(const ll_far_combine_t &p, ll_far_head_t &h, int source, uint64_t first, uint32_t rows,
                                 uint32_t piece, char *out)
{
    const ll_common_t &l = p.c.l;
    size_t stride = (size_t)l.hidden * 2;
    volatile uint64_t *next = &far_line(l, h.slot, h.place)->next;
    uint32_t from = (uint32_t)*next, now = rows - from < piece ? rows - from : piece;
    each_row(p, h, (uint32_t)source, 0, 1, from, piece, out);
    if (threadIdx.x == 0) {
        uint32_t bit = 1u << h.unit % 32;
        size_t at = epx__ll_back_row_at(&l.c.layout.ll, h.slot, first + from, stride);
        fence_acq_rel_sys();
        if (!far_put(l, h, h.place, at, now * stride))
            h.stop = 1;
        *next = from + now < rows ? from + now : 0;
        if (*next) {
            h.more[h.unit / 32] |= bit;
            h.done[h.unit / 32] &= ~bit;
        } else {
            h.more[h.unit / 32] &= ~bit;
        }
    }
    __syncthreads();
}

/* The block: its part of the outputs for the source, from row `first` of its `back` on. More than a piece of `out`:
 * part 0 alone sends them, piece by piece. Returns rows that the last part has to put; h.stop: stop. */
static __device__ uint32_t go_home(const ll_far_combine_t &p, ll_far_head_t &h, int source, uint64_t first)
{
    const ll_common_t &l = p.c.l;
    const epx__ll_layout_t *layout = &l.c.layout.ll;
    char *out = l.far.out + far_out_at(l, h.slot, h.place);
    uint32_t piece = (uint32_t)(l.far.piece_bytes / ((size_t)l.hidden * 2));
    uint32_t rows = each_row(p, h, (uint32_t)source, 0, 1, 0, 0, out);
    if (threadIdx.x == 0 && first + rows > (uint64_t)layout->tokens_max * l.topk) {
        far_fail(l, h, h.place, EPX_E_MISMATCH, HT_STAGE_OVERFLOW, (uint64_t)layout->tokens_max * l.topk, first + rows);
        h.stop = 1;
    }
    __syncthreads();
    if (h.stop)
        return 0;
    if (rows <= piece) {
        each_row(p, h, (uint32_t)source, h.part, p.parts, 0, piece, out);
        return rows;
    }
    if (h.part == 0)
        put_piece(p, h, source, first, rows, piece, out);
    return 0;
}

/* The block: is there another piece to come for the rank whose turn it was? One that is given up gets no more. */
EPX__DEVICE bool goes_on(const ll_common_t &l, ll_far_head_t &h)
{
    bool more = h.more[h.unit / 32] >> h.unit % 32 & 1;
    if (more && h.what != FAR_YES && threadIdx.x == 0)
        far_line(l, h.slot, h.place)->next = 0;
    return more && h.what == FAR_YES;
}

__global__ void __launch_bounds__(LL_FAR_THREADS, 1) ll_far_home_kernel(const __grid_constant__ ll_far_combine_t p)
{
    __shared__ ll_far_head_t h;
    const ll_common_t &l = p.c.l;
    if (l.c.ranks == 0) /* a first launch, so that the driver has made room for it */
        return;
    if (!far_enter(l, h, FAR_HOME, *(volatile uint64_t *)l.r.number, p.parts, l.far.piece_bytes))
        return;
    while (far_turn(l, h)) {
        int source = l.far.rank_of[h.place];
        uint64_t first = l.r.first_there[(p.c.by_rank ? l.c.ranks : 0) + source];
        uint32_t rows = h.what == FAR_YES ? go_home(p, h, source, first) : 0;
        if (h.stop)
            return;
        if (goes_on(l, h) || !far_last(l, h, p.parts))
            continue;
        size_t stride = (size_t)l.hidden * 2;
        bool good = true, leave_out = !far_heard(l, h, source) || *(volatile uint32_t *)&l.masked[source];
        if (!leave_out && h.what == FAR_YES)
            good = far_put(l, h, h.place, epx__ll_back_row_at(&l.c.layout.ll, h.slot, first, stride), rows * stride);
        far_want(l, h, h.place, leave_out ? LL_LEFT_OUT : LL_COMBINED);
        if (!good || !far_tell(l, h, h.place))
            h.stop = 1;
    }
}

/* ---- back ---- */

EPX__DEVICE int32_t rank_chosen(const ll_common_t &l, size_t pair)
{
    int64_t id = ll_id(l, pair);
    return id < 0 ? -1 : epx__expert_rank(&l.map, id);
}

/* One thread: rows that come for token t from `rank`. */
EPX__DEVICE uint32_t rows_for(const ll_far_combine_t &p, uint32_t t, int32_t rank)
{
    uint32_t n = 0;
    for (uint32_t k = 0; k < p.c.l.topk; k++)
        n += rank_chosen(p.c.l, (size_t)t * p.c.l.topk + k) == rank;
    return p.c.by_rank ? n > 0 : n;
}

/* A warp: the rows of token t from `rank`, the first of which is row `at` of `back` as it came, to their places. */
EPX__DEVICE void bring_back(const ll_far_combine_t &p, const ll_far_head_t &h, uint32_t t, int32_t rank, uint64_t at)
{
    const ll_common_t &l = p.c.l;
    const epx__ll_layout_t *layout = &l.c.layout.ll;
    uint32_t lane = threadIdx.x % 32, stride = l.hidden * 2;
    int32_t of_lane = lane < l.topk ? rank_chosen(l, (size_t)t * l.topk + lane) : -1;
    uint32_t places = __ballot_sync(ALL_LANES, of_lane == rank);
    if (p.c.by_rank) { /* the rank's place among the token's */
        uint32_t same = __match_any_sync(ALL_LANES, of_lane);
        bool leads = of_lane >= 0 && (uint32_t)__ffs((int)same) - 1 == lane;
        places = 1u << __popc(__ballot_sync(ALL_LANES, leads && of_lane < rank));
    }
    for (uint32_t m = places; m; m &= m - 1, at++) {
        uint32_t place = (uint32_t)__ffs((int)m) - 1;
        copy_16(l.c.window + epx__ll_back_at(layout, h.slot, t, place),
                far_staging(l, epx__ll_back_row_at(layout, h.slot, at, stride)), stride);
        if (lane == 0) /* read by a later kernel: no order is needed */
            *(uint64_t *)(l.c.window + epx__ll_back_flag_at(layout, h.slot, t, place)) = h.n;
    }
}

/* The block: its part of the outputs of `rank`. */
static __device__ void bring_all(const ll_far_combine_t &p, ll_far_head_t &h, int32_t rank)
{
    const ll_common_t &l = p.c.l;
    uint64_t first = l.r.first[(p.c.by_rank ? l.c.ranks : 0) + rank];
    uint32_t rows = 0, total;
    for (uint32_t tile = 0; tile < l.tokens; tile += LL_FAR_THREADS, rows += total) {
        uint32_t t = tile + threadIdx.x, n = t < l.tokens ? rows_for(p, t, rank) : 0;
        uint32_t at = rows + scan_block<LL_FAR_WARPS>(n, h.sums, &total);
        h.index[threadIdx.x] = n && t % p.parts == h.part ? at : FAR_NO_ROW;
        __syncthreads();
        for (uint32_t i = threadIdx.x / 32; i < LL_FAR_THREADS; i += LL_FAR_WARPS)
            if (h.index[i] != FAR_NO_ROW)
                bring_back(p, h, tile + i, rank, first + h.index[i]);
        __syncthreads();
    }
}

/* The block: ranks that hold no expert of my tokens are not waited for. */
static __device__ void find_idle(const ll_far_combine_t &p, ll_far_head_t &h)
{
    const ll_common_t &l = p.c.l;
    for (uint32_t i = 0, u = blockIdx.x; u < h.units; i++, u += gridDim.x) {
        int32_t rank = l.far.rank_of[u % l.far.count];
        bool some = false;
        for (uint32_t t = threadIdx.x; !some && t < l.tokens; t += LL_FAR_THREADS)
            some = rows_for(p, t, rank) != 0;
        if (!__syncthreads_or(some) && threadIdx.x == 0)
            h.skip[i / 32] |= 1u << i % 32;
    }
}

__global__ void __launch_bounds__(LL_FAR_THREADS, 1) ll_far_back_kernel(const __grid_constant__ ll_far_combine_t p)
{
    __shared__ ll_far_head_t h;
    const ll_common_t &l = p.c.l;
    if (l.c.ranks == 0)
        return;
    if (!far_enter(l, h, FAR_BACK, *(volatile uint64_t *)l.r.number, p.parts, 0))
        return;
    find_idle(p, h);
    while (far_turn(l, h)) {
        int rank = l.far.rank_of[h.place];
        if (h.what == FAR_YES)
            bring_all(p, h, rank);
        if (!far_last(l, h, p.parts))
            continue;
        /* The domain's kernel looks there at who has left this rank out. */
        epx__ll_words_t *words = ll_words(l, l.c.window, h.slot, rank);
        words->left_out = ld_acquire_sys_u64(&far_words(l, h, h.place)->left_out);
        if (!far_tell(l, h, h.place))
            h.stop = 1;
    }
}

/* ---- launching ---- */

extern "C" int epx__ll_launch_far_home(const ll_far_combine_t *p, uint32_t blocks, void *stream)
{
    ll_far_home_kernel<<<blocks, LL_FAR_THREADS, 0, (cudaStream_t)stream>>>(*p);
    return (int)cudaGetLastError();
}

extern "C" int epx__ll_launch_far_back(const ll_far_combine_t *p, uint32_t blocks, void *stream)
{
    ll_far_back_kernel<<<blocks, LL_FAR_THREADS, 0, (cudaStream_t)stream>>>(*p);
    return (int)cudaGetLastError();
}

extern "C" int epx__ll_load_far_combine(void *stream)
{
    ll_far_combine_t nothing;
    memset(&nothing, 0, sizeof nothing);
    int error = epx__ll_launch_far_home(&nothing, 1, stream);
    return error ? error : epx__ll_launch_far_back(&nothing, 1, stream);
}
