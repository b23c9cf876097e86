/* Reach matrices to domains: whole, in sets, split, and refused in words. */
#include "common/check.h"

#include "base/alloc.h"
#include "base/fail.h"
#include "plan/topology.h"

#include <string.h>

enum { MAX = 12 };

/* reach[i][j] = set[i] == set[j] */
static void fill(uint8_t *reach, int ranks, const int *set)
{
    for (int i = 0; i < ranks; i++) {
        for (int j = 0; j < ranks; j++)
            reach[i * ranks + j] = set[i] == set[j];
    }
}

static void expect(int ranks, const int *set, int split, int domains, const int *domain_of)
{
    uint8_t reach[MAX * MAX];
    epx__topology_t t;
    fill(reach, ranks, set);
    epx_status_t status = epx__topology_make(ranks, reach, split, &t);
    CHECK(status == EPX_OK, "%s", epx__detail());
    if (status != EPX_OK)
        return;
    CHECK(t.ranks == ranks && t.domains == domains && t.per_domain == ranks / domains, "%d domains of %d", t.domains,
          t.per_domain);
    int seen = 0;
    for (int i = 0; i < ranks; i++) {
        CHECK(t.domain_of[i] == domain_of[i], "rank %d in domain %d, not %d", i, t.domain_of[i], domain_of[i]);
        CHECK(epx__topology_rank(&t, t.domain_of[i], t.index_of[i]) == i);
        seen += 1;
    }
    CHECK(seen == ranks);
    for (int d = 0; d < t.domains; d++) {
        for (int m = 1; m < t.per_domain; m++)
            CHECK(epx__topology_rank(&t, d, m - 1) < epx__topology_rank(&t, d, m));
        CHECK(d == 0 || epx__topology_rank(&t, d - 1, 0) < epx__topology_rank(&t, d, 0));
    }
    epx__topology_fini(&t);
}

static void refuse(int ranks, const uint8_t *reach, int split, const char *words)
{
    epx__topology_t t;
    memset(&t, 0x55, sizeof t);
    epx__topology_t before = t;
    CHECK(epx__topology_make(ranks, reach, split, &t) != EPX_OK, "should be refused: %s", words);
    CHECK(strstr(epx__detail(), words) != NULL, "\"%s\" is not in \"%s\"", words, epx__detail());
    CHECK(memcmp(&t, &before, sizeof t) == 0, "output written on failure");
}

/* Where several domains would share memory of several hosts, they end at hosts. */
static void expect_hosts(int ranks, const int *set, const uint64_t *host, int split, bool cut, int domains,
                         const int *domain_of)
{
    uint8_t reach[MAX * MAX], before[MAX * MAX], near[MAX * MAX];
    epx__topology_t t;
    fill(reach, ranks, set);
    memcpy(before, reach, sizeof before);
    for (int i = 0; i < ranks * ranks; i++)
        near[i] = host[i / ranks] == host[i % ranks];
    CHECK(epx__topology_end_at_hosts(ranks, near, split, reach) == cut, "%d ranks, split %d", ranks, split);
    CHECK(cut || memcmp(before, reach, (size_t)(ranks * ranks)) == 0, "reach is changed and nothing said");
    if (epx__topology_make(ranks, reach, split, &t) != EPX_OK) {
        CHECK(false, "%s", epx__detail());
        return;
    }
    CHECK(t.domains == domains, "%d domains", t.domains);
    for (int i = 0; i < ranks; i++)
        CHECK(t.domain_of[i] == domain_of[i], "rank %d in domain %d, not %d", i, t.domain_of[i], domain_of[i]);
    epx__topology_fini(&t);
}

static void hosts(void)
{
    const int all[MAX] = {0}, halves[] = {0, 0, 1, 1}, odd[] = {0, 1, 0, 1}, racks[] = {0, 0, 0, 0, 1, 1, 1, 1};
    const uint64_t here[MAX] = {9, 9, 9, 9, 9, 9, 9, 9}, two[] = {9, 9, 7, 7}, turns[] = {9, 7, 9, 7};
    const uint64_t four[] = {1, 1, 2, 2, 3, 3, 4, 4};
    expect_hosts(4, all, two, 0, false, 1, (const int[]){0, 0, 0, 0}); /* one domain may span hosts */
    expect_hosts(4, all, two, 4, false, 1, (const int[]){0, 0, 0, 0});
    expect_hosts(4, all, two, 2, true, 2, (const int[]){0, 0, 1, 1});
    expect_hosts(4, all, turns, 2, true, 2, (const int[]){0, 1, 0, 1}); /* pieces of a host, not of rank order */
    expect_hosts(4, all, turns, 1, true, 4, (const int[]){0, 1, 2, 3});
    expect_hosts(4, halves, two, 0, false, 2, (const int[]){0, 0, 1, 1}); /* as without fabric handles */
    expect_hosts(4, odd, two, 0, true, 4, (const int[]){0, 1, 2, 3});
    expect_hosts(8, racks, four, 0, true, 4, (const int[]){0, 0, 1, 1, 2, 2, 3, 3});
    expect_hosts(8, all, four, 0, false, 1, (const int[]){0, 0, 0, 0, 0, 0, 0, 0});
    expect_hosts(8, all, here, 4, false, 2, (const int[]){0, 0, 0, 0, 1, 1, 1, 1});
    expect_hosts(8, racks, here, 0, false, 2, (const int[]){0, 0, 0, 0, 1, 1, 1, 1});
}

int main(void)
{
    const int one[MAX] = {0}, two[] = {0, 0, 1, 1}, mixed[] = {0, 1, 0, 1, 1, 0}, unequal[] = {0, 0, 0, 0, 1, 1};
    uint8_t reach[MAX * MAX];

    hosts();
    expect(1, one, 0, 1, (const int[]){0});
    expect(8, one, 0, 1, (const int[]){0, 0, 0, 0, 0, 0, 0, 0});
    expect(4, two, 0, 2, (const int[]){0, 0, 1, 1});
    expect(6, mixed, 0, 2, (const int[]){0, 1, 0, 1, 1, 0});
    expect(6, mixed, 3, 2, (const int[]){0, 1, 0, 1, 1, 0});
    expect(6, mixed, 1, 6, (const int[]){0, 1, 2, 3, 4, 5});
    expect(6, one, 2, 3, (const int[]){0, 0, 1, 1, 2, 2});
    expect(6, unequal, 2, 3, (const int[]){0, 0, 1, 1, 2, 2});
    /* sets of four, cut in two, interleaved: numbered by lowest rank */
    expect(8, (const int[]){0, 0, 1, 1, 0, 0, 1, 1}, 2, 4, (const int[]){0, 0, 1, 1, 2, 2, 3, 3});
    expect(8, (const int[]){0, 1, 0, 1, 0, 1, 0, 1}, 2, 4, (const int[]){0, 1, 0, 1, 2, 3, 2, 3});

    fill(reach, 6, unequal);
    refuse(6, reach, 0, "ranks_per_domain");
    refuse(6, reach, 0, "to 2");
    refuse(6, reach, 4, "does not divide");
    fill(reach, 4, one);
    reach[1 * 4 + 2] = 0; /* one way only */
    refuse(4, reach, 0, "rank 1 cannot touch rank 2");
    fill(reach, 4, one);
    reach[0 * 4 + 3] = reach[3 * 4 + 0] = 0; /* not complete: 0 and 3 only through others */
    refuse(4, reach, 0, "ranks_per_domain");
    epx__topology_t t;
    CHECK(epx__topology_make(4, reach, 2, &t) == EPX_OK && t.domains == 2, "its halves are complete");
    epx__topology_fini(&t);
    refuse(0, reach, 0, "at least 1");
    refuse(4, reach, -1, "at least 0");

    /* Every allocation may fail; nothing is left over. */
    fill(reach, 4, one);
    int64_t live = epx__alloc_live();
    for (uint64_t n = 1; n <= 4; n++) {
        epx__alloc_fail_at(n, 0);
        CHECK(epx__topology_make(4, reach, 0, &t) == EPX_E_NOMEM, "allocation %d", (int)n);
        epx__alloc_fail_at(0, 0);
        CHECK(epx__alloc_live() == live, "%d blocks left", (int)(epx__alloc_live() - live));
    }
    /* A diagonal of zeros means the same: a rank always reaches itself. */
    for (int i = 0; i < 4; i++)
        reach[i * 4 + i] = 0;
    CHECK(epx__topology_make(4, reach, 0, &t) == EPX_OK && t.domains == 1);
    epx__topology_fini(&t);
    CHECK(epx__alloc_live() == live);
    return check_done();
}
