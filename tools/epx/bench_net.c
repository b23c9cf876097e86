/*
 * The floor between domains on the CPU: a raw stream of puts with the same bytes both ways at once, over the provider
 * that the library uses, in puts of the best size; and the local copies and sums. One after the other, with nothing
 * counted, packed or waited for:
 *
 *   dispatch   each token's row once to every other domain that wants it, to the rank with the same place there; then
 *              every row that is for the own domain, from here or arrived, copied to where it belongs
 *   combine    sums of what two or more ranks of the domain hold of another domain's token; one row a token and domain
 *              sent back; then each own token's sum over the own domain's rows and the other domains' partial sums
 *
 * Copies and sums are floor_cpu's, on lists made here.
 */
#include "bench.h"
#include "floor.h"
#include "progress.h"
#include "stream.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const size_t chunks[] = {32u << 10, 112u << 10, 256u << 10, 512u << 10, 1u << 20, 4u << 20};
enum { CHUNKS = sizeof chunks / sizeof *chunks };

/* A list for floor_cpu: where each token's rows are. */
typedef struct part {
    int32_t *dst_rank, *dst_row; /* [tokens][ranks] */
    uint32_t tokens;
    void *floor; /* NULL: nothing to do */
    int variant; /* the fastest */
} part_t;

typedef struct net_floor {
    floor_plan_t plan;
    const bench_work_t *work;
    const int32_t *domain_of;
    int domain;
    const stream_ops_t *ops;
    void *stream[2];                /* by floor_kind_t */
    uint32_t *out_rows, *back_rows; /* [ranks] of this rank's tokens to its rail there; of that rail's tokens here */
    uint32_t out_total, back_total;
    size_t *bytes; /* [6][ranks] for the streams' plans: to, from, at of dispatch and of combine */
    uint8_t **area;
    uint8_t *send, *rows; /* rows: this rank's tokens, then what arrives */
    part_t copies, partial, final;
    char name[96];
} net_floor_t;

static _Thread_local char words[320];

static const char *net_words(void)
{
    return words;
}

static int fail(const char *text)
{
    snprintf(words, sizeof words, "%s", text);
    return 1;
}

/* ---- who sends how much ---- */

static bool wanted(const net_floor_t *self, int source, uint32_t token, int domain)
{
    const bench_work_t *work = self->work;
    const int32_t *ranks = work->dst_rank + (work->first[source] + token) * (uint64_t)work->ranks;
    for (int slot = 0; slot < work->ranks && ranks[slot] >= 0; slot++)
        if (self->domain_of[ranks[slot]] == domain)
            return true;
    return false;
}

static int index_in_domain(const net_floor_t *self, int rank)
{
    int index = 0;
    for (int r = 0; r < rank; r++)
        index += self->domain_of[r] == self->domain_of[rank];
    return index;
}

static bool rail(const net_floor_t *self, int other)
{
    return self->domain_of[other] != self->domain &&
           index_in_domain(self, other) == index_in_domain(self, self->plan.rank);
}

static uint32_t rows_between(const net_floor_t *self, int source, int domain)
{
    uint32_t count = 0;
    for (uint32_t token = 0; token < self->work->tokens[source]; token++)
        count += wanted(self, source, token, domain);
    return count;
}

static void count_rows(net_floor_t *self)
{
    for (int r = 0; r < self->plan.ranks; r++)
        if (rail(self, r)) {
            self->out_total += self->out_rows[r] = rows_between(self, self->plan.rank, self->domain_of[r]);
            self->back_total += self->back_rows[r] = rows_between(self, r, self->domain);
        }
}

/* ---- lists ---- */

static int part_init(part_t *part, uint32_t tokens, int ranks)
{
    size_t count = (size_t)tokens * (size_t)ranks + 1;
    part->dst_rank = malloc(count * sizeof *part->dst_rank);
    part->dst_row = malloc(count * sizeof *part->dst_row);
    return part->dst_rank && part->dst_row ? 0 : fail("no memory for the floor's lists");
}

/* Add a token's places in this domain; returns how many. */
static int part_add(const net_floor_t *self, part_t *part, int source, uint32_t token)
{
    const bench_work_t *work = self->work;
    int ranks = work->ranks, count = 0;
    uint64_t at = (work->first[source] + token) * (uint64_t)ranks, to = (uint64_t)part->tokens * (uint64_t)ranks;
    for (int slot = 0; slot < ranks && work->dst_rank[at + (uint64_t)slot] >= 0; slot++) {
        int32_t rank = work->dst_rank[at + (uint64_t)slot];
        if (self->domain_of[rank] != self->domain)
            continue;
        part->dst_rank[to + (uint64_t)count] = rank;
        part->dst_row[to + (uint64_t)count++] = work->dst_row[at + (uint64_t)slot];
    }
    if (count < ranks)
        part->dst_rank[to + (uint64_t)count] = -1;
    return count;
}

static void add_final(const net_floor_t *self, part_t *part, uint32_t token, uint32_t *next)
{
    int me = self->plan.rank, ranks = self->plan.ranks, count = part_add(self, part, me, token);
    size_t to = (size_t)part->tokens * (size_t)ranks;
    for (int r = 0; r < ranks; r++)
        if (rail(self, r) && wanted(self, me, token, self->domain_of[r])) {
            part->dst_rank[to + (size_t)count] = r; /* its area is where its partial sums arrive */
            part->dst_row[to + (size_t)count++] = (int32_t)next[r]++;
        }
    if (count < ranks)
        part->dst_rank[to + (size_t)count] = -1;
    part->tokens++;
}

static int make_lists(net_floor_t *self)
{
    int me = self->plan.rank, ranks = self->plan.ranks;
    uint32_t own = self->plan.tokens, *next = calloc((size_t)ranks, sizeof *next);
    if (!next || part_init(&self->copies, own + self->back_total, ranks) ||
        part_init(&self->partial, self->back_total, ranks) || part_init(&self->final, own, ranks)) {
        free(next);
        return fail("no memory for the floor's lists");
    }
    for (uint32_t token = 0; token < own; token++) {
        part_add(self, &self->copies, me, token);
        self->copies.tokens++;
        add_final(self, &self->final, token, next);
    }
    for (int r = 0; r < ranks; r++)
        for (uint32_t token = 0; self->back_rows[r] && token < self->work->tokens[r]; token++) {
            if (!wanted(self, r, token, self->domain))
                continue;
            part_add(self, &self->copies, r, token);
            self->copies.tokens++;
            self->partial.tokens += part_add(self, &self->partial, r, token) > 1;
        }
    free(next);
    return 0;
}

/* Opened with the list; then each way of doing it tried: with other ranks at the same time, they all come here. */
static int part_open(net_floor_t *self, part_t *part, floor_kind_t kind)
{
    floor_plan_t plan = self->plan;
    uint64_t least = UINT64_MAX;
    plan.tokens = part->tokens;
    plan.dst_rank = part->dst_rank;
    plan.dst_row = part->dst_row;
    plan.x = self->rows;
    plan.area = self->area;
    if (part->tokens == 0)
        return 0;
    const char *error = floor_cpu_open(&plan, &part->floor);
    if (error)
        return fail(error);
    for (int pass = 0; pass < 3; pass++)
        for (int variant = 0; variant < floor_cpu_variants(part->floor, kind); variant++) {
            uint64_t began = now_ns();
            floor_cpu_run(part->floor, kind, variant);
            uint64_t took = now_ns() - began;
            if (took < least) {
                least = took;
                part->variant = variant;
            }
        }
    return 0;
}

/* ---- streams ---- */

/* Where in my landing place each rail's bytes go, told to it. At most 512 bytes a rank and turn of the all-gather. */
static int tell_places(net_floor_t *self, const size_t *from, size_t *at)
{
    int ranks = self->plan.ranks, me = self->plan.rank;
    size_t *mine = calloc((size_t)ranks, sizeof *mine), *all = calloc((size_t)ranks, 8 * sizeof *all);
    int failed = !mine || !all ? fail("no memory") : 0;
    for (int r = 1; r < ranks && !failed; r++)
        mine[r] = mine[r - 1] + from[r - 1];
    for (int r = 0; r < ranks && !failed; r += 8) { /* what everybody says to ranks r to r + 7 */
        size_t eight[8] = {0};
        memcpy(eight, mine + r, (size_t)(ranks - r < 8 ? ranks - r : 8) * sizeof *mine);
        if (self->plan.allgather(self->plan.allgather_context, eight, sizeof eight, all))
            failed = fail("another rank failed");
        for (int s = 0; s < ranks && me >= r && me < r + 8 && !failed; s++)
            at[s] = all[(size_t)s * 8 + (size_t)(me - r)];
    }
    free(mine);
    free(all);
    return failed;
}

static int open_stream(net_floor_t *self, const char *provider, floor_kind_t kind, const uint32_t *to,
                       const uint32_t *from, size_t row_bytes)
{
    size_t ranks = (size_t)self->plan.ranks;
    size_t *to_bytes = self->bytes + 3 * (size_t)kind * ranks, *from_bytes = to_bytes + ranks, *at = from_bytes + ranks;
    stream_plan_t plan = {.provider = provider,
                          .rank = self->plan.rank,
                          .ranks = self->plan.ranks,
                          .to_bytes = to_bytes,
                          .from_bytes = from_bytes,
                          .to_at = at,
                          .from = (char *)self->send,
                          .into = (char *)self->rows + self->plan.tokens * self->plan.row_bytes,
                          .allgather = self->plan.allgather,
                          .allgather_context = self->plan.allgather_context};
    for (size_t r = 0; r < ranks; r++) {
        plan.from_total += to_bytes[r] = to[r] * row_bytes;
        plan.into_total += from_bytes[r] = from[r] * row_bytes;
    }
    if (tell_places(self, from_bytes, at))
        return 1;
    if (self->ops->open(&plan, &self->stream[kind]))
        return fail(self->ops->words());
    return 0;
}

static int open_streams(net_floor_t *self, const char *net)
{
    const char *why = "";
    size_t sum_bytes = (size_t)self->plan.hidden * (self->plan.format == PATTERN_FP32 ? 4 : 2);
    bool sums = self->plan.format != PATTERN_BYTES;
    self->ops = stream_ops_open(&why);
    if (!self->ops)
        return fail(why);
    if (open_stream(self, net, FLOOR_DISPATCH, self->out_rows, self->back_rows, self->plan.row_bytes))
        return 1;
    return sums && open_stream(self, net, FLOOR_COMBINE, self->back_rows, self->out_rows, sum_bytes);
}

/* ---- the table ---- */

static int get_memory(net_floor_t *self)
{
    size_t ranks = (size_t)self->plan.ranks, row = self->plan.row_bytes;
    self->out_rows = calloc(ranks, sizeof *self->out_rows);
    self->back_rows = calloc(ranks, sizeof *self->back_rows);
    self->bytes = calloc(6 * ranks, sizeof *self->bytes);
    self->area = calloc(ranks, sizeof *self->area);
    if (!self->out_rows || !self->back_rows || !self->bytes || !self->area)
        return fail("no memory for the floor");
    count_rows(self);
    size_t most = self->out_total > self->back_total ? self->out_total : self->back_total;
    size_t send = (most * row + 255) / 256 * 256 + 256,
           rows = ((self->plan.tokens + most) * row + 255) / 256 * 256 + 256;
    self->send = aligned_alloc(256, send);
    self->rows = aligned_alloc(256, rows);
    if (!self->send || !self->rows)
        return fail("no memory for the floor's rows");
    memset(self->send, 0, send);
    memset(self->rows, 0, rows);
    uint8_t *landing = self->rows + self->plan.tokens * row;
    for (size_t r = 0; r < ranks; r++) {
        self->area[r] = self->plan.area[r];
        if (!self->out_rows[r] || self->plan.format == PATTERN_BYTES)
            continue;
        self->area[r] = landing;
        landing += self->out_rows[r] * (size_t)self->plan.hidden * (self->plan.format == PATTERN_FP32 ? 4 : 2);
    }
    return 0;
}

static void net_close(void *context)
{
    net_floor_t *self = context;
    if (!self)
        return;
    part_t *const parts[] = {&self->copies, &self->partial, &self->final};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        floor_cpu_close(parts[i]->floor);
        free(parts[i]->dst_rank);
        free(parts[i]->dst_row);
    }
    for (int kind = 0; kind < 2; kind++)
        if (self->stream[kind])
            self->ops->close(self->stream[kind]);
    free(self->out_rows);
    free(self->back_rows);
    free(self->bytes);
    free(self->area);
    free(self->send);
    free(self->rows);
    free(self);
}

int floor_net_open(const floor_plan_t *plan, const bench_work_t *work, const int32_t *domain_of, const char *net,
                   void **floor)
{
    net_floor_t *self = calloc(1, sizeof *self);
    if (!self)
        return fail("no memory for the floor");
    self->plan = *plan;
    self->work = work;
    self->domain_of = domain_of;
    self->domain = domain_of[plan->rank];
    if (get_memory(self) || make_lists(self) || open_streams(self, strncmp(net, "ofi:", 4) ? net : net + 4) ||
        part_open(self, &self->copies, FLOOR_DISPATCH) ||
        (plan->format != PATTERN_BYTES &&
         (part_open(self, &self->partial, FLOOR_COMBINE) || part_open(self, &self->final, FLOOR_COMBINE)))) {
        net_close(self);
        return 1;
    }
    *floor = self;
    return 0;
}

static int net_variants(void *floor, floor_kind_t kind)
{
    (void)floor;
    (void)kind;
    return CHUNKS;
}

static const char *net_variant_name(void *floor, floor_kind_t kind, int variant)
{
    net_floor_t *self = floor;
    const part_t *part = kind == FLOOR_COMBINE ? &self->final : &self->copies;
    snprintf(self->name, sizeof self->name, "puts of %zu KB, %s", chunks[variant] >> 10,
             part->floor ? floor_cpu_variant_name(part->floor, kind, part->variant) : "nothing");
    return self->name;
}

static void run_part(const part_t *part, floor_kind_t kind)
{
    if (part->floor)
        floor_cpu_run(part->floor, kind, part->variant);
}

static int net_run(void *floor, floor_kind_t kind, int variant)
{
    net_floor_t *self = floor;
    if (kind == FLOOR_COMBINE)
        run_part(&self->partial, kind);
    if (self->ops->run(self->stream[kind], chunks[variant]))
        return fail(self->ops->words());
    run_part(kind == FLOOR_COMBINE ? &self->final : &self->copies, kind);
    return 0;
}

const floor_ops_t floor_net_ops = {net_variants, net_variant_name, net_run, net_close, net_words};
