/*
 * The floor of an exchange between two domains of one rank: the same bytes both ways at once as a raw put stream over
 * the same network, by two processes, with a local copy before (gather) and after (scatter), a chunk at a time. No
 * counts, no routing, no flags but the network's own.
 *
 *     net_floor [NETWORK] [MiB each way] [local MiB copied besides] [rounds]
 */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/fail.h"
#include "net/net.h"

enum { SLOTS = 16 };

typedef struct side {
    int other; /* socket to the other process */
    epx__net_t *net;
    epx__net_memory_t *memory;
    epx__net_key_t key;
    uint32_t peer;
    char *ring, *source, *target, *local;
    uint64_t sent, done, came, credit;
} side_t;

static void both(int fd, const void *mine, void *theirs, size_t bytes)
{
    if (write(fd, mine, bytes) != (ssize_t)bytes || recv(fd, theirs, bytes, MSG_WAITALL) != (ssize_t)bytes)
        exit(2);
}

static int look(side_t *s)
{
    epx__net_event_t events[64];
    uint32_t n = 0;
    if (s->net->ops->progress(s->net, events, 64, &n) != EPX_OK)
        exit(3);
    for (uint32_t i = 0; i < n; i++) {
        s->done += events[i].kind == EPX__NET_SENT && events[i].cookie == 1;
        s->came += events[i].kind == EPX__NET_NOTICE && events[i].value == 1;
        s->credit += events[i].kind == EPX__NET_NOTICE && events[i].value == 2;
    }
    return (int)n;
}

static void give_credit(side_t *s)
{
    epx__net_put_t put = {.peer = s->peer, .notice = 2, .with_notice = true, .cookie = 2};
    while (s->net->ops->put(s->net, &put) == EPX_E_BUSY)
        look(s);
}

/* One round: all chunks out, all in, each copied before and after. Returns seconds. */
static double round_of(side_t *s, size_t bytes, size_t local, size_t chunk)
{
    char token = 0;
    both(s->other, &token, &token, 1);
    s->sent = s->done = s->came = s->credit = 0;
    uint64_t chunks = (bytes + chunk - 1) / chunk, taken = 0, start = epx__now_ns();
    memcpy(s->local, s->source, local);
    while (taken < chunks || s->done < chunks) {
        int moved = look(s);
        if (s->sent < chunks && s->sent - s->credit < SLOTS) {
            size_t at = (size_t)s->sent * chunk, n = bytes - at < chunk ? bytes - at : chunk;
            size_t slot = s->sent % SLOTS * chunk;
            epx__net_put_t put = {
                .peer = s->peer, .notice = 1, .with_notice = true, .memory = s->memory, .to = &s->key};
            memcpy(s->ring + slot, s->source + at, n);
            put.offset = slot;
            put.to_offset = SLOTS * chunk + slot;
            put.bytes = n;
            put.cookie = 1;
            if (s->net->ops->put(s->net, &put) == EPX_OK)
                s->sent++, moved = 1;
        }
        if (taken < s->came) {
            size_t at = (size_t)taken * chunk, n = bytes - at < chunk ? bytes - at : chunk;
            memcpy(s->target + at, s->ring + SLOTS * chunk + taken % SLOTS * chunk, n);
            taken++;
            give_credit(s);
            moved = 1;
        }
        if (!moved)
            sched_yield();
    }
    while (s->credit < chunks)
        if (!look(s))
            sched_yield();
    return (double)(epx__now_ns() - start) * 1e-9;
}

static int run(int me, int other, const char *spec, size_t bytes, size_t local, int rounds)
{
    static const size_t chunks[] = {65536, 131072, 262144, 524288, 1048576};
    side_t s = {.other = other};
    epx__net_config_t config = {.address = "127.0.0.1", .peers_max = 1, .puts_max = 64, .notices_max = 256};
    epx__net_address_t mine, theirs;
    size_t ring = 2 * SLOTS * chunks[4];
    if (epx__net_open(spec, &config, &s.net) != EPX_OK) {
        fprintf(stderr, "%s\n", epx__detail());
        return 1;
    }
    s.ring = aligned_alloc(4096, ring);
    s.source = aligned_alloc(4096, bytes > local ? bytes : local);
    s.target = aligned_alloc(4096, bytes);
    s.local = aligned_alloc(4096, local + 4096);
    memset(s.ring, 1, ring);
    memset(s.source, 2, bytes > local ? bytes : local);
    memset(s.target, 3, bytes);
    memset(s.local, 4, local + 4096);
    epx__net_key_t key;
    s.net->ops->enroll(s.net, s.ring, ring, false, &s.memory, &key);
    s.net->ops->address(s.net, &mine);
    both(other, &mine, &theirs, sizeof mine);
    both(other, &key, &s.key, sizeof key);
    s.net->ops->connect(s.net, &theirs, &s.peer);
    for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++) {
        double best = 1e9;
        for (int i = 0; i < rounds; i++) {
            double mine_s = round_of(&s, bytes, local, chunks[c]), theirs_s;
            both(other, &mine_s, &theirs_s, sizeof mine_s);
            double slower = mine_s > theirs_s ? mine_s : theirs_s;
            best = slower < best ? slower : best;
        }
        if (me == 0)
            printf("%s: %.1f MB each way in chunks of %zu KiB, %.1f MB copied locally besides: %.1f ms (best of %d)\n",
                   spec, (double)bytes * 1e-6, chunks[c] / 1024, (double)local * 1e-6, best * 1e3, rounds);
    }
    epx__net_close(s.net);
    return 0;
}

int main(int argc, char **argv)
{
    const char *spec = argc > 1 ? argv[1] : "ofi:tcp";
    size_t bytes = (size_t)((argc > 2 ? atof(argv[2]) : 56.0) * 1048576.0);
    size_t local = (size_t)((argc > 3 ? atof(argv[3]) : 56.0) * 1048576.0);
    int rounds = argc > 4 ? atoi(argv[4]) : 5, pair[2], status = 0;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
        return 1;
    pid_t child = fork();
    if (child == 0)
        return run(1, pair[1], spec, bytes, local, rounds);
    int rc = run(0, pair[0], spec, bytes, local, rounds);
    waitpid(child, &status, 0);
    return rc || status;
}
