/*
 * Launching the in-band kernels: while the stream's kernel before them is ending. Blocks are made, and their first
 * instructions fetched, once all blocks of that one are over, but before it is known that what it wrote is performed.
 * So each begins with await_kernel_before, in all threads, before it looks at memory. Who waits for this kernel has
 * then waited for the one before it too. No kernel of ours lets the next start sooner, but others' may: so not where
 * ranks share a GPU and need the room.
 */
#ifndef EPX_ALGO_LL_CUDA_LL_LAUNCH_CUH
#define EPX_ALGO_LL_CUDA_LL_LAUNCH_CUH

#include "algo/ll/cuda/ll_cuda.h"

template <typename params_t>
static int ll_launch(void (*kernel)(const params_t), const params_t *p, uint32_t blocks, uint32_t threads,
                     uint32_t shared_bytes, void *stream)
{
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {dim3(blocks), dim3(threads), shared_bytes, (cudaStream_t)stream, &early, p->l.early};
    return (int)cudaLaunchKernelEx(&config, kernel, *p);
}

#endif
