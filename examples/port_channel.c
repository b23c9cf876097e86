/* Two ranks trade blocks through port channels, whatever lies between them: a request goes to a proxy thread, which
 * carries it out on the network. EPX_NET=ofi:tcp goes over TCP; without it, threads of one process trade by "loop". */
#include <epx/channel.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { RANKS = 2, BLOCKS = 20, BLOCK = 65536, PLACES = 4 };
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
    int rank = (int)(intptr_t)argument, peer = 1 - rank;
    epx_group_t *group;
    epx_channels_t *channels;
    epx_group_config_t group_config = {.size = sizeof group_config, .rank = rank, .ranks = RANKS, .id = &id};
    must(epx_group_create(&group_config, &group));

    /* Memory 0: PLACES blocks that come, PLACES that go, and one word that the peer adds to. */
    static unsigned char memory[RANKS][2 * PLACES * BLOCK + 64] __attribute__((aligned(64)));
    epx_channel_memory_t mine = {memory[rank], sizeof memory[rank], 0};
    epx_channels_config_t config = {.size = sizeof config, .memories = &mine, .memory_count = 1, .channels = 2};
    must(epx_channels_create(group, &config, &channels));
    const epx_port_channel_t *data = &epx_channels_port_table(channels)[peer * 2], *back = data + 1;
    uint64_t same = epx_port_memories(0, 0);
    int wrong = 0;

    for (uint64_t i = 0; i < BLOCKS; i++) {
        uint64_t place = i % PLACES * BLOCK, going = PLACES * BLOCK + place;
        if (i >= PLACES)
            must(epx_port_wait(back, i - PLACES + 1)); /* the peer has read what lay in that place */
        for (int b = 0; b < BLOCK; b++)
            memory[rank][going + (uint64_t)b] = (unsigned char)(i * 7 + (uint64_t)b + (uint64_t)rank);
        must(epx_port_put_signal(data, same, place, going, BLOCK));

        must(epx_port_wait(data, i + 1)); /* the peer's block i is here */
        for (int b = 0; b < BLOCK; b++)
            wrong += memory[rank][place + (uint64_t)b] != (unsigned char)(i * 7 + (uint64_t)b + (uint64_t)peer);
        must(epx_port_signal(back));
        must(epx_port_atomic_add(data, 0, 2 * PLACES * BLOCK, -3)); /* any value; the peer's proxy adds */
    }
    must(epx_port_flush(data)); /* all of mine has taken effect there */
    must(epx_channels_barrier(channels));
    int64_t sum = *(int64_t *)(void *)&memory[rank][2 * PLACES * BLOCK];
    uint64_t bytes, puts;
    epx_channels_traffic(channels, &bytes, &puts);
    printf("rank %d: %d blocks came, %d bytes wrong, the sum is %lld; %llu bytes in %llu puts; %s\n", rank, BLOCKS,
           wrong, (long long)sum, (unsigned long long)bytes, (unsigned long long)puts, epx_channels_why(channels));
    if (wrong || sum != -3 * BLOCKS)
        exit(1);
    epx_channels_destroy(channels);
    epx_group_destroy(group);
    return NULL;
}

int main(void)
{
    pthread_t threads[RANKS];
    setenv("EPX_NET", "loop", 0);
    must(epx_unique_id_create(NULL, &id));
    for (intptr_t r = 0; r < RANKS; r++)
        pthread_create(&threads[r], NULL, rank_main, (void *)r);
    for (int r = 0; r < RANKS; r++)
        pthread_join(threads[r], NULL);
    return 0;
}
