/*
 * Every public function with every wrong argument: refused with words that say what is off, outputs untouched, nothing
 * changed: after each group of refusals a whole dispatch and combine still comes out right. Two ranks, as threads.
 */
#include "common/step.h"

#include <stdlib.h>
#include <string.h>

enum { TOKENS = 8, TOPK = 4, EXPERTS = 8, ROW = 64, RANKS = 2 };

static void refuse(xt_rank_t *self, epx_status_t status, const char *words, int line, const char *call)
{
    const char *detail = epx_error_detail();
    xt_check(self, status == EPX_E_INVALID, __FILE__, line, "%s: %s, should be refused: %s", call,
             epx_status_name(status), words);
    xt_check(self, strstr(detail, words) != NULL, __FILE__, line, "%s: \"%s\" does not say \"%s\"", call, detail,
             words);
}
#define REFUSE(call, words) refuse(self, call, words, __LINE__, #call)

/* Memory of a test rank, aligned. */
typedef struct room {
    _Alignas(64) uint8_t x[TOKENS * ROW * 4], out[TOKENS * ROW * 4];
    _Alignas(64) int64_t ids[TOKENS * TOPK];
    _Alignas(64) float weights[TOKENS * TOPK * RANKS], out_weights[TOKENS * TOPK];
    _Alignas(64) uint8_t mask[TOKENS * RANKS];
} room_t;

static void room_init(room_t *r)
{
    memset(r, 0, sizeof *r);
    for (int i = 0; i < TOKENS * TOPK; i++)
        r->ids[i] = i % EXPERTS;
}

static epx_buffer_config_t buffer_config(void)
{
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 64u << 10, .reserve_bytes = 64u << 10};
    c.tokens_max = TOKENS;
    c.topk_max = TOPK;
    c.experts_max = EXPERTS;
    c.handles_max = 2;
    c.leases_max = 3;
    return c;
}

static epx_dispatch_t right_dispatch(const room_t *r)
{
    epx_dispatch_t d = {.size = sizeof d, .tokens = TOKENS, .topk_idx = r->ids, .topk = TOPK, .experts = EXPERTS};
    d.rows = (epx_rows_t){.x = r->x, .row_bytes = ROW};
    return d;
}

/* The buffer still does its work. */
static void still_works(xt_rank_t *self, epx_buffer_t *buffer, uint32_t op)
{
    xt_shape_t s = {.ranks = RANKS, .seed = 5, .op = op, .tokens_max = TOKENS, .topk = TOPK, .experts = EXPERTS};
    s.bits = 64;
    s.weights = true;
    s.format = XT_BF16;
    s.row_bytes = ROW;
    s.tokens = XT_TOKENS_FULL;
    s.routing = XT_ROUTE_UNIFORM;
    xt_step_whole(self, buffer, &s, false, XT_PLACE_ANY, XT_FROM_ANY);
    XT_OK(self, epx_buffer_status(buffer));
}

/* ---- groups ---- */

static int failing_allgather(void *context, const void *mine, size_t bytes, void *all)
{
    (void)context, (void)mine, (void)bytes, (void)all;
    return 1;
}

static void group_calls(xt_rank_t *self)
{
    epx_group_t *const untouched = (epx_group_t *)self;
    epx_group_t *g = untouched;
    epx_unique_id_t id;
    epx_group_config_t c = {.size = sizeof c, .ranks = 1, .id = &id, .backend = EPX_BACKEND_CPU, .timeout_ms = 300};
    const epx_group_config_t right = c;
    struct {
        epx_group_config_t c;
        uint64_t unknown;
    } longer = {.c = c, .unknown = 7};

    REFUSE(epx_unique_id_create(NULL, NULL), "id is NULL");
    REFUSE(epx_unique_id_create("nonsense", &id), "nonsense");
    XT_OK(self, epx_unique_id_create(NULL, &id));
    REFUSE(epx_group_create(&c, NULL), "group is NULL");
    REFUSE(epx_group_create(NULL, &g), "NULL");
    c.size = 0;
    REFUSE(epx_group_create(&c, &g), "size is 0");
    c.size = 1u << 20;
    REFUSE(epx_group_create(&c, &g), "size is 1048576");
    longer.c.size = sizeof longer;
    REFUSE(epx_group_create(&longer.c, &g), "does not know");
    c = right, c.rank = -1;
    REFUSE(epx_group_create(&c, &g), "rank -1");
    c = right, c.rank = 1;
    REFUSE(epx_group_create(&c, &g), "rank 1 of 1");
    c = right, c.ranks = -2;
    REFUSE(epx_group_create(&c, &g), "ranks");
    c = right, c.id = NULL, c.ranks = 0, c.rank = 5;
    REFUSE(epx_group_create(&c, &g), "rank 5 of 0");
    c = right, c.allgather = failing_allgather;
    REFUSE(epx_group_create(&c, &g), "both");
    c = right, c.backend = (epx_backend_t)99;
    REFUSE(epx_group_create(&c, &g), "99");
    c = right, c.ranks_per_domain = -1;
    REFUSE(epx_group_create(&c, &g), "ranks_per_domain");
    c = right, c.device = -1;
    REFUSE(epx_group_create(&c, &g), "device");
    c = right, c.timeout_ms = UINT64_MAX;
    REFUSE(epx_group_create(&c, &g), "timeout_ms is 18446744073709551615; at most");
    c = right, c.threads = -1;
    REFUSE(epx_group_create(&c, &g), "threads is -1");
    XT_OK(self, epx_unique_id_create(NULL, &id));
    c = right, c.ranks_per_domain = 3;
    REFUSE(epx_group_create(&c, &g), "ranks_per_domain 3");
    c = right, c.id = NULL, c.allgather = failing_allgather, c.ranks = 2, c.rank = self->rank;
    epx_status_t status = epx_group_create(&c, &g);
    XT_CHECK(self, status != EPX_OK && epx_error_detail()[0], "%s: %s", epx_status_name(status), epx_error_detail());
    memset(&id, 0x5a, sizeof id);
    c = right, c.ranks = 2, c.rank = 1;
    status = epx_group_create(&c, &g);
    XT_CHECK(self, status != EPX_OK && epx_error_detail()[0], "%s with an id of noise", epx_status_name(status));
    XT_CHECK(self, g == untouched, "an output was written");
    epx_group_destroy(NULL);
}

static void group_queries(xt_rank_t *self)
{
    epx_group_info_t info = {.size = 1};
    uint8_t all[RANKS];
    REFUSE(epx_group_get_info(NULL, &info), "NULL");
    REFUSE(epx_group_get_info(self->group, NULL), "NULL");
    REFUSE(epx_group_get_info(self->group, &info), "size is 1");
    REFUSE(epx_group_barrier(NULL, 0), "NULL");
    REFUSE(epx_group_barrier(self->group, (uint64_t)1 << 50), "timeout_ms is 1125899906842624");
    REFUSE(epx_group_allgather(NULL, "x", 1, all), "NULL");
    REFUSE(epx_group_allgather(self->group, NULL, 1, all), "NULL");
    REFUSE(epx_group_allgather(self->group, "x", 1, NULL), "NULL");
    XT_OK(self, epx_group_barrier(self->group, 0));
    uint8_t mine = (uint8_t)(10 + self->rank);
    XT_OK(self, epx_group_allgather(self->group, &mine, 1, all));
    XT_CHECK(self, all[0] == 10 && all[1] == 11, "%d %d", all[0], all[1]);
}

/* ---- small things ---- */

static void small_things(xt_rank_t *self)
{
    epx_env_entry_t e = {.size = sizeof e};
    const char *why = NULL;
    uint32_t n = 0;
    XT_CHECK(self, epx_version() == (EPX_VERSION_MAJOR << 16 | EPX_VERSION_MINOR << 8 | EPX_VERSION_PATCH), "version");
    XT_CHECK(self, strcmp(epx_status_name(EPX_E_PEER), "EPX_E_PEER") == 0, "%s", epx_status_name(EPX_E_PEER));
    XT_CHECK(self, strcmp(epx_status_name((epx_status_t)777), "EPX_E_?") == 0, "%s",
             epx_status_name((epx_status_t)777));
    XT_CHECK(self, epx_status_text((epx_status_t)-3) && epx_status_text(EPX_OK)[0], "texts");
    REFUSE(epx_env_get(0, NULL), "NULL");
    for (; epx_env_get(n, &e) == EPX_OK && n < 1000; n++)
        XT_CHECK(self, strncmp(e.name, "EPX_", 4) == 0 && e.meaning[0], "variable %u", n);
    XT_CHECK(self, n > 5 && n < 1000, "%u variables", n);
    REFUSE(epx_env_get(n, &e), "past the last");
    XT_CHECK(self, epx_backend_usable(EPX_BACKEND_CPU, &why) == EPX_OK && why && why[0], "the CPU");
    REFUSE(epx_backend_usable((epx_backend_t)55, &why), "55");
}

/* ---- buffers ---- */

static void buffer_calls(xt_rank_t *self)
{
    epx_buffer_t *const untouched = (epx_buffer_t *)self;
    epx_buffer_t *b = untouched;
    epx_buffer_config_t c = buffer_config();
    const epx_buffer_config_t right = c;
    int32_t map[EXPERTS] = {0, 1, 0, 1, 0, 1, 0, 2};

    REFUSE(epx_buffer_create(NULL, &c, &b), "NULL");
    REFUSE(epx_buffer_create(self->group, NULL, &b), "NULL");
    REFUSE(epx_buffer_create(self->group, &c, NULL), "NULL");
    /* From here on collective: every rank passes the same wrong thing. */
    c.size = 3;
    REFUSE(epx_buffer_create(self->group, &c, &b), "size is 3");
    c = right, c.topk_max = 33;
    REFUSE(epx_buffer_create(self->group, &c, &b), "topk_max is 33");
    c = right, c.tokens_max = 0xffffffffu;
    REFUSE(epx_buffer_create(self->group, &c, &b), "tokens_max 4294967295");
    c = right, c.experts_max = 1u << 30;
    REFUSE(epx_buffer_create(self->group, &c, &b), "experts_max 1073741824");
    c = right, c.handles_max = 1u << 30;
    REFUSE(epx_buffer_create(self->group, &c, &b), "handles_max 1073741824");
    c = right, c.leases_max = 1u << 30;
    REFUSE(epx_buffer_create(self->group, &c, &b), "leases_max 1073741824");
    c = right, c.sms = -4;
    REFUSE(epx_buffer_create(self->group, &c, &b), "sms is -4");
    c = right, c.timeout_ms = UINT64_MAX;
    REFUSE(epx_buffer_create(self->group, &c, &b), "timeout_ms is 18446744073709551615");
    c = right, c.ll_tokens_max = 4;
    REFUSE(epx_buffer_create(self->group, &c, &b), "ll_hidden_max is 0");
    c = right, c.ll_tokens_max = 4, c.ll_hidden_max = 12;
    REFUSE(epx_buffer_create(self->group, &c, &b), "ll_hidden_max is 12");
    c = right, c.ll_tokens_max = 1u << 30, c.ll_hidden_max = 8;
    REFUSE(epx_buffer_create(self->group, &c, &b), "ll_tokens_max 1073741824");
    c = right, c.ll_tokens_max = 4, c.ll_hidden_max = 8, c.ll_slots = 1u << 20;
    REFUSE(epx_buffer_create(self->group, &c, &b), "ll_slots 1048576");
    c = right, c.expert_rank = map;
    REFUSE(epx_buffer_create(self->group, &c, &b), "expert_rank");
    c = right, c.expert_rank = map, c.experts = EXPERTS;
    REFUSE(epx_buffer_create(self->group, &c, &b), "expert_rank[7] is 2");
    c = right, c.expert_rank = map, c.experts = EXPERTS + 1;
    REFUSE(epx_buffer_create(self->group, &c, &b), "experts_max");
    c = right, c.lease_bytes = SIZE_MAX - 1;
    REFUSE(epx_buffer_create(self->group, &c, &b), "lease_bytes 18446744073709551614");
    c = right, c.reserve_bytes = SIZE_MAX - 1;
    REFUSE(epx_buffer_create(self->group, &c, &b), "reserve_bytes 18446744073709551614");
    /* One rank alone is wrong: it says what, the other hears of it. */
    c = right, c.topk_max = self->rank == 1 ? 99 : TOPK;
    epx_status_t status = epx_buffer_create(self->group, &c, &b);
    XT_CHECK(self, status == (self->rank == 1 ? EPX_E_INVALID : EPX_E_PEER), "%s", epx_status_name(status));
    XT_CHECK(self, strstr(epx_error_detail(), "topk_max is 99"), "%s", epx_error_detail());
    /* The ranks disagree. */
    c = right, c.tokens_max = TOKENS + (uint32_t)self->rank;
    status = epx_buffer_create(self->group, &c, &b);
    XT_CHECK(self, status == EPX_E_MISMATCH && strstr(epx_error_detail(), "tokens_max"), "%s: %s",
             epx_status_name(status), epx_error_detail());
    c = right, c.lease_bytes = (size_t)1 << 62; /* fits 64 bits, but no machine */
    status = epx_buffer_create(self->group, &c, &b);
    XT_CHECK(self, status != EPX_OK && epx_error_detail()[0], "%s for a lease of 2^62 bytes", epx_status_name(status));
    XT_CHECK(self, b == untouched, "an output was written");
    epx_buffer_destroy(NULL);
}

static void buffer_queries(xt_rank_t *self, epx_buffer_t *b)
{
    epx_traffic_t traffic = {.size = 2};
    uint8_t works[RANKS] = {9, 9};
    REFUSE(epx_buffer_status(NULL), "NULL");
    REFUSE(epx_buffer_barrier(NULL, NULL), "NULL");
    REFUSE(epx_buffer_check(NULL, works), "NULL");
    REFUSE(epx_buffer_check(b, NULL), "NULL");
    REFUSE(epx_buffer_get_traffic(NULL, &traffic), "NULL");
    REFUSE(epx_buffer_get_traffic(b, NULL), "NULL");
    REFUSE(epx_buffer_get_traffic(b, &traffic), "size");
    XT_OK(self, epx_buffer_barrier(b, NULL));
    XT_OK(self, epx_buffer_check(b, works));
    XT_CHECK(self, works[0] == 1 && works[1] == 1, "%d %d", works[0], works[1]);
    traffic.size = sizeof traffic;
    XT_OK(self, epx_buffer_get_traffic(b, &traffic));
}

static void lease_calls(xt_rank_t *self, epx_buffer_t *b)
{
    epx_lease_t l = 77, kept[4] = {0};
    void *memory = self, *more;
    REFUSE(epx_lease(NULL, 64, NULL, &l, &memory), "NULL");
    REFUSE(epx_lease(b, 64, NULL, NULL, &memory), "NULL");
    REFUSE(epx_lease(b, 64, NULL, &l, NULL), "NULL");
    REFUSE(epx_lease(b, 0, NULL, &l, &memory), "bytes is 0");
    XT_CHECK(self, epx_lease(b, 1u << 30, NULL, &l, &memory) == EPX_E_BUSY && strstr(epx_error_detail(), "lease_bytes"),
             "a lease larger than the window: %s", epx_error_detail());
    XT_CHECK(self, epx_lease(b, SIZE_MAX, NULL, &l, &memory) == EPX_E_BUSY, "a lease of all memory");
    XT_CHECK(self, epx_lease(b, SIZE_MAX - 300, NULL, &l, &memory) == EPX_E_BUSY, "a lease of almost all memory");
    XT_CHECK(self, l == 77 && memory == self, "an output was written");
    REFUSE(epx_lease_release(NULL, 1, NULL), "NULL");
    REFUSE(epx_lease_release(b, 0x123456789abcdefu, NULL), "not held");
    XT_OK(self, epx_lease_release(b, 0, NULL));
    for (int i = 0; i < 3; i++)
        XT_OK(self, epx_lease(b, 1024, NULL, &kept[i], &more));
    XT_CHECK(self, epx_lease(b, 64, NULL, &kept[3], &more) == EPX_E_BUSY && strstr(epx_error_detail(), "3 leases"),
             "%s", epx_error_detail());
    for (int i = 0; i < 3; i++)
        XT_OK(self, epx_lease_release(b, kept[i], NULL));
    REFUSE(epx_lease_release(b, kept[1], NULL), "not held");
}

/* ---- operations ---- */

static void layout_calls(xt_rank_t *self, epx_buffer_t *b, room_t *r)
{
    int32_t counts[EXPERTS] = {-5};
    epx_layout_t l = {.size = sizeof l, .topk_idx = r->ids, .tokens = TOKENS, .topk = TOPK, .experts = EXPERTS};
    l.tokens_per_expert = counts;
    const epx_layout_t right = l;
    REFUSE(epx_layout(NULL, &l, NULL), "NULL");
    REFUSE(epx_layout(b, NULL, NULL), "NULL");
    l.size = 5;
    REFUSE(epx_layout(b, &l, NULL), "size is 5");
    l = right, l.topk_idx_bits = 16;
    REFUSE(epx_layout(b, &l, NULL), "topk_idx_bits is 16");
    l = right, l.tokens = TOKENS + 1;
    REFUSE(epx_layout(b, &l, NULL), "tokens_max 8");
    l = right, l.topk = 0;
    REFUSE(epx_layout(b, &l, NULL), "topk is 0");
    l = right, l.topk = TOPK + 1;
    REFUSE(epx_layout(b, &l, NULL), "topk is 5");
    l = right, l.experts = 0;
    REFUSE(epx_layout(b, &l, NULL), "0 experts");
    l = right, l.experts = EXPERTS + 2;
    REFUSE(epx_layout(b, &l, NULL), "10 experts");
    l = right, l.experts = 7;
    REFUSE(epx_layout(b, &l, NULL), "multiple of 2 ranks");
    l = right, l.topk_idx = NULL;
    REFUSE(epx_layout(b, &l, NULL), "topk_idx is NULL");
    l = right, l.topk_idx = (const char *)r->ids + 4;
    REFUSE(epx_layout(b, &l, NULL), "8-byte aligned");
    l = right, l.tokens_per_rank = (int32_t *)((char *)r->ids + 2);
    REFUSE(epx_layout(b, &l, NULL), "tokens_per_rank is at");
    l = right, l.tokens_per_domain = (int32_t *)((char *)r->ids + 1);
    REFUSE(epx_layout(b, &l, NULL), "tokens_per_domain is at");
    l = right, l.tokens_per_expert = (int32_t *)((char *)r->ids + 3);
    REFUSE(epx_layout(b, &l, NULL), "tokens_per_expert is at");
    XT_CHECK(self, counts[0] == -5, "an output was written");
}

static void rows_calls(xt_rank_t *self, epx_rows_t right, epx_status_t (*call)(void *, const epx_rows_t *),
                       void *context)
{
    static const uint64_t side[64];
    epx_rows_t r = right;
    r.x = NULL;
    REFUSE(call(context, &r), "x is NULL");
    r = right, r.x = (const char *)right.x + 8;
    REFUSE(call(context, &r), "16-byte aligned");
    r = right, r.row_bytes = 0;
    REFUSE(call(context, &r), "row_bytes is 0");
    r = right, r.row_bytes = 40;
    REFUSE(call(context, &r), "row_bytes is 40");
    r = right, r.row_bytes = (size_t)1 << 40;
    REFUSE(call(context, &r), "row_bytes is 1099511627776");
    r = right, r.x_stride_bytes = ROW + 8;
    REFUSE(call(context, &r), "x_stride_bytes is 72");
    r = right, r.x_stride_bytes = ROW - 16;
    REFUSE(call(context, &r), "x_stride_bytes is 48");
    r = right, r.x_stride_bytes = (size_t)1 << 62;
    REFUSE(call(context, &r), "x_stride_bytes is 4611686018427387904; with 8 of them");
    r = right, r.x_stride_bytes = SIZE_MAX - 15;
    REFUSE(call(context, &r), "more than any memory");
    r = right, r.side = side;
    REFUSE(call(context, &r), "side_elems is 0");
    r = right, r.side = side, r.side_elems = 1, r.side_elem_bytes = 3;
    REFUSE(call(context, &r), "side_elem_bytes is 3");
    r = right, r.side = side, r.side_elems = 3, r.side_elem_bytes = 1;
    REFUSE(call(context, &r), "multiple of 4");
    r = right, r.side_elems = 1, r.side_elem_bytes = 4;
    REFUSE(call(context, &r), "side is NULL");
    r = right, r.side = (const char *)side + 2, r.side_elems = 1, r.side_elem_bytes = 4;
    REFUSE(call(context, &r), "side is at");
    r = right, r.side = side, r.side_elems = 1, r.side_elem_bytes = 4, r.side_token_stride_bytes = 6;
    REFUSE(call(context, &r), "side strides");
    r = right, r.side = side, r.side_elems = 1, r.side_elem_bytes = 4, r.side_elem_stride_bytes = 2;
    REFUSE(call(context, &r), "side strides");
    r = right, r.side = side, r.side_elems = 1, r.side_elem_bytes = 4, r.side_token_stride_bytes = INT64_MIN;
    REFUSE(call(context, &r), "side_token_stride_bytes is -9223372036854775808");
    r = right, r.side = side, r.side_elems = 8, r.side_elem_bytes = 4, r.side_elem_stride_bytes = INT64_MAX - 3;
    REFUSE(call(context, &r), "side_elem_stride_bytes is 9223372036854775804");
    r = right, r.side = side, r.side_elems = 0xffffffffu, r.side_elem_bytes = 8;
    REFUSE(call(context, &r), "at most 2^24");
}

typedef struct begin_call {
    epx_buffer_t *buffer;
    epx_dispatch_t d;
    epx_handle_t *handle;
} begin_call_t;

static epx_status_t begin_rows(void *context, const epx_rows_t *rows)
{
    begin_call_t *c = context;
    epx_dispatch_t d = c->d;
    d.rows = *rows;
    return epx_dispatch_begin(c->buffer, &d, NULL, &c->handle);
}

static void begin_calls(xt_rank_t *self, epx_buffer_t *b, room_t *r)
{
    epx_handle_t *const untouched = (epx_handle_t *)self;
    epx_handle_t *h = untouched;
    epx_dispatch_t d = right_dispatch(r);
    const epx_dispatch_t right = d;
    REFUSE(epx_dispatch_begin(NULL, &d, NULL, &h), "NULL");
    REFUSE(epx_dispatch_begin(b, NULL, NULL, &h), "NULL");
    REFUSE(epx_dispatch_begin(b, &d, NULL, NULL), "NULL");
    d.size = 1;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "size is 1");
    d = right, d.tokens = TOKENS + 1;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "9 tokens");
    d = right, d.topk_idx = NULL;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "topk_idx is NULL");
    d = right, d.topk_idx = (const char *)r->ids + 1;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "aligned");
    d = right, d.topk_idx_bits = 8;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "topk_idx_bits is 8");
    d = right, d.topk = TOPK + 1;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "topk is 5");
    d = right, d.experts = 0;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "0 experts");
    d = right, d.experts = 5;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "multiple of 2 ranks");
    d = right, d.topk_weights = (const float *)((const char *)r->weights + 2);
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "topk_weights is at");
    d = right, d.topk = 0;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "topk is 0 but topk_idx");
    d = right, d.topk = 0, d.topk_idx = NULL;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "in_rank");
    d = right, d.topk = 0, d.topk_idx = NULL, d.topk_weights = r->weights, d.in_rank = r->mask;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "topk_weights is given");
    d = right, d.topk = 0, d.topk_idx = NULL, d.in_rank = r->mask, d.tokens = TOKENS + 1;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "9 tokens");
    d = right, d.expert_alignment = 1u << 30;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "expert_alignment");
    d = right, d.recv_tokens_max = 0xffffffffu;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "recv_tokens_max");
    d = right, d.sms = -1;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "sms is -1");
    d = right, d.timeout_ms = UINT64_MAX;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "timeout_ms is 18446744073709551615");
    d = right, d.topk = 33;
    REFUSE(epx_dispatch_begin(b, &d, NULL, &h), "topk is 33");
    begin_call_t c = {b, right, untouched};
    rows_calls(self, right.rows, begin_rows, &c);
    epx_received_t received = {.size = sizeof received};
    d = right;
    REFUSE(epx_dispatch(b, &d, NULL, NULL, NULL, &received), "NULL");
    REFUSE(epx_dispatch(b, &d, NULL, NULL, &h, NULL), "NULL");
    REFUSE(epx_dispatch(b, NULL, NULL, NULL, &h, &received), "NULL");
    XT_CHECK(self, h == untouched && c.handle == untouched, "an output was written");
}

static epx_status_t again_rows(void *context, const epx_rows_t *rows)
{
    epx_received_t r = {.size = sizeof r};
    return epx_dispatch_again(context, rows, NULL, NULL, &r);
}

static void end_calls(xt_rank_t *self, epx_handle_t *h, room_t *r)
{
    epx_received_t received = {.size = sizeof received, .rows = 4711};
    epx_counts_t counts = {.size = 2};
    epx_handle_tables_t tables = {.size = 2};
    epx_rows_t rows = {.x = r->x, .row_bytes = ROW};
    epx_place_t place = {.side = r->out};
    epx_combine_t combine = {.size = sizeof combine, .x = r->x, .hidden = ROW / 2, .out = r->out};
    REFUSE(epx_handle_counts(NULL, &counts), "NULL");
    REFUSE(epx_handle_counts(h, NULL), "NULL");
    REFUSE(epx_handle_counts(h, &counts), "size");
    REFUSE(epx_handle_get_tables(NULL, &tables), "NULL");
    REFUSE(epx_handle_get_tables(h, NULL), "NULL");
    REFUSE(epx_handle_get_tables(h, &tables), "size");
    REFUSE(epx_dispatch_end(NULL, NULL, NULL, &received), "NULL");
    REFUSE(epx_dispatch_end(h, NULL, NULL, NULL), "NULL");
    REFUSE(epx_dispatch_end(h, &place, NULL, &received), "place->x is NULL");
    place = (epx_place_t){.x = r->out + 8};
    REFUSE(epx_dispatch_end(h, &place, NULL, &received), "place->x is at");
    place = (epx_place_t){.x = r->out, .side = r->out + 2};
    REFUSE(epx_dispatch_end(h, &place, NULL, &received), "place->side is at");
    place = (epx_place_t){.x = r->out, .topk_idx = (char *)r->ids + 2};
    REFUSE(epx_dispatch_end(h, &place, NULL, &received), "place->topk_idx is at");
    place = (epx_place_t){.x = r->out, .topk_weights = (float *)((char *)r->weights + 1)};
    REFUSE(epx_dispatch_end(h, &place, NULL, &received), "place->topk_weights is at");
    place = (epx_place_t){.x = r->out, .src_token = (int32_t *)((char *)r->ids + 2)};
    REFUSE(epx_dispatch_end(h, &place, NULL, &received), "place->src_token is at");
    REFUSE(epx_dispatch_again(h, &rows, NULL, NULL, &received), "epx_dispatch_end");
    REFUSE(epx_combine(h, &combine, NULL), "epx_dispatch_end");
    XT_CHECK(self, received.rows == 4711, "an output was written");
}

static void combine_calls(xt_rank_t *self, epx_handle_t *h, const epx_received_t *received, room_t *r)
{
    epx_combine_t c = {.size = sizeof c, .x = received->x, .hidden = ROW / 2, .out = r->out};
    const epx_combine_t right = c;
    memset(r->out, 0x33, sizeof r->out);
    REFUSE(epx_combine(NULL, &c, NULL), "NULL");
    REFUSE(epx_combine(h, NULL, NULL), "NULL");
    c.size = 9000;
    REFUSE(epx_combine(h, &c, NULL), "size is 9000");
    c = right, c.dtype = (epx_dtype_t)9;
    REFUSE(epx_combine(h, &c, NULL), "dtype 9");
    c = right, c.hidden = 0;
    REFUSE(epx_combine(h, &c, NULL), "hidden 0");
    c = right, c.hidden = 12;
    REFUSE(epx_combine(h, &c, NULL), "hidden 12");
    c = right, c.hidden = 0xfffffff8u;
    REFUSE(epx_combine(h, &c, NULL), "hidden 4294967288");
    c = right, c.x_stride_bytes = ROW - 16;
    REFUSE(epx_combine(h, &c, NULL), "x_stride_bytes is 48");
    c = right, c.x_stride_bytes = ROW + 4;
    REFUSE(epx_combine(h, &c, NULL), "x_stride_bytes is 68");
    c = right, c.x = NULL;
    REFUSE(epx_combine(h, &c, NULL), "x is NULL");
    c = right, c.x = r->x + 4;
    REFUSE(epx_combine(h, &c, NULL), "x is at");
    c = right, c.out = NULL;
    REFUSE(epx_combine(h, &c, NULL), "out is NULL");
    c = right, c.out = r->out + 2;
    REFUSE(epx_combine(h, &c, NULL), "out is at");
    c = right, c.bias[1] = r->x + 6;
    REFUSE(epx_combine(h, &c, NULL), "bias[1]");
    c = right, c.topk_weights = r->weights;
    REFUSE(epx_combine(h, &c, NULL), "out_topk_weights");
    c = right, c.out_topk_weights = r->out_weights;
    REFUSE(epx_combine(h, &c, NULL), "topk_weights");
    c = right, c.topk_weights = (float *)((char *)r->weights + 2), c.out_topk_weights = r->out_weights;
    REFUSE(epx_combine(h, &c, NULL), "topk_weights is at");
    c = right, c.sms = -2;
    REFUSE(epx_combine(h, &c, NULL), "sms is -2");
    c = right, c.timeout_ms = UINT64_MAX / 1000;
    REFUSE(epx_combine(h, &c, NULL), "timeout_ms is 18446744073709551");
    c = right, c.x_stride_bytes = (size_t)1 << 60; /* times 16 rows is 0: seen as inside a lease */
    REFUSE(epx_combine(h, &c, NULL), "x_stride_bytes is 1152921504606846976");
    XT_CHECK(self, r->out[0] == 0x33, "an output was written");
    XT_OK(self, epx_combine(h, &right, NULL));
}

/* Handles: none left, ended twice, released, released twice. */
static void handle_life(xt_rank_t *self, epx_buffer_t *b, room_t *r)
{
    epx_dispatch_t d = right_dispatch(r);
    epx_handle_t *one = NULL, *two = NULL, *three = (epx_handle_t *)self;
    epx_received_t received = {.size = sizeof received}, more = received;
    epx_counts_t counts = {.size = sizeof counts};
    epx_combine_t c = {.size = sizeof c, .x = r->x, .hidden = ROW / 2, .out = r->out};
    epx_rows_t rows = d.rows;
    if (!XT_OK(self, epx_dispatch_begin(b, &d, NULL, &one)) || !XT_OK(self, epx_dispatch_begin(b, &d, NULL, &two)))
        return;
    epx_status_t status = epx_dispatch_begin(b, &d, NULL, &three);
    XT_CHECK(self, status == EPX_E_BUSY && strstr(epx_error_detail(), "2 handles"), "%s: %s", epx_status_name(status),
             epx_error_detail());
    XT_CHECK(self, three == (epx_handle_t *)self, "an output was written");
    end_calls(self, one, r);
    XT_OK(self, epx_dispatch_end(one, NULL, NULL, &received));
    REFUSE(epx_dispatch_end(one, NULL, NULL, &more), "epx_dispatch_again");
    REFUSE(epx_dispatch_again(one, NULL, NULL, NULL, &more), "NULL");
    REFUSE(epx_dispatch_again(NULL, &rows, NULL, NULL, &more), "NULL");
    REFUSE(epx_dispatch_again(one, &rows, NULL, NULL, NULL), "NULL");
    rows_calls(self, rows, again_rows, one);
    combine_calls(self, one, &received, r);
    XT_OK(self, epx_lease_release(b, received.lease, NULL));
    epx_handle_release(one, NULL);
    epx_handle_release(one, NULL);
    epx_handle_release(NULL, NULL);
    REFUSE(epx_handle_counts(one, &counts), "released");
    REFUSE(epx_dispatch_end(one, NULL, NULL, &more), "released");
    REFUSE(epx_dispatch_again(one, &rows, NULL, NULL, &more), "released");
    REFUSE(epx_combine(one, &c, NULL), "released");
    epx_handle_release(two, NULL); /* begun, never ended: all ranks alike */
}

/* A dispatch by mask has no weights to bring back. */
static void mask_life(xt_rank_t *self, epx_buffer_t *b, room_t *r)
{
    epx_dispatch_t d = right_dispatch(r);
    epx_handle_t *h = NULL;
    epx_received_t received = {.size = sizeof received};
    d.topk = 0, d.topk_idx = NULL, d.in_rank = r->mask;
    memset(r->mask, 1, sizeof r->mask);
    if (!XT_OK(self, epx_dispatch(b, &d, NULL, NULL, &h, &received)))
        return;
    epx_combine_t c = {.size = sizeof c, .x = received.x, .hidden = ROW / 2, .out = r->out};
    c.topk_weights = r->weights;
    c.out_topk_weights = r->out_weights;
    REFUSE(epx_combine(h, &c, NULL), "topk_weights");
    XT_OK(self, epx_lease_release(b, received.lease, NULL));
    epx_handle_release(h, NULL);
}

static void body(xt_rank_t *self)
{
    epx_buffer_t *b = NULL, *other = NULL;
    epx_buffer_config_t c = buffer_config();
    room_t *r = aligned_alloc(64, sizeof *r);
    if (!r)
        exit(3);
    room_init(r);
    small_things(self);
    group_calls(self);
    group_queries(self);
    buffer_calls(self);
    if (!XT_OK(self, epx_buffer_create(self->group, &c, &b)))
        return;
    buffer_queries(self, b);
    still_works(self, b, 1);
    lease_calls(self, b);
    still_works(self, b, 2);
    layout_calls(self, b, r);
    begin_calls(self, b, r);
    still_works(self, b, 3);
    handle_life(self, b, r);
    still_works(self, b, 4);
    mask_life(self, b, r);
    still_works(self, b, 5);
    /* A lease of another buffer is not held here. */
    epx_lease_t lease;
    void *memory;
    if (XT_OK(self, epx_buffer_create(self->group, &c, &other))) {
        XT_OK(self, epx_lease(other, 64, NULL, &lease, &memory));
        REFUSE(epx_lease_release(b, lease, NULL), "not held");
        XT_OK(self, epx_lease_release(other, lease, NULL));
    }
    epx_buffer_destroy(other);
    still_works(self, b, 6);
    epx_buffer_destroy(b);
    free(r);
}

int main(void)
{
    xt_run_t run = {.name = "arguments", .ranks = RANKS, .threads = 1, .body = body, .seed = 1};
    xt_run(&run);
    return xt_done();
}
