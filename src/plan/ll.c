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

epx_status_t epx__ll_layout_make(uint32_t ranks, uint32_t tokens_max, uint32_t hidden_max, uint32_t topk_max,
                                 uint32_t slots, size_t at, epx__ll_layout_t *layout)
{
    epx__ll_layout_t l = {
        .ranks = ranks, .tokens_max = tokens_max, .hidden_max = hidden_max, .topk_max = topk_max, .slots = slots};
    if (tokens_max == 0) {
        *layout = l;
        return EPX_OK;
    }
    size_t end = at;
    l.row_bytes = ((size_t)hidden_max * 2 + 255) / 256 * 256;
    l.block_bytes = (sizeof(epx__ll_block_t) + (size_t)tokens_max * topk_max * 16 + 16 + 255) / 256 * 256;
    l.words_offset = end;
    bool fits = add(&end, slots, ranks, 1, sizeof(epx__ll_words_t));
    l.ids_offset = end;
    fits = fits && add(&end, slots, ranks, 1, l.block_bytes);
    l.rows_offset = end;
    fits = fits && add(&end, slots, ranks, tokens_max, l.row_bytes);
    l.back_offset = end;
    fits = fits && add(&end, slots, tokens_max, topk_max, l.row_bytes);
    l.row_flags_offset = end;
    fits = fits && add(&end, slots, ranks, tokens_max, 8);
    l.back_flags_offset = end;
    fits = fits && add(&end, slots, tokens_max, topk_max, 8);
    if (!fits)
        return epx__fail(EPX_E_INVALID, "low latency for %u tokens of hidden %u on %u ranks does not fit 64 bits",
                         tokens_max, hidden_max, ranks);
    l.total_bytes = end - at;
    *layout = l;
    return EPX_OK;
}
