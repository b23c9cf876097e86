/* epx info: what there is, what would be chosen, each with its reason; and the environment. */
#include "commands.h"
#include "options.h"
#include "ranks.h"

#include <epx/ll.h>

#include <stdio.h>
#include <string.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

static void show(const char *what, const char *value, const char *why)
{
    printf("  %-12s %s%s%s\n", what, value, why && why[0] ? ": " : "", why ? why : "");
}

static void show_machine(void)
{
    char text[128];
    struct utsname name;
    printf("machine\n");
    snprintf(text, sizeof text, "%ld online", sysconf(_SC_NPROCESSORS_ONLN));
    show("cores", text, NULL);
    snprintf(text, sizeof text, "%.1f GiB, %.1f GiB free",
             (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) / 1073741824.0,
             (double)sysconf(_SC_AVPHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) / 1073741824.0);
    show("memory", text, NULL);
    if (uname(&name) == 0) {
        snprintf(text, sizeof text, "%.40s %.60s, %.20s", name.sysname, name.release, name.machine);
        show("system", text, NULL);
    }
}

static void list_backends(void)
{
    static const struct {
        epx_backend_t backend;
        const char *name;
    } all[] = {{EPX_BACKEND_CPU, "cpu"}, {EPX_BACKEND_CUDA, "cuda"}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        const char *why = "";
        epx_status_t status = epx_backend_usable(all[i].backend, &why);
        show(all[i].name, status == EPX_OK ? "usable" : "not usable", why);
    }
    fflush(stdout);
}

/* In a child: CUDA that was started before the ranks are forked would not work in them. */
static void show_backends(void)
{
    printf("\nbackends\n");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        list_backends();
        _exit(0);
    }
    if (child < 0 || waitpid(child, NULL, 0) != child)
        list_backends();
}

/* A group of --ranks ranks is made for a moment, and asked. */
static int body(rank_t *rank)
{
    const epx_group_config_t *config = rank->user;
    if (rank_join(rank, config))
        return 1;
    epx_group_info_t info = {.size = sizeof info};
    epx_status_t status = epx_group_get_info(rank->group, &info);
    if (status)
        return rank_fail_epx(rank, "epx_group_get_info", status);
    if (rank->rank == 0) {
        char text[64];
        printf("\nchoices for %d rank%s of this host\n", rank->ranks, rank->ranks == 1 ? "" : "s");
        show("backend", info.backend == EPX_BACKEND_CUDA ? "cuda" : "cpu", info.backend_why);
        snprintf(text, sizeof text, "%d of %d rank%s", info.domains, info.ranks_per_domain,
                 info.ranks_per_domain == 1 ? "" : "s");
        show("domains", text, info.domain_why);
        snprintf(text, sizeof text, "%d a rank", info.threads);
        show("threads", text, info.threads_why);
        show("net", info.net ? info.net : "none", info.net_why);
        fflush(stdout);
    }
    return rank_barrier(rank);
}

static void show_environment(void)
{
    printf("\nenvironment\n  %-24s %-16s %-16s %s\n", "variable", "value", "default", "meaning");
    for (uint32_t i = 0;; i++) {
        epx_env_entry_t entry = {.size = sizeof entry};
        if (epx_env_get(i, &entry))
            break;
        printf("  %-24s %-16s %-16s %s\n", entry.name, entry.value ? entry.value : "(not set)",
               entry.default_text ? entry.default_text : "", entry.meaning ? entry.meaning : "");
    }
}

/* Bytes for what is on its way to the ranks of other domains: a block of ids and the rows of each, or all choices of
 * one token when that is more. */
static uint64_t out_bytes(const epx_ll_plan_t *plan, uint32_t domains)
{
    uint64_t pieces = (uint64_t)plan->slots * (plan->ranks - plan->ranks / domains);
    uint64_t row = ((uint64_t)plan->hidden * 2 + 255) / 256 * 256, ids = plan->ids_bytes / plan->slots / plan->ranks;
    uint64_t rows = plan->tokens_max * row + ids;
    return pieces * (rows > plan->topk * row ? rows : plan->topk * row);
}

/* Bytes that low latency of that shape takes on each rank, by part. */
static int show_plan(epx_ll_plan_t *plan, uint32_t domains)
{
    plan->size = sizeof *plan;
    if (epx_ll_plan(plan)) {
        fprintf(stderr, "epx info: %s\n", epx_error_detail());
        return 1;
    }
    const struct {
        const char *name;
        uint64_t bytes;
        const char *what;
    } parts[] = {{"dispatch", plan->dispatch_bytes, "a row for each token of each rank"},
                 {"combine", plan->combine_bytes, "a row for each choice of each own token"},
                 {"ids", plan->ids_bytes, "ids and weights of every rank's tokens"},
                 {"words", plan->words_bytes, "arrival and credit"},
                 {"window", plan->window_bytes, "together"},
                 {"out", out_bytes(plan, domains), "ordinary memory, on its way to other domains (--domains)"},
                 {"staging", domains > 1 ? plan->staging_bytes : 0, "pinned host memory, on GPUs with several domains"},
                 {"zero copy", plan->zero_copy_bytes, "ordinary memory, only with ll_zero_copy"}};
    printf("low latency on each of %u ranks: %u tokens a rank, hidden %u, top-%u of %u, %u slots\n", plan->ranks,
           plan->tokens_max, plan->hidden, plan->topk, plan->experts, plan->slots);
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        printf("  %-12s %14llu bytes %9.1f MB  %s\n", parts[i].name, (unsigned long long)parts[i].bytes,
               (double)parts[i].bytes * 1e-6, parts[i].what);
    return 0;
}

int command_info(int argc, char **argv)
{
    long ranks = 2, domains = 0, tokens = 0, hidden = 0, topk = 0, experts = 0, slots = 0; /* 0: not given */
    bool plan_only = false;
    int backend = 0;
    const char *net = NULL;
    const option_t table[] = {
        {"--ranks", OPTION_NUMBER, &ranks, 1, RANKS_MAX, NULL, "N", "show the choices for N ranks; default 2"},
        {"--backend", OPTION_CHOICE, &backend, 0, 0, "auto,cpu,cuda", "WHICH", "auto (default), cpu or cuda"},
        {"--domains", OPTION_NUMBER, &domains, 1, RANKS_MAX, NULL, "D", "split the ranks into D domains"},
        {"--net", OPTION_TEXT, &net, 0, 0, NULL, "NET", "network between domains"},
        {"--plan", OPTION_FLAG, &plan_only, 0, 0, NULL, NULL, "only the bytes that low latency takes, for:"},
        {"--tokens", OPTION_NUMBER, &tokens, 1, 1 << 20, NULL, "N", "tokens a rank; default 128"},
        {"--hidden", OPTION_NUMBER, &hidden, 1, 1 << 24, NULL, "N", "elements a row; default 7168"},
        {"--topk", OPTION_NUMBER, &topk, 1, EPX_TOPK_MAX, NULL, "N", "experts a token chooses; default 8"},
        {"--experts", OPTION_NUMBER, &experts, 1, 1 << 16, NULL, "N", "of all ranks together; default 256"},
        {"--slots", OPTION_NUMBER, &slots, 1, 1024, NULL, "N", "calls in flight; default 2"},
    };
    const option_set_t set = {"info", "What this machine offers, what epx would choose, each with its reason.",
                              table,  sizeof table / sizeof *table,
                              NULL,   NULL};
    options_result_t parsed = options_parse(&set, argc, argv, NULL);
    if (parsed)
        return parsed == OPTIONS_WRONG ? 2 : 0;
    if (domains && ranks % domains)
        return options_refuse("info", "--domains %ld: domains have equal sizes, so they must divide --ranks %ld",
                              domains, ranks);
    if (!plan_only && (tokens || hidden || topk || experts || slots))
        return options_refuse("info",
                              "--tokens, --hidden, --topk, --experts and --slots are the shape of --plan: give it too");
    tokens = tokens ? tokens : 128;
    hidden = hidden ? hidden : 7168;
    topk = topk ? topk : 8;
    experts = experts ? experts : 256;
    slots = slots ? slots : 2;
    if (hidden % 8)
        return options_refuse("info", "--hidden %ld: low latency takes a multiple of 8", hidden);
    if (topk > experts)
        return options_refuse("info", "--topk %ld: at most --experts %ld are there to choose", topk, experts);
    if (plan_only) {
        epx_ll_plan_t plan = {.ranks = (uint32_t)ranks, .tokens_max = (uint32_t)tokens, .hidden = (uint32_t)hidden};
        plan.topk = (uint32_t)topk;
        plan.experts = (uint32_t)experts;
        plan.slots = (uint32_t)slots;
        return show_plan(&plan, domains ? (uint32_t)domains : 1);
    }
    show_machine();
    show_backends();
    epx_group_config_t config = {.backend = (epx_backend_t)backend, .net = net};
    if (domains)
        config.ranks_per_domain = (int)(ranks / domains);
    ranks_config_t run = {.command = "info", .ranks = (int)ranks, .body = body, .user = &config};
    int failed = ranks_run(&run);
    show_environment();
    return failed;
}
