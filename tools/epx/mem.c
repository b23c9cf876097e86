/* Chooses the table of device memory; opens the CUDA one, and the floor's stream of puts, only when asked for. */
#include "mem.h"

#include "stream.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static _Thread_local char words[512];

/* Beside the command: BIN/libepx_bench_cuda.so and BIN/../lib; else wherever the loader looks. */
static void *open_plugin(const char *name)
{
    static const char *const where[] = {"", "../lib/", "../lib/epx/"};
    char path[1024];
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 64);
    if (length > 0) {
        path[length] = '\0';
        char *slash = strrchr(path, '/');
        for (size_t i = 0; slash && i < sizeof where / sizeof *where; i++) {
            snprintf(slash + 1, sizeof path - (size_t)(slash + 1 - path), "%s%s", where[i], name);
            void *library = access(path, R_OK) == 0 ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
            if (library)
                return library;
        }
    }
    return dlopen(name, RTLD_NOW | RTLD_LOCAL);
}

const mem_ops_t *mem_ops_for(epx_backend_t backend, const char **why)
{
    if (backend != EPX_BACKEND_CUDA)
        return &mem_ops_cpu;
    void *library = open_plugin("libepx_bench_cuda.so");
    if (!library) {
        snprintf(words, sizeof words, "the command's CUDA part cannot be opened: %s", dlerror());
        *why = words;
        return NULL;
    }
    const mem_ops_t *(*entry)(void) = NULL;
    *(void **)&entry = dlsym(library, "epx_bench_mem");
    const mem_ops_t *ops = entry ? entry() : NULL;
    if (!ops || ops->abi != MEM_ABI) {
        *why = "libepx_bench_cuda.so is of another build than this command: rebuild both";
        return NULL;
    }
    return ops;
}

const stream_ops_t *stream_ops_open(const char **why)
{
    void *library = open_plugin("libepx_bench_ofi.so");
    if (!library) {
        snprintf(words, sizeof words, "the command's libfabric part cannot be opened: %s; --no-floor goes without",
                 dlerror());
        *why = words;
        return NULL;
    }
    const stream_ops_t *(*entry)(void) = NULL;
    *(void **)&entry = dlsym(library, "epx_bench_stream");
    const stream_ops_t *ops = entry ? entry() : NULL;
    if (!ops || ops->abi != STREAM_ABI) {
        *why = "libepx_bench_ofi.so is of another build than this command: rebuild both";
        return NULL;
    }
    return ops;
}
