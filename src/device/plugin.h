/*
 * The seam between libepx.so and the CUDA plug-in libepx_cuda.so: one symbol, a function that returns a table.
 *
 *     const epx__plugin_t *epx__cuda_plugin(const epx__plugin_host_t *host);
 *
 * The plug-in carries its own copy of the internal objects it uses, since libepx.so hides its own. What exists once a
 * process it takes from `host`: the words of the last failure (give host->detail_set to epx__fail_mirror) and the
 * process's number. Both sides check `abi` before anything else, libepx.so the sizes too.
 */
#ifndef EPX_DEVICE_PLUGIN_H
#define EPX_DEVICE_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#include "base/fail.h"
#include "device/device.h"

/* Grows with any change of a struct or function that crosses the seam. */
#define EPX__PLUGIN_ABI 4u

typedef struct epx__plugin_sizes {
    size_t export_bytes;   /* sizeof(epx__export_t) */
    size_t window_bytes;   /* sizeof(epx__window_t) */
    size_t ops_bytes;      /* sizeof(epx__device_ops_t) */
    size_t dispatch_bytes; /* sizeof(epx_dispatch_t) */
    size_t combine_bytes;  /* sizeof(epx_combine_t) */
} epx__plugin_sizes_t;

#define EPX__PLUGIN_SIZES                                                                                              \
    {                                                                                                                  \
        sizeof(epx__export_t), sizeof(epx__window_t), sizeof(epx__device_ops_t), sizeof(epx_dispatch_t),               \
            sizeof(epx_combine_t)                                                                                      \
    }

typedef struct epx__plugin {
    uint32_t abi; /* EPX__PLUGIN_ABI; first, for life */
    epx__plugin_sizes_t sizes;
    const char *name; /* "libepx_cuda.so, CUDA 12.4", for epx info */
    const epx__device_ops_t *device;
    const void *exchange_ops;                 /* epx__exchange_ops_t of algo/exchange.h, the HT exchange */
    const void *ll_ops;                       /* the LL exchange's, or NULL */
    epx_status_t (*usable)(const char **why); /* is there a GPU and a driver? `why` is static memory */
} epx__plugin_t;

/* What the plug-in takes from libepx.so. Lives as long as the process. */
typedef struct epx__plugin_host {
    uint32_t abi; /* first, for life */
    void (*detail_set)(const char *words);
    uint64_t (*process_id)(void);
} epx__plugin_host_t;

/* The plug-in's only symbol. NULL when host->abi is another than its own. */
typedef const epx__plugin_t *(*epx__plugin_fn)(const epx__plugin_host_t *host);

#define EPX__CUDA_PLUGIN_SYMBOL "epx__cuda_plugin"
#define EPX__CUDA_PLUGIN_FILE "libepx_cuda.so"

/*
 * The CUDA plug-in, opened at the first call and kept for the process's life (a driver does not like to be unloaded).
 * Thread-safe; every later call gives the same answer.
 *
 * why       one line either way, static memory; NULL is fine.
 * Returns   EPX_OK: there, and usable; *plugin is set. EPX_E_UNSUPPORTED in words: absent, of another build, or no GPU
 *           or driver that it can use (the plug-in's own status may differ).
 */
epx_status_t epx__plugin_cuda(const epx__plugin_t **plugin, const char **why);

#endif
