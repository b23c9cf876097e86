/* Failures in words, deadlines, counted allocations, environment, and the arena against a plain model. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/alloc.h"
#include "base/arena.h"
#include "base/clock.h"
#include "base/env.h"
#include "base/fail.h"
#include "base/log.h"
#include "common/check.h"

static void *other_thread(void *unused)
{
    (void)unused;
    CHECK(!epx__detail()[0], "words of another thread: %s", epx__detail());
    epx__fail(EPX_E_BUSY, "mine");
    return NULL;
}

static epx_status_t passes_on(epx_status_t status)
{
    EPX__TRY(status);
    return EPX_E_DATA;
}

static void words(void)
{
    pthread_t thread;
    CHECK(epx__fail(EPX_E_PEER, "rank %d, %s", 3, "gone") == EPX_E_PEER);
    CHECK(!strcmp(epx__detail(), "rank 3, gone"), "%s", epx__detail());
    pthread_create(&thread, NULL, other_thread, NULL);
    pthread_join(thread, NULL);
    epx__fail(EPX_E_INVALID, "around [%s]", epx__detail());
    CHECK(!strcmp(epx__detail(), "around [rank 3, gone]"), "%s", epx__detail());
    epx__detail_set(epx__detail() + 7);
    CHECK(!strcmp(epx__detail(), "[rank 3, gone]"), "%s", epx__detail());
    epx__detail_set(NULL);
    CHECK(!epx__detail()[0]);
    char *large = malloc(3000);
    memset(large, 'x', 2999);
    large[2999] = '\0';
    epx__fail(EPX_E_INVALID, "%s", large);
    CHECK(strlen(epx__detail()) == EPX__DETAIL_BYTES - 1);
    epx__detail_set(large);
    CHECK(strlen(epx__detail()) == EPX__DETAIL_BYTES - 1);
    epx__log(EPX__LOG_DEBUG, "%s", large);
    free(large);
    CHECK(!strcmp(epx__status_name(EPX_E_TIMEOUT), "EPX_E_TIMEOUT"));
    CHECK(!strcmp(epx__status_name((epx_status_t)99), "EPX_E_?"));
    for (int code = 0; code <= EPX_E_DATA; code++)
        CHECK(epx__status_text((epx_status_t)code)[0] && strcmp(epx__status_name((epx_status_t)code), "EPX_E_?"));
    CHECK(passes_on(EPX_E_NET) == EPX_E_NET && passes_on(EPX_OK) == EPX_E_DATA);
}

static void clock_and_deadlines(void)
{
    uint64_t before = epx__now_ns();
    epx__deadline_t deadline = epx__deadline_ms(40);
    epx__sleep_ns(50000000);
    CHECK(epx__now_ns() - before >= 50000000u);
    CHECK(epx__deadline_waited_ns(&deadline) == 0);
    CHECK(!epx__deadline_passed(&deadline)); /* it starts here, not when it was made */
    uint64_t left = epx__deadline_left_ms(&deadline);
    CHECK(left <= 40, "%llu ms left", (unsigned long long)left);
    epx__deadline_t hour = epx__deadline_ms(3600000);
    CHECK(!epx__deadline_passed(&hour) && !epx__deadline_passed(&hour));
    left = epx__deadline_left_ms(&hour);
    CHECK(left >= 1800000 && left <= 3600000, "%llu ms left", (unsigned long long)left);
    epx__sleep_ns(45000000);
    CHECK(epx__deadline_passed(&deadline) && epx__deadline_left_ms(&deadline) == 0);
    CHECK(epx__deadline_waited_ns(&deadline) >= 45000000u);
    epx__deadline_t none = epx__deadline_ms(0);
    CHECK(epx__deadline_passed(&none) && epx__deadline_left_ms(&none) == 0);
}

static void allocations(void)
{
    int64_t live = epx__alloc_live();
    uint8_t *zeros = epx__calloc(100, 3);
    void *nothing = epx__calloc(0, 8);
    char *copy = epx__strdup("copied");
    CHECK(zeros && nothing && copy && !strcmp(copy, "copied"));
    for (int i = 0; i < 300; i++)
        CHECK(zeros[i] == 0);
    CHECK(epx__alloc_live() == live + 3);
    epx__free(zeros);
    epx__free(nothing);
    epx__free(copy);
    epx__free(NULL);
    CHECK(epx__alloc_live() == live);
    CHECK(epx__calloc(SIZE_MAX / 2, 3) == NULL && epx__alloc_live() == live);

    uint64_t count = epx__alloc_count();
    for (int sticky = 0; sticky < 2; sticky++) {
        epx__alloc_fail_at(3, sticky);
        for (int i = 1; i <= 5; i++) {
            void *memory = epx__calloc(1, 1);
            CHECK((memory == NULL) == (i == 3 || (sticky && i > 3)), "sticky %d, allocation %d", sticky, i);
            epx__free(memory);
        }
        epx__alloc_fail_at(0, 0);
        CHECK(!epx__alloc_fault());
    }
    CHECK(epx__alloc_count() == count + 12);
    epx__alloc_fail_at(1, 0);
    CHECK(epx__strdup("x") == NULL);
    epx__alloc_fail_at(1, 0);
    CHECK(epx__alloc_fault() && !epx__alloc_fault());
    epx__alloc_fail_at(0, 0);
    CHECK(epx__alloc_live() == live);
}

static void environment(void)
{
    uint64_t value = 1;
    unsetenv("EPX_TIMEOUT_MS");
    unsetenv("EPX_THREADS");
    CHECK(epx__env_value(EPX__ENV_TIMEOUT_MS) == NULL && !strcmp(epx__env_text(EPX__ENV_TIMEOUT_MS), "30000"));
    CHECK(epx__env_u64(EPX__ENV_TIMEOUT_MS, 1, 100000, 5, &value) == EPX_OK && value == 30000);
    CHECK(epx__env_text(EPX__ENV_THREADS) == NULL);
    CHECK(epx__env_u64(EPX__ENV_THREADS, 1, 10, 5, &value) == EPX_OK && value == 5);
    setenv("EPX_THREADS", "", 1);
    CHECK(epx__env_value(EPX__ENV_THREADS) == NULL);
    setenv("EPX_THREADS", "10", 1);
    CHECK(epx__env_u64(EPX__ENV_THREADS, 1, 10, 5, &value) == EPX_OK && value == 10);
    static const char *const wrong[] = {"0", "11", "-1", " 3", "3 ", "0x3", "3.0", "18446744073709551617", "three"};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        setenv("EPX_THREADS", wrong[i], 1);
        value = 77;
        CHECK(epx__env_u64(EPX__ENV_THREADS, 1, 10, 5, &value) == EPX_E_INVALID && value == 77, "\"%s\"", wrong[i]);
        CHECK(strstr(epx__detail(), "EPX_THREADS") && strstr(epx__detail(), wrong[i]), "%s", epx__detail());
    }
    setenv("EPX_THREADS", "18446744073709551615", 1);
    CHECK(epx__env_u64(EPX__ENV_THREADS, 0, UINT64_MAX, 5, &value) == EPX_OK && value == UINT64_MAX);
    unsetenv("EPX_THREADS");
    for (int i = 0; i < EPX__ENV_COUNT; i++) {
        const epx__env_info_t *info = epx__env_info((epx__env_t)i);
        CHECK(info && !strncmp(info->name, "EPX_", 4) && info->meaning[0]);
    }
    CHECK(!epx__env_info(EPX__ENV_COUNT) && !epx__env_value(EPX__ENV_COUNT) && !epx__env_text(EPX__ENV_COUNT));
}

static void choices(void)
{
    static const char *const words[] = {"auto", "fd", "fabric", NULL};
    static const struct {
        const char *text;
        int place; /* -1: refused */
    } cases[] = {{"", 0}, {"auto", 0}, {"fd", 1}, {"fabric", 2}, {"Fabric", -1}, {"fd ", -1}, {"f", -1}, {"fdd", -1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int place = 77, want = cases[i].place;
        setenv("EPX_CUDA_HANDLES", cases[i].text, 1);
        epx_status_t status = epx__env_choice(EPX__ENV_CUDA_HANDLES, words, &place);
        CHECK((status == EPX_OK) == (want >= 0) && place == (want < 0 ? 77 : want), "\"%s\" is %d", cases[i].text,
              place);
        CHECK(want >= 0 || (strstr(epx__detail(), "EPX_CUDA_HANDLES is \"") && strstr(epx__detail(), cases[i].text) &&
                            strstr(epx__detail(), "auto, fd or fabric")),
              "%s", epx__detail());
    }
    unsetenv("EPX_CUDA_HANDLES");
    int place = 77;
    CHECK(epx__env_choice(EPX__ENV_CUDA_HANDLES, words, &place) == EPX_OK && place == 0, "unset is %d", place);
}

/* ---- the arena against an array that says for each unit who has it -------------------------------- */

enum { UNITS = 200, ALIGN = 64, PIECES = 40 };

typedef struct model {
    int owner[UNITS]; /* 0 is free */
} model_t;

static size_t model_first_fit(const model_t *model, size_t units)
{
    size_t run = 0;
    for (size_t i = 0; i < UNITS; i++) {
        run = model->owner[i] ? 0 : run + 1;
        if (run == units)
            return i + 1 - units;
    }
    return UNITS;
}

static size_t model_largest(const model_t *model)
{
    size_t run = 0, largest = 0;
    for (size_t i = 0; i < UNITS; i++) {
        run = model->owner[i] ? 0 : run + 1;
        largest = run > largest ? run : largest;
    }
    return largest;
}

/* The pieces tile the memory, say what the model says, and free neighbours are joined. */
static void check_tiling(const epx__arena_t *arena, const model_t *model)
{
    size_t at = 0;
    for (uint32_t i = 0; i < arena->count; i++) {
        const epx__arena_piece_t *piece = &arena->pieces[i];
        CHECK(piece->offset == at && piece->bytes > 0 && piece->bytes % ALIGN == 0);
        CHECK(i == 0 || piece->used || arena->pieces[i - 1].used, "free neighbours at %zu", at);
        for (size_t unit = at / ALIGN; unit < (at + piece->bytes) / ALIGN; unit++)
            CHECK((model->owner[unit] != 0) == piece->used, "unit %zu", unit);
        at += piece->bytes;
    }
    CHECK(at == UNITS * ALIGN && arena->count <= arena->capacity);
    CHECK(epx__arena_largest(arena) == model_largest(model) * ALIGN);
}

static void arena_against_model(unsigned seed)
{
    epx__arena_t arena;
    model_t model = {{0}};
    size_t offsets[UNITS], units[UNITS];
    int held = 0, full = 0, none = 0, owner = 0;
    srand(seed);
    CHECK(epx__arena_init(&arena, UNITS * ALIGN + 63, ALIGN, PIECES) == EPX_OK);
    for (int turn = 0; turn < 3000; turn++) {
        bool take = held == 0 || (rand() % 100) < (turn % 600 < 300 ? 65 : 35);
        if (take) {
            size_t bytes = 1 + (size_t)rand() % (rand() % 5 ? 3 * ALIGN : 40 * ALIGN), offset = SIZE_MAX;
            size_t need = (bytes + ALIGN - 1) / ALIGN, fit = model_first_fit(&model, need);
            epx_status_t status = epx__arena_take(&arena, bytes, &offset);
            if (status != EPX_OK) {
                CHECK(status == EPX_E_BUSY && offset == SIZE_MAX && epx__detail()[0]);
                CHECK(fit == UNITS || arena.count == arena.capacity, "room at unit %zu, and refused", fit);
                full += arena.count == arena.capacity;
                none += fit == UNITS;
                continue;
            }
            CHECK(offset % ALIGN == 0 && (offset / ALIGN == fit || arena.count >= PIECES - 1), "%zu, not %zu",
                  offset / ALIGN, fit);
            owner++;
            for (size_t i = 0; i < need; i++) {
                CHECK(offset / ALIGN + i < UNITS && !model.owner[offset / ALIGN + i], "handed out twice");
                model.owner[offset / ALIGN + i] = owner;
            }
            const epx__arena_piece_t *piece = epx__arena_find(&arena, offset + bytes - 1, 1);
            CHECK(piece && piece->offset == offset && epx__arena_find(&arena, offset, need * ALIGN) == piece);
            CHECK(!epx__arena_find(&arena, offset, need * ALIGN + 1));
            offsets[held] = offset;
            units[held++] = need;
        } else {
            int which = rand() % held;
            epx__arena_give(&arena, offsets[which]);
            CHECK(!epx__arena_find(&arena, offsets[which], 1));
            for (size_t i = 0; i < units[which]; i++)
                model.owner[offsets[which] / ALIGN + i] = 0;
            offsets[which] = offsets[--held];
            units[which] = units[held];
        }
        check_tiling(&arena, &model);
    }
    CHECK(full > 0 && none > 0, "seed %u: %d refusals for pieces, %d for room", seed, full, none);
    while (held)
        epx__arena_give(&arena, offsets[--held]);
    CHECK(arena.count == 1 && epx__arena_largest(&arena) == UNITS * ALIGN);
    epx__arena_fini(&arena);
}

static void arena_edges(void)
{
    epx__arena_t arena;
    size_t offset = 7;
    int64_t live = epx__alloc_live();
    CHECK(epx__arena_init(&arena, 100, 48, 4) == EPX_E_INVALID);
    CHECK(epx__arena_init(&arena, 100, 0, 4) == EPX_E_INVALID);
    CHECK(epx__arena_init(&arena, 100, 64, 0) == EPX_E_INVALID);
    epx__alloc_fail_at(1, 0);
    CHECK(epx__arena_init(&arena, 100, 64, 4) == EPX_E_NOMEM);
    epx__alloc_fail_at(0, 0);
    CHECK(epx__arena_init(&arena, 10, 64, 4) == EPX_OK); /* no room at all */
    CHECK(epx__arena_take(&arena, 1, &offset) == EPX_E_BUSY && offset == 7 && epx__arena_largest(&arena) == 0);
    CHECK(!epx__arena_find(&arena, 0, 1));
    epx__arena_fini(&arena);
    CHECK(epx__arena_init(&arena, 256, 64, 8) == EPX_OK);
    CHECK(epx__arena_take(&arena, SIZE_MAX, &offset) == EPX_E_BUSY && epx__arena_take(&arena, SIZE_MAX - 62, &offset));
    CHECK(epx__arena_take(&arena, 0, &offset) == EPX_OK && offset == 0); /* nothing still has a place of its own */
    CHECK(epx__arena_take(&arena, 192, &offset) == EPX_OK && offset == 64);
    epx__arena_give(&arena, 65); /* no piece begins there: told in the log, nothing done */
    epx__arena_give(&arena, 4096);
    CHECK(epx__arena_find(&arena, 64, 192) && !epx__arena_find(&arena, SIZE_MAX, 1) &&
          !epx__arena_find(&arena, 64, SIZE_MAX));
    epx__arena_give(&arena, 64);
    epx__arena_give(&arena, 64);
    CHECK(epx__arena_largest(&arena) == 192);
    epx__arena_fini(&arena);
    CHECK(epx__alloc_live() == live);
}

int main(void)
{
    setenv("EPX_LOG", "0", 0);
    words();
    clock_and_deadlines();
    allocations();
    environment();
    choices();
    for (unsigned seed = 1; seed <= 8; seed++)
        arena_against_model(seed);
    arena_edges();
    return check_done();
}
