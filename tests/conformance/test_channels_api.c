/*
 * Channels as a user makes them: epx_channels_create on a group, memory channels inside a domain and port channels to
 * everybody, dense tables, the barrier, refusals. Every (from, to, channel) carries a pattern of its own.
 */
#include "common/world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <epx/channel.h>

#include "base/fail.h"
#include "net/net.h"

enum { CHANNELS = 3, WORDS = 8, ROUNDS = 20 };

typedef struct context {
    int domains;
} context_t;

static uint64_t pattern(int from, int to, uint32_t channel, uint64_t round, int word)
{
    return xt_mix((uint64_t)from * 100 + (uint64_t)to, channel, round, (uint64_t)word);
}

/* Where (from, to, channel)'s words land at `to`: memory 0 by memory channels, memory 1 by port channels. */
static size_t place(int from, uint32_t channel)
{
    return ((size_t)from * CHANNELS + channel) * WORDS * 8;
}

static void refusals(xt_rank_t *self)
{
    epx_channel_memory_t two[2] = {{.bytes = 64}, {.bytes = 64}};
    epx_channels_config_t config = {.size = sizeof config, .memories = two, .memory_count = 2};
    epx_channels_t *none = NULL;
    epx_status_t status = epx_channels_create(self->group, &config, &none);
    XT_CHECK(self, status == EPX_E_INVALID || status == EPX_E_PEER, "two without base: %s", epx_error_detail());
    config.memory_count = 0;
    status = epx_channels_create(self->group, &config, &none);
    XT_CHECK(self, status == EPX_E_INVALID || status == EPX_E_PEER, "no memory: %s", epx_error_detail());
    static char memory[XT_RANKS_MAX][64];
    epx_channel_memory_t one = {memory[self->rank], 64, 0};
    config.memories = &one;
    config.memory_count = 1;
    config.window = 100;
    status = epx_channels_create(self->group, &config, &none);
    XT_CHECK(self, status == EPX_E_INVALID || status == EPX_E_PEER, "window of 100: %s", epx_error_detail());
    config.window = self->rank == 0 ? 64 : 32;
    status = epx_channels_create(self->group, &config, &none);
    XT_CHECK(self, self->ranks == 1 || status == EPX_E_MISMATCH || status == EPX_E_PEER, "windows differ: %s",
             epx_error_detail());
    if (self->ranks == 1)
        epx_channels_destroy(none);
}

static void by_memory(xt_rank_t *self, epx_channels_t *channels, uint64_t round)
{
    const epx_memory_channel_t *table = epx_channels_memory_table(channels);
    const uint64_t *mine = epx_channels_memory(channels, 0);
    for (int p = 0; p < self->ranks; p++)
        for (uint32_t c = 0; c < CHANNELS; c++) {
            const epx_memory_channel_t *channel = &table[p * CHANNELS + (int)c];
            uint64_t words[WORDS];
            XT_CHECK(self, channel->peer == p && channel->channel == c, "entry %d, %u", p, c);
            if (p == self->rank || self->topology.domain_of[p] != self->topology.domain_of[self->rank]) {
                XT_CHECK(self, epx_memory_signal(channel) == EPX_E_INVALID, "out of reach");
                continue;
            }
            for (int w = 0; w < WORDS; w++)
                words[w] = pattern(self->rank, p, c, round, w);
            XT_OK(self, epx_memory_put(channel, place(self->rank, c), words, sizeof words, 0, 1));
            XT_OK(self, epx_memory_signal(channel));
            XT_CHECK(self, epx_memory_put(channel, channel->remote_bytes - 8, words, 16, 0, 1) == EPX_E_INVALID,
                     "bounds");
        }
    for (int p = 0; p < self->ranks; p++)
        for (uint32_t c = 0; c < CHANNELS; c++) {
            const epx_memory_channel_t *channel = &table[p * CHANNELS + (int)c];
            if (!channel->remote || !XT_OK(self, epx_memory_wait(channel, round)))
                continue;
            for (int w = 0; w < WORDS; w++)
                XT_CHECK(self, mine[place(p, c) / 8 + (size_t)w] == pattern(p, self->rank, c, round, w),
                         "memory channel %u from %d, word %d", c, p, w);
        }
}

static void by_port(xt_rank_t *self, epx_channels_t *channels, uint64_t round, uint64_t *out)
{
    const epx_port_channel_t *table = epx_channels_port_table(channels);
    const uint64_t *mine = epx_channels_memory(channels, 1);
    for (int p = 0; p < self->ranks; p++)
        for (uint32_t c = 0; c < CHANNELS; c++) {
            const epx_port_channel_t *channel = &table[p * CHANNELS + (int)c];
            size_t from = place(p, c);
            XT_CHECK(self, channel->peer == p, "entry %d, %u", p, c);
            if (p == self->rank)
                continue;
            for (int w = 0; w < WORDS; w++)
                out[from / 8 + (size_t)w] = pattern(self->rank, p, c, round, w);
            XT_OK(self, epx_port_put_signal(channel, epx_port_memories(1, 2), place(self->rank, c), from, WORDS * 8));
        }
    for (int p = 0; p < self->ranks; p++)
        for (uint32_t c = 0; c < CHANNELS; c++) {
            const epx_port_channel_t *channel = &table[p * CHANNELS + (int)c];
            if (p == self->rank || !XT_OK(self, epx_port_wait(channel, round)))
                continue;
            for (int w = 0; w < WORDS; w++)
                XT_CHECK(self, mine[place(p, c) / 8 + (size_t)w] == pattern(p, self->rank, c, round, w),
                         "port channel %u from %d, word %d", c, p, w);
        }
}

static void without_channels(xt_rank_t *self)
{
    size_t bytes = 1;
    uint64_t net_bytes = 1, puts = 1;
    XT_CHECK(self, !epx_channels_port_table(NULL) && !epx_channels_memory_table(NULL), "tables");
    XT_CHECK(self, epx_channels_per_peer(NULL) == 0 && !epx_channels_memory(NULL, 0), "sizes");
    XT_CHECK(self, !epx_channels_host_block(NULL, &bytes) && bytes == 0, "host block");
    XT_CHECK(self, epx_channels_tickets(2, NULL) == 0, "tickets");
    XT_CHECK(self, epx_channels_barrier(NULL) == EPX_E_INVALID && strstr(epx_error_detail(), "NULL"), "barrier");
    XT_CHECK(self, epx_channels_status(NULL) == EPX_E_INVALID && strstr(epx_error_detail(), "NULL"), "status");
    XT_CHECK(self, epx_channels_why(NULL) != NULL, "why");
    epx_channels_traffic(NULL, &net_bytes, NULL);
    epx_channels_traffic(NULL, NULL, &puts);
    XT_CHECK(self, net_bytes == 0 && puts == 0, "traffic");
    epx_channels_destroy(NULL);
}

/* A put out of range: the words name the channel, the peer and the range. Others' channels are not the worse for it. */
static void out_of_range(xt_rank_t *self, epx_channels_t *channels, size_t bytes)
{
    if (self->rank != 0 || self->ranks < 2)
        return;
    const epx_port_channel_t *port = &epx_channels_port_table(channels)[1 * CHANNELS + 1];
    XT_CHECK(self, epx_port_put(port, epx_port_memories(1, 2), bytes - 8, 0, 16) == EPX_OK, "pushed");
    XT_CHECK(self, epx_port_flush(port) == EPX_E_INVALID, "flush");
    XT_CHECK(self, epx_channels_status(channels) == EPX_E_INVALID, "status");
    XT_CHECK(self, strstr(epx_error_detail(), "channel 1 to rank 1: put: ") && strstr(epx_error_detail(), "+16)"), "%s",
             epx_error_detail());
}

static void body(xt_rank_t *self)
{
    size_t bytes = (size_t)self->ranks * CHANNELS * WORDS * 8;
    uint64_t *in = calloc(1, bytes), *out = calloc(1, bytes);
    epx_channel_memory_t memories[3] = {{.bytes = bytes}, {in, bytes, 0}, {out, bytes, 0}};
    epx_channels_config_t config = {.size = sizeof config,
                                    .memories = memories,
                                    .memory_count = 3,
                                    .channels = CHANNELS,
                                    .proxies = 2,
                                    .window = 16};
    epx_channels_t *channels = NULL;
    refusals(self);
    if (XT_OK(self, epx_channels_create(self->group, &config, &channels))) {
        XT_CHECK(self, epx_channels_per_peer(channels) == CHANNELS, "channels");
        XT_CHECK(self, epx_channels_memory(channels, 3) == NULL, "the hidden memory stays hidden");
        XT_CHECK(self, strlen(epx_channels_why(channels)) > 10, "why");
        bool good = true;
        for (uint64_t round = 1; good && round <= ROUNDS; round++) {
            by_memory(self, channels, round);
            by_port(self, channels, round, out);
            good = XT_OK(self, epx_channels_barrier(channels)); /* before the next round overwrites */
        }
        XT_OK(self, epx_channels_status(channels));
        uint64_t net_bytes, puts;
        epx_channels_traffic(channels, &net_bytes, &puts);
        XT_CHECK(self, !good || net_bytes == (uint64_t)(self->ranks - 1) * CHANNELS * ROUNDS * WORDS * 8, "%llu bytes",
                 (unsigned long long)net_bytes);
        if (good)
            out_of_range(self, channels, bytes);
        XT_OK(self, epx_group_barrier(self->group, 0)); /* a peer that has left is another fault */
    }
    epx_channels_destroy(channels);
    without_channels(self);
    free(in);
    free(out);
}

static void run(const char *net, int ranks, int per_domain, bool processes)
{
    char name[64];
    setenv("EPX_NET", net, 1);
    snprintf(name, sizeof name, "%d ranks, %d a domain, %s", ranks, per_domain, net);
    xt_run_t r = {.name = name,
                  .ranks = ranks,
                  .ranks_per_domain = per_domain,
                  .processes = processes && !getenv("EPX_TEST_THREADS"),
                  .body = body};
    xt_run(&r);
}

int main(void)
{
    epx__net_t *net = NULL;
    epx__net_config_t config = {.address = "127.0.0.1", .peers_max = 1, .puts_max = 16, .notices_max = 16};
    run("loop", 1, 1, false);
    run("loop", 4, 2, false);
    run("sim:5", 5, 5, false);
    run("sim:6", 6, 3, false);
    if (epx__net_open("ofi:tcp", &config, &net) == EPX_OK) {
        epx__net_close(net);
        run("ofi:tcp", 4, 2, true);
    } else
        printf("ofi:tcp: not here: %s\n", epx__detail());
    return xt_done();
}
