/*
 * The edges of the API's promises about failures: what is told when, and what can be tried again.
 *
 *     fault_test_api_edges [part of a test's name]
 */
#include "common/world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 4, ROW = 1024 };

static bool open_buffer(xt_rank_t *self, size_t reserve_bytes, uint64_t timeout_ms, epx_buffer_t **buffer)
{
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 1u << 18, .reserve_bytes = reserve_bytes};
    c.tokens_max = TOKENS;
    c.topk_max = 2;
    c.experts_max = 64;
    c.handles_max = 2;
    c.timeout_ms = timeout_ms;
    return XT_OK(self, epx_buffer_create(self->group, &c, buffer));
}

/* A collective that fails tells its failure itself: the next call finds a broken buffer. */
static void body_told(xt_rank_t *self)
{
    epx_buffer_t *buffer;
    if (!open_buffer(self, 1u << 16, 200, &buffer))
        return;
    if (self->rank == 0) {
        epx_status_t status = epx_buffer_barrier(buffer, NULL);
        XT_CHECK(self, status == EPX_E_TIMEOUT, "%s", epx_status_name(status));
        status = epx_buffer_barrier(buffer, NULL);
        XT_CHECK(self, status == EPX_E_BROKEN, "the same failure twice: %s", epx_status_name(status));
        xt_mark(self, 0);
    } else {
        /* Never in a call, and yet told: by the status, at once. */
        xt_wait_mark(self, 0, 1);
        epx_status_t status = epx_buffer_status(buffer);
        XT_CHECK(self, status == EPX_E_PEER && strstr(epx_error_detail(), "rank 0 failed"), "%s: %s",
                 epx_status_name(status), epx_error_detail());
    }
    epx_buffer_destroy(buffer);
}

/* A dispatch whose second half is refused on one rank can be ended there by other means. */
static void body_refused_half(xt_rank_t *self)
{
    epx_buffer_t *buffer;
    if (!open_buffer(self, 4096, 3000, &buffer))
        return;
    int64_t ids[TOKENS][2] = {{0, 1}, {1, 0}, {0, 1}, {0, -1}};
    static uint8_t room[8][2 * TOKENS * ROW] __attribute__((aligned(16)));
    uint8_t *x = calloc(TOKENS, ROW + 16), *at = x + (16 - (uintptr_t)x % 16) % 16;
    epx_dispatch_t d = {.size = sizeof d, .tokens = TOKENS, .topk_idx = ids, .topk = 2, .experts = 2};
    d.rows.x = at;
    d.rows.row_bytes = ROW;
    epx_place_t place = {.x = self->rank == 1 ? room[self->rank] : NULL};
    epx_received_t got = {.size = sizeof got};
    epx_handle_t *handle = NULL;
    epx_status_t status = epx_dispatch(buffer, &d, &place, NULL, &handle, &got);
    if (self->rank == 1) {
        XT_CHECK(self, status == EPX_E_INVALID && strstr(epx_error_detail(), "reserve_bytes"), "%s: %s",
                 epx_status_name(status), epx_error_detail());
        XT_CHECK(self, handle, "no handle to end the dispatch with");
        status = handle ? epx_dispatch_end(handle, NULL, NULL, &got) : EPX_E_INVALID;
    }
    XT_CHECK(self, status == EPX_OK && got.rows == (self->rank == 0 ? 8u : 6u), "%s: %s", epx_status_name(status),
             epx_error_detail());
    epx_lease_release(buffer, got.lease, NULL);
    epx_handle_release(handle, NULL);
    epx_buffer_destroy(buffer);
    free(x);
}

/* Structs that the library fills in say how long they are; places are as aligned as what is written there. */
static void body_sizes(xt_rank_t *self)
{
    epx_buffer_t *buffer;
    if (!open_buffer(self, 1u << 16, 3000, &buffer))
        return;
    static uint8_t room[8][2 * TOKENS * ROW] __attribute__((aligned(16)));
    static int64_t ids_room[8][4 * TOKENS];
    int64_t ids[1] = {-1};
    epx_dispatch_t d = {.size = sizeof d, .topk_idx = ids, .topk = 1, .experts = 2, .rows.row_bytes = 16};
    epx_received_t got = {.size = 0};
    epx_handle_t *handle = NULL;
    XT_OK(self, epx_dispatch_begin(buffer, &d, NULL, &handle));
    epx_status_t status = epx_dispatch_end(handle, NULL, NULL, &got);
    XT_CHECK(self, status == EPX_E_INVALID && strstr(epx_error_detail(), "size"), "%s", epx_status_name(status));
    got.size = sizeof got;
    epx_place_t place = {.x = room[self->rank], .topk_idx = (uint8_t *)ids_room[self->rank] + 4};
    status = epx_dispatch_end(handle, &place, NULL, &got);
    XT_CHECK(self, status == EPX_E_INVALID && strstr(epx_error_detail(), "topk_idx"), "%s", epx_status_name(status));
    XT_OK(self, epx_dispatch_end(handle, NULL, NULL, &got));
    epx_env_entry_t entry = {.size = 0};
    XT_CHECK(self, epx_env_get(0, &entry) == EPX_E_INVALID && strstr(epx_error_detail(), "size"), "no word");
    epx_handle_release(handle, NULL);
    epx_buffer_destroy(buffer);
}

/* More tokens than a table of them can count are refused when the buffer is made, on all ranks. */
static void body_too_many(xt_rank_t *self)
{
    epx_buffer_t *buffer = NULL;
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 4096, .reserve_bytes = 4096, .handles_max = 1};
    c.tokens_max = 1u << 29;
    epx_status_t status = epx_buffer_create(self->group, &c, &buffer);
    XT_CHECK(self, status == EPX_E_INVALID && strstr(epx_error_detail(), "tokens_max"), "%s: %s",
             epx_status_name(status), epx_error_detail());
    c.tokens_max = 4;
    c.ll_tokens_max = self->rank == 0 ? 4 : 6;
    c.ll_hidden_max = 64;
    status = epx_buffer_create(self->group, &c, &buffer);
    XT_CHECK(self, status == EPX_E_MISMATCH && strstr(epx_error_detail(), "ll_tokens_max"), "%s: %s",
             epx_status_name(status), epx_error_detail());
}

/* A lease of another buffer is refused, though the two have handed out as many. */
static void body_leases(xt_rank_t *self)
{
    epx_buffer_t *one, *two;
    if (!open_buffer(self, 1u << 16, 3000, &one) || !open_buffer(self, 1u << 16, 3000, &two))
        return;
    epx_lease_t a, b;
    void *memory;
    XT_OK(self, epx_lease(one, 64, NULL, &a, &memory));
    XT_OK(self, epx_lease(two, 64, NULL, &b, &memory));
    epx_status_t status = epx_lease_release(two, a, NULL);
    XT_CHECK(self, status == EPX_E_INVALID && strstr(epx_error_detail(), "not held on this buffer"), "%s: %s",
             epx_status_name(status), epx_error_detail());
    XT_OK(self, epx_lease_release(one, a, NULL));
    XT_OK(self, epx_lease_release(two, b, NULL));
    XT_CHECK(self, epx_lease_release(one, a, NULL) == EPX_E_INVALID, "released twice");
    epx_buffer_destroy(one);
    epx_buffer_destroy(two);
}

int main(int argc, char **argv)
{
    const char *part = argc > 1 ? argv[1] : "";
    xt_run_t runs[] = {
        {.name = "told once", .ranks = 2, .body = body_told},
        {.name = "refused half", .ranks = 2, .body = body_refused_half},
        {.name = "sizes", .ranks = 2, .body = body_sizes},
        {.name = "leases of two buffers", .ranks = 2, .body = body_leases},
        {.name = "too many tokens", .ranks = 4, .body = body_too_many},
    };
    if (xt_memory()->backend != EPX_BACKEND_CPU) {
        printf("skipped: the heap is the device memory here\n");
        return 77;
    }
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        runs[i].threads = 1;
        runs[i].limit_ms = 30000;
        if (strstr(runs[i].name, part))
            xt_run(&runs[i]);
    }
    return xt_done();
}
