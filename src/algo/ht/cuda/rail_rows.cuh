/*
 * Rows between domains: blocks of their own in the kernel of rows.cu.
 *
 * send: gathers a chunk of records into the send ring, puts it; looks at its rails in turn.
 *
 * pull: copies my rows of each stream (member, domain) out of that member's receive ring to their final rows. Hand b of
 * B takes rows b, b + B, ... and says in `hands` how many it has done.
 *
 * keeper, one warp: tells the domain what has arrived from my rails, my pulling blocks what has at any member, each
 * member what I need no more; gives credit.
 *
 * A record is x, side, ids, weights, one after the other, rounded up to 16 bytes; ids are global. A row is pulled by
 * one warp. Nobody here waits for one thing while another could move: see docs/PROTOCOL-NET.md.
 */
#ifndef EPX_ALGO_HT_CUDA_RAIL_ROWS_CUH
#define EPX_ALGO_HT_CUDA_RAIL_ROWS_CUH

#include "algo/ht/cuda/rail.cuh"

/* What thread 0 finds for its block. */
typedef struct rail_turn {
    int32_t go;           /* 1: work to do, 0: none now, -1: stop */
    uint32_t from, count; /* rows */
} rail_turn_t;

/* ---- send ---- */

/* Warp: one token's side data, as the caller's strides say. */
EPX__DEVICE void record_side(const ht_rows_t &p, char *to, uint32_t token)
{
    const char *from = p.side + (int64_t)token * p.side_token_stride;
    if (p.side_elem_stride == (int64_t)p.side_elem_bytes) {
        rail_copy(to, from, p.side_bytes);
        return;
    }
    for (uint32_t e = threadIdx.x % 32; e < p.side_elems; e += 32) {
        for (uint32_t i = 0; i < p.side_elem_bytes; i++)
            to[e * p.side_elem_bytes + i] = from[(int64_t)e * p.side_elem_stride + i];
    }
}

/* Warp: one token's record. */
EPX__DEVICE void record_write(const ht_rows_t &p, char *to, uint32_t token)
{
    uint32_t ids = p.topk * (uint32_t)p.bits / 8;
    copy_16(to, p.x + token * p.x_stride, p.row_bytes);
    to += p.row_bytes;
    if (p.side_bytes)
        record_side(p, to, token);
    to += p.side_bytes;
    if (ids)
        rail_copy(to, (const char *)p.topk_idx + (size_t)token * ids, ids);
    if (p.topk && p.row_shape.weights)
        rail_copy(to + ids, (const char *)(p.topk_weights + (size_t)token * p.topk), 4 * p.topk);
}

/* Block: chunk `chunk` towards d. */
EPX__DEVICE void chunk_write(const ht_rows_t &p, int d, uint32_t chunk, uint32_t total)
{
    const ht_rails_t &r = *p.c.rails;
    uint32_t from = chunk * p.rail_cut.rows_per_chunk, left = total - from;
    uint32_t count = left < p.rail_cut.rows_per_chunk ? left : p.rail_cut.rows_per_chunk;
    const int32_t *token = p.h.cross_token + (size_t)d * r.tokens_max;
    for (uint32_t k = from + threadIdx.x / 32; k < from + count; k += blockDim.x / 32)
        record_write(p, rail_send(r, d) + epx__rail_at(&p.rail_cut, k), (uint32_t)token[k]);
}

/* Block `block` of `blocks`: its rails, each at its next chunk. At most one block a rail, so chunks go in order. */
EPX__DEVICE bool rail_send_block(const ht_rows_t &p, ht_block_t *b, uint32_t block, uint32_t blocks)
{
    __shared__ rail_turn_t turn;
    const ht_rails_t &r = *p.c.rails;
    uint32_t others = (uint32_t)r.domains - 1;
    rail_idle_t idle = {};
    for (uint32_t round = 0;; round++) {
        bool left = false, moved = false;
        int waiting = -1;
        for (uint32_t k = block; k < others; k += blocks) {
            int d = rail_other(r, k);
            uint32_t total = (uint32_t)p.h.cross_count[d], chunks = epx__rail_chunks(&p.rail_cut, total);
            __syncthreads(); /* `turn` has been read by all */
            if (threadIdx.x == 0) {
                uint32_t next = rail_count(r.state[d].pushed, b->n);
                turn.from = next;
                turn.count = chunks - next;
                turn.go = next < chunks && rail_room(r, b->n, d, p.rail_cut, next);
            }
            __syncthreads();
            left = left || turn.count > 0;
            waiting = turn.count > 0 ? d : waiting;
            if (turn.go != 1)
                continue;
            chunk_write(p, d, turn.from, total);
            moved = true;
            int ok = 1;
            __syncthreads();
            if (threadIdx.x == 0) {
                ok = rail_put(p.c, b->n, d, p.rail_cut, turn.from, total);
                r.state[d].pushed = rail_word(b->n, turn.from + 1);
            }
            if (!__syncthreads_and(ok))
                return false;
        }
        if (!left)
            return true;
        int peer = moved ? -1 : rail_channel(r, waiting, 0)->peer;
        if (!rail_go_on(p.c, b->n, moved, &idle, waiting, peer, HT_STAGE_ROOM))
            return false;
    }
}

/* ---- pull ---- */

/* Warp: ids as this rank numbers its experts, and weights, out of a record. Rows are multiples of 16 bytes and side
 * data of 4, so all are words. */
EPX__DEVICE void record_ids(const ht_rows_t &p, const char *ids, uint64_t row)
{
    uint32_t k = threadIdx.x % 32, words = (uint32_t)p.bits / 32;
    const uint32_t *at = (const uint32_t *)ids + (size_t)k * words;
    if (k >= p.topk)
        return;
    uint32_t low = ld_relaxed_sys_u32(at), high = words == 2 ? ld_relaxed_sys_u32(at + 1) : 0, weight = 0;
    if (p.row_shape.weights)
        weight = ld_relaxed_sys_u32((const uint32_t *)ids + (size_t)p.topk * words + k);
    int64_t id = words == 2 ? (int64_t)((uint64_t)high << 32 | low) : (int64_t)(int32_t)low;
    bool here = id >= 0 && id < (int64_t)p.map.experts && epx__expert_rank(&p.map, id) == p.c.rank;
    int32_t local = here ? epx__expert_local(&p.map, id) : -1;
    if (p.place.topk_idx && words == 1)
        ((int32_t *)p.place.topk_idx)[row * p.topk + k] = local;
    else if (p.place.topk_idx)
        ((int64_t *)p.place.topk_idx)[row * p.topk + k] = local;
    if (p.row_shape.weights && p.place.topk_weights)
        p.place.topk_weights[row * p.topk + k] = here ? __uint_as_float(weight) : 0.0f;
}

/* Warp: row j of source's, out of member m's ring to its final row. */
EPX__DEVICE void record_read(const ht_rows_t &p, int m, int d, int source, uint32_t j)
{
    const ht_rails_t &r = *p.c.rails;
    size_t list = (size_t)source * r.tokens_max + j;
    const char *record = rail_receive(r, m, d) + epx__rail_at(&p.rail_cut, (uint32_t)p.h.pull_row[list]);
    uint64_t row = (uint64_t)(uint32_t)p.h.start[source] + j;
    if (p.place.x)
        copy_16((char *)p.place.x + row * p.row_bytes, record, p.row_bytes);
    record += p.row_bytes;
    if (p.place.side && p.side_bytes)
        rail_copy((char *)p.place.side + row * p.side_bytes, record, p.side_bytes);
    if (p.topk)
        record_ids(p, record + p.side_bytes, row);
    int32_t *src = p.own ? p.h.src_token : p.place.src_token;
    if (p.first && src && threadIdx.x % 32 == 0)
        src[row] = p.h.pull_token[list];
}

EPX__DEVICE uint32_t my_rows(const ht_rows_t &p, int source)
{
    return (uint32_t)p.h.matrix[(size_t)source * (uint32_t)p.c.ranks + (uint32_t)p.c.rank];
}

/* Thread 0: where a hand is in stream (m, d): `from` rows done, and with go 1 (not through yet) `count` rows of the
 * stream have come. */
EPX__DEVICE rail_turn_t pull_turn(const ht_rows_t &p, uint64_t n, int m, int d, uint32_t hand, uint32_t hands)
{
    const ht_rails_t &r = *p.c.rails;
    int s = m * r.domains + d;
    rail_turn_t turn = {0, rail_count(r.hands[(size_t)s * HT_HANDS + hand], n), 0};
    if (epx__rail_undone(hand, hands, turn.from) < my_rows(p, r.rank_of[d * r.members + m])) {
        turn.go = 1;
        turn.count = rail_count(ld_acquire_sys_u64(&r.come[s]), n);
    }
    return turn;
}

/* Block: the hand's next rows, one a warp, as far as they have come. How many; with none, `turn` says whether any is
 * left. */
EPX__DEVICE uint32_t pull_some(const ht_rows_t &p, uint64_t n, int m, int d, uint32_t hand, uint32_t hands,
                               rail_turn_t *turn)
{
    const ht_rails_t &r = *p.c.rails;
    int source = r.rank_of[d * r.members + m];
    __syncthreads(); /* `turn` has been read by all */
    if (threadIdx.x == 0)
        *turn = pull_turn(p, n, m, d, hand, hands);
    __syncthreads();
    uint32_t j = epx__rail_undone(hand, hands, turn->from + threadIdx.x / 32);
    bool come = turn->go != 0 && j < my_rows(p, source) &&
                (uint32_t)p.h.pull_row[(size_t)source * r.tokens_max + j] < turn->count;
    if (come)
        record_read(p, m, d, source, j);
    /* Rows come in order, so the warps that had one are the first. All have read the ring before the keeper is told. */
    uint32_t count = (uint32_t)__syncthreads_count(come) / 32;
    if (threadIdx.x == 0 && count)
        st_release_sys_u64(&r.hands[(size_t)(m * r.domains + d) * HT_HANDS + hand], rail_word(n, turn->from + count));
    return count;
}

/* Block `hand` of `hands`: its rows of all streams. */
EPX__DEVICE bool rail_pull_block(const ht_rows_t &p, ht_block_t *b, uint32_t hand, uint32_t hands)
{
    __shared__ rail_turn_t turn;
    const ht_rails_t &r = *p.c.rails;
    rail_idle_t idle = {};
    for (;;) {
        bool left = false, moved = false;
        int waiting = p.c.rank;
        for (int s = 0; s < r.members * r.domains; s++) {
            int m = (r.index + s / r.domains) % r.members, d = s % r.domains;
            if (d == r.home || my_rows(p, r.rank_of[d * r.members + m]) == 0)
                continue;
            moved = pull_some(p, b->n, m, d, hand, hands, &turn) != 0 || moved;
            left = left || turn.go != 0;
            waiting = turn.go != 0 ? r.rank_of[r.home * r.members + m] : waiting;
        }
        if (!left)
            return true;
        if (!rail_go_on(p.c, b->n, moved, &idle, -1, waiting, HT_STAGE_COME))
            return false;
    }
}

/* ---- keeper ---- */

/* Lane of domain d: what has come, to all members. 1 news, 0 none. */
EPX__DEVICE int keep_arrived(const ht_rows_t &p, uint64_t n, int d, uint32_t total)
{
    const ht_rails_t &r = *p.c.rails;
    uint32_t told = rail_count(r.state[d].arrived, n);
    if (told == total)
        return 0;
    uint32_t come = rail_come(r, d, p.rail_cut, total);
    if (come <= told)
        return 0;
    r.state[d].arrived = rail_word(n, come);
    for (int m = 0; m < r.members; m++)
        st_release_sys_u64(&rail_words(r, m, r.index, d)->arrived, rail_word(n, come));
    return 1;
}

/* Lane of stream (m, d): what has arrived, to the pulling blocks; what I need no more, to member m. 1 news, 0 none. */
EPX__DEVICE int keep_taken(const ht_rows_t &p, uint64_t n, int m, int d)
{
    const ht_rails_t &r = *p.c.rails;
    int source = r.rank_of[d * r.members + m], s = m * r.domains + d;
    uint32_t told = rail_count(r.told[s], n), rows = my_rows(p, source), next = UINT32_MAX;
    if (told == (uint32_t)p.h.in_count[s])
        return 0;
    uint32_t come = rail_count(ld_acquire_sys_u64(&rail_words(r, r.index, m, d)->arrived), n);
    int news = come > rail_count(r.come[s], n);
    if (news)
        st_release_sys_u64(&r.come[s], rail_word(n, come));
    for (uint32_t hand = 0; hand < p.rail_pull; hand++) {
        uint32_t done = rail_count(ld_acquire_sys_u64(&r.hands[(size_t)s * HT_HANDS + hand]), n);
        uint32_t undone = epx__rail_undone(hand, p.rail_pull, done);
        next = undone < next ? undone : next;
    }
    uint32_t taken = epx__rail_needless(p.h.pull_row + (size_t)source * r.tokens_max, rows, next, come);
    if (taken <= told)
        return news;
    r.told[s] = rail_word(n, taken);
    st_release_sys_u64(&rail_words(r, m, r.index, d)->taken, rail_word(n, taken));
    return 1;
}

/* Lane of domain d: credit for what all members have taken. -1: stop. */
EPX__DEVICE int keep_free(const ht_rows_t &p, uint64_t n, int d, uint32_t total)
{
    const ht_rails_t &r = *p.c.rails;
    if (rail_all_freed(r, n, d, p.rail_cut, total))
        return 0;
    uint32_t least = total;
    for (int m = 0; m < r.members; m++) {
        uint32_t taken = rail_count(ld_acquire_sys_u64(&rail_words(r, r.index, m, d)->taken), n);
        least = taken < least ? taken : least;
    }
    return rail_free(p.c, n, d, p.rail_cut, least, total);
}

/* What the keeper still has to do. */
typedef struct keeper {
    int left, moved; /* moved -1: stop */
    int domain, peer;
    uint32_t stage;
} keeper_t;

EPX__DEVICE void keep_domain(const ht_rows_t &p, uint64_t n, int d, keeper_t *k)
{
    const ht_rails_t &r = *p.c.rails;
    uint32_t total = (uint32_t)p.h.in_count[r.index * r.domains + d];
    int arrived = keep_arrived(p, n, d, total), freed = keep_free(p, n, d, total);
    k->moved = freed < 0 || k->moved < 0 ? -1 : k->moved | arrived | freed;
    if (rail_count(r.state[d].arrived, n) < total) {
        k->left = 1;
        k->domain = d;
        k->peer = rail_channel(r, d, EPX__RAIL_DATA)->peer;
    } else if (!rail_all_freed(r, n, d, p.rail_cut, total)) {
        k->left = 1; /* some member is slow */
    }
}

/* One warp. */
EPX__DEVICE bool rail_keeper(const ht_rows_t &p, uint64_t n)
{
    const ht_rails_t &r = *p.c.rails;
    int lane = (int)threadIdx.x % 32, streams = r.members * r.domains;
    rail_idle_t idle = {};
    for (;;) {
        keeper_t k = {0, 0, -1, p.c.rank, HT_STAGE_COME};
        for (int d = lane; d < r.domains; d += 32) {
            if (d != r.home)
                keep_domain(p, n, d, &k);
        }
        for (int s = lane; s < streams; s += 32) {
            int m = s / r.domains, d = s % r.domains;
            if (d == r.home)
                continue;
            int moved = keep_taken(p, n, m, d);
            k.moved = k.moved < 0 ? -1 : k.moved | moved;
            k.left |= rail_count(r.told[s], n) < (uint32_t)p.h.in_count[s];
        }
        if (__any_sync(0xffffffffu, k.moved < 0))
            return false;
        if (!__any_sync(0xffffffffu, k.left != 0))
            return true;
        bool moved = __any_sync(0xffffffffu, k.moved != 0) != 0, ok = true;
        if (moved)
            rail_moved(&idle);
        else if (k.left)
            ok = rail_patience(p.c, n, &idle, k.domain, k.peer, k.stage);
        if (!__all_sync(0xffffffffu, ok))
            return false;
    }
}

/* ---- together ---- */

/* A block behind those of the domain. Not inlined: it is to cost the others no registers. */
static __device__ __noinline__ void rail_rows_block(const ht_rows_t &p, ht_block_t *b)
{
    uint32_t block = blockIdx.x - p.near_blocks;
    if (block < p.rail_send)
        rail_send_block(p, b, block, p.rail_send);
    else if (block < p.rail_send + p.rail_pull)
        rail_pull_block(p, b, block - p.rail_send, p.rail_pull);
    else if (threadIdx.x < 32)
        rail_keeper(p, b->n);
}

/* Last block, the half has ended well. */
static __device__ __noinline__ void rail_rows_end(const ht_rows_t &p)
{
    const ht_rails_t &r = *p.c.rails;
    for (int d = (int)threadIdx.x; d < r.domains; d += (int)blockDim.x) {
        if (d != r.home)
            rail_count_on(r, p.rail_cut, d, (uint32_t)p.h.cross_count[d],
                          (uint32_t)p.h.in_count[r.index * r.domains + d]);
    }
}

#endif
