/* epx demo: options, the text, the ranks, the comparison. */
#include "demo.h"

#include "commands.h"
#include "options.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TEXT_BYTES_MAX = 1 << 22 };

static const char *default_text(void)
{
    static const char *const texts[] = {"/usr/share/common-licenses/GPL-3", "/usr/share/common-licenses/GPL-2",
                                        "/usr/share/common-licenses/Apache-2.0"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (access(texts[i], R_OK) == 0)
            return texts[i];
    return "README.md";
}

/* 0, or the exit code after a line on stderr. */
static int read_text(demo_t *demo)
{
    const char *path = demo->options.text;
    FILE *file = fopen(path, "rb");
    if (!file)
        return options_refuse("demo", "the text %s cannot be read: %s; name a file that can", path, strerror(errno));
    size_t most = demo->options.tokens ? (size_t)demo->options.tokens : TEXT_BYTES_MAX;
    demo->text = malloc(most);
    if (demo->text)
        demo->tokens = fread(demo->text, 1, most, file);
    int bad = ferror(file);
    fclose(file);
    if (!demo->text || bad || demo->tokens == 0)
        return options_refuse("demo", "the text %s %s; name a file with at least one byte", path,
                              demo->text && !bad ? "is empty" : "cannot be read");
    return 0;
}

static int prepare(demo_t *demo)
{
    const demo_options_t *options = &demo->options;
    size_t experts = (size_t)options->experts, elements = demo->tokens * (size_t)options->hidden;
    demo->expert_rank = malloc(experts * sizeof *demo->expert_rank);
    demo->result = ranks_share(sizeof *demo->result);
    demo->out = ranks_share(elements * sizeof *demo->out);
    demo->dx = ranks_share(elements * sizeof *demo->dx);
    demo->dweights = ranks_share(demo->tokens * (size_t)options->topk * sizeof *demo->dweights);
    if (!demo->expert_rank || !demo->result || !demo->out || !demo->dx || !demo->dweights ||
        layer_init(&demo->layer, (uint32_t)options->hidden, (uint32_t)options->topk, (uint32_t)options->experts,
                   (uint64_t)options->seed)) {
        fprintf(stderr, "epx demo: no memory for %zu tokens of hidden %ld\n", demo->tokens, options->hidden);
        return 1;
    }
    for (size_t e = 0; e < experts; e++)
        demo->expert_rank[e] = (int32_t)(e * (size_t)options->ranks / experts);
    demo->mapped = experts % (size_t)options->ranks != 0;
    /* Neither 0, so that what a rank leaves out is seen. */
    memset(demo->out, 0xee, elements * sizeof *demo->out);
    memset(demo->dx, 0xee, elements * sizeof *demo->dx);
    memset(demo->dweights, 0xee, demo->tokens * (size_t)options->topk * sizeof *demo->dweights);
    return 0;
}

static int run(demo_t *demo)
{
    ranks_config_t config = {.command = "demo",
                             .ranks = (int)demo->options.ranks,
                             .as_threads = demo->options.as_threads,
                             .body = demo_rank_body,
                             .user = demo};
    uint64_t wrong = 0, compared = 0;
    if (prepare(demo) || ranks_run(&config))
        return 1;
    demo_show(demo);
    fflush(stdout);
    if (demo_check(demo, &wrong, &compared)) {
        fprintf(stderr, "epx demo: no memory for the comparison\n");
        return 1;
    }
    printf("\ncompared with the same layer in one process, bit by bit: output, gradients of input and gate weights, "
           "counts\n"
           "%llu wrong of %llu\n",
           (unsigned long long)wrong, (unsigned long long)compared);
    return wrong != 0;
}

static void clean(demo_t *demo)
{
    size_t elements = demo->tokens * (size_t)demo->options.hidden;
    ranks_unshare(demo->result, sizeof *demo->result);
    ranks_unshare(demo->out, elements * sizeof *demo->out);
    ranks_unshare(demo->dx, elements * sizeof *demo->dx);
    ranks_unshare(demo->dweights, demo->tokens * (size_t)demo->options.topk * sizeof *demo->dweights);
    layer_fini(&demo->layer);
    free(demo->expert_rank);
    free(demo->text);
}

static int check_options(const demo_options_t *options)
{
    if (options->hidden % LAYER_LANES)
        return options_refuse("demo", "--hidden %ld: a multiple of %d is needed", options->hidden, LAYER_LANES);
    if (options->topk > options->experts)
        return options_refuse("demo", "--topk %ld: at most --experts %ld are there to choose", options->topk,
                              options->experts);
    if (options->domains && options->ranks % options->domains)
        return options_refuse("demo", "--domains %ld: domains have equal sizes, so they must divide --ranks %ld",
                              options->domains, options->ranks);
    return 0;
}

int command_demo(int argc, char **argv)
{
    demo_t demo = {.options = {.text = default_text(), .ranks = 4, .hidden = 192, .topk = 2, .experts = 16, .seed = 1}};
    demo_options_t *o = &demo.options;
    const option_t table[] = {
        {"--ranks", OPTION_NUMBER, &o->ranks, 1, RANKS_MAX, NULL, "N", "ranks on this host; default 4"},
        {"--threads-as-ranks", OPTION_FLAG, &o->as_threads, 0, 0, NULL, NULL, "ranks are threads, not processes"},
        {"--domains", OPTION_NUMBER, &o->domains, 1, RANKS_MAX, NULL, "D", "split the ranks into D domains"},
        {"--net", OPTION_TEXT, &o->net, 0, 0, NULL, "NET", "network between domains, e.g. ofi:tcp, loop"},
        {"--backend", OPTION_CHOICE, &o->backend, 0, 0, "auto,cpu,cuda", "WHICH", "auto (default), cpu or cuda"},
        {"--tokens", OPTION_NUMBER, &o->tokens, 0, TEXT_BYTES_MAX, NULL, "N",
         "the text's first N bytes; default 0, all"},
        {"--hidden", OPTION_NUMBER, &o->hidden, 32, LAYER_HIDDEN_MAX, NULL, "N", "elements a row; default 192"},
        {"--topk", OPTION_NUMBER, &o->topk, 1, EPX_TOPK_MAX, NULL, "N", "experts a token chooses; default 2"},
        {"--experts", OPTION_NUMBER, &o->experts, 1, LAYER_EXPERTS_MAX, NULL, "N", "of all ranks together; default 16"},
        {"--seed", OPTION_NUMBER, &o->seed, 0, 1 << 20, NULL, "N", "of the model's numbers; default 1"},
    };
    const option_set_t set = {
        "demo",      "An MoE layer over a text, its experts spread over ranks; forward and backward, checked exactly.",
        table,       sizeof table / sizeof *table,
        "TEXT_FILE", "any file, its bytes are the tokens; default a licence text"};
    options_result_t parsed = options_parse(&set, argc, argv, &o->text);
    if (parsed)
        return parsed == OPTIONS_WRONG ? 2 : 0;
    int failed = check_options(o);
    if (!failed)
        failed = read_text(&demo);
    if (!failed)
        failed = run(&demo);
    clean(&demo);
    return failed;
}
