/*
 * Small exchanges of 2, 3 and 4 processes for compute-sanitizer: once a kernel of this kind read a shared array at a
 * lane's index though there were fewer ranks than lanes. Every table here is exactly as long as the ranks, so memcheck
 * sees such a read. As a plain test it compares with the reference.
 */
#include "gpu/memory_cuda.h"

#include "common/step.h"

static void body(xt_rank_t *self)
{
    epx_buffer_t *buffer = NULL;
    epx_buffer_config_t config = {.size = sizeof config, .lease_bytes = 1u << 20, .reserve_bytes = 32u << 10};
    config.tokens_max = 40;
    config.topk_max = 8;
    config.experts_max = 12;
    config.handles_max = 2;
    config.leases_max = 4;
    bool good = XT_OK(self, epx_buffer_create(self->group, &config, &buffer));
    for (uint32_t i = 0; good && i < 4; i++) {
        xt_shape_t s = {.ranks = self->ranks, .seed = 77, .op = i * 2, .tokens_max = 40, .experts = 12, .bits = 64};
        s.topk = i == 3 ? 0 : 1 + i * 3;
        s.weights = i != 1;
        s.alignment = 1;
        s.format = XT_BF16;
        s.row_bytes = 128;
        s.side_elems = 3;
        s.side_elem_bytes = 4;
        good = xt_step_whole(self, buffer, &s, i == 1, i % 2 ? XT_PLACE_OWN : XT_PLACE_LEASE,
                             i % 2 ? XT_FROM_ANYWHERE : XT_FROM_RECEIVED);
    }
    epx_buffer_destroy(buffer);
}

int main(int argc, char **argv)
{
    int only = argc > 1 ? atoi(argv[1]) : 0;
    for (int ranks = 2; ranks <= 4; ranks++) {
        xt_run_t r = {.name = "bounds", .ranks = ranks, .processes = true, .body = body, .seed = 3, .limit_ms = 200000};
        if (!only || ranks == only)
            xt_run(&r);
    }
    return xt_done();
}
