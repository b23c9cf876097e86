/* A low-latency shape that does not fit is refused in words that name the largest ll_tokens_max that does; and the
 * number is right: it fits, one more does not. */
#include "common/world.h"

#include <epx/ll.h>

#include "plan/ll.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TOPK = 4, SLOTS = 2 };

/* All that a rank needs for it, as the layout says. */
static size_t bytes_of(uint32_t ranks, uint32_t far, uint32_t tokens, uint32_t hidden)
{
    epx__ll_layout_t l;
    return epx__ll_layout_make(ranks, tokens, hidden, TOPK, SLOTS, 0, &l) == EPX_OK ? epx__ll_bytes(&l, far) : SIZE_MAX;
}

static void check_number(xt_rank_t *self, uint32_t ranks, uint32_t far, uint32_t hidden, size_t most, uint32_t number,
                         const char *words)
{
    XT_CHECK(self, number > 0 && bytes_of(ranks, far, number, hidden) <= most, "%u tokens do not fit %zu bytes: %s",
             number, most, words);
    XT_CHECK(self, bytes_of(ranks, far, number + 1, hidden) > most, "%u tokens fit %zu bytes as well: %s", number + 1,
             most, words);
}

static uint32_t number_after(const char *words, const char *phrase)
{
    const char *at = strstr(words, phrase);
    return at ? (uint32_t)strtoul(at + strlen(phrase), NULL, 10) : 0;
}

/* epx__ll_tokens_fit alone, over many shapes. */
static void body_plan(xt_rank_t *self)
{
    for (uint32_t i = 0; i < 300; i++) {
        uint32_t ranks = 1 + xt_random(self, 64), far = xt_random(self, ranks),
                 hidden = 8 * (1 + xt_random(self, 2000));
        size_t most = 1ull << (20 + xt_random(self, 16));
        epx__ll_layout_t shape = {.ranks = ranks, .hidden_max = hidden, .topk_max = TOPK, .slots = SLOTS};
        uint32_t fit = epx__ll_tokens_fit(&shape, far, most);
        if (fit == 0)
            XT_CHECK(self, bytes_of(ranks, far, 1, hidden) > most, "one token fits");
        else if (fit < EPX__LL_TOKENS_MOST)
            check_number(self, ranks, far, hidden, most, fit, "plan");
    }
}

static void body_buffer(xt_rank_t *self)
{
    const uint32_t hidden = 1u << 20;
    uint32_t far = (uint32_t)(self->ranks - self->topology.per_domain), ranks = (uint32_t)self->ranks;
    size_t each = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE) / (size_t)self->ranks;
    epx_buffer_t *buffer = NULL;
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 1u << 16, .reserve_bytes = 1u << 16, .tokens_max = 4};
    c.topk_max = TOPK;
    c.experts_max = ranks;
    c.ll_tokens_max = EPX__LL_TOKENS_MOST;
    c.ll_hidden_max = hidden;
    epx_status_t status = epx_buffer_create(self->group, &c, &buffer);
    XT_CHECK(self, status == EPX_E_INVALID && !buffer, "%s: %s", epx_status_name(status), epx_error_detail());
    uint32_t number = number_after(epx_error_detail(), "The largest ll_tokens_max that fits is ");
    check_number(self, ranks, far, hidden, each, number, epx_error_detail());
    /* A call with longer rows than the buffer was made for. */
    c.ll_tokens_max = 16;
    c.ll_hidden_max = 256;
    if (!XT_OK(self, epx_buffer_create(self->group, &c, &buffer)))
        return;
    _Alignas(16) static uint16_t memory[4096];
    int64_t ids[TOPK] = {0};
    epx_ll_dispatch_t d = {.size = sizeof d, .x = memory, .tokens = 1, .hidden = 1024, .topk_idx = ids, .topk = TOPK};
    d.experts = ranks;
    d.recv_x = memory;
    d.recv_count = d.src_info = (int32_t *)(void *)memory;
    epx_ll_handle_t *handle = NULL;
    status = epx_ll_dispatch_send(buffer, &d, NULL, &handle);
    XT_CHECK(self, status == EPX_E_INVALID && strstr(epx_error_detail(), "ll_hidden_max 256"), "%s: %s",
             epx_status_name(status), epx_error_detail());
    number = number_after(epx_error_detail(), "rows of 1024 for ll_tokens_max ");
    check_number(self, ranks, far, 1024, bytes_of(ranks, far, 16, 256), number, epx_error_detail());
    d.hidden = 256;
    d.tokens = 17;
    status = epx_ll_dispatch_send(buffer, &d, NULL, &handle);
    XT_CHECK(self, status == EPX_E_INVALID && strstr(epx_error_detail(), "ll_tokens_max 16"), "%s: %s",
             epx_status_name(status), epx_error_detail());
    epx_buffer_destroy(buffer);
}

int main(void)
{
    xt_run_t runs[] = {{.name = "largest number of tokens", .ranks = 1, .body = body_plan, .no_group = true},
                       {.name = "refused, one domain", .ranks = 2, .ranks_per_domain = 2, .body = body_buffer},
                       {.name = "refused, two domains", .ranks = 2, .ranks_per_domain = 1, .body = body_buffer}};
    if (xt_memory()->backend != EPX_BACKEND_CPU) {
        printf("skipped: the memory of the host decides\n");
        return 77;
    }
    setenv("EPX_NET", "loop", 1);
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        runs[i].threads = 1;
        xt_run(&runs[i]);
    }
    return xt_done();
}
