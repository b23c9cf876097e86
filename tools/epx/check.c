/*
 * epx check: a pattern between all ranks; per pair what works. Inside a domain through every channel slot
 * (epx_buffer_check); then, and between domains this alone, a row from every rank to every rank and back.
 */
#include "commands.h"
#include "mem.h"
#include "options.h"
#include "ranks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HIDDEN = 64, ROW_BYTES = HIDDEN * 4 }; /* fp32, so that one row's sum is the row */

typedef struct check {
    epx_group_config_t config;
    uint8_t *works; /* shared, [ranks][ranks]: [i][j] what i says of j */
} check_t;

/* What one rank of the run holds. */
typedef struct crossing {
    rank_t *rank;
    const mem_ops_t *mem;
    void *context;
    epx_buffer_t *buffer;
    uint8_t *works;      /* [ranks] */
    unsigned char *host; /* [ranks] rows */
    void *x, *out, *ids; /* device: [ranks] rows, as many, [ranks] numbers */
} crossing_t;

static uint64_t key(int from, int to)
{
    return pattern_key(1, 0, (uint32_t)from, (uint32_t)to, 0);
}

static int fail_memory(const crossing_t *self, const char *what)
{
    return rank_fail(self->rank, "%s: %s", what, self->mem->words());
}

/* Rows [ranks] of the device, the j-th of which should be the one from `from` to `to` (-1: j). */
static int look(crossing_t *self, const void *rows, int from, int to)
{
    int ranks = self->rank->ranks;
    if (self->mem->sync(self->context) ||
        self->mem->copy_out(self->context, self->host, rows, (size_t)ranks * ROW_BYTES))
        return fail_memory(self, "reading rows");
    for (int j = 0; j < ranks; j++) {
        unsigned char right[ROW_BYTES];
        pattern_fill(right, sizeof right, key(from < 0 ? j : from, to < 0 ? j : to), PATTERN_FP32);
        if (memcmp(self->host + (size_t)j * ROW_BYTES, right, sizeof right) != 0)
            self->works[j] = 0;
    }
    return 0;
}

/* Token t is for rank t: expert t is there. What came goes back as it is. */
static int there_and_back(crossing_t *self)
{
    rank_t *rank = self->rank;
    uint32_t ranks = (uint32_t)rank->ranks;
    epx_stream_t stream = self->mem->stream(self->context);
    epx_dispatch_t dispatch = {.size = sizeof dispatch, .rows = {.x = self->x, .row_bytes = ROW_BYTES}};
    dispatch.tokens = dispatch.experts = ranks;
    dispatch.topk = 1;
    dispatch.topk_idx = self->ids;
    epx_handle_t *handle = NULL;
    epx_received_t got = {.size = sizeof got};
    epx_status_t status = epx_dispatch(self->buffer, &dispatch, NULL, stream, &handle, &got);
    if (status)
        return rank_fail_epx(rank, "epx_dispatch", status);
    if (got.rows != ranks)
        return rank_fail(rank, "%u rows came, not one of each of %u ranks", got.rows, ranks);
    if (look(self, got.x, -1, rank->rank))
        return 1;
    epx_combine_t combine = {.size = sizeof combine, .x = got.x, .dtype = EPX_FP32, .hidden = HIDDEN, .out = self->out};
    status = epx_combine(handle, &combine, stream);
    if (status)
        return rank_fail_epx(rank, "epx_combine", status);
    return look(self, self->out, rank->rank, -1);
}

static int cross(crossing_t *self)
{
    size_t ranks = (size_t)self->rank->ranks, bytes = ranks * ROW_BYTES;
    int64_t *ids = (int64_t *)(void *)self->host; /* first these, then rows */
    self->x = self->mem->alloc(self->context, bytes);
    self->out = self->mem->alloc(self->context, bytes);
    self->ids = self->mem->alloc(self->context, ranks * sizeof *ids);
    if (!self->x || !self->out || !self->ids)
        return fail_memory(self, "rows");
    for (size_t t = 0; t < ranks; t++)
        ids[t] = (int64_t)t;
    if (self->mem->copy_in(self->context, self->ids, ids, ranks * sizeof *ids))
        return fail_memory(self, "writing ids");
    for (size_t t = 0; t < ranks; t++)
        pattern_fill(self->host + t * ROW_BYTES, ROW_BYTES, key(self->rank->rank, (int)t), PATTERN_FP32);
    if (self->mem->copy_in(self->context, self->x, self->host, bytes))
        return fail_memory(self, "writing rows");
    return there_and_back(self);
}

/* In a domain epx_buffer_check has said what works, and a row that is wrong takes it back; ranks of other domains are
 * not its business, and count by their rows alone. */
static int run(crossing_t *self, const epx_group_info_t *info)
{
    rank_t *rank = self->rank;
    epx_buffer_config_t config = {.size = sizeof config, .lease_bytes = 1 << 20, .reserve_bytes = 1 << 20};
    epx_status_t status = epx_buffer_create(rank->group, &config, &self->buffer);
    if (status)
        return rank_fail_epx(rank, "epx_buffer_create", status);
    status = epx_buffer_check(self->buffer, self->works);
    if (status)
        return rank_fail_epx(rank, "epx_buffer_check", status);
    for (int j = 0; j < rank->ranks; j++)
        self->works[j] |= info->domain_of[j] != info->domain;
    return cross(self) || rank_barrier(rank);
}

static int body(rank_t *rank)
{
    check_t *check = rank->user;
    if (rank_join(rank, &check->config))
        return 1;
    epx_group_info_t info = {.size = sizeof info};
    epx_status_t status = epx_group_get_info(rank->group, &info);
    if (status)
        return rank_fail_epx(rank, "epx_group_get_info", status);
    const char *why = "";
    crossing_t self = {.rank = rank, .works = check->works + (size_t)rank->rank * (size_t)rank->ranks};
    self.mem = mem_ops_for(info.backend, &why);
    if (!self.mem)
        return rank_fail(rank, "%s", why);
    if (self.mem->open(info.device, &self.context))
        return fail_memory(&self, "the device's memory");
    self.host = malloc((size_t)rank->ranks * ROW_BYTES);
    int failed = self.host ? run(&self, &info) : rank_fail(rank, "no memory for %d rows", rank->ranks);
    epx_buffer_destroy(self.buffer);
    self.mem->free(self.context, self.x);
    self.mem->free(self.context, self.out);
    self.mem->free(self.context, self.ids);
    self.mem->close(self.context);
    free(self.host);
    return failed;
}

/* A row a rank, a column a peer; returns the number of pairs that do not work. */
static long show(const uint8_t *works, long ranks)
{
    long bad = 0, shown = ranks < 64 ? ranks : 64;
    printf("\n  rank \\ peer");
    for (long j = 0; j < shown; j++)
        printf(" %3ld", j);
    for (long i = 0; i < ranks; i++) {
        if (i < shown)
            printf("\n  %11ld", i);
        for (long j = 0; j < ranks; j++) {
            bool both = works[i * ranks + j] != 0;
            bad += !both;
            if (i < shown && j < shown)
                printf(" %3s", both ? "ok" : "BAD");
        }
    }
    printf("\n\n");
    return bad;
}

int command_check(int argc, char **argv)
{
    long ranks = 4, domains = 0;
    int backend = 0;
    bool as_threads = false;
    const char *net = NULL;
    const option_t table[] = {
        {"--ranks", OPTION_NUMBER, &ranks, 1, RANKS_MAX, NULL, "N", "ranks on this host; default 4"},
        {"--threads-as-ranks", OPTION_FLAG, &as_threads, 0, 0, NULL, NULL, "ranks are threads, not processes"},
        {"--backend", OPTION_CHOICE, &backend, 0, 0, "auto,cpu,cuda", "WHICH", "auto (default), cpu or cuda"},
        {"--domains", OPTION_NUMBER, &domains, 1, RANKS_MAX, NULL, "D", "split the ranks into D domains"},
        {"--net", OPTION_TEXT, &net, 0, 0, NULL, "NET", "network between domains"},
    };
    const option_set_t set = {"check", "Sends a pattern between all ranks; in a domain through every channel slot.",
                              table,   sizeof table / sizeof *table,
                              NULL,    NULL};
    options_result_t parsed = options_parse(&set, argc, argv, NULL);
    if (parsed)
        return parsed == OPTIONS_WRONG ? 2 : 0;
    if (domains && ranks % domains)
        return options_refuse("check", "--domains %ld: domains have equal sizes, so they must divide --ranks %ld",
                              domains, ranks);
    check_t check = {.config = {.backend = (epx_backend_t)backend, .net = net}};
    if (domains)
        check.config.ranks_per_domain = (int)(ranks / domains);
    size_t bytes = (size_t)ranks * (size_t)ranks;
    check.works = ranks_share(bytes);
    if (!check.works) {
        fprintf(stderr, "epx check: no memory for %ld ranks\n", ranks);
        return 1;
    }
    ranks_config_t run = {"check", (int)ranks, as_threads, body, &check};
    int failed = ranks_run(&run);
    if (!failed) {
        long bad = show(check.works, ranks);
        printf("%ld of %ld pairs work\n", ranks * ranks - bad, ranks * ranks);
        failed = bad != 0;
    }
    ranks_unshare(check.works, bytes);
    return failed;
}
