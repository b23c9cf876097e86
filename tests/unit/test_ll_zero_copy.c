/* The zero-copy buffer of a low-latency combine has room for every expert of this rank, however uneven the map is. */
#include "common/world.h"

#include <epx/ll.h>

#include <malloc.h>
#include <stdio.h>
#include <string.h>

enum { TOKENS = 3, HIDDEN = 16, EXPERTS = 5 };

static void body(xt_rank_t *self)
{
    static const int32_t map[EXPERTS] = {1, 1, 0, 1, 1};
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 1u << 16, .reserve_bytes = 1u << 16, .tokens_max = 4};
    c.topk_max = 1;
    c.experts_max = EXPERTS;
    c.handles_max = 1;
    c.expert_rank = map;
    c.experts = EXPERTS;
    c.ll_tokens_max = TOKENS;
    c.ll_hidden_max = HIDDEN;
    c.ll_zero_copy = 1;
    epx_buffer_t *buffer;
    if (!XT_OK(self, epx_buffer_create(self->group, &c, &buffer)))
        return;
    size_t local = self->rank == 1 ? 4 : 1, bytes = local * (size_t)self->ranks * TOKENS * HIDDEN * 2;
    _Alignas(16) uint16_t recv[4 * 2 * TOKENS * HIDDEN];
    int32_t count[4], source[4 * 2 * TOKENS];
    int64_t none = -1;
    epx_ll_dispatch_t d = {.size = sizeof d, .hidden = HIDDEN, .topk_idx = &none, .topk = 1, .experts = EXPERTS};
    d.recv_x = recv;
    d.recv_count = count;
    d.src_info = source;
    epx_ll_handle_t *handle;
    void *memory = NULL;
    if (XT_OK(self, epx_ll_dispatch(buffer, &d, NULL, &handle)) &&
        XT_OK(self, epx_ll_combine_buffer(handle, &memory))) {
        XT_CHECK(self, malloc_usable_size(memory) >= bytes, "%zu bytes of %zu", malloc_usable_size(memory), bytes);
        if (malloc_usable_size(memory) >= bytes)
            memset(memory, 0, bytes);
    }
    epx_ll_handle_release(handle, NULL);
    epx_buffer_destroy(buffer);
}

int main(void)
{
    xt_run_t run = {.name = "zero copy, uneven map", .ranks = 2, .threads = 1, .body = body};
    if (xt_memory()->backend != EPX_BACKEND_CPU) {
        printf("skipped: the buffer is looked at as memory of the heap\n");
        return 77;
    }
    xt_run(&run);
    return xt_done();
}
