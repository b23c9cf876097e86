/*
 * Rows with a number in every byte: word j of the row of (kind, a, b, c) is a hash of all of these, bent so that it
 * holds finite numbers of the format (exponents near 1). A row in a wrong place, or with a piece of another row, is
 * seen.
 */
#ifndef EPX_TOOL_PATTERN_H
#define EPX_TOOL_PATTERN_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef enum pattern_format {
    PATTERN_BF16 = 0,
    PATTERN_FP16 = 1,
    PATTERN_FP32 = 2,
    PATTERN_BYTES = 3
} pattern_format_t;

static inline uint64_t pattern_key(uint64_t seed, uint32_t kind, uint32_t a, uint32_t b, uint32_t c)
{
    uint64_t key = seed * 0x9e3779b97f4a7c15u + kind;
    const uint32_t part[3] = {a, b, c};
    for (int i = 0; i < 3; i++) {
        key = (key ^ part[i]) * 0xbf58476d1ce4e5b9u;
        key ^= key >> 29;
    }
    return key;
}

static inline uint64_t pattern_word(uint64_t key, size_t index, pattern_format_t format)
{
    static const uint64_t keep[4] = {0x83ff83ff83ff83ffu, 0x8fff8fff8fff8fffu, 0x83ffffff83ffffffu, ~UINT64_C(0)};
    static const uint64_t set[4] = {0x3c003c003c003c00u, 0x3000300030003000u, 0x3c0000003c000000u, 0};
    uint64_t x = key + index * 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 32) * 0xd6e8feb86659fd93u;
    x ^= x >> 32;
    return (x & keep[format]) | set[format];
}

/* bytes is a multiple of 4. */
static inline void pattern_fill(void *row, size_t bytes, uint64_t key, pattern_format_t format)
{
    unsigned char *at = (unsigned char *)row;
    size_t words = bytes / 8;
    for (size_t j = 0; j < words; j++) {
        uint64_t word = pattern_word(key, j, format);
        memcpy(at + 8 * j, &word, 8);
    }
    if (bytes % 8) {
        uint64_t word = pattern_word(key, words, format);
        memcpy(at + 8 * words, &word, bytes % 8);
    }
}

#endif
