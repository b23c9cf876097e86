/* A deleter for DLPack tensors whose memory belongs to an object of an interpreter. */
#include "api/objects.h"

/* DLPack's DLManagedTensor, as far as it matters here. */
typedef struct managed {
    void *tensor[6];
    const epx_owner_t *owner; /* manager_ctx */
} managed_t;

void epx_owner_drop(void *managed)
{
    /* A copy: with the object the memory of all this may go. */
    epx_owner_t owner = *((managed_t *)managed)->owner;
    if (owner.gone && *owner.gone)
        return;
    int state = owner.enter();
    owner.drop(owner.object);
    owner.leave(state);
}
