/* Fibers, warps' operations, barriers, launches. See emulate.h. */
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include "fiber.h"

/* Not a power of two: else the tops of all stacks would want the same few lines of a cache. */
enum : uint32_t { STACK_BYTES = (96u << 10) + 1088 };

__thread emu_grid *emu_now;
__thread emu_fiber *emu_self;
__thread const emu_place *emu_here;

/* ---- switching ---- */

extern "C" void emu_switch(void **from, void *to);
asm(".text\n.globl emu_switch\n.type emu_switch,@function\nemu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size emu_switch,.-emu_switch\n");

void emu_yield(void)
{
    emu_switch(&emu_self->stack_pointer, emu_now->scheduler);
}

/* One look in so many takes 10 ms, in which other ranks and proxies get far. */
static uint64_t look_naps(void)
{
    static const char *text = getenv("EPX_EMULATE_NAPS");
    static const uint64_t naps = text ? strtoull(text, nullptr, 10) : 0;
    return naps;
}

void emu_look(void)
{
    const timespec nap = {0, 10000000};
    uint64_t draw = emu_draw(emu_now), naps = look_naps();
    if (naps && (draw >> 8) % naps == 0)
        nanosleep(&nap, nullptr);
    if (draw % 4 == 0)
        emu_yield();
}

static void enter(void)
{
    emu_fiber *f = emu_self;
    emu_now->run(emu_now->context);
    if (!f->stores.empty()) { /* the end waits for the bulk copy engine */
        emu_bulk_commit();
        emu_bulk_wait(0);
    }
    uint32_t bit = 1u << f->place.thread.x % 32;
    f->warp->ready &= ~bit;
    f->warp->done |= bit;
    f->block->done++;
    emu_now->living--;
    emu_yield();
    abort();
}

uint64_t emu_draw(emu_grid *g)
{
    g->random ^= g->random << 13;
    g->random ^= g->random >> 7;
    g->random ^= g->random << 17;
    return g->random >> 11;
}

/* ---- what goes wrong ---- */

void emu_die(const char *what)
{
    fprintf(stderr, "emulation: %s (block %u, thread %u)\n", what, emu_here->block.x, emu_here->thread.x);
    abort();
}

static const char *const op_names[] = {
    [EMU_NONE] = "nothing",        [EMU_SHFL] = "a shuffle", [EMU_BALLOT] = "a ballot",
    [EMU_MATCH] = "a match",       [EMU_ADD] = "a sum",      [EMU_OR] = "an or",
    [EMU_SYNCWARP] = "__syncwarp", [EMU_BAR] = "a barrier",  [EMU_NAMED] = "a barrier of some warps"};

static void tell(const emu_grid *g, uint32_t fiber, bool done)
{
    const emu_fiber *f = &g->fibers[fiber];
    if (done)
        fprintf(stderr, "emulation: block %u, thread %u: has returned\n", f->place.block.x, f->place.thread.x);
    else
        fprintf(stderr, "emulation: block %u, thread %u: waits at %s:%d for %s\n", f->place.block.x, f->place.thread.x,
                f->file ? f->file : "?", f->line, op_names[f->op]);
}

static bool alike(const emu_fiber *a, const emu_fiber *b)
{
    return a->op == b->op && a->line == b->line && (a->file == b->file || !strcmp(a->file, b->file));
}

static bool is_done(const emu_grid *g, uint32_t fiber)
{
    return g->fibers[fiber].warp->done >> g->fibers[fiber].place.thread.x % 32 & 1;
}

/* Of these, one that waits, and one that has returned or waits elsewhere. */
[[noreturn]] static void apart(const emu_grid *g, uint32_t first, uint32_t count)
{
    uint32_t one = first, other = first;
    while (is_done(g, one))
        one++;
    while (other + 1 < first + count && !is_done(g, other) && alike(&g->fibers[one], &g->fibers[other]))
        other++;
    fprintf(stderr, "emulation: threads that must meet do not\n");
    tell(g, one, is_done(g, one));
    tell(g, other, is_done(g, other));
    abort();
}

/* ---- meeting ---- */

uint64_t emu_meet(emu_op op, uint64_t value, uint32_t lane, const char *file, int line)
{
    emu_fiber *f = emu_self;
    f->op = op;
    f->value = value;
    f->lane = lane;
    f->file = file;
    f->line = line;
    f->warp->ready &= ~(1u << f->place.thread.x % 32);
    if (op == EMU_BAR)
        f->block->at_barrier++;
    if (op == EMU_NAMED) {
        f->block->at_named[lane]++;
        f->block->wanted[lane] = (uint32_t)value;
    }
    emu_yield();
    return f->value;
}

static void let_go(emu_fiber *f)
{
    f->op = EMU_NONE;
    f->warp->ready |= 1u << f->place.thread.x % 32;
}

static void meet_warp(emu_fiber *f)
{
    uint64_t out[32], all = 0;
    emu_op op = f->op;
    for (uint32_t i = 0; i < 32; i++) {
        if (op == EMU_BALLOT)
            all |= (f[i].value & 1) << i;
        else if (op == EMU_ADD)
            all += f[i].value;
        else if (op == EMU_OR)
            all |= f[i].value;
    }
    for (uint32_t i = 0; i < 32; i++) {
        out[i] = op == EMU_SHFL ? f[f[i].lane].value : all;
        for (uint32_t j = 0; op == EMU_MATCH && j < 32; j++)
            out[i] |= (uint64_t)(f[j].value == f[i].value) << j;
    }
    for (uint32_t i = 0; i < 32; i++) {
        f[i].value = out[i];
        f[i].op = EMU_NONE;
    }
}

/* No lane can run: all at one place of the program? They go on. */
static bool look_at_warp(emu_grid *g, emu_warp *w)
{
    emu_fiber *f = &g->fibers[w->first];
    bool warp_op = false;
    for (uint32_t i = 0; i < 32 && !warp_op; i++)
        warp_op = !(w->done >> i & 1) && f[i].op < EMU_BAR;
    if (!warp_op)
        return false; /* over, or at a barrier */
    for (uint32_t i = 0; i < 32; i++)
        if (w->done || !alike(f, f + i))
            apart(g, w->first, 32);
    meet_warp(f);
    w->ready = 0xffffffffu;
    return true;
}

/* Barriers of a part of the block are known by their number alone: their two sides stand at different places. */
static bool look_at_named(emu_grid *g, emu_block *b)
{
    bool moved = false;
    for (uint32_t name = 1; name < 16; name++) {
        if (b->at_named[name] == 0 || b->at_named[name] < b->wanted[name])
            continue;
        b->at_named[name] = 0;
        for (uint32_t i = b->first; i < b->first + b->threads; i++)
            if (!is_done(g, i) && g->fibers[i].op == EMU_NAMED && g->fibers[i].lane == name)
                let_go(&g->fibers[i]);
        moved = true;
    }
    return moved;
}

static void look_at_block(emu_grid *g, emu_block *b)
{
    if (look_at_named(g, b))
        return;
    emu_fiber *f = &g->fibers[b->first];
    uint32_t count = 0;
    for (uint32_t i = 0; i < b->threads; i++) {
        if (b->done || b->at_barrier != b->threads || !alike(f, f + i)) /* and nobody else will come */
            apart(g, b->first, b->threads);
        count += f[i].value != 0;
    }
    b->at_barrier = 0;
    for (uint32_t i = 0; i < b->threads; i++) {
        f[i].value = count;
        let_go(&f[i]);
    }
}

/* ---- a grid ---- */

static void run_warp(emu_grid *g, emu_warp *w)
{
    /* Some way ahead of the others, as long as its lanes meet. */
    for (uint64_t rounds = 1 + emu_draw(g) % 8; rounds; rounds--) {
        uint32_t turn = (uint32_t)(emu_draw(g) % 32), ready = w->ready;
        ready = ready >> turn | (turn ? ready << (32 - turn) : 0);
        for (; ready; ready &= ready - 1) {
            emu_fiber *f = &g->fibers[w->first + ((uint32_t)__builtin_ctz(ready) + turn) % 32];
            emu_self = f;
            emu_here = &f->place;
            emu_switch(&g->scheduler, f->stack_pointer);
        }
        if (w->ready || !look_at_warp(g, w))
            return;
    }
}

static void run_block(emu_grid *g, emu_block *b)
{
    uint32_t warps = b->threads / 32, start = (uint32_t)(emu_draw(g) % warps);
    bool can = false;
    for (uint32_t i = 0; i < warps; i++) {
        emu_warp *w = &g->warps[b->first / 32 + (start + i) % warps];
        if (w->ready && emu_draw(g) % 4) /* some stay behind this time */
            run_warp(g, w);
        can = can || w->ready;
    }
    if (!can && b->done < b->threads)
        look_at_block(g, b);
    else if (can)
        look_at_named(g, b);
    emu_let_some_out(g, b);
}

/* Stacks of a warp: kept for later launches, since their pages are there. */
static pthread_mutex_t stacks_lock = PTHREAD_MUTEX_INITIALIZER;
static std::vector<char *> stacks_free;

static void take_stacks(emu_grid *g)
{
    pthread_mutex_lock(&stacks_lock);
    for (size_t i = 0; i < g->warps.size() && !stacks_free.empty(); i++) {
        g->stacks.push_back(stacks_free.back());
        stacks_free.pop_back();
    }
    pthread_mutex_unlock(&stacks_lock);
    while (g->stacks.size() < g->warps.size()) {
        void *memory =
            mmap(nullptr, 32 * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED)
            abort();
        g->stacks.push_back((char *)memory);
    }
}

static void give_stacks(const emu_grid *g)
{
    pthread_mutex_lock(&stacks_lock);
    stacks_free.insert(stacks_free.end(), g->stacks.begin(), g->stacks.end());
    pthread_mutex_unlock(&stacks_lock);
}

static uint64_t seed_of_next(void)
{
    static uint64_t launches;
    const char *seed = getenv("EPX_EMULATE_SEED");
    uint64_t s = (seed ? strtoull(seed, nullptr, 10) : 1) << 40;
    s = (s + __atomic_add_fetch(&launches, 1, __ATOMIC_RELAXED)) * 0x9e3779b97f4a7c15u;
    return s ^ s >> 29;
}

static void prepare(emu_grid *g, uint32_t index, uint32_t threads)
{
    emu_fiber *f = &g->fibers[index];
    uint32_t b = index / threads, t = index % threads;
    f->place = {{t, 0, 0}, {b, 0, 0}, {threads, 1, 1}, {(uint32_t)g->blocks.size(), 1, 1}};
    f->block = &g->blocks[b];
    f->warp = &g->warps[index / 32];
    void **top = (void **)(g->stacks[index / 32] + (size_t)(t % 32 + 1) * STACK_BYTES);
    *--top = nullptr;       /* where a caller's frame would be: keeps the stack aligned */
    *--top = (void *)enter; /* ret goes there */
    for (int i = 0; i < 6; i++)
        *--top = nullptr;
    f->stack_pointer = top;
}

/* To other ranks' grids, for which this one may wait: now and then by a short sleep. With yields alone Linux 6.18 has
 * starved other threads, its own kworkers among them ("workqueue lockup"), until those that yielded gave up. */
static void give_way(uint64_t pass)
{
    const timespec least = {0, 1};
    if (pass % 64)
        sched_yield();
    else
        nanosleep(&least, nullptr);
}

static void run_grid(uint32_t blocks, uint32_t threads, size_t shared_bytes, void (*run)(void *), void *context)
{
    emu_grid g = {};
    if (threads == 0 || threads > 1024 || threads % 32 || blocks == 0)
        abort();
    g.random = seed_of_next() | 1;
    g.run = run;
    g.context = context;
    g.living = blocks * threads;
    g.fibers.resize(g.living);
    g.warps.resize(g.living / 32);
    g.blocks.resize(blocks);
    take_stacks(&g);
    for (uint32_t i = 0; i < blocks; i++) {
        g.blocks[i].first = i * threads;
        g.blocks[i].threads = threads;
        g.blocks[i].dynamic = emu_poisoned(shared_bytes);
    }
    for (uint32_t i = 0; i < g.warps.size(); i++)
        g.warps[i] = {&g.blocks[i * 32 / threads], i * 32, 0xffffffffu, 0};
    for (uint32_t i = 0; i < g.fibers.size(); i++)
        prepare(&g, i, threads);
    emu_now = &g;
    for (uint64_t pass = 1; g.living; pass++) {
        uint32_t start = (uint32_t)(emu_draw(&g) % blocks);
        for (uint32_t i = 0; i < blocks; i++)
            run_block(&g, &g.blocks[(start + i) % blocks]);
        give_way(pass);
    }
    emu_now = nullptr;
    for (emu_block &b : g.blocks) {
        emu_drain_block(&b);
        free(b.dynamic);
        for (auto &v : b.variables)
            free(v.second);
    }
    give_stacks(&g);
}

/* ---- launches, and graphs: what was launched while this thread captured ---- */

namespace
{
struct launch {
    uint32_t blocks, threads;
    size_t shared;
    std::function<void()> run;
};
__thread std::vector<launch> *captured;

void call(void *context)
{
    (*(std::function<void()> *)context)();
}
} // namespace

void emu_start(uint32_t blocks, uint32_t threads, size_t shared, std::function<void()> run)
{
    if (captured)
        captured->push_back({blocks, threads, shared, run});
    else
        run_grid(blocks, threads, shared, call, &run);
}

extern "C" __attribute__((visibility("default"))) void *epx_emulate_plugin(int what, void *graph)
{
    switch (what) {
    case 0: /* begin */
        captured = new std::vector<launch>;
        return nullptr;
    case 1: { /* end */
        std::vector<launch> *all = captured;
        captured = nullptr;
        return all;
    }
    case 2: /* launch */
        for (launch &l : *(std::vector<launch> *)graph)
            run_grid(l.blocks, l.threads, l.shared, call, &l.run);
        return nullptr;
    default: /* capturing? */
        return captured;
    }
}
