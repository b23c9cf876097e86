/*
 * A rank whose deadline passes while it waits for a rank that is held up itself says by whom: its user must not look at
 * the wrong rank.
 *
 * Two domains of two over loop. Rank 2 stays away. Rank 0 waits for rank 2's message; rank 1, less patient, waits for
 * rank 0's, which comes after that.
 */
#include <stdlib.h>
#include <string.h>

#include "api/names.h"
#include "api/objects.h"
#include "common/world.h"

#include <unistd.h>

enum { TOKENS = 4, ROW = 64, PATIENT_MS = 20000, DEADLINE_MS = 500 };

/* Where a rank says for whom it waits. */
static const uint64_t *waits_word(epx_buffer_t *buffer)
{
    if (epx__buffer_find(&buffer, "test_waits_for") != EPX_OK)
        exit(1);
    const uint8_t *window = buffer->x.window.base;
    return ((const epx__control_t *)(const void *)(window + buffer->x.layout.control_offset))->waits;
}

static bool wait_until_held_up(xt_rank_t *self)
{
    const uint64_t *word = (const uint64_t *)atomic_load(&self->world->note[0]);
    for (int ms = 0; ms < PATIENT_MS / 2 && word && __atomic_load_n(word, __ATOMIC_RELAXED) != 2 + 1; ms++)
        usleep(1000);
    return word && __atomic_load_n(word, __ATOMIC_RELAXED) == 2 + 1;
}

static void body(xt_rank_t *self)
{
    epx_buffer_t *buffer = NULL;
    epx_handle_t *handle = NULL;
    epx_buffer_config_t config = {.size = sizeof config, .tokens_max = TOKENS, .topk_max = 1, .experts_max = 4};
    _Alignas(16) uint8_t x[TOKENS * ROW] = {0};
    int64_t ids[TOKENS] = {0, 1, 2, 3};
    epx_dispatch_t d = {.size = sizeof d,
                        .rows = {.x = x, .row_bytes = ROW},
                        .tokens = TOKENS,
                        .topk_idx = ids,
                        .topk = 1,
                        .experts = 4,
                        .timeout_ms = self->rank == 1 ? DEADLINE_MS : PATIENT_MS};
    bool good = XT_OK(self, epx_buffer_create(self->group, &config, &buffer));
    if (good && self->rank == 0)
        atomic_store(&self->world->note[0], (long)waits_word(buffer));
    xt_mark(self, 0);
    xt_wait_mark(self, 0, self->ranks);
    if (good && self->rank == 1)
        XT_CHECK(self, wait_until_held_up(self), "rank 0 does not say that it waits for rank 2");
    if (good && self->rank != 2) {
        epx_status_t status = epx_dispatch_begin(buffer, &d, NULL, &handle);
        const char *words = epx_error_detail();
        XT_CHECK(self, status == (self->rank == 1 ? EPX_E_TIMEOUT : EPX_E_PEER), "%s: %s", epx_status_name(status),
                 words);
        XT_CHECK(self, strstr(words, "for rank 0: its message") && strstr(words, "; rank 0 waits for rank 2"), "%s",
                 words);
    }
    xt_mark(self, 1);
    xt_wait_mark(self, 1, self->ranks);
    epx_buffer_destroy(buffer);
}

int main(void)
{
    setenv("EPX_NET", "loop", 1);
    xt_run_t run = {.name = "held up itself", .ranks = 4, .ranks_per_domain = 2, .threads = 1, .seed = 1, .body = body};
    xt_run(&run);
    return xt_done();
}
