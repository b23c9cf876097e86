/* Sizes of channels and their limits: the notice's 32 bits, and where things lie in the host block. */
#include "channel/channels.h"

#include "base/fail.h"

#define WINDOW_DEFAULT 128
#define FIFO_DEFAULT 1024
#define CHANNELS_DEFAULT 4
#define RANKS_PER_PROXY 16
#define PROXIES_DEFAULT_MAX 8

static uint32_t log2_of(uint64_t value)
{
    uint32_t bits = 0;
    while (((uint64_t)1 << bits) < value)
        bits++;
    return bits;
}

static bool power_of_two(uint64_t value)
{
    return value && (value & (value - 1)) == 0;
}

static epx_status_t check_limits(const epx__channels_t *self)
{
    if (self->ranks < 1 || self->rank >= self->ranks)
        return epx__fail(EPX_E_INVALID, "channels: rank %u of %u", self->rank, self->ranks);
    if (self->memory_count < 1 || self->memory_count > EPX__CHANNELS_MEMORIES)
        return epx__fail(EPX_E_INVALID, "channels: %u memories; 1 to %d are possible", self->memory_count,
                         EPX__CHANNELS_MEMORIES);
    if (!power_of_two(self->window) || self->window < 2 || self->window > 32768)
        return epx__fail(EPX_E_INVALID, "channels: window %u; a power of two from 2 to 32768 is needed", self->window);
    if (!power_of_two(self->fifo_slots) || self->fifo_slots > 1u << 20)
        return epx__fail(EPX_E_INVALID, "channels: %u FIFO slots; a power of two up to 2^20 is needed",
                         self->fifo_slots);
    if (self->proxies < 1 || self->proxies > EPX__CHANNELS_PROXIES)
        return epx__fail(EPX_E_INVALID, "channels: %u proxies; 1 to %d are possible", self->proxies,
                         EPX__CHANNELS_PROXIES);
    if ((uint64_t)self->ranks * self->channels > UINT32_MAX / 2)
        return epx__fail(EPX_E_INVALID, "channels: %u ranks of %u channels are more than 2^31", self->ranks,
                         self->channels);
    return EPX_OK;
}

epx_status_t epx__channels_sizes(epx__channels_t *self)
{
    const epx__channels_config_t *config = &self->config;
    uint32_t rule = (self->ranks + RANKS_PER_PROXY - 1) / RANKS_PER_PROXY;
    self->channels = config->channels ? config->channels : CHANNELS_DEFAULT;
    self->window = config->window ? config->window : WINDOW_DEFAULT;
    self->fifo_slots = config->fifo_slots ? config->fifo_slots : FIFO_DEFAULT;
    self->proxies = config->proxies ? config->proxies : rule < PROXIES_DEFAULT_MAX ? rule : PROXIES_DEFAULT_MAX;
    if (self->proxies > self->ranks)
        self->proxies = self->ranks; /* more would have no peer */
    EPX__TRY(check_limits(self));
    uint64_t lanes = (uint64_t)((self->ranks + self->proxies - 1) / self->proxies) * self->channels;
    self->sequence_bits = log2_of((uint64_t)self->window * 2);
    self->lane_bits = 30 - self->sequence_bits;
    if (lanes > (uint64_t)1 << self->lane_bits)
        return epx__fail(
            EPX_E_INVALID,
            "channels: a notice has 32 bits: 2 for its kind, %u for sequence numbers of a window of %u, which "
            "leaves %u for %llu lanes (%u channels of %u ranks at each of %u proxies); take a smaller "
            "window, fewer channels or more proxies",
            self->sequence_bits, self->window, self->lane_bits, (unsigned long long)lanes, self->channels, self->ranks,
            self->proxies);
    if (lanes * self->window * 2 > UINT32_MAX / 2)
        return epx__fail(EPX_E_INVALID,
                         "channels: %llu lanes with a window of %u could have more than 2^31 notices under way at one "
                         "proxy; take a smaller window, fewer channels or more proxies",
                         (unsigned long long)lanes, self->window);
    return EPX_OK;
}

uint32_t epx__channels_lane(const epx__channels_t *self, uint32_t rank, uint32_t channel)
{
    return rank / self->proxies * self->channels + channel;
}

static size_t part(size_t *at, size_t count, size_t bytes)
{
    size_t start = *at;
    *at += (count * bytes + 63) / 64 * 64;
    return start;
}

void epx__block_layout_make(epx__channels_t *self)
{
    size_t lanes = (size_t)self->ranks * self->channels, at = 0;
    epx__block_layout_t *layout = &self->layout;
    layout->fault = part(&at, self->ranks, 64);
    layout->issued = part(&at, lanes, 64);
    layout->acked = part(&at, lanes, 64);
    layout->signals = part(&at, lanes, 64);
    layout->barrier = part(&at, lanes, 64);
    layout->head = part(&at, self->proxies, 64);
    layout->tail = part(&at, self->proxies, 64);
    layout->asleep = part(&at, self->proxies, 64);
    layout->bye_in = part(&at, lanes, sizeof(uint64_t));
    layout->bye_out = part(&at, lanes, sizeof(uint64_t));
    layout->add_in = part(&at, lanes * self->window, sizeof(epx__add_slot_t));
    layout->add_out = part(&at, lanes * self->window, sizeof(epx__add_slot_t));
    layout->slots = part(&at, (size_t)self->proxies * self->fifo_slots, sizeof(epx_port_request_t));
    layout->total = (at + 4095) / 4096 * 4096;
}
