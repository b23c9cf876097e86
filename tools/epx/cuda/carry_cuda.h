/* Pinned host memory and copies between it and a GPU; see carry_ops_t in mem.h. Functions return NULL, or words. */
#ifndef EPX_TOOL_CARRY_CUDA_H
#define EPX_TOOL_CARRY_CUDA_H

#include "mem.h"

const char *carry_cuda_open(int device, void *stream, size_t bytes, void **carry, char **out, char **in);
const char *carry_cuda_begin(void *carry, size_t out_bytes, size_t in_bytes);
const char *carry_cuda_ready(void *carry, size_t *bytes);
const char *carry_cuda_landed(void *carry, size_t bytes);
const char *carry_cuda_end(void *carry);
void carry_cuda_close(void *carry);

#endif
