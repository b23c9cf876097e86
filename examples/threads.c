/* Four ranks send each token to its two experts, and get the sum of the experts' outputs back. The ranks are threads
 * here; processes, and GPUs, are the same calls. */
#include <epx/epx.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { RANKS = 4, TOKENS = 8, HIDDEN = 16, EXPERTS = 8, TOPK = 2 };
static epx_unique_id_t id; /* names the rendezvous */

static void must(epx_status_t status)
{
    if (status == EPX_OK)
        return;
    fprintf(stderr, "%s: %s\n", epx_status_name(status), epx_error_detail());
    exit(1);
}

static void *rank_main(void *argument)
{
    int rank = (int)(intptr_t)argument;
    epx_group_t *group;
    epx_buffer_t *buffer;
    epx_group_config_t group_config = {.size = sizeof group_config, .rank = rank, .ranks = RANKS, .id = &id};
    must(epx_group_create(&group_config, &group));
    epx_buffer_config_t config = {.size = sizeof config, .lease_bytes = 1 << 20};
    must(epx_buffer_create(group, &config, &buffer));

    float x[TOKENS][HIDDEN], y[TOKENS][HIDDEN];
    int64_t experts[TOKENS][TOPK]; /* a gate would choose them */
    for (int t = 0; t < TOKENS; t++) {
        experts[t][0] = (rank + t) % EXPERTS;
        experts[t][1] = (rank + 3 * t + 1) % EXPERTS == experts[t][0] ? -1 : (rank + 3 * t + 1) % EXPERTS;
        for (int h = 0; h < HIDDEN; h++)
            x[t][h] = (float)(1000 * rank + 100 * t + h);
    }
    epx_dispatch_t dispatch = {.size = sizeof dispatch,
                               .rows = {.x = x, .row_bytes = sizeof x[0]},
                               .tokens = TOKENS,
                               .topk_idx = experts,
                               .topk = TOPK,
                               .experts = EXPERTS};
    epx_received_t rows = {.size = sizeof rows};
    epx_handle_t *handle;
    must(epx_dispatch(buffer, &dispatch, NULL, NULL, &handle, &rows));

    for (uint32_t r = 0; r < rows.rows; r++) { /* expert number e multiplies by e + 1 */
        float factor = 0;
        for (int k = 0; k < TOPK; k++) {
            int64_t local = ((int64_t *)rows.topk_idx)[r * TOPK + k];
            factor += local < 0 ? 0 : (float)(rank * (EXPERTS / RANKS) + local + 1);
        }
        for (int h = 0; h < HIDDEN; h++)
            ((float *)rows.x)[r * HIDDEN + h] *= factor;
    }
    epx_combine_t combine = {.size = sizeof combine, .x = rows.x, .dtype = EPX_FP32, .hidden = HIDDEN, .out = y};
    must(epx_combine(handle, &combine, NULL));

    int wrong = 0;
    for (int t = 0; t < TOKENS; t++)
        for (int h = 0; h < HIDDEN; h++)
            wrong += y[t][h] != (float)(experts[t][0] + 1 + experts[t][1] + 1) * x[t][h];
    printf("rank %d received %u rows; %d wrong of %d\n", rank, rows.rows, wrong, TOKENS * HIDDEN);
    must(epx_lease_release(buffer, rows.lease, NULL));
    epx_handle_release(handle, NULL);
    epx_buffer_destroy(buffer);
    epx_group_destroy(group);
    return (void *)(intptr_t)wrong;
}

int main(void)
{
    pthread_t thread[RANKS];
    void *wrong[RANKS];
    must(epx_unique_id_create(NULL, &id));
    for (int r = 0; r < RANKS; r++)
        pthread_create(&thread[r], NULL, rank_main, (void *)(intptr_t)r);
    for (int r = 0; r < RANKS; r++)
        pthread_join(thread[r], &wrong[r]);
    return wrong[0] || wrong[1] || wrong[2] || wrong[3];
}
