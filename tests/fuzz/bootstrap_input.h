/*
 * One input for everything that judges bytes from strangers in the bootstrap: the first byte chooses, the rest is what
 * came. Shared by the fuzzer and by the test that replays its corpus. Returns 0; a fault shows as a crash, a finding of
 * a sanitizer, or __builtin_trap on a broken promise.
 */
#ifndef EPX_TEST_BOOTSTRAP_INPUT_H
#define EPX_TEST_BOOTSTRAP_INPUT_H

#include <stdlib.h>
#include <string.h>

#include "bootstrap/wire.h"

#define PROMISE(condition)                                                                                             \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            __builtin_trap();                                                                                          \
    } while (0)

static inline void input_id(const uint8_t *data, size_t size)
{
    epx_unique_id_t bytes = {{0}}, again;
    epx__id_t id;
    memcpy(bytes.bytes, data, size < sizeof(bytes) ? size : sizeof(bytes));
    if (size > sizeof(bytes)) { /* let some through: the checksum made right */
        uint64_t sum = epx__hash_bytes(0, bytes.bytes, 120);
        for (int i = 0; i < 8; i++)
            bytes.bytes[120 + i] = (uint8_t)(sum >> (8 * i));
    }
    if (epx__id_decode(&bytes, &id))
        return;
    PROMISE(id.endpoint.family == 4 || id.endpoint.family == 6);
    char text[EPX__ENDPOINT_TEXT];
    epx__endpoint_text(&id.endpoint, text);
    epx__id_encode(&id, &again);
    PROMISE(!memcmp(&bytes, &again, sizeof(again)));
}

static inline void input_hello(const uint8_t *data, size_t size)
{
    uint8_t bytes[EPX__HELLO_BYTES] = {0}, again[EPX__HELLO_BYTES];
    epx__hello_t hello, twice;
    memcpy(bytes, data, size < sizeof(bytes) ? size : sizeof(bytes));
    for (size_t have = 0; have <= 16; have++)
        epx__hello_begins(bytes, have);
    if (epx__hello_parse(bytes, &hello))
        return;
    PROMISE(strlen(hello.host) < sizeof(hello.host) && strlen(hello.config_words) < sizeof(hello.config_words));
    for (const char *at = hello.config_words; *at; at++)
        PROMISE(*at >= 0x20 && *at < 0x7f);
    epx__hello_encode(&hello, again);
    PROMISE(!epx__hello_parse(again, &twice) && twice.rank == hello.rank && twice.failure == hello.failure &&
            !strcmp(twice.host, hello.host) && epx__token_equal(twice.token, hello.token));
}

/* A stream of frames, as a connection sees it. */
static inline void input_frames(const uint8_t *data, size_t size, uint32_t ranks)
{
    while (size >= EPX__FRAME_BYTES) {
        epx__frame_t frame;
        uint8_t again[EPX__FRAME_BYTES];
        if (epx__frame_parse(data, ranks, &frame))
            return;
        PROMISE(frame.bytes <= EPX__PAYLOAD_MAX && frame.from < ranks && frame.to < ranks);
        PROMISE(frame.type >= 1 && frame.type < EPX__FRAME_TYPES);
        epx__frame_encode(&frame, again);
        PROMISE(!memcmp(data, again, sizeof(again)));
        data += EPX__FRAME_BYTES;
        size -= EPX__FRAME_BYTES;
        size_t payload = frame.bytes < size ? frame.bytes : size;
        char words[100];
        if (frame.type == EPX__FRAME_REFUSE || frame.type == EPX__FRAME_ABORT) {
            epx__wire_words(data, payload, words, sizeof(words));
            PROMISE(strlen(words) <= payload && strlen(words) < sizeof(words));
        }
        if (frame.type == EPX__FRAME_WAITING || frame.type == EPX__FRAME_ANSWER) {
            epx__wire_missing(data, payload, ranks, words, sizeof(words));
            PROMISE(strlen(words) < sizeof(words));
        }
        data += payload;
        size -= payload;
    }
}

static inline void input_endpoint(const uint8_t *data, size_t size)
{
    char text[200], printed[EPX__ENDPOINT_TEXT];
    epx__endpoint_t endpoint, twice;
    size_t length = size < sizeof(text) - 1 ? size : sizeof(text) - 1;
    memcpy(text, data, length);
    text[length] = '\0';
    if (epx__endpoint_parse(text, &endpoint))
        return;
    epx__endpoint_text(&endpoint, printed);
    PROMISE(endpoint.port && !epx__endpoint_parse(printed, &twice) && !memcmp(&twice, &endpoint, sizeof(twice)));
}

static inline int bootstrap_input(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    uint8_t what = data[0];
    data++;
    size--;
    switch (what & 3) {
    case 0:
        input_id(data, size);
        break;
    case 1:
        input_hello(data, size);
        break;
    case 2:
        input_frames(data, size, 1 + (what >> 2) * 64u);
        break;
    default:
        input_endpoint(data, size);
    }
    return 0;
}

#endif
