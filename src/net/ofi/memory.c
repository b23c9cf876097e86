/* Registration. A peer's key says where the memory begins in the provider's terms: an address, or 0. */
#include "net/ofi/ofi.h"

#include <string.h>

epx_status_t epx__ofi_enroll(epx__net_t *net, void *base, size_t bytes, bool device, epx__net_memory_t **memory,
                             epx__net_key_t *key)
{
    ofi_t *self = (ofi_t *)net;
    uint64_t access = FI_WRITE | FI_REMOTE_WRITE;
    int mode = self->info->domain_attr->mr_mode;
    if (device)
        return epx__ofi_host->fail(EPX_E_UNSUPPORTED,
                                   "provider %s is not asked for GPU memory: stage it in pinned memory",
                                   self->info->fabric_attr->prov_name);
    if (!base || bytes == 0)
        return epx__ofi_host->fail(EPX_E_INVALID, "enroll: no memory given");
    epx__net_memory_t *made = epx__ofi_host->calloc(1, sizeof *made);
    if (!made)
        return epx__ofi_host->fail(EPX_E_NOMEM, "enroll: no memory");
    long e = fi_mr_reg(self->domain, base, bytes, access, 0, ++self->next_key, 0, &made->mr, NULL);
    if (e == 0 && (mode & FI_MR_ENDPOINT)) {
        e = fi_mr_bind(made->mr, &self->ep->fid, 0);
        e = e ? e : fi_mr_enable(made->mr);
    }
    if (e) {
        epx__ofi_withdraw(net, made);
        return epx__ofi_fail(e, "fi_mr_reg");
    }
    made->base = base;
    made->bytes = bytes;
    made->desc = fi_mr_desc(made->mr);
    *memory = made;
    *key = (epx__net_key_t){(mode & FI_MR_VIRT_ADDR) ? (uint64_t)(uintptr_t)base : 0, fi_mr_key(made->mr), bytes};
    return EPX_OK;
}

void epx__ofi_withdraw(epx__net_t *net, epx__net_memory_t *memory)
{
    (void)net;
    if (!memory)
        return;
    if (memory->mr)
        fi_close(&memory->mr->fid);
    epx__ofi_host->free(memory);
}
