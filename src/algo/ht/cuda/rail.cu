/*
 * Trying the rails when they are made: some networks connect at the first put, which is not to fall into a first
 * dispatch with its shorter deadline. The GPU's threads push, since only they may (tickets are in GPU memory).
 *
 * One add to the barrier word of every channel at each rail; the rail's proxy adds it after all earlier requests of the
 * channel, to the word that the rail's own thread waits for. Once in the life of a buffer, so 1 is enough.
 */
#include <cuda_runtime.h>

#include "algo/ht/cuda/rail.cuh"

/* Thread: one channel. */
EPX__DEVICE epx_status_t try_channel(const ht_try_t &p, int d, int which)
{
    const epx_port_channel_t *channel = rail_channel(*p.rails, d, which);
    uint64_t line = (uint64_t)(uint32_t)p.rank * EPX__RAIL_CHANNELS + (uint32_t)which;
    epx_status_t status = epx_port_atomic_add(channel, p.memory, p.barrier_offset + line * 64, 1);
    if (status != EPX_OK)
        return status;
    line = (uint64_t)(uint32_t)channel->peer * EPX__RAIL_CHANNELS + (uint32_t)which;
    return epx_port_wait_word(channel, p.barrier + line * 8, 1);
}

__global__ void ht_try_kernel(const __grid_constant__ ht_try_t p)
{
    if (!p.rails)
        return; /* a first launch, at creation */
    int channels = p.rails->domains * EPX__RAIL_CHANNELS;
    for (int i = (int)threadIdx.x; i < channels; i += (int)blockDim.x) {
        int d = i / EPX__RAIL_CHANNELS;
        epx_status_t status = d == p.rails->home ? EPX_OK : try_channel(p, d, i % EPX__RAIL_CHANNELS);
        if (status != EPX_OK) {
            *(volatile int32_t *)p.peer = rail_channel(*p.rails, d, 0)->peer;
            *(volatile int32_t *)p.status = (int32_t)status;
        }
    }
}

extern "C" int epx__ht_launch_try(const ht_try_t *p, void *stream)
{
    ht_try_kernel<<<1, 64, 0, (cudaStream_t)stream>>>(*p);
    return (int)cudaGetLastError();
}

extern "C" int epx__ht_load_try(void *stream)
{
    ht_try_t p = {};
    return epx__ht_launch_try(&p, stream);
}
