/* The GPU's floors; see floor_plan_t in mem.h. */
#ifndef EPX_TOOL_FLOOR_CUDA_H
#define EPX_TOOL_FLOOR_CUDA_H

#include "mem.h"

const char *floor_cuda_open(int device, void *stream, const floor_plan_t *plan, void **floor); /* NULL, or words */
int floor_cuda_variants(void *floor, floor_kind_t kind);
const char *floor_cuda_variant_name(void *floor, floor_kind_t kind, int variant);
int floor_cuda_run(void *floor, floor_kind_t kind, int variant); /* a cudaError_t */
/* Enqueue a barrier of all ranks' GPUs; one that waits longer than a second goes on. */
void floor_cuda_meet(void *floor);
void floor_cuda_close(void *floor);

#endif
