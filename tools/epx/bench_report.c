/* The table for people and the JSON for programs. Columns are defined in docs/PERFORMANCE.md. */
#include "bench.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct line {
    double median_us, p99_us, logical_gbps, wire_gbps, floor_us, efficiency; /* NAN where there is none */
} line_t;

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Each iteration counts as its slowest rank's time; sorted into `slowest`. */
static void slowest_ranks(const bench_t *bench, int series, double *slowest)
{
    for (int i = 0; i < bench->options.iters; i++) {
        const double *times = bench_times(bench, series, i);
        slowest[i] = 0;
        for (int r = 0; r < bench->options.ranks; r++)
            slowest[i] = times[r] > slowest[i] ? times[r] : slowest[i];
    }
    qsort(slowest, (size_t)bench->options.iters, sizeof *slowest, by_value);
}

static double median(const double *sorted, long count)
{
    return count % 2 ? sorted[count / 2] : (sorted[count / 2 - 1] + sorted[count / 2]) / 2;
}

/* Nearest rank: the least value that 99 % do not exceed. */
static double p99(const double *sorted, long count)
{
    return sorted[(count * 99 + 99) / 100 - 1];
}

/* Rows that the operation moves, of all ranks; wire: without a rank's rows to itself. */
static double op_rows(const bench_t *bench, bench_op_t op, bool wire)
{
    const bench_work_t *work = &bench->work;
    double sent = (double)(wire ? work->wire_rows : work->logical_rows);
    double back =
        bench->ll && !bench->options.pre_reduced ? (double)(wire ? work->wire_choices : work->logical_choices) : sent;
    bool combines = op == BENCH_COMBINE || op == BENCH_LL_COMBINE;
    return op == BENCH_LL_PAIR ? sent + back : combines ? back : sent;
}

static double op_bytes(const bench_t *bench, bench_op_t op, bool wire)
{
    if (op == BENCH_LL_PAIR)
        return op_bytes(bench, BENCH_LL_DISPATCH, wire) + op_bytes(bench, BENCH_LL_COMBINE, wire);
    bool combines = op == BENCH_COMBINE || op == BENCH_LL_COMBINE;
    return op_rows(bench, op, wire) * (double)(combines ? bench->back_bytes : bench->sent_bytes);
}

static line_t line_of(const bench_t *bench, bench_op_t op, double *scratch)
{
    const bench_options_t *options = &bench->options;
    line_t line = {NAN, NAN, NAN, NAN, NAN, NAN};
    slowest_ranks(bench, (int)op, scratch);
    line.median_us = median(scratch, options->iters);
    line.p99_us = p99(scratch, options->iters);
    if (op == BENCH_LAYOUT)
        return line;
    double rank_us = (double)options->ranks * line.median_us;
    line.logical_gbps = op_bytes(bench, op, false) / rank_us * 1e-3;
    line.wire_gbps = op_bytes(bench, op, true) / rank_us * 1e-3;
    if (bench->result->has_floor[op]) {
        slowest_ranks(bench, BENCH_OPS + (int)op, scratch);
        line.floor_us = median(scratch, options->iters);
        line.efficiency = line.floor_us / line.median_us;
    }
    return line;
}

static void print_calls(const bench_options_t *options, bool cpu)
{
    printf("# calls    low latency%s%s", options->halves ? ", in halves" : "",
           options->pre_reduced ? ", pre-reduced" : "");
    if (options->graph)
        printf(", replays of a graph of %d (ll_combine: of 1)", BENCH_GRAPH_CALLS);
    puts(cpu ? ", by the calling thread alone" : "");
}

static void print_head(const bench_t *bench)
{
    const bench_options_t *options = &bench->options;
    const bench_result_t *result = bench->result;
    uint32_t version = epx_version();
    static const char *const dtypes[] = {"bf16", "fp16", "fp32", "fp8 + scales"};
    printf("# epx bench %u.%u.%u\n", version >> 16, version >> 8 & 255, version & 255);
    printf("# backend  %s: %s\n", result->place.backend, result->place.backend_why);
    printf("# ranks    %ld %s, %d domain%s: %s\n", options->ranks, options->as_threads ? "threads" : "processes",
           result->place.domains, result->place.domains == 1 ? "" : "s", result->place.domain_why);
    printf("# threads  %d a rank: %s\n", result->place.threads, result->place.threads_why);
    printf("# net      %s: %s\n", result->place.net, result->place.net_why);
    printf("# work     %ld tokens a rank, hidden %ld %s, top-%ld of %ld experts, routing %s, seed %ld, %s\n",
           options->tokens, options->hidden,
           bench->ll && options->dtype == PATTERN_BYTES ? "bf16 sent as fp8 + scales" : dtypes[options->dtype],
           options->topk, options->experts, options->routing, options->seed,
           options->own_memory || bench->ll ? "the caller's memory" : "leases");
    if (bench->ll)
        print_calls(options, strcmp(result->place.backend, "cpu") == 0);
    printf("# timing   median and p99 of %ld iterations after %ld, each by its slowest rank\n", options->iters,
           options->warmup);
    for (int op = 0; op < BENCH_OPS; op++)
        if (result->has_floor[op])
            printf("# floor    of %s: the same rows %s%s, %s\n", bench_op_names[op],
                   bench->ll             ? "moved"
                   : op == BENCH_COMBINE ? "added"
                                         : "copied",
                   result->place.domains > 1 ? " and a raw stream of them" : "", result->floor_name[op]);
    printf("#\n# %-15s %10s %10s %10s %10s %9s %9s %10s %6s %7s\n", "op", "rows/rank", "MB/rank", "time us", "p99 us",
           "logical", "wire", "floor us", "eff", "wrong");
    printf("# %-15s %10s %10s %10s %10s %9s %9s\n", "", "", "logical", "", "", "GB/s", "GB/s");
}

static const char *cell(double value, const char *format, char *text, size_t bytes)
{
    if (isnan(value))
        return "-";
    snprintf(text, bytes, format, value);
    return text;
}

static void print_line(const bench_t *bench, bench_op_t op, const line_t *line)
{
    char text[7][32];
    double ranks = (double)bench->options.ranks, rows = op_rows(bench, op, false) / ranks;
    double bytes = op_bytes(bench, op, false) / ranks * 1e-6;
    printf("  %-15s %10.0f %10s %10.1f %10.1f %9s %9s %10s %6s %7llu\n", bench_op_names[op], rows,
           cell(op == BENCH_LAYOUT ? NAN : bytes, "%.2f", text[0], sizeof text[0]), line->median_us, line->p99_us,
           cell(line->logical_gbps, "%.2f", text[1], sizeof text[1]),
           cell(line->wire_gbps, "%.2f", text[2], sizeof text[2]),
           cell(line->floor_us, "%.1f", text[3], sizeof text[3]),
           cell(line->efficiency, "%.2f", text[4], sizeof text[4]), (unsigned long long)bench->result->wrong[op]);
}

static const char *json_number(double value, char *text, size_t bytes)
{
    return isnan(value) ? "null" : cell(value, "%.3f", text, bytes);
}

static void write_json(FILE *out, const bench_t *bench, bench_op_t op, const line_t *line)
{
    const bench_options_t *options = &bench->options;
    char text[6][32];
    static const char *const dtypes[] = {"bf16", "fp16", "fp32", "fp8"};
    fprintf(out,
            "{\"op\": \"%s\", \"backend\": \"%s\", \"ranks\": %ld, \"domains\": %d, \"net\": \"%s\", \"tokens\": %ld, "
            "\"hidden\": %ld, \"topk\": %ld, \"experts\": %ld, \"dtype\": \"%s\", \"sms\": %ld, ",
            bench_op_names[op], bench->result->place.backend, options->ranks, bench->result->place.domains,
            bench->result->place.net, options->tokens, options->hidden, options->topk, options->experts,
            dtypes[options->dtype], options->sms);
    fprintf(out,
            "\"time_us_median\": %s, \"time_us_p99\": %s, \"logical_gbps\": %s, \"wire_gbps\": %s, \"floor_us\": %s, "
            "\"efficiency\": %s, \"wrong\": %llu}",
            json_number(line->median_us, text[0], 32), json_number(line->p99_us, text[1], 32),
            json_number(line->logical_gbps, text[2], 32), json_number(line->wire_gbps, text[3], 32),
            json_number(line->floor_us, text[4], 32), json_number(line->efficiency, text[5], 32),
            (unsigned long long)bench->result->wrong[op]);
}

int bench_report(const bench_t *bench)
{
    double *scratch = malloc((size_t)bench->options.iters * sizeof *scratch);
    FILE *json = bench->options.json ? fopen(bench->options.json, "w") : NULL;
    int failed = !scratch;
    if (bench->options.json && !json) {
        fprintf(stderr, "epx bench: --json %s cannot be written: %s\n", bench->options.json, strerror(errno));
        failed = 1;
    }
    if (scratch)
        print_head(bench);
    for (int i = 0; i < bench->options.ops.count && scratch; i++) {
        bench_op_t op = (bench_op_t)bench->options.ops.item[i];
        line_t line = line_of(bench, op, scratch);
        print_line(bench, op, &line);
        failed |= bench->result->wrong[op] != 0;
        if (json) {
            fputs(i ? ",\n " : "[", json);
            write_json(json, bench, op, &line);
        }
    }
    if (json) {
        fputs("]\n", json);
        if (fclose(json) != 0) {
            fprintf(stderr, "epx bench: --json %s is not whole: %s\n", bench->options.json, strerror(errno));
            failed = 1;
        }
    }
    free(scratch);
    return failed;
}
