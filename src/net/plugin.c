/*
 * Opens libepx_ofi.so: beside the library (or program) that holds this code, in ../lib from there, then by the
 * system's own search. Once a process; never closed, since libfabric keeps threads and handlers of its own.
 */
#include "net/net.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "base/alloc.h"
#include "base/clock.h"
#include "base/fail.h"
#include "base/log.h"

static const epx__net_host_t host = {
    .abi = EPX__NET_ABI,
    .fail = epx__fail,
    .log = epx__log,
    .calloc = epx__calloc,
    .free = epx__free,
    .put_check = epx__net_put_check,
    .now_ns = epx__now_ns,
    .nic_look = epx__nic_look,
    .nic_here = epx__nic_here,
    .nic_choose = epx__nic_choose,
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const epx__net_ops_t *opened;

static void *open_beside(char *tried, size_t tried_bytes)
{
    static const char *const places[] = {"libepx_ofi.so", "../lib/libepx_ofi.so"};
    Dl_info self;
    char path[1024];
    if (!dladdr((const void *)&host, &self) || !self.dli_fname)
        return NULL;
    const char *slash = strrchr(self.dli_fname, '/');
    int folder = slash ? (int)(slash - self.dli_fname) + 1 : 0;
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        if (snprintf(path, sizeof path, "%s%.*s%s", folder ? "" : "./", folder, self.dli_fname, places[i]) >=
            (int)sizeof path)
            continue;
        void *object = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (object)
            return object;
        const char *words = dlerror();
        snprintf(tried, tried_bytes, "%.500s", words ? words : "no reason given");
    }
    return NULL;
}

static epx_status_t open_once(void)
{
    char tried[512] = "";
    void *object = open_beside(tried, sizeof tried);
    if (!object)
        object = dlopen("libepx_ofi.so", RTLD_NOW | RTLD_LOCAL);
    if (!object)
        return epx__fail(EPX_E_UNSUPPORTED,
                         "the network plug-in libepx_ofi.so cannot be opened (%s); build with libfabric "
                         "(EPX_WITH_OFI=ON), or use EPX_NET=loop for ranks of one process",
                         tried);
    void *symbol = dlsym(object, "epx_ofi_plugin");
    epx__net_plugin_fn entry;
    memcpy(&entry, &symbol, sizeof entry);
    const epx__net_ops_t *ops = entry ? entry(&host) : NULL;
    if (!ops) {
        dlclose(object);
        return epx__fail(EPX_E_MISMATCH, "libepx_ofi.so is of another build than libepx.so; install both together");
    }
    opened = ops;
    return EPX_OK;
}

epx_status_t epx__net_plugin_ofi(const epx__net_ops_t **ops)
{
    pthread_mutex_lock(&lock);
    epx_status_t status = opened ? EPX_OK : open_once();
    if (status == EPX_OK)
        *ops = opened;
    pthread_mutex_unlock(&lock);
    return status;
}
