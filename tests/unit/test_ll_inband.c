/* The index logic of low latency with in-band arrival: words, who does what, orders of rows. */
#include "common/check.h"

#include "algo/ll/cuda/ll_cuda.h"
#include "algo/ll/cuda/ll_inband.h"

#include <stdlib.h>
#include <string.h>

static void words(void)
{
    const uint16_t ids[LL_IDS_IN_WORD] = {0, 0xffff, 0x1234, 0xfffe, 0x8000, 7};
    ll_word_t w = ll_pack_ids(ids, 0x1ffffffffu);
    for (uint32_t i = 0; i < LL_IDS_IN_WORD; i++)
        CHECK(ll_unpack_id(w, i) == ids[i], "id %u", i);
    CHECK(w.second >> 32 == 0xffffffffu, "the number's lower half");
    w = ll_pack_ids(ids, 0);
    w.second |= 5ull << 32;
    CHECK(w.second >> 32 == 5 && ll_unpack_id(w, 4) == 0x8000 && ll_unpack_id(w, 5) == 7);
    uint32_t one = 0xffffffffu;
    CHECK(ll_all_ones(one, one, one, one) && !ll_all_ones(one, one, one - 1, one));
    CHECK(ll_never_empty(one, one, one, one) != one && ll_never_empty(one, one, 0, one) == one);
    uint32_t last = ll_never_empty(one, one, one, one); /* two bf16, both still NaN */
    CHECK((last & 0x7fff) > 0x7f80 && (last >> 16 & 0x7fff) > 0x7f80);
    CHECK(ll_credit_word(3, 1) < ll_credit_word(4, 0) && ll_credit_word(3, 0) < ll_credit_word(3, 1));
    CHECK(ll_scale_words(128) == 1 && ll_scale_words(512) == 1 && ll_scale_words(640) == 2);
}

/* Words of ids take no more room than the words of 8 bytes that the layout counts with, rounded as ll_weights does. */
static void room(void)
{
    for (uint32_t pairs = 1; pairs < 3000; pairs++)
        CHECK(ll_id_words(pairs) * 16 <= (pairs + 1) / 2 * 16 && ll_id_words(pairs) * LL_IDS_IN_WORD >= pairs, "%u",
              pairs);
    for (uint32_t hidden = 128; hidden <= 8192; hidden += 128) /* an fp8 row with its scales, in a bf16 row's place */
        CHECK(hidden + ll_scale_words(hidden) * 16 <= hidden * 2 && hidden % 16 == 0, "hidden %u", hidden);
}

static void locals(void)
{
    for (uint32_t ranks = 1; ranks <= 5; ranks++) {
        uint32_t per_rank = LL_INBAND_EXPERTS_MOST / ranks, experts = per_rank * ranks;
        for (uint32_t r = 0; r < ranks; r++) {
            CHECK(ll_local_of(LL_NO_ID, r, per_rank, 77777) == 77777, "nobody on rank %u of %u", r, ranks);
            for (uint32_t id = 0; id < experts; id += 911)
                CHECK(ll_local_of(id, r, per_rank, 77777) == (id / per_rank == r ? id % per_rank : 77777), "%u", id);
        }
    }
}

static void roles(void)
{
    static const uint32_t tokens[] = {0, 1, 2, 5, 64, 128, 4096};
    for (uint32_t blocks = 1; blocks <= 148; blocks++)
        for (int which = 1; which <= 3; which++)
            for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
                bool send = which & 1, recv = which & 2;
                if (send && recv && blocks < LL_WHOLE_BLOCKS_LEAST)
                    continue;
                ll_roles_t r = ll_roles_of(blocks, send, recv, tokens[i]);
                CHECK(!send || (r.ids == 0 && r.send_blocks >= 1 && r.send_first + r.send_blocks <= blocks), "%u",
                      blocks);
                CHECK(!recv || (r.recv_blocks >= 1 && r.recv_first + r.recv_blocks <= blocks), "%u", blocks);
                CHECK(!recv || (r.counts < blocks && r.lists < blocks && r.sums < blocks && r.places < blocks), "%u",
                      blocks);
                CHECK(send || (r.ids == LL_NO_BLOCK && r.send_blocks == 0));
                CHECK(recv || (r.counts == LL_NO_BLOCK && r.recv_blocks == 0));
                if (send && recv) /* roles of their own */
                    CHECK(r.send_first == 1 && r.recv_first == 1 + r.send_blocks &&
                              r.counts == r.recv_first + r.recv_blocks && r.lists == r.counts + 1 &&
                              r.sums == r.lists + 1 && r.places == r.sums + 1 && r.places == blocks - 1,
                          "%u blocks", blocks);
            }
    ll_roles_t r = ll_roles_of(132, true, true, 128);
    CHECK(r.send_blocks == 39 && r.recv_blocks == 88, "%u send, %u receive", r.send_blocks, r.recv_blocks);
}

/* A vector of four words of a bitmap, counted up to a bit. */
static void bits(void)
{
    for (uint32_t rest = 0; rest <= 128; rest++) {
        uint32_t n = 0;
        for (uint32_t w = 0; w < 4; w++)
            n += (uint32_t)__builtin_popcount(ll_bits_below(rest, w));
        CHECK(n == rest, "%u", rest);
    }
    CHECK(ll_bits_below(5, 0) == 0x1f && ll_bits_below(32, 0) == 0xffffffffu && ll_bits_below(33, 1) == 1);
    CHECK(ll_bitmap_words(1) == 4 && ll_bitmap_words(128) == 4 && ll_bitmap_words(129) == 8);
}

/* Every item once, whatever the number of blocks; every pair once, whatever the rank. */
static void orders(void)
{
    static const uint32_t ranks[] = {1, 2, 3, 8, 33, 128};
    for (uint32_t blocks = 1; blocks < 40; blocks++)
        for (uint32_t all = 0; all < 100; all++) {
            uint32_t sum = 0;
            for (uint32_t b = 0; b < blocks; b++) {
                uint32_t mine = ll_dealt(all, b, blocks);
                CHECK(mine == 0 || b + (mine - 1) * blocks < all, "past the end");
                sum += mine;
            }
            CHECK(sum == all, "%u of %u", sum, all);
        }
    for (size_t i = 0; i < sizeof ranks / sizeof *ranks; i++)
        for (uint32_t tokens = 1; tokens <= 5; tokens += 2)
            for (uint32_t rank = 0; rank < ranks[i]; rank += 7) {
                uint32_t all = ranks[i] * tokens, others = (ranks[i] - 1) * tokens;
                uint8_t *seen = calloc(all, 2);
                if (!seen)
                    exit(3);
                for (uint32_t q = 0; q < all; q++) {
                    ll_pair_t t = ll_pair_taken(q, rank, ranks[i], tokens), h = ll_pair_home(q, rank, ranks[i], tokens);
                    CHECK(t.source < ranks[i] && t.token < tokens && h.source < ranks[i] && h.token < tokens);
                    CHECK(seen[t.source * tokens + t.token]++ == 0, "taken twice");
                    CHECK(seen[all + h.source * tokens + h.token]++ == 0, "home twice");
                    CHECK((h.source == rank) == (q >= others), "others' before my own");
                }
                free(seen);
            }
}

int main(void)
{
    words();
    room();
    locals();
    roles();
    bits();
    orders();
    return check_done();
}
