/* The switch behind EPX__MUTATE. Empty but in test builds. */
#include "base/mutate.h"

#ifdef EPX_MUTATIONS
#include <stdlib.h>
#include <string.h>

int epx__mutation_is(const char *name)
{
    static const char *chosen; /* read once; "" is none. Several threads may read it at once: they store the same */
    const char *now = __atomic_load_n(&chosen, __ATOMIC_ACQUIRE);
    if (!now) {
        now = getenv("EPX_MUTATION");
        if (!now)
            now = "";
        __atomic_store_n(&chosen, now, __ATOMIC_RELEASE);
    }
    return *now && strcmp(now, name) == 0;
}
#else
typedef int epx__mutate_empty; /* ISO C wants a declaration */
#endif
