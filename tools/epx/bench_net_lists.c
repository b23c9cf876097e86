/*
 * Lists of the floor between domains: how many rows a rank sends its rail in each other domain, how many that rail
 * sends here, and where each token's rows are in this domain.
 */
#include "bench_net.h"

#include <stdlib.h>

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

int net_count_rows(net_floor_t *self)
{
    size_t ranks = (size_t)self->plan.ranks;
    self->out_rows = calloc(ranks, sizeof *self->out_rows);
    self->back_rows = calloc(ranks, sizeof *self->back_rows);
    if (!self->out_rows || !self->back_rows)
        return 1;
    for (int r = 0; r < self->plan.ranks; r++)
        if (rail(self, r)) {
            self->out_total += self->out_rows[r] = rows_between(self, self->plan.rank, self->domain_of[r]);
            self->back_total += self->back_rows[r] = rows_between(self, r, self->domain);
        }
    return 0;
}

/* ---- lists ---- */

static int part_init(net_part_t *part, uint32_t tokens, int ranks)
{
    size_t count = (size_t)tokens * (size_t)ranks + 1;
    part->dst_rank = malloc(count * sizeof *part->dst_rank);
    part->dst_row = malloc(count * sizeof *part->dst_row);
    return !part->dst_rank || !part->dst_row;
}

/* Add a token's places in this domain; returns how many. */
static int part_add(const net_floor_t *self, net_part_t *part, int source, uint32_t token)
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
    for (int slot = count; slot < ranks; slot++) /* all of them: GPUs look at each */
        part->dst_rank[to + (uint64_t)slot] = -1;
    return count;
}

static void add_final(const net_floor_t *self, net_part_t *part, uint32_t token, uint32_t *next)
{
    int me = self->plan.rank, ranks = self->plan.ranks, count = part_add(self, part, me, token);
    size_t to = (size_t)part->tokens * (size_t)ranks;
    for (int r = 0; r < ranks; r++)
        if (rail(self, r) && wanted(self, me, token, self->domain_of[r])) {
            part->dst_rank[to + (size_t)count] = r; /* its area is where its partial sums arrive */
            part->dst_row[to + (size_t)count++] = (int32_t)next[r]++;
        }
    part->tokens++;
}

/* Of the rows that came, on the CPU: where copies have them, and which of them several ranks here have a part of. */
static void add_arrived(net_floor_t *self)
{
    for (int r = 0; r < self->plan.ranks; r++)
        for (uint32_t token = 0; self->back_rows[r] && token < self->work->tokens[r]; token++) {
            if (!wanted(self, r, token, self->domain))
                continue;
            part_add(self, &self->copies, r, token);
            self->copies.tokens++;
            self->partial.tokens += part_add(self, &self->partial, r, token) > 1;
        }
}

int net_make_lists(net_floor_t *self)
{
    int me = self->plan.rank, ranks = self->plan.ranks;
    uint32_t own = self->plan.tokens, *next = calloc((size_t)ranks, sizeof *next);
    if (!next || part_init(&self->copies, own + self->back_total, ranks) ||
        part_init(&self->partial, self->back_total, ranks) || part_init(&self->final, own, ranks)) {
        free(next);
        return 1;
    }
    for (uint32_t token = 0; token < own; token++) {
        part_add(self, &self->copies, me, token);
        self->copies.tokens++;
        add_final(self, &self->final, token, next);
    }
    if (!self->mem->carry)
        add_arrived(self);
    free(next);
    return 0;
}

void net_free_lists(net_floor_t *self)
{
    net_part_t *const parts[] = {&self->copies, &self->partial, &self->final};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        free(parts[i]->dst_rank);
        free(parts[i]->dst_row);
    }
    free(self->out_rows);
    free(self->back_rows);
}
