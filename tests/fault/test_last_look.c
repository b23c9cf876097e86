/*
 * A rank fails in the middle of another's last step: the other must not report success.
 *
 * Rank 1's deadline passes while rank 0 is adding up rank 1's rows, and rank 1's caller overwrites them at once, as it
 * may. Rank 0 finds everything it waited for, so only a last look at the alarm tells it. To be in the middle for sure,
 * the last page of rank 0's output cannot be written: the fault handler sits there until rank 1 is through.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <epx/epx.h>

#include "common/check.h"
#include "common/slowness.h"

/* More bytes than one step adds up, so that the mail is long read when the last step comes. */
enum { RANKS = 2, TOKENS = 96, HIDDEN = 16384, PAGE = 4096, HELD_MS = 30000 };
#define OUT_BYTES (sizeof(float) * TOKENS * HIDDEN)

static epx_unique_id_t id;
static float *out; /* rank 0's; its last page is closed until the handler opens it */
static char *last_page;
static atomic_int faulted, overwritten;

static void pause_ms(long ms)
{
    struct timespec time = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

static void on_fault(int signal, siginfo_t *info, void *context)
{
    (void)context;
    const char *at = info->si_addr;
    if (at < last_page || at >= last_page + PAGE) {
        struct sigaction plain = {.sa_handler = SIG_DFL};
        sigaction(signal, &plain, NULL);
        return; /* a real fault: it comes again */
    }
    atomic_store(&faulted, 1);
    for (int i = 0; i < HELD_MS && !atomic_load(&overwritten); i++)
        pause_ms(1);
    mprotect(last_page, PAGE, PROT_READ | PROT_WRITE);
}

static void combine(int rank, epx_handle_t *handle, const epx_received_t *got)
{
    static float mine[TOKENS * HIDDEN];
    epx_combine_t args = {.size = sizeof args, .x = got->x, .dtype = EPX_FP32, .hidden = HIDDEN};
    args.out = rank == 0 ? out : mine;
    args.timeout_ms = rank == 0 ? 20000 : (uint64_t)well_before(5000, 500); /* time for rank 0 to come there */
    epx_status_t status = epx_combine(handle, &args, NULL);
    if (rank == 1) {
        CHECK(status == EPX_E_TIMEOUT, "rank 1's deadline: %s: %s", epx_status_name(status), epx_error_detail());
        CHECK(atomic_load(&faulted), "rank 0 was not in the middle");
        memset(got->x, 0xff, OUT_BYTES);
        atomic_store(&overwritten, 1);
        return;
    }
    int wrong = 0;
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        wrong += out[i] != (float)i;
    CHECK(status == EPX_E_PEER, "rank 0 says %s with %d wrong values", epx_status_name(status), wrong);
    CHECK(wrong > 0, "rank 1's rows were not overwritten while they were read: this test looked at nothing");
}

static void *rank_main(void *argument)
{
    int rank = argument != NULL;
    epx_group_config_t who = {.size = sizeof who, .rank = rank, .ranks = RANKS, .id = &id};
    who.backend = EPX_BACKEND_CPU;
    who.threads = 1;
    epx_buffer_config_t room = {.size = sizeof room, .lease_bytes = 16 << 20, .reserve_bytes = 1 << 20};
    epx_group_t *group = NULL;
    epx_buffer_t *buffer = NULL;
    epx_handle_t *handle = NULL;
    static float x[RANKS][TOKENS * HIDDEN];
    int64_t experts[TOKENS];
    for (int t = 0; t < TOKENS; t++)
        experts[t] = 1 - rank; /* the other rank's */
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        x[rank][i] = (float)i;
    epx_dispatch_t dispatch = {.size = sizeof dispatch, .tokens = TOKENS, .topk_idx = experts, .topk = 1, .experts = 2};
    dispatch.rows.x = x[rank];
    dispatch.rows.row_bytes = HIDDEN * sizeof(float);
    epx_received_t got = {.size = sizeof got};
    epx_status_t status = epx_group_create(&who, &group);
    if (status == EPX_OK)
        status = epx_buffer_create(group, &room, &buffer);
    if (status == EPX_OK)
        status = epx_dispatch(buffer, &dispatch, NULL, NULL, &handle, &got);
    CHECK(status == EPX_OK, "rank %d: %s", rank, epx_error_detail());
    if (status == EPX_OK)
        combine(rank, handle, &got);
    epx_buffer_destroy(buffer);
    epx_group_destroy(group);
    return NULL;
}

int main(void)
{
    out = mmap(NULL, OUT_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    last_page = (char *)out + OUT_BYTES - PAGE;
    if (out != MAP_FAILED)
        mprotect(last_page, PAGE, PROT_NONE);
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, NULL);
    CHECK(out != MAP_FAILED && epx_unique_id_create(NULL, &id) == EPX_OK, "set-up: %s", epx_error_detail());
    pthread_t thread[RANKS];
    for (int r = 0; r < RANKS; r++)
        pthread_create(&thread[r], NULL, rank_main, r ? &id : NULL);
    for (int r = 0; r < RANKS; r++)
        pthread_join(thread[r], NULL);
    return check_done();
}
