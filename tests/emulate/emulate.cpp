/* Fibers, barriers and collectives. See emulate.h. EPX_EMULATE_SEED: turns in random order. */
#include "emulate.h"

#include <map>
#include <sched.h>
#include <string>
#include <sys/mman.h>
#include <vector>

#define STACK_BYTES (96u << 10)

extern "C" void emu_switch(void **from, void *to);
asm(".text\n.globl emu_switch\n.type emu_switch,@function\nemu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size emu_switch,.-emu_switch\n");

namespace {
struct gate { /* a barrier of some fibers */
    uint32_t live = 0, arrived = 0, count = 0, result = 0;
    uint64_t generation = 0;
    const char *file = nullptr;
    int line = 0;
};
struct warp {
    gate g;
    emu_warp_view in, out;
};
struct copy {
    void *to;
    const void *from;
    uint32_t bytes;
    uint64_t *bar;
};
struct block {
    gate g;
    std::vector<copy> loads;
    std::map<std::pair<std::string, int>, std::vector<uint64_t>> variables;
    std::vector<char> dynamic;
};
struct fiber {
    void *stack_pointer = nullptr;
    emu_place place;
    block *b;
    warp *w;
    const gate *waits = nullptr; /* skipped while its generation is this */
    uint64_t waits_for = 0;
    uint32_t looks = 0;
    bool done = false;
    std::vector<std::vector<copy>> stores; /* by group; the last one is open */
};
struct grid {
    void (*run)(void *);
    void *context;
    std::vector<fiber> fibers;
    std::vector<warp> warps;
    std::vector<block> blocks;
    uint32_t living;
};
thread_local grid *now;
thread_local fiber *self;
thread_local void *scheduler;
thread_local std::vector<char *> stacks;

/* 0 without EPX_EMULATE_SEED: all turns alike. */
uint32_t random_bits()
{
    static const char *const seed = getenv("EPX_EMULATE_SEED");
    static thread_local uint64_t state = seed ? strtoull(seed, nullptr, 10) * 0x9e3779b97f4a7c15u + (uintptr_t)&state : 0;
    if (!seed)
        return 0;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 20);
}

void leave_gate(gate &g)
{
    g.live--;
    if (g.arrived && g.arrived == g.live) {
        g.arrived = 0;
        g.result = g.count;
        g.count = 0;
        g.generation++;
    }
}

void open_warp(warp &w)
{
    w.out = w.in;
    memset(&w.in, 0, sizeof w.in);
}

void enter()
{
    fiber *f = self;
    now->run(now->context);
    emu_bulk_commit();
    emu_bulk_wait(0);
    f->done = true;
    if (f->w->g.arrived && f->w->g.arrived == f->w->g.live - 1)
        open_warp(*f->w);
    leave_gate(f->w->g);
    leave_gate(f->b->g);
    now->living--;
    emu_switch(&f->stack_pointer, scheduler);
    abort();
}

void wait(gate &g, uint64_t generation)
{
    self->waits = &g;
    self->waits_for = generation;
    while (g.generation == generation)
        emu_yield();
    self->waits = nullptr;
}

/* All at one place? */
void arrive(gate &g, const char *file, int line)
{
    if (g.arrived == 0) {
        g.file = file;
        g.line = line;
    } else if (g.line != line || strcmp(g.file, file)) {
        fprintf(stderr, "emulation: threads wait at %s:%d and at %s:%d\n", g.file, g.line, file, line);
        emu_die("a barrier that not all threads reach", file, line);
    }
    g.arrived++;
}
} // namespace

thread_local const emu_place *emu_here;

void emu_die(const char *what, const char *file, int line)
{
    fprintf(stderr, "emulation: %s:%d: %s (block %u, thread %u)\n", file, line, what, emu_here->block.x,
            emu_here->thread.x);
    abort();
}

void emu_yield(void)
{
    emu_switch(&self->stack_pointer, scheduler);
}
void emu_look(void)
{
    if (++self->looks % 4 == 0)
        emu_yield();
}

uint32_t emu_block(uint32_t value, const char *file, int line)
{
    gate &g = self->b->g;
    uint64_t generation = g.generation;
    arrive(g, file, line);
    g.count += value;
    if (g.arrived == g.live) {
        g.arrived = 0;
        g.result = g.count;
        g.count = 0;
        g.generation++;
    } else {
        wait(g, generation);
    }
    return g.result;
}

const emu_warp_view *emu_warp(uint64_t value, const char *file, int line)
{
    warp &w = *self->w;
    uint64_t generation = w.g.generation;
    uint32_t lane = self->place.thread.x % 32;
    arrive(w.g, file, line);
    w.in.live |= 1u << lane;
    w.in.value[lane] = value;
    if (w.g.arrived == w.g.live) {
        open_warp(w);
        w.g.arrived = 0;
        w.g.generation++;
    } else {
        wait(w.g, generation);
    }
    return &w.out;
}

uint32_t emu_ballot(bool value, const char *file, int line)
{
    const emu_warp_view *view = emu_warp(value, file, line);
    uint32_t bits = 0;
    for (uint32_t i = 0; i < 32; i++)
        bits |= (view->live >> i & 1) && view->value[i] ? 1u << i : 0;
    return bits;
}

void *emu_shared(const char *file, int line, size_t bytes)
{
    std::vector<uint64_t> &v = self->b->variables[{file, line}];
    if (v.empty())
        v.resize((bytes + 7) / 8 + 1);
    return v.data();
}
char *emu_dynamic(void)
{
    return (char *)(((uintptr_t)self->b->dynamic.data() + 127) & ~(uintptr_t)127);
}

static void prepare(grid &g, uint32_t index, uint32_t threads)
{
    fiber &f = g.fibers[index];
    uint32_t b = index / threads, t = index % threads, warps = (threads + 31) / 32;
    f.place = {{t, 0, 0}, {b, 0, 0}, {threads, 1, 1}, {(uint32_t)g.blocks.size(), 1, 1}};
    f.b = &g.blocks[b];
    f.w = &g.warps[b * warps + t / 32];
    f.b->g.live++;
    f.w->g.live++;
    if (index >= stacks.size())
        stacks.push_back((char *)mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    void **top = (void **)(stacks[index] + STACK_BYTES);
    *--top = nullptr;         /* where a caller's frame would be: keeps the stack aligned */
    *--top = (void *)enter;   /* ret goes there */
    for (int i = 0; i < 6; i++)
        *--top = nullptr;
    f.stack_pointer = top;
}

void emu_grid(uint32_t blocks, uint32_t threads, size_t shared_bytes, void (*run)(void *), void *context)
{
    grid g;
    g.run = run;
    g.context = context;
    g.blocks.resize(blocks);
    g.warps.resize(blocks * ((threads + 31) / 32));
    g.fibers.resize(blocks * threads);
    g.living = blocks * threads;
    for (block &b : g.blocks)
        b.dynamic.resize(shared_bytes + 128);
    for (warp &w : g.warps)
        memset(&w.in, 0, sizeof w.in);
    for (uint32_t i = 0; i < g.fibers.size(); i++)
        prepare(g, i, threads);
    now = &g;
    while (g.living) {
        uint32_t skipped = random_bits();
        for (uint32_t i = 0; i < g.fibers.size(); i++) {
            fiber &f = g.fibers[i];
            if (i % 32 == 0) /* with a seed, every other warp or so stays behind this time */
                skipped = random_bits();
            if (f.done || (f.waits && f.waits->generation == f.waits_for) || (skipped & 1))
                continue;
            self = &f;
            emu_here = &f.place;
            emu_switch(&scheduler, f.stack_pointer);
        }
        sched_yield();
    }
    now = nullptr;
}

/* ---- the bulk copy engine ---- */

static void aligned(const void *global, const void *shared, uint32_t bytes)
{
    if (((uintptr_t)global | (uintptr_t)shared | bytes) % 16 || bytes == 0)
        emu_die("a bulk copy that is not of whole, aligned 16 bytes", __FILE__, __LINE__);
}

static void settle(uint64_t *bar)
{
    if ((*bar & 2) && *bar >> 32 == 0)
        *bar = (*bar & 1) ^ 1;
}

void emu_expect(uint64_t *bar, uint32_t bytes)
{
    if (*bar & 2)
        emu_die("a stage is filled again before it was waited for", __FILE__, __LINE__);
    *bar += 2 + ((uint64_t)bytes << 32);
    settle(bar);
}

bool emu_try_wait(uint64_t *bar, uint32_t parity)
{
    std::vector<copy> &loads = self->b->loads;
    for (size_t i = 0; i < loads.size();) {
        if (loads[i].bar != bar) {
            i++;
            continue;
        }
        memcpy(loads[i].to, loads[i].from, loads[i].bytes);
        *bar -= (uint64_t)loads[i].bytes << 32;
        loads[i] = loads.back();
        loads.pop_back();
        settle(bar);
    }
    bool over = (*bar & 1) != parity;
    if (!over)
        emu_yield();
    return over;
}

void emu_bulk_load(void *shared, const void *global, uint32_t bytes, uint64_t *bar)
{
    aligned(global, shared, bytes);
    self->b->loads.push_back({shared, global, bytes, bar});
}

void emu_bulk_store(void *global, const void *shared, uint32_t bytes)
{
    aligned(global, shared, bytes);
    if (self->stores.empty())
        self->stores.emplace_back();
    self->stores.back().push_back({global, shared, bytes, nullptr});
}

void emu_bulk_commit(void)
{
    if (self->stores.empty())
        self->stores.emplace_back();
    self->stores.emplace_back();
}

void emu_bulk_wait(size_t groups_left)
{
    std::vector<std::vector<copy>> &s = self->stores;
    while (s.size() > groups_left + 1) { /* behind the closed ones is the open one */
        for (const copy &c : s.front())
            memcpy(c.to, c.from, c.bytes);
        s.erase(s.begin());
    }
}

/* ---- graphs: what was launched while this thread captured ---- */

namespace {
struct launch {
    uint32_t blocks, threads;
    size_t shared;
    std::function<void()> run;
};
thread_local std::vector<launch> *captured;

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
        emu_grid(blocks, threads, shared, call, &run);
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
            emu_grid(l.blocks, l.threads, l.shared, call, &l.run);
        return nullptr;
    default: /* capturing? */
        return captured;
    }
}
