/*
 * Reach matrix -> domains: connected sets, cut where asked, then checked for being complete.
 */
#include "plan/topology.h"

#include <stddef.h>
#include <string.h>

#include "base/alloc.h"
#include "base/fail.h"

static bool touches(const uint8_t *reach, int ranks, int i, int j)
{
    return i == j || reach[(size_t)i * (size_t)ranks + (size_t)j];
}

/* set[i] = lowest rank connected with i, through reach in either direction. */
static void find_sets(const uint8_t *reach, int ranks, int32_t *set)
{
    for (int i = 0; i < ranks; i++)
        set[i] = i;
    for (bool changed = true; changed;) { /* each pass lowers some number: at most ranks * ranks passes */
        changed = false;
        for (int i = 0; i < ranks; i++) {
            for (int j = 0; j < ranks; j++) {
                if (!touches(reach, ranks, i, j) || set[i] == set[j])
                    continue;
                set[i] = set[j] = set[i] < set[j] ? set[i] : set[j];
                changed = true;
            }
        }
    }
}

static int gcd(int a, int b)
{
    while (b != 0) {
        int rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/* Ranks per domain, from the sizes of the sets and `split`. */
static epx_status_t choose_size(const int32_t *set, int ranks, int split, int *per_domain)
{
    int common = 0, least = ranks, most = 0, least_at = 0, most_at = 0;
    for (int s = 0; s < ranks; s++) {
        int members = 0;
        for (int i = 0; i < ranks; i++)
            members += set[i] == s;
        if (members == 0)
            continue;
        if (split > 0 && members % split != 0)
            return epx__fail(
                EPX_E_INVALID,
                "ranks_per_domain %d does not divide the %d ranks that reach rank %d; give a divisor of it", split,
                members, s);
        common = gcd(members, common);
        if (members < least) {
            least = members;
            least_at = s;
        }
        if (members > most) {
            most = members;
            most_at = s;
        }
    }
    if (split <= 0 && least != most)
        return epx__fail(EPX_E_UNSUPPORTED,
                         "domains of unequal sizes: %d ranks reach rank %d, %d reach rank %d; set ranks_per_domain "
                         "(EPX_RANKS_PER_DOMAIN) to %d or a divisor of it",
                         most, most_at, least, least_at, common);
    *per_domain = split > 0 ? split : most;
    return EPX_OK;
}

/* Number the pieces by their lowest rank: a rank opens a domain when no open one of its set has room. */
static void number_domains(const int32_t *set, epx__topology_t *t)
{
    for (int i = 0; i < t->ranks; i++) {
        int before = 0; /* ranks of the same set below i */
        for (int j = 0; j < i; j++)
            before += set[j] == set[i];
        t->index_of[i] = before % t->per_domain;
        if (t->index_of[i] == 0) {
            t->domain_of[i] = t->domains++;
        } else {
            int j = i - 1; /* the rank just below in this set opened, or joined, this domain */
            while (set[j] != set[i])
                j--;
            t->domain_of[i] = t->domain_of[j];
        }
        t->member[t->domain_of[i] * t->per_domain + t->index_of[i]] = i;
    }
}

static epx_status_t check_complete(const uint8_t *reach, const epx__topology_t *t)
{
    for (int i = 0; i < t->ranks; i++) {
        for (int j = 0; j < t->ranks; j++) {
            if (t->domain_of[i] != t->domain_of[j] || touches(reach, t->ranks, i, j))
                continue;
            return epx__fail(EPX_E_UNSUPPORTED,
                             "rank %d cannot touch rank %d's memory, though others connect them (reach must be mutual "
                             "and complete in a domain); set ranks_per_domain (EPX_RANKS_PER_DOMAIN) to a smaller "
                             "number that keeps them apart; 1 always works",
                             i, j);
        }
    }
    return EPX_OK;
}

bool epx__topology_end_at_hosts(int ranks, const uint8_t *near, int split, uint8_t *reach)
{
    bool whole = split <= 0 || split == ranks, crosses = false;
    for (int i = 0; i < ranks; i++) {
        for (int j = 0; j < ranks; j++) {
            whole = whole && touches(reach, ranks, i, j);
            crosses = crosses || (touches(reach, ranks, i, j) && !touches(near, ranks, i, j));
        }
    }
    if (whole || !crosses)
        return false;
    for (int i = 0; i < ranks; i++) {
        for (int j = 0; j < ranks; j++) {
            if (!touches(near, ranks, i, j))
                reach[(size_t)i * (size_t)ranks + (size_t)j] = 0;
        }
    }
    return true;
}

epx_status_t epx__topology_make(int ranks, const uint8_t *reach, int split, epx__topology_t *topology)
{
    if (ranks < 1 || split < 0)
        return epx__fail(EPX_E_INVALID, "ranks %d must be at least 1, ranks_per_domain %d at least 0", ranks, split);
    epx__topology_t t = {.ranks = ranks};
    int32_t *set = epx__calloc((size_t)ranks, sizeof *set);
    t.domain_of = epx__calloc((size_t)ranks, sizeof *t.domain_of);
    t.index_of = epx__calloc((size_t)ranks, sizeof *t.index_of);
    t.member = epx__calloc((size_t)ranks, sizeof *t.member);
    epx_status_t status;
    if (!set || !t.domain_of || !t.index_of || !t.member) {
        status = epx__fail(EPX_E_NOMEM, "no memory for the topology of %d ranks", ranks);
        goto out;
    }
    find_sets(reach, ranks, set);
    status = choose_size(set, ranks, split, &t.per_domain);
    if (status != EPX_OK)
        goto out;
    number_domains(set, &t);
    status = check_complete(reach, &t);
out:
    epx__free(set);
    if (status != EPX_OK)
        epx__topology_fini(&t);
    else
        *topology = t;
    return status;
}

void epx__topology_fini(epx__topology_t *topology)
{
    epx__free(topology->domain_of);
    epx__free(topology->index_of);
    epx__free(topology->member);
    memset(topology, 0, sizeof *topology);
}
