/*
 * The other ranks' side of the rendezvous: connect to rank 0, say hello, wait to be welcomed. Whatever goes wrong
 * on the way (nobody listens yet, rank 0 was flooded and hung up) is tried again until the deadline; only words
 * of refusal, and an end after rank 0 has taken us in, are final.
 */
#include <stdio.h>
#include <string.h>

#include "base/fail.h"
#include "bootstrap/state.h"

typedef enum outcome { WELCOME, FINAL, AGAIN, LATE } outcome_t;

#define ATTEMPT_NS 2000000000ull /* for one TCP connect */
#define PAUSE_FIRST_NS 5000000ull
#define PAUSE_LAST_NS 100000000ull

typedef struct leaf {
    const epx__join_t *join;
    epx__hello_t hello;
    char where[EPX__ENDPOINT_TEXT];
    char trouble[160]; /* of the last attempt */
    bool taken_in;     /* rank 0 has heard our hello */
    uint8_t present[EPX__RANKS_MAX / 8];
    epx_status_t status; /* with FINAL; the words are in epx__detail */
} leaf_t;

/* One frame from rank 0, with a payload that fits. */
static outcome_t read_frame(leaf_t *leaf, epx__socket_t *socket, epx__frame_t *frame, uint8_t *payload, size_t room)
{
    uint8_t header[EPX__FRAME_BYTES];
    int got = epx__socket_receive(socket, header, sizeof(header), leaf->join->deadline_ns);
    if (got == 1) {
        const char *wrong = epx__frame_parse(header, leaf->join->hello.ranks, frame);
        if (wrong || frame->bytes > room) {
            snprintf(leaf->trouble, sizeof(leaf->trouble), "what answers there is not rank 0 of this library");
            return AGAIN;
        }
        got = epx__socket_receive(socket, payload, frame->bytes, leaf->join->deadline_ns);
    }
    if (got == 1)
        return WELCOME;
    if (got == -1)
        return LATE;
    if (leaf->taken_in) {
        leaf->status =
            epx__fail(EPX_E_PEER, "rendezvous: rank 0 at %s went away while the ranks gathered", leaf->where);
        return FINAL;
    }
    snprintf(leaf->trouble, sizeof(leaf->trouble), "it hung up");
    return AGAIN;
}

static outcome_t converse(leaf_t *leaf, epx__socket_t *socket)
{
    uint8_t hello[EPX__HELLO_BYTES], payload[EPX__WORDS_MAX];
    char words[EPX__WORDS_MAX + 1];
    epx__hello_encode(&leaf->hello, hello);
    if (!epx__socket_send_now(socket, hello, sizeof(hello))) {
        snprintf(leaf->trouble, sizeof(leaf->trouble), "it hung up");
        return AGAIN;
    }
    snprintf(leaf->trouble, sizeof(leaf->trouble), "the connection stands, but rank 0 has not answered");
    for (;;) {
        epx__frame_t frame;
        outcome_t outcome = read_frame(leaf, socket, &frame, payload, sizeof(payload));
        if (outcome != WELCOME)
            return outcome;
        switch (frame.type) {
        case EPX__FRAME_WELCOME:
            return WELCOME;
        case EPX__FRAME_WAITING:
            memset(leaf->present, 0, sizeof(leaf->present));
            memcpy(leaf->present, payload, frame.bytes);
            leaf->taken_in = true;
            break;
        case EPX__FRAME_REFUSE:
            epx__wire_words(payload, frame.bytes, words, sizeof(words));
            leaf->status = frame.tag > EPX_OK && frame.tag <= EPX_E_DATA ? (epx_status_t)frame.tag : EPX_E_MISMATCH;
            epx__fail(leaf->status, "rendezvous at %s: %s", leaf->where,
                      !strncmp(words, "rendezvous: ", 12) ? words + 12 : words);
            return FINAL;
        default:
            snprintf(leaf->trouble, sizeof(leaf->trouble), "what answers there is not rank 0 of this library");
            return AGAIN;
        }
    }
}

/* Listen beside this end of the connection, at the same address: there rank 0 can be succeeded. */
static epx_status_t stand_by(leaf_t *leaf, const epx__socket_t *connected)
{
    epx__socket_t *standby = leaf->join->standby;
    epx__endpoint_t *endpoint = &leaf->hello.standby;
    if (!standby || standby->open)
        return EPX_OK;
    if (!epx__socket_here(connected, endpoint))
        return epx__fail(EPX_E_SYSTEM, "rendezvous: this end of the connection has no address");
    epx_status_t status = epx__socket_listen(standby, endpoint);
    if (status != EPX_OK)
        *endpoint = (epx__endpoint_t){0};
    return status;
}

/* Say hello, and hear the answer. A rank that lacks something says that instead, and will be refused. */
static outcome_t introduce(leaf_t *leaf, epx__socket_t *socket)
{
    char words[EPX__DETAIL_BYTES];
    epx_status_t standby = stand_by(leaf, socket);
    snprintf(words, sizeof(words), "%s", epx__detail());
    if (standby != EPX_OK)
        leaf->hello.failure = (uint32_t)standby;
    outcome_t outcome = converse(leaf, socket);
    leaf->hello.failure = leaf->join->hello.failure;
    if (standby == EPX_OK || outcome == AGAIN)
        return outcome;
    leaf->status = standby;
    epx__detail_set(words);
    epx__socket_close(socket);
    return FINAL;
}

static outcome_t attempt(leaf_t *leaf, epx__socket_t *socket)
{
    uint64_t until = epx__now_ns() + ATTEMPT_NS;
    int error;
    leaf->status = epx__socket_connect(socket, &leaf->join->where.endpoint,
                                       until < leaf->join->deadline_ns ? until : leaf->join->deadline_ns, &error);
    if (leaf->join->unheard)
        *leaf->join->unheard = leaf->status != EPX_OK;
    if (leaf->status != EPX_OK)
        return FINAL;
    if (error) {
        snprintf(leaf->trouble, sizeof(leaf->trouble), "%s", strerror(error));
        return AGAIN;
    }
    outcome_t outcome = introduce(leaf, socket);
    if (outcome == LATE) { /* so that rank 0 does not take us for dead */
        uint8_t tired[EPX__FRAME_BYTES];
        epx__frame_encode(&(epx__frame_t){.type = EPX__FRAME_BYE, .from = leaf->hello.rank}, tired);
        epx__socket_send_now(socket, tired, sizeof(tired));
    }
    if (outcome != WELCOME)
        epx__socket_close(socket);
    return outcome;
}

static epx_status_t late(const leaf_t *leaf)
{
    char missing[400];
    unsigned long long timeout_ms = leaf->join->timeout_ms;
    if (!leaf->taken_in)
        return epx__fail(EPX_E_TIMEOUT, "rendezvous: missing after %llu ms: rank 0, which should listen at %s (%s)",
                         timeout_ms, leaf->where, leaf->trouble);
    epx__wire_missing(leaf->present, sizeof(leaf->present), leaf->join->hello.ranks, missing, sizeof(missing));
    return epx__fail(EPX_E_TIMEOUT, "rendezvous at %s: missing after %llu ms: rank %s (of %u ranks)", leaf->where,
                     timeout_ms, missing[0] ? missing : "unknown: all came, but not all stayed",
                     leaf->join->hello.ranks);
}

epx_status_t epx__join_leaf(const epx__join_t *join, epx__socket_t *connected)
{
    leaf_t leaf = {.join = join, .hello = join->hello};
    uint64_t pause_ns = PAUSE_FIRST_NS;
    epx__endpoint_text(&join->where.endpoint, leaf.where);
    snprintf(leaf.trouble, sizeof(leaf.trouble), "no time to try");
    while (epx__now_ns() < join->deadline_ns) {
        outcome_t outcome = attempt(&leaf, connected);
        if (outcome == WELCOME)
            return EPX_OK;
        if (outcome == FINAL)
            return leaf.status;
        if (outcome == LATE)
            break;
        uint64_t now = epx__now_ns(), left = now < join->deadline_ns ? join->deadline_ns - now : 0;
        epx__sleep_ns(pause_ns < left ? pause_ns : left);
        pause_ns = pause_ns * 2 < PAUSE_LAST_NS ? pause_ns * 2 : PAUSE_LAST_NS;
    }
    return late(&leaf);
}
