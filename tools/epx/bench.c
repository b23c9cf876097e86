/* epx bench: options, shared memory, ranks, report. */
#include "bench_ll.h"
#include "commands.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

const char *const bench_op_names[BENCH_OPS] = {"dispatch",    "dispatch_cached", "combine", "layout",
                                               "ll_dispatch", "ll_combine",      "ll_pair"};

static int low_latency_ops(const bench_options_t *options)
{
    int count = 0;
    for (int i = 0; i < options->ops.count; i++)
        count += options->ops.item[i] >= BENCH_LL_DISPATCH;
    return count;
}

/* In a child: CUDA that was started before the ranks are forked would not work in them. */
static bool gpu_usable(void)
{
    fflush(stdout);
    fflush(stderr);
    int status = 1;
    pid_t child = fork();
    if (child == 0)
        _exit(epx_backend_usable(EPX_BACKEND_CUDA, NULL) == EPX_OK ? 0 : 1);
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* What only low latency has, and what it has not. */
static int check_low_latency(const bench_options_t *options)
{
    int count = low_latency_ops(options);
    const char *only = options->graph         ? "--graph"
                       : options->halves      ? "--halves"
                       : options->pre_reduced ? "--pre-reduced"
                                              : NULL;
    if (count == 0)
        return only ? options_refuse("bench",
                                     "%s: only ll_dispatch, ll_combine and ll_pair have it; name them with --op", only)
                    : 0;
    if (count < options->ops.count)
        return options_refuse("bench", "--op: ll_dispatch, ll_combine and ll_pair go in a run of their own: they have "
                                       "another buffer than the others");
    if (options->dtype != PATTERN_BF16 && options->dtype != PATTERN_BYTES)
        return options_refuse("bench",
                              "--dtype: low latency takes bf16, or fp8 (bf16 rows, quantised as they are sent)");
    if (options->dtype == PATTERN_BYTES && options->hidden % 128)
        return options_refuse("bench",
                              "--hidden %ld: low latency in fp8 has a scale per 128: a multiple of 128 is needed",
                              options->hidden);
    if (options->own_memory)
        return options_refuse("bench", "--own-memory: low latency knows no leases, it always is the caller's memory");
    if (options->graph && options->backend == EPX_BACKEND_CPU)
        return options_refuse("bench", "--graph: a CPU has no CUDA graphs; leave it out, or take --backend cuda");
    if (options->graph && options->backend == EPX_BACKEND_AUTO && !gpu_usable())
        return options_refuse("bench",
                              "--graph: no GPU is usable here (`epx info` says why), and a CPU has no CUDA graphs");
    return 0;
}

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
    int refused = check_low_latency(options);
    FILE *json = options->json && !refused ? fopen(options->json, "a") : NULL; /* now, not after the last iteration */
    if (options->json && !refused && !json)
        return options_refuse("bench", "--json %s cannot be written: %s", options->json, strerror(errno));
    if (json)
        fclose(json);
    return refused;
}

/* What was not given. */
static void set_defaults(bench_options_t *options)
{
    static const int ops[] = {BENCH_DISPATCH, BENCH_DISPATCH_CACHED, BENCH_COMBINE};
    if (options->tokens < 0)
        options->tokens = low_latency_ops(options) ? 128 : 4096;
    if (options->ops.count)
        return;
    options->ops.count = options->dtype == PATTERN_BYTES ? 2 : 3; /* combine does not add fp8 */
    for (int i = 0; i < options->ops.count; i++)
        options->ops.item[i] = ops[i];
}

static void measure_rows(bench_t *bench)
{
    static const size_t bytes[] = {2, 2, 4, 1};
    const bench_options_t *options = &bench->options;
    size_t hidden = (size_t)options->hidden, scales = options->dtype == PATTERN_BYTES ? (hidden + 127) / 128 * 4 : 0;
    bench->ll = low_latency_ops(options) > 0;
    bench->row_format = bench->ll ? PATTERN_BF16 : (pattern_format_t)options->dtype;
    bench->row_bytes = hidden * bytes[bench->row_format];
    bench->side_bytes = bench->ll ? 0 : scales; /* low latency makes them itself */
    bench->sent_bytes = hidden * bytes[options->dtype] + scales;
    bench->back_bytes = bench->row_bytes;
    /* Rounded down: the floor may move less than the library, never more. */
    bench->floor_row_bytes = bench->sent_bytes / 16 * 16;
}

static int share_memory(bench_t *bench)
{
    const bench_options_t *options = &bench->options;
    const bench_work_t *work = &bench->work;
    bench->floor_area = calloc((size_t)work->ranks, sizeof *bench->floor_area);
    size_t *at = calloc((size_t)work->ranks, sizeof *at),
           times = 2 * BENCH_OPS * (size_t)options->iters * (size_t)options->ranks;
    bench->result = ranks_share(sizeof *bench->result + times * sizeof(double));
    for (int r = 0; r < work->ranks && at; r++) {
        at[r] = bench->floor_shared_bytes;
        bench->floor_shared_bytes += bench->ll ? bench_ll_floor_bytes(bench, r) : bench_floor_rows_bytes(bench, r);
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
    measure_rows(bench);
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
                                 .tokens = -1,
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
         "of dispatch, dispatch_cached, combine, layout (default the first three); or of ll_dispatch, ll_combine, "
         "ll_pair"},
        {"--backend", OPTION_CHOICE, &o->backend, 0, 0, "auto,cpu,cuda", "WHICH", "auto (default), cpu or cuda"},
        {"--ranks", OPTION_NUMBER, &o->ranks, 1, RANKS_MAX, NULL, "N", "ranks on this host; default 2"},
        {"--threads-as-ranks", OPTION_FLAG, &o->as_threads, 0, 0, NULL, NULL, "ranks are threads, not processes"},
        {"--tokens", OPTION_NUMBER, &o->tokens, 0, 1 << 22, NULL, "N", "tokens a rank; default 4096, low latency 128"},
        {"--hidden", OPTION_NUMBER, &o->hidden, 1, 1 << 20, NULL, "N", "elements a row; default 7168"},
        {"--topk", OPTION_NUMBER, &o->topk, 1, EPX_TOPK_MAX, NULL, "N", "experts a token chooses; default 8"},
        {"--experts", OPTION_NUMBER, &o->experts, 1, 1 << 16, NULL, "N", "of all ranks together; default 256"},
        {"--dtype", OPTION_CHOICE, &o->dtype, 0, 0, "bf16,fp16,fp32,fp8", "TYPE",
         "bf16 (default), fp16, fp32, or fp8 with a scale per 128 (ll: bf16 rows, sent as fp8)"},
        {"--routing", OPTION_TEXT, &o->routing, 0, 0, NULL, "HOW", "uniform (default), zipf, or a routing file"},
        {"--own-memory", OPTION_FLAG, &o->own_memory, 0, 0, NULL, NULL, "rows in the caller's memory, not in leases"},
        {"--halves", OPTION_FLAG, &o->halves, 0, 0, NULL, NULL, "ll: each call as its send and its receive half"},
        {"--pre-reduced", OPTION_FLAG, &o->pre_reduced, 0, 0, NULL, NULL,
         "ll: weights go with dispatch, each rank adds its own experts' outputs before combine sends"},
        {"--graph", OPTION_FLAG, &o->graph, 0, 0, NULL, NULL, "ll on GPUs: the calls captured, replays of them timed"},
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
    set_defaults(o);
    int refused = check_options(o);
    return refused ? refused : run(&bench);
}
