/*
 * Opens libepx_cuda.so: beside the library (or program) that holds this code, in ../lib from there, then by the
 * system's own search. Once a process; the answer, words included, is kept.
 */
#include "device/plugin.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const epx__plugin_host_t host = {
    .abi = EPX__PLUGIN_ABI,
    .detail_set = epx__detail_set,
    .process_id = epx__process_id,
};

/* Written by look() alone, under pthread_once. */
static struct {
    epx_status_t status;
    const epx__plugin_t *plugin;
    char why[EPX__DETAIL_BYTES];
} found;

/* A file that is there but cannot be opened ends the search: its words are the ones to hear. */
static void *open_somewhere(char *words, size_t room)
{
    static const char *const places[] = {EPX__CUDA_PLUGIN_FILE, "../lib/" EPX__CUDA_PLUGIN_FILE};
    Dl_info self;
    const char *file = dladdr((const void *)&host, &self) && self.dli_fname ? self.dli_fname : "";
    const char *slash = strrchr(file, '/');
    int folder = slash ? (int)(slash - file) + 1 : 0;
    void *object = NULL;
    bool there = false;
    for (size_t i = 0; i < sizeof places / sizeof *places && folder && !there; i++) {
        char path[1024];
        int bytes = snprintf(path, sizeof path, "%.*s%s", folder, file, places[i]);
        there = bytes > 0 && (size_t)bytes < sizeof path && access(path, F_OK) == 0;
        if (there)
            object = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    }
    if (!there)
        object = dlopen(EPX__CUDA_PLUGIN_FILE, RTLD_NOW | RTLD_LOCAL);
    const char *error = object ? NULL : dlerror();
    snprintf(words, room, "%s", error ? error : "no reason given");
    return object;
}

static bool same_build(const epx__plugin_t *plugin)
{
    static const epx__plugin_sizes_t ours = EPX__PLUGIN_SIZES;
    return plugin && plugin->abi == EPX__PLUGIN_ABI && memcmp(&plugin->sizes, &ours, sizeof ours) == 0 &&
           plugin->device && plugin->exchange_ops && plugin->usable;
}

static epx_status_t open_plugin(const epx__plugin_t **plugin)
{
    char words[512];
    void *object = open_somewhere(words, sizeof words);
    if (!object)
        return epx__fail(EPX_E_UNSUPPORTED,
                         "the CUDA plug-in cannot be opened (%s); build with the CUDA toolkit (EPX_WITH_CUDA=ON) and "
                         "keep it beside libepx.so",
                         words);
    void *symbol = dlsym(object, EPX__CUDA_PLUGIN_SYMBOL);
    epx__plugin_fn entry;
    memcpy(&entry, &symbol, sizeof entry);
    const epx__plugin_t *table = entry ? entry(&host) : NULL;
    if (!same_build(table)) {
        dlclose(object);
        return epx__fail(EPX_E_UNSUPPORTED,
                         EPX__CUDA_PLUGIN_FILE " is of another build than libepx.so (%s); install "
                                               "both together",
                         !entry ? "it has no " EPX__CUDA_PLUGIN_SYMBOL : "its tables differ");
    }
    *plugin = table;
    return EPX_OK;
}

static void look(void)
{
    const char *why = NULL;
    found.status = open_plugin(&found.plugin);
    if (found.status == EPX_OK)
        found.status = found.plugin->usable(&why);
    else
        why = epx__detail();
    snprintf(found.why, sizeof found.why, "%s", why ? why : "no reason given");
}

epx_status_t epx__plugin_cuda(const epx__plugin_t **plugin, const char **why)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, look);
    if (why)
        *why = found.why;
    if (found.status != EPX_OK)
        return epx__fail(found.status, "%s", found.why);
    *plugin = found.plugin;
    return EPX_OK;
}
