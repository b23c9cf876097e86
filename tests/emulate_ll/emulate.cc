/* See emulate.h. */
#include "emulate.h"

#include <emmintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mman.h>

enum { THREADS_MOST = 1024, STACK_BYTES = 64 << 10, STORES_MOST = 512 };

thread_local emu_index threadIdx, blockIdx, gridDim, blockDim;
thread_local __attribute__((aligned(16))) char memory[164 << 10];

typedef struct fiber {
    void *stack_pointer;
    bool done;
    emu_op op; /* what it waits for; EMU_NONE: it can run */
    uint64_t value;
    uint32_t lane;
} fiber_t;

typedef struct store {
    void *to;
    uint32_t bytes;
    __attribute__((aligned(16))) char value[16];
} store_t;

typedef struct block {
    fiber_t fibers[THREADS_MOST];
    store_t stores[STORES_MOST];
    uint32_t threads, stored, current;
    char *stacks;
    void *scheduler; /* its stack pointer */
    void (*body)(const void *p);
    const void *p;
    uint32_t index, blocks;
    uint64_t random;
    struct block *next; /* free ones */
} block_t;

static thread_local block_t *mine;

/* ---- switching ---- */

extern "C" void emu_switch(void **save, void *load);
__asm__(".text\n.globl emu_switch\n.type emu_switch,@function\nemu_switch:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");

static void to_scheduler(void)
{
    block_t *b = mine;
    emu_switch(&b->fibers[b->current].stack_pointer, b->scheduler);
}

static void fiber_main(void)
{
    mine->body(mine->p);
    mine->fibers[mine->current].done = true;
    for (;;)
        to_scheduler();
}

static uint64_t draw(block_t *b)
{
    b->random ^= b->random << 13;
    b->random ^= b->random >> 7;
    b->random ^= b->random << 17;
    return b->random;
}

/* ---- stores that take their time ---- */

static void perform(const store_t *s)
{
    if (s->bytes == 16)
        _mm_store_si128((__m128i *)s->to, _mm_load_si128((const __m128i *)s->value));
    else
        __atomic_store_n((uint64_t *)s->to, *(const uint64_t *)s->value, __ATOMIC_RELAXED);
    __asm__ volatile("" ::: "memory");
}

void emu_drain(void)
{
    block_t *b = mine;
    for (uint32_t i = 0; i < b->stored; i++)
        perform(&b->stores[i]);
    b->stored = 0;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

void emu_store(void *to, const void *value, uint32_t bytes)
{
    block_t *b = mine;
    if ((uintptr_t)to % bytes) {
        fprintf(stderr, "emulate: a store of %u bytes to %p is not aligned\n", bytes, to);
        abort();
    }
    if (b->stored == STORES_MOST)
        emu_drain();
    store_t *s = &b->stores[b->stored++];
    s->to = to;
    s->bytes = bytes;
    memcpy(s->value, value, bytes);
}

/* A random one, unless an older one goes to the same 16 bytes. */
static void let_some_out(block_t *b)
{
    for (uint32_t tries = b->stored / 4 + 1; tries && b->stored; tries--) {
        uint32_t at = (uint32_t)(draw(b) % b->stored);
        bool first = true;
        for (uint32_t i = 0; first && i < at; i++)
            first = (uintptr_t)b->stores[i].to / 16 != (uintptr_t)b->stores[at].to / 16;
        if (!first)
            continue;
        perform(&b->stores[at]);
        memmove(&b->stores[at], &b->stores[at + 1], (b->stored - at - 1) * sizeof(store_t));
        b->stored--;
    }
}

/* ---- meeting ---- */

uint64_t emu_meet(emu_op op, uint64_t value, uint32_t lane)
{
    block_t *b = mine;
    fiber_t *f = &b->fibers[b->current];
    f->op = op;
    f->value = value;
    f->lane = lane;
    to_scheduler();
    return f->value;
}

void emu_give_way(void)
{
    if (draw(mine) % 4 == 0)
        to_scheduler();
}

static void wrong(const block_t *b, uint32_t thread, const char *what)
{
    fprintf(stderr, "emulate: block %u, thread %u: %s (operation %d)\n", b->index, thread, what,
            (int)b->fibers[thread].op);
    abort();
}

static void meet_warp(fiber_t *f)
{
    uint64_t out[32];
    for (uint32_t i = 0; i < 32; i++) {
        out[i] = f->op == EMU_SHFL ? f[f[i].lane].value : 0;
        for (uint32_t j = 0; j < 32; j++) {
            if (f->op == EMU_BALLOT)
                out[i] |= (f[j].value & 1) << j;
            if (f->op == EMU_MATCH)
                out[i] |= (uint64_t)(f[j].value == f[i].value) << j;
            if (f->op == EMU_ADD)
                out[i] += f[j].value;
            if (f->op == EMU_OR)
                out[i] |= f[j].value;
        }
    }
    for (uint32_t i = 0; i < 32; i++) {
        f[i].value = out[i];
        f[i].op = EMU_NONE;
    }
}

/* Lanes that wait for the same go on. */
static void look_at_warp(block_t *b, uint32_t first)
{
    fiber_t *f = &b->fibers[first];
    bool warp_op = false;
    for (uint32_t i = 0; i < 32; i++) {
        if (!f[i].done && f[i].op == EMU_NONE)
            return; /* some lane still runs */
        warp_op = warp_op || (!f[i].done && f[i].op < EMU_BAR);
    }
    if (!warp_op)
        return; /* over, or at the block's barrier */
    for (uint32_t i = 1; i < 32; i++)
        if (f[i].done != f->done || f[i].op != f->op)
            wrong(b, first + i, "the lanes of its warp are elsewhere");
    meet_warp(f);
}

/* Barriers of a part of the block: all their threads go on at once. */
static void look_at_named(block_t *b)
{
    for (uint32_t name = 1; name < 16; name++) {
        uint32_t waiting = 0;
        uint64_t wanted = 0;
        for (uint32_t i = 0; i < b->threads; i++) {
            const fiber_t *f = &b->fibers[i];
            bool here = !f->done && f->op == EMU_BAR_NAMED && f->lane == name;
            waiting += here;
            wanted = here ? f->value : wanted;
        }
        if (waiting == 0 || waiting < wanted)
            continue;
        for (uint32_t i = 0; i < b->threads; i++)
            if (!b->fibers[i].done && b->fibers[i].op == EMU_BAR_NAMED && b->fibers[i].lane == name)
                b->fibers[i].op = EMU_NONE;
    }
}

static bool look_at_block(block_t *b)
{
    uint32_t waiting = 0, done = 0, sum = 0;
    for (uint32_t i = 0; i < b->threads; i++) {
        const fiber_t *f = &b->fibers[i];
        waiting += !f->done && f->op >= EMU_BAR && f->op <= EMU_BAR_AND;
        done += f->done;
        sum += !f->done && f->op >= EMU_BAR && f->op <= EMU_BAR_AND && f->value;
    }
    if (done == b->threads)
        return true;
    if (waiting + done < b->threads)
        return false;
    for (uint32_t i = 0; i < b->threads; i++)
        if (b->fibers[i].done || b->fibers[i].op != b->fibers[0].op)
            wrong(b, i, "the threads of its block are elsewhere");
    emu_op op = b->fibers[0].op;
    for (uint32_t i = 0; i < b->threads; i++) {
        b->fibers[i].value = op == EMU_BAR_OR ? sum != 0 : sum == b->threads;
        b->fibers[i].op = EMU_NONE;
    }
    return false;
}

/* ---- a block ---- */

static void *run_block(void *context)
{
    block_t *b = (block_t *)context;
    mine = b;
    blockIdx.x = b->index;
    gridDim.x = b->blocks;
    blockDim.x = b->threads;
    memset(memory, 0xa5, sizeof memory);
    while (!look_at_block(b)) {
        uint32_t warps = b->threads / 32, start = (uint32_t)(draw(b) % warps);
        for (uint32_t w = 0; w < warps; w++) {
            uint32_t first = (start + w) % warps * 32, turn = (uint32_t)(draw(b) % 32);
            for (uint32_t i = 0; i < 32; i++) {
                b->current = first + (i + turn) % 32;
                fiber_t *f = &b->fibers[b->current];
                if (f->done || f->op != EMU_NONE)
                    continue;
                threadIdx.x = b->current;
                emu_switch(&b->scheduler, f->stack_pointer);
            }
            look_at_warp(b, first);
        }
        look_at_named(b);
        let_some_out(b);
        if (draw(b) % 8 == 0)
            sched_yield();
    }
    emu_drain();
    return NULL;
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static block_t *free_blocks;
static uint64_t seeds = 88172645463325252u;

static block_t *take_block(void)
{
    pthread_mutex_lock(&lock);
    block_t *b = free_blocks;
    if (b)
        free_blocks = b->next;
    seeds += 0x9e3779b97f4a7c15u;
    uint64_t seed = seeds;
    pthread_mutex_unlock(&lock);
    if (!b) {
        b = (block_t *)calloc(1, sizeof *b);
        size_t bytes = (size_t)THREADS_MOST * STACK_BYTES;
        if (b)
            b->stacks =
                (char *)mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (!b || b->stacks == MAP_FAILED)
            abort();
    }
    b->random = seed ^ seed >> 29;
    return b;
}

static void start_fibers(block_t *b)
{
    for (uint32_t i = 0; i < b->threads; i++) {
        void **top = (void **)(b->stacks + (size_t)(i + 1) * STACK_BYTES - 64);
        *--top = NULL; /* so that the stack is aligned as after a call */
        *--top = (void *)fiber_main;
        top -= 6;
        memset(top, 0, 6 * sizeof *top);
        b->fibers[i] = fiber_t{};
        b->fibers[i].stack_pointer = top;
    }
}

void emu_run(void (*body)(const void *p), const void *p, uint32_t blocks, uint32_t threads)
{
    block_t *b[256];
    pthread_t thread[256];
    pthread_attr_t attributes;
    if (blocks > 256 || threads > THREADS_MOST || threads % 32)
        abort();
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 1 << 20);
    for (uint32_t i = 0; i < blocks; i++) {
        b[i] = take_block();
        b[i]->body = body;
        b[i]->p = p;
        b[i]->index = i;
        b[i]->blocks = blocks;
        b[i]->threads = threads;
        b[i]->stored = 0;
        start_fibers(b[i]);
        if (pthread_create(&thread[i], &attributes, run_block, b[i]))
            abort();
    }
    for (uint32_t i = 0; i < blocks; i++) {
        pthread_join(thread[i], NULL);
        pthread_mutex_lock(&lock);
        b[i]->next = free_blocks;
        free_blocks = b[i];
        pthread_mutex_unlock(&lock);
    }
    pthread_attr_destroy(&attributes);
}
