/*
 * Low latency with in-band arrival: index logic alone, for gcc and nvcc. docs/PROTOCOL-LL.md ("In-band arrival") says
 * why nothing is lost; tests/unit/test_ll_inband.c tests what is here.
 *
 * A word is 16 bytes and travels as one. A row's words are their own arrival signal: a place holds the empty pattern,
 * all ones, until the word comes, and again once its reader has taken it. Ids carry their call's number instead.
 */
#ifndef EPX_ALGO_LL_CUDA_LL_INBAND_H
#define EPX_ALGO_LL_CUDA_LL_INBAND_H

#include "plan/ll.h"

#ifndef LL_INBAND_WARPS     /* tests/emulate takes fewer */
#define LL_INBAND_WARPS 28u /* of a block: two tokens of 7168 elements in pieces of 512, four in pieces of 1024 */
#endif
#ifndef LL_HOME_WARPS
#define LL_HOME_WARPS 28u /* in combine */
#endif
#define LL_SENDERS_OF_16 5u /* a sending block is through sooner than one that takes: measured, 3 to 8 */
#define LL_INBAND_THREADS (LL_INBAND_WARPS * 32u)
#define LL_INBAND_RANKS_MOST 128u
#define LL_INBAND_EXPERTS_MOST 0xffffu
#define LL_SEND_PIECE 512u  /* elements of a row that a warp sends, in dispatch */
#define LL_TAKE_PIECE 1024u /* ... takes and spreads */
#define LL_HOME_PIECE 256u  /* ... sends home, and adds, in combine */
#define LL_NO_ID 0xffffu
#define LL_IDS_IN_WORD 6u
#define LL_NO_BLOCK 0xffffffffu
/* Blocks that neither send nor spread: one sends ids, four keep books. Fewer than 10 blocks: two kernels. */
#define LL_BOOKS 4u
#define LL_SERVICE_BLOCKS (LL_BOOKS + 1)
#define LL_WHOLE_BLOCKS_LEAST 10u

/* ---- words ---- */

EPX__INLINE bool ll_all_ones(uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    return (x & y & z & w) == 0xffffffffu;
}
/*
 * The last quarter of a word about to be sent: one that would look empty loses a bit. It held eight bf16 NaNs (four
 * fp32 NaNs, 16 e4m3 NaNs of negative sign); they stay NaNs.
 */
EPX__INLINE uint32_t ll_never_empty(uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    return ll_all_ones(x, y, z, w) ? 0xfffeffffu : w;
}

typedef struct ll_word {
    uint64_t first, second;
} ll_word_t;

/* Ids of six choices, 16 bits each, and in the last 32 bits the call's number. */
EPX__INLINE ll_word_t ll_pack_ids(const uint16_t *ids, uint64_t n)
{
    ll_word_t w;
    w.first = (uint64_t)ids[0] | (uint64_t)ids[1] << 16 | (uint64_t)ids[2] << 32 | (uint64_t)ids[3] << 48;
    w.second = (uint64_t)ids[4] | (uint64_t)ids[5] << 16 | n << 32;
    return w;
}
EPX__INLINE uint32_t ll_unpack_id(ll_word_t w, uint32_t i)
{
    return (uint32_t)(i < 4 ? w.first >> 16 * i : w.second >> 16 * (i - 4)) & 0xffffu;
}
/* Bitmaps of (source, token): words of a part, and bytes of ids and bitmaps. A thread counts four words at a time. */
EPX__INLINE uint32_t ll_bitmap_words(uint64_t rows)
{
    return (uint32_t)((rows + 127) / 128 * 4);
}
EPX__INLINE uint64_t ll_inband_index_bytes(uint64_t pairs, uint64_t parts, uint64_t words)
{
    return (pairs * 2 + 15) / 16 * 16 + parts * words * 4;
}
/* Words of a source's ids. They take no more room than its ids as words of their own (plan/ll.h). */
EPX__INLINE uint32_t ll_id_words(uint32_t pairs)
{
    return (pairs + LL_IDS_IN_WORD - 1) / LL_IDS_IN_WORD;
}
/* Equal blocks of experts: the local number of expert `id` on `rank`, or `none`, without a division. LL_NO_ID is above
 * every rank's block, for there are at most LL_INBAND_EXPERTS_MOST experts. */
EPX__INLINE uint32_t ll_local_of(uint32_t id, uint32_t rank, uint32_t per_rank, uint32_t none)
{
    uint32_t e = id - rank * per_rank;
    return e < per_rank ? e : none;
}
/* fp8: the scales follow the row's elements, four in a word; the last word is filled up. */
EPX__INLINE uint32_t ll_scale_words(uint32_t hidden)
{
    return (hidden + LL_SEND_PIECE - 1) / LL_SEND_PIECE;
}

/*
 * `taken` as these kernels tell it: number << 1 | flags. flags 1: that source's places in that slot may not be empty
 * any more, and its rows come with flags. It only grows.
 */
EPX__INLINE uint64_t ll_credit_word(uint64_t n, uint32_t flags)
{
    return n << 1 | flags;
}

/* ---- who does what ---- */

typedef struct ll_roles {
    uint32_t ids, counts, lists, sums, places; /* blocks */
    uint32_t send_first, send_blocks, recv_first, recv_blocks;
} ll_roles_t;

/* Blocks with low numbers start first: those that wait for nobody of this rank come before those that do. */
EPX__INLINE ll_roles_t ll_roles_of(uint32_t blocks, bool send, bool recv, uint32_t tokens)
{
    ll_roles_t r = {LL_NO_BLOCK, LL_NO_BLOCK, LL_NO_BLOCK, LL_NO_BLOCK, LL_NO_BLOCK, 0, 0, 0, 0};
    if (send) {
        uint32_t senders = (blocks - LL_SERVICE_BLOCKS) * LL_SENDERS_OF_16 / 16, useful = tokens ? tokens : 1;
        r.ids = 0;
        r.send_first = blocks > 1;
        r.send_blocks = !recv ? blocks - r.send_first : senders < useful ? senders : useful;
    }
    if (recv) {
        uint32_t books = blocks >= LL_SERVICE_BLOCKS ? LL_BOOKS : 0, first = blocks - books;
        r.recv_first = send ? r.send_first + r.send_blocks : 0;
        r.recv_blocks = first - r.recv_first;
        r.counts = books ? first : 0;
        r.lists = books ? first + 1 : 0;
        r.sums = books ? first + 2 : 0;
        r.places = books ? first + 3 : 0;
    }
    return r;
}

/* How many of the 128 bits of a bitmap's vector are before bit `rest`, word by word: a mask for word `word`. */
EPX__INLINE uint32_t ll_bits_below(uint32_t rest, uint32_t word)
{
    uint32_t n = rest > word * 32 ? rest - word * 32 : 0;
    return n >= 32 ? 0xffffffffu : (1u << n) - 1;
}

/* Of `all` items dealt out one by one to `blocks` blocks, how many the block numbered `index` has. */
EPX__INLINE uint32_t ll_dealt(uint32_t all, uint32_t index, uint32_t blocks)
{
    return index < all ? (all - index + blocks - 1) / blocks : 0;
}

typedef struct ll_pair {
    uint32_t source, token;
} ll_pair_t;

/* The q-th row to be taken: my own tokens come first, for they are here first, then the next rank's. */
EPX__INLINE ll_pair_t ll_pair_taken(uint32_t q, uint32_t rank, uint32_t ranks, uint32_t tokens_max)
{
    ll_pair_t p;
    p.source = (rank + q / tokens_max) % ranks;
    p.token = q % tokens_max;
    return p;
}

/* The q-th token to go home: others' before my own, token by token, so that every owner's first are complete first. */
EPX__INLINE ll_pair_t ll_pair_home(uint32_t q, uint32_t rank, uint32_t ranks, uint32_t tokens_max)
{
    ll_pair_t p = {rank, 0};
    if (q >= (ranks - 1) * tokens_max) {
        p.token = q - (ranks - 1) * tokens_max;
        return p;
    }
    p.token = q / (ranks - 1);
    p.source = (rank + 1 + (q + p.token) % (ranks - 1)) % ranks;
    return p;
}

#endif
