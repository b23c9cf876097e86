/*
 * Every routing of tiny worlds against the invariants of plan/, and the reference against them:
 *   - each (token, destination rank) pair is one row: placed once, none overlap, no gaps
 *   - the rows at a rank come by (source rank, token index)
 *   - counts per expert count every choice once
 *   - the reference's dispatch receives exactly that, and its combine brings each row back to its token
 * Then the reference's combine against a layer in fp64, within a written bound.
 */
#include "common/check.h"

#include "algo/reference.h"
#include "base/alloc.h"
#include "base/fail.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { R_MAX = 3, T_MAX = 3, E_MAX = 4, K_MAX = 2 };

typedef struct world {
    int ranks;
    uint32_t experts, topk;
    int bits;
    const int32_t *rank_of;
    epx__experts_t map;
    int32_t local_of[E_MAX];
    epx__topology_t topology;
    uint32_t tokens[R_MAX];
    int64_t ids[R_MAX][T_MAX * K_MAX];
    int32_t narrow[R_MAX][T_MAX * K_MAX];
    float x[R_MAX][T_MAX][4];
    float weights[R_MAX][T_MAX * K_MAX];
} world_t;

static void world_init(world_t *w, int ranks, uint32_t experts, uint32_t topk, const int32_t *rank_of)
{
    static uint8_t reach[R_MAX * R_MAX] = {1, 1, 1, 1, 1, 1, 1, 1, 1};
    *w = (world_t){.ranks = ranks, .experts = experts, .topk = topk, .bits = 64, .rank_of = rank_of};
    CHECK(epx__experts_make(experts, (uint32_t)ranks, rank_of, w->local_of, &w->map) == EPX_OK, "%s", epx__detail());
    CHECK(epx__topology_make(ranks, reach, 0, &w->topology) == EPX_OK, "%s", epx__detail());
    for (int r = 0; r < ranks; r++) {
        for (int t = 0; t < T_MAX; t++) {
            for (int i = 0; i < 4; i++)
                w->x[r][t][i] = (float)(1 + r * 64 + t * 16 + i);
            for (int k = 0; k < K_MAX; k++)
                w->weights[r][t * (int)topk + (k < (int)topk ? k : 0)] = (float)(1 + r * 32 + t * 8 + k);
        }
    }
}

/* Which ranks token t of r goes to, from first principles. */
static int goes(const world_t *w, int r, uint32_t t, int to)
{
    for (uint32_t k = 0; k < w->topk; k++) {
        int64_t id = w->ids[r][t * w->topk + k];
        if (id < 0 || id >= (int64_t)w->experts)
            continue;
        int holder = w->rank_of ? w->rank_of[id] : (int)id / (int)(w->experts / (uint32_t)w->ranks);
        if (holder == to)
            return 1;
    }
    return 0;
}

static const void *ids_of(const world_t *w, int r)
{
    return w->bits == 64 ? (const void *)w->ids[r] : (const void *)w->narrow[r];
}

/* One rank's part of plan/: counts and positions. Returns its row of the matrix. */
static void check_rank(const world_t *w, int r, int32_t *row_counts, int32_t *dst_rank, int32_t *dst_row)
{
    epx__routing_in_t in = {
        .map = w->map, .tokens = w->tokens[r], .topk = w->topk, .bits = w->bits, .topk_idx = ids_of(w, r)};
    uint32_t slots = epx__routing_slots(w->topk, (uint32_t)w->ranks), bad = 77, want_bad = 0;
    int32_t expert_count[E_MAX], want_count[E_MAX] = {0}, next[R_MAX] = {0};
    epx__routing_make(&in, slots, row_counts, expert_count, dst_rank, dst_row, &bad);
    for (uint32_t i = 0; i < w->tokens[r] * w->topk; i++) {
        int64_t id = w->ids[r][i];
        if (id >= 0 && id < (int64_t)w->experts)
            want_count[id]++;
        else
            want_bad += id != -1;
    }
    CHECK(bad == want_bad, "%u bad ids, not %u", bad, want_bad);
    CHECK(memcmp(expert_count, want_count, w->experts * sizeof *want_count) == 0, "expert counts");
    for (uint32_t t = 0; t < w->tokens[r]; t++) {
        uint32_t s = 0;
        for (int to = 0; to < w->ranks; to++) {
            if (!goes(w, r, t, to))
                continue;
            CHECK(dst_rank[t * slots + s] == to && dst_row[t * slots + s] == next[to], "rank %d token %u to %d", r, t,
                  to);
            next[to]++;
            s++;
        }
        for (; s < slots; s++)
            CHECK(dst_rank[t * slots + s] == -1 && dst_row[t * slots + s] == -1, "padding");
    }
    CHECK(memcmp(row_counts, next, (size_t)w->ranks * sizeof *next) == 0, "rank counts");
}

/* Final rows over all ranks: a permutation without gaps, in the promised order; who[j][row] = source * 16 + token. */
static void check_places(const world_t *w, int32_t who[R_MAX][R_MAX * T_MAX], uint64_t *total)
{
    int32_t matrix[R_MAX * R_MAX], dst_rank[R_MAX][T_MAX * R_MAX], dst_row[R_MAX][T_MAX * R_MAX];
    int32_t start[R_MAX], first[R_MAX];
    uint32_t slots = epx__routing_slots(w->topk, (uint32_t)w->ranks);
    for (int r = 0; r < w->ranks; r++)
        check_rank(w, r, matrix + r * w->ranks, dst_rank[r], dst_row[r]);
    memset(who, 0xff, sizeof(int32_t[R_MAX][R_MAX * T_MAX]));
    for (int j = 0; j < w->ranks; j++)
        total[j] = epx__routing_starts(matrix, w->ranks, j, start);
    for (int r = 0; r < w->ranks; r++) {
        epx__routing_firsts(matrix, w->ranks, r, first);
        for (int j = 0; j < w->ranks; j++) {
            epx__routing_starts(matrix, w->ranks, j, start);
            CHECK(start[r] == first[j], "first row of %d at %d: %d or %d", r, j, start[r], first[j]);
        }
        for (uint32_t i = 0; i < w->tokens[r] * slots; i++) {
            if (dst_rank[r][i] < 0)
                continue;
            int32_t j = dst_rank[r][i], row = first[j] + dst_row[r][i];
            CHECK(row >= 0 && (uint64_t)row < total[j], "row %d of %d", row, (int)total[j]);
            CHECK(who[j][row] == -1, "row %d at %d taken twice", row, j);
            who[j][row] = r * 16 + (int32_t)(i / slots);
        }
    }
    for (int j = 0; j < w->ranks; j++) {
        for (uint64_t row = 0; row < total[j]; row++)
            CHECK(who[j][row] >= 0 && (row == 0 || who[j][row - 1] < who[j][row]), "order at rank %d", j);
    }
}

static void check_reference(const world_t *w, int32_t who[R_MAX][R_MAX * T_MAX], const uint64_t *total)
{
    epx__ref_shape_t shape = {.ranks = w->ranks,
                              .map = w->map,
                              .topk = w->topk,
                              .bits = w->bits,
                              .row_bytes = sizeof w->x[0][0],
                              .expert_alignment = 1};
    epx__ref_rank_t in[R_MAX];
    epx__ref_received_t got[R_MAX];
    const void *y[R_MAX];
    const float *weights[R_MAX];
    for (int r = 0; r < w->ranks; r++)
        in[r] = (epx__ref_rank_t){
            .tokens = w->tokens[r], .x = w->x[r], .topk_idx = ids_of(w, r), .topk_weights = w->weights[r]};
    for (int j = 0; j < w->ranks; j++) {
        CHECK(epx__ref_dispatch(&shape, in, j, &got[j]) == EPX_OK && got[j].rows == total[j], "%u rows", got[j].rows);
        for (uint32_t row = 0; row < got[j].rows; row++) {
            int32_t r = who[j][row] / 16, t = who[j][row] % 16;
            CHECK(got[j].src_rank[row] == r && got[j].src_token[row] == t, "source of row %u at %d", row, j);
            CHECK(memcmp(got[j].x + row * shape.row_bytes, w->x[r][t], shape.row_bytes) == 0, "row %u at %d", row, j);
        }
        y[j] = got[j].x;
        weights[j] = got[j].topk_weights;
    }
    for (int r = 0; r < w->ranks; r++) {
        float out[T_MAX][4], out_weights[T_MAX * K_MAX];
        CHECK(epx__ref_combine(&shape, &w->topology, in, r, y, weights, NULL, 0, 4, EPX_FP32, out, out_weights) ==
              EPX_OK);
        for (uint32_t t = 0; t < w->tokens[r]; t++) {
            int copies = 0;
            for (int j = 0; j < w->ranks; j++)
                copies += goes(w, r, t, j);
            for (int i = 0; i < 4; i++)
                CHECK(out[t][i] == (float)copies * w->x[r][t][i], "rank %d token %u came back %d times", r, t, copies);
            for (uint32_t k = 0; k < w->topk; k++) {
                int64_t id = w->ids[r][t * w->topk + k];
                float want = id >= 0 && id < (int64_t)w->experts ? w->weights[r][t * w->topk + k] : 0.0f;
                CHECK(out_weights[t * w->topk + k] == want, "weight %u of token %u", k, t);
            }
        }
    }
    for (int j = 0; j < w->ranks; j++)
        epx__ref_received_fini(&got[j]);
}

static void check_world(world_t *w, int with_reference)
{
    int32_t who[R_MAX][R_MAX * T_MAX];
    uint64_t total[R_MAX];
    check_places(w, who, total);
    if (with_reference)
        check_reference(w, who, total);
}

/* The id that digit d stands for: -1, 0 .. experts - 1, then (as `experts`) a bad one. */
static void set_id(world_t *w, uint32_t slot, uint32_t digit)
{
    uint32_t base = 0;
    for (int r = 0; r < w->ranks; r++) {
        uint32_t n = w->tokens[r] * w->topk;
        if (slot < base + n) {
            w->ids[r][slot - base] = (int64_t)digit - 1;
            w->narrow[r][slot - base] = (int32_t)digit - 1;
            return;
        }
        base += n;
    }
}

static uint64_t every_routing(world_t *w, uint32_t digits, uint64_t limit, int with_reference)
{
    uint32_t n = 0;
    uint64_t count = 1;
    for (int r = 0; r < w->ranks; r++)
        n += w->tokens[r] * w->topk;
    for (uint32_t i = 0; i < n && count <= limit; i++)
        count *= digits;
    if (count > limit)
        return 0;
    for (uint64_t code = 0; code < count; code++) {
        uint64_t rest = code;
        for (uint32_t i = 0; i < n; i++, rest /= digits)
            set_id(w, i, (uint32_t)(rest % digits));
        w->bits = code & 1 ? 32 : 64;
        check_world(w, with_reference);
    }
    return count;
}

/* All token counts up to T_MAX a rank whose routings number at most `limit`. */
static uint64_t every_world(int ranks, uint32_t experts, uint32_t topk, const int32_t *rank_of, uint64_t limit)
{
    world_t w;
    uint64_t routings = 0;
    uint32_t combinations = 1;
    world_init(&w, ranks, experts, topk, rank_of);
    for (int r = 0; r < ranks; r++)
        combinations *= T_MAX + 1;
    for (uint32_t c = 0; c < combinations; c++) {
        uint32_t rest = c;
        for (int r = 0; r < ranks; r++, rest /= T_MAX + 1)
            w.tokens[r] = rest % (T_MAX + 1);
        routings += every_routing(&w, experts + 2, limit, 1); /* -1, experts, and one bad id */
    }
    epx__topology_fini(&w.topology);
    return routings;
}

/* The largest world is too large for every routing: 3 ranks, 3 tokens, 2 choices of 4 experts, at random. */
static void random_worlds(const int32_t *rank_of, int rounds)
{
    world_t w;
    uint64_t state = 3;
    world_init(&w, 3, 4, 2, rank_of);
    for (int n = 0; n < rounds; n++) {
        for (int r = 0; r < 3; r++)
            w.tokens[r] = 3;
        for (uint32_t i = 0; i < 18; i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            set_id(&w, i, (uint32_t)(state >> 33) % 6);
        }
        w.bits = n & 1 ? 32 : 64;
        check_world(&w, n % 4 == 0);
    }
    epx__topology_fini(&w.topology);
}

/* ---- the reference against fp64 ---- */

static double uniform(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (double)(int64_t)*state * 0x1p-63;
}

/* Unit roundoff: half the distance from 1 to the next number. */
static double roundoff(epx_dtype_t dtype)
{
    return dtype == EPX_FP32 ? 0x1p-24 : dtype == EPX_FP16 ? 0x1p-11 : 0x1p-8;
}

/*
 * A layer: out[t] = sum over choices k of w[t][k] * gain[e] * x[t], element by element, in fp64. The exchange gets x in
 * dtype; each rank sums its own experts' part in fp64 and rounds it to dtype; combine adds. With u the roundoff of
 * dtype, v of fp32, n ranks, d domains and S = sum over ranks of |part|: rounding the parts u S, fp32 adds (n + d) v S,
 * rounding what crosses domains u S, rounding the result u S each on values at most (1 + u)^3 larger: |error| <= (3 u +
 * (n + d) v) (1 + u)^3 S, plus half of fp16's least denormal for each rounding.
 */
static void layer(int ranks, int per_domain, epx_dtype_t dtype, uint64_t seed)
{
    enum { T = 5, H = 32, E = 12, K = 4 };
    static float x[4][T][H];
    static int64_t ids[4][T][K];
    static double w[4][T][K];
    double gain[E];
    uint8_t reach[16];
    epx__topology_t topology;
    epx__ref_rank_t in[4];
    epx__ref_received_t got[4];
    void *y[4];
    uint64_t state = seed;
    memset(reach, 1, sizeof reach);
    CHECK(epx__topology_make(ranks, reach, per_domain, &topology) == EPX_OK, "%s", epx__detail());
    epx__ref_shape_t shape = {.ranks = ranks, .topk = K, .bits = 64, .row_bytes = H * sizeof(float)};
    CHECK(epx__experts_make(E, (uint32_t)ranks, NULL, NULL, &shape.map) == EPX_OK);
    for (int e = 0; e < E; e++)
        gain[e] = uniform(&state) * 4;
    for (int r = 0; r < ranks; r++) {
        for (int t = 0; t < T; t++) {
            for (int i = 0; i < H; i++)
                x[r][t][i] = epx__dtype_round((float)uniform(&state), dtype);
            for (int k = 0; k < K; k++) {
                ids[r][t][k] = (int64_t)(fabs(uniform(&state)) * E) % E;
                w[r][t][k] = fabs(uniform(&state));
            }
        }
        in[r] = (epx__ref_rank_t){.tokens = T, .x = x[r], .topk_idx = ids[r]};
    }
    size_t bytes = epx__dtype_bytes(dtype);
    for (int j = 0; j < ranks; j++) {
        CHECK(epx__ref_dispatch(&shape, in, j, &got[j]) == EPX_OK);
        y[j] = calloc((size_t)got[j].rows * H + 1, bytes);
        for (uint32_t row = 0; row < got[j].rows; row++) {
            double factor = 0;
            for (int k = 0; k < K; k++) {
                int64_t local = got[j].topk_idx[row * K + (uint32_t)k];
                if (local >= 0)
                    factor += w[got[j].src_rank[row]][got[j].src_token[row]][k] * gain[j * (E / ranks) + local];
            }
            for (int i = 0; i < H; i++)
                epx__dtype_store(y[j], row * H + (uint32_t)i, dtype,
                                 (float)(factor * (double)((float *)got[j].x)[row * H + (uint32_t)i]));
        }
    }
    double u = roundoff(dtype), v = 0x1p-24, worst = 0;
    for (int r = 0; r < ranks; r++) {
        float out[T * H];
        CHECK(epx__ref_combine(&shape, &topology, in, r, (const void *const *)y, NULL, NULL, 0, H, dtype, out, NULL) ==
              EPX_OK);
        for (int t = 0; t < T; t++) {
            double part[4] = {0};
            for (int k = 0; k < K; k++)
                part[ids[r][t][k] / (E / ranks)] += w[r][t][k] * gain[ids[r][t][k]];
            for (int i = 0; i < H; i++) {
                double sum = 0, size = 0, value = (double)x[r][t][i];
                for (int j = 0; j < ranks; j++) {
                    sum += part[j] * value;
                    size += fabs(part[j] * value);
                }
                double bound = (3 * u + (ranks + topology.domains) * v) * pow(1 + u, 3) * size;
                bound += (ranks + topology.domains + 1) * (dtype == EPX_FP16 ? 0x1p-25 : 0x1p-140) + 2 * v * size;
                double error = fabs((double)epx__dtype_load(out, (size_t)(t * H + i), dtype) - sum);
                CHECK(error <= bound, "error %g over bound %g", error, bound);
                if (size > 0 && error / (u * size) > worst)
                    worst = error / (u * size);
            }
        }
    }
    CHECK(worst > 0.01, "an error of %g roundoffs is too good: was anything rounded?", worst);
    for (int j = 0; j < ranks; j++) {
        epx__ref_received_fini(&got[j]);
        free(y[j]);
    }
    epx__topology_fini(&topology);
}

int main(void)
{
    static const int32_t map3[] = {1, 1, 0}, map4[] = {2, 0, 2, 1}, skewed[] = {1, 1, 1, 1};
    uint64_t routings = 0;
    int64_t live = epx__alloc_live();
    for (uint32_t topk = 1; topk <= 2; topk++) {
        for (uint32_t experts = 1; experts <= 4; experts++)
            routings += every_world(1, experts, topk, NULL, 10000);
        routings += every_world(2, 2, topk, NULL, 5000);
        routings += every_world(2, 4, topk, NULL, 8000);
        routings += every_world(2, 3, topk, map3, 20000);
        routings += every_world(2, 4, topk, skewed, 8000);
        routings += every_world(3, 3, topk, NULL, 4000);
        routings += every_world(3, 4, topk, map4, 8000);
    }
    CHECK(routings > 300000, "only %lu routings", (unsigned long)routings);
    random_worlds(map4, 100000);
    random_worlds(skewed, 20000);
    for (uint64_t seed = 1; seed <= 20; seed++) {
        for (int dtype = EPX_BF16; dtype <= EPX_FP32; dtype++) {
            layer(1, 1, (epx_dtype_t)dtype, seed);
            layer(4, 4, (epx_dtype_t)dtype, seed);
            layer(4, 2, (epx_dtype_t)dtype, seed);
            layer(3, 1, (epx_dtype_t)dtype, seed);
        }
    }
    CHECK(epx__alloc_live() == live, "%d blocks left", (int)(epx__alloc_live() - live));
    printf("%lu routings\n", (unsigned long)routings);
    return check_done();
}
