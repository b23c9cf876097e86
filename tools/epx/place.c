#include "place.h"

#include <stdio.h>

static void note(char *to, size_t bytes, const char *words)
{
    snprintf(to, bytes, "%s", words ? words : "");
}

void place_note(place_t *place, const epx_group_info_t *info)
{
    note(place->backend, sizeof place->backend, info->backend == EPX_BACKEND_CUDA ? "cuda" : "cpu");
    note(place->net, sizeof place->net, info->net ? info->net : "none");
    note(place->backend_why, sizeof place->backend_why, info->backend_why);
    note(place->domain_why, sizeof place->domain_why, info->domain_why);
    note(place->threads_why, sizeof place->threads_why, info->threads_why);
    note(place->net_why, sizeof place->net_why, info->net_why);
    place->domains = info->domains;
    place->ranks_per_domain = info->ranks_per_domain;
    place->threads = info->threads;
}

int place_enter(rank_t *rank, epx_group_info_t *info, const mem_ops_t **mem, void **context, epx_stream_t *stream)
{
    const char *why = "";
    info->size = sizeof *info;
    epx_status_t status = epx_group_get_info(rank->group, info);
    if (status)
        return rank_fail_epx(rank, "epx_group_get_info", status);
    *mem = mem_ops_for(info->backend, &why);
    if (!*mem)
        return rank_fail(rank, "%s", why);
    if ((*mem)->open(info->device, context))
        return rank_fail(rank, "the device's memory: %s", (*mem)->words());
    *stream = (*mem)->stream(*context);
    return 0;
}
