/* Instead of tests/gpu/memory_cuda.h: host memory for an emulated GPU, and graphs. */
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/world.h"
#include "device/plugin.h"

/* The plug-in is opened by the library; its graphs are found through it. */
__attribute__((unused)) static void *emu_graph(int what, void *graph)
{
    static void *(*_Atomic found)(int, void *); /* ranks are threads: whoever looks first, all find the same */
    void *(*call)(int, void *) = atomic_load(&found);
    if (!call) {
        const epx__plugin_t *plugin;
        Dl_info where;
        if (epx__plugin_cuda(&plugin, NULL) != EPX_OK || !dladdr((const void *)plugin, &where))
            exit(4);
        void *object = dlopen(where.dli_fname, RTLD_NOW | RTLD_NOLOAD);
        *(void **)&call = object ? dlsym(object, "epx_emulate_plugin") : NULL;
        if (!call)
            exit(4);
        atomic_store(&found, call);
    }
    return call(what, graph);
}

#define GPU_EMULATED 1 /* kernels run in the thread that launches them */

typedef void *cudaGraph_t, *cudaGraphExec_t;
#define GPU_CHECK(call) ((void)(call))
#define cudaStreamCreateWithFlags(stream, flags) (*(stream) = NULL)
#define cudaStreamDestroy(stream) ((void)(stream))
#define cudaStreamBeginCapture(stream, mode) ((void)(stream), emu_graph(0, NULL))
#define cudaStreamEndCapture(stream, graph) ((void)(stream), *(graph) = emu_graph(1, NULL))
#define cudaGraphInstantiate(exec, graph, flags) (*(exec) = (graph))
#define cudaGraphDestroy(graph) 0
#define cudaGraphUpload(exec, stream) 0
#define cudaGraphLaunch(exec, stream) emu_graph(2, exec)

static void *emu_alloc(size_t bytes)
{
    void *memory = NULL;
    return posix_memalign(&memory, 256, bytes ? bytes : 1) == 0 ? memory : NULL;
}
static void emu_copy(void *to, const void *from, size_t bytes)
{
    if (bytes)
        memcpy(to, from, bytes);
}
static void emu_fill(void *to, int byte, size_t bytes)
{
    memset(to, byte, bytes);
}
static epx_stream_t emu_stream(void)
{
    return NULL;
}
const xt_memory_t xt_memory_cuda = {.backend = EPX_BACKEND_CUDA,
                                    .alloc = emu_alloc,
                                    .free = free,
                                    .put = emu_copy,
                                    .get = emu_copy,
                                    .fill = emu_fill,
                                    .stream = emu_stream};
__attribute__((constructor)) static void emu_choose(void)
{
    setenv("EPX_TEST_BACKEND", "cuda", 1);
}
