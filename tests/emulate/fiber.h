/* The emulator's inside: fibers by warp and block, and the memory of a block. See emulate.h. */
#ifndef EPX_TEST_EMULATE_FIBER_H
#define EPX_TEST_EMULATE_FIBER_H

#include <utility>
#include <vector>

#include "emulate.h"

struct emu_copy { /* of the bulk copy engine */
    void *to;
    const void *from;
    uint32_t bytes;
    uint64_t *bar;
    std::vector<char> kept; /* of a store: what it was found to hold, from when its source may change */
};

struct emu_late { /* a store that is on its way */
    void *to;
    uint32_t bytes;
    alignas(16) char value[16];
};

struct emu_block;
struct emu_warp {
    emu_block *block;
    uint32_t first, ready, done; /* first: its fibers from there; bits of lanes */
};

struct emu_fiber {
    emu_place place;
    void *stack_pointer;
    emu_block *block;
    emu_warp *warp;
    emu_op op; /* what it waits for; EMU_NONE: it can run */
    uint32_t lane;
    uint64_t value;
    const char *file;
    int line;
    std::vector<std::vector<emu_copy>> stores; /* of the bulk copy engine, by group; the last one is open */
};

struct emu_block {
    uint32_t first, threads, done, at_barrier;
    uint32_t at_named[16], wanted[16]; /* barriers of a part of the block */
    std::vector<emu_late> late;
    uint64_t late_lines; /* a filter: bits of the 16-byte words that late ones go to */
    std::vector<emu_copy> loads;
    std::vector<std::pair<const void *, char *>> variables; /* in shared memory */
    char *dynamic;
};

struct emu_grid {
    std::vector<emu_fiber> fibers;
    std::vector<emu_warp> warps;
    std::vector<emu_block> blocks;
    std::vector<char *> stacks; /* a warp's */
    void (*run)(void *);
    void *context;
    void *scheduler; /* its stack pointer */
    uint32_t living;
    uint64_t random;
};

extern __thread emu_grid *emu_now; /* the grid that runs in this OS thread */
extern __thread emu_fiber *emu_self;

uint64_t emu_draw(emu_grid *g);
/* memory.cc */
void emu_drain_block(emu_block *b);
void emu_let_some_out(emu_grid *g, emu_block *b);
char *emu_poisoned(size_t bytes); /* what shared memory is before it is written */

#endif
