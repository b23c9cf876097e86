/*
 * Port channels over every network of the build: order, windows, credit, adds, several producers, faults.
 *
 *     test_channel             loop, sim with many seeds, ofi:tcp and ofi:shm where they are
 *     test_channel SPEC [TIMEOUT_MS [FULL]]
 *                              that one; FULL 0: two ranks, fewer rows
 */
#include "common/address.h"
#include "common/channels.h"
#include "common/descriptors.h"
#include "common/slowness.h"

#include <signal.h>
#include <stdio.h>
#include <sys/resource.h>
#include <time.h>

#include "base/fail.h"

static const char *spec;
static uint64_t timeout_ms = 30000; /* of what comes at once, unless the machine is busy */

static epx__channels_config_t plain(uint32_t channels, uint32_t window, uint32_t fifo)
{
    return (epx__channels_config_t){.net = spec,
                                    .address = test_address(),
                                    .channels = channels,
                                    .window = window,
                                    .fifo_slots = fifo,
                                    .timeout_ms = timeout_ms};
}

/* ---- rows through a ring of places, numbered, both ways, with a reader that gives places back ---- */

enum { PLACES = 4, ROW = 192 };

typedef struct ring_job {
    uint32_t rows;
    int puts_signal; /* put + signal in turns with put_signal */
} ring_job_t;

static void make_row(unsigned char *row, int from, uint32_t channel, uint64_t number)
{
    uint64_t tag = number * 1000003u + channel * 101u + (uint64_t)from;
    memcpy(row, &tag, 8);
    for (int i = 8; i < ROW; i++)
        row[i] = (unsigned char)(tag * 31 + (uint64_t)i * 7);
}

static int row_is(const unsigned char *row, int from, uint32_t channel, uint64_t number)
{
    unsigned char want[ROW];
    make_row(want, from, channel, number);
    return memcmp(row, want, ROW) == 0;
}

/* Memory of a rank: [peer][channel][PLACES] rows that come, then the same of rows that go. A signal of the peer's on
 * channel 2k is a row, on 2k + 1 a place that is free again. */
static void ring_body(net_rank_t *self)
{
    const ring_job_t *job = self->argument;
    int ranks = self->world->ranks;
    uint32_t pairs = self->channels->channels / 2;
    size_t half = (size_t)ranks * pairs * PLACES * ROW;
    uint64_t sent[NET_RANKS_MAX][4] = {{0}}, read[NET_RANKS_MAX][4] = {{0}};
    uint64_t left = (uint64_t)(ranks - 1) * pairs * job->rows * 2;
    uint32_t turn = 0;
    epx__deadline_t deadline = epx__deadline_ms(timeout_ms);
    while (left) {
        bool moved = false;
        for (int p = 0; p < ranks; p++)
            for (uint32_t k = 0; k < pairs && p != self->rank; k++) {
                const epx_port_channel_t *rows = net_port(self, p, 2 * k), *frees = net_port(self, p, 2 * k + 1);
                uint64_t n = sent[p][k];
                if (n < job->rows && (n < PLACES || epx_port_reached(frees->signals, n - PLACES + 1))) {
                    size_t place = n % PLACES * ROW;
                    size_t from = half + ((size_t)p * pairs + k) * PLACES * ROW + place;
                    size_t to = ((size_t)self->rank * pairs + k) * PLACES * ROW + place;
                    make_row((unsigned char *)self->memory + from, self->rank, k, n);
                    epx_status_t status;
                    if (job->puts_signal && n % 2) {
                        status = epx_port_put(rows, 0, to, from, ROW);
                        if (status == EPX_OK)
                            status = epx_port_signal(rows);
                    } else
                        status = epx_port_put_signal(rows, 0, to, from, ROW);
                    CHECK(status == EPX_OK, "%s put: %s: %s", spec, epx__status_name(status), self->channels->words);
                    if (status != EPX_OK)
                        return;
                    sent[p][k]++;
                    left--;
                    moved = true;
                }
                if (read[p][k] < job->rows && epx_port_reached(rows->signals, read[p][k] + 1)) {
                    size_t place = ((size_t)p * pairs + k) * PLACES * ROW + read[p][k] % PLACES * ROW;
                    int right = row_is((unsigned char *)self->memory + place, p, k, read[p][k]);
                    CHECK(right, "%s: rank %d: row %llu of rank %d is not there at its signal", spec, self->rank,
                          (unsigned long long)read[p][k], p);
                    memset(self->memory + place, 0xee, ROW);
                    CHECK(epx_port_signal(frees) == EPX_OK, "free");
                    read[p][k]++;
                    left--;
                    moved = true;
                    if (!right)
                        return;
                }
            }
        turn = moved ? 0 : turn + 1;
        epx_host_wait_turn(turn);
        if (moved)
            deadline = epx__deadline_ms(timeout_ms);
        else if (epx__deadline_passed(&deadline)) {
            CHECK(0, "%s: rank %d: %llu steps left and nothing moves: %s", spec, self->rank, (unsigned long long)left,
                  self->channels->words);
            return;
        }
    }
    for (int p = 0; p < ranks; p++)
        if (p != self->rank)
            CHECK(epx_port_flush(net_port(self, p, 0)) == EPX_OK, "flush");
}

static void test_ring(int ranks, uint32_t rows, uint32_t window, uint32_t fifo, uint32_t pairs, uint32_t proxies)
{
    epx__channels_config_t config = plain(pairs * 2, window, fifo);
    ring_job_t job = {rows, 1};
    config.proxies = proxies;
    net_world_run(ranks, &config, (size_t)ranks * pairs * PLACES * ROW * 2, ring_body, &job);
}

/* ---- adds, by several producers of one rank on the same channel ---- */

enum { PRODUCERS = 3 };

typedef struct producer {
    net_rank_t *rank;
    int number;
    uint32_t adds;
} producer_t;

static int64_t value_of(uint64_t i) /* 0, negative, large */
{
    static const int64_t values[] = {0, 3, -7, 0, INT64_C(1) << 40, -(INT64_C(1) << 41), 1, 0};
    return values[i % 8];
}

static void *producer_main(void *argument)
{
    producer_t *self = argument;
    int to = self->rank->rank == 0 ? 1 : 0;
    for (uint32_t i = 0; i < self->adds; i++) {
        epx_status_t status =
            epx_port_atomic_add(net_port(self->rank, to, 0), 0, (size_t)self->number * 8, value_of(i));
        if (status == EPX_OK) /* all together in one word, by steps of one */
            status = epx_port_atomic_add(net_port(self->rank, to, 0), 0, PRODUCERS * 8, 1);
        CHECK(status == EPX_OK, "%s add: %s: %s", spec, epx__status_name(status), self->rank->channels->words);
        if (status != EPX_OK)
            break;
    }
    return NULL;
}

static void add_body(net_rank_t *self)
{
    uint32_t adds = *(uint32_t *)self->argument;
    pthread_t threads[PRODUCERS];
    producer_t producers[PRODUCERS];
    int to = self->rank == 0 ? 1 : 0;
    for (int p = 0; p < PRODUCERS; p++) {
        producers[p] = (producer_t){self, p, adds};
        pthread_create(&threads[p], NULL, producer_main, &producers[p]);
    }
    for (int p = 0; p < PRODUCERS; p++)
        pthread_join(threads[p], NULL);
    CHECK(epx_port_flush(net_port(self, to, 0)) == EPX_OK, "%s flush: %s", spec, self->channels->words);
    CHECK(epx_channels_barrier(self->channels) == EPX_OK, "%s barrier: %s", spec, epx__detail());
    int64_t sum = 0;
    for (uint32_t i = 0; i < adds; i++)
        sum += value_of(i);
    const int64_t *words = (const int64_t *)(const void *)self->memory;
    for (int p = 0; p < PRODUCERS; p++)
        CHECK(__atomic_load_n(&words[p], __ATOMIC_ACQUIRE) == sum, "%s: rank %d, producer %d: %lld, not %lld", spec,
              self->rank, p, (long long)words[p], (long long)sum);
    CHECK(__atomic_load_n(&words[PRODUCERS], __ATOMIC_ACQUIRE) == PRODUCERS * (int64_t)adds, "%s: %lld adds", spec,
          (long long)words[PRODUCERS]);
}

static void test_adds(uint32_t adds, uint32_t window, uint32_t fifo)
{
    epx__channels_config_t config = plain(1, window, fifo);
    net_world_run(2, &config, 4096, add_body, &adds);
}

/* ---- one request at a time: its credit must come though nothing follows ---- */

static void idle_body(net_rank_t *self)
{
    for (uint32_t i = 0; i < 40 && self->rank == 0; i++) {
        const epx_port_channel_t *channel = net_port(self, 1, i % 3);
        for (uint32_t k = 0; k <= i % 5; k++)
            CHECK(epx_port_atomic_add(channel, 0, 0, k) == EPX_OK, "add");
        epx_status_t status = epx_port_flush(channel);
        CHECK(status == EPX_OK, "%s: flush %u: %s", spec, i, epx__status_name(status));
        if (status != EPX_OK)
            return;
    }
}

static void test_idle_credit(void)
{
    epx__channels_config_t config = plain(3, 8, 16);
    net_world_run(2, &config, 4096, idle_body, NULL);
    int before = count_descriptors(); /* what a network opens once for all stays */
    for (int turn = 0; turn < 3; turn++)
        net_world_run(2, &config, 4096, idle_body, NULL);
    bool closes = !strstr(spec, "verbs"); /* its endpoints stay open: src/net/ofi/ofi.c says why */
    CHECK(count_descriptors() == before || !closes,
          "%s: %d descriptors, then %d: endpoints that ended in order are not closed", spec, before,
          count_descriptors());
}

/* ---- idle proxies sleep, and wake ---- */

static double cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

static void sleep_body(net_rank_t *self)
{
    CHECK(epx_channels_barrier(self->channels) == EPX_OK, "%s", epx__detail());
    if (self->rank == 0) {
        epx__sleep_ns(100000000);
        double before = cpu_seconds();
        epx__sleep_ns(400000000);
        double used = cpu_seconds() - before;
        CHECK(used < 0.1 * slowness(), "%s: two idle ranks used %.3f s of CPU in 0.4 s", spec, used);
        CHECK(epx_port_signal(net_port(self, 1, 0)) == EPX_OK && epx_port_flush(net_port(self, 1, 0)) == EPX_OK,
              "wake");
    }
}

static void test_sleep(void)
{
    epx__channels_config_t config = plain(1, 16, 32);
    net_world_run(2, &config, 4096, sleep_body, NULL);
}

/* ---- barrier: nobody passes before all have come, and what was put before is there ---- */

static void barrier_body(net_rank_t *self)
{
    int ranks = self->world->ranks;
    for (uint64_t round = 1; round <= 50; round++) {
        memcpy(self->memory + 2048 + (round % 2) * 8, &round, 8);
        for (int p = 0; p < ranks; p++)
            if (p != self->rank)
                epx_port_put(net_port(self, p, (uint32_t)round % 2), 0, (size_t)self->rank * 16 + (round % 2) * 8,
                             2048 + (round % 2) * 8, 8);
        epx_status_t status = epx_channels_barrier(self->channels);
        CHECK(status == EPX_OK, "%s: %s", spec, epx__detail());
        if (status != EPX_OK)
            return;
        for (int p = 0; p < ranks; p++) {
            uint64_t there;
            memcpy(&there, self->memory + p * 16 + (round % 2) * 8, 8);
            CHECK(p == self->rank || there == round, "%s: rank %d sees %llu of rank %d in round %llu", spec, self->rank,
                  (unsigned long long)there, p, (unsigned long long)round);
        }
    }
}

static void test_barrier(int ranks, uint32_t proxies)
{
    epx__channels_config_t config = plain(2, 16, 32);
    config.proxies = proxies;
    net_world_run(ranks, &config, 4096, barrier_body, NULL);
}

/* ---- what is refused, and in what words ---- */

static void range_body(net_rank_t *self)
{
    CHECK(epx_port_signal(net_port(self, self->rank, 0)) == EPX_E_INVALID, "a channel to oneself");
    CHECK(epx_port_wait(net_port(self, self->rank, 0), 1) == EPX_E_INVALID, "a channel to oneself");
    if (self->rank == 0) {
        const epx_port_channel_t *channel = net_port(self, 1, 1);
        CHECK(epx_port_put(channel, 0, 4090, 0, 8) == EPX_OK, "pushed: only the proxy knows");
        CHECK(epx_port_flush(channel) == EPX_E_INVALID, "its fault");
        CHECK(epx_channels_status(self->channels) == EPX_E_INVALID, "status");
        CHECK(strstr(epx__detail(), "4090") != NULL, "words: %s", epx__detail());
        epx_status_t pushed = epx_port_signal(net_port(self, 2, 0)), flushed = epx_port_flush(net_port(self, 2, 0));
        CHECK(pushed == EPX_OK && flushed == EPX_OK, "channels to others go on: %s, %s", epx_status_name(pushed),
              epx_status_name(flushed));
    }
    if (self->rank == 2) {
        CHECK(epx_port_wait(net_port(self, 0, 0), 1) == EPX_OK, "from rank 0");
        const epx_port_channel_t *channel = net_port(self, 1, 0);
        CHECK(epx_port_atomic_add(channel, 0, 4, 1) == EPX_OK, "pushed: only the target knows");
    }
    if (self->rank == 1) { /* the target says so in words */
        epx__deadline_t deadline = epx__deadline_ms((uint64_t)(5000 * slowness()));
        while (epx_channels_status(self->channels) == EPX_OK && !epx__deadline_passed(&deadline))
            epx_host_wait_turn(2000);
        CHECK(epx_channels_status(self->channels) == EPX_E_INVALID, "status");
        CHECK(strstr(epx__detail(), "multiple of 8") && strstr(epx__detail(), "rank 2"), "words: %s", epx__detail());
    }
}

static void test_ranges(void)
{
    epx__channels_config_t config = plain(2, 16, 32);
    net_world_run(3, &config, 4096, range_body, NULL);
}

/* ---- a refused request is the sender's fault alone: the other direction goes on, and leaving waits for nobody ---- */

static atomic_int refusal_known;

static void one_sided_body(net_rank_t *self)
{
    enum { SIGNALS = 24, LEAVING_MS = 2000 };
    const epx_port_channel_t *channel = net_port(self, 1 - self->rank, 0);
    if (self->rank == 0) {
        CHECK(epx_port_put(channel, 0, 4090, 0, 8) == EPX_OK, "pushed: only the proxy knows");
        CHECK(epx_port_flush(channel) == EPX_E_INVALID, "its fault");
        atomic_store(&refusal_known, 1);
    } else {
        while (!atomic_load(&refusal_known))
            epx_host_wait_turn(2000);
        for (int i = 0; i < SIGNALS; i++)
            CHECK(epx_port_signal(channel) == EPX_OK, "%s: signal %d", spec, i);
        epx_status_t flushed = epx_port_flush(channel);
        CHECK(flushed == EPX_OK, "%s: flush: %s", spec, epx_status_name(flushed));
    }
    pthread_barrier_wait(&self->world->barrier);
    uint64_t start = epx__now_ns();
    epx__channels_destroy(self->channels);
    self->channels = NULL;
    double ms = (double)(epx__now_ns() - start) / 1e6;
    CHECK(ms < well_before(LEAVING_MS, LEAVING_MS / 4.0), "%s: rank %d left after %.0f ms", spec, self->rank, ms);
}

static void test_one_sided(void)
{
    epx__channels_config_t config = plain(1, 16, 32);
    atomic_store(&refusal_known, 0);
    net_world_run(2, &config, 4096, one_sided_body, NULL);
}

/* ---- a peer that leaves: what it has done stays done, however its last messages overtake each other ---- */

static void leave_body(net_rank_t *self)
{
    enum { SIGNALS = 24 };
    const epx_port_channel_t *channel = net_port(self, 1 - self->rank, 1);
    if (self->rank == 1) {
        CHECK(epx_port_wait(channel, SIGNALS) == EPX_OK, "%s: signals", spec);
        epx__channels_destroy(self->channels);
        self->channels = NULL;
        return;
    }
    for (int i = 0; i < SIGNALS; i++)
        CHECK(epx_port_signal(channel) == EPX_OK, "%s: signal %d", spec, i);
    epx_status_t flushed = epx_port_flush(channel), refused = EPX_OK;
    CHECK(flushed == EPX_OK, "%s: all was applied before the peer left, but flush says %s", spec,
          epx_status_name(flushed));
    char words[EPX__CHANNELS_WORDS];
    epx__deadline_t deadline = epx__deadline_ms((uint64_t)((double)timeout_ms * slowness()));
    while (refused == EPX_OK && !epx__deadline_passed(&deadline)) { /* until its bye is here; the window bounds it */
        refused = epx_port_signal(channel);
        epx__channels_words(self->channels, words); /* the proxy's thread writes them meanwhile */
        epx_host_wait_turn(2000);
    }
    CHECK(refused == EPX_E_PEER, "%s: a signal to a peer that has left: %s", spec, epx_status_name(refused));
}

static void test_leave(void)
{
    epx__channels_config_t config = plain(2, 32, 64);
    int turns = strncmp(spec, "sim", 3) == 0 ? 25 : 1; /* there a bye may overtake credit, now and then */
    for (int turn = 0; turn < turns; turn++)
        net_world_run(2, &config, 4096, leave_body, NULL);
}

/* ---- a peer that leaves, and whose endpoint is gone before its bye is read ---- */

static atomic_int met, gone;

static void unread_body(net_rank_t *self)
{
    const epx_port_channel_t *channel = net_port(self, 1 - self->rank, 0);
    epx__deadline_t deadline = epx__deadline_ms(timeout_ms);
    CHECK(epx_port_signal(channel) == EPX_OK, "%s: a first signal", spec);
    bool told = false; /* both are connected: each has the other's signal, and the credit for its own */
    while (atomic_load(&met) < 2 && !epx__deadline_passed(&deadline)) {
        epx__channels_help(self->channels);
        if (!told && epx_port_reached(channel->signals, 1) && epx__channels_applied(channel)) {
            told = true;
            atomic_fetch_add(&met, 1);
        }
    }
    if (self->rank == 1) {
        epx__channels_destroy(self->channels);
        self->channels = NULL;
        atomic_store(&gone, 1);
        return;
    }
    CHECK(epx_port_signal(channel) == EPX_OK, "%s: a second signal", spec);
    while (!atomic_load(&gone))
        epx_host_wait_turn(2000);
    deadline = epx__deadline_ms(timeout_ms); /* leaving took what it may: nobody answered */
    while (*channel->fault == 0 && !epx__deadline_passed(&deadline))
        epx__channels_help(self->channels); /* puts the signal, then reads the bye */
    CHECK(*channel->fault == EPX_E_PEER, "%s: %d: %s", spec, (int)*channel->fault, self->channels->words);
}

static void test_unread(void)
{
    epx__channels_config_t config = plain(1, 32, 64);
    config.no_threads = true;
    atomic_store(&met, 0);
    atomic_store(&gone, 0);
    net_world_run(2, &config, 4096, unread_body, NULL);
}

/* ---- two ranks leave at once: the other's bye is taken when one is at its next proxy already ---- */

static atomic_int held;

/* Rank 0 leaves. Rank 1 keeps it at its second proxy; meanwhile rank 2's bye, which has crossed rank 0's, is taken at
 * the first, as that proxy's thread may. ThreadSanitizer sees what is not under the lock. */
static void crossing_body(net_rank_t *self)
{
    if (self->rank == 0) {
        while (!atomic_load(&held))
            epx_host_wait_turn(2000);
        epx__channels_destroy(self->channels);
        self->channels = NULL;
    }
    if (self->rank != 1)
        return;
    epx__channels_t *leaving = self->world->rank[0].channels, *crossing = self->world->rank[2].channels;
    const epx__lane_t *lane = &leaving->proxy[0].lanes[epx__channels_lane(leaving, 2, 0)];
    epx__deadline_t deadline = epx__deadline_ms(timeout_ms);
    pthread_mutex_lock(&leaving->proxy[1].lock);
    atomic_store(&held, 1);
    for (bool told = false; !told && !epx__deadline_passed(&deadline);) {
        epx_host_wait_turn(2000);
        pthread_mutex_lock(&leaving->proxy[0].lock);
        told = lane->dead;
        pthread_mutex_unlock(&leaving->proxy[0].lock);
    }
    epx__sleep_ns(20000000); /* it goes on to the proxy that is held */
    CHECK(epx__lane_bye(&crossing->proxy[0]), "%s: rank 2 cannot say that it leaves", spec);
    pthread_mutex_lock(&leaving->proxy[0].lock);
    epx__proxy_step(&leaving->proxy[0]);
    pthread_mutex_unlock(&leaving->proxy[0].lock);
    CHECK(*net_port(&self->world->rank[0], 2, 0)->fault == EPX_E_PEER, "%s: rank 2's bye was not taken", spec);
    pthread_mutex_unlock(&leaving->proxy[1].lock);
}

static void test_crossing(void)
{
    epx__channels_config_t config = plain(1, 16, 32);
    config.no_threads = true;
    config.proxies = 2;
    atomic_store(&held, 0);
    net_world_run(3, &config, 4096, crossing_body, NULL);
}

static epx_status_t alone(void *context, const void *mine, size_t bytes, void *all)
{
    int ranks = *(int *)context;
    for (int r = 0; r < ranks; r++)
        memcpy((char *)all + (size_t)r * bytes, mine, bytes);
    return EPX_OK;
}

static epx_status_t refused(int ranks, uint32_t channels, uint32_t window, uint32_t fifo, uint32_t proxies)
{
    static char memory[4096];
    epx_channel_memory_t memories = {memory, sizeof memory, 0};
    epx__channels_t *none = NULL;
    epx__channels_config_t config = plain(channels, window, fifo);
    config.ranks = ranks;
    config.proxies = proxies;
    config.memories = &memories;
    config.memory_count = 1;
    config.allgather = alone;
    config.allgather_context = &ranks;
    epx_status_t status = epx__channels_create(&config, &none);
    epx__channels_destroy(none);
    return status;
}

static void test_refused(void)
{
    CHECK(refused(1, 1, 16, 16, 1) == EPX_OK, "a rank alone: %s", epx__detail());
    CHECK(refused(1, 1, 12, 16, 1) == EPX_E_INVALID, "window");
    CHECK(refused(1, 1, 65536, 16, 1) == EPX_E_INVALID, "window");
    CHECK(refused(1, 1, 16, 10, 1) == EPX_E_INVALID, "FIFO");
    CHECK(refused(1, 1, 16, 16, 100) == EPX_OK, "more proxies than ranks: as many as ranks");
    CHECK(refused(4096, 64, 32768, 1024, 1) == EPX_E_INVALID, "lanes of 32 bits");
    CHECK(strstr(epx__detail(), "32 bits") != NULL, "words: %s", epx__detail());
    CHECK(refused(2, 1, 16, 16, 1) == EPX_E_MISMATCH, "a record that is not of that rank");
}

/* ---- the application's signals are not for proxies ---- */

static void test_signals(void)
{
    static char memory[4096];
    epx_channel_memory_t memories = {memory, sizeof memory, 0};
    epx__channels_t *channels = NULL;
    epx__channels_config_t config = plain(1, 16, 16);
    int ranks = 1;
    config.ranks = ranks;
    config.memories = &memories;
    config.memory_count = 1;
    config.allgather = alone;
    config.allgather_context = &ranks;
    CHECK(epx__channels_create(&config, &channels) == EPX_OK, "%s", epx__detail());
    sigset_t mine, before;
    struct timespec second = {1, 0};
    sigemptyset(&mine);
    sigaddset(&mine, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &mine, &before); /* this thread waits for it; a proxy that took it would end us */
    CHECK(kill(getpid(), SIGUSR1) == 0 && sigtimedwait(&mine, NULL, &second) == SIGUSR1, "the signal is lost");
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    epx__channels_destroy(channels);
}

/* ---- a rank goes ---- */

static void death_body(net_rank_t *self)
{
    if (self->rank == 2) {
        epx__channels_destroy(self->channels);
        self->channels = NULL;
        return;
    }
    const epx_port_channel_t *dead = net_port(self, 2, 0), *living = net_port(self, 1 - self->rank, 0);
    epx__deadline_t deadline = epx__deadline_ms(8000);
    while (!epx_port_reached(dead->fault, 1) && !epx__deadline_passed(&deadline)) /* until its bye is here */
        epx_host_wait_turn(2000);
    epx_status_t status = epx_port_signal(dead);
    if (status == EPX_OK) /* there was window */
        status = epx_port_flush(dead);
    CHECK(status == EPX_E_PEER, "%s: %s", spec, epx__status_name(status));
    CHECK(strstr(self->channels->words, "rank 2 has left"), "words: %s", self->channels->words);
    CHECK(epx_channels_status(self->channels) == EPX_OK, "a clean leave is no fault: %s", epx__detail());
    for (int i = 0; i < 20; i++)
        CHECK(epx_port_signal(living) == EPX_OK, "the living");
    CHECK(epx_port_flush(living) == EPX_OK && epx_port_wait(living, 20) == EPX_OK, "%s: the living: %s", spec,
          epx__status_name((epx_status_t)*living->fault));
}

static void test_death(void)
{
    epx__channels_config_t config = plain(1, 16, 32);
    config.timeout_ms = 3000;
    net_world_run(3, &config, 4096, death_body, NULL);
}

static void suite(uint32_t rows, int full)
{
    test_ring(2, rows, 4, 2, 1, 1);
    test_adds(rows, 4, 4);
    test_idle_credit();
    test_leave();
    if (strncmp(spec, "sim", 3) != 0) /* its messages arrive as their reader steps: who leaves would wait for that */
        test_unread();
    if (!full)
        return;
    test_ring(3, rows / 2, 8, 8, 2, 1);
    test_ring(4, rows / 4, 16, 16, 1, 2);
    test_sleep();
    test_barrier(2, 1);
    test_barrier(4, 3);
    test_ranges();
    test_one_sided();
    test_refused();
    test_signals();
    test_death();
    if (strcmp(spec, "loop") == 0) /* nobody's progress is needed to be connected */
        test_crossing();
}

static int here(const char *name)
{
    epx__net_config_t config = {.address = test_address(), .peers_max = 1, .puts_max = 16, .notices_max = 16};
    epx__net_t *net = NULL;
    spec = name;
    epx_status_t status = epx__net_open(name, &config, &net);
    if (status != EPX_OK)
        printf("%s: not here: %s\n", name, epx__detail());
    epx__net_close(net);
    return status == EPX_OK;
}

int main(int argc, char **argv)
{
    if (argc > 2)
        timeout_ms = (uint64_t)atoi(argv[2]);
    if (argc > 1) {
        if (!here(argv[1]))
            SKIP("that network is not here");
        int full = argc > 3 ? atoi(argv[3]) : 1;
        suite(full ? 1000 : 200, full);
        return check_done();
    }
    if (here("loop"))
        suite(2000, 1);
    for (int seed = 1; seed <= 20; seed++) {
        char name[32];
        snprintf(name, sizeof name, "sim:%d", seed);
        if (here(name))
            suite(200, seed <= 2);
    }
    int there = 0;
    if (here("ofi:tcp")) {
        there++;
        suite(1000, 1);
    }
    if (here("ofi:shm")) {
        there++;
        suite(200, 0);
    }
    printf("%d of 2 libfabric providers were here\n", there);
    return check_done();
}
