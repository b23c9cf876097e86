/* epx bench: options, shared memory, ranks, report. */
#include "bench.h"
#include "commands.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const bench_op_names[BENCH_OPS] = {"dispatch", "dispatch_cached", "combine", "layout"};

static int check_options(const bench_options_t *options)
{
    static const char *const dtypes[] = {"bf16", "fp16", "fp32", "fp8"};
    static const int bytes[] = {2, 2, 4, 1};
    int elem = bytes[options->dtype];
    if (options->hidden * elem % 16)
        return options_refuse("bench", "--hidden %ld: rows must be a multiple of 16 bytes: with %s a multiple of %d",
                              options->hidden, dtypes[options->dtype], 16 / elem);
    if (options->topk > options->experts)
        return options_refuse("bench", "--topk %ld: at most --experts %ld are there to choose", options->topk,
                              options->experts);
    if (options->domains && options->ranks % options->domains)
        return options_refuse("bench", "--domains %ld: domains have equal sizes, so they must divide --ranks %ld",
                              options->domains, options->ranks);
    for (int i = 0; i < options->ops.count; i++)
        if (options->ops.item[i] == BENCH_COMBINE && options->dtype == PATTERN_BYTES)
            return options_refuse("bench", "--op combine --dtype fp8: combine adds bf16, fp16 or fp32");
    return 0;
}

static void default_ops(bench_options_t *options)
{
    static const int ops[] = {BENCH_DISPATCH, BENCH_DISPATCH_CACHED, BENCH_COMBINE};
    if (options->ops.count)
        return;
    options->ops.count = options->dtype == PATTERN_BYTES ? 2 : 3; /* combine does not add fp8 */
    for (int i = 0; i < options->ops.count; i++)
        options->ops.item[i] = ops[i];
}

static int share_memory(bench_t *bench)
{
    static const size_t bytes[] = {2, 2, 4, 1};
    const bench_options_t *options = &bench->options;
    const bench_work_t *work = &bench->work;
    bench->row_bytes = (size_t)options->hidden * bytes[options->dtype];
    bench->side_bytes = options->dtype == PATTERN_BYTES ? (size_t)(options->hidden + 127) / 128 * 4 : 0;
    /* Rounded down: the floor may move less than the library, never more. */
    bench->floor_row_bytes = (bench->row_bytes + bench->side_bytes) / 16 * 16;
    bench->floor_area = calloc((size_t)work->ranks, sizeof *bench->floor_area);
    size_t *at = calloc((size_t)work->ranks, sizeof *at),
           times = 2 * BENCH_OPS * (size_t)options->iters * (size_t)options->ranks;
    bench->result = ranks_share(sizeof *bench->result + times * sizeof(double));
    for (int r = 0; r < work->ranks && at; r++) {
        at[r] = bench->floor_shared_bytes;
        bench->floor_shared_bytes += (work->recv_rows[r] * bench->floor_row_bytes + 4095) / 4096 * 4096;
    }
    if (bench->floor_shared_bytes && !options->no_floor)
        bench->floor_shared = ranks_share(bench->floor_shared_bytes);
    for (int r = 0; r < work->ranks && at && bench->floor_area && bench->floor_shared; r++)
        bench->floor_area[r] = bench->floor_shared + at[r];
    free(at);
    if (bench->floor_area && bench->result && (bench->floor_shared || !bench->floor_shared_bytes || options->no_floor))
        return 0;
    fprintf(stderr, "epx bench: no memory to share among the ranks (%zu bytes)\n", bench->floor_shared_bytes);
    return 1;
}

static int run(bench_t *bench)
{
    ranks_config_t config = {.command = "bench",
                             .ranks = (int)bench->options.ranks,
                             .as_threads = bench->options.as_threads,
                             .body = bench_rank_body,
                             .user = bench};
    int failed = bench_work_init(&bench->work, &bench->options);
    if (!failed)
        failed = share_memory(bench) || ranks_run(&config) || bench_report(bench);
    ranks_unshare(bench->floor_shared, bench->floor_shared_bytes);
    free(bench->floor_area);
    bench_work_fini(&bench->work);
    return failed;
}

int command_bench(int argc, char **argv)
{
    bench_t bench = {.options = {.ranks = 2,
                                 .tokens = 4096,
                                 .hidden = 7168,
                                 .topk = 8,
                                 .experts = 256,
                                 .routing = "uniform",
                                 .iters = 20,
                                 .warmup = 5,
                                 .seed = 1}};
    bench_options_t *o = &bench.options;
    const option_t table[] = {
        {"--op", OPTION_LIST, &o->ops, 0, 0, BENCH_OP_CHOICES, "LIST",
         "of dispatch, dispatch_cached, combine, layout; default the first three"},
        {"--backend", OPTION_CHOICE, &o->backend, 0, 0, "auto,cpu,cuda", "WHICH", "auto (default), cpu or cuda"},
        {"--ranks", OPTION_NUMBER, &o->ranks, 1, RANKS_MAX, NULL, "N", "ranks on this host; default 2"},
        {"--threads-as-ranks", OPTION_FLAG, &o->as_threads, 0, 0, NULL, NULL, "ranks are threads, not processes"},
        {"--tokens", OPTION_NUMBER, &o->tokens, 0, 1 << 22, NULL, "N", "tokens a rank; default 4096"},
        {"--hidden", OPTION_NUMBER, &o->hidden, 1, 1 << 20, NULL, "N", "elements a row; default 7168"},
        {"--topk", OPTION_NUMBER, &o->topk, 1, EPX_TOPK_MAX, NULL, "N", "experts a token chooses; default 8"},
        {"--experts", OPTION_NUMBER, &o->experts, 1, 1 << 16, NULL, "N", "of all ranks together; default 256"},
        {"--dtype", OPTION_CHOICE, &o->dtype, 0, 0, "bf16,fp16,fp32,fp8", "TYPE",
         "bf16 (default), fp16, fp32, or fp8 with a scale per 128"},
        {"--routing", OPTION_TEXT, &o->routing, 0, 0, NULL, "HOW", "uniform (default), zipf, or a routing file"},
        {"--own-memory", OPTION_FLAG, &o->own_memory, 0, 0, NULL, NULL, "rows in the caller's memory, not in leases"},
        {"--iters", OPTION_NUMBER, &o->iters, 1, 100000, NULL, "N", "timed iterations; default 20"},
        {"--warmup", OPTION_NUMBER, &o->warmup, 0, 100000, NULL, "N", "iterations before; default 5"},
        {"--sms", OPTION_NUMBER, &o->sms, 0, 1024, NULL, "N", "GPU: SMs a call; default 0, the library's choice"},
        {"--threads", OPTION_NUMBER, &o->threads, 0, 1024, NULL, "N", "CPU threads a rank; default 0, the library's"},
        {"--domains", OPTION_NUMBER, &o->domains, 1, RANKS_MAX, NULL, "D", "split the ranks into D domains"},
        {"--net", OPTION_TEXT, &o->net, 0, 0, NULL, "NET", "network between domains, e.g. ofi:tcp, loop"},
        {"--seed", OPTION_NUMBER, &o->seed, 0, 1L << 40, NULL, "N", "of routing and rows; default 1"},
        {"--timeout", OPTION_NUMBER, &o->timeout_s, 1, 86400, NULL, "S", "deadline of every wait, seconds"},
        {"--no-floor", OPTION_FLAG, &o->no_floor, 0, 0, NULL, NULL, "do not measure the floor"},
        {"--json", OPTION_TEXT, &o->json, 0, 0, NULL, "FILE", "write the results there too, as one JSON array"},
    };
    const option_set_t set = {
        "bench", "Verifies every row of each operation, then times it; docs/PERFORMANCE.md says how.",
        table,   sizeof table / sizeof *table,
        NULL,    NULL};
    options_result_t parsed = options_parse(&set, argc, argv, NULL);
    if (parsed)
        return parsed == OPTIONS_WRONG ? 2 : 0;
    default_ops(o);
    int refused = check_options(o);
    return refused ? refused : run(&bench);
}
