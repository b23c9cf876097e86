/* Window layout: offsets only. See window.h. */
#include "plan/window.h"

#include <stdbool.h>

#include "base/fail.h"

/* Running total that refuses to wrap. */
typedef struct cursor {
    size_t at;
    bool overflow;
} cursor_t;

static size_t cursor_take(cursor_t *cursor, uint64_t count, uint64_t bytes, size_t align)
{
    size_t start, total;
    if (__builtin_add_overflow(cursor->at, align - 1, &start)) {
        cursor->overflow = true;
        return 0;
    }
    start = start / align * align;
    if (__builtin_mul_overflow((size_t)count, (size_t)bytes, &total) ||
        __builtin_add_overflow(start, total, &cursor->at))
        cursor->overflow = true;
    return start;
}

epx_status_t epx__window_layout_make(uint32_t ranks, const epx_buffer_config_t *config, uint32_t chunk_words,
                                     epx__window_layout_t *layout)
{
    epx__window_layout_t l = {.ranks = ranks, .chunk_words = chunk_words};
    cursor_t c = {0};
    uint64_t count = chunk_words ? 8 : 4; /* bytes: CUDA's counts are words that say themselves that they have come */
    uint64_t message = EPX__COUNTS_OFFSET + count * ranks + count * config->experts_max;
    l.message_bytes = (message + EPX__LINE - 1) / EPX__LINE * EPX__LINE;
    l.control_offset = cursor_take(&c, 1, sizeof(epx__control_t), EPX__LINE);
    l.errors_offset = cursor_take(&c, ranks, sizeof(epx__error_slot_t), EPX__LINE);
    l.words_offset = cursor_take(&c, ranks, sizeof(epx__words_t), EPX__LINE);
    l.mail_offset = cursor_take(&c, 2ull * ranks, l.message_bytes, EPX__LINE);
    l.chunk_words_offset = cursor_take(&c, (uint64_t)ranks * chunk_words, 8, EPX__LINE);
    l.reserve_bytes = config->reserve_bytes;
    l.reserve_offset = cursor_take(&c, 1, config->reserve_bytes, EPX__PAGE);
    l.lease_bytes = config->lease_bytes;
    l.lease_offset = cursor_take(&c, 1, config->lease_bytes, EPX__PAGE);
    l.total_bytes = cursor_take(&c, 0, 0, EPX__PAGE);
    EPX__TRY(epx__ll_layout_make(ranks, config->ll_tokens_max, config->ll_hidden_max, config->topk_max,
                                 config->ll_slots, l.total_bytes, &l.ll));
    c.overflow |= __builtin_add_overflow(l.total_bytes, l.ll.total_bytes, &l.total_bytes);
    if (c.overflow)
        return epx__fail(EPX_E_INVALID,
                         "the window for %u ranks, %zu lease bytes and %zu reserve bytes does not fit 64 bits", ranks,
                         config->lease_bytes, config->reserve_bytes);
    *layout = l;
    return EPX_OK;
}

epx__place_layout_t epx__place_layout_make(const epx__row_shape_t *shape, uint64_t capacity)
{
    epx__place_layout_t l;
    cursor_t c = {0};
    l.x = cursor_take(&c, capacity, shape->row_bytes, EPX__ROW_ALIGN);
    l.side = cursor_take(&c, capacity, shape->side_bytes, EPX__ROW_ALIGN);
    l.topk_idx = cursor_take(&c, capacity, (uint64_t)shape->topk * shape->idx_bytes, EPX__ROW_ALIGN);
    l.topk_weights = cursor_take(&c, capacity, shape->weights ? 4ull * shape->topk : 0, EPX__ROW_ALIGN);
    l.src_token = cursor_take(&c, capacity, shape->src_token ? 4 : 0, EPX__ROW_ALIGN);
    l.total_bytes = c.overflow ? SIZE_MAX : cursor_take(&c, 0, 0, EPX__ROW_ALIGN);
    return l;
}

size_t epx__row_shape_bytes(const epx__row_shape_t *shape)
{
    size_t topk_bytes = (size_t)shape->topk * (shape->idx_bytes + (shape->weights ? 4u : 0u));
    return shape->row_bytes + shape->side_bytes + topk_bytes + (shape->src_token ? 4u : 0u);
}

uint64_t epx__place_capacity(const epx__row_shape_t *shape, size_t bytes)
{
    size_t slack = 5 * EPX__ROW_ALIGN; /* one alignment an array */
    size_t row = epx__row_shape_bytes(shape);
    return bytes <= slack || row == 0 ? 0 : (bytes - slack) / row;
}

epx_place_t epx__place_at(uint8_t *base, const epx__row_shape_t *shape, uint64_t capacity)
{
    epx__place_layout_t l = epx__place_layout_make(shape, capacity);
    return (epx_place_t){.x = base + l.x,
                         .side = shape->side_bytes ? base + l.side : NULL,
                         .topk_idx = shape->topk ? base + l.topk_idx : NULL,
                         .topk_weights = shape->weights ? (float *)(void *)(base + l.topk_weights) : NULL,
                         .src_token = shape->src_token ? (int32_t *)(void *)(base + l.src_token) : NULL};
}
