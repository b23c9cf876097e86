/*
 * A rank whose deadline passes while it waits for a rank that is held up itself says by whom: its user must not look at
 * the wrong rank.
 *
 * Two domains of two over loop. Rank 2 stays away. Rank 0 waits for rank 2's message; rank 1, less patient, waits for
 * rank 0's, which comes after that.
 */
#include <stdlib.h>
#include <string.h>

#include "common/slowness.h"
#include "common/world.h"

enum { TOKENS = 4, ROW = 64, PATIENT_MS = 10000 };

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
                        .timeout_ms = self->rank == 1 ? (uint64_t)well_before(PATIENT_MS, 700) : PATIENT_MS};
    bool good = XT_OK(self, epx_buffer_create(self->group, &config, &buffer));
    xt_mark(self, 0);
    xt_wait_mark(self, 0, self->ranks);
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
