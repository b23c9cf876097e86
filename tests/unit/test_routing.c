/* Counting and placing: maps, ids of both widths, repeated and bad ids, masks, more than 32 ranks, prefix sums. */
#include "common/check.h"

#include "base/fail.h"
#include "plan/routing.h"

#include <stdbool.h>
#include <string.h>

static void maps(void)
{
    epx__experts_t m;
    int32_t local[7];
    CHECK(epx__experts_make(8, 4, NULL, NULL, &m) == EPX_OK);
    CHECK(epx__expert_rank(&m, 5) == 2 && epx__expert_local(&m, 5) == 1);
    CHECK(epx__experts_at(&m, 3) == 2 && epx__experts_most(&m) == 2);
    CHECK(epx__experts_make(7, 4, NULL, NULL, &m) == EPX_E_INVALID);
    CHECK(strstr(epx__detail(), "7 experts") && strstr(epx__detail(), "4 ranks"), "%s", epx__detail());
    const int32_t rank_of[7] = {2, 0, 2, 1, 2, 0, 2};
    CHECK(epx__experts_make(7, 4, rank_of, local, &m) == EPX_OK);
    const int32_t want[7] = {0, 0, 1, 0, 2, 1, 3};
    for (int e = 0; e < 7; e++)
        CHECK(epx__expert_local(&m, e) == want[e] && epx__expert_rank(&m, e) == rank_of[e], "expert %d", e);
    CHECK(epx__experts_at(&m, 2) == 4 && epx__experts_at(&m, 3) == 0 && epx__experts_most(&m) == 4);
    const int32_t wrong[2] = {0, 4}, negative[2] = {-1, 0};
    CHECK(epx__experts_make(2, 4, wrong, local, &m) == EPX_E_INVALID && strstr(epx__detail(), "expert_rank[1] is 4"));
    CHECK(epx__experts_make(2, 4, negative, local, &m) == EPX_E_INVALID);
    CHECK(epx__experts_make(8, 0, NULL, NULL, &m) == EPX_E_INVALID);
    CHECK(epx__experts_make(3, 4, rank_of, NULL, &m) == EPX_E_INVALID);
}

static void by_hand(void)
{
    /* 3 ranks of 2 experts. Token 0: ranks 2, 0; token 1: one rank twice; token 2: nobody; token 3: bad ids. */
    const int64_t ids[4][3] = {{5, 0, -1}, {2, 3, 3}, {-1, -1, -1}, {6, -2, 4}};
    epx__routing_in_t in = {.tokens = 4, .topk = 3, .bits = 64, .topk_idx = ids};
    int32_t rank_count[3], expert_count[6], dst_rank[12], dst_row[12], narrow[12];
    uint32_t bad = 99;
    CHECK(epx__experts_make(6, 3, NULL, NULL, &in.map) == EPX_OK);
    CHECK(epx__routing_slots(3, 3) == 3 && epx__routing_slots(8, 3) == 3 && epx__routing_slots(2, 64) == 2);
    CHECK(epx__routing_slots(0, 5) == 5 && epx__routing_slots(1, 1) == 1);
    for (int bits = 64; bits >= 32; bits -= 32) {
        for (int i = 0; i < 12; i++)
            narrow[i] = (int32_t)ids[i / 3][i % 3];
        in.bits = bits;
        in.topk_idx = bits == 64 ? (const void *)ids : narrow;
        epx__routing_make(&in, 3, rank_count, expert_count, dst_rank, dst_row, &bad);
        const int32_t want_rank[12] = {0, 2, -1, 1, -1, -1, -1, -1, -1, 2, -1, -1};
        const int32_t want_row[12] = {0, 0, -1, 0, -1, -1, -1, -1, -1, 1, -1, -1};
        const int32_t want_experts[6] = {1, 0, 1, 2, 1, 1};
        CHECK(bad == 2, "%u bad ids", bad);
        CHECK(rank_count[0] == 1 && rank_count[1] == 1 && rank_count[2] == 2);
        for (int i = 0; i < 12; i++)
            CHECK(dst_rank[i] == want_rank[i] && dst_row[i] == want_row[i], "slot %d", i);
        for (int e = 0; e < 6; e++)
            CHECK(expert_count[e] == want_experts[e], "expert %d", e);
    }
    /* Ids far outside: never used as an index. */
    const int64_t far_ids[2] = {INT64_MAX, INT64_MIN};
    in = (epx__routing_in_t){.map = in.map, .tokens = 1, .topk = 2, .bits = 64, .topk_idx = far_ids};
    epx__routing_make(&in, 2, rank_count, expert_count, dst_rank, dst_row, &bad);
    CHECK(bad == 2 && rank_count[0] + rank_count[1] + rank_count[2] == 0);
}

static void masks(void)
{
    enum { RANKS = 70, TOKENS = 9 };
    static uint8_t in_rank[TOKENS][RANKS];
    static int32_t rank_count[RANKS], dst_rank[TOKENS * RANKS], dst_row[TOKENS * RANKS];
    uint32_t bad;
    for (int t = 0; t < TOKENS; t++) {
        for (int r = 0; r < RANKS; r++)
            in_rank[t][r] = (t * 7 + r * 3) % 5 == 0 ? (uint8_t)(1 + t) : 0; /* any value but 0 */
    }
    epx__routing_in_t in = {.tokens = TOKENS, .in_rank = in_rank[0]};
    CHECK(epx__experts_make(0, RANKS, NULL, NULL, &in.map) == EPX_OK);
    uint32_t slots = epx__routing_slots(0, RANKS);
    epx__routing_make(&in, slots, rank_count, NULL, dst_rank, dst_row, &bad);
    int32_t next[RANKS] = {0};
    for (int t = 0; t < TOKENS; t++) {
        uint32_t s = 0;
        for (int r = 0; r < RANKS; r++) {
            if (!in_rank[t][r])
                continue;
            CHECK(dst_rank[t * (int)slots + (int)s] == r && dst_row[t * (int)slots + (int)s] == next[r]++);
            s++;
        }
        for (; s < slots; s++)
            CHECK(dst_rank[t * (int)slots + (int)s] == -1 && dst_row[t * (int)slots + (int)s] == -1);
    }
    for (int r = 0; r < RANKS; r++)
        CHECK(rank_count[r] == next[r]);
    CHECK(bad == 0);
}

/* The rank of an expert without dividing: at every edge of a block, for every size of block up to the largest map. */
static void ranks_without_division(void)
{
    const uint32_t blocks[] = {1,    2,    3,    5,     7,      11,     64,      127,    255,
                               1000, 1023, 4097, 65535, 524287, 524288, 1048575, 1048576};
    for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++) {
        epx__experts_t m;
        uint32_t block = blocks[b], ranks = (1u << 20) / block;
        CHECK(epx__experts_make(block * ranks, ranks, NULL, NULL, &m) == EPX_OK && m.inverse);
        for (uint32_t r = 0; r < ranks; r++) {
            uint32_t from = r * block, last = from + block - 1;
            if (epx__expert_rank(&m, from) != (int32_t)r || epx__expert_rank(&m, last) != (int32_t)r)
                CHECK(false, "experts %u to %u of blocks of %u", from, last, block);
        }
    }
    epx__experts_t large;
    CHECK(epx__experts_make(3u << 20, 3, NULL, NULL, &large) == EPX_OK && !large.inverse);
    CHECK(epx__expert_rank(&large, (1 << 20) - 1) == 0 && epx__expert_rank(&large, 1 << 20) == 1);
}

/* Up to 64 ranks go by bits, more by sorting, and without expert counts all do: the tables are the same. */
static void both_ways(int ranks, int bits, bool map)
{
    enum { TOKENS = 300, TOPK = 9, EXPERTS = 130 * 2, MOST = 65 };
    static int64_t wide[TOKENS * TOPK];
    static int32_t narrow[TOKENS * TOPK], dst_rank[2][TOKENS * TOPK], dst_row[2][TOKENS * TOPK];
    int32_t rank_of[EXPERTS], local_of[EXPERTS], rank_count[2][MOST], expert_count[EXPERTS], want[EXPERTS] = {0};
    uint32_t seed = (uint32_t)(ranks * 64 + bits), bad[2], experts = (uint32_t)(EXPERTS / ranks * ranks);
    for (int i = 0; i < TOKENS * TOPK; i++) {
        seed = seed * 1664525u + 1013904223u;
        wide[i] = (int64_t)(seed >> 8) % (EXPERTS + 8) - 3; /* some -1, some wrong */
        narrow[i] = (int32_t)wide[i];
        if (wide[i] >= 0 && wide[i] < (int64_t)experts)
            want[wide[i]]++;
    }
    for (int e = 0; e < EXPERTS; e++)
        rank_of[e] = e * 7 % ranks;
    epx__routing_in_t in = {.tokens = TOKENS, .topk = TOPK, .bits = bits};
    in.topk_idx = bits == 64 ? (const void *)wide : narrow;
    CHECK(epx__experts_make(experts, (uint32_t)ranks, map ? rank_of : NULL, local_of, &in.map) == EPX_OK);
    uint32_t slots = epx__routing_slots(TOPK, (uint32_t)ranks);
    epx__routing_make(&in, slots, rank_count[0], expert_count, dst_rank[0], dst_row[0], &bad[0]);
    epx__routing_make(&in, slots, rank_count[1], NULL, dst_rank[1], dst_row[1], &bad[1]);
    size_t table = TOKENS * slots * sizeof(int32_t);
    CHECK(bad[0] == bad[1] && bad[0] > 0 && !memcmp(dst_rank[0], dst_rank[1], table) &&
              !memcmp(dst_row[0], dst_row[1], table) &&
              !memcmp(rank_count[0], rank_count[1], (size_t)ranks * sizeof(int32_t)) &&
              !memcmp(expert_count, want, experts * sizeof(int32_t)),
          "%d ranks, %d bits, %s", ranks, bits, map ? "a map" : "blocks");
}

static void sums(void)
{
    const int32_t matrix[9] = {1, 2, 3, 10, 20, 30, 100, 200, 300};
    int32_t start[3], first[3];
    CHECK(epx__routing_starts(matrix, 3, 1, start) == 222);
    CHECK(start[0] == 0 && start[1] == 2 && start[2] == 22);
    epx__routing_firsts(matrix, 3, 2, first);
    CHECK(first[0] == 11 && first[1] == 22 && first[2] == 33);
    epx__routing_firsts(matrix, 3, 0, first);
    CHECK(first[0] == 0 && first[1] == 0 && first[2] == 0);
    const int32_t large[4] = {INT32_MAX, 0, INT32_MAX, 0};
    CHECK(epx__routing_starts(large, 2, 0, start) == 2 * (uint64_t)INT32_MAX);
    CHECK(epx__align_rows(0, 8) == 0 && epx__align_rows(1, 8) == 8 && epx__align_rows(8, 8) == 8);
    CHECK(epx__align_rows(5, 0) == 5 && epx__align_rows(5, 1) == 5);
}

int main(void)
{
    maps();
    by_hand();
    masks();
    ranks_without_division();
    const int ranks[] = {1, 2, 8, 63, 64, 65};
    for (size_t i = 0; i < sizeof ranks / sizeof *ranks; i++)
        for (int bits = 32; bits <= 64; bits += 32) {
            both_ways(ranks[i], bits, false);
            both_ways(ranks[i], bits, true);
        }
    sums();
    return check_done();
}
