/* epx check: a pattern through every channel slot between all ranks; per pair what works. */
#include "commands.h"
#include "options.h"
#include "ranks.h"

#include <stdio.h>
#include <string.h>

typedef struct check {
    epx_group_config_t config;
    uint8_t *works; /* shared, [ranks][ranks]: [i][j] what i says of j */
} check_t;

static int body(rank_t *rank)
{
    check_t *check = rank->user;
    if (rank_join(rank, &check->config))
        return 1;
    epx_buffer_config_t config = {.size = sizeof config, .lease_bytes = 1 << 20, .reserve_bytes = 1 << 20};
    epx_buffer_t *buffer = NULL;
    epx_status_t status = epx_buffer_create(rank->group, &config, &buffer);
    if (status)
        return rank_fail_epx(rank, "epx_buffer_create", status);
    status = epx_buffer_check(buffer, check->works + (size_t)rank->rank * (size_t)rank->ranks);
    int failed = status ? rank_fail_epx(rank, "epx_buffer_check", status) : rank_barrier(rank);
    epx_buffer_destroy(buffer);
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
    const option_set_t set = {"check", "Sends a pattern through every channel slot between all ranks.",
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
