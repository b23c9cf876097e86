/* What goes wrong in a bootstrap: ranks that are missing, double, different, killed or gone, and strangers. */
#include <arpa/inet.h>
#include <dirent.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/clock.h"
#include "bootstrap/state.h"
#include "common/check.h"
#include "common/gather.h"
#include "common/slowness.h"

static int descriptors(void)
{
    int count = 0;
    DIR *folder = opendir("/proc/self/fd");
    while (folder && readdir(folder))
        count++;
    if (folder)
        closedir(folder);
    return count;
}

static epx_unique_id_t new_id(void)
{
    epx_unique_id_t id = {{0}};
    CHECK(epx__unique_id_create(NULL, &id) == EPX_OK, "%s", epx__detail());
    return id;
}

static void expect(const gathered_t *one, epx_status_t status, const char *words)
{
    CHECK(one->status == status && strstr(one->detail, words), "rank %d: %s (wanted %s with \"%s\"): %s", one->rank,
          epx__status_name(one->status), epx__status_name(status), words, one->detail);
}

static double seconds_since(uint64_t start_ns)
{
    return (double)(epx__now_ns() - start_ns) / 1e9;
}

/* ---- who does not come, or comes twice, or comes different -------------------------------------- */

static void missing_rank(int missing)
{
    epx_unique_id_t id = new_id();
    uint64_t deadline_ms = (uint64_t)well_before(5000, 600); /* or all others who are late are missing too */
    gathered_t *all = gather_make(5, &id, deadline_ms, NULL, NULL);
    char words[32];
    snprintf(words, sizeof(words), "rank %d", missing);
    uint64_t start = epx__now_ns();
    for (int rank = 0; rank < 5; rank++)
        if (rank != missing)
            gather_start(&all[rank]);
    for (int rank = 0; rank < 5; rank++) {
        if (rank == missing)
            continue;
        gather_wait(&all[rank]);
        expect(&all[rank], EPX_E_TIMEOUT, words);
    }
    double took = seconds_since(start) - (double)deadline_ms * 1e-3;
    CHECK(took < 2.6 * slowness(), "%.1f s after the deadline", took);
    free(all);
    if (missing == 0) { /* its listener still waits in this process: take it, that the count of descriptors be right */
        epx__bootstrap_t *alone = NULL;
        epx__bootstrap_config_t config = {.rank = 0, .ranks = 1, .id = &id};
        epx__socket_t listener;
        CHECK(epx__unique_id_take(&id, &listener) == EPX_OK);
        epx__socket_close(&listener);
        CHECK(epx__bootstrap_open(&config, &alone) == EPX_E_INVALID);
    }
}

static void duplicate_rank(void)
{
    epx_unique_id_t id = new_id();
    gathered_t *all = gather_make(4, &id, 8000, NULL, NULL);
    all[3].config.rank = 2;
    uint64_t start = epx__now_ns();
    gather_run(all, 4);
    for (int rank = 0; rank < 4; rank++)
        expect(&all[rank], EPX_E_MISMATCH, "two processes say that they are rank 2");
    CHECK(seconds_since(start) < well_before(8, 5), "%.1f s",
          seconds_since(start)); /* at once, with some seconds for who comes late */
    free(all);
}

static void other_configuration(void)
{
    epx_unique_id_t id = new_id();
    gathered_t *all = gather_make(4, &id, 8000, NULL, NULL);
    all[2].config.config_hash = 8;
    all[2].config.config_words = "hidden 7168\x01\xff";
    gather_run(all, 4);
    for (int rank = 0; rank < 4; rank++) {
        expect(&all[rank], EPX_E_MISMATCH, "rank 2 (process");
        expect(&all[rank], EPX_E_MISMATCH, "\"hidden 7168??\", rank 0 \"as the test has it\"");
    }
    free(all);
}

static void other_count(void)
{
    epx_unique_id_t id = new_id();
    gathered_t *all = gather_make(3, &id, 8000, NULL, NULL);
    all[1].config.ranks = 4;
    gather_run(all, 3);
    for (int rank = 0; rank < 3; rank++)
        expect(&all[rank], EPX_E_MISMATCH, "counts 4 ranks in the group, rank 0 counts 3");
    free(all);
}

static epx__join_t a_join(const epx_unique_id_t *id, int rank, int ranks, uint64_t timeout_ms)
{
    epx__join_t join = {.timeout_ms = timeout_ms, .deadline_ns = epx__now_ns() + timeout_ms * 1000000u};
    CHECK(!epx__id_decode(id, &join.where));
    join.hello = (epx__hello_t){.protocol = EPX__WIRE_PROTOCOL,
                                .rank = (uint32_t)rank,
                                .ranks = (uint32_t)ranks,
                                .version = EPX_VERSION_MAJOR << 16 | EPX_VERSION_MINOR << 8 | EPX_VERSION_PATCH,
                                .sizes_hash = epx__sizes_hash(),
                                .config_hash = 7,
                                .host = "test"};
    memcpy(join.hello.token, join.where.token, EPX__TOKEN_BYTES);
    return join;
}

/* Rank 1 is of another protocol, version or build, or has no memory; rank 0 and 2 hear it too. */
static void other_build(int what)
{
    static const char *const words[] = {"speaks bootstrap protocol 9", "runs epx 9.9.9", "another build of epx",
                                        "says that it is rank 7", "cannot take part: memory ran out"};
    epx_unique_id_t id = new_id();
    gathered_t *all = gather_make(3, &id, 8000, NULL, NULL);
    gather_start(&all[0]);
    gather_start(&all[2]);
    epx__join_t join = a_join(&id, 1, 3, 8000);
    if (what == 0)
        join.hello.protocol = 9;
    if (what == 1)
        join.hello.version = 0x090909;
    if (what == 2)
        join.hello.sizes_hash++;
    if (what == 3)
        join.hello.rank = 7;
    if (what == 4)
        join.hello.failure = EPX_E_NOMEM;
    epx__socket_t connected = {.open = false};
    epx_status_t status = epx__join_leaf(&join, &connected), expected = what == 4 ? EPX_E_PEER : EPX_E_MISMATCH;
    CHECK(status == expected && strstr(epx__detail(), words[what]), "%s", epx__detail());
    gather_wait(&all[0]);
    gather_wait(&all[2]);
    expect(&all[0], expected, words[what]);
    expect(&all[2], expected, words[what]);
    free(all);
}

static void barrier_works(gathered_t *one)
{
    CHECK(one->status == EPX_OK, "rank %d: %s", one->rank, one->detail);
    if (one->status == EPX_OK)
        CHECK(epx__bootstrap_barrier(one->bootstrap, 0) == EPX_OK, "%s", epx__detail());
}

/* The right port with the token of another run: refused in words, and the group does not notice. */
static void other_run(void)
{
    epx_unique_id_t id = new_id();
    gathered_t *all = gather_make(3, &id, 8000, barrier_works, NULL);
    gather_start(&all[0]);
    gather_start(&all[1]);
    epx__join_t join = a_join(&id, 2, 3, 5000);
    join.hello.token[5] ^= 1;
    epx__socket_t connected = {.open = false};
    CHECK(epx__join_leaf(&join, &connected) == EPX_E_MISMATCH && strstr(epx__detail(), "belongs to another run"), "%s",
          epx__detail());
    gather_start(&all[2]);
    for (int rank = 0; rank < 3; rank++)
        gather_wait(&all[rank]);
    free(all);
}

/* ---- strangers ----------------------------------------------------------------------------------- */

static int knock(const epx_unique_id_t *id, const void *data, size_t bytes)
{
    epx__id_t decoded;
    epx__id_decode(id, &decoded);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(decoded.endpoint.port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    struct timeval limit = {.tv_sec = 1};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0 && bytes) {
        ssize_t ignored = send(fd, data, bytes, MSG_NOSIGNAL);
        (void)ignored;
    }
    return fd;
}

enum { SILENT = 900, NOISY = 300 };

static void flood(void)
{
    epx_unique_id_t id = new_id();
    static int fds[SILENT + NOISY];
    uint8_t hello[EPX__HELLO_BYTES];
    epx__join_t join = a_join(&id, 1, 3, 1000);
    gathered_t *all = gather_make(3, &id, 15000, barrier_works, NULL);
    gather_start(&all[0]);
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < 8192) { /* both ends of each lie in this process */
        limit.rlim_cur = limit.rlim_max < 8192 ? limit.rlim_max : 8192;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    int silent = getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < 2000 ? SILENT / 3 : SILENT;
    for (int i = 0; i < silent; i++)
        fds[i] = knock(&id, NULL, 0);
    srand(3);
    for (int i = 0; i < NOISY; i++) {
        join.hello.token[0] = (uint8_t)(join.where.token[0] ^ (i % 3 == 0)); /* right, but the hello stays half */
        epx__hello_encode(&join.hello, hello);
        size_t bytes = i % 3 == 0 ? sizeof(hello) : 1 + (size_t)rand() % (sizeof(hello) - 1);
        if (i % 3 == 2)
            for (size_t k = 0; k < bytes; k++)
                hello[k] = (uint8_t)rand();
        fds[silent + i] = knock(&id, hello, bytes);
    }
    uint64_t start = epx__now_ns();
    gather_start(&all[1]);
    for (int i = 0; i < silent; i += 3) { /* and more while they come */
        close(fds[i]);
        fds[i] = knock(&id, NULL, 0);
    }
    gather_start(&all[2]);
    for (int rank = 0; rank < 3; rank++)
        gather_wait(&all[rank]);
    CHECK(seconds_since(start) < 8 * slowness(), "%.1f s to join among strangers", seconds_since(start));
    for (int i = 0; i < silent + NOISY; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    free(all);
}

/* Rank 2 has come and dies while rank 3 is still awaited: nobody waits for the deadline. */
static void dies_while_gathering(void)
{
    epx_unique_id_t id = new_id();
    uint8_t hello[EPX__HELLO_BYTES], answer[EPX__FRAME_BYTES];
    gathered_t *all = gather_make(4, &id, 9000, NULL, NULL);
    gather_start(&all[0]);
    gather_start(&all[1]);
    epx__join_t join = a_join(&id, 2, 4, 9000);
    epx__hello_encode(&join.hello, hello);
    int fd = knock(&id, hello, sizeof(hello));
    CHECK(recv(fd, answer, sizeof(answer), MSG_WAITALL) == (ssize_t)sizeof(answer)); /* rank 0 has taken us in */
    epx__sleep_ns(200000000);
    uint64_t start = epx__now_ns();
    close(fd);
    gather_wait(&all[1]);
    CHECK(seconds_since(start) < well_before(9, 1), "%.2f s", seconds_since(start));
    gather_wait(&all[0]); /* which waits a little for rank 3, to tell it too, but not for the deadline of 9 s */
    CHECK(seconds_since(start) < well_before(9, 6), "%.2f s", seconds_since(start));
    for (int rank = 0; rank < 2; rank++)
        expect(&all[rank], EPX_E_PEER, "rank 2 is gone");
    free(all);
}

static void wait_for_death(gathered_t *one)
{
    CHECK(one->status == EPX_OK, "rank %d: %s", one->rank, one->detail);
    if (one->status != EPX_OK)
        return;
    uint64_t start = epx__now_ns();
    epx_status_t status = epx__bootstrap_barrier(one->bootstrap, 8000);
    CHECK(status == EPX_E_PEER && strstr(epx__detail(), "rank 2 is gone"), "%s", epx__detail());
    CHECK(seconds_since(start) < well_before(8, 3));
    char byte;
    CHECK(epx__bootstrap_recv(one->bootstrap, 2, 1, &byte, 1, 8000) == EPX_E_PEER);
    CHECK(epx__bootstrap_send(one->bootstrap, 2, 1, &byte, 1) == EPX_E_PEER);
    CHECK(epx__bootstrap_dead(one->bootstrap, 2) && !epx__bootstrap_dead(one->bootstrap, 1));
}

/* A rank that has joined and then sends what no rank sends. */
static void garbage_after_joining(int what)
{
    epx_unique_id_t id = new_id();
    gathered_t *all = gather_make(3, &id, 8000, wait_for_death, NULL);
    gather_start(&all[0]);
    gather_start(&all[1]);
    epx__join_t join = a_join(&id, 2, 3, 8000);
    epx__socket_t connected = {.open = false};
    CHECK(epx__join_leaf(&join, &connected) == EPX_OK, "%s", epx__detail());
    uint8_t bytes[EPX__FRAME_BYTES];
    epx__frame_t frame = {.type = EPX__FRAME_DATA, .from = 2, .to = 1, .bytes = 100, .total = 100};
    if (what == 0)
        frame.bytes = UINT32_MAX;
    if (what == 1)
        frame = (epx__frame_t){.type = EPX__FRAME_NOTICE, .from = 1, .bytes = 0}; /* in another's name */
    if (what == 2)
        frame.type = EPX__FRAME_RESULT; /* only rank 0 says this */
    epx__frame_encode(&frame, bytes);
    if (what == 2)
        frame.bytes = 0, epx__frame_encode(&frame, bytes);
    if (what == 3)
        bytes[0] ^= 1;
    CHECK(epx__socket_send_now(&connected, bytes, sizeof(bytes)));
    if (what == 4) /* half a message, then nothing more */
        epx__socket_close(&connected);
    gather_wait(&all[0]);
    gather_wait(&all[1]);
    epx__socket_close(&connected);
    free(all);
}

/* ---- operations ---------------------------------------------------------------------------------- */

static void disagreeing(gathered_t *one)
{
    int mine = one->rank, all[8];
    epx_status_t status = one->rank == 1 ? epx__bootstrap_barrier(one->bootstrap, 0)
                                         : epx__bootstrap_allgather(one->bootstrap, &mine, sizeof(mine), all, 0);
    CHECK(status == EPX_E_MISMATCH && strstr(epx__detail(), "rank 1 in a barrier"), "%s", epx__detail());
    status = epx__bootstrap_allgather(one->bootstrap, &mine, one->rank == 2 ? 2 : 4, all, 0);
    CHECK(status == EPX_E_MISMATCH && strstr(epx__detail(), "rank 2 in an all-gather of 2 bytes"), "%s", epx__detail());
    CHECK(epx__bootstrap_barrier(one->bootstrap, 0) == EPX_OK, "%s", epx__detail()); /* and on it goes */
}

/* Rank 1 comes late to one operation: all others name it; it finds out; the next operation works. */
static double late_by;        /* times longer than on a free machine */
static atomic_int unanswered; /* ranks that asked rank 0 who is missing, and had no answer in 200 ms */

static void late_to_one(gathered_t *one)
{
    uint64_t patience_ms = (uint64_t)(300 * late_by);
    char missing[64];
    snprintf(missing, sizeof missing, "missing after %llu ms: rank 1", (unsigned long long)patience_ms);
    CHECK(epx__bootstrap_barrier(one->bootstrap, 0) == EPX_OK, "%s", epx__detail());
    if (one->rank == 1) {
        epx__sleep_ns((uint64_t)(700000000 * late_by));
        CHECK(epx__bootstrap_barrier(one->bootstrap, 5000) != EPX_E_MISMATCH);
    } else {
        uint64_t start = epx__now_ns();
        epx_status_t status = epx__bootstrap_barrier(one->bootstrap, patience_ms);
        bool named = strstr(epx__detail(), missing) ||
                     strstr(epx__detail(), "missing was rank 1"); /* when another's patience ended a little earlier */
        bool asked = strstr(epx__detail(), "rank 0 does not say who is missing");
        CHECK(status == EPX_E_TIMEOUT && (named || asked), "rank %d: %s", one->rank, epx__detail());
        atomic_fetch_add(&unanswered, asked);
        double late = seconds_since(start) - (double)patience_ms * 1e-3;
        CHECK(late < 1.2 * slowness(), "%.2f s after the deadline", late);
    }
    CHECK(epx__bootstrap_barrier(one->bootstrap, 0) == EPX_OK, "rank %d: %s", one->rank, epx__detail());
}

static void count_death(void *context, int rank)
{
    atomic_fetch_add((atomic_int *)context, 1 << (4 * rank));
}

/* Rank 1 sends a last word and leaves: no death, the word arrives, what needs rank 1 fails in words. */
static void clean_bye(gathered_t *one)
{
    atomic_int deaths = 0;
    int slot, word = 42, heard = 0;
    CHECK(epx__bootstrap_on_death(one->bootstrap, count_death, &deaths, &slot) == EPX_OK);
    if (one->rank == 1) {
        CHECK(epx__bootstrap_send(one->bootstrap, 0, 1, &word, sizeof(word)) == EPX_OK);
        CHECK(epx__bootstrap_send(one->bootstrap, 2, 1, &word, sizeof(word)) == EPX_OK);
        epx__bootstrap_off_death(one->bootstrap, slot);
        return; /* and close */
    }
    epx_status_t status = epx__bootstrap_barrier(one->bootstrap, 8000);
    CHECK(status == EPX_E_PEER && strstr(epx__detail(), "rank 1 has left the group"), "%s", epx__detail());
    CHECK(epx__bootstrap_recv(one->bootstrap, 1, 1, &heard, sizeof(heard), 8000) == EPX_OK && heard == 42, "%s",
          epx__detail());
    CHECK(epx__bootstrap_recv(one->bootstrap, 1, 1, &heard, sizeof(heard), 8000) == EPX_E_PEER);
    CHECK(strstr(epx__detail(), "rank 1 has left"), "%s", epx__detail());
    int other = 2 - one->rank; /* ranks 0 and 2 still talk */
    CHECK(epx__bootstrap_send(one->bootstrap, other, 2, &word, sizeof(word)) == EPX_OK, "%s", epx__detail());
    CHECK(epx__bootstrap_recv(one->bootstrap, other, 2, &heard, sizeof(heard), 8000) == EPX_OK, "%s", epx__detail());
    CHECK(atomic_load(&deaths) == 0);
    epx__bootstrap_off_death(one->bootstrap, slot);
}

/* Rank 0 leaves at once: what the others have sent each other still arrives; then they are told. */
static void root_leaves(gathered_t *one)
{
    int word = one->rank, heard = 0;
    static uint8_t large[3 << 20];
    if (one->rank == 0) {
        for (int rank = 1; rank < one->ranks; rank++)
            CHECK(epx__bootstrap_recv(one->bootstrap, rank, 1, &heard, sizeof(heard), 0) == EPX_OK);
        return;
    }
    int other = one->rank % (one->ranks - 1) + 1, before = (one->rank + one->ranks - 3) % (one->ranks - 1) + 1;
    CHECK(epx__bootstrap_send(one->bootstrap, other, 2, large, sizeof(large)) == EPX_OK, "%s", epx__detail());
    CHECK(epx__bootstrap_send(one->bootstrap, 0, 1, &word, sizeof(word)) == EPX_OK, "%s", epx__detail());
    uint8_t *in = malloc(sizeof(large));
    epx_status_t status = epx__bootstrap_recv(one->bootstrap, before, 2, in, sizeof(large), 0);
    CHECK(status == EPX_OK, "rank %d from %d: %s", one->rank, before, epx__detail());
    free(in);
    status = epx__bootstrap_barrier(one->bootstrap, 8000);
    CHECK(status == EPX_E_PEER && strstr(epx__detail(), "rank 0"), "%s", epx__detail());
    CHECK(!epx__bootstrap_dead(one->bootstrap, 0));
}

static void with_body(int ranks, void (*body)(gathered_t *))
{
    epx_unique_id_t id = new_id();
    gathered_t *all = gather_make(ranks, &id, 10000, body, NULL);
    gather_run(all, ranks);
    for (int rank = 0; rank < ranks; rank++)
        CHECK(all[rank].status == EPX_OK, "%s", all[rank].detail);
    free(all);
}

/* ---- processes ----------------------------------------------------------------------------------- */

/* A member that lives in a process of its own and waits in a barrier which never completes. Its exit code says
 * whether it learnt of `victim`'s death, in words, in time. */
static int member(const epx_unique_id_t *id, int rank, int ranks, int victim, bool with_child)
{
    epx__bootstrap_t *b = NULL;
    epx__bootstrap_config_t config = {.rank = rank, .ranks = ranks, .id = id, .timeout_ms = 10000};
    atomic_int deaths = 0;
    int slot;
    char words[32];
    if (epx__bootstrap_open(&config, &b) != EPX_OK || epx__bootstrap_barrier(b, 0) != EPX_OK)
        return 10;
    if (rank == victim && with_child && fork() == 0) { /* it must not keep its parent's connections alive */
        epx__bootstrap_close(b);
        if (epx__bootstrap_barrier(b, 100) != EPX_E_INVALID)
            _exit(1);
        for (int i = 0; i < 60 && getppid() != 1; i++)
            epx__sleep_ns(50000000);
        _exit(0);
    }
    if (epx__bootstrap_barrier(b, 0) != EPX_OK)
        return 11;
    if (epx__bootstrap_on_death(b, count_death, &deaths, &slot) != EPX_OK)
        return 12;
    if (rank == victim) {
        epx__sleep_ns(200000000);
        raise(SIGKILL);
    }
    uint64_t start = epx__now_ns();
    if (epx__bootstrap_barrier(b, 8000) != EPX_E_PEER)
        return 13;
    double seconds = seconds_since(start);
    snprintf(words, sizeof(words), "rank %d", victim);
    if (!strstr(epx__detail(), words) || !epx__bootstrap_dead(b, victim))
        return 14;
    for (int i = 0; i < 1000 && atomic_load(&deaths) == 0; i++)
        epx__sleep_ns(1000000);
    if (atomic_load(&deaths) != 1 << (4 * victim))
        return 15;
    epx__bootstrap_close(b);
    return seconds < 0.2 + well_before(8, 1) ? 0 : 16; /* 0.2 s until the shot, and a second */
}

static void killed(int victim, bool with_child)
{
    enum { RANKS = 4 };
    pid_t pids[RANKS];
    int wires[2];
    epx_unique_id_t id;
    CHECK(pipe(wires) == 0);
    fflush(stdout);
    for (int rank = 0; rank < RANKS; rank++) {
        pids[rank] = fork();
        if (pids[rank] == 0) {
            if (rank == 0) { /* the id belongs to the process of rank 0 */
                if (epx__unique_id_create(NULL, &id) != EPX_OK)
                    _exit(20);
                for (int i = 1; i < RANKS; i++)
                    if (write(wires[1], &id, sizeof(id)) != (ssize_t)sizeof(id))
                        _exit(21);
            } else if (read(wires[0], &id, sizeof(id)) != (ssize_t)sizeof(id)) {
                _exit(22);
            }
            _exit(member(&id, rank, RANKS, victim, with_child));
        }
    }
    close(wires[0]);
    close(wires[1]);
    for (int rank = 0; rank < RANKS; rank++) {
        int status = 0;
        waitpid(pids[rank], &status, 0);
        if (rank == victim)
            CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        else
            CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "rank %d, victim %d, child %d: exit code %d", rank,
                  victim, with_child, WIFEXITED(status) ? WEXITSTATUS(status) : -1);
    }
}

/* A peer that is stopped answers no bye: close ends nevertheless. */
static void stopped_peer(void)
{
    int wires[2];
    epx_unique_id_t id = {{0}};
    CHECK(pipe(wires) == 0);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        epx__bootstrap_t *b = NULL;
        if (read(wires[0], &id, sizeof(id)) != (ssize_t)sizeof(id))
            _exit(1);
        epx__bootstrap_config_t config = {.rank = 1, .ranks = 2, .id = &id, .timeout_ms = 10000};
        if (epx__bootstrap_open(&config, &b) == EPX_OK && epx__bootstrap_barrier(b, 0) == EPX_OK)
            raise(SIGSTOP);
        _exit(0);
    }
    id = new_id();
    CHECK(write(wires[1], &id, sizeof(id)) == (ssize_t)sizeof(id));
    epx__bootstrap_t *b = NULL;
    epx__bootstrap_config_t config = {.rank = 0, .ranks = 2, .id = &id, .timeout_ms = 10000};
    CHECK(epx__bootstrap_open(&config, &b) == EPX_OK && epx__bootstrap_barrier(b, 0) == EPX_OK, "%s", epx__detail());
    waitpid(pid, NULL, WUNTRACED);
    uint64_t start = epx__now_ns();
    epx__bootstrap_close(b);
    CHECK(seconds_since(start) < 1.5 * slowness(), "%.2f s", seconds_since(start));
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    close(wires[0]);
    close(wires[1]);
}

/* ---- memory -------------------------------------------------------------------------------------- */

static atomic_int failures;

static void some_of_everything(gathered_t *one)
{
    uint8_t mine[300], all[3 * 300];
    memset(mine, one->rank + 1, sizeof(mine));
    int to = (one->rank + 1) % one->ranks, from = (one->rank + one->ranks - 1) % one->ranks;
    epx_status_t status = one->status;
    if (status == EPX_OK)
        status = epx__bootstrap_allgather(one->bootstrap, mine, sizeof(mine), all, 500);
    for (int rank = 0; rank < one->ranks && status == EPX_OK; rank++)
        CHECK(all[300 * rank] == rank + 1 && all[300 * rank + 299] == rank + 1);
    if (status == EPX_OK)
        status = epx__bootstrap_send(one->bootstrap, to, 1, mine, sizeof(mine));
    if (status == EPX_OK)
        status = epx__bootstrap_recv(one->bootstrap, from, 1, all, sizeof(mine), 500);
    if (status == EPX_OK)
        status = epx__bootstrap_barrier(one->bootstrap, 500);
    if (status != EPX_OK) {
        atomic_fetch_add(&failures, 1);
        CHECK(epx__detail()[0], "an error without words: %s", epx__status_name(status));
    }
}

/* The n-th allocation fails, for every n: everybody ends, in time; nobody crashes; nothing is left. */
static void no_memory(int sticky)
{
    int64_t live = epx__alloc_live();
    int count = descriptors(), n = 1, hit = 0;
    double longest = 0;
    for (; n < 200; n++) {
        epx_unique_id_t id = new_id();
        gathered_t *all = gather_make(3, &id, 500, some_of_everything, NULL);
        atomic_store(&failures, 0);
        uint64_t before = epx__alloc_count(), start = epx__now_ns();
        epx__alloc_fail_at((uint64_t)n, sticky);
        gather_run(all, 3);
        epx__alloc_fail_at(0, 0);
        bool reached = epx__alloc_count() - before >= (uint64_t)n;
        longest = seconds_since(start) > longest ? seconds_since(start) : longest;
        hit += atomic_load(&failures) > 0;
        bool opened = all[0].status == EPX_OK && all[1].status == EPX_OK && all[2].status == EPX_OK;
        CHECK(opened || atomic_load(&failures) == 3, "allocation %d: open failed on some ranks, and only %d noticed", n,
              atomic_load(&failures));

        free(all);
        CHECK(epx__alloc_live() == live, "allocation %d: %lld left", n, (long long)(epx__alloc_live() - live));
        CHECK(descriptors() == count, "allocation %d: %d descriptors left", n, descriptors() - count);
        live = epx__alloc_live();
        count = descriptors();
        if (!reached)
            break;
    }
    CHECK(n < 200 && hit > 20, "%d points, %d with failures", n, hit);
    printf("%d points of allocation (%s): %d with failing ranks, the longest took %.2f s\n", n - 1,
           sticky ? "all later ones too" : "one alone", hit, longest);
}

static void step(const char *name, int *count, int64_t *live)
{
    static uint64_t start;
    if (name) {
        printf("%-24s %.2f s\n", name, seconds_since(start));
        CHECK(descriptors() == *count, "%s: %d descriptors left", name, descriptors() - *count);
        CHECK(epx__alloc_live() == *live, "%s: %lld allocations left", name, (long long)(epx__alloc_live() - *live));
    }
    fflush(stdout);
    *count = descriptors();
    *live = epx__alloc_live();
    start = epx__now_ns();
}

int main(void)
{
    int count;
    int64_t live;
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) { /* the flood's two ends are both in this process */
        limit.rlim_cur = limit.rlim_max < 8192 ? limit.rlim_max : 8192;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    setenv("EPX_LOG", "0", 0); /* hundreds of warnings are expected */
    step(NULL, &count, &live);
    /* Processes first: a fork is cleanest before there were threads. */
    killed(2, false);
    killed(0, false);
    killed(1, true);
    step("killed", &count, &live);
    stopped_peer();
    step("stopped peer", &count, &live);
    missing_rank(2);
    missing_rank(0);
    dies_while_gathering();
    step("missing", &count, &live);
    duplicate_rank();
    other_configuration();
    other_count();
    for (int what = 0; what < 5; what++)
        other_build(what);
    step("different", &count, &live);
    other_run();
    flood();
    step("strangers", &count, &live);
    for (int what = 0; what < 5; what++)
        garbage_after_joining(what);
    step("garbage after joining", &count, &live);
    with_body(3, disagreeing);
    late_by = well_before(10, 1);
    for (int turn = 0; turn < 3 && (turn == 0 || atomic_load(&unanswered)); turn++) {
        atomic_store(&unanswered, 0);
        with_body(4, late_to_one);
    }
    CHECK(!atomic_load(&unanswered), "%d ranks do not learn who is missing, three times", atomic_load(&unanswered));
    step("operations", &count, &live);
    with_body(3, clean_bye);
    with_body(4, root_leaves);
    step("leaving", &count, &live);
    no_memory(0);
    no_memory(1);
    step("no memory", &count, &live);
    return check_done();
}
