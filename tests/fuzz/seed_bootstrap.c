/* Writes inputs that the parsers accept, for the fuzzer to start from. Argument: the folder. */
#include <stdio.h>

#include "bootstrap_input.h"

static void save(const char *folder, const char *name, uint8_t what, const void *data, size_t size)
{
    char path[1024];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    if (!file)
        return;
    fputc(what, file);
    fwrite(data, 1, size, file);
    fclose(file);
}

int main(int count, char **arguments)
{
    const char *folder = count > 1 ? arguments[1] : ".";
    epx__id_t id = {.endpoint = {.family = 4, .port = 4711, .address = {10, 1, 2, 3}}, .token = "a token of 32 bytes"};
    epx__hello_t hello = {.protocol = EPX__WIRE_PROTOCOL,
                          .token = "a token",
                          .rank = 3,
                          .ranks = 8,
                          .version = 256,
                          .pid = 77,
                          .host = "host",
                          .config_words = "words"};
    epx_unique_id_t bytes[2];
    uint8_t said[EPX__HELLO_BYTES], frames[EPX__FRAME_TYPES * (EPX__FRAME_BYTES + 8)];
    epx__id_encode(&id, &bytes[0]);
    save(folder, "seed-id-4", 0, bytes, sizeof(bytes[0]));
    id.endpoint.family = 6;
    epx__id_encode(&id, &bytes[0]);
    bytes[1] = bytes[0];
    save(folder, "seed-id-6", 0, bytes, sizeof(bytes[0]) + 1);
    epx__hello_encode(&hello, said);
    save(folder, "seed-hello", 1, said, sizeof(said));
    size_t used = 0;
    for (uint8_t type = 1; type < EPX__FRAME_TYPES; type++) {
        bool loaded = type != EPX__FRAME_BYE && type != EPX__FRAME_GIVEUP && type != EPX__FRAME_QUERY &&
                      type != EPX__FRAME_WELCOME && type < EPX__FRAME_DEATH;
        epx__frame_t frame = {.type = type,
                              .from = 3,
                              .to = 1,
                              .tag = 5,
                              .bytes = loaded ? 8 : 0,
                              .sequence = 9,
                              .total = 16,
                              .flags = type == EPX__FRAME_DATA};
        char name[32];
        epx__frame_encode(&frame, frames + used);
        memcpy(frames + used + EPX__FRAME_BYTES, "payload", loaded ? 8 : 0);
        size_t size = EPX__FRAME_BYTES + frame.bytes;
        snprintf(name, sizeof(name), "seed-frame-%u", type);
        save(folder, name, 2 | 1 << 2, frames + used, size);
        used += size;
    }
    save(folder, "seed-frames", 2 | 1 << 2, frames, used);
    save(folder, "seed-endpoint-4", 3, "127.0.0.1:4711", 14);
    save(folder, "seed-endpoint-6", 3, "[fe80::1]:65535", 15);
    return 0;
}
