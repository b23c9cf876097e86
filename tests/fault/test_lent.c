/*
 * The network reads the caller's rows where they are. When the operation fails in the middle, it must let go of them
 * before the call returns: the caller may free them then.
 *
 * Rank 1, of another domain, is stopped while 64 MB are on their way to it over tcp. Rank 0's deadline passes; it gives
 * the memory back to the system, looks that nothing can read it any more, and destroys its buffer in bounded time.
 * On a busy machine the rows may all have come before rank 1 stops: then once more.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "algo/rails.h"
#include "api/names.h"
#include "api/objects.h"
#include "base/clock.h"
#include "base/fail.h"
#include "common/check.h"
#include "common/slowness.h"
#include "common/world.h"

enum { TOKENS = 4096, ROW = 16384, TRIES = 20 };
#define BYTES ((size_t)TOKENS * ROW)

static atomic_int *caught; /* shared: rank 1 was stopped in the middle */

static const epx__rails_t *rails_of(xt_rank_t *self, epx_buffer_t *buffer)
{
    XT_OK(self, epx__buffer_find(&buffer, "test_lent"));
    return buffer->x.net;
}

/* As soon as the first of the chunks has come. */
static void *stop_in_the_middle(void *argument)
{
    const epx__rails_t *rails = argument;
    const uint64_t *chunks = epx__rails_channel(rails, 0, EPX__RAIL_DATA)->signals;
    epx__deadline_t deadline = epx__deadline_ms(20000);
    while (epx_ld_acquire_sys_u64(chunks) == 0 && !epx__deadline_passed(&deadline))
        epx__sleep_ns(50000);
    raise(SIGSTOP);
    return NULL;
}

static void failed(xt_rank_t *self, epx_buffer_t *buffer, epx_status_t status, void *x)
{
    XT_CHECK(self, status == EPX_E_TIMEOUT, "rank 1 is stopped: %s: %s", epx_status_name(status), epx_error_detail());
    const epx__rails_t *rails = rails_of(self, buffer);
    munmap(x, BYTES);
    XT_CHECK(self, rails->channels->proxy[0].halted && !rails->channels->proxy[0].net,
             "the endpoint is open still, and may read what the caller has freed");
    uint64_t begun = epx__now_ns();
    epx_buffer_destroy(buffer);
    uint64_t took_ms = (epx__now_ns() - begun) / 1000000;
    XT_CHECK(self, (double)took_ms < 2000 * slowness(), "destroying took %llu ms", (unsigned long long)took_ms);
}

static void body(xt_rank_t *self)
{
    epx_buffer_t *buffer = NULL;
    epx_handle_t *handle = NULL;
    epx_buffer_config_t config = {.size = sizeof config,
                                  .lease_bytes = 2 * BYTES,
                                  .tokens_max = TOKENS,
                                  .topk_max = 1,
                                  .experts_max = 2,
                                  .timeout_ms = 20000};
    static int64_t ids[TOKENS];
    void *x = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    pthread_t thread;
    for (int t = 0; t < TOKENS; t++)
        ids[t] = 1; /* all to rank 1 */
    epx_dispatch_t d = {.size = sizeof d,
                        .rows = {.x = x, .row_bytes = ROW, .x_stride_bytes = ROW},
                        .tokens = self->rank == 0 ? TOKENS : 0,
                        .topk_idx = ids,
                        .topk = 1,
                        .experts = 2,
                        .timeout_ms = 2000};
    epx_received_t got = {.size = sizeof got};
    atomic_store(&self->world->note[self->rank], getpid());
    if (!XT_OK(self, epx_buffer_create(self->group, &config, &buffer)) ||
        !XT_OK(self, epx_dispatch_begin(buffer, &d, NULL, &handle)))
        return;
    if (self->rank == 1)
        pthread_create(&thread, NULL, stop_in_the_middle, (void *)rails_of(self, buffer));
    epx_status_t status = epx_dispatch_end(handle, NULL, NULL, &got);
    if (self->rank == 0) {
        atomic_store(caught, status != EPX_OK);
        if (status != EPX_OK)
            failed(self, buffer, status, x);
        kill((pid_t)atomic_load(&self->world->note[1]), SIGKILL);
    } else {
        pthread_join(thread, NULL); /* stopped there, if the rows came that fast */
    }
}

int main(void)
{
    epx__net_config_t config = {.address = "127.0.0.1", .peers_max = 1, .puts_max = 16, .notices_max = 16};
    epx__net_t *net = NULL;
    if (getenv("EPX_TEST_THREADS")) {
        printf("skipped: a rank is stopped, which takes a process of its own\n");
        return 77;
    }
    if (epx__net_open("ofi:tcp", &config, &net) != EPX_OK) {
        printf("skipped: ofi:tcp is not here: %s\n", epx__detail());
        return 77;
    }
    epx__net_close(net);
    caught = mmap(NULL, sizeof *caught, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (caught == MAP_FAILED)
        return 1;
    setenv("EPX_NET", "ofi:tcp", 1);
    xt_run_t run = {.name = "stopped in the middle",
                    .ranks = 2,
                    .processes = true,
                    .ranks_per_domain = 1,
                    .may_die = 2,
                    .timeout_ms = 5000,
                    .limit_ms = 30000,
                    .seed = 1,
                    .body = body};
    for (int i = 0; i < TRIES && !atomic_load(caught); i++)
        xt_run(&run);
    if (!atomic_load(caught)) {
        printf("in %d tries all rows came before rank 1 stopped\n", TRIES);
        return 1;
    }
    return xt_done();
}
