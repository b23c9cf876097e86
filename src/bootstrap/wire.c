/* Encoding and judging of the bootstrap's bytes: see wire.h. */
#include "bootstrap/wire.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const uint8_t id_magic[8] = {'E', 'P', 'X', '-', 'I', 'D', 0, 1};
static const uint8_t hello_magic[8] = {'E', 'P', 'X', '-', 'H', 'I', '\r', '\n'};
enum { FRAME_MAGIC = 0xE9B5, ID_VERSION = 1 };

static void put16(uint8_t *at, uint16_t value)
{
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
}

static void put32(uint8_t *at, uint32_t value)
{
    put16(at, (uint16_t)value);
    put16(at + 2, (uint16_t)(value >> 16));
}

static void put64(uint8_t *at, uint64_t value)
{
    put32(at, (uint32_t)value);
    put32(at + 4, (uint32_t)(value >> 32));
}

static uint16_t get16(const uint8_t *at)
{
    return (uint16_t)(at[0] | at[1] << 8);
}

static uint32_t get32(const uint8_t *at)
{
    return get16(at) | (uint32_t)get16(at + 2) << 16;
}

static uint64_t get64(const uint8_t *at)
{
    return get32(at) | (uint64_t)get32(at + 4) << 32;
}

/* FNV-1a with a final mix, so that short inputs reach all bits. */
uint64_t epx__hash_bytes(uint64_t seed, const void *data, size_t bytes)
{
    const uint8_t *at = data;
    uint64_t hash = 0xcbf29ce484222325u ^ seed;
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ at[i]) * 0x100000001b3u;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
    return hash ^ (hash >> 31);
}

/* ---- endpoint -------------------------------------------------------------------------------- */

const char *epx__endpoint_parse_address(const char *text, epx__endpoint_t *endpoint)
{
    epx__endpoint_t parsed = {0};
    static const uint8_t zero[16];
    if (inet_pton(AF_INET, text, parsed.address) == 1)
        parsed.family = 4;
    else if (inet_pton(AF_INET6, text, parsed.address) == 1)
        parsed.family = 6;
    else
        return "it must be a numeric IPv4 or IPv6 address";
    if (!memcmp(parsed.address, zero, sizeof(zero)))
        return "it must be one address that others can reach, not the wildcard";
    *endpoint = parsed;
    return NULL;
}

const char *epx__endpoint_parse(const char *text, epx__endpoint_t *endpoint)
{
    char address[INET6_ADDRSTRLEN + 2];
    const char *colon = strrchr(text, ':');
    if (!colon || (size_t)(colon - text) >= sizeof(address))
        return "it must be IP:port, or [IPv6]:port";
    size_t length = (size_t)(colon - text);
    memcpy(address, text, length);
    address[length] = '\0';
    char *start = address;
    if (length >= 2 && address[0] == '[' && address[length - 1] == ']') {
        address[length - 1] = '\0';
        start++;
    } else if (strchr(address, ':')) {
        return "an IPv6 address needs brackets: [IPv6]:port";
    }
    uint32_t port = 0;
    const char *digit = colon + 1;
    for (; *digit >= '0' && *digit <= '9' && port < 65536; digit++)
        port = port * 10 + (uint32_t)(*digit - '0');
    if (*digit || digit == colon + 1 || port == 0 || port > 65535)
        return "the port must be a number from 1 to 65535";
    const char *wrong = epx__endpoint_parse_address(start, endpoint);
    if (!wrong)
        endpoint->port = (uint16_t)port;
    return wrong;
}

void epx__endpoint_text(const epx__endpoint_t *endpoint, char text[EPX__ENDPOINT_TEXT])
{
    char address[INET6_ADDRSTRLEN] = "?";
    inet_ntop(endpoint->family == 6 ? AF_INET6 : AF_INET, endpoint->address, address, sizeof(address));
    snprintf(text, EPX__ENDPOINT_TEXT, endpoint->family == 6 ? "[%s]:%u" : "%s:%u", address, endpoint->port);
}

/* 0 family, 1 zero, 2 port, 4 address[16] */

void epx__endpoint_put(const epx__endpoint_t *endpoint, uint8_t bytes[EPX__ENDPOINT_BYTES])
{
    bytes[0] = endpoint->family;
    bytes[1] = 0;
    put16(bytes + 2, endpoint->port);
    memcpy(bytes + 4, endpoint->address, 16);
}

void epx__endpoint_get(const uint8_t bytes[EPX__ENDPOINT_BYTES], epx__endpoint_t *endpoint)
{
    *endpoint = (epx__endpoint_t){0};
    if ((bytes[0] != 4 && bytes[0] != 6) || bytes[1] || !get16(bytes + 2))
        return;
    endpoint->family = bytes[0];
    endpoint->port = get16(bytes + 2);
    memcpy(endpoint->address, bytes + 4, 16);
}

/* ---- unique id ------------------------------------------------------------------------------- */
/* 0 magic, 8 version, 10 family, 12 port, 16 address[16], 32 token[32], 64 zeros, 120 checksum */

void epx__id_encode(const epx__id_t *id, epx_unique_id_t *bytes)
{
    uint8_t *at = bytes->bytes;
    memset(at, 0, sizeof(bytes->bytes));
    memcpy(at, id_magic, sizeof(id_magic));
    put16(at + 8, ID_VERSION);
    at[10] = id->endpoint.family;
    put16(at + 12, id->endpoint.port);
    memcpy(at + 16, id->endpoint.address, 16);
    memcpy(at + 32, id->token, EPX__TOKEN_BYTES);
    put64(at + 120, epx__hash_bytes(0, at, 120));
}

const char *epx__id_decode(const epx_unique_id_t *bytes, epx__id_t *id)
{
    const uint8_t *at = bytes->bytes;
    static const uint8_t zero[56];
    if (memcmp(at, id_magic, sizeof(id_magic)))
        return "these 128 bytes are not a unique id of epx";
    if (get64(at + 120) != epx__hash_bytes(0, at, 120))
        return "the unique id was damaged on its way (its checksum is wrong)";
    if (get16(at + 8) != ID_VERSION)
        return "the unique id was made by another version of epx";
    if ((at[10] != 4 && at[10] != 6) || !get16(at + 12) || at[11] || at[14] || at[15] || memcmp(at + 64, zero, 56))
        return "the unique id holds no address";
    id->endpoint = (epx__endpoint_t){.family = at[10], .port = get16(at + 12)};
    memcpy(id->endpoint.address, at + 16, 16);
    memcpy(id->token, at + 32, EPX__TOKEN_BYTES);
    return NULL;
}

/* ---- hello ----------------------------------------------------------------------------------- */
/* 0 magic, 8 protocol, 12 size, 16 token[32], 48 rank, 52 ranks, 56 version, 60 pid, 64 sizes, 72 config,
 * 80 host[64], 144 config words[256], 400 failure, 404 standby[20], 424 zeros */

/* A text field: copied up to its zero, made printable, always ended. */
static void get_text(const uint8_t *at, size_t bytes, char *text)
{
    epx__wire_words(at, strnlen((const char *)at, bytes - 1), text, bytes);
}

void epx__hello_encode(const epx__hello_t *hello, uint8_t bytes[EPX__HELLO_BYTES])
{
    memset(bytes, 0, EPX__HELLO_BYTES);
    memcpy(bytes, hello_magic, sizeof(hello_magic));
    put32(bytes + 8, hello->protocol);
    put32(bytes + 12, EPX__HELLO_BYTES);
    memcpy(bytes + 16, hello->token, EPX__TOKEN_BYTES);
    put32(bytes + 48, hello->rank);
    put32(bytes + 52, hello->ranks);
    put32(bytes + 56, hello->version);
    put32(bytes + 60, hello->pid);
    put32(bytes + 400, hello->failure);
    epx__endpoint_put(&hello->standby, bytes + 404);
    put64(bytes + 64, hello->sizes_hash);
    put64(bytes + 72, hello->config_hash);
    memcpy(bytes + 80, hello->host, strnlen(hello->host, EPX__HOST_TEXT - 1));
    memcpy(bytes + 144, hello->config_words, strnlen(hello->config_words, EPX__CONFIG_TEXT - 1));
}

bool epx__hello_begins(const uint8_t *bytes, size_t have)
{
    return !memcmp(bytes, hello_magic, have < sizeof(hello_magic) ? have : sizeof(hello_magic));
}

const char *epx__hello_parse(const uint8_t bytes[EPX__HELLO_BYTES], epx__hello_t *hello)
{
    if (!epx__hello_begins(bytes, EPX__HELLO_BYTES))
        return "not a hello of epx";
    if (get32(bytes + 12) != EPX__HELLO_BYTES)
        return "a hello of a size that this version does not know";
    hello->protocol = get32(bytes + 8);
    memcpy(hello->token, bytes + 16, EPX__TOKEN_BYTES);
    hello->rank = get32(bytes + 48);
    hello->ranks = get32(bytes + 52);
    hello->version = get32(bytes + 56);
    hello->pid = get32(bytes + 60);
    hello->failure = get32(bytes + 400);
    epx__endpoint_get(bytes + 404, &hello->standby);
    hello->sizes_hash = get64(bytes + 64);
    hello->config_hash = get64(bytes + 72);
    get_text(bytes + 80, EPX__HOST_TEXT, hello->host);
    get_text(bytes + 144, EPX__CONFIG_TEXT, hello->config_words);
    return NULL;
}

bool epx__token_equal(const uint8_t a[EPX__TOKEN_BYTES], const uint8_t b[EPX__TOKEN_BYTES])
{
    uint8_t differs = 0;
    for (size_t i = 0; i < EPX__TOKEN_BYTES; i++)
        differs |= a[i] ^ b[i];
    return !differs;
}

/* ---- frames ---------------------------------------------------------------------------------- */
/* 0 magic, 2 type, 3 flags, 4 from, 8 to, 12 tag, 16 payload bytes, 20 zero, 24 sequence, 32 total */

/* The most payload that a frame of each type may announce. */
static const uint32_t payload_max[EPX__FRAME_TYPES] = {
    [EPX__FRAME_WAITING] = EPX__RANKS_MAX / 8,
    [EPX__FRAME_REFUSE] = EPX__WORDS_MAX,
    [EPX__FRAME_DATA] = EPX__PAYLOAD_MAX,
    [EPX__FRAME_NOTICE] = EPX__NOTICE_MAX,
    [EPX__FRAME_GATHER] = EPX__PAYLOAD_MAX,
    [EPX__FRAME_RESULT] = EPX__PAYLOAD_MAX,
    [EPX__FRAME_ABORT] = EPX__WORDS_MAX,
    [EPX__FRAME_ANSWER] = EPX__RANKS_MAX / 8,
    [EPX__FRAME_PEERS] = EPX__RANKS_MAX * EPX__ENDPOINT_BYTES,
};

void epx__frame_encode(const epx__frame_t *frame, uint8_t bytes[EPX__FRAME_BYTES])
{
    put16(bytes, FRAME_MAGIC);
    bytes[2] = frame->type;
    bytes[3] = frame->flags;
    put32(bytes + 4, frame->from);
    put32(bytes + 8, frame->to);
    put32(bytes + 12, frame->tag);
    put32(bytes + 16, frame->bytes);
    put32(bytes + 20, 0);
    put64(bytes + 24, frame->sequence);
    put64(bytes + 32, frame->total);
}

const char *epx__frame_parse(const uint8_t bytes[EPX__FRAME_BYTES], uint32_t ranks, epx__frame_t *frame)
{
    if (get16(bytes) != FRAME_MAGIC || get32(bytes + 20))
        return "not a frame of epx";
    epx__frame_t parsed = {
        .type = bytes[2],
        .flags = bytes[3],
        .from = get32(bytes + 4),
        .to = get32(bytes + 8),
        .tag = get32(bytes + 12),
        .bytes = get32(bytes + 16),
        .sequence = get64(bytes + 24),
        .total = get64(bytes + 32),
    };
    if (parsed.type == 0 || parsed.type >= EPX__FRAME_TYPES)
        return "a frame of a type that does not exist";
    if (parsed.from >= ranks || parsed.to >= ranks)
        return "a frame from or to a rank that does not exist";
    if (parsed.bytes > payload_max[parsed.type])
        return "a frame that announces more bytes than its type may have";
    if (parsed.flags & ~(parsed.type == EPX__FRAME_DATA ? EPX__FRAME_MORE : 0))
        return "a frame with flags that its type does not have";
    if (parsed.type == EPX__FRAME_DATA && parsed.bytes > parsed.total)
        return "a frame that is larger than its whole message";
    if ((parsed.type == EPX__FRAME_DEATH || parsed.type == EPX__FRAME_LEFT) && parsed.tag >= ranks)
        return "word of a rank that does not exist";
    *frame = parsed;
    return NULL;
}

void epx__wire_words(const uint8_t *bytes, size_t count, char *words, size_t room)
{
    size_t length = count < room - 1 ? count : room - 1;
    for (size_t i = 0; i < length; i++)
        words[i] = bytes[i] >= 0x20 && bytes[i] < 0x7f ? (char)bytes[i] : '?';
    words[length] = '\0';
}

static bool has(const uint8_t *present, size_t present_bytes, uint32_t rank)
{
    return rank / 8 < present_bytes && (present[rank / 8] >> (rank % 8) & 1);
}

void epx__wire_missing(const uint8_t *present, size_t present_bytes, uint32_t ranks, char *words, size_t room)
{
    size_t used = 0;
    uint32_t count = 0;
    words[0] = '\0';
    for (uint32_t rank = 0, end; rank < ranks; rank = end) {
        end = rank + 1;
        if (has(present, present_bytes, rank))
            continue;
        while (end < ranks && !has(present, present_bytes, end))
            end++;
        int more =
            snprintf(words + used, room - used, end > rank + 1 ? "%s%u-%u" : "%s%u", count ? ", " : "", rank, end - 1);
        if (more < 0 || (size_t)more + 5 >= room - used) { /* keep room for " ..." */
            snprintf(words + used, room - used, " ...");
            return;
        }
        used += (size_t)more;
        count++;
    }
}

/* ---- what a build looks like ------------------------------------------------------------------- */

uint64_t epx__sizes_hash(void)
{
    const uint32_t sizes[] = {
        sizeof(void *),
        sizeof(epx_unique_id_t),
        sizeof(epx_group_config_t),
        sizeof(epx_group_info_t),
        sizeof(epx_buffer_config_t),
        sizeof(epx_layout_t),
        sizeof(epx_rows_t),
        sizeof(epx_dispatch_t),
        sizeof(epx_place_t),
        sizeof(epx_received_t),
        sizeof(epx_counts_t),
        sizeof(epx_combine_t),
        EPX_TOPK_MAX,
        EPX__HELLO_BYTES,
        EPX__FRAME_BYTES,
        EPX__PAYLOAD_MAX,
        sizeof(epx__frame_t),
        EPX__FRAME_TYPES,
    };
    uint8_t bytes[sizeof(sizes)];
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
        put32(bytes + 4 * i, sizes[i]);
    return epx__hash_bytes(0x657078, bytes, sizeof(bytes));
}
