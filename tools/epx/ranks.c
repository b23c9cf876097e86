/* N ranks as processes or threads; see ranks.h. */
#include "ranks.h"

#include "progress.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

void *ranks_share(size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

void ranks_unshare(void *memory, size_t bytes)
{
    if (memory)
        munmap(memory, bytes);
}

/* ---- what a rank calls ---- */

static void sleep_on(uint32_t *word, uint32_t seen)
{
    struct timespec most = {0, 20 * 1000 * 1000}; /* a wake missed costs 20 ms, and `aborted` is seen that soon */
    syscall(SYS_futex, word, FUTEX_WAIT, seen, &most, NULL, 0);
}

static void wake_all(uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

int rank_barrier(rank_t *rank)
{
    ranks_shared_t *shared = rank->shared;
    uint32_t seen = __atomic_load_n(&shared->generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&shared->arrived, 1, __ATOMIC_ACQ_REL) == (uint32_t)rank->ranks) {
        __atomic_store_n(&shared->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&shared->generation, seen + 1, __ATOMIC_RELEASE);
        wake_all(&shared->generation);
    }
    for (uint32_t spin = 0; __atomic_load_n(&shared->generation, __ATOMIC_ACQUIRE) == seen; spin++) {
        if (__atomic_load_n(&shared->aborted, __ATOMIC_ACQUIRE)) {
            shared->slot[rank->rank].failed = shared->slot[rank->rank].failed ? shared->slot[rank->rank].failed : 2;
            return 1;
        }
        if (spin >= shared->spins)
            sleep_on(&shared->generation, seen);
    }
    return 0;
}

int rank_allgather(void *context, const void *mine, size_t bytes, void *all)
{
    rank_t *rank = context;
    if (bytes > RANKS_GATHER_BYTES)
        return rank_fail(rank, "an all-gather of %zu bytes: at most %d are possible", bytes, RANKS_GATHER_BYTES);
    memcpy(rank->shared->slot[rank->rank].gather, mine, bytes);
    if (rank_barrier(rank))
        return 1;
    for (int i = 0; i < rank->ranks; i++)
        memcpy((char *)all + (size_t)i * bytes, rank->shared->slot[i].gather, bytes);
    return rank_barrier(rank);
}

int rank_fail(rank_t *rank, const char *format, ...)
{
    ranks_slot_t *slot = &rank->shared->slot[rank->rank];
    if (!slot->failed) {
        va_list list;
        va_start(list, format);
        vsnprintf(slot->words, sizeof slot->words, format, list);
        va_end(list);
        slot->failed = 1;
    }
    __atomic_store_n(&rank->shared->aborted, 1, __ATOMIC_RELEASE);
    wake_all(&rank->shared->generation);
    return 1;
}

int rank_fail_epx(rank_t *rank, const char *call, epx_status_t status)
{
    const char *detail = epx_error_detail();
    return rank_fail(rank, "%s: %s: %s", call, epx_status_name(status), detail[0] ? detail : epx_status_text(status));
}

void rank_stage(rank_t *rank, const char *stage, uint32_t total)
{
    if (rank->rank)
        return;
    for (size_t i = 0; i + 1 < sizeof rank->shared->stage;
         i++) { /* the parent may be reading: a mix of two is no harm */
        __atomic_store_n(&rank->shared->stage[i], *stage, __ATOMIC_RELAXED);
        stage += *stage != '\0';
    }
    __atomic_store_n(&rank->shared->done, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&rank->shared->total, total, __ATOMIC_RELAXED);
}

void rank_step(rank_t *rank)
{
    if (!rank->rank)
        __atomic_add_fetch(&rank->shared->done, 1, __ATOMIC_RELAXED);
}

int rank_join(rank_t *rank, const epx_group_config_t *like)
{
    epx_group_config_t config = *like;
    if (rank->rank == 0) { /* the id must be made where rank 0 joins */
        epx_status_t status = epx_unique_id_create(NULL, &rank->shared->id);
        if (status)
            return rank_fail_epx(rank, "epx_unique_id_create", status);
    }
    if (rank_barrier(rank))
        return 1;
    config.size = sizeof config;
    config.rank = rank->rank;
    config.ranks = rank->ranks;
    config.id = &rank->shared->id;
    epx_status_t status = epx_group_create(&config, &rank->group);
    return status ? rank_fail_epx(rank, "epx_group_create", status) : 0;
}

/* ---- the run ---- */

typedef struct run {
    const ranks_config_t *config;
    ranks_shared_t *shared;
    rank_t *rank;
    pthread_t *thread;
    pid_t *child;
    int started, ended;
} run_t;

static int run_rank(rank_t *rank, rank_body_t body)
{
    int failed = body(rank);
    if (failed && !rank->shared->slot[rank->rank].failed)
        rank_fail(rank, "it failed without a word");
    if (rank->group)
        epx_group_destroy(rank->group);
    rank->group = NULL;
    return failed;
}

static rank_body_t thread_body; /* the same for all threads of the one run */

static void *thread_main(void *argument)
{
    run_rank(argument, thread_body);
    return NULL;
}

static int start_rank(run_t *run, int index)
{
    rank_t *rank = &run->rank[index];
    *rank = (rank_t){index, run->config->ranks, run->shared, run->config->user, NULL};
    if (run->config->as_threads)
        return pthread_create(&run->thread[index], NULL, thread_main, rank);
    pid_t parent = getpid();
    pid_t child = fork();
    if (child < 0)
        return errno;
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(1);
        int failed = run_rank(rank, run->config->body);
        fflush(stdout);
        fflush(stderr);
        _exit(failed ? 1 : 0);
    }
    run->child[index] = child;
    return 0;
}

/* A child that ended by a signal or without a word gets words here. */
static void note_child(run_t *run, int index, int status)
{
    if (WIFEXITED(status) && (WEXITSTATUS(status) == 0 || run->shared->slot[index].failed))
        return;
    if (WIFSIGNALED(status))
        rank_fail(&run->rank[index], "killed by signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
    else
        rank_fail(&run->rank[index], "exit code %d without a word", WEXITSTATUS(status));
}

static void reap(run_t *run)
{
    for (int i = 0; i < run->started; i++) {
        int status = 0;
        if (run->config->as_threads) {
            if (run->thread[i] && pthread_tryjoin_np(run->thread[i], NULL) == 0) {
                run->thread[i] = 0;
                run->ended++;
            }
        } else if (run->child[i] && waitpid(run->child[i], &status, WNOHANG) == run->child[i]) {
            run->child[i] = 0;
            run->ended++;
            note_child(run, i, status);
        }
    }
}

/* Children get 5 s to notice that one has failed by themselves (the library tells them); then they are ended. */
static void wait_for_all(run_t *run)
{
    progress_t progress;
    progress_begin(&progress);
    int after_ms = 0;
    while (run->ended < run->started) {
        struct timespec nap = {0, 5 * 1000 * 1000};
        nanosleep(&nap, NULL);
        reap(run);
        char stage[sizeof run->shared->stage];
        for (size_t i = 0; i < sizeof stage; i++)
            stage[i] = __atomic_load_n(&run->shared->stage[i], __ATOMIC_RELAXED);
        progress_show(&progress, stage, __atomic_load_n(&run->shared->done, __ATOMIC_RELAXED),
                      __atomic_load_n(&run->shared->total, __ATOMIC_RELAXED));
        if (!__atomic_load_n(&run->shared->aborted, __ATOMIC_ACQUIRE))
            continue;
        after_ms += 5;
        for (int i = 0; i < run->started && !run->config->as_threads && after_ms > 5000; i++)
            if (run->child[i]) {
                if (!run->shared->slot[i].failed)
                    run->shared->slot[i].failed = 2;
                kill(run->child[i], SIGKILL);
            }
    }
    progress_end(&progress);
}

/* Ranks that complain of the same thing share a line. */
static void print_words(const run_t *run, int index)
{
    const ranks_slot_t *slot = run->shared->slot;
    int same = 0;
    for (int i = 0; i < run->config->ranks; i++) {
        if (slot[i].failed != 1 || strcmp(slot[i].words, slot[index].words) != 0)
            continue;
        if (i < index)
            return;
        same++;
    }
    fprintf(stderr, "epx %s: rank %d", run->config->command, index);
    if (same > 1)
        fprintf(stderr, " (and %d more)", same - 1);
    fprintf(stderr, ": %s\n", slot[index].words);
}

static int report(const run_t *run)
{
    int bad = 0, own = 0;
    for (int i = 0; i < run->config->ranks; i++) {
        bad += run->shared->slot[i].failed != 0;
        own += run->shared->slot[i].failed == 1;
        if (run->shared->slot[i].failed == 1)
            print_words(run, i);
    }
    if (bad > own)
        fprintf(stderr, "epx %s: %d more of the %d ranks stopped because of that\n", run->config->command, bad - own,
                run->config->ranks);
    return bad ? 1 : 0;
}

static int run_all(run_t *run)
{
    fflush(stdout);
    fflush(stderr);
    for (int i = 0; i < run->config->ranks; i++) {
        int error = start_rank(run, i);
        if (error) {
            rank_t *rank = &run->rank[i];
            rank_fail(rank, "could not be started: %s", strerror(error));
            break;
        }
        run->started++;
    }
    wait_for_all(run);
    return report(run);
}

int ranks_run(const ranks_config_t *config)
{
    size_t ranks = (size_t)config->ranks;
    size_t bytes = sizeof(ranks_shared_t) + ranks * sizeof(ranks_slot_t);
    run_t run = {.config = config, .shared = ranks_share(bytes)};
    run.rank = calloc(ranks, sizeof *run.rank);
    run.thread = calloc(ranks, sizeof *run.thread);
    run.child = calloc(ranks, sizeof *run.child);
    int failed = 1;
    if (run.shared && run.rank && run.thread && run.child) {
        run.shared->spins = sysconf(_SC_NPROCESSORS_ONLN) >= config->ranks ? 20000 : 0;
        thread_body = config->body;
        failed = run_all(&run);
    } else {
        fprintf(stderr, "epx %s: no memory for %d ranks\n", config->command, config->ranks);
    }
    free(run.rank);
    free(run.thread);
    free(run.child);
    ranks_unshare(run.shared, bytes);
    return failed;
}
