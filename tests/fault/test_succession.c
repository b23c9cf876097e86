/*
 * Rank 0 leaves or dies, and so do those who take its place: the others still hear each other, and of each other's
 * deaths, within a second and by name. Nobody is taken for dead who only is slow, or has left.
 */
#include <arpa/inet.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/clock.h"
#include "bootstrap/state.h"
#include "common/check.h"
#include "common/gather.h"
#include "common/slowness.h"

enum { TAG = 5, NOTICE = 77 };

static double seconds_since(uint64_t start_ns)
{
    return (double)(epx__now_ns() - start_ns) / 1e9;
}

static void count_death(void *context, int rank)
{
    atomic_fetch_or((atomic_int *)context, 1 << rank);
}

static void count_notice(void *context, int from, const void *data, size_t bytes)
{
    (void)data;
    atomic_fetch_add((atomic_int *)context, bytes == 4 ? 1 << (4 * from) : 0);
}

/* ---- ranks as threads: they leave one after the other ---- */

/* To everybody above, and from everybody who is still here: after rank `left` has gone. The large one is under way for
 * a while, and the small one behind it must not overtake. */
static void talk(gathered_t *one, int left, const uint8_t *large, uint8_t *room, size_t bytes)
{
    int word = one->rank * 100 + left, heard = -1;
    for (int to = left + 1; to < one->ranks; to++) {
        CHECK(epx__bootstrap_send(one->bootstrap, to, TAG, large, bytes) == EPX_OK, "%s", epx__detail());
        CHECK(epx__bootstrap_send(one->bootstrap, to, TAG, &word, sizeof(word)) == EPX_OK, "%s", epx__detail());
    }
    for (int from = left + 1; from < one->ranks; from++) {
        epx_status_t status = epx__bootstrap_recv(one->bootstrap, from, TAG, room, bytes, 0);
        CHECK(status == EPX_OK && room[0] == (uint8_t)from && room[bytes - 1] == (uint8_t)from, "%d at %d: %s", from,
              one->rank, epx__detail());
        status = epx__bootstrap_recv(one->bootstrap, from, TAG, &heard, sizeof(heard), 0);
        CHECK(status == EPX_OK && heard == from * 100 + left, "%d at %d: %d, %s", from, one->rank, heard,
              epx__detail());
    }
}

static void one_by_one(gathered_t *one)
{
    CHECK(one->status == EPX_OK, "%s", one->detail);
    if (one->status != EPX_OK)
        return;
    atomic_int deaths = 0;
    int slot;
    size_t bytes = one->ranks > 8 ? 1000 : 300000;
    uint8_t *large = malloc(bytes), *room = malloc(bytes), word;
    memset(large, one->rank, bytes);
    CHECK(epx__bootstrap_on_death(one->bootstrap, count_death, &deaths, &slot) == EPX_OK);
    /* Rank r leaves in turn r, without a word to say that the others are done: they need not be. */
    for (int left = -1; left < one->rank; left++)
        talk(one, left, large, room, bytes);
    if (one->rank > 0) {
        CHECK(epx__bootstrap_barrier(one->bootstrap, 0) == EPX_E_PEER && strstr(epx__detail(), "rank 0 has left"), "%s",
              epx__detail());
        CHECK(epx__bootstrap_recv(one->bootstrap, one->rank - 1, 9, &word, 1, 0) == EPX_E_PEER &&
                  strstr(epx__detail(), "has left"),
              "%s", epx__detail());
    }
    CHECK(atomic_load(&deaths) == 0, "rank %d of %d counts deaths: %x", one->rank, one->ranks, atomic_load(&deaths));
    epx__bootstrap_off_death(one->bootstrap, slot);
    free(large);
    free(room);
}

static void leave_one_by_one(int ranks)
{
    epx_unique_id_t id;
    int64_t live = epx__alloc_live();
    CHECK(epx__unique_id_create(NULL, &id) == EPX_OK, "%s", epx__detail());
    gathered_t *all = gather_make(ranks, &id, 20000, one_by_one, NULL);
    uint64_t start = epx__now_ns();
    gather_run(all, ranks);
    printf("%d ranks leave one by one: %.2f s\n", ranks, seconds_since(start));
    free(all);
    CHECK(epx__alloc_live() == live, "%lld allocations left", (long long)(epx__alloc_live() - live));
}

/* ---- strangers at the successor's door ---- */

static int knock(const epx__endpoint_t *endpoint, const void *data, size_t bytes)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(endpoint->port)};
    memcpy(&address.sin_addr, endpoint->address, 4);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0 && bytes)
        CHECK(send(fd, data, bytes, MSG_NOSIGNAL) == (ssize_t)bytes);
    return fd;
}

/* Ranks 1 to 3 are without rank 0; before it goes, strangers have come to rank 1, one of them in rank 2's name. */
static void among_strangers(gathered_t *one)
{
    enum { STRANGERS = 60 };
    static int fds[STRANGERS];
    int word = one->rank, heard = -1;
    CHECK(one->status == EPX_OK, "%s", one->detail);
    if (one->status != EPX_OK)
        return;
    CHECK(epx__bootstrap_barrier(one->bootstrap, 0) == EPX_OK, "%s", epx__detail());
    if (one->rank == 0) {
        uint8_t hello[EPX__HELLO_BYTES];
        epx__hello_t said = one->bootstrap->hello;
        said.rank = 2;
        said.token[3] ^= 1;
        epx__hello_encode(&said, hello);
        for (int i = 0; i < STRANGERS; i++)
            fds[i] = knock(&one->bootstrap->peers[1], hello, i % 3 == 0 ? 0 : i % 3 == 1 ? sizeof(hello) : 100);
        CHECK(epx__bootstrap_barrier(one->bootstrap, 0) == EPX_OK, "%s", epx__detail());
        return;
    }
    CHECK(epx__bootstrap_barrier(one->bootstrap, 0) == EPX_OK, "%s", epx__detail());
    uint64_t start = epx__now_ns();
    for (int to = 1; to < one->ranks; to++)
        CHECK(epx__bootstrap_send(one->bootstrap, to, TAG, &word, sizeof(word)) == EPX_OK, "%s", epx__detail());
    for (int from = 1; from < one->ranks; from++)
        CHECK(epx__bootstrap_recv(one->bootstrap, from, TAG, &heard, sizeof(heard), 0) == EPX_OK && heard == from,
              "%d from %d: %s", heard, from, epx__detail());
    CHECK(seconds_since(start) < 5 * slowness(), "%.1f s", seconds_since(start));
    if (one->rank == 1)
        for (int i = 0; i < STRANGERS; i++)
            close(fds[i]);
}

static void strangers(void)
{
    epx_unique_id_t id;
    CHECK(epx__unique_id_create(NULL, &id) == EPX_OK, "%s", epx__detail());
    gathered_t *all = gather_make(4, &id, 10000, among_strangers, NULL);
    gather_run(all, 4);
    free(all);
}

/* ---- a rank that loses its place at the door to strangers comes again ---- */

static atomic_int crowd; /* 1: there will be one when rank 2 says its next hello */
static epx__endpoint_t door;

/* In place of the C library's: between rank 2's connection and its hello, more strangers come than there are places. */
ssize_t send(int fd, const void *data, size_t bytes, int flags)
{
    enum { STRANGERS = EPX__GUESTS + 4 };
    epx__hello_t hello;
    int expected = 1, fds[STRANGERS], crowded = 0;
    if (bytes == EPX__HELLO_BYTES && !epx__hello_parse(data, &hello) && hello.rank == 2)
        crowded = atomic_compare_exchange_strong(&crowd, &expected, 2);
    for (int i = 0; crowded && i < STRANGERS; i++)
        fds[i] = knock(&door, NULL, 0);
    if (crowded)
        epx__sleep_ns(300000000);
    ssize_t sent = sendto(fd, data, bytes, flags, NULL, 0);
    for (int i = 0; crowded && i < STRANGERS; i++)
        close(fds[i]);
    return sent;
}

static void crowded_out(gathered_t *one)
{
    int word = one->rank, heard = -1;
    CHECK(one->status == EPX_OK, "%s", one->detail);
    if (one->status != EPX_OK)
        return;
    CHECK(epx__bootstrap_barrier(one->bootstrap, 0) == EPX_OK, "%s", epx__detail());
    if (one->rank == 0) {
        door = one->bootstrap->peers[1];
        atomic_store(&crowd, 1);
        return;
    }
    CHECK(epx__bootstrap_recv(one->bootstrap, 0, TAG, &heard, sizeof(heard), 0) == EPX_E_PEER, "%s", epx__detail());
    for (int to = 1; to < one->ranks; to++)
        CHECK(epx__bootstrap_send(one->bootstrap, to, TAG, &word, sizeof(word)) == EPX_OK, "%s", epx__detail());
    for (int from = 1; from < one->ranks; from++)
        CHECK(epx__bootstrap_recv(one->bootstrap, from, TAG, &heard, sizeof(heard), 0) == EPX_OK && heard == from,
              "%d from %d at %d: %s", heard, from, one->rank, epx__detail());
    CHECK(atomic_load(&crowd) == 2, "there was no crowd");
}

static void crowd_at_the_door(void)
{
    epx_unique_id_t id;
    CHECK(epx__unique_id_create(NULL, &id) == EPX_OK, "%s", epx__detail());
    gathered_t *all = gather_make(4, &id, 5000, crowded_out, NULL);
    gather_run(all, 4);
    free(all);
    atomic_store(&crowd, 0);
}

/* ---- ranks as processes: they are killed ---- */

enum { RANKS = 5, NEVER = 0, LEAVES, KILLED, STOPPED };

typedef struct plan {
    const char *name;
    int fate[RANKS];   /* in the first act */
    int second[RANKS]; /* when all who are left have seen the first to its end */
    int wakes_ms;      /* the stopped go on after so long */
} plan_t;

static const plan_t plans[] = {
    {"rank 0 leaves, then rank 3 is killed", {LEAVES}, {[3] = KILLED}, 0},
    {"rank 0 leaves, then its successor is killed", {LEAVES}, {[1] = KILLED}, 0},
    {"rank 0 is killed, then rank 4", {KILLED}, {[4] = KILLED}, 0},
    {"rank 0 is killed, then its successor", {KILLED}, {[1] = KILLED}, 0},
    {"ranks 0 and 1 are killed at once, then rank 2 leaves", {KILLED, KILLED}, {[2] = LEAVES}, 0},
    {"rank 0 leaves while rank 1 is killed", {LEAVES, KILLED}, {NEVER}, 0},
    {"rank 0 leaves while rank 3 is killed", {LEAVES, [3] = KILLED}, {NEVER}, 0},
    {"ranks 0 and 1 leave at once, then rank 4 is killed", {LEAVES, LEAVES}, {[4] = KILLED}, 0},
    {"ranks 0, 1 and 2 leave at once", {LEAVES, LEAVES, LEAVES}, {NEVER}, 0},
    {"rank 0 leaves while rank 3 is stopped for a while", {LEAVES, [3] = STOPPED}, {NEVER}, 1500},
    {"rank 0 is killed while its successor is stopped for a while", {KILLED, STOPPED}, {NEVER}, 1500},
};

/* Shared by the processes of one play. */
typedef struct stage {
    atomic_int ready, seen;          /* seen: by how many, the first act */
    _Atomic(uint64_t) curtain_ns[2]; /* when an act began: the last to meet a fate in it did so, if anybody does */
    epx_unique_id_t id;
} stage_t;

static int fate(const plan_t *plan, int act, int rank)
{
    return act == 0 ? plan->fate[rank] : plan->second[rank];
}

static bool survives(const plan_t *plan, int act, int rank)
{
    for (int a = 0; a <= act; a++)
        if (fate(plan, a, rank) == LEAVES || fate(plan, a, rank) == KILLED)
            return false;
    return true;
}

static bool wait_for(atomic_int *value, int wanted, double seconds)
{
    uint64_t start = epx__now_ns();
    while (atomic_load(value) != wanted && seconds_since(start) < seconds)
        epx__sleep_ns(1000000);
    return atomic_load(value) == wanted;
}

/* One act, seen by one who survives it: exit code 0 when all came as it should. */
static int watch(epx__bootstrap_t *b, const plan_t *plan, stage_t *stage, int act, atomic_int *deaths,
                 atomic_int *notices)
{
    int expected = 0, rank = epx__bootstrap_rank(b), heard = 0;
    enum { PATIENCE_S = 8 };
    for (int r = 0; r < RANKS; r++)
        for (int a = 0; a <= act; a++)
            expected |= fate(plan, a, r) == KILLED ? 1 << r : 0;
    if (!wait_for(deaths, expected, PATIENCE_S))
        return 30 + act;
    double took = seconds_since(atomic_load(&stage->curtain_ns[act])) - plan->wakes_ms / 1000.0;
    if (took > well_before(PATIENCE_S, 1) && expected)
        return 40 + act;
    /* A notice from everybody reaches everybody. */
    epx__bootstrap_notify(b, NOTICE, &rank, sizeof(rank));
    for (int r = 0; r < RANKS; r++) {
        if (r == rank || !survives(plan, act, r))
            continue;
        if (epx__bootstrap_send(b, r, TAG, &rank, sizeof(rank)) != EPX_OK)
            return 50 + act;
        if (epx__bootstrap_recv(b, r, TAG, &heard, sizeof(heard), 6000) != EPX_OK || heard != r)
            return 60 + act;
    }
    uint64_t start = epx__now_ns();
    for (int r = 0; r < RANKS; r++)
        while (r != rank && survives(plan, act, r) && (atomic_load(notices) >> (4 * r) & 15) < act + 1) {
            if (seconds_since(start) > 6)
                return 70 + act;
            epx__sleep_ns(1000000); /* the watcher wants the core */
        }
    if (atomic_load(deaths) != expected)
        return 80 + act;
    char byte;
    for (int r = 0; r < RANKS; r++)
        if (expected >> r & 1 &&
            (epx__bootstrap_send(b, r, TAG, &byte, 1) != EPX_E_PEER || !strstr(epx__detail(), "is gone")))
            return 90 + act;
    return 0;
}

/* Who survives an act without a fate opens it if nobody has; the others say when theirs came, the last one counts. */
static void open_curtain(stage_t *stage, int act, bool has_fate)
{
    uint64_t now = epx__now_ns(), then = 0;
    while (!atomic_compare_exchange_strong(&stage->curtain_ns[act], &then, now))
        if (!has_fate || then >= now)
            return;
}

/* The first act is over for this rank: who dies now must not be missed by one who is still in it. */
static bool interval(const plan_t *plan, stage_t *stage)
{
    int left = 0;
    for (int r = 0; r < RANKS; r++)
        left += survives(plan, 0, r);
    atomic_fetch_add(&stage->seen, 1);
    return wait_for(&stage->seen, left, 20);
}

static int actor(const plan_t *plan, stage_t *stage, int rank)
{
    epx__bootstrap_t *b = NULL;
    epx__bootstrap_config_t config = {.rank = rank, .ranks = RANKS, .id = &stage->id, .timeout_ms = 10000};
    atomic_int deaths = 0, notices = 0;
    int slots[2];
    if (rank == 0 && epx__unique_id_create(NULL, &stage->id) != EPX_OK)
        return 10;
    if (rank == 0)
        atomic_store(&stage->ready, 1);
    else if (!wait_for(&stage->ready, 1, 5))
        return 11;
    if (epx__bootstrap_open(&config, &b) != EPX_OK || epx__bootstrap_barrier(b, 0) != EPX_OK)
        return 12;
    if (epx__bootstrap_on_death(b, count_death, &deaths, &slots[0]) != EPX_OK ||
        epx__bootstrap_on_notice(b, NOTICE, count_notice, &notices, &slots[1]) != EPX_OK)
        return 13;
    if (epx__bootstrap_barrier(b, 0) != EPX_OK)
        return 14;
    for (int act = 0; act < 2; act++) {
        int mine = fate(plan, act, rank);
        if (act == 1 && !interval(plan, stage))
            return 15;
        open_curtain(stage, act, mine != NEVER);
        if (mine == KILLED)
            raise(SIGKILL);
        if (mine == STOPPED)
            raise(SIGSTOP);
        if (mine == LEAVES)
            break;
        int wrong = watch(b, plan, stage, act, &deaths, &notices);
        if (wrong)
            return wrong;
    }
    uint64_t start = epx__now_ns();
    epx__bootstrap_off_death(b, slots[0]);
    epx__bootstrap_off_notice(b, slots[1]);
    epx__bootstrap_close(b);
    return seconds_since(start) < 1.6 * slowness() ? 0 : 20;
}

static void play(const plan_t *plan)
{
    pid_t pids[RANKS];
    stage_t *stage = mmap(NULL, sizeof(*stage), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(stage != MAP_FAILED);
    fflush(stdout);
    uint64_t start = epx__now_ns();
    for (int rank = 0; rank < RANKS; rank++) {
        pids[rank] = fork();
        if (pids[rank] == 0)
            _exit(actor(plan, stage, rank));
    }
    for (int rank = 0; rank < RANKS; rank++)
        if (plan->fate[rank] == STOPPED) {
            waitpid(pids[rank], NULL, WUNTRACED);
            epx__sleep_ns((uint64_t)plan->wakes_ms * 1000000u);
            kill(pids[rank], SIGCONT);
        }
    for (int rank = 0; rank < RANKS; rank++) {
        int status = 0;
        waitpid(pids[rank], &status, 0);
        bool killed = plan->fate[rank] == KILLED || plan->second[rank] == KILLED;
        if (killed)
            CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "%s: rank %d", plan->name, rank);
        else
            CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s: rank %d: exit code %d", plan->name, rank,
                  WIFEXITED(status) ? WEXITSTATUS(status) : -1);
    }
    printf("%-60s %.2f s\n", plan->name, seconds_since(start));
    munmap(stage, sizeof(*stage));
}

int main(int count, char **arguments)
{
    setenv("EPX_LOG", "0", 0);
    for (size_t i = 0; i < sizeof(plans) / sizeof(plans[0]); i++)
        if (count < 2 || strstr(plans[i].name, arguments[1]))
            play(&plans[i]);
    if (count > 1)
        return check_done();
    leave_one_by_one(2);
    leave_one_by_one(5);
    leave_one_by_one(20);
    strangers();
    crowd_at_the_door();
    return check_done();
}
