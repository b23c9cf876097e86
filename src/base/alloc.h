/*
 * All heap memory of the library comes through here, so that tests can make any allocation fail and can
 * count what is left over.
 */
#ifndef EPX_BASE_ALLOC_H
#define EPX_BASE_ALLOC_H

#include <stddef.h>
#include <stdint.h>

void *epx__calloc(size_t count, size_t size); /* zeroed; NULL when out of memory or count * size overflows */
void epx__free(void *memory);
char *epx__strdup(const char *text);

/* For tests: the n-th allocation from now on (1 is the next) fails, and every later one too when `sticky`; 0 turns it
 * off. System resources (mmap, socket, thread) count too: their callers ask epx__alloc_fault() first. */
void epx__alloc_fail_at(uint64_t n, int sticky);
int epx__alloc_fault(void); /* 1 when this allocation is to fail */
int64_t epx__alloc_live(void);
uint64_t epx__alloc_count(void);

#endif
