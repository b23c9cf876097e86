/* The calls behind the inline side: waking a proxy, the barrier, and what there is to ask. */
#include "channel/channels.h"

#include <sched.h>
#include <stdio.h>
#include <time.h>

#include "base/fail.h"

uint64_t epx_host_clock_ns(void)
{
    return epx__now_ns();
}

void epx_host_wait_turn(uint32_t turn)
{
    struct timespec nap = {0, 50000};
    if (turn < 64)
        return;
    if (turn < 1000)
        sched_yield();
    else
        nanosleep(&nap, NULL);
}

void epx_port_wake(const epx_port_channel_t *channel)
{
    epx__channels_t *self = channel->owner;
    epx__proxy_wake(&self->proxy[(uint32_t)channel->peer % self->proxies]);
}

const epx_port_channel_t *epx_channels_port_table(const epx_channels_t *channels)
{
    return channels ? channels->port : NULL;
}

const epx_memory_channel_t *epx_channels_memory_table(const epx_channels_t *channels)
{
    return channels ? channels->mapped : NULL;
}

uint32_t epx_channels_per_peer(const epx_channels_t *channels)
{
    return channels ? channels->channels : 0;
}

void *epx_channels_memory(const epx_channels_t *channels, uint32_t memory)
{
    return channels && memory < channels->memory_count ? channels->memory[memory].base : NULL;
}

void *epx_channels_host_block(const epx_channels_t *channels, size_t *bytes)
{
    if (bytes)
        *bytes = channels ? channels->layout.total : 0;
    return channels ? channels->block : NULL;
}

size_t epx_channels_tickets(int ranks, const epx_channels_config_t *config)
{
    if (!config || ranks < 1)
        return 0;
    epx__channels_t sizes = {.ranks = (uint32_t)ranks, .memory_count = 1};
    sizes.config.channels = config->channels;
    sizes.config.proxies = config->proxies;
    if (epx__channels_sizes(&sizes) != EPX_OK)
        return 0;
    return sizes.proxies + (size_t)sizes.ranks * sizes.channels;
}

const char *epx_channels_why(const epx_channels_t *channels)
{
    return channels ? channels->why : "no channels";
}

void epx_channels_traffic(const epx_channels_t *channels, uint64_t *bytes, uint64_t *puts)
{
    if (bytes)
        *bytes = channels ? atomic_load(&channels->net_bytes) : 0;
    if (puts)
        *puts = channels ? atomic_load(&channels->net_puts) : 0;
}

epx_status_t epx_channels_status(epx_channels_t *channels)
{
    epx_status_t status = EPX_OK;
    if (!channels)
        return epx__fail(EPX_E_INVALID, "epx_channels_status: channels is NULL");
    pthread_mutex_lock(&channels->words_lock);
    if (channels->fault_status)
        status = epx__fail((epx_status_t)channels->fault_status, "%s", channels->words);
    pthread_mutex_unlock(&channels->words_lock);
    return status;
}

static epx_status_t in_words(epx_channels_t *self, epx_status_t status, uint32_t peer, const char *doing)
{
    if (status != EPX_E_TIMEOUT && epx_channels_status(self) != EPX_OK)
        return status;
    return epx__fail(status, "barrier over all channels: %s rank %u: %s", doing, peer, epx__status_text(status));
}

/*
 * One add of 1 to the barrier word of every channel at every peer: it takes effect there after all earlier requests of
 * that channel. The words are in the hidden memory behind the caller's own (the host block, laid out alike everywhere).
 */
epx_status_t epx_channels_barrier(epx_channels_t *self)
{
    if (!self)
        return epx__fail(EPX_E_INVALID, "epx_channels_barrier: channels is NULL");
    uint64_t epoch = ++self->barrier_epoch;
    for (uint32_t number = 0; number < self->ranks * self->channels; number++) {
        const epx_port_channel_t *channel = &self->port[number];
        uint32_t line = self->rank * self->channels + number % self->channels;
        if (channel->window == 0)
            continue;
        epx_status_t status =
            epx_port_atomic_add(channel, self->memory_count, self->layout.barrier + (size_t)line * 64, 1);
        if (status != EPX_OK)
            return in_words(self, status, (uint32_t)channel->peer, "telling");
    }
    for (uint32_t number = 0; number < self->ranks * self->channels; number++) {
        const epx_port_channel_t *channel = &self->port[number];
        if (channel->window == 0)
            continue;
        const uint64_t *word = epx__block_word(self, self->layout.barrier, number);
        epx_status_t status = epx_port_wait_word(channel, word, epoch);
        if (status != EPX_OK)
            return in_words(self, status, (uint32_t)channel->peer, "waiting for");
    }
    return EPX_OK;
}
