/* What epx_buffer_get_traffic counts: every row once, on the rank that moves it, to itself apart. */
#include "common/world.h"

#include <epx/ll.h>

#include <stdio.h>
#include <string.h>

enum { TOKENS = 4, HIDDEN = 64, ROW = 2 * HIDDEN };

static epx_traffic_t traffic(xt_rank_t *self, epx_buffer_t *buffer)
{
    epx_traffic_t t = {.size = sizeof t};
    XT_OK(self, epx_buffer_get_traffic(buffer, &t));
    return t;
}

static void expect(xt_rank_t *self, const epx_traffic_t *before, const epx_traffic_t *after, uint64_t local,
                   uint64_t domain, const char *what)
{
    XT_CHECK(self, after->local_bytes - before->local_bytes == local, "%s: %lu bytes to itself, not %lu", what,
             (unsigned long)(after->local_bytes - before->local_bytes), (unsigned long)local);
    XT_CHECK(self, after->domain_bytes - before->domain_bytes == domain, "%s: %lu bytes in the domain, not %lu", what,
             (unsigned long)(after->domain_bytes - before->domain_bytes), (unsigned long)domain);
}

static void body(xt_rank_t *self)
{
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 1u << 18, .reserve_bytes = 1u << 18};
    c.tokens_max = TOKENS;
    c.topk_max = 2;
    c.experts_max = 4;
    c.ll_tokens_max = TOKENS;
    c.ll_hidden_max = HIDDEN;
    epx_buffer_t *buffer;
    if (!XT_OK(self, epx_buffer_create(self->group, &c, &buffer)))
        return;
    /* Experts 0 and 1 on rank 0, 2 and 3 on rank 1: three tokens go to rank 0, two to rank 1. */
    int64_t ids[TOKENS][2] = {{0, 1}, {1, 2}, {3, 2}, {0, -1}};
    uint64_t rows[2] = {3, 2}, mine = rows[self->rank], other = rows[1 - self->rank];
    uint64_t outputs[2] = {4, 3}; /* of experts, for low latency */
    static _Alignas(16) uint16_t x[2][TOKENS][HIDDEN], out[2][TOKENS][HIDDEN], y[2][2 * 2 * TOKENS][HIDDEN];
    int32_t count[2], source[2 * 2 * TOKENS];
    epx_dispatch_t d = {.size = sizeof d, .tokens = TOKENS, .topk_idx = ids, .topk = 2, .experts = 4};
    d.rows.x = x[self->rank];
    d.rows.row_bytes = ROW;
    epx_handle_t *handle;
    epx_received_t got = {.size = sizeof got};
    epx_traffic_t t[5] = {traffic(self, buffer)};
    XT_OK(self, epx_dispatch(buffer, &d, NULL, NULL, &handle, &got));
    t[1] = traffic(self, buffer);
    size_t each = ROW + 2 * 8 + 4; /* ids and the token's number travel along */
    expect(self, &t[0], &t[1], mine * each, other * each, "dispatch");
    epx_combine_t back = {.size = sizeof back, .x = got.x, .hidden = HIDDEN, .out = out[self->rank]};
    XT_OK(self, epx_combine(handle, &back, NULL));
    t[2] = traffic(self, buffer);
    expect(self, &t[1], &t[2], 0, other * ROW, "combine: rows pulled, own ones where they are");

    epx_ll_dispatch_t ll = {.size = sizeof ll, .x = x[self->rank], .tokens = TOKENS, .hidden = HIDDEN};
    ll.topk_idx = ids;
    ll.topk = 2;
    ll.experts = 4;
    ll.recv_x = y[self->rank];
    ll.recv_count = count;
    ll.src_info = source;
    epx_ll_handle_t *call;
    XT_OK(self, epx_ll_dispatch(buffer, &ll, NULL, &call));
    t[3] = traffic(self, buffer);
    expect(self, &t[2], &t[3], mine * ROW, other * ROW, "ll dispatch");
    epx_ll_combine_t sum = {.size = sizeof sum, .x = y[self->rank], .topk_idx = ids, .out = out[self->rank]};
    XT_OK(self, epx_ll_combine(call, &sum, NULL));
    t[4] = traffic(self, buffer);
    expect(self, &t[3], &t[4], outputs[self->rank] * ROW, outputs[self->rank] * ROW, "ll combine");
    epx_lease_release(buffer, got.lease, NULL);
    epx_handle_release(handle, NULL);
    epx_buffer_destroy(buffer);
}

int main(void)
{
    xt_run_t run = {.name = "traffic", .ranks = 2, .threads = 1, .body = body};
    if (xt_memory()->backend != EPX_BACKEND_CPU) {
        printf("skipped: the CPU backend counts these\n");
        return 77;
    }
    xt_run(&run);
    return xt_done();
}
