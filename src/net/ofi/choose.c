/*
 * Which provider, and why, in words.
 *
 * The rule: "ofi" is tcp;ofi_rxm, which is there wherever libfabric is and needs no hardware; "ofi:PROVIDER" is that
 * one and nothing else. Bare names of providers that have no RDM endpoint of their own get the layer that gives them
 * one: tcp and verbs become tcp;ofi_rxm and verbs;ofi_rxm. What we need of it: RDM endpoints, RMA writes with
 * completion data of at least 4 bytes at the target. Order is not asked for.
 *
 * Of several interfaces, when neither one nor an address is named: the nearest, in turns (net/nic.h).
 */
#include "net/ofi/ofi.h"

#include <stdio.h>
#include <string.h>

static const struct {
    const char *asked, *provider, *run;
} known[] = {
    {"tcp", "tcp;ofi_rxm", "run by our tests"},
    {"tcp;ofi_rxm", "tcp;ofi_rxm", "run by our tests"},
    {"shm", "shm", "run by our tests"},
    {"verbs", "verbs;ofi_rxm", "run by our tests on software RoCE only"},
    {"verbs;ofi_rxm", "verbs;ofi_rxm", "run by our tests on software RoCE only"},
};

static void hints_fill(struct fi_info *hints, const char *provider, const epx__net_config_t *config)
{
    hints->caps = FI_RMA | FI_WRITE | FI_REMOTE_WRITE | FI_MSG;
    hints->mode = FI_CONTEXT | FI_CONTEXT2;
    hints->ep_attr->type = FI_EP_RDM;
    hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT;
    hints->domain_attr->threading = FI_THREAD_DOMAIN;
    hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
    hints->domain_attr->resource_mgmt = FI_RM_ENABLED;
    hints->domain_attr->cq_data_size = 4;
    hints->domain_attr->av_type = FI_AV_TABLE;
    hints->fabric_attr->prov_name = strdup(provider); /* fi_freeinfo frees both */
    if (config->nic)
        hints->domain_attr->name = strdup(config->nic);
}

static epx_status_t nothing_found(const char *provider, const epx__net_config_t *config, long e)
{
    return epx__ofi_host->fail(EPX_E_UNSUPPORTED,
                               "libfabric's provider \"%s\" offers nothing here that fits%s%s%s%s: %s; `fi_info -p "
                               "'%s'` shows what it has",
                               provider, config->address ? " at address " : "", config->address ? config->address : "",
                               config->nic ? " on device " : "", config->nic ? config->nic : "", fi_strerror((int)-e),
                               provider);
}

#define NICS_MAX 64

/* Keep one of the list that fi_getinfo gave: the first entry of the nearest interface. `near`: how many were. */
static epx_status_t keep_nearest(ofi_t *self, const epx__net_config_t *config, int *near)
{
    epx__nic_t nics[NICS_MAX];
    struct fi_info *infos[NICS_MAX], *list = self->info;
    int count = 0;
    for (struct fi_info *info = list; info && count < NICS_MAX; info = info->next) {
        int i = 0;
        while (i < count && strcmp(nics[i].name, info->domain_attr->name) != 0)
            i++;
        if (i < count)
            continue;
        nics[count] = (epx__nic_t){.name = info->domain_attr->name, .fabric = info->fabric_attr->name};
        epx__ofi_host->nic_look("", &nics[count]);
        infos[count++] = info;
    }
    int chosen = epx__ofi_host->nic_choose(nics, count, epx__ofi_host->nic_here(), config->turn, near);
    self->info = fi_dupinfo(infos[chosen]);
    fi_freeinfo(list);
    return self->info ? EPX_OK : epx__ofi_host->fail(EPX_E_NOMEM, "ofi endpoint: no memory for an fi_info");
}

static struct fi_info *first_named(struct fi_info *info, const char *name)
{
    while (info && strcmp(info->domain_attr->name, name) != 0)
        info = info->next;
    return info;
}

/* Keep the first entry of the interface that was named: what ofi_rxm lists holds others too, whatever the hint said. */
static epx_status_t keep_named(ofi_t *self, const epx__net_config_t *config, const char *provider)
{
    struct fi_info *list = self->info, *info = first_named(list, config->nic);
    char names[160] = "";
    size_t used = 0;
    self->info = info ? fi_dupinfo(info) : NULL;
    for (struct fi_info *at = list; at && used < sizeof names; at = at->next)
        if (first_named(list, at->domain_attr->name) == at) /* each once */
            used +=
                (size_t)snprintf(names + used, sizeof names - used, "%s%s", used ? ", " : "", at->domain_attr->name);
    fi_freeinfo(list);
    if (!info)
        return epx__ofi_host->fail(EPX_E_UNSUPPORTED, "EPX_NIC is \"%.64s\"; provider %s has %s%s%s", config->nic,
                                   provider, names, config->address ? " at address " : "",
                                   config->address ? config->address : "");
    return self->info ? EPX_OK : epx__ofi_host->fail(EPX_E_NOMEM, "ofi endpoint: no memory for an fi_info");
}

epx_status_t epx__ofi_choose(ofi_t *self, const epx__net_config_t *config)
{
    const char *provider = config->argument ? config->argument : "tcp", *run = "never run by us";
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(provider, known[i].asked)) {
            provider = known[i].provider;
            run = known[i].run;
            break;
        }
    struct fi_info *hints = fi_allocinfo();
    if (!hints)
        return epx__ofi_host->fail(EPX_E_NOMEM, "ofi endpoint: no memory for hints");
    hints_fill(hints, provider, config);
    bool by_ip = strstr(provider, "tcp") || strstr(provider, "verbs") || strstr(provider, "net") ||
                 strstr(provider, "sockets") || strstr(provider, "udp");
    const char *node = by_ip ? config->address : NULL;
    long e = fi_getinfo(FI_VERSION(1, 17), node, NULL, node ? FI_SOURCE : 0, hints, &self->info);
    fi_freeinfo(hints);
    if (e) {
        self->info = NULL;
        return nothing_found(provider, config, e);
    }
    int near = 1;
    epx_status_t status = EPX_OK;
    if (config->nic && by_ip)
        status = keep_named(self, config, provider);
    else if (!config->nic && !node)
        status = keep_nearest(self, config, &near);
    if (status != EPX_OK)
        return status;
    if (self->info->domain_attr->cq_data_size < 4)
        return epx__ofi_host->fail(EPX_E_UNSUPPORTED, "provider %s carries %zu bytes of completion data; 4 are needed",
                                   provider, self->info->domain_attr->cq_data_size);
    size_t most = self->info->ep_attr->max_msg_size;
    self->net.put_bytes_max = most > SIZE_MAX / 2 ? SIZE_MAX / 2 : most;
    self->net.device_memory = false;
    self->any = (epx__net_memory_t){.bytes = SIZE_MAX};
    self->net.any = self->info->domain_attr->mr_mode & FI_MR_LOCAL ? NULL : &self->any;
    self->cq_most = strstr(provider, "verbs") ? 8192 : 65536;
    char equal[48] = "";
    if (near > 1)
        snprintf(equal, sizeof equal, ", one of %d equally near", near);
    snprintf(self->why, sizeof self->why,
             "%s on %s%s (%s; %s), libfabric %u.%u, GPU memory staged: this build asks for none",
             self->info->fabric_attr->prov_name, self->info->domain_attr->name, equal,
             config->argument ? "asked for" : "the default: always there", run, FI_MAJOR(fi_version()),
             FI_MINOR(fi_version()));
    return EPX_OK;
}
