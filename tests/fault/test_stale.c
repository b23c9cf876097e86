/*
 * Names that are no longer good: handles and leases that were released, of another buffer or of a destroyed one, with
 * their places taken again or not, buffers that were destroyed, and pointers that never were names. Every public
 * function refuses them in words; whoever has the place now does not notice.
 */
#include "common/world.h"

#include <epx/ll.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 4, ROW = 64, RANKS = 2, EXPERTS = 2 };

typedef struct room {
    _Alignas(64) uint8_t x[TOKENS * ROW], out[RANKS * TOKENS * ROW], y[RANKS * TOKENS * ROW];
    int64_t ids[TOKENS];
    int32_t count[EXPERTS], source[RANKS * TOKENS];
} room_t;

static void refuse(xt_rank_t *self, epx_status_t status, const char *words, int line, const char *call)
{
    const char *detail = epx_error_detail();
    xt_check(self, status == EPX_E_INVALID && strstr(detail, words), __FILE__, line, "%s: %s: \"%s\", not \"%s\"", call,
             epx_status_name(status), detail, words);
}
#define REFUSE(call, words) refuse(self, call, words, __LINE__, #call)

static void room_init(room_t *r)
{
    memset(r, 0, sizeof *r);
    for (int t = 0; t < TOKENS; t++)
        r->ids[t] = t % EXPERTS;
}

static bool open_buffer(xt_rank_t *self, epx_group_t *group, epx_buffer_t **buffer)
{
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 16384, .reserve_bytes = 8192, .tokens_max = TOKENS};
    c.topk_max = 1;
    c.experts_max = EXPERTS;
    c.handles_max = 1;
    c.leases_max = 2;
    c.ll_tokens_max = TOKENS;
    c.ll_hidden_max = ROW / 2;
    c.ll_slots = 1;
    c.ll_zero_copy = 1;
    return XT_OK(self, epx_buffer_create(group, &c, buffer));
}

/* ---- the calls, each kind with what it needs ---- */

static epx_status_t begin(epx_buffer_t *buffer, room_t *r, epx_handle_t **handle)
{
    epx_dispatch_t d = {.size = sizeof d, .tokens = TOKENS, .topk_idx = r->ids, .topk = 1, .experts = EXPERTS};
    d.rows = (epx_rows_t){.x = r->x, .row_bytes = ROW};
    return epx_dispatch_begin(buffer, &d, NULL, handle);
}

static epx_ll_dispatch_t ll_dispatch(room_t *r)
{
    epx_ll_dispatch_t d = {.size = sizeof d, .x = r->x, .tokens = TOKENS, .hidden = ROW / 2, .topk_idx = r->ids};
    d.topk = 1;
    d.experts = EXPERTS;
    d.order = EPX_LL_RANK_MAJOR;
    d.recv_x = r->y;
    d.recv_count = r->count;
    d.src_info = r->source;
    return d;
}

static epx_ll_combine_t ll_combine(room_t *r)
{
    return (epx_ll_combine_t){.size = sizeof(epx_ll_combine_t), .x = r->y, .topk_idx = r->ids, .out = r->out};
}

/* Every function that takes a handle. */
static void refuse_handle(xt_rank_t *self, epx_handle_t *bad, room_t *r, const char *words)
{
    epx_counts_t counts = {.size = sizeof counts};
    epx_handle_tables_t tables = {.size = sizeof tables};
    epx_received_t received = {.size = sizeof received};
    epx_rows_t rows = {.x = r->x, .row_bytes = ROW};
    epx_combine_t combine = {.size = sizeof combine, .x = r->y, .hidden = ROW / 2, .out = r->out};
    REFUSE(epx_handle_counts(bad, &counts), words);
    REFUSE(epx_handle_get_tables(bad, &tables), words);
    REFUSE(epx_dispatch_end(bad, NULL, NULL, &received), words);
    REFUSE(epx_dispatch_again(bad, &rows, NULL, NULL, &received), words);
    REFUSE(epx_combine(bad, &combine, NULL), words);
    epx_handle_release(bad, NULL); /* says so, and does nothing */
    XT_CHECK(self, strstr(epx_error_detail(), words), "%s", epx_error_detail());
}

static void refuse_ll_handle(xt_rank_t *self, epx_ll_handle_t *bad, room_t *r, const char *words)
{
    epx_ll_combine_t combine = ll_combine(r);
    void *memory = r;
    REFUSE(epx_ll_dispatch_recv(bad, NULL), words);
    REFUSE(epx_ll_combine(bad, &combine, NULL), words);
    REFUSE(epx_ll_combine_send(bad, &combine, NULL), words);
    REFUSE(epx_ll_combine_recv(bad, NULL), words);
    REFUSE(epx_ll_combine_buffer(bad, &memory), words);
    XT_CHECK(self, memory == r, "an output was written");
    epx_ll_handle_release(bad, NULL);
    XT_CHECK(self, strstr(epx_error_detail(), words), "%s", epx_error_detail());
}

static void refuse_buffer(xt_rank_t *self, epx_buffer_t *bad, epx_lease_t lease, room_t *r, const char *words)
{
    epx_handle_t *handle = NULL;
    epx_ll_handle_t *ll = NULL;
    epx_ll_dispatch_t d = ll_dispatch(r);
    epx_dispatch_t whole = {.size = sizeof whole};
    epx_received_t received = {.size = sizeof received};
    epx_traffic_t traffic = {.size = sizeof traffic};
    epx_layout_t layout = {.size = sizeof layout, .topk_idx = r->ids, .tokens = TOKENS, .topk = 1, .experts = EXPERTS};
    epx_lease_t more;
    uint8_t works[RANKS];
    int32_t masked[RANKS];
    void *memory;
    REFUSE(epx_buffer_status(bad), words);
    REFUSE(epx_buffer_barrier(bad, NULL), words);
    REFUSE(epx_buffer_check(bad, works), words);
    REFUSE(epx_buffer_get_traffic(bad, &traffic), words);
    REFUSE(epx_layout(bad, &layout, NULL), words);
    REFUSE(begin(bad, r, &handle), words);
    REFUSE(epx_dispatch(bad, &whole, NULL, NULL, &handle, &received), words);
    REFUSE(epx_lease(bad, 64, NULL, &more, &memory), words);
    REFUSE(epx_lease_release(bad, lease, NULL), words);
    REFUSE(epx_ll_dispatch(bad, &d, NULL, &ll), words);
    REFUSE(epx_ll_dispatch_send(bad, &d, NULL, &ll), words);
    REFUSE(epx_ll_mask_set(bad, 1 - self->rank, 1, NULL), words);
    REFUSE(epx_ll_mask_get(bad, masked), words);
    REFUSE(epx_ll_mask_clear(bad, NULL), words);
    epx_buffer_destroy(bad);
    XT_CHECK(self, strstr(epx_error_detail(), words), "%s", epx_error_detail());
    XT_CHECK(self, !handle && !ll, "an output was written");
}

/* ---- in the order of a life ---- */

/* One place for handles: the second dispatch takes the first one's. */
static void released(xt_rank_t *self, epx_buffer_t *buffer, room_t *r, epx_handle_t **old, epx_ll_handle_t **old_ll)
{
    epx_handle_t *first = NULL, *second = NULL;
    epx_ll_handle_t *ll = NULL;
    epx_received_t received = {.size = sizeof received};
    epx_combine_t combine = {.size = sizeof combine, .x = r->y, .hidden = ROW / 2, .out = r->out};
    epx_ll_dispatch_t d = ll_dispatch(r);
    epx_ll_combine_t c = ll_combine(r);
    XT_OK(self, begin(buffer, r, &first));
    epx_handle_release(first, NULL);
    refuse_handle(self, first, r, "released");
    XT_OK(self, begin(buffer, r, &second));
    XT_CHECK(self, first != second, "two handles of one name");
    refuse_handle(self, first, r, "released");
    epx_lease_t stale;
    XT_OK(self, epx_dispatch_end(second, NULL, NULL, &received)); /* which has not noticed */
    refuse_handle(self, first, r, "released");
    XT_OK(self, epx_combine(second, &combine, NULL));
    stale = received.lease;
    XT_OK(self, epx_lease_release(buffer, stale, NULL));
    REFUSE(epx_lease_release(buffer, stale, NULL), "not held");
    XT_OK(self, epx_dispatch_again(second, &(epx_rows_t){.x = r->x, .row_bytes = ROW}, NULL, NULL, &received));
    REFUSE(epx_lease_release(buffer, stale, NULL), "not held");
    XT_OK(self, epx_lease_release(buffer, received.lease, NULL));
    *old = second;

    XT_OK(self, epx_ll_dispatch(buffer, &d, NULL, old_ll));
    XT_OK(self, epx_ll_combine(*old_ll, &c, NULL));
    REFUSE(epx_ll_combine(*old_ll, &c, NULL), "combined or released");
    XT_OK(self, epx_ll_dispatch_send(buffer, &d, NULL, &ll));
    refuse_ll_handle(self, *old_ll, r, "combined or released");
    XT_OK(self, epx_ll_dispatch_recv(ll, NULL));
    refuse_ll_handle(self, *old_ll, r, "combined or released");
    XT_OK(self, epx_ll_combine_send(ll, &c, NULL));
    refuse_ll_handle(self, *old_ll, r, "combined or released");
    XT_OK(self, epx_ll_combine_recv(ll, NULL));
    XT_OK(self, epx_ll_dispatch(buffer, &d, NULL, old_ll)); /* alive until the buffer goes */
}

static void never_names(xt_rank_t *self, epx_buffer_t *buffer, room_t *r, epx_handle_t *handle, epx_ll_handle_t *ll)
{
    void *heap = calloc(1, 64);
    refuse_handle(self, heap, r, "no handle of this library");
    refuse_handle(self, (void *)buffer, r, "no handle of this library");
    refuse_handle(self, (void *)ll, r, "no handle of this library");
    refuse_ll_handle(self, heap, r, "no low-latency handle of this library");
    refuse_ll_handle(self, (void *)handle, r, "no low-latency handle of this library");
    refuse_buffer(self, heap, 1, r, "no buffer of this library");
    refuse_buffer(self, (void *)handle, 1, r, "no buffer of this library");
    free(heap);
    /* Every bit of a good name counts. */
    for (int bit = 0; bit < 64; bit++) {
        epx_counts_t counts = {.size = sizeof counts};
        uintptr_t other = (uintptr_t)handle ^ (uintptr_t)1 << bit;
        XT_CHECK(self, epx_handle_counts((epx_handle_t *)other, &counts) == EPX_E_INVALID, "bit %d", bit);
        other = (uintptr_t)buffer ^ (uintptr_t)1 << bit;
        XT_CHECK(self, epx_buffer_status((epx_buffer_t *)other) == EPX_E_INVALID, "bit %d", bit);
    }
}

static void body_lives(xt_rank_t *self)
{
    room_t *r = aligned_alloc(64, sizeof *r);
    epx_buffer_t *buffer = NULL, *next = NULL;
    epx_handle_t *handle = NULL, *fresh = NULL;
    epx_ll_handle_t *ll = NULL;
    epx_lease_t lease = 0, other;
    void *memory;
    if (!r)
        exit(3);
    room_init(r);
    if (!open_buffer(self, self->group, &buffer))
        return;
    released(self, buffer, r, &handle, &ll);
    XT_OK(self, epx_lease(buffer, 64, NULL, &lease, &memory));
    never_names(self, buffer, r, handle, ll);
    epx_buffer_destroy(buffer);
    refuse_handle(self, handle, r, "destroyed");
    refuse_ll_handle(self, ll, r, "destroyed");
    refuse_buffer(self, buffer, lease, r, "destroyed");
    /* The next buffer takes the place (and, likely, the memory). */
    if (!open_buffer(self, self->group, &next))
        return;
    XT_OK(self, begin(next, r, &fresh));
    XT_OK(self, epx_lease(next, 64, NULL, &other, &memory));
    refuse_handle(self, handle, r, "destroyed");
    refuse_ll_handle(self, ll, r, "destroyed");
    refuse_buffer(self, buffer, lease, r, "destroyed");
    REFUSE(epx_lease_release(next, lease, NULL), "not held");
    epx_received_t received = {.size = sizeof received};
    XT_OK(self, epx_dispatch_end(fresh, NULL, NULL, &received));
    XT_OK(self, epx_lease_release(next, other, NULL));
    epx_buffer_destroy(next);
    free(r);
}

/* ---- while others make and destroy ---- */

static atomic_bool stop;

/* Asks for ever after one bad name, while its place changes hands. */
static void *ask(void *bad)
{
    epx_counts_t counts = {.size = sizeof counts};
    long accepted = 0;
    while (!atomic_load(&stop))
        accepted += epx_handle_counts(bad, &counts) == EPX_OK;
    return (void *)accepted;
}

static void body_meanwhile(xt_rank_t *self)
{
    epx_group_config_t g = {.size = sizeof g, .rank = 0, .ranks = 1, .backend = EPX_BACKEND_CPU, .threads = 1};
    epx_group_t *group = NULL;
    epx_buffer_t *buffer = NULL;
    epx_handle_t *handle = NULL, *stale = NULL;
    pthread_t thread;
    void *accepted = self;
    room_t *r = aligned_alloc(64, sizeof *r);
    if (!r)
        exit(3);
    room_init(r);
    if (!XT_OK(self, epx_group_create(&g, &group)) || !open_buffer(self, group, &buffer))
        return;
    XT_OK(self, begin(buffer, r, &stale));
    epx_buffer_destroy(buffer);
    atomic_store(&stop, false);
    if (pthread_create(&thread, NULL, ask, stale))
        exit(3);
    for (int i = 0; i < 100; i++) {
        if (!open_buffer(self, group, &buffer))
            break;
        XT_OK(self, begin(buffer, r, &handle));
        epx_buffer_destroy(buffer);
    }
    atomic_store(&stop, true);
    pthread_join(thread, &accepted);
    XT_CHECK(self, !accepted, "a stale handle was taken %ld times", (long)accepted);
    epx_group_destroy(group);
    free(r);
}

int main(void)
{
    xt_run_t lives = {.name = "lives", .ranks = RANKS, .threads = 1, .body = body_lives, .limit_ms = 30000};
    xt_run_t meanwhile = {.name = "meanwhile", .ranks = 1, .no_group = true, .body = body_meanwhile};
    meanwhile.limit_ms = 60000;
    if (xt_memory()->backend != EPX_BACKEND_CPU) {
        printf("skipped: the heap is the device memory here\n");
        return 77;
    }
    xt_run(&lives);
    xt_run(&meanwhile);
    return xt_done();
}
