/*
 * Two processes of one host that map each other's windows by fabric handle (EPX_CUDA_HANDLES=fabric): small exchanges,
 * compared with the reference. Where there are no such handles, or the driver lets nobody import them, skipped in the
 * words of the group's domain_why.
 *
 * The emulator can give every rank a host of its own (EPX_EMULATE_HOSTS): then handles are the default, and the domain
 * spans hosts.
 */
#include "gpu/memory_cuda.h"

#include <sys/mman.h>

#include "common/step.h"

enum { RANKS = 2, EXCHANGES = 12 };

/* Of all processes. */
typedef struct found {
    char refused[512]; /* rank 0's: why there is no domain by fabric handle */
} found_t;

/* What the driver of a machine without IMEX, or GPUs without NVLink, says; else something is wrong here. */
static bool driver_refuses(const char *words)
{
    return strstr(words, "no fabric handle") ||
           (strstr(words, "cannot be imported") && (strstr(words, "(800)") || strstr(words, "(801)")));
}

static void body(xt_rank_t *self)
{
    found_t *found = self->context;
    epx_group_info_t info = {.size = sizeof info};
    epx_buffer_t *buffer = NULL;
    epx_buffer_config_t config = {.size = sizeof config, .lease_bytes = 1u << 20, .reserve_bytes = 64u << 10};
    const char *way = getenv("EPX_EMULATE_HOSTS") ? "on 2 hosts" : "by fabric handle between processes";
    if (!XT_OK(self, epx_group_get_info(self->group, &info)))
        return;
    if (info.domains == RANKS && driver_refuses(info.domain_why)) {
        if (self->rank == 0)
            snprintf(found->refused, sizeof found->refused, "%s", info.domain_why);
        return;
    }
    XT_CHECK(self, info.domains == 1 && strstr(info.domain_why, way), "%d domains: %s", info.domains, info.domain_why);
    if (info.domains != 1)
        return;
    if (self->rank == 0)
        printf("%s\n", info.domain_why);
    config.tokens_max = 40;
    config.topk_max = 8;
    config.experts_max = 12;
    config.handles_max = 2;
    config.leases_max = 4;
    bool good = XT_OK(self, epx_buffer_create(self->group, &config, &buffer));
    for (uint32_t i = 0; good && i < EXCHANGES; i++) {
        xt_shape_t s = {.ranks = RANKS, .seed = 91, .op = i * 2, .tokens_max = 40, .experts = 12, .bits = 64};
        s.topk = 1 + i % 4 * 2;
        s.weights = i % 3 != 1;
        s.alignment = 1;
        s.format = i % 2 ? XT_FP32 : XT_BF16;
        s.row_bytes = 256;
        s.side_elems = i % 2 ? 0 : 3;
        s.side_elem_bytes = i % 2 ? 0 : 4;
        good = xt_step_whole(self, buffer, &s, false, i % 2 ? XT_PLACE_OWN : XT_PLACE_LEASE,
                             i % 2 ? XT_FROM_ANYWHERE : XT_FROM_RECEIVED);
    }
    epx_buffer_destroy(buffer);
}

int main(void)
{
    found_t *found = mmap(NULL, sizeof *found, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED)
        return 1;
    if (!getenv("EPX_EMULATE_HOSTS"))
        setenv("EPX_CUDA_HANDLES", "fabric", 1);
    setenv("EPX_NET", "loop", 1); /* so that two domains, where it is refused, can at least be made */
    xt_run_t r = {.name = "fabric", .ranks = RANKS, .processes = true, .body = body, .seed = 5, .context = found};
    long failed = xt_run(&r);
    if (found->refused[0] && failed == 0) {
        printf("skipped: CUDA: %s\n", found->refused);
        return 77;
    }
    return xt_done();
}
