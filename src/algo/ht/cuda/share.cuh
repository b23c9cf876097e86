/*
 * How warps share work: stages of a warp's own in shared memory, for the bulk copy engine; turns, by which warps of all
 * blocks take items; and one warp of a block that tells the world what the others have done.
 */
#ifndef EPX_ALGO_HT_CUDA_SHARE_CUH
#define EPX_ALGO_HT_CUDA_SHARE_CUH

#include "algo/ht/cuda/wait.cuh"

/* ---- stages ---- */

/* A warp's stages. Phases are counted by how often a stage was filled. */
typedef struct ht_stages {
    char *memory;
    uint64_t *bars;
    uint32_t bytes;  /* of one stage */
    uint32_t parity; /* bit s: parity of stage s's next completion */
} ht_stages_t;

EPX__DEVICE ht_stages_t stages_init(const ht_cut_t &cut, char *shared)
{
    uint32_t warp = threadIdx.x / 32;
    ht_stages_t s = {shared + (size_t)warp * cut.stages * cut.stage_bytes,
                     (uint64_t *)(shared + cut.bars_offset) + warp * cut.stages, cut.stage_bytes, 0};
    if (threadIdx.x % 32 == 0) {
        for (uint32_t i = 0; i < cut.stages; i++)
            mbarrier_init(&s.bars[i]);
        mbarrier_fence_init();
    }
    __syncwarp();
    return s;
}
EPX__DEVICE char *stage_at(const ht_stages_t &s, uint32_t i)
{
    return s.memory + (size_t)i * s.bytes;
}
/* The bytes of the stage's last fill are there. Local or NVLink memory: this cannot wait long. */
EPX__DEVICE void stage_wait(ht_stages_t &s, uint32_t i)
{
    while (!mbarrier_try_wait(&s.bars[i], s.parity >> i & 1))
        ;
    s.parity ^= 1u << i;
}

/* ---- turns ---- */

/*
 * A warp's way through items that `warps` warps share. The first two items of each are its own from the start, so that
 * nobody waits to begin; the later ones are what nobody has yet, in ascending order, by a counter in device memory that
 * is 0 when a kernel begins. SMs differ in speed, and so do their ways to a link: with equal shares the slowest would
 * hold all others up. What is taken is looked at an item later, when the answer is there.
 */
typedef struct ht_turns {
    uint32_t now, coming;
    uint32_t turn; /* lane 0 */
    uint32_t warps;
    uint32_t *counter;
} ht_turns_t;

EPX__DEVICE uint32_t turn_take(const ht_turns_t &t)
{
    return threadIdx.x % 32 == 0 ? add_relaxed_gpu_u32(t.counter, 1) : 0;
}
EPX__DEVICE uint32_t turn_item(const ht_turns_t &t, uint32_t turn)
{
    return 2 * t.warps + __shfl_sync(0xffffffffu, turn, 0);
}
/* `own` from `warps` on: a warp that joins later, with no items of its own. */
EPX__DEVICE ht_turns_t turns_first(uint32_t *counter, uint32_t own, uint32_t warps)
{
    ht_turns_t t = {own, own + warps, 0, warps, counter};
    if (own >= warps) {
        t.now = turn_item(t, turn_take(t));
        t.coming = turn_item(t, turn_take(t));
    }
    t.turn = turn_take(t);
    return t;
}
EPX__DEVICE void turns_next(ht_turns_t *t)
{
    t->now = t->coming;
    t->coming = turn_item(*t, t->turn);
    t->turn = turn_take(*t);
}

/* ---- the announcing warp ---- */

/*
 * A fence waits for all stores of the SM, so it must not stand in every warp's way after every row. Each worker warp
 * only says in shared memory how many of its items are done; one more warp of the block makes one fence for all that
 * has come together meanwhile, and counts.
 */
EPX__DEVICE void tell_items(ht_block_t *b, uint32_t done)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        __threadfence_block();
        atomicExch(&b->progress[threadIdx.x / 32], done);
    }
}
EPX__DEVICE void tell_progress(ht_block_t *b, uint32_t done)
{
    fence_proxy_async(); /* what the engine wrote, before what is said about it */
    tell_items(b, done);
}
/* One thread of the warp leaves which item its number `done` is, before that is told, for the announcing warp, which
 * must have looked at the one that lay there: it must be at work. */
EPX__DEVICE void leave_item(ht_block_t *b, uint32_t done, uint32_t item)
{
    uint32_t warp = threadIdx.x / 32;
    while (done - atomicOr(&b->told[warp], 0u) >= HT_TURNS)
        __nanosleep(100);
    atomicExch(&b->item[warp][done % HT_TURNS], item);
}
EPX__DEVICE void tell_ended(ht_block_t *b)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        __threadfence_block();
        atomicAdd(&b->ended, 1u);
    }
}

/* Lane i follows warp i. count(context, n, item) counts one done item, and returns which of its (up to 32) batches are
 * complete thereby; after one more fence for all lanes', publish(context, n, item, batches) says so. Ends after the
 * workers, which wait for it. */
template <typename context_t, uint32_t (*count)(const context_t &, uint64_t, uint32_t),
          void (*publish)(const context_t &, uint64_t, uint32_t, uint32_t)>
__device__ void announce(const context_t &context, ht_block_t *b, uint32_t workers)
{
    uint32_t lane = threadIdx.x % 32, done = 0;
    for (;;) {
        bool over = __all_sync(0xffffffffu, atomicOr(&b->ended, 0u) == workers) != 0;
        __threadfence_block();
        uint32_t ready = lane < workers ? atomicOr(&b->progress[lane], 0u) : 0;
        if (__any_sync(0xffffffffu, ready > done)) {
            fence_proxy_async();
            fence_acq_rel_sys();
            while (__any_sync(0xffffffffu, done < ready)) {
                uint32_t item = 0, complete = 0;
                if (done < ready) {
                    item = atomicOr(&b->item[lane][done++ % HT_TURNS], 0u);
                    complete = count(context, b->n, item);
                }
                if (__any_sync(0xffffffffu, complete != 0)) {
                    fence_acq_rel_sys();
                    publish(context, b->n, item, complete);
                }
            }
            __threadfence_block();
            if (lane < workers)
                atomicExch(&b->told[lane], done);
            __syncwarp();
        } else if (over) {
            return;
        } else {
            __nanosleep(100);
        }
    }
}

#endif
