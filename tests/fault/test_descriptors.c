/*
 * One rank can have only so many descriptors: all ranks fail, at once and in words, or none does; and nothing is left
 * over. A rank that cannot have a single one has no way to say so, except through an all-gather of the caller's.
 */
#include "common/slowness.h"
#include "common/world.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/clock.h"

enum { LIMIT = 64, DEADLINE_MS = 4000, AT_ONCE_MS = 1500, RANKS = 3, MOST = 40 };

typedef struct scarce {
    int victim, spare;
    bool by_allgather;
} scarce_t;

/* Take all descriptors but `spare`. */
static void take_descriptors(int spare)
{
    struct rlimit limit;
    int last[MOST], fd, count = 0;
    if (getrlimit(RLIMIT_NOFILE, &limit))
        exit(3);
    limit.rlim_cur = LIMIT;
    if (setrlimit(RLIMIT_NOFILE, &limit))
        exit(3);
    while ((fd = open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0)
        last[count++ % MOST] = fd;
    if (count < MOST)
        exit(3);
    for (int i = 0; i < spare; i++)
        close(last[i]);
}

static int spare_descriptors(void)
{
    int fds[LIMIT], count = 0;
    while (count < LIMIT && (fds[count] = open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0)
        count++;
    for (int i = 0; i < count; i++)
        close(fds[i]);
    return count;
}

/* An all-gather through the page that all share: two rounds at most, 1 KiB each. */
typedef struct board {
    atomic_int come[4], gone[4];
    uint8_t room[4][RANKS][1024];
} board_t;

static board_t *board;

typedef struct gathering {
    int rank, round;
} gathering_t;

static int gather(void *context, const void *mine, size_t bytes, void *all)
{
    gathering_t *g = context;
    int round = g->round++;
    if (round >= 4 || bytes > 1024)
        return 1;
    memcpy(board->room[round][g->rank], mine, bytes);
    atomic_fetch_add(&board->come[round], 1);
    for (int i = 0; i < 5000 && atomic_load(&board->come[round]) < RANKS; i++)
        usleep(1000);
    for (int r = 0; r < RANKS; r++)
        memcpy((uint8_t *)all + (size_t)r * bytes, board->room[round][r], bytes);
    return atomic_load(&board->come[round]) < RANKS;
}

static epx_status_t make_group(xt_rank_t *self, const scarce_t *s, epx_group_t **group)
{
    gathering_t g = {.rank = self->rank};
    epx_group_config_t c = {.size = sizeof c, .rank = self->rank, .ranks = RANKS, .backend = EPX_BACKEND_CPU};
    c.timeout_ms = DEADLINE_MS;
    c.threads = 1;
    if (s->by_allgather) {
        c.allgather = gather;
        c.allgather_context = &g;
    } else {
        c.id = &self->world->id[0];
    }
    return epx_group_create(&c, group);
}

static void body(xt_rank_t *self)
{
    const scarce_t *s = self->context;
    epx_group_t *group = NULL;
    epx_buffer_t *buffer = NULL;
    epx_buffer_config_t b = {.size = sizeof b, .lease_bytes = 4096, .reserve_bytes = 4096, .handles_max = 1};
    b.tokens_max = 4;
    if (self->rank == 0 && !s->by_allgather)
        XT_OK(self, epx_unique_id_create(NULL, &self->world->id[0]));
    xt_mark(self, 0);
    xt_wait_mark(self, 0, RANKS);
    if (self->rank == s->victim)
        take_descriptors(s->spare);
    uint64_t start = epx__now_ns();
    const char *where = "group";
    epx_status_t status = make_group(self, s, &group);
    if (status == EPX_OK) {
        where = "buffer";
        status = epx_buffer_create(group, &b, &buffer);
    }
    double ms = (double)(epx__now_ns() - start) / 1e6;
    bool mute = s->spare == 0 && !s->by_allgather && s->victim != 0;
    XT_CHECK(self, status == EPX_OK || epx_error_detail()[0], "%s without words", epx_status_name(status));
    XT_CHECK(self, status == EPX_OK || mute || ms < well_before(DEADLINE_MS, AT_ONCE_MS),
             "spare %d: %s after %.0f ms: %s", s->spare, where, ms, epx_error_detail());
    if (status != EPX_OK)
        atomic_fetch_add(&self->world->note[0], 1);
    xt_mark(self, 1);
    xt_wait_mark(self, 1, RANKS);
    long failed = atomic_load(&self->world->note[0]);
    XT_CHECK(self, failed == 0 || failed == RANKS, "spare %d: %s: %ld ranks have failed: %s", s->spare, where, failed,
             epx_error_detail());
    epx_buffer_destroy(buffer);
    epx_group_destroy(group);
    /* Descriptors of the rendezvous are free again, those of windows when the last peer has let go. */
    if (self->rank == s->victim) {
        for (int i = 0; i < 1000 && spare_descriptors() < s->spare; i++)
            usleep(1000);
        XT_CHECK(self, spare_descriptors() >= s->spare, "spare %d: only %d left", s->spare, spare_descriptors());
        struct rlimit limit;
        getrlimit(RLIMIT_NOFILE, &limit);
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit); /* sanitizers want some when the process ends */
    }
}

int main(void)
{
    long wrong = 0;
    board = mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (board == MAP_FAILED)
        return 3;
    setenv("EPX_LOG", "0", 0);
    for (int by_allgather = 0; by_allgather < 2; by_allgather++) {
        for (int victim = 0; victim < 2; victim++) {
            for (int spare = 0; spare < 16 && wrong < 5; spare++) {
                scarce_t s = {.victim = victim, .spare = spare, .by_allgather = by_allgather};
                char name[64];
                memset(board, 0, sizeof *board);
                snprintf(name, sizeof name, "%d descriptors on rank %d%s", spare, victim,
                         by_allgather ? ", all-gather" : "");
                xt_run_t r = {.name = name, .ranks = RANKS, .processes = true, .no_group = true, .body = body};
                r.quiet = true;
                r.context = &s;
                r.limit_ms = 20000;
                wrong += xt_run(&r);
            }
        }
    }
    return xt_done();
}
