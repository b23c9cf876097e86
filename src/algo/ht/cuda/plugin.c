/* The plug-in's entry: one table of everything. See src/device/plugin.h. */
#include "device/plugin.h"

#include <cuda_runtime_api.h>
#include <stdio.h>

#include "algo/exchange.h"
#include "algo/ll/ll.h"
#include "device/cuda/cuda_device.h"

extern const epx__exchange_ops_t epx__exchange_cuda;
extern const epx__ll_ops_t epx__ll_cuda;

static char name[64];

static epx_status_t usable(const char **why)
{
    const char *words;
    const epx__cuda_driver_t *driver = epx__cuda_driver(&words);
    if (why)
        *why = words;
    return driver ? EPX_OK : epx__fail(EPX_E_UNSUPPORTED, "%s", words);
}

static const epx__plugin_t table = {
    .abi = EPX__PLUGIN_ABI,
    .sizes = EPX__PLUGIN_SIZES,
    .name = name,
    .device = &epx__device_cuda,
    .exchange_ops = &epx__exchange_cuda,
    .ll_ops = &epx__ll_cuda,
    .usable = usable,
};

__attribute__((visibility("default"))) const epx__plugin_t *epx__cuda_plugin(const epx__plugin_host_t *host);

const epx__plugin_t *epx__cuda_plugin(const epx__plugin_host_t *host)
{
    if (!host || host->abi != EPX__PLUGIN_ABI)
        return NULL;
    epx__fail_mirror(host->detail_set);
    snprintf(name, sizeof name, "libepx_cuda.so, CUDA %d.%d", CUDART_VERSION / 1000, CUDART_VERSION / 10 % 100);
    return &table;
}
