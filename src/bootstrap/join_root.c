/*
 * Rank 0's side of the rendezvous: let strangers in one by one, until every rank has said a good hello.
 *
 * A stranger gets a place among at most PENDING_MAX (guests.h). Nothing it says is believed before its token is right.
 * Whoever has the token and disagrees ends the rendezvous for all: the verdict goes to those who are here, and
 * for GRACE_NS to those who still come.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/fail.h"
#include "base/log.h"
#include "bootstrap/guests.h"
#include "bootstrap/state.h"

enum { PENDING_MAX = 64, ACCEPTS_A_TURN = 256, TICK_MS = 100 };
#define GRACE_NS 2000000000ull
#define NEWS_NS 100000000ull /* how often those who wait hear who has come */

typedef struct root {
    const epx__join_t *join;
    epx__bootstrap_t *b; /* NULL: there was no memory */
    epx__socket_t *listener;
    uint32_t ranks, joined, strangers;
    struct pollfd few_polls[2 * (1 + PENDING_MAX)];
    struct pollfd *polls; /* listener, pending, then links; and as much to scratch in */
    epx__guest_t pending[PENDING_MAX];
    uint8_t told[EPX__RANKS_MAX / 8]; /* who has heard the verdict */
    uint8_t came[EPX__RANKS_MAX / 8]; /* who has ever said a good hello: one whose own deadline is a little earlier
                                       * hangs up before ours, and is not the one that was missing */
    bool news;                        /* somebody came or went since those who wait were told */
    uint64_t news_ns;
    epx_status_t verdict;
    char words[EPX__WORDS_MAX];
} root_t;

size_t epx__join_refusal(epx_status_t status, const char *words, uint8_t bytes[EPX__FRAME_BYTES + EPX__WORDS_MAX])
{
    size_t length = strnlen(words, EPX__WORDS_MAX);
    epx__frame_t frame = {.type = EPX__FRAME_REFUSE, .tag = (uint32_t)status, .bytes = (uint32_t)length};
    epx__frame_encode(&frame, bytes);
    memcpy(bytes + EPX__FRAME_BYTES, words, length);
    return EPX__FRAME_BYTES + length;
}

static void refuse(epx__socket_t *socket, epx_status_t status, const char *words)
{
    uint8_t bytes[EPX__FRAME_BYTES + EPX__WORDS_MAX];
    epx__socket_send_now(socket, bytes, epx__join_refusal(status, words, bytes));
    epx__socket_close(socket);
}

static void present(const root_t *root, uint8_t bits[EPX__RANKS_MAX / 8])
{
    memset(bits, 0, EPX__RANKS_MAX / 8);
    bits[0] = 1; /* this is rank 0 */
    for (uint32_t rank = 1; root->b && rank < root->ranks; rank++)
        if (root->b->link[rank].socket.open)
            bits[rank / 8] |= (uint8_t)(1u << (rank % 8));
}

static void mark(uint8_t bits[EPX__RANKS_MAX / 8], uint32_t rank)
{
    bits[rank / 8] |= (uint8_t)(1u << (rank % 8));
}

/* The end for all: tell those who are here. The first verdict stands. */
static void decide(root_t *root, epx_status_t verdict, const char *words)
{
    if (root->verdict != EPX_OK)
        return;
    root->verdict = verdict;
    snprintf(root->words, sizeof(root->words), "%s", words);
    for (uint32_t rank = 1; root->b && rank < root->ranks; rank++) {
        if (!root->b->link[rank].socket.open)
            continue;
        refuse(&root->b->link[rank].socket, verdict, words);
        mark(root->told, rank);
    }
    root->joined = 0;
}

/* What those who have the token disagree about; false when nothing. */
static bool disagree(const root_t *root, const epx__hello_t *hello, char *words, size_t room)
{
    const epx__hello_t *mine = &root->join->hello;
    char who[160];
    snprintf(who, sizeof(who), "rank %u (process %u on %s)", hello->rank, hello->pid, hello->host);
    if (hello->protocol != mine->protocol)
        snprintf(words, room, "%s speaks bootstrap protocol %u, rank 0 %u: all ranks need the same epx", who,
                 hello->protocol, mine->protocol);
    else if (hello->version != mine->version)
        snprintf(words, room, "%s runs epx %u.%u.%u, rank 0 runs %u.%u.%u: all ranks need the same version", who,
                 hello->version >> 16, hello->version >> 8 & 255, hello->version & 255, mine->version >> 16,
                 mine->version >> 8 & 255, mine->version & 255);
    else if (hello->sizes_hash != mine->sizes_hash)
        snprintf(words, room, "%s runs another build of epx than rank 0: their structs have different sizes", who);
    else if (hello->ranks != mine->ranks)
        snprintf(words, room, "%s counts %u ranks in the group, rank 0 counts %u", who, hello->ranks, mine->ranks);
    else if (hello->rank == 0 || hello->rank >= mine->ranks)
        snprintf(words, room,
                 "process %u on %s says that it is rank %u; the others are ranks 1 to %u (rank 0 is process "
                 "%u on %s)",
                 hello->pid, hello->host, hello->rank, mine->ranks - 1, mine->pid, mine->host);
    else if (hello->config_hash != mine->config_hash)
        snprintf(words, room, "%s has another configuration than rank 0: \"%s\", rank 0 \"%s\"", who,
                 hello->config_words, mine->config_words);
    else
        return false;
    return true;
}

static bool send_present(const root_t *root, const epx__socket_t *socket)
{
    uint8_t bytes[EPX__FRAME_BYTES + EPX__RANKS_MAX / 8];
    epx__frame_t frame = {.type = EPX__FRAME_WAITING, .bytes = (root->ranks + 7) / 8};
    epx__frame_encode(&frame, bytes);
    memcpy(bytes + EPX__FRAME_BYTES, root->came, frame.bytes);
    bytes[EPX__FRAME_BYTES] |= 1; /* this is rank 0 */
    return epx__socket_send_now(socket, bytes, EPX__FRAME_BYTES + frame.bytes);
}

typedef enum presence { HERE, TIRED, GONE } presence_t;

/* A rank that has come says nothing before it is welcomed, but for one thing: that its own deadline has passed. */
static presence_t presence(const epx__socket_t *socket)
{
    char byte;
    ssize_t got = recv(socket->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    return got > 0 ? TIRED : got < 0 && (errno == EAGAIN || errno == EINTR) ? HERE : GONE;
}

static void lose(root_t *root, uint32_t rank)
{
    epx__socket_close(&root->b->link[rank].socket);
    root->joined--;
    root->news = true;
}

/* Something has come from a rank, or could not be sent to it. One that waits no longer is not the one that is missing;
 * one that hung up without a word has died, and nobody need wait for it. */
static void look_after(root_t *root, uint32_t rank)
{
    char words[EPX__WORDS_MAX];
    presence_t now = presence(&root->b->link[rank].socket);
    if (now == HERE)
        return;
    lose(root, rank);
    snprintf(words, sizeof(words), "rank %u is gone (its connection ended while the ranks gathered)", rank);
    if (now == TIRED)
        return;
    mark(root->told, rank);
    decide(root, EPX_E_PEER, words);
}

static void take_hello(root_t *root, epx__guest_t *pending, const epx__hello_t *hello)
{
    char words[EPX__WORDS_MAX];
    bool differs = disagree(root, hello, words, sizeof(words));
    bool known = hello->rank > 0 && hello->rank < root->ranks;
    epx__connection_t *link = root->b && known ? &root->b->link[hello->rank] : NULL;
    if (!differs && root->verdict == EPX_OK && link->socket.open && presence(&link->socket) == GONE)
        lose(root, hello->rank);
    if (!differs && root->verdict == EPX_OK && link->socket.open) {
        snprintf(words, sizeof(words),
                 "two processes say that they are rank %u, the second is process %u on %s: every "
                 "rank needs a number of its own",
                 hello->rank, hello->pid, hello->host);
        differs = true;
    }
    if (differs)
        decide(root, EPX_E_MISMATCH, words);
    if (hello->failure != EPX_OK) {
        snprintf(words, sizeof(words), "rank %u (process %u on %s) cannot take part: %s", hello->rank, hello->pid,
                 hello->host, epx__status_text((epx_status_t)hello->failure));
        decide(root, EPX_E_PEER, words);
    }
    if (root->verdict != EPX_OK) {
        refuse(&pending->socket, root->verdict, root->words);
        if (known)
            mark(root->told, hello->rank);
        return;
    }
    epx__socket_move(&link->socket, &pending->socket);
    root->b->peers[hello->rank] = hello->standby;
    root->joined++;
    mark(root->came, hello->rank);
    root->news = true;
    if (!send_present(root, &link->socket))
        look_after(root, hello->rank);
}

static void turn_away(root_t *root, epx__guest_t *pending)
{
    epx__socket_close(&pending->socket);
    root->strangers++;
}

static void read_pending(root_t *root, epx__guest_t *pending)
{
    epx__hello_t hello;
    int got = epx__guest_read(pending, &hello);
    if (got == 0)
        return;
    if (got < 0) {
        turn_away(root, pending);
    } else if (!epx__token_equal(hello.token, root->join->hello.token)) {
        root->strangers++;
        refuse(&pending->socket, EPX_E_MISMATCH,
               "the rendezvous there belongs to another run: its token differs from the one given here");
    } else {
        take_hello(root, pending, &hello);
    }
}

static void accept_some(root_t *root)
{
    for (int i = 0; i < ACCEPTS_A_TURN; i++) {
        epx__socket_t socket;
        if (!epx__socket_accept(root->listener, &socket)) {
            bool scarce = errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
            if (scarce)
                epx__sleep_ns(5000000); /* strangers hold the descriptors; their deadlines free them */
            if (errno == EINTR || errno == ECONNABORTED)
                continue;
            return;
        }
        /* A rank's hello is mostly there at once. */
        read_pending(root, epx__guest_enter(root->pending, PENDING_MAX, &socket, &root->strangers));
    }
}

static int fill_polls(root_t *root)
{
    int count = 0;
    root->polls[count++] = (struct pollfd){.fd = root->listener->fd, .events = POLLIN};
    for (int i = 0; i < PENDING_MAX; i++)
        root->polls[count++] =
            (struct pollfd){.fd = root->pending[i].socket.open ? root->pending[i].socket.fd : -1, .events = POLLIN};
    for (uint32_t rank = 0; root->b && rank < root->ranks; rank++) {
        const epx__socket_t *socket = &root->b->link[rank].socket;
        root->polls[count++] = (struct pollfd){.fd = socket->open ? socket->fd : -1, .events = POLLIN | POLLRDHUP};
    }
    return count;
}

static void turn(root_t *root, uint64_t until_ns)
{
    int count = fill_polls(root);
    int wait_ms = epx__milliseconds_until(until_ns);
    if (epx__poll(root->polls, root->polls + count, count, wait_ms < TICK_MS ? wait_ms : TICK_MS) < 0)
        return;
    uint64_t now = epx__now_ns();
    for (int i = 0; i < PENDING_MAX; i++) {
        epx__guest_t *pending = &root->pending[i];
        if (pending->socket.open && root->polls[1 + i].revents)
            read_pending(root, pending);
        if (pending->socket.open && now - pending->since_ns > EPX__GUEST_NS)
            turn_away(root, pending);
    }
    for (int i = 1 + PENDING_MAX; i < count; i++) {
        uint32_t rank = (uint32_t)(i - 1 - PENDING_MAX);
        if (root->polls[i].revents && root->b->link[rank].socket.open)
            look_after(root, rank);
    }
    if (root->polls[0].revents)
        accept_some(root);
    for (uint32_t rank = 1; root->news && root->b && now - root->news_ns > NEWS_NS && rank < root->ranks; rank++)
        if (root->b->link[rank].socket.open && !send_present(root, &root->b->link[rank].socket))
            look_after(root, rank);
    if (root->news && now - root->news_ns > NEWS_NS) {
        root->news = false;
        root->news_ns = now;
    }
}

static bool all_told(const root_t *root)
{
    for (uint32_t rank = 1; rank < root->ranks; rank++)
        if (!(root->told[rank / 8] >> (rank % 8) & 1))
            return false;
    return true;
}

static void decide_timeout(root_t *root)
{
    uint8_t here[EPX__RANKS_MAX / 8];
    char missing[400], words[EPX__WORDS_MAX], strangers[80] = "";
    const char *how = "";
    root->came[0] |= 1;
    epx__wire_missing(root->came, sizeof(root->came), root->ranks, missing, sizeof(missing));
    if (!missing[0]) {
        present(root, here);
        epx__wire_missing(here, sizeof(here), root->ranks, missing, sizeof(missing));
        how = ", which came and went again";
    }
    if (root->strangers)
        snprintf(strangers, sizeof(strangers), "; %u connections without a good hello were turned away",
                 root->strangers);
    snprintf(words, sizeof(words), "rendezvous: missing after %llu ms: rank %s (of %u ranks)%s%s",
             (unsigned long long)root->join->timeout_ms, missing, root->ranks, how, strangers);
    decide(root, EPX_E_TIMEOUT, words);
}

static void decide_without(root_t *root)
{
    char words[EPX__WORDS_MAX];
    uint32_t failure = root->join->hello.failure;
    epx_status_t status = failure == EPX_OK ? EPX_E_NOMEM : (epx_status_t)failure; /* none for its polls */
    snprintf(words, sizeof(words), "rank 0 cannot take part: %s%s", epx__status_text(status),
             status == EPX_E_SYSTEM ? " (has it descriptors left? ulimit -n)" : "");
    decide(root, status, words);
}

/* A connection for each rank must be possible: else say so at once, one after the other. */
static void look_for_descriptors(root_t *root)
{
    char words[EPX__WORDS_MAX];
    uint32_t wanted = root->ranks - 1, spare = epx__descriptors_spare(wanted);
    if (spare >= wanted)
        return;
    snprintf(words, sizeof(words),
             "rank 0 can have only %u more descriptors (ulimit -n) or has no memory; %u ranks need one each", spare,
             wanted);
    decide(root, EPX_E_SYSTEM, words);
    if (spare == 0) { /* this one is of no use any more, and lets rank 0 hear one rank at a time */
        close(root->b->wake_fd);
        root->b->wake_fd = -1;
    }
}

static epx_status_t serve(root_t *root)
{
    uint64_t deadline_ns = root->join->deadline_ns, grace_ns = 0;
    if (!root->b)
        decide_without(root);
    else
        look_for_descriptors(root);
    while (root->verdict != EPX_OK || root->joined + 1 < root->ranks) {
        uint64_t now = epx__now_ns();
        if (root->verdict != EPX_OK && !grace_ns)
            grace_ns = now + GRACE_NS < deadline_ns ? now + GRACE_NS : deadline_ns;
        if (root->verdict != EPX_OK && (all_told(root) || now >= grace_ns))
            break;
        if (root->verdict == EPX_OK && now >= deadline_ns) {
            decide_timeout(root);
            break;
        }
        turn(root, grace_ns ? grace_ns : deadline_ns);
    }
    for (int i = 0; i < PENDING_MAX; i++)
        epx__socket_close(&root->pending[i].socket);
    if (root->strangers)
        epx__log(EPX__LOG_INFO, "rendezvous: %u connections without a good hello were turned away", root->strangers);
    return root->verdict == EPX_OK ? EPX_OK : epx__fail(root->verdict, "%s", root->words);
}

static epx_status_t serve_with(root_t *root, const epx__join_t *join, epx__socket_t *listener, epx__bootstrap_t *b)
{
    uint32_t ranks = join->hello.ranks;
    struct pollfd *polls = b ? epx__calloc(1 + PENDING_MAX + ranks, 2 * sizeof(*polls)) : NULL;
    root->join = join;
    root->listener = listener;
    root->ranks = ranks;
    root->b = polls ? b : NULL;
    root->polls = polls ? polls : root->few_polls;
    epx_status_t status = serve(root);
    epx__free(polls);
    return status;
}

/* Without memory there is still the stack, to tell the others. */
__attribute__((noinline)) static epx_status_t serve_without(const epx__join_t *join, epx__socket_t *listener)
{
    root_t root = {.join = join};
    return serve_with(&root, join, listener, NULL);
}

epx_status_t epx__join_root(const epx__join_t *join, epx__socket_t *listener, epx__bootstrap_t *b)
{
    root_t *root = b ? epx__calloc(1, sizeof(*root)) : NULL;
    epx_status_t status = root ? serve_with(root, join, listener, b) : serve_without(join, listener);
    epx__free(root);
    return status;
}
