/* Every rank sends its tokens to two experts each, and gets the sum of the experts' outputs back. */
#include <epx/epx.h>
#include <stdio.h>
#include <stdlib.h>
enum { TOKENS = 8, HIDDEN = 16, TOPK = 2 };
static void must(epx_status_t status)
{
    if (status != EPX_OK)
        exit(fprintf(stderr, "%s: %s\n", epx_status_name(status), epx_error_detail()) > 0);
}
int main(void)
{
    epx_group_config_t who = {.size = sizeof who, .backend = EPX_BACKEND_CPU}; /* rank and ranks: from the launcher */
    epx_group_info_t info = {.size = sizeof info};
    epx_buffer_config_t room = {.size = sizeof room};
    epx_group_t *group;
    epx_buffer_t *buffer;
    must(epx_group_create(&who, &group));
    must(epx_group_get_info(group, &info));
    must(epx_buffer_create(group, &room, &buffer));
    float x[TOKENS * HIDDEN], sum[TOKENS * HIDDEN];
    int64_t experts[TOKENS * TOPK]; /* a gate's choice; two experts live on each rank */
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        x[i] = (float)(1000 * info.rank + i);
    for (int i = 0; i < TOKENS * TOPK; i++)
        experts[i] = (info.rank + i) % (2 * info.ranks);
    epx_dispatch_t dispatch = {sizeof dispatch,  .rows = {.x = x, .row_bytes = HIDDEN * sizeof *x},
                               .tokens = TOKENS, .topk_idx = experts,
                               .topk = TOPK,     .experts = 2u * (uint32_t)info.ranks};
    epx_handle_t *handle;
    epx_received_t got = {.size = sizeof got};
    must(epx_dispatch(buffer, &dispatch, NULL, NULL, &handle, &got)); /* got.x: the rows that came */
    for (uint32_t r = 0; r < got.rows; r++) { /* every expert doubles; -1 marks an expert of another rank */
        const int64_t *local = (int64_t *)got.topk_idx + r * TOPK;
        for (int h = 0; h < HIDDEN; h++)
            ((float *)got.x)[r * HIDDEN + h] *= 2.0f * (float)((local[0] >= 0) + (local[1] >= 0));
    }
    epx_combine_t combine = {sizeof combine, .x = got.x, .dtype = EPX_FP32, .hidden = HIDDEN, .out = sum};
    must(epx_combine(handle, &combine, NULL));
    int wrong = 0;
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        wrong += sum[i] != 4 * x[i];
    printf("rank %d of %d: %u rows came, %d wrong of %d\n", info.rank, info.ranks, got.rows, wrong, TOKENS * HIDDEN);
    epx_buffer_destroy(buffer);
    epx_group_destroy(group);
    return wrong != 0;
}
