/* "Device memory" of the CPU backend: the process's own. */
#include "floor.h"
#include "progress.h"

#include <stdlib.h>
#include <string.h>

static _Thread_local const char *last_words = "";

typedef struct cpu {
    uint64_t began_ns;
} cpu_t;

static int cpu_open(int device, void **context)
{
    (void)device;
    *context = calloc(1, sizeof(cpu_t));
    last_words = *context ? "" : "no memory";
    return !*context;
}

static void cpu_close(void *context)
{
    free(context);
}

static const char *cpu_words(void)
{
    return last_words;
}

static void *cpu_alloc(void *context, size_t bytes)
{
    (void)context;
    size_t whole = (bytes + 255) / 256 * 256;
    void *memory = aligned_alloc(256, whole ? whole : 256);
    if (memory)
        memset(memory, 0, whole);
    else
        last_words = "no memory";
    return memory;
}

static void cpu_free(void *context, void *memory)
{
    (void)context;
    free(memory);
}

static int cpu_copy(void *context, void *to, const void *from, size_t bytes)
{
    (void)context;
    if (bytes)
        memcpy(to, from, bytes);
    return 0;
}

static int cpu_fill(void *context, void *memory, int byte, size_t bytes)
{
    (void)context;
    if (bytes)
        memset(memory, byte, bytes);
    return 0;
}

static epx_stream_t cpu_stream(void *context)
{
    (void)context;
    return NULL;
}

static int cpu_nothing(void *context)
{
    (void)context;
    return 0;
}

static int cpu_time_start(void *context)
{
    ((cpu_t *)context)->began_ns = now_ns();
    return 0;
}

static int cpu_time_stop(void *context, double *us)
{
    *us = (double)(now_ns() - ((cpu_t *)context)->began_ns) * 1e-3;
    return 0;
}

static int no_graphs(void)
{
    last_words = "a CPU has no CUDA graphs";
    return 1;
}

static int cpu_graph_begin(void *context)
{
    (void)context;
    return no_graphs();
}

static int cpu_graph_end(void *context, void **graph)
{
    (void)context;
    (void)graph;
    return no_graphs();
}

static int cpu_graph_launch(void *context, void *graph)
{
    (void)context;
    (void)graph;
    return no_graphs();
}

static void cpu_graph_free(void *context, void *graph)
{
    (void)context;
    (void)graph;
}

static int cpu_floor_open(void *context, const floor_plan_t *plan, void **floor)
{
    (void)context;
    const char *error = floor_cpu_open(plan, floor);
    last_words = error ? error : "";
    return error != NULL;
}

const mem_ops_t mem_ops_cpu = {
    .abi = MEM_ABI,
    .name = "cpu",
    .open = cpu_open,
    .close = cpu_close,
    .words = cpu_words,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .copy_in = cpu_copy,
    .copy_out = cpu_copy,
    .fill = cpu_fill,
    .stream = cpu_stream,
    .sync = cpu_nothing,
    .time_start = cpu_time_start,
    .time_stop = cpu_time_stop,
    .chill = cpu_nothing,
    .graph_begin = cpu_graph_begin,
    .graph_end = cpu_graph_end,
    .graph_launch = cpu_graph_launch,
    .graph_free = cpu_graph_free,
    .floor_open = cpu_floor_open,
    .floor_variants = floor_cpu_variants,
    .floor_variant_name = floor_cpu_variant_name,
    .floor_run = floor_cpu_run,
    .floor_close = floor_cpu_close,
};
