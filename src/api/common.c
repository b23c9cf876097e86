/* Small things of the public API: version, names, environment table, config structs. */
#include <string.h>

#include "api/objects.h"
#include "base/env.h"
#include "base/fail.h"
#include "device/plugin.h"

uint32_t epx_version(void)
{
    return EPX_VERSION_MAJOR << 16 | EPX_VERSION_MINOR << 8 | EPX_VERSION_PATCH;
}

const char *epx_status_name(epx_status_t status)
{
    return epx__status_name(status);
}

const char *epx_status_text(epx_status_t status)
{
    return epx__status_text(status);
}

const char *epx_error_detail(void)
{
    return epx__detail();
}

epx_status_t epx_unique_id_create(const char *address, epx_unique_id_t *id)
{
    if (!id)
        return epx__fail(EPX_E_INVALID, "epx_unique_id_create: id is NULL; it must point to an epx_unique_id_t");
    return epx__unique_id_create(address, id);
}

epx_status_t epx__config_copy(void *to, size_t to_bytes, const void *from, const char *what)
{
    size_t size;
    if (!from)
        return epx__fail(EPX_E_INVALID, "%s is NULL", what);
    memcpy(&size, from, sizeof size);
    if (size < sizeof size || size > 4096)
        return epx__fail(EPX_E_INVALID, "%s: size is %zu; set it to sizeof the struct (%zu in this build)", what, size,
                         to_bytes);
    /* A longer struct of a newer header is fine as long as what this build does not know is zero. */
    for (size_t i = to_bytes; i < size; i++)
        if (((const unsigned char *)from)[i])
            return epx__fail(EPX_E_INVALID, "%s has a field set at byte %zu that this build (%zu bytes) does not know",
                             what, i, to_bytes);
    memset(to, 0, to_bytes);
    memcpy(to, from, size < to_bytes ? size : to_bytes);
    return EPX_OK;
}

epx_status_t epx_env_get(uint32_t index, epx_env_entry_t *entry)
{
    if (!entry || entry->size != sizeof *entry)
        return epx__fail(EPX_E_INVALID, "epx_env_get: entry must not be NULL and entry->size must be %zu",
                         sizeof *entry);
    if (index >= EPX__ENV_COUNT)
        return epx__fail(EPX_E_INVALID, "epx_env_get: there are %d variables; %u is past the last", EPX__ENV_COUNT,
                         index);
    const epx__env_info_t *info = epx__env_info((epx__env_t)index);
    entry->name = info->name;
    entry->default_text = info->default_text;
    entry->meaning = info->meaning;
    entry->value = epx__env_value((epx__env_t)index);
    return EPX_OK;
}

epx_status_t epx_backend_usable(epx_backend_t backend, const char **why)
{
    const char *reason = "the CPU is always there";
    epx_status_t status = EPX_OK;
    if (backend == EPX_BACKEND_CUDA) {
        const epx__plugin_t *plugin;
        status = epx__plugin_cuda(&plugin, &reason);
    } else if (backend != EPX_BACKEND_CPU && backend != EPX_BACKEND_AUTO) {
        return epx__fail(EPX_E_INVALID, "epx_backend_usable: %d is no backend; EPX_BACKEND_CPU or EPX_BACKEND_CUDA",
                         backend);
    }
    if (why)
        *why = reason;
    return status;
}
