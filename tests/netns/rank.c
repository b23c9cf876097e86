/*
 * One rank of the test of two hosts (run.sh starts it, with a launcher's variables):
 *
 *     netns_rank exchange          dispatch and combine in several shapes, compared with the reference
 *     netns_rank cut FOLDER        dispatch without end; FOLDER/RANK is made when some are done; the link is cut then,
 *                                  and this rank must get an error in time that names a rank of the other host
 */
#include "common/slowness.h"
#include "common/step.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { TIMEOUT_MS = 3000, SLACK_MS = 2500, TOKENS = 1024, HIDDEN = 4096, TOPK = 4, BEFORE = 3, DISPATCHES_MAX = 3000 };

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000u + (uint64_t)t.tv_nsec / 1000000u;
}

/* ---- exchange ---- */

static bool exchange(xt_rank_t *self)
{
    static const xt_format_t formats[] = {XT_BF16, XT_BYTES, XT_FP32, XT_FP16};
    epx_buffer_t *buffer = NULL;
    epx_buffer_config_t config = {.size = sizeof config,
                                  .lease_bytes = 4u << 20,
                                  .reserve_bytes = 1u << 20,
                                  .tokens_max = 64,
                                  .topk_max = 8,
                                  .experts_max = 64};
    bool good = XT_OK(self, epx_buffer_create(self->group, &config, &buffer));
    for (uint32_t op = 0; good && op < 24; op++) {
        xt_format_t format = formats[op % 4];
        xt_shape_t shape = {.ranks = self->ranks,
                            .seed = 77,
                            .op = op,
                            .tokens_max = 16 + op,
                            .topk = 1 + op % 8,
                            .experts = 16,
                            .bits = op % 2 ? 32 : 64,
                            .weights = op % 3 != 0,
                            .alignment = 1,
                            .format = format,
                            .row_bytes = 256,
                            .side_elems = format == XT_BYTES ? 3 : 0,
                            .side_elem_bytes = format == XT_BYTES ? 4 : 0};
        good = xt_step_whole(self, buffer, &shape, false, XT_PLACE_ANY, XT_FROM_ANY);
    }
    if (good)
        XT_OK(self, epx_buffer_status(buffer));
    epx_buffer_destroy(buffer);
    return good;
}

/* ---- cut ---- */

static bool names_one_of(const char *words, const int32_t *domain_of, int ranks, int not_domain)
{
    char text[32];
    for (int r = 0; r < ranks; r++) {
        snprintf(text, sizeof text, "rank %d", r);
        if (domain_of[r] != not_domain && strstr(words, text))
            return true;
    }
    /* Or a rank of this host that is held up itself: it forwards what comes "from another domain". */
    return strstr(words, "from another domain") != NULL;
}

static void say_ready(const char *folder, int rank)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%d", folder, rank);
    int fd = open(path, O_CREAT | O_WRONLY, 0600);
    if (fd >= 0)
        close(fd);
}

static epx_status_t dispatch_once(epx_buffer_t *buffer, const void *x, const int64_t *ids, int ranks)
{
    epx_handle_t *handle = NULL;
    epx_received_t received = {.size = sizeof received};
    epx_dispatch_t dispatch = {.size = sizeof dispatch,
                               .rows = {.x = x, .row_bytes = HIDDEN * 2},
                               .tokens = TOKENS,
                               .topk_idx = ids,
                               .topk = TOPK,
                               .experts = (uint32_t)ranks * 4};
    epx_status_t status = epx_dispatch(buffer, &dispatch, NULL, NULL, &handle, &received);
    if (received.lease)
        epx_lease_release(buffer, received.lease, NULL);
    epx_handle_release(handle, NULL);
    return status;
}

static void cut(xt_rank_t *self, const char *folder)
{
    epx_group_info_t info = {.size = sizeof info};
    epx_buffer_t *buffer = NULL;
    epx_buffer_config_t config = {.size = sizeof config, .lease_bytes = 256u << 20, .tokens_max = TOKENS};
    config.timeout_ms = TIMEOUT_MS;
    void *x = calloc(TOKENS, HIDDEN * 2);
    int64_t *ids = malloc(sizeof *ids * TOKENS * TOPK);
    if (!x || !ids || !XT_OK(self, epx_group_get_info(self->group, &info)) ||
        !XT_OK(self, epx_buffer_create(self->group, &config, &buffer)))
        exit(1);
    for (uint32_t i = 0; i < TOKENS * TOPK; i++) /* experts that differ, on all ranks */
        ids[i] = (i % TOPK * 4 + xt_random(self, 4)) % ((uint32_t)self->ranks * 4);
    epx_status_t status = EPX_OK;
    uint64_t began = 0, took = 0;
    for (int i = 0; i < DISPATCHES_MAX && status == EPX_OK; i++) {
        if (i == BEFORE)
            say_ready(folder, self->rank);
        began = now_ms();
        status = dispatch_once(buffer, x, ids, self->ranks);
        took = now_ms() - began;
    }
    char words[1024];
    snprintf(words, sizeof words, "%s", epx_error_detail());
    printf("rank %d: %s after %llu ms: %s\n", self->rank, epx_status_name(status), (unsigned long long)took, words);
    XT_CHECK(self, status == EPX_E_TIMEOUT || status == EPX_E_PEER, "%s", epx_status_name(status));
    XT_CHECK(self, (double)took < TIMEOUT_MS + SLACK_MS * slowness(), "it took %llu ms", (unsigned long long)took);
    XT_CHECK(self, names_one_of(words, info.domain_of, self->ranks, info.domain),
             "\"%s\" names no rank of the other host", words);
    began = now_ms();
    XT_CHECK(self, epx_buffer_status(buffer) != EPX_OK, "a broken buffer says that it is well");
    epx_buffer_destroy(buffer);
    took = now_ms() - began;
    XT_CHECK(self, (double)took < SLACK_MS * slowness(), "destroy took %llu ms", (unsigned long long)took);
    free(x);
    free(ids);
}

int main(int argc, char **argv)
{
    static xt_world_t world;
    const char *rank = getenv("RANK"), *ranks = getenv("WORLD_SIZE");
    if (argc < 2 || !rank || !ranks)
        return 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    xt_rank_t self = {.rank = atoi(rank), .ranks = atoi(ranks), .name = argv[1], .world = &world};
    self.memory = xt_memory();
    self.random = xt_mix(5, (uint64_t)self.rank, 1, 2);
    epx_group_config_t config = {.size = sizeof config, .timeout_ms = 15000};
    epx_group_info_t info = {.size = sizeof info};
    if (!XT_OK(&self, epx_group_create(&config, &self.group)) || !XT_OK(&self, epx_group_get_info(self.group, &info)))
        return 1;
    if (self.rank == 0)
        printf("%d ranks, %d domains, %s: %s\n", info.ranks, info.domains, info.net, info.net_why);
    uint8_t reach[XT_RANKS_MAX * XT_RANKS_MAX];
    for (int i = 0; i < self.ranks; i++)
        for (int j = 0; j < self.ranks; j++)
            reach[i * self.ranks + j] = info.domain_of[i] == info.domain_of[j];
    XT_CHECK(&self, info.domains == 2, "%d domains", info.domains);
    if (XT_OK(&self, epx__topology_make(self.ranks, reach, 0, &self.topology))) {
        if (strcmp(argv[1], "cut") == 0 && argc > 2)
            cut(&self, argv[2]);
        else
            exchange(&self);
    }
    epx__topology_fini(&self.topology);
    uint64_t began = now_ms();
    epx_group_destroy(self.group);
    XT_CHECK(&self, (double)(now_ms() - began) < SLACK_MS * slowness(), "leaving the group took %llu ms",
             (unsigned long long)(now_ms() - began));
    long failed = atomic_load(&world.failed), passed = atomic_load(&world.passed);
    printf("rank %d: %ld checks passed, %ld failed\n", self.rank, passed, failed);
    return failed != 0 || passed == 0;
}
