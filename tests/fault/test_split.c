/* Ranks that disagree on the size of domains, by EPX_RANKS_PER_DOMAIN or by their configurations, are told so, all of
 * them: the variable by name, the configurations by what each says. */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <epx/epx.h>

#include "common/check.h"

enum { RANKS = 2 };

/* The child's exit code: 0 right. Rank 0 makes the id, and keeps what listens for it. */
static int rank_main(int rank, const int pipe_end[2], bool by_config)
{
    epx_unique_id_t id;
    if (rank != 0)
        close(pipe_end[1]); /* or rank 0's end without a word would not be seen */
    if (rank == 0 && (epx_unique_id_create(NULL, &id) != EPX_OK || write(pipe_end[1], &id, sizeof id) != sizeof id))
        return 2;
    if (rank != 0 && read(pipe_end[0], &id, sizeof id) != sizeof id)
        return 3;
    epx_group_t *group = NULL;
    epx_group_config_t c = {.size = sizeof c, .rank = rank, .ranks = RANKS, .id = &id, .backend = EPX_BACKEND_CPU};
    c.timeout_ms = 20000;
    if (by_config)
        c.ranks_per_domain = rank;
    else
        setenv("EPX_RANKS_PER_DOMAIN", rank == 0 ? "2" : "1", 1);
    epx_status_t status = epx_group_create(&c, &group);
    bool right = status == EPX_E_MISMATCH && strstr(epx_error_detail(), "rank 1") &&
                 strstr(epx_error_detail(), by_config ? "\"ranks_per_domain 1\"" : "EPX_RANKS_PER_DOMAIN") &&
                 (!by_config || strstr(epx_error_detail(), "rank 0 \"ranks_per_domain 0"));
    if (!right)
        fprintf(stderr, "rank %d: %s: %s\n", rank, epx_status_name(status), epx_error_detail());
    epx_group_destroy(group);
    return right ? 0 : 1;
}

static void run(bool by_config)
{
    int pipe_end[2];
    pid_t child[RANKS];
    CHECK(pipe(pipe_end) == 0, "pipe");
    for (int r = 0; r < RANKS; r++) {
        child[r] = fork();
        if (child[r] == 0)
            _exit(rank_main(r, pipe_end, by_config));
    }
    close(pipe_end[0]);
    close(pipe_end[1]);
    for (int r = 0; r < RANKS; r++) {
        int how = 0;
        CHECK(waitpid(child[r], &how, 0) == child[r] && how == 0, "rank %d: %x", r, (unsigned)how);
    }
}

int main(void)
{
    run(false);
    run(true);
    return check_done();
}
