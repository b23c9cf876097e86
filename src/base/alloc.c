/* The heap, counted, with allocations that fail on request. */
#include "base/alloc.h"

#include <stdlib.h>
#include <string.h>

static uint64_t made;      /* allocations asked for, ever */
static int64_t live;       /* handed out and not yet freed */
static uint64_t fail_from; /* the number in `made` that fails; 0 is none */
static int fail_sticky;

void epx__alloc_fail_at(uint64_t n, int sticky)
{
    uint64_t at = n ? __atomic_load_n(&made, __ATOMIC_RELAXED) + n : 0;
    __atomic_store_n(&fail_sticky, sticky, __ATOMIC_RELAXED);
    __atomic_store_n(&fail_from, at, __ATOMIC_RELAXED);
}

int epx__alloc_fault(void)
{
    uint64_t number = __atomic_add_fetch(&made, 1, __ATOMIC_RELAXED);
    uint64_t from = __atomic_load_n(&fail_from, __ATOMIC_RELAXED);
    if (!from || number < from)
        return 0;
    return number == from || __atomic_load_n(&fail_sticky, __ATOMIC_RELAXED);
}

void *epx__calloc(size_t count, size_t size)
{
    if (epx__alloc_fault() || (size && count > SIZE_MAX / size))
        return NULL;
    /* Never a zero-byte request: NULL means failure only. */
    void *memory = count && size ? calloc(count, size) : calloc(1, 1);
    if (memory)
        __atomic_add_fetch(&live, 1, __ATOMIC_RELAXED);
    return memory;
}

void epx__free(void *memory)
{
    if (!memory)
        return;
    __atomic_sub_fetch(&live, 1, __ATOMIC_RELAXED);
    free(memory);
}

char *epx__strdup(const char *text)
{
    size_t bytes = strlen(text) + 1;
    char *copy = epx__calloc(bytes, 1);
    if (copy)
        memcpy(copy, text, bytes);
    return copy;
}

int64_t epx__alloc_live(void)
{
    return __atomic_load_n(&live, __ATOMIC_RELAXED);
}

uint64_t epx__alloc_count(void)
{
    return __atomic_load_n(&made, __ATOMIC_RELAXED);
}
