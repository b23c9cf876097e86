/* Layout of the low-latency part of a window. See ll.h. */
#include "plan/ll.h"

#include "base/fail.h"

#define PAGE 4096u

static bool add(size_t *at, uint64_t a, uint64_t b, uint64_t c, uint64_t bytes)
{
    uint64_t total;
    if (__builtin_mul_overflow(a, b, &total) || __builtin_mul_overflow(total, c, &total) ||
        __builtin_mul_overflow(total, bytes, &total) || total > SIZE_MAX / 4 || *at > SIZE_MAX / 4)
        return false;
    *at = (*at + (size_t)total + PAGE - 1) / PAGE * PAGE;
    return true;
}

static bool make(size_t at, epx__ll_layout_t *l)
{
    size_t end = at, ids, rows;
    l->row_bytes = ((size_t)l->hidden_max * 2 + 255) / 256 * 256;
    bool fits = !__builtin_mul_overflow((size_t)l->tokens_max * 16, l->topk_max, &ids) && ids < SIZE_MAX / 4 &&
                !__builtin_mul_overflow(l->tokens_max, l->row_bytes, &rows) && rows < SIZE_MAX / 4;
    if (!fits)
        return false;
    l->block_bytes = (sizeof(epx__ll_block_t) + ids + 16 + 255) / 256 * 256;
    l->source_bytes = l->block_bytes + rows;
    l->words_offset = end;
    fits = add(&end, l->slots, l->ranks, 1, sizeof(epx__ll_words_t));
    l->sources_offset = end;
    fits = fits && add(&end, l->slots, l->ranks, 1, l->source_bytes);
    l->back_offset = end;
    fits = fits && add(&end, l->slots, l->tokens_max, l->topk_max, l->row_bytes);
    l->row_flags_offset = end;
    fits = fits && add(&end, l->slots, l->ranks, l->tokens_max, 8);
    l->back_flags_offset = end;
    fits = fits && add(&end, l->slots, l->tokens_max, l->topk_max, 8);
    l->total_bytes = end - at;
    return fits;
}

size_t epx__ll_bytes(const epx__ll_layout_t *l, uint32_t far)
{
    size_t out, all;
    if (__builtin_mul_overflow((size_t)l->slots * far, epx__ll_piece_bytes(l), &out) ||
        __builtin_add_overflow(l->total_bytes, out, &all))
        return SIZE_MAX;
    return all;
}

uint32_t epx__ll_tokens_fit(const epx__ll_layout_t *shape, uint32_t far, size_t bytes)
{
    uint32_t low = 0, high = EPX__LL_TOKENS_MOST;
    while (low < high) {
        epx__ll_layout_t l = *shape;
        l.tokens_max = low + (high - low + 1) / 2;
        if (make(0, &l) && epx__ll_bytes(&l, far) <= bytes)
            low = l.tokens_max;
        else
            high = l.tokens_max - 1;
    }
    return low;
}

epx_status_t epx__ll_layout_make(uint32_t ranks, uint32_t tokens_max, uint32_t hidden_max, uint32_t topk_max,
                                 uint32_t slots, size_t at, epx__ll_layout_t *layout)
{
    epx__ll_layout_t l = {
        .ranks = ranks, .tokens_max = tokens_max, .hidden_max = hidden_max, .topk_max = topk_max, .slots = slots};
    if (tokens_max && !make(at, &l))
        return epx__fail(
            EPX_E_INVALID,
            "low latency for %u tokens of hidden %u on %u ranks does not fit 64 bits; the most tokens that "
            "would are %u",
            tokens_max, hidden_max, ranks, epx__ll_tokens_fit(&l, 0, SIZE_MAX / 4));
    *layout = l;
    return EPX_OK;
}
