/*
 * Three ways to the same place: a unique id, the caller's all-gather (which first carries every rank's host, then an
 * id that rank 0 makes), or the environment.
 */
#include "bootstrap/meet.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "base/env.h"
#include "base/fail.h"
#include "bootstrap/identity.h"
#include "bootstrap/job.h"

enum { JOIN_DESCRIPTORS = 3 }; /* a bell, a connection, a listening socket */

/* What every rank says first. */
typedef struct arrival {
    epx__identity_t identity;
    uint32_t lacks_descriptors, zero;
} arrival_t;

/* What rank 0 tells all: an id, or why there is none. */
typedef struct invitation {
    epx_unique_id_t id;
    uint32_t status;
    char words[300];
} invitation_t;

/* EPX_ADDRESS, else the first IPv4 of an interface that is up and no loopback. */
static epx_status_t address_for_others(char *text, size_t room)
{
    const char *given = epx__env_value(EPX__ENV_ADDRESS);
    struct ifaddrs *interfaces = NULL;
    text[0] = '\0';
    if (given) {
        snprintf(text, room, "%s", given);
        return EPX_OK;
    }
    if (getifaddrs(&interfaces) == 0) {
        for (struct ifaddrs *at = interfaces; at && !text[0]; at = at->ifa_next)
            if (at->ifa_addr && at->ifa_addr->sa_family == AF_INET && (at->ifa_flags & IFF_UP) &&
                !(at->ifa_flags & IFF_LOOPBACK))
                inet_ntop(AF_INET, &((struct sockaddr_in *)at->ifa_addr)->sin_addr, text, (socklen_t)room);
        freeifaddrs(interfaces);
    }
    if (!text[0])
        return epx__fail(EPX_E_SYSTEM, "the ranks are on several hosts, and rank 0's host has no IPv4 address but the "
                                       "loopback's: set EPX_ADDRESS");
    return EPX_OK;
}

static epx_status_t invite(bool one_host, invitation_t *invitation)
{
    char address[INET6_ADDRSTRLEN + 20] = "127.0.0.1";
    if (!one_host)
        EPX__TRY(address_for_others(address, sizeof(address)));
    return epx__unique_id_create(address, &invitation->id);
}

static epx_status_t gather(const epx__bootstrap_config_t *config, const void *mine, size_t bytes, void *all)
{
    int returned = config->allgather(config->allgather_context, mine, bytes, all);
    if (returned)
        return epx__fail(EPX_E_SYSTEM, "the caller's all-gather failed with %d", returned);
    return EPX_OK;
}

/* Who cannot have the descriptors to join says it here, for it cannot say it at the rendezvous. */
static epx_status_t check_arrivals(const arrival_t *all, int ranks)
{
    for (int rank = 0; rank < ranks; rank++)
        if (all[rank].lacks_descriptors)
            return epx__fail(EPX_E_SYSTEM, "rank %d cannot have the %d descriptors that it needs (ulimit -n)", rank,
                             JOIN_DESCRIPTORS);
    return EPX_OK;
}

static epx_status_t gather_id(const epx__bootstrap_config_t *config, void *room, epx_unique_id_t *id)
{
    arrival_t mine = {.lacks_descriptors = epx__descriptors_spare(JOIN_DESCRIPTORS) < JOIN_DESCRIPTORS};
    arrival_t *arrivals = room;
    invitation_t invitation;
    bool one_host = true;
    memset(&invitation, 0, sizeof(invitation));
    epx__identify(&mine.identity);
    EPX__TRY(gather(config, &mine, sizeof(mine), arrivals));
    EPX__TRY(check_arrivals(arrivals, config->ranks));
    for (int rank = 1; rank < config->ranks; rank++)
        one_host = one_host && !memcmp(&arrivals[rank].identity, &arrivals[0].identity, sizeof(epx__identity_t));
    if (config->rank == 0) {
        invitation.status = (uint32_t)invite(one_host, &invitation);
        if (invitation.status != EPX_OK)
            snprintf(invitation.words, sizeof(invitation.words), "%s", epx__detail());
    }
    /* Also when there is no id: the others wait for a word. */
    epx_status_t status = gather(config, &invitation, sizeof(invitation), room);
    memcpy(&invitation, room, sizeof(invitation));
    if (status == EPX_OK && invitation.status != EPX_OK)
        status =
            epx__fail(invitation.status <= EPX_E_DATA ? (epx_status_t)invitation.status : EPX_E_MISMATCH,
                      "rank 0 cannot invite the others: %.*s", (int)sizeof(invitation.words) - 1, invitation.words);
    if (status == EPX_OK)
        *id = invitation.id;
    return status;
}

static epx_status_t by_allgather(const epx__bootstrap_config_t *config, epx_unique_id_t *id)
{
    size_t each = sizeof(invitation_t) > sizeof(arrival_t) ? sizeof(invitation_t) : sizeof(arrival_t);
    void *room = epx__calloc((size_t)config->ranks, each);
    if (!room)
        return epx__fail(EPX_E_NOMEM, "no memory to gather the hosts of %d ranks", config->ranks);
    epx_status_t status = gather_id(config, room, id);
    epx__free(room);
    return status;
}

static epx_status_t by_id(const epx_unique_id_t *id, epx__meeting_t *meeting)
{
    const char *wrong = epx__id_decode(id, &meeting->where);
    if (wrong)
        return epx__fail(EPX_E_INVALID, "%s", wrong);
    if (meeting->rank == 0)
        EPX__TRY(epx__unique_id_take(id, &meeting->listener));
    return EPX_OK;
}

static epx_status_t by_environment(const epx__bootstrap_config_t *config, epx__meeting_t *meeting)
{
    epx__job_t job;
    EPX__TRY(epx__job_find(&job));
    if (config->ranks > 0) { /* the caller knows better; the environment only says where */
        job.rank = config->rank;
        if (job.ranks != config->ranks)
            job.ranks_here = 0;
        job.ranks = config->ranks;
    }
    meeting->rank = job.rank;
    meeting->ranks = job.ranks;
    if (job.ranks == 1)
        return EPX_OK;
    EPX__TRY(epx__job_rendezvous(&job, &meeting->where));
    return job.rank == 0 ? epx__socket_listen(&meeting->listener, &meeting->where.endpoint) : EPX_OK;
}

epx_status_t epx__meet(const epx__bootstrap_config_t *config, epx__meeting_t *meeting)
{
    bool given = config->id || config->allgather || config->ranks > 0;
    memset(meeting, 0, sizeof(*meeting));
    if (given && (config->ranks < 1 || config->ranks > EPX__RANKS_MAX))
        return epx__fail(EPX_E_INVALID, "ranks is %d; it must be from 1 to %d", config->ranks, EPX__RANKS_MAX);
    if (given && (config->rank < 0 || config->rank >= config->ranks))
        return epx__fail(EPX_E_INVALID, "rank is %d; of %d ranks it must be from 0 to %d", config->rank, config->ranks,
                         config->ranks - 1);
    meeting->rank = config->rank;
    meeting->ranks = config->ranks;
    if (config->id)
        return by_id(config->id, meeting);
    if (config->ranks == 1 && given)
        return EPX_OK;
    if (!config->allgather)
        return by_environment(config, meeting);
    epx_unique_id_t id;
    EPX__TRY(by_allgather(config, &id));
    return by_id(&id, meeting);
}
