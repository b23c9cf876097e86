/* Running ranks as threads or processes; see world.h. */
#include "common/world.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PATIENCE_MS = 30000 }; /* with what comes at once, unless the machine is busy */

static long total_passed, total_failed;
static int cases_run, cases_left_out;

/* ---- memory ---- */

static void cpu_put(void *device, const void *host, size_t bytes)
{
    if (bytes)
        memcpy(device, host, bytes);
}
static void cpu_fill(void *device, int byte, size_t bytes)
{
    if (bytes)
        memset(device, byte, bytes);
}
static void *cpu_alloc(size_t bytes)
{
    void *memory = NULL;
    return posix_memalign(&memory, 256, bytes ? bytes : 1) == 0 ? memory : NULL;
}
static epx_stream_t cpu_stream(void)
{
    return NULL;
}

static const xt_memory_t memory_cpu = {EPX_BACKEND_CPU, cpu_alloc,  free, cpu_put, cpu_put,
                                       cpu_fill,        cpu_stream, NULL, NULL,    false};

const xt_memory_t *xt_memory(void)
{
    const char *backend = getenv("EPX_TEST_BACKEND");
    return backend && strcmp(backend, "cuda") == 0 && &xt_memory_cuda ? &xt_memory_cuda : &memory_cpu;
}

/* ---- numbers ---- */

uint64_t xt_hash(uint64_t key)
{
    key += 0x9e3779b97f4a7c15u;
    key = (key ^ key >> 30) * 0xbf58476d1ce4e5b9u;
    key = (key ^ key >> 27) * 0x94d049bb133111ebu;
    return key ^ key >> 31;
}

uint64_t xt_mix(uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
    return xt_hash(xt_hash(xt_hash(xt_hash(a) + b) + c) + d);
}

uint32_t xt_random(xt_rank_t *self, uint32_t below)
{
    self->random = self->random * 6364136223846793005u + 1442695040888963407u;
    return below ? (uint32_t)((self->random >> 32) % below) : 0;
}

static void sleep_ns(uint64_t ns)
{
    struct timespec t = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
    nanosleep(&t, NULL);
}

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000u + (uint64_t)t.tv_nsec / 1000000u;
}

void xt_delay(xt_rank_t *self)
{
    if (self->delay_ns_max && xt_random(self, self->delay_one_in ? self->delay_one_in : 1) == 0)
        sleep_ns(1 + xt_random(self, (uint32_t)self->delay_ns_max));
}

/* ---- counting ---- */

void xt_check(xt_rank_t *self, bool good, const char *file, int line, const char *format, ...)
{
    if (good) {
        atomic_fetch_add_explicit(&self->world->passed, 1, memory_order_relaxed);
        return;
    }
    if (atomic_fetch_add(&self->world->failed, 1) >= 25)
        return;
    char text[1600];
    int n = snprintf(text, sizeof text, "%s:%d: [%s, rank %d of %d] ", file, line, self->name, self->rank, self->ranks);
    va_list args;
    va_start(args, format);
    n += vsnprintf(text + n, sizeof text - (size_t)n - 1, format, args);
    va_end(args);
    n = n < (int)sizeof text - 2 ? n : (int)sizeof text - 2;
    text[n] = '\n';
    if (write(2, text, (size_t)n + 1) < 0) /* one write: lines of processes stay whole */
        return;
}

bool xt_ok(xt_rank_t *self, epx_status_t status, const char *file, int line, const char *call)
{
    xt_check(self, status == EPX_OK, file, line, "%s: %s: %s", call, epx_status_name(status), epx_error_detail());
    return status == EPX_OK;
}

void xt_mark(xt_rank_t *self, int mark)
{
    atomic_fetch_add(&self->world->mark[mark], 1);
}

bool xt_wait_mark(xt_rank_t *self, int mark, int count)
{
    for (uint64_t start = now_ms(); now_ms() - start < PATIENCE_MS; sleep_ns(200000)) {
        if (atomic_load(&self->world->mark[mark]) >= count)
            return true;
    }
    return false;
}

/* ---- groups ---- */

static int gcd(int a, int b)
{
    return b == 0 ? a : gcd(b, a % b);
}

epx_status_t xt_group(xt_rank_t *self, int index, const epx_group_config_t *config, epx_group_t **group)
{
    xt_world_t *w = self->world;
    epx_group_config_t c = {.size = sizeof c};
    const char *per_domain = getenv("EPX_TEST_PER_DOMAIN");
    if (config)
        c = *config;
    if (self->rank == 0 && !atomic_load(&w->id_ready[index])) {
        epx_status_t status = epx_unique_id_create(NULL, &w->id[index]);
        atomic_store(&w->id_ready[index], status == EPX_OK ? 1 : -1);
        if (status != EPX_OK)
            return status;
    }
    for (uint64_t start = now_ms(); atomic_load(&w->id_ready[index]) == 0; sleep_ns(200000)) {
        if (now_ms() - start > PATIENCE_MS)
            return EPX_E_TIMEOUT;
    }
    if (atomic_load(&w->id_ready[index]) < 0)
        return EPX_E_SYSTEM;
    c.size = sizeof c;
    c.rank = self->rank;
    c.ranks = self->ranks;
    c.id = &w->id[index];
    if (!c.backend)
        c.backend = self->memory->backend;
    if (!c.timeout_ms && !getenv("EPX_TIMEOUT_MS"))
        c.timeout_ms = 20000;
    if (!c.ranks_per_domain && per_domain)
        c.ranks_per_domain = gcd(self->ranks, atoi(per_domain) > 0 ? atoi(per_domain) : self->ranks);
    return epx_group_create(&c, group);
}

static bool find_topology(xt_rank_t *self)
{
    epx_group_info_t info = {.size = sizeof info};
    uint8_t reach[XT_RANKS_MAX * XT_RANKS_MAX];
    if (!XT_OK(self, epx_group_get_info(self->group, &info)))
        return false;
    for (int i = 0; i < self->ranks; i++) {
        for (int j = 0; j < self->ranks; j++)
            reach[i * self->ranks + j] = info.domain_of[i] == info.domain_of[j];
    }
    return XT_OK(self, epx__topology_make(self->ranks, reach, 0, &self->topology));
}

/* ---- running ---- */

static void run_rank(const xt_run_t *run, xt_world_t *world, int rank)
{
    xt_rank_t self = {.rank = rank, .ranks = run->ranks, .name = run->name, .world = world, .context = run->context};
    self.random = xt_mix(run->seed, (uint64_t)rank, 1, 2);
    self.memory = xt_memory();
    if (self.memory->enter)
        self.memory->enter(rank);
    if (!run->no_group) {
        epx_group_config_t config = {.threads = run->threads, .timeout_ms = run->timeout_ms};
        config.ranks_per_domain = run->ranks_per_domain;
        if (!XT_OK(&self, xt_group(&self, 0, &config, &self.group)))
            return;
        if (!find_topology(&self)) {
            epx_group_destroy(self.group);
            return;
        }
    }
    run->body(&self);
    epx__topology_fini(&self.topology);
    epx_group_destroy(self.group);
}

typedef struct thread {
    pthread_t id;
    const xt_run_t *run;
    xt_world_t *world;
    int rank;
} thread_t;

static void *thread_main(void *argument)
{
    thread_t *t = argument;
    run_rank(t->run, t->world, t->rank);
    return NULL;
}

static void run_threads(const xt_run_t *run, xt_world_t *world)
{
    thread_t t[XT_RANKS_MAX];
    int started = 0;
    for (int r = 0; r < run->ranks; r++, started++) {
        t[r] = (thread_t){.run = run, .world = world, .rank = r};
        if (pthread_create(&t[r].id, NULL, thread_main, &t[r]) != 0) {
            atomic_fetch_add(&world->failed, 1);
            break;
        }
    }
    for (int r = 0; r < started; r++)
        pthread_join(t[r].id, NULL);
}

static void check_exit(const xt_run_t *run, xt_world_t *world, int rank, int status)
{
    bool allowed = run->may_die >> rank & 1 && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
    if ((WIFEXITED(status) && WEXITSTATUS(status) == 0) || allowed)
        return;
    fprintf(stderr, "%s: rank %d ended with %s %d\n", run->name, rank, WIFSIGNALED(status) ? "signal" : "code",
            WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    atomic_fetch_add(&world->failed, 1);
}

static void run_processes(const xt_run_t *run, xt_world_t *world)
{
    pid_t pid[XT_RANKS_MAX];
    int left = 0, processes = run->processes ? run->ranks : 1; /* 1: all ranks are threads of one child */
    fflush(NULL);
    for (int r = 0; r < processes; r++) {
        pid[r] = fork();
        if (pid[r] == 0) {
            if (run->processes)
                run_rank(run, world, r);
            else
                run_threads(run, world);
            fflush(NULL);
            exit(0); /* exit, not _exit: the leak checker looks */
        }
        left += pid[r] > 0;
        if (pid[r] < 0)
            atomic_fetch_add(&world->failed, 1);
    }
    uint64_t limit = run->limit_ms ? run->limit_ms : 100000;
    for (uint64_t start = now_ms(); left > 0; sleep_ns(1000000)) {
        bool late = now_ms() - start > limit;
        for (int r = 0; r < processes; r++) {
            int status;
            if (pid[r] > 0 && late)
                kill(pid[r], SIGKILL);
            if (pid[r] > 0 && waitpid(pid[r], &status, late ? 0 : WNOHANG) == pid[r]) {
                pid[r] = 0;
                left--;
                if (late) {
                    fprintf(stderr, "%s: rank %d still ran after %llu ms\n", run->name, r, (unsigned long long)limit);
                    atomic_fetch_add(&world->failed, 1);
                } else {
                    check_exit(run, world, r, status);
                }
            }
        }
    }
}

typedef enum kinds { ALL, THREADS, PROCESSES } kinds_t;

/* EPX_TEST_RUNS */
static kinds_t kinds_wanted(void)
{
    const char *text = getenv("EPX_TEST_RUNS");
    if (!text || !text[0])
        return ALL;
    if (strcmp(text, "threads") == 0)
        return THREADS;
    if (strcmp(text, "processes") == 0)
        return PROCESSES;
    fprintf(stderr, "EPX_TEST_RUNS is \"%s\": it can be threads or processes, or not be set\n", text);
    exit(2);
}

long xt_run(const xt_run_t *run)
{
    kinds_t kinds = kinds_wanted();
    if (kinds != ALL && (kinds == PROCESSES) != run->processes) {
        cases_left_out++;
        return 0;
    }
    cases_run++;
    xt_world_t *world = mmap(NULL, sizeof *world, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (world == MAP_FAILED || run->ranks > XT_RANKS_MAX) {
        fprintf(stderr, "%s: cannot run\n", run->name);
        total_failed++;
        return 1;
    }
    uint64_t start = now_ms();
    bool here = !run->processes && (kinds == THREADS || !xt_memory()->apart);
    if (here)
        run_threads(run, world);
    else
        run_processes(run, world);
    long failed = atomic_load(&world->failed), passed = atomic_load(&world->passed);
    total_failed += failed;
    total_passed += passed;
    if (!run->quiet || failed)
        printf("%-40s %2d %s %9ld checks %6ld wrong %6llu ms\n", run->name, run->ranks,
               run->processes ? "processes" : "threads  ", passed + failed, failed,
               (unsigned long long)(now_ms() - start));
    fflush(stdout);
    munmap(world, sizeof *world);
    if (here && xt_memory()->leave)
        xt_memory()->leave();
    return failed;
}

int xt_done(void)
{
    const char *others = kinds_wanted() == THREADS ? "processes" : "threads", *text = getenv("EPX_TEST_RUNS");
    int all = cases_run + cases_left_out;
    if (cases_left_out)
        printf("%s: %d of %d cases, whose ranks are %s: EPX_TEST_RUNS is %s\n", cases_run ? "left out" : "skipped",
               cases_left_out, all, others, text);
    if (cases_left_out && !cases_run)
        return 77;
    printf("%ld checks passed, %ld failed\n", total_passed, total_failed);
    return total_failed != 0 || total_passed == 0;
}
