/* What the demo prints: what ran where and why, who got how much, how long each step took. */
#include "demo.h"

#include <stdio.h>

enum { BAR = 40 };

static void show_bar(const char *what, long index, double count, double most)
{
    int length = most > 0 ? (int)(count / most * BAR + 0.5) : 0;
    printf("  %s %-4ld %8.0f  %.*s\n", what, index, count, length, "########################################");
}

static void show_shares(const demo_t *demo)
{
    const demo_result_t *result = demo->result;
    double most = 0;
    for (long r = 0; r < demo->options.ranks; r++)
        most = result->rows[r] > most ? result->rows[r] : most;
    printf("\ntokens that each rank received (each token once, however many of the rank's experts want it)\n");
    for (long r = 0; r < demo->options.ranks && r < 64; r++)
        show_bar("rank  ", r, result->rows[r], most);
    most = 0;
    for (uint32_t e = 0; e < demo->layer.experts; e++)
        most = result->expert_tokens[e] > most ? result->expert_tokens[e] : most;
    printf("\ntokens per expert\n");
    for (uint32_t e = 0; e < demo->layer.experts && e < 64; e++)
        show_bar("expert", e, result->expert_tokens[e], most);
    if (demo->layer.experts > 64)
        printf("  ... and %u more\n", demo->layer.experts - 64);
}

static double slowest_us(const demo_t *demo, int step)
{
    double most = 0;
    for (long r = 0; r < demo->options.ranks; r++)
        most = demo->result->step_us[step][r] > most ? demo->result->step_us[step][r] : most;
    return most;
}

static void show_steps(const demo_t *demo)
{
    static const struct {
        const char *name;
        bool moves;
    } steps[DEMO_STEPS] = {{"embedding and gate", false},
                           {"dispatch", true},
                           {"experts", false},
                           {"combine", true},
                           {"dispatch of gradients", true},
                           {"experts, backward", false},
                           {"combine of gradients", true}};
    double rows = 0, row_bytes = (double)demo->layer.hidden * 2;
    for (long r = 0; r < demo->options.ranks; r++)
        rows += demo->result->rows[r];
    printf("\n%-24s %10s %10s %10s %12s\n", "step (slowest rank)", "ms", "MB", "GB/s", "GB/s, others");
    for (int s = 0; s < DEMO_STEPS; s++) {
        double us = slowest_us(demo, s);
        printf("  %-22s %10.2f", steps[s].name, us * 1e-3);
        if (steps[s].moves)
            printf(" %10.1f %10.2f %12.2f", rows * row_bytes * 1e-6, rows * row_bytes / us * 1e-3,
                   (double)demo->result->wire_rows * row_bytes / us * 1e-3);
        putchar('\n');
    }
    printf("  (bytes of all ranks together; \"others\" leaves out a rank's rows to itself)\n");
}

void demo_show(const demo_t *demo)
{
    const demo_options_t *options = &demo->options;
    const demo_result_t *result = demo->result;
    printf("a Mixture-of-Experts layer over %s: %zu tokens (bytes)\n", options->text, demo->tokens);
    printf("  model    hidden %u, %u experts of two layers (inner width %d), each token to its best %u\n",
           demo->layer.hidden, demo->layer.experts, LAYER_INNER, demo->layer.topk);
    printf("  backend  %s: %s\n", result->place.backend, result->place.backend_why);
    printf("  ranks    %ld %s in %d domain%s of %d: %s\n", options->ranks,
           options->as_threads ? "threads" : "processes", result->place.domains, result->place.domains == 1 ? "" : "s",
           result->place.ranks_per_domain, result->place.domain_why);
    printf("  threads  %d a rank: %s\n", result->place.threads, result->place.threads_why);
    printf("  net      %s: %s\n", result->place.net, result->place.net_why);
    show_shares(demo);
    show_steps(demo);
}
