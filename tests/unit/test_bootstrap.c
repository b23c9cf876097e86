/* The bootstrap with ranks as threads: all-gather, barrier, messages, notices, and every way to meet. */
#include <limits.h>
#include <string.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/clock.h"
#include "bootstrap/job.h"
#include "bootstrap/socket.h"
#include "common/check.h"
#include "common/gather.h"

#ifdef __SANITIZE_THREAD__
enum { LARGE = 1 << 20 }; /* ten times slower there */
#else
enum { LARGE = 8 << 20 };
#endif

static atomic_int barrier_count;

static uint8_t pattern(int from, int to, uint32_t tag, size_t i)
{
    return (uint8_t)((unsigned)from * 31u + (unsigned)to * 7u + tag * 13u + i * 5u + (i >> 8) * 3u + (i >> 16));
}

/* Large data by words, so that sanitizer builds stay quick; the last odd bytes follow the same rule. */
static uint64_t word(int from, int to, size_t i)
{
    return ((uint64_t)from * 0x9e3779b97f4a7c15u + (uint64_t)to * 0xc2b2ae3d27d4eb4fu + i) * 0x165667b19e3779f9u;
}

static void fill_words(uint8_t *data, size_t bytes, int from, int to)
{
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t value = word(from, to, i);
        memcpy(data + i, &value, bytes - i < 8 ? bytes - i : 8);
    }
}

static size_t wrong_words(const uint8_t *data, size_t bytes, int from, int to)
{
    size_t wrong = 0;
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t value = word(from, to, i);
        wrong += memcmp(data + i, &value, bytes - i < 8 ? bytes - i : 8) != 0;
    }
    return wrong;
}

static void check_allgather(gathered_t *one, size_t bytes)
{
    uint8_t *mine = malloc(bytes + 1), *all = calloc((size_t)one->ranks, bytes + 1);
    fill_words(mine, bytes, one->rank, 0);
    epx_status_t status = epx__bootstrap_allgather(one->bootstrap, mine, bytes, all, 0);
    CHECK(status == EPX_OK, "%s", epx__detail());
    size_t wrong = 0;
    for (int rank = 0; rank < one->ranks; rank++)
        wrong += wrong_words(all + (size_t)rank * bytes, bytes, rank, 0);
    CHECK(wrong == 0, "%zu of %zu words wrong at rank %d", wrong, bytes / 8, one->rank);
    free(mine);
    free(all);
}

static void check_barriers(gathered_t *one, int rounds)
{
    for (int round = 1; round <= rounds; round++) {
        atomic_fetch_add(&barrier_count, 1);
        epx_status_t status = epx__bootstrap_barrier(one->bootstrap, 0);
        CHECK(status == EPX_OK, "%s", epx__detail());
        int seen = atomic_load(&barrier_count);
        CHECK(seen >= round * one->ranks, "round %d: only %d arrivals", round, seen);
        status = epx__bootstrap_barrier(one->bootstrap, 0);
        CHECK(status == EPX_OK, "%s", epx__detail());
    }
}

/* Everybody to everybody, two tags, the later tag received first, two sizes in order on one tag. */
static void check_messages(gathered_t *one)
{
    uint8_t data[600];
    for (int to = 0; to < one->ranks; to++)
        for (uint32_t tag = 1; tag <= 3; tag++) {
            size_t bytes = tag * 200;
            for (size_t i = 0; i < bytes; i++)
                data[i] = pattern(one->rank, to, tag, i);
            CHECK(epx__bootstrap_send(one->bootstrap, to, tag == 3 ? 1 : tag, data, bytes) == EPX_OK, "%s",
                  epx__detail());
        }
    for (int turn = 0; turn < one->ranks; turn++) {
        int from = (one->rank + turn) % one->ranks;
        static const uint32_t order[] = {2, 1, 3};
        for (int k = 0; k < 3; k++) {
            uint32_t tag = order[k];
            size_t bytes = tag * 200, wrong = 0;
            memset(data, 0, sizeof(data));
            epx_status_t status = epx__bootstrap_recv(one->bootstrap, from, tag == 3 ? 1 : tag, data, bytes, 0);
            CHECK(status == EPX_OK, "%s", epx__detail());
            for (size_t i = 0; i < bytes; i++)
                wrong += data[i] != pattern(from, one->rank, tag, i);
            CHECK(wrong == 0, "tag %u from %d at %d: %zu bytes wrong", tag, from, one->rank, wrong);
        }
    }
}

static void check_large(gathered_t *one)
{
    size_t bytes = LARGE + 13;
    int to = (one->rank + 1) % one->ranks, from = (one->rank + one->ranks - 1) % one->ranks;
    uint8_t *out = malloc(bytes), *in = calloc(1, bytes);
    fill_words(out, bytes, one->rank, to);
    CHECK(epx__bootstrap_send(one->bootstrap, to, 9, out, bytes) == EPX_OK, "%s", epx__detail());
    CHECK(epx__bootstrap_recv(one->bootstrap, from, 9, in, bytes, 0) == EPX_OK, "%s", epx__detail());
    size_t wrong = wrong_words(in, bytes, from, one->rank);
    CHECK(wrong == 0, "%zu words wrong", wrong);
    free(out);
    free(in);
}

static void check_sizes(gathered_t *one)
{
    char small[4] = "abc", large[8];
    int to = (one->rank + 1) % one->ranks, from = (one->rank + one->ranks - 1) % one->ranks;
    CHECK(epx__bootstrap_send(one->bootstrap, to, 77, small, sizeof(small)) == EPX_OK);
    CHECK(epx__bootstrap_recv(one->bootstrap, from, 77, large, sizeof(large), 0) == EPX_E_MISMATCH);
    CHECK(strstr(epx__detail(), "4 bytes, not 8") != NULL, "%s", epx__detail());
    CHECK(epx__bootstrap_send(one->bootstrap, to, 77, NULL, 0) == EPX_OK);
    CHECK(epx__bootstrap_recv(one->bootstrap, from, 77, NULL, 0, 0) == EPX_OK, "%s", epx__detail());
    CHECK(epx__bootstrap_recv(one->bootstrap, from, 78, large, 1, 20) == EPX_E_TIMEOUT);
    CHECK(epx__bootstrap_send(one->bootstrap, one->ranks, 1, small, 1) == EPX_E_INVALID);
    CHECK(epx__bootstrap_recv(one->bootstrap, -1, 1, small, 1, 0) == EPX_E_INVALID);
}

typedef struct heard {
    atomic_int count, sum;
} heard_t;

static void hear(void *context, int from, const void *data, size_t bytes)
{
    heard_t *heard = context;
    int value = -1;
    if (bytes == sizeof(value))
        memcpy(&value, data, bytes);
    atomic_fetch_add(&heard->sum, value == from * 3 ? from : 1000);
    atomic_fetch_add(&heard->count, 1);
}

/* Half the ranks listen before the notices are sent, half after: all hear all. */
static void check_notices(gathered_t *one)
{
    heard_t heard = {0};
    int slot = -1, value = one->rank * 3, others = one->ranks - 1;
    bool early = one->rank % 2;
    if (early)
        CHECK(epx__bootstrap_on_notice(one->bootstrap, 5, hear, &heard, &slot) == EPX_OK);
    CHECK(epx__bootstrap_barrier(one->bootstrap, 0) == EPX_OK, "%s", epx__detail());
    if (others <= 16)
        epx__bootstrap_notify(one->bootstrap, 5, &value, sizeof(value));
    CHECK(epx__bootstrap_barrier(one->bootstrap, 0) == EPX_OK, "%s", epx__detail());
    if (!early)
        CHECK(epx__bootstrap_on_notice(one->bootstrap, 5, hear, &heard, &slot) == EPX_OK);
    for (int i = 0; i < 2000 && others <= 16 && atomic_load(&heard.count) < others; i++)
        epx__sleep_ns(1000000);
    if (others <= 16) {
        CHECK(atomic_load(&heard.count) == others, "%d notices", atomic_load(&heard.count));
        CHECK(atomic_load(&heard.sum) == one->ranks * others / 2 - one->rank);
    }
    epx__bootstrap_off_notice(one->bootstrap, slot);
    CHECK(epx__bootstrap_barrier(one->bootstrap, 0) == EPX_OK, "%s", epx__detail());
}

static void everything(gathered_t *one)
{
    CHECK(one->status == EPX_OK, "%s", one->detail);
    if (one->status != EPX_OK)
        return;
    CHECK(epx__bootstrap_rank(one->bootstrap) == one->rank && epx__bootstrap_ranks(one->bootstrap) == one->ranks);
    static const size_t sizes[] = {0, 1, 8, 1000};
    for (int i = 0; i < 4; i++)
        check_allgather(one, sizes[i]);
    check_barriers(one, one->ranks > 16 ? 5 : 50);
    check_messages(one);
    check_sizes(one);
    check_notices(one);
    if (one->ranks <= 5) {
        check_allgather(one, LARGE + 1);
        check_large(one);
    }
    CHECK(!epx__bootstrap_dead(one->bootstrap, one->rank));
    /* All are done before the first leaves: the next check is of what is left over. */
    CHECK(epx__bootstrap_barrier(one->bootstrap, 0) == EPX_OK, "%s", epx__detail());
}

static void all_of(int ranks)
{
    epx_unique_id_t id;
    int64_t live = epx__alloc_live();
    atomic_store(&barrier_count, 0);
    CHECK(epx__unique_id_create(NULL, &id) == EPX_OK, "%s", epx__detail());
    gathered_t *all = gather_make(ranks, &id, 20000, everything, NULL);
    uint64_t start = epx__now_ns();
    gather_run(all, ranks);
    printf("%d ranks: %.0f ms\n", ranks, (double)(epx__now_ns() - start) / 1e6);
    free(all);
    CHECK(epx__alloc_live() == live, "%lld allocations left", (long long)(epx__alloc_live() - live));
}

static void only_barrier(gathered_t *one)
{
    CHECK(one->status == EPX_OK, "%s", one->detail);
    if (one->status == EPX_OK)
        CHECK(epx__bootstrap_barrier(one->bootstrap, 0) == EPX_OK, "%s", epx__detail());
}

/* Several ids at once, joined in another order than made. */
static void several_ids(void)
{
    enum { IDS = 5, RANKS = 3 };
    epx_unique_id_t ids[IDS];
    gathered_t *groups[IDS];
    for (int i = 0; i < IDS; i++)
        CHECK(epx__unique_id_create(i % 2 ? "127.0.0.1" : NULL, &ids[i]) == EPX_OK, "%s", epx__detail());
    for (int i = IDS - 1; i >= 0; i--) {
        groups[i] = gather_make(RANKS, &ids[i], 10000, only_barrier, NULL);
        for (int rank = 0; rank < RANKS; rank++)
            gather_start(&groups[i][rank]);
    }
    for (int i = 0; i < IDS; i++) {
        for (int rank = 0; rank < RANKS; rank++)
            gather_wait(&groups[i][rank]);
        free(groups[i]);
    }
    CHECK(epx__unique_id_create(NULL, &ids[0]) == EPX_OK);
    gathered_t *many = gather_make(128, &ids[0], 20000, only_barrier, NULL);
    gather_run(many, 128);
    free(many);
    for (int repeat = 0; repeat < 20; repeat++) {
        CHECK(epx__unique_id_create(NULL, &ids[0]) == EPX_OK);
        gathered_t *all = gather_make(2, &ids[0], 10000, only_barrier, NULL);
        gather_run(all, 2);
        free(all);
    }
}

typedef struct shared_gather {
    pthread_barrier_t barrier;
    uint8_t room[64 * 1024];
} shared_gather_t;

typedef struct gather_rank {
    shared_gather_t *shared;
    int rank, ranks;
} gather_rank_t;

static int thread_allgather(void *context, const void *mine, size_t bytes, void *all)
{
    gather_rank_t *one = context;
    pthread_barrier_wait(&one->shared->barrier);
    memcpy(one->shared->room + (size_t)one->rank * bytes, mine, bytes);
    pthread_barrier_wait(&one->shared->barrier);
    memcpy(all, one->shared->room, bytes * (size_t)one->ranks);
    return 0;
}

static void by_callback(void)
{
    enum { RANKS = 6 };
    static shared_gather_t shared;
    gather_rank_t ranks[RANKS];
    pthread_barrier_init(&shared.barrier, NULL, RANKS);
    gathered_t *all = gather_make(RANKS, NULL, 10000, only_barrier, NULL);
    for (int rank = 0; rank < RANKS; rank++) {
        ranks[rank] = (gather_rank_t){.shared = &shared, .rank = rank, .ranks = RANKS};
        all[rank].config.allgather = thread_allgather;
        all[rank].config.allgather_context = &ranks[rank];
    }
    gather_run(all, RANKS);
    free(all);
    pthread_barrier_destroy(&shared.barrier);
}

/* The process's variables serve all threads, so the ranks are given and the environment says where. */
static void by_environment(void)
{
    epx_unique_id_t id;
    char root[32];
    CHECK(epx__unique_id_create(NULL, &id) == EPX_OK);
    snprintf(root, sizeof(root), "127.0.0.1:%d", 20000 + (int)getpid() % 12000);
    setenv("EPX_ROOT", root, 1);
    setenv("EPX_ROOT_TOKEN", "a secret of the test", 1);
    for (int repeat = 0; repeat < 3; repeat++) { /* the same port again and again */
        gathered_t *all = gather_make(4, NULL, 10000, only_barrier, NULL);
        gather_run(all, 4);
        free(all);
    }
    unsetenv("EPX_ROOT");
    setenv("RANK", "0", 1);
    setenv("WORLD_SIZE", "3", 1);
    setenv("LOCAL_WORLD_SIZE", "3", 1);
    setenv("MASTER_PORT", "29501", 1);
    char run_id[32];
    snprintf(run_id, sizeof(run_id), "run %d", (int)getpid());
    setenv("TORCHELASTIC_RUN_ID", run_id, 1);
    gathered_t *all = gather_make(3, NULL, 10000, only_barrier, NULL);
    gather_run(all, 3);
    free(all);
    /* And alone with what it says: rank 0 of 3, where nobody else comes. */
    epx__bootstrap_t *bootstrap = NULL;
    epx__bootstrap_config_t config = {.rank = -1, .timeout_ms = 50};
    CHECK(epx__bootstrap_open(&config, &bootstrap) == EPX_E_TIMEOUT && bootstrap == NULL);
    CHECK(strstr(epx__detail(), "rank 1-2") != NULL, "%s", epx__detail());
}

static void clear_environment(void)
{
    static const char *const names[] = {"RANK",
                                        "WORLD_SIZE",
                                        "LOCAL_RANK",
                                        "LOCAL_WORLD_SIZE",
                                        "MASTER_ADDR",
                                        "MASTER_PORT",
                                        "TORCHELASTIC_RUN_ID",
                                        "TORCHELASTIC_RESTART_COUNT",
                                        "OMPI_COMM_WORLD_RANK",
                                        "OMPI_COMM_WORLD_SIZE",
                                        "OMPI_COMM_WORLD_LOCAL_SIZE",
                                        "PMIX_NAMESPACE",
                                        "SLURM_PROCID",
                                        "SLURM_NTASKS",
                                        "SLURM_JOB_ID",
                                        "SLURM_STEP_ID",
                                        "SLURM_STEP_NUM_TASKS",
                                        "SLURM_NNODES",
                                        "SLURM_STEP_NUM_NODES",
                                        "EPX_ROOT",
                                        "EPX_ROOT_TOKEN"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        unsetenv(names[i]);
}

static void launchers(void)
{
    epx__job_t job, other;
    epx__id_t where, elsewhere;
    clear_environment();
    CHECK(epx__job_find(&job) == EPX_OK && !job.launcher && job.rank == 0 && job.ranks == 1);

    setenv("SLURM_PROCID", "2", 1);
    setenv("SLURM_NTASKS", "8", 1);
    CHECK(epx__job_find(&job) == EPX_OK && !job.launcher && job.ranks == 1); /* a batch script is one process */
    setenv("SLURM_STEP_ID", "0", 1);
    setenv("SLURM_JOB_ID", "4711", 1);
    setenv("SLURM_NNODES", "1", 1);
    CHECK(epx__job_find(&job) == EPX_OK && !strcmp(job.launcher, "srun") && job.rank == 2 && job.ranks == 8);
    CHECK(epx__job_rendezvous(&job, &where) == EPX_OK && where.endpoint.port >= 20000 && where.endpoint.port < 32000);
    setenv("SLURM_JOB_ID", "4712", 1);
    CHECK(epx__job_find(&other) == EPX_OK && epx__job_rendezvous(&other, &elsewhere) == EPX_OK);
    CHECK(memcmp(where.token, elsewhere.token, sizeof(where.token)) != 0);
    setenv("SLURM_NNODES", "2", 1);
    CHECK(epx__job_find(&job) == EPX_OK && epx__job_rendezvous(&job, &where) == EPX_E_INVALID);
    CHECK(strstr(epx__detail(), "EPX_ROOT") != NULL, "%s", epx__detail());
    setenv("EPX_ROOT", "10.1.2.3:4567", 1);
    CHECK(epx__job_rendezvous(&job, &where) == EPX_OK && where.endpoint.port == 4567);
    setenv("EPX_ROOT", "10.1.2.3", 1);
    CHECK(epx__job_rendezvous(&job, &where) == EPX_E_INVALID);

    setenv("OMPI_COMM_WORLD_RANK", "1", 1);
    setenv("OMPI_COMM_WORLD_SIZE", "2", 1);
    setenv("PMIX_NAMESPACE", "prterun-host-1@1", 1);
    unsetenv("EPX_ROOT");
    CHECK(epx__job_find(&job) == EPX_OK && !strcmp(job.launcher, "mpirun") && job.rank == 1 && job.ranks == 2);
    CHECK(epx__job_rendezvous(&job, &where) == EPX_OK);

    setenv("RANK", "3", 1);
    setenv("WORLD_SIZE", "4", 1);
    CHECK(epx__job_find(&job) == EPX_OK && !strcmp(job.launcher, "torchrun") && job.rank == 3 && job.ranks == 4);
    CHECK(epx__job_rendezvous(&job, &where) == EPX_E_INVALID); /* neither run id nor port */
    setenv("RANK", "4", 1);
    CHECK(epx__job_find(&job) == EPX_E_INVALID);
    setenv("RANK", "three", 1);
    CHECK(epx__job_find(&job) == EPX_E_INVALID && strstr(epx__detail(), "\"three\""), "%s", epx__detail());
    clear_environment();
}

static void ids_and_words(void)
{
    epx_unique_id_t id, bad;
    epx__id_t decoded;
    char text[EPX__ENDPOINT_TEXT], words[80];
    epx__endpoint_t endpoint;
    CHECK(epx__unique_id_create("127.0.0.1", &id) == EPX_OK);
    CHECK(!epx__id_decode(&id, &decoded) && decoded.endpoint.family == 4 && decoded.endpoint.port);
    for (int i = 0; i < 128; i++) { /* any damage is seen */
        bad = id;
        bad.bytes[i] ^= 1;
        CHECK(epx__id_decode(&bad, &decoded) != NULL, "byte %d", i);
    }
    memset(&bad, 0, sizeof(bad));
    epx__bootstrap_t *bootstrap = NULL;
    epx__bootstrap_config_t config = {.rank = 1, .ranks = 2, .id = &bad, .timeout_ms = 100};
    CHECK(epx__bootstrap_open(&config, &bootstrap) == EPX_E_INVALID && !bootstrap);
    CHECK(epx__unique_id_create("0.0.0.0", &bad) == EPX_E_INVALID);
    CHECK(epx__unique_id_create("localhost", &bad) == EPX_E_INVALID);
    CHECK(epx__unique_id_create("192.0.2.1", &bad) == EPX_E_SYSTEM && strstr(epx__detail(), "192.0.2.1"), "%s",
          epx__detail());
    config = (epx__bootstrap_config_t){.rank = 0, .ranks = 1, .id = &id};
    CHECK(epx__bootstrap_open(&config, &bootstrap) == EPX_OK, "%s", epx__detail());
    epx__bootstrap_close(bootstrap);
    CHECK(epx__bootstrap_open(&config, &bootstrap) == EPX_E_INVALID); /* an id serves once */
    epx__bootstrap_close(NULL);

    CHECK(!epx__endpoint_parse("[::1]:80", &endpoint) && endpoint.family == 6 && endpoint.port == 80);
    epx__endpoint_text(&endpoint, text);
    CHECK(!strcmp(text, "[::1]:80"), "%s", text);
    static const char *const wrong[] = {
        "",       ":",          "1.2.3.4:", "1.2.3.4:0",   "1.2.3.4:65536", "1.2.3.4:99999999999",
        "::1:80", "1.2.3.4:8x", "host:80",  "[1.2.3.4:80", "0.0.0.0:1"};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++)
        CHECK(epx__endpoint_parse(wrong[i], &endpoint) != NULL, "\"%s\"", wrong[i]);
    uint8_t present[2] = {0x01, 0x02};
    epx__wire_missing(present, 2, 14, words, sizeof(words));
    CHECK(!strcmp(words, "1-8, 10-13"), "%s", words);
    epx__wire_missing(present, 2, 16, words, 10);
    CHECK(strlen(words) < 10, "%s", words);
}

/* A deadline may be weeks away (EPX_TIMEOUT_MS): poll(2) is told so, and no less. */
static void far_deadline(void)
{
    int left = epx__milliseconds_until(epx__now_ns() + 1000000000000000ull);
    CHECK(left > 999000000 && left <= 1000000000, "%d ms", left);
    left = epx__milliseconds_until(UINT64_MAX);
    CHECK(left == INT_MAX, "%d ms", left);
}

int main(void)
{
    clear_environment();
    far_deadline();
    ids_and_words();
    launchers();
    all_of(1);
    all_of(2);
    all_of(5);
    all_of(64);
    several_ids();
    by_callback();
    by_environment();
    return check_done();
}
