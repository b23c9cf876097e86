/* Groups: who takes part, on which device, in which domains. */
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "api/check.h"
#include "api/objects.h"
#include "api/rails.h"
#include "base/alloc.h"
#include "base/env.h"
#include "base/fail.h"
#include "base/log.h"
#include "device/cpu/copy.h"
#include "device/plugin.h"

#define WORDS 256

struct epx__verdict {
    int32_t status;
    char words[WORDS];
};

/* A rank that dies makes others fail, which then make others fail: whoever is told of those hears of the first, too. */
static epx_status_t and_who_died(epx_group_t *group, epx_status_t status)
{
    char name[24];
    int dead = 0;
    while (dead < group->ranks && !epx__bootstrap_dead(group->bootstrap, dead))
        dead++;
    snprintf(name, sizeof name, "rank %d is gone", dead);
    if (status == EPX_OK || dead == group->ranks || strstr(epx__detail(), name))
        return status;
    return epx__fail(status, "%s (%s)", epx__detail(), name);
}

epx_status_t epx__group_agree(epx_group_t *group, epx_status_t mine, const char *doing)
{
    struct epx__verdict own = {.status = (int32_t)mine}, *all = group->verdicts;
    if (mine != EPX_OK)
        snprintf(own.words, sizeof own.words, "%s", epx__detail());
    epx_status_t status = epx__bootstrap_allgather(group->bootstrap, &own, sizeof own, all, group->timeout_ms);
    if (mine != EPX_OK)
        return and_who_died(group, epx__fail(mine, "%s", own.words));
    for (int r = 0; status == EPX_OK && r < group->ranks; r++) {
        all[r].words[WORDS - 1] = 0;
        if (all[r].status != EPX_OK)
            status = epx__fail(EPX_E_PEER, "rank %d failed while %s: %s: %s", r, doing,
                               epx__status_name((epx_status_t)all[r].status), all[r].words);
    }
    return and_who_died(group, status);
}

epx_status_t epx__group_gather(void *context, const void *mine, size_t bytes, void *all)
{
    epx__gathering_t *gathering = context;
    epx_group_t *group = gathering->group;
    gathering->done++;
    return epx__bootstrap_allgather(group->bootstrap, mine, bytes, all, group->timeout_ms);
}

void epx__group_gather_no_more(const epx__gathering_t *gathering, epx_status_t status)
{
    if (status != EPX_OK)
        epx__bootstrap_skip(gathering->group->bootstrap, EPX__GATHERINGS - gathering->done, status);
}

epx_status_t epx__group_import(epx_group_t *group, int rank, const epx__export_t *exported, void **mapped)
{
    epx_status_t status = epx__window_import(group->device, exported, group->timeout_ms, mapped);
    if (status == EPX_OK)
        return EPX_OK;
    if (epx__bootstrap_dead(group->bootstrap, rank))
        return epx__fail(EPX_E_PEER, "rank %d is gone, its window cannot be mapped: %s", rank, epx__detail());
    return epx__fail(status, "the window of rank %d cannot be mapped: %s", rank, epx__detail());
}

/* ---- choices ---- */

static epx_status_t choose_backend(epx_group_t *group, epx_backend_t wanted, int device, int local_rank)
{
    const char *text = epx__env_value(EPX__ENV_BACKEND), *why = "";
    const char *by = "asked for by the configuration";
    if (wanted == EPX_BACKEND_AUTO && text) {
        by = "asked for by EPX_BACKEND";
        if (!strcasecmp(text, "cpu"))
            wanted = EPX_BACKEND_CPU;
        else if (!strcasecmp(text, "cuda"))
            wanted = EPX_BACKEND_CUDA;
        else if (strcasecmp(text, "auto"))
            return epx__fail(EPX_E_INVALID, "EPX_BACKEND is \"%s\"; auto, cpu or cuda would be right", text);
    }
    const epx__plugin_t *plugin = NULL;
    if (wanted != EPX_BACKEND_CPU) {
        epx_status_t status = epx__plugin_cuda(&plugin, &why);
        if (status != EPX_OK && wanted == EPX_BACKEND_CUDA)
            return epx__fail(status, "the CUDA backend was %s but is not usable: %s", by, why);
        if (status != EPX_OK)
            plugin = NULL;
    }
    if (!plugin) {
        group->exchange_ops = &epx__exchange_cpu;
        group->ll_ops = &epx__ll_cpu;
        if (wanted == EPX_BACKEND_CPU)
            snprintf(group->backend_why, sizeof group->backend_why, "%s", by);
        else
            snprintf(group->backend_why, sizeof group->backend_why, "no usable GPU: %.480s", why);
        return epx__device_cpu.open(-1, &group->device);
    }
    group->exchange_ops = plugin->exchange_ops;
    group->ll_ops = plugin->ll_ops;
    snprintf(group->backend_why, sizeof group->backend_why, "%s",
             wanted == EPX_BACKEND_CUDA ? by : "a usable GPU is there");
    return plugin->device->open(device > 0 ? device - 1 : -1 - local_rank, &group->device);
}

static epx_status_t choose_threads(epx_group_t *group, int wanted, int cores)
{
    uint64_t threads = 0, spins = 0;
    bool by_environment = epx__env_value(EPX__ENV_THREADS) != NULL;
    if (wanted < 0 || wanted > 1024)
        return epx__fail(EPX_E_INVALID, "threads is %d; 1 to 1024, or 0 for the default", wanted);
    EPX__TRY(epx__env_u64(EPX__ENV_THREADS, 1, 1024, 0, &threads));
    if (wanted > 0) {
        threads = (uint64_t)wanted;
        snprintf(group->threads_why, sizeof group->threads_why, "asked for by the configuration");
    } else if (by_environment) {
        snprintf(group->threads_why, sizeof group->threads_why, "asked for by EPX_THREADS");
    } else {
        threads = (uint64_t)(cores / group->host_ranks);
        threads = threads < 1 ? 1 : threads > 32 ? 32 : threads;
        snprintf(group->threads_why, sizeof group->threads_why,
                 "%d cores / %d ranks on this host, at least 1, at most 32", cores, group->host_ranks);
    }
    group->threads = (int)threads;
    EPX__TRY(epx__env_u64(EPX__ENV_SPIN, 0, UINT32_MAX, cores < group->host_ranks ? 100 : 2000, &spins));
    group->spins = (uint32_t)spins;
    static const char *const streaming[] = {"auto", "0", "1", "halves", NULL};
    const char *why;
    int way;
    EPX__TRY(epx__env_choice(EPX__ENV_STREAMING, streaming, &way)); /* its default is one of them too */
    epx__copy_choose(&group->streaming, &why);
    return EPX_OK;
}

/* Ranks of one domain end a call soon after each other, and being woken costs more than the rest of the wait: with a
 * core for each, patience pays (docs/measurements). Not beside a network, whose threads want the cores. */
static void choose_patience(epx_group_t *group, int cores)
{
    if (!epx__env_value(EPX__ENV_SPIN) && cores >= group->host_ranks && group->topology.domains == 1)
        group->spins = 20000;
}

/* ---- create, destroy ---- */

static epx__bootstrap_config_t boot_config(const epx_group_config_t *config, uint64_t timeout_ms, char words[64])
{
    snprintf(words, 64, "ranks_per_domain %d%s", config->ranks_per_domain,
             config->ranks_per_domain ? "" : " (the default)");
    epx__bootstrap_config_t boot = {.rank = config->rank,
                                    .ranks = config->ranks,
                                    .id = config->id,
                                    .allgather = config->allgather,
                                    .allgather_context = config->allgather_context,
                                    .config_words = words,
                                    .config_hash = (uint64_t)config->ranks_per_domain + 1,
                                    .timeout_ms = timeout_ms};
    if (!config->id && !config->allgather && config->ranks == 0) {
        boot.rank = -1;
        boot.ranks = 0;
    }
    return boot;
}

/* The others would wait for this rank. */
static epx_status_t no_memory(const epx_group_config_t *config)
{
    char words[64];
    epx__bootstrap_config_t boot = boot_config(config, config->timeout_ms, words);
    epx__bootstrap_t *none;
    boot.failure = EPX_E_NOMEM;
    epx__bootstrap_open(&boot, &none);
    return epx__fail(EPX_E_NOMEM, "no memory for a group");
}

static epx_status_t join(epx_group_t *group, const epx_group_config_t *config)
{
    char words[64];
    epx__bootstrap_config_t boot = boot_config(config, group->timeout_ms, words);
    EPX__TRY(epx__bootstrap_open(&boot, &group->bootstrap));
    group->rank = epx__bootstrap_rank(group->bootstrap);
    group->ranks = epx__bootstrap_ranks(group->bootstrap);
    epx__log_set_rank(group->rank);
    group->verdicts = epx__calloc((size_t)group->ranks, sizeof *group->verdicts);
    return group->verdicts ? EPX_OK : epx__fail(EPX_E_NOMEM, "no memory for a group of %d ranks", group->ranks);
}

static epx_status_t build(epx_group_t *group, const epx_group_config_t *config)
{
    EPX__TRY(join(group, config));
    epx_status_t status = epx__fdserver_open(&group->fdserver);
    if (status == EPX_OK)
        status = choose_backend(group, config->backend, config->device, group->rank);
    EPX__TRY(epx__group_agree(group, status, "opening the device"));
    EPX__TRY(epx__group_find_domains(group, config));
    int cores = (int)sysconf(_SC_NPROCESSORS_ONLN);
    status = choose_threads(group, config->threads, cores);
    if (status == EPX_OK)
        choose_patience(group, cores);
    if (status == EPX_OK && config->net && strlen(config->net) >= sizeof group->net_asked)
        status = epx__fail(EPX_E_INVALID, "the network's name \"%.40s...\" is too long", config->net);
    else if (status == EPX_OK)
        snprintf(group->net_asked, sizeof group->net_asked, "%s", config->net ? config->net : "");
    if (status == EPX_OK)
        status = epx__group_choose_net(group, group->net_asked);
    return epx__group_agree(group, status, "choosing threads and a network");
}

static epx_status_t check_config(const epx_group_config_t *config)
{
    if (config->id && config->allgather)
        return epx__fail(EPX_E_INVALID, "epx_group_create: id and allgather are both given; give one");
    if ((config->id || config->allgather || config->ranks || config->rank) &&
        (config->ranks < 1 || config->rank < 0 || config->rank >= config->ranks))
        return epx__fail(EPX_E_INVALID,
                         "epx_group_create: rank %d of %d ranks; rank must be in [0, ranks) and ranks at least 1",
                         config->rank, config->ranks);
    if (config->backend != EPX_BACKEND_AUTO && config->backend != EPX_BACKEND_CPU &&
        config->backend != EPX_BACKEND_CUDA)
        return epx__fail(EPX_E_INVALID, "epx_group_create: %d is no backend", (int)config->backend);
    if (config->ranks_per_domain < 0 || config->device < 0)
        return epx__fail(EPX_E_INVALID, "epx_group_create: ranks_per_domain %d and device %d must not be negative",
                         config->ranks_per_domain, config->device);
    return epx__check_timeout("epx_group_create", config->timeout_ms);
}

epx_status_t epx_group_create(const epx_group_config_t *config, epx_group_t **out)
{
    epx_group_config_t c;
    if (!out)
        return epx__fail(EPX_E_INVALID, "epx_group_create: group is NULL; it must point to an epx_group_t *");
    EPX__TRY(epx__config_copy(&c, sizeof c, config, "epx_group_config_t"));
    EPX__TRY(check_config(&c));
    epx_group_t *group = epx__calloc(1, sizeof *group);
    if (!group)
        return no_memory(&c);
    atomic_store(&group->references, 1);
    snprintf(group->net, sizeof group->net, "none");
    epx_status_t status = EPX_OK;
    group->timeout_ms = c.timeout_ms;
    if (!group->timeout_ms)
        status = epx__env_u64(EPX__ENV_TIMEOUT_MS, 1, UINT32_MAX, 30000, &group->timeout_ms);
    if (status == EPX_OK)
        status = build(group, &c);
    if (status != EPX_OK) {
        epx__group_unref(group);
        return status;
    }
    *out = group;
    return EPX_OK;
}

void epx__group_unref(epx_group_t *group)
{
    if (atomic_fetch_sub(&group->references, 1) > 1)
        return;
    char words[EPX__DETAIL_BYTES]; /* of the failure that brought us here, if any */
    snprintf(words, sizeof words, "%s", epx__detail());
    epx__bootstrap_close(group->bootstrap);
    epx__fdserver_close(group->fdserver);
    if (group->device)
        group->device->ops->close(group->device);
    epx__topology_fini(&group->topology);
    epx__free(group->verdicts);
    epx__free(group);
    epx__detail_set(words);
}

void epx_group_destroy(epx_group_t *group)
{
    if (group)
        epx__group_unref(group);
}

/* ---- the rest ---- */

epx_status_t epx_group_barrier(epx_group_t *group, uint64_t timeout_ms)
{
    if (!group)
        return epx__fail(EPX_E_INVALID, "epx_group_barrier: group is NULL");
    EPX__TRY(epx__check_timeout("epx_group_barrier", timeout_ms));
    return epx__bootstrap_barrier(group->bootstrap, timeout_ms ? timeout_ms : group->timeout_ms);
}

epx_status_t epx_group_allgather(epx_group_t *group, const void *mine, size_t bytes, void *all)
{
    if (!group || ((!mine || !all) && bytes))
        return epx__fail(EPX_E_INVALID, "epx_group_allgather: group, mine and all must not be NULL");
    return epx__bootstrap_allgather(group->bootstrap, mine, bytes, all, group->timeout_ms);
}

epx_status_t epx_group_get_info(const epx_group_t *group, epx_group_info_t *info)
{
    if (!group || !info)
        return epx__fail(EPX_E_INVALID, "epx_group_get_info: group and info must not be NULL");
    if (info->size != sizeof *info)
        return epx__fail(EPX_E_INVALID, "epx_group_get_info: info->size is %zu; set it to %zu", info->size,
                         sizeof *info);
    *info = (epx_group_info_t){
        .size = sizeof *info,
        .rank = group->rank,
        .ranks = group->ranks,
        .domains = group->topology.domains,
        .ranks_per_domain = group->topology.per_domain,
        .domain = group->topology.domain_of[group->rank],
        .domain_index = group->topology.index_of[group->rank],
        .domain_of = group->topology.domain_of,
        .backend = group->device->ops->backend,
        .device = group->device->ordinal,
        .threads = group->threads,
        .backend_why = group->backend_why,
        .domain_why = group->domain_why,
        .threads_why = group->threads_why,
        .net_why = group->net_why,
        .net = group->net,
    };
    return EPX_OK;
}
