/*
 * Memory (or a descriptor, a thread, a mapping) cannot be had, at every point from the making of a group to that of a
 * buffer, on one rank: all ranks fail, in words, or none does; nothing is left over.
 */
#include "common/world.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/alloc.h"

typedef struct oom {
    uint64_t at;
    bool sticky;
    int victim;
    atomic_long *made; /* shared: allocations that the victim made, when none failed */
} oom_t;

static int count_entries(const char *path)
{
    int n = 0;
    DIR *dir = opendir(path);
    while (dir && readdir(dir))
        n++;
    if (dir)
        closedir(dir);
    return n;
}

/* The victim's n-th allocation fails, from before the group to after the buffer: all ranks fail, or none. */
static void body_oom(xt_rank_t *self)
{
    const oom_t *oom = self->context;
    epx_group_t *group = NULL;
    epx_buffer_t *buffer = NULL;
    epx_buffer_config_t b = {.size = sizeof b, .lease_bytes = 64u << 10, .reserve_bytes = 64u << 10, .handles_max = 2};
    b.tokens_max = 8;
    b.leases_max = 4;
    b.experts_max = 16;
    b.ll_tokens_max = 4;
    b.ll_hidden_max = 16;
    bool victim = self->rank == oom->victim;
    /* Nobody should come to a deadline, but for those who wait for a rank that has no memory to say a word. */
    epx_group_config_t g = {.timeout_ms = oom->sticky ? 2000 : 10000, .threads = 2};
    epx_unique_id_t id;
    if (self->rank == 0) /* what every process has once, before it is counted */
        epx_unique_id_create(NULL, &id);
    int64_t live = epx__alloc_live();
    int files = count_entries("/proc/self/fd");
    if (self->rank == 0) { /* an id is made before a group is, and fails on its own */
        int made_id = epx_unique_id_create(NULL, &self->world->id[0]) == EPX_OK ? 1 : -1;
        atomic_store(&self->world->id_ready[0], made_id);
    }
    uint64_t made = epx__alloc_count();
    if (victim)
        epx__alloc_fail_at(oom->at, oom->sticky);
    epx_status_t status = xt_group(self, 0, &g, &group);
    const char *where = "group";
    XT_CHECK(self, status != EPX_OK || group, "no group");
    XT_CHECK(self, status == EPX_OK || (!group && epx_error_detail()[0]), "no words, or an output");
    if (status == EPX_OK) {
        where = "buffer";
        status = epx_buffer_create(group, &b, &buffer);
        XT_CHECK(self, status == EPX_OK || (!buffer && epx_error_detail()[0]), "no words, or an output");
    }
    made = epx__alloc_count() - made;
    bool failed = victim && made >= oom->at; /* this rank's allocation did fail */
    if (victim) {
        epx__alloc_fail_at(0, 0);
        XT_CHECK(self, failed == (status != EPX_OK), "allocation %lu of %lu failed, %s: %s", (unsigned long)oom->at,
                 (unsigned long)made, epx_status_name(status), epx_error_detail());
        if (!failed)
            atomic_store(oom->made, (long)made);
    }
    xt_mark(self, 0);
    if (status != EPX_OK)
        xt_mark(self, 1);
    xt_wait_mark(self, 0, self->ranks);
    /* All or nobody. */
    XT_CHECK(self, status != EPX_OK || atomic_load(&self->world->mark[1]) == 0,
             "allocation %lu: only some ranks know that the %s failed", (unsigned long)oom->at, where);
    epx_buffer_destroy(buffer);
    epx_group_destroy(group);
    usleep(2000);
    XT_CHECK(self, epx__alloc_live() == live, "allocation %lu: %ld blocks left", (unsigned long)oom->at,
             (long)(epx__alloc_live() - live));
    XT_CHECK(self, count_entries("/proc/self/fd") <= files, "allocation %lu: %d descriptors left",
             (unsigned long)oom->at, count_entries("/proc/self/fd") - files);
}

/* One allocation after the other, until one is never reached. */
static void run_oom(int victim)
{
    long failed = 0;
    atomic_long *made = mmap(NULL, sizeof *made, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED)
        exit(3);
    uint64_t n = 1;
    for (; atomic_load(made) == 0 && failed < 5 && n < 1000; n++) {
        oom_t oom = {.at = n, .sticky = n % 5 == 0, .victim = victim, .made = made};
        char name[64];
        snprintf(name, sizeof name, "memory runs out on rank %d at %lu", victim, (unsigned long)n);
        xt_run_t r = {.name = name, .ranks = 3, .processes = true, .no_group = true, .quiet = true, .body = body_oom};
        r.context = &oom;
        r.limit_ms = 20000;
        failed += xt_run(&r);
    }
    printf("%lu allocations of rank %d failed, one by one\n", (unsigned long)n - 2, victim);
    munmap(made, sizeof *made);
}

int main(void)
{
    run_oom(1);
    run_oom(0);
    return xt_done();
}
