/* Three ranks pass a counted message around a ring through memory channels: a put is stores into the neighbour's
 * memory, a signal one more store. The ranks are threads here; processes of one host are the same calls. */
#include <epx/channel.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { RANKS = 3, ROUNDS = 5, WORDS = 1024 };
static epx_unique_id_t id;

static void must(epx_status_t status)
{
    if (status == EPX_OK)
        return;
    fprintf(stderr, "%s: %s\n", epx_status_name(status), epx_error_detail());
    exit(status == EPX_E_UNSUPPORTED ? 77 : 1);
}

static void *rank_main(void *argument)
{
    int rank = (int)(intptr_t)argument, next = (rank + 1) % RANKS, previous = (rank + RANKS - 1) % RANKS;
    epx_group_t *group;
    epx_channels_t *channels;
    epx_group_config_t group_config = {.size = sizeof group_config, .rank = rank, .ranks = RANKS, .id = &id};
    must(epx_group_create(&group_config, &group));

    /* Memory without a base: the library makes it, and every rank of the domain maps it. */
    epx_channel_memory_t memory = {.bytes = WORDS * sizeof(uint64_t)};
    epx_channels_config_t config = {.size = sizeof config, .memories = &memory, .memory_count = 1};
    must(epx_channels_create(group, &config, &channels));
    uint32_t per_peer = epx_channels_per_peer(channels);
    const epx_memory_channel_t *table = epx_channels_memory_table(channels);
    const epx_memory_channel_t *to = &table[(uint32_t)next * per_peer], *from = &table[(uint32_t)previous * per_peer];
    uint64_t *mine = epx_channels_memory(channels, 0), message[WORDS] = {0};

    for (uint64_t round = 1; round <= ROUNDS; round++) {
        if (rank > 0 || round > 1) {
            must(epx_memory_wait(from, rank > 0 ? round : round - 1)); /* counts: signals ever */
            for (int i = 0; i < WORDS; i++)
                message[i] = mine[i] + 1;
        }
        must(epx_memory_put(to, 0, message, sizeof message, 0, 1));
        must(epx_memory_signal(to));
    }
    if (rank == 0) {
        must(epx_memory_wait(from, ROUNDS));
        int wrong = 0;
        for (int i = 0; i < WORDS; i++)
            wrong += mine[i] != RANKS * ROUNDS - 1;
        printf("%d rounds through %d ranks: the message says %llu, %d words wrong\n", ROUNDS, RANKS,
               (unsigned long long)mine[0], wrong);
        if (wrong)
            exit(1);
    }
    must(epx_group_barrier(group, 0)); /* nobody leaves while its memory is still read */
    epx_channels_destroy(channels);
    epx_group_destroy(group);
    return NULL;
}

int main(void)
{
    pthread_t threads[RANKS];
    setenv("EPX_NET", "loop", 0); /* port channels are made too: between threads no network is needed */
    must(epx_unique_id_create(NULL, &id));
    for (intptr_t r = 0; r < RANKS; r++)
        pthread_create(&threads[r], NULL, rank_main, (void *)r);
    for (int r = 0; r < RANKS; r++)
        pthread_join(threads[r], NULL);
    return 0;
}
