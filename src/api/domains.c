/*
 * Which ranks are a domain: found by trying.
 *
 * Every rank maps every other's trial window, whatever the host, leaves a word there, and looks whose words have come
 * to its own. From that, gathered from all, src/plan/topology.c makes domains, the same on every rank. Between hosts
 * only GPU windows with fabric handles can be mapped (src/device/cuda/fabric.c). Every wait for a peer has the group's
 * deadline; a rank that the driver keeps longer makes the others fail at theirs, in words.
 */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "api/objects.h"
#include "base/alloc.h"
#include "base/env.h"
#include "base/fail.h"
#include "base/log.h"
#include "bootstrap/identity.h"

/* What every rank says about itself once the device is open. */
typedef struct hello {
    epx__export_t trial; /* of the trial window */
    epx__identity_t identity;
    int32_t backend, split; /* split: ranks_per_domain, 0: as found */
} hello_t;

typedef struct trial {
    epx__window_t window;
    epx__export_t exported;
    hello_t *all;
    void **mapped;
    uint8_t *seen; /* [ranks] of the peer: CAME, NEAR */
    bool open;
} trial_t;

#define CAME 1u /* its word has come */
#define NEAR 2u /* memory of the host is shared with it */

static uint64_t trial_word(int from, int to)
{
    return 0x7e57000000000000ull + ((uint64_t)from << 24) + (uint64_t)to + 1;
}

/* EPX_E_UNSUPPORTED and the like say that a rank is out of reach; a lack of memory or descriptors says nothing. */
static epx_status_t leave_word(epx_group_t *group, int rank, const epx__export_t *trial, void **mapped)
{
    uint64_t word = trial_word(group->rank, rank);
    epx_status_t status = epx__window_import(group->device, trial, group->timeout_ms, mapped);
    if (status != EPX_OK) {
        *mapped = NULL;
        return status;
    }
    status = group->device->ops->copy_in(group->device, (uint64_t *)*mapped + group->rank, &word, sizeof word);
    if (status != EPX_OK) {
        epx__window_unimport(group->device, trial, *mapped);
        *mapped = NULL;
        return epx__fail(EPX_E_UNSUPPORTED, "its window is mapped but cannot be written: %s", epx__detail());
    }
    return EPX_OK;
}

/* Map every peer's trial window and leave a word in it. Unreachable is no error: it is another domain. */
static epx_status_t trial_write(epx_group_t *group, const hello_t *all, void **mapped)
{
    for (int r = 0; r < group->ranks; r++) {
        if (all[r].backend != (int32_t)group->device->ops->backend)
            return epx__fail(EPX_E_MISMATCH, "rank %d uses another backend than rank %d; set EPX_BACKEND on all ranks",
                             r, group->rank);
        epx_status_t status = leave_word(group, r, &all[r].trial, &mapped[r]);
        if (status == EPX_E_SYSTEM || status == EPX_E_NOMEM)
            return status;
        if (status == EPX_OK)
            continue;
        epx__log(EPX__LOG_INFO, "rank %d is out of reach: %s", r, epx__detail());
        snprintf(group->domain_why, sizeof group->domain_why, "rank %d is out of reach: %.200s", r, epx__detail());
    }
    return EPX_OK;
}

static epx_status_t trial_read(epx_group_t *group, const epx__window_t *window, uint8_t *seen)
{
    uint64_t *words = epx__calloc((size_t)group->ranks, sizeof *words);
    if (!words)
        return epx__fail(EPX_E_NOMEM, "no memory for %d trial words", group->ranks);
    epx_status_t status =
        group->device->ops->copy_out(group->device, words, window->base, sizeof *words * (size_t)group->ranks);
    for (int r = 0; status == EPX_OK && r < group->ranks; r++)
        seen[r] |= words[r] == trial_word(r, group->rank) ? CAME : 0;
    epx__free(words);
    return status;
}

/* The same on all ranks: from what all have gathered. */
static epx_status_t make_topology(epx_group_t *group, const trial_t *trial, int split, bool *cut)
{
    size_t ranks = (size_t)group->ranks;
    uint8_t *all = epx__calloc(ranks * ranks, 3);
    epx_status_t status = all ? EPX_OK : epx__fail(EPX_E_NOMEM, "no memory for %zu reaches", ranks * ranks);
    status = epx__group_agree(group, status, "finding domains");
    if (status == EPX_OK)
        status = epx__bootstrap_allgather(group->bootstrap, trial->seen, ranks, all, group->timeout_ms);
    uint8_t *reach = all ? all + ranks * ranks : NULL, *near = all ? reach + ranks * ranks : NULL;
    for (size_t i = 0; status == EPX_OK && i < ranks; i++) {
        for (size_t j = 0; j < ranks; j++) {
            uint8_t ij = all[i * ranks + j], ji = all[j * ranks + i];
            reach[i * ranks + j] = (ji & CAME) != 0; /* j saw i's word */
            near[i * ranks + j] = (ij & ji & NEAR) != 0;
        }
    }
    if (status == EPX_OK) {
        *cut = epx__topology_end_at_hosts(group->ranks, near, split, reach);
        status = epx__topology_make(group->ranks, reach, split, &group->topology);
    }
    epx__free(all);
    return status;
}

static epx_status_t split_wanted(const epx_group_config_t *config, int *split)
{
    uint64_t value;
    EPX__TRY(epx__env_u64(EPX__ENV_RANKS_PER_DOMAIN, 1, 1u << 20, 0, &value));
    *split = config->ranks_per_domain > 0 ? config->ranks_per_domain : (int)value;
    return EPX_OK;
}

/* The same verdict on all ranks. */
static epx_status_t same_split(const epx_group_t *group, const hello_t *all)
{
    for (int r = 1; r < group->ranks; r++) {
        if (all[r].split != all[0].split)
            return epx__fail(
                EPX_E_MISMATCH,
                "rank %d has %d ranks per domain, rank 0 has %d (0: as found); EPX_RANKS_PER_DOMAIN must be "
                "the same on all ranks",
                r, all[r].split, all[0].split);
    }
    return EPX_OK;
}

static epx_status_t trial_open(epx_group_t *group, trial_t *trial)
{
    size_t ranks = (size_t)group->ranks;
    trial->all = epx__calloc(ranks, sizeof *trial->all);
    trial->mapped = epx__calloc(ranks, sizeof *trial->mapped);
    trial->seen = epx__calloc(ranks, 1);
    if (!trial->all || !trial->mapped || !trial->seen)
        return epx__fail(EPX_E_NOMEM, "no memory to look for the domains of %zu ranks", ranks);
    EPX__TRY(epx__window_create(group->device, group->fdserver, ranks * 8, &trial->window, &trial->exported));
    trial->open = true;
    return EPX_OK;
}

static void trial_let_go(epx_group_t *group, trial_t *trial)
{
    for (int r = 0; trial->mapped && trial->all && r < group->ranks; r++)
        if (trial->mapped[r]) {
            epx__window_unimport(group->device, &trial->all[r].trial, trial->mapped[r]);
            trial->mapped[r] = NULL;
        }
    if (trial->open)
        epx__window_destroy(group->device, group->fdserver, &trial->window, &trial->exported);
    trial->open = false;
}

static void trial_close(epx_group_t *group, trial_t *trial)
{
    trial_let_go(group, trial);
    epx__free(trial->all);
    epx__free(trial->mapped);
    epx__free(trial->seen);
}

/* ---- in words ---- */

static void add_words(epx_group_t *group, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void add_words(epx_group_t *group, const char *format, ...)
{
    size_t at = strlen(group->domain_why);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(group->domain_why + at, sizeof group->domain_why - at, format, arguments);
    va_end(arguments);
}

static int count_hosts(const epx_group_t *group, const trial_t *trial)
{
    int hosts = 0;
    for (int r = 0; r < group->ranks; r++) {
        int first = 0;
        while (trial->all[first].trial.host != trial->all[r].trial.host)
            first++;
        hosts += first == r;
    }
    return hosts;
}

/* What trial_write has said of a rank out of reach stays unless there is something better to say. */
static void say_domains(epx_group_t *group, const trial_t *trial, int split, bool cut)
{
    int hosts = count_hosts(group, trial);
    if (split > 0 || group->topology.domains == 1)
        group->domain_why[0] = 0;
    if (split > 0)
        add_words(group, "split into pieces of %d ranks, as asked for", split);
    else if (group->topology.domains == 1)
        add_words(group, "every rank mapped every other's window and moved a word");
    if (group->topology.domains == 1 && hosts > 1)
        add_words(group, ", on %d hosts", hosts);
    if (cut)
        add_words(group, "%sranks reach others that host memory is not shared with, where several domains end",
                  group->domain_why[0] ? "; " : "");
    if (group->device->windows_why)
        add_words(group, "%s%s", group->domain_why[0] ? "; " : "", group->device->windows_why);
    if (group->topology.domains == 1)
        snprintf(group->net_why, sizeof group->net_why, "one domain needs no network");
}

static epx_status_t find_domains(epx_group_t *group, const epx_group_config_t *config, trial_t *trial)
{
    int split = 0;
    bool cut = false;
    epx_status_t status = split_wanted(config, &split);
    if (status == EPX_OK)
        status = trial_open(group, trial);
    EPX__TRY(epx__group_agree(group, status, "making a trial window"));
    hello_t mine = {.trial = trial->exported, .backend = (int32_t)group->device->ops->backend, .split = split};
    epx__identify(&mine.identity);
    EPX__TRY(epx__bootstrap_allgather(group->bootstrap, &mine, sizeof mine, trial->all, group->timeout_ms));
    EPX__TRY(same_split(group, trial->all));
    group->loopback = true;
    for (int r = 0; r < group->ranks; r++) {
        group->host_ranks += trial->all[r].trial.host == trial->exported.host;
        group->loopback = group->loopback && !memcmp(&trial->all[r].identity, &mine.identity, sizeof mine.identity);
    }
    status = trial_write(group, trial->all, trial->mapped);
    for (int r = 0; status == EPX_OK && r < group->ranks; r++)
        trial->seen[r] = epx__window_shares_host(&trial->all[r].trial, group->timeout_ms) ? NEAR : 0;
    if (status != EPX_OK) /* peers may be waiting for its descriptor, which a rank without any to spare cannot send */
        trial_let_go(group, trial);
    EPX__TRY(epx__group_agree(group, status, "mapping the peers' trial windows"));
    status = trial_read(group, &trial->window, trial->seen);
    EPX__TRY(epx__group_agree(group, status, "reading the trial words"));
    status = make_topology(group, trial, split, &cut);
    if (status == EPX_OK)
        say_domains(group, trial, split, cut);
    return epx__group_agree(group, status, "making domains"); /* nobody unmaps before everybody has read */
}

epx_status_t epx__group_find_domains(epx_group_t *group, const epx_group_config_t *config)
{
    trial_t trial = {0};
    epx_status_t status = find_domains(group, config, &trial);
    trial_close(group, &trial);
    return status;
}
