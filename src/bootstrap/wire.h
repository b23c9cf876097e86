/*
 * The bytes of the bootstrap: the unique id, the hello that a joining rank says, and the frames that follow.
 *
 * Pure functions over bytes, no I/O, no allocation: whatever a stranger sends is judged here first
 * (tests/fuzz/fuzz_bootstrap.c). Numbers are little-endian. A function that judges returns NULL when all is well,
 * else words that say what is wrong.
 */
#ifndef EPX_BOOTSTRAP_WIRE_H
#define EPX_BOOTSTRAP_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <epx/epx.h>

enum {
    EPX__WIRE_PROTOCOL = 2,
    EPX__RANKS_MAX = 4096,
    EPX__TOKEN_BYTES = 32,
    EPX__HELLO_BYTES = 512,
    EPX__FRAME_BYTES = 40,
    EPX__PAYLOAD_MAX = 4 << 20, /* bytes in one frame; larger messages travel in several */
    EPX__WORDS_MAX = 1000,      /* bytes of an explanation */
    EPX__NOTICE_MAX = 1024,
    EPX__ENDPOINT_TEXT = 56, /* "[IPv6]:port" and its end */
    EPX__ENDPOINT_BYTES = 20,
    EPX__HOST_TEXT = 64,
    EPX__CONFIG_TEXT = 256,
};

/* Where a rank listens. */
typedef struct epx__endpoint {
    uint8_t family; /* 4 or 6; 0: nowhere */
    uint16_t port;
    uint8_t address[16]; /* network order; IPv4 in the first four */
} epx__endpoint_t;

/* "1.2.3.4:5" or "[::1]:5"; port 0 is refused. */
const char *epx__endpoint_parse(const char *text, epx__endpoint_t *endpoint);
const char *epx__endpoint_parse_address(const char *text, epx__endpoint_t *endpoint); /* without port */
void epx__endpoint_text(const epx__endpoint_t *endpoint, char text[EPX__ENDPOINT_TEXT]);
/* As in a hello and in PEERS; what is no endpoint reads as family 0. */
void epx__endpoint_put(const epx__endpoint_t *endpoint, uint8_t bytes[EPX__ENDPOINT_BYTES]);
void epx__endpoint_get(const uint8_t bytes[EPX__ENDPOINT_BYTES], epx__endpoint_t *endpoint);

typedef struct epx__id {
    epx__endpoint_t endpoint;
    uint8_t token[EPX__TOKEN_BYTES];
} epx__id_t;

void epx__id_encode(const epx__id_t *id, epx_unique_id_t *bytes);
const char *epx__id_decode(const epx_unique_id_t *bytes, epx__id_t *id);

/* What a joining rank says first. Its first 48 bytes (magic, protocol, size, token) never change their place. */
typedef struct epx__hello {
    uint32_t protocol;
    uint8_t token[EPX__TOKEN_BYTES];
    uint32_t rank, ranks, version, pid;
    uint32_t failure; /* a status: this rank cannot take part, and says so rather than be waited for */
    uint64_t sizes_hash, config_hash;
    epx__endpoint_t standby; /* where this rank listens, should it ever take rank 0's place */
    char host[EPX__HOST_TEXT];
    char config_words[EPX__CONFIG_TEXT];
} epx__hello_t;

void epx__hello_encode(const epx__hello_t *hello, uint8_t bytes[EPX__HELLO_BYTES]);
const char *epx__hello_parse(const uint8_t bytes[EPX__HELLO_BYTES], epx__hello_t *hello);
/* Whether `have` bytes can still become a hello: lets a stranger go at the first wrong byte. */
bool epx__hello_begins(const uint8_t *bytes, size_t have);
bool epx__token_equal(const uint8_t a[EPX__TOKEN_BYTES], const uint8_t b[EPX__TOKEN_BYTES]); /* constant time */

typedef enum epx__frame_type {
    /* Rank 0 to a rank that joins. */
    EPX__FRAME_WAITING = 1, /* payload: bit r is set when rank r has come */
    EPX__FRAME_WELCOME,
    EPX__FRAME_REFUSE, /* tag: status; payload: words */
    /* Any rank to any rank, through the middle: rank 0, or who took its place. */
    EPX__FRAME_DATA,   /* tag; total: bytes of the whole message */
    EPX__FRAME_NOTICE, /* tag; to all */
    EPX__FRAME_BYE,
    /* To rank 0. */
    EPX__FRAME_GATHER, /* sequence, tag: kind; total: bytes of the whole operation; payload: one rank's chunk */
    EPX__FRAME_GIVEUP, /* sequence; tag: status: the sender cannot take part */
    EPX__FRAME_QUERY,  /* sequence: who has not come? */
    /* From rank 0. After it is gone, DEATH and LEFT pass both ways between its successor and the others. */
    EPX__FRAME_RESULT, /* sequence; payload: all ranks' chunks */
    EPX__FRAME_ABORT,  /* sequence; tag: status; payload: words */
    EPX__FRAME_ANSWER, /* sequence; payload as WAITING */
    EPX__FRAME_DEATH,  /* tag: the rank that is gone */
    EPX__FRAME_LEFT,   /* tag: the rank that said bye */
    EPX__FRAME_PEERS,  /* payload: every rank's standby endpoint */
    EPX__FRAME_TYPES
} epx__frame_type_t;

enum { EPX__FRAME_MORE = 1 }; /* flag: further frames of the same message follow */

typedef struct epx__frame {
    uint8_t type, flags;
    uint32_t from, to, tag;
    uint32_t bytes; /* payload after the header */
    uint64_t sequence, total;
} epx__frame_t;

void epx__frame_encode(const epx__frame_t *frame, uint8_t bytes[EPX__FRAME_BYTES]);
/* `ranks` bounds from, to and ranks in tags. */
const char *epx__frame_parse(const uint8_t bytes[EPX__FRAME_BYTES], uint32_t ranks, epx__frame_t *frame);

/* Words from the wire, made printable; bounded by room. */
void epx__wire_words(const uint8_t *bytes, size_t count, char *words, size_t room);

/* "3", "3, 5, 7", "1-4, 9": the ranks whose bit is not set in `present`. */
void epx__wire_missing(const uint8_t *present, size_t present_bytes, uint32_t ranks, char *words, size_t room);

uint64_t epx__hash_bytes(uint64_t seed, const void *data, size_t bytes); /* not cryptographic */
uint64_t epx__sizes_hash(void); /* of all public structs and of the wire's own: tells builds apart */

#endif
