/*
 * The floor between domains: a raw stream of puts with the same bytes both ways at once, over the provider that the
 * library uses, in puts of the best size; and the local copies and sums, with nothing counted, packed or waited for.
 * On the CPU one after the other:
 *
 *   dispatch   each token's row once to every other domain that wants it, to the rank with the same place there; then
 *              every row that is for the own domain, from here or arrived, copied to where it belongs
 *   combine    sums of what two or more ranks of the domain hold of another domain's token; one row a token and domain
 *              sent back; then each own token's sum over the own domain's rows and the other domains' partial sums
 *
 * On GPUs all at once:
 *
 *   stream     copied to pinned host memory, sent, copied from where it landed to the other GPU; a piece is sent as
 *              soon as it is there and copied as soon as it has come
 *   dispatch   beside it the own tokens' rows to the ranks of the own domain
 *   combine    beside it the own tokens' sums over the own domain's rows
 *
 * What arrived is not handed on in the domain and no sum has a row of another domain in it, since a library can have
 * those on the way: a floor may do less than the library, never more.
 *
 * Copies and sums in the domain are the memory's own floors (mem.h), on lists made in bench_net_lists.c.
 */
#include "bench_net.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const size_t chunks[] = {32u << 10, 112u << 10, 256u << 10, 512u << 10, 1u << 20, 4u << 20};
enum { CHUNKS = sizeof chunks / sizeof *chunks };

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

/* ---- copies and sums in the domain ---- */

static int run_part(const net_floor_t *self, const net_part_t *part, floor_kind_t kind)
{
    return part->floor && self->mem->floor_run(part->floor, kind, part->variant[kind]) ? fail(self->mem->words()) : 0;
}

/* Each way tried: with other ranks at the same time, they all come here. */
static int part_try(net_floor_t *self, net_part_t *part, floor_kind_t kind)
{
    double least = 0, us;
    if (!part->floor)
        return 0;
    for (int pass = 0; pass < 3; pass++)
        for (int variant = 0; variant < self->mem->floor_variants(part->floor, kind); variant++) {
            if (self->mem->time_start(self->context) || self->mem->floor_run(part->floor, kind, variant) ||
                self->mem->time_stop(self->context, &us))
                return fail(self->mem->words());
            if (least == 0 || us < least) {
                least = us;
                part->variant[kind] = variant;
            }
        }
    return 0;
}

/* On GPUs collective over all ranks: they all come here, also with an empty list. */
static int part_open(net_floor_t *self, net_part_t *part)
{
    floor_plan_t plan = self->plan;
    plan.tokens = part->tokens;
    plan.dst_rank = part->dst_rank;
    plan.dst_row = part->dst_row;
    plan.x = self->rows ? self->rows : plan.x;
    plan.area = self->area;
    plan.domain_of = self->domain_of;
    if (part->tokens == 0 && !self->carry)
        return 0;
    return self->mem->floor_open(self->context, &plan, &part->floor) ? fail(self->mem->words()) : 0;
}

static int open_parts(net_floor_t *self)
{
    bool sums = self->plan.format != PATTERN_BYTES;
    if (part_open(self, &self->copies) || part_try(self, &self->copies, FLOOR_DISPATCH))
        return 1;
    if (!sums)
        return 0;
    if (self->carry)
        return part_try(self, &self->copies, FLOOR_COMBINE);
    return part_open(self, &self->partial) || part_try(self, &self->partial, FLOOR_COMBINE) ||
           part_open(self, &self->final) || part_try(self, &self->final, FLOOR_COMBINE);
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
                          .from = self->from,
                          .into = self->into,
                          .allgather = self->plan.allgather,
                          .allgather_context = self->plan.allgather_context};
    if (self->carry) {
        plan.ready = self->mem->carry->ready;
        plan.landed = self->mem->carry->landed;
        plan.carry = self->carry;
    }
    for (size_t r = 0; r < ranks; r++) {
        plan.from_total += to_bytes[r] = to[r] * row_bytes;
        plan.into_total += from_bytes[r] = from[r] * row_bytes;
    }
    self->out_bytes[kind] = plan.from_total;
    self->in_bytes[kind] = plan.into_total;
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

/* ---- memory ---- */

/* Of the CPU. The stream's bytes land behind the own tokens' rows: copies have both in one list. */
static int get_rows(net_floor_t *self, size_t send_bytes)
{
    size_t own = self->plan.tokens * self->plan.row_bytes, rows = (own + send_bytes + 255) / 256 * 256 + 256;
    send_bytes = (send_bytes + 255) / 256 * 256 + 256;
    self->send = aligned_alloc(256, send_bytes);
    self->rows = aligned_alloc(256, rows);
    if (!self->send || !self->rows)
        return fail("no memory for the floor's rows");
    memset(self->send, 0, send_bytes);
    memset(self->rows, 0, rows);
    self->from = (char *)self->send;
    self->into = (char *)self->rows + own;
    return 0;
}

static int get_memory(net_floor_t *self)
{
    size_t ranks = (size_t)self->plan.ranks, row = self->plan.row_bytes;
    self->bytes = calloc(6 * ranks, sizeof *self->bytes);
    self->area = calloc(ranks, sizeof *self->area);
    if (!self->bytes || !self->area || net_count_rows(self) || net_make_lists(self))
        return fail("no memory for the floor's lists");
    size_t most = (self->out_total > self->back_total ? self->out_total : self->back_total) * row;
    if (self->mem->carry)
        return self->mem->carry->open(self->context, most, &self->carry, &self->from, &self->into)
                   ? fail(self->mem->words())
                   : 0;
    if (get_rows(self, most))
        return 1;
    uint8_t *landing = (uint8_t *)self->into;
    for (size_t r = 0; r < ranks; r++) {
        self->area[r] = self->plan.area[r];
        if (!self->out_rows[r] || self->plan.format == PATTERN_BYTES)
            continue;
        self->area[r] = landing;
        landing += self->out_rows[r] * (size_t)self->plan.hidden * (self->plan.format == PATTERN_FP32 ? 4 : 2);
    }
    return 0;
}

/* ---- the table ---- */

static void net_close(void *context)
{
    net_floor_t *self = context;
    if (!self)
        return;
    net_part_t *const parts[] = {&self->copies, &self->partial, &self->final};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (parts[i]->floor)
            self->mem->floor_close(parts[i]->floor);
    for (int kind = 0; kind < 2; kind++)
        if (self->stream[kind])
            self->ops->close(self->stream[kind]);
    if (self->carry)
        self->mem->carry->close(self->carry);
    net_free_lists(self);
    free(self->bytes);
    free(self->area);
    free(self->send);
    free(self->rows);
    free(self);
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
    const net_part_t *part = kind == FLOOR_COMBINE && !self->carry ? &self->final : &self->copies;
    snprintf(self->name, sizeof self->name, "puts of %zu KB%s, %s", chunks[variant] >> 10,
             self->carry ? " through pinned host memory" : "",
             part->floor ? self->mem->floor_variant_name(part->floor, kind, part->variant[kind]) : "nothing");
    return self->name;
}

static int run_stream(net_floor_t *self, floor_kind_t kind, int variant)
{
    return self->ops->run(self->stream[kind], chunks[variant]) ? fail(self->ops->words()) : 0;
}

/* What the GPU does is enqueued: the copies and sums in the domain run while this thread sends. */
static int run_gpu(net_floor_t *self, floor_kind_t kind, int variant)
{
    const carry_ops_t *carry = self->mem->carry;
    if (carry->begin(self->carry, self->out_bytes[kind], self->in_bytes[kind]))
        return fail(self->mem->words());
    if (run_part(self, &self->copies, kind) || run_stream(self, kind, variant))
        return 1;
    return carry->end(self->carry) ? fail(self->mem->words()) : 0;
}

static int net_run(void *floor, floor_kind_t kind, int variant)
{
    net_floor_t *self = floor;
    const net_part_t *after = kind == FLOOR_COMBINE ? &self->final : &self->copies;
    if (self->carry)
        return run_gpu(self, kind, variant);
    if (kind == FLOOR_COMBINE && run_part(self, &self->partial, kind))
        return 1;
    return run_stream(self, kind, variant) || run_part(self, after, kind);
}

int floor_net_open(bench_rank_t *rank, const floor_plan_t *plan)
{
    static const floor_ops_t ops = {net_variants, net_variant_name, net_run, net_close, net_words};
    net_floor_t *self = calloc(1, sizeof *self);
    if (!self)
        return rank_fail(rank->rank, "no memory for the floor");
    self->plan = *plan;
    self->work = &rank->bench->work;
    self->mem = rank->mem;
    self->context = rank->context;
    self->domain_of = rank->info.domain_of;
    self->domain = self->domain_of[plan->rank];
    if (get_memory(self) || open_streams(self, rank->info.net + strlen("ofi:")) || open_parts(self)) {
        net_close(self);
        return rank_fail(rank->rank, "the floor: %s", words);
    }
    rank->floor_ops = ops;
    rank->floor = self;
    /* So that no rank's kernels wait yet, on the same GPU, for one that still opens its floor. */
    return rank_barrier(rank->rank);
}
