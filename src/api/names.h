/*
 * What callers hold for buffers and handles: names, not addresses.
 *
 * The values behind epx_buffer_t *, epx_handle_t * and epx_ll_handle_t * that leave the library are numbers:
 *
 *     bits  0-3   kind, odd, so that no address of aligned memory is taken for a name
 *     bits  4-19  slot in the buffer's pool of handles (0 for a buffer)
 *     bits 20-31  place of the buffer in one table of this process, which is never freed
 *     bits 32-63  number: a place counts, over all buffers that ever have it, each buffer and each use of a handle
 *
 * A name is good when its place holds a buffer, its number is not older than that buffer and, for a handle, the slot
 * still carries the number. So a handle that was released (its slot taken again or not), one of a destroyed buffer, and
 * what was never a name are told apart without a look at freed memory, without a lock, in a few loads.
 *
 * Inside the library the same pointer types are addresses. A public function turns the one into the other with
 * epx__*_find before anything else, and gives out epx__*_name only.
 */
#ifndef EPX_API_NAMES_H
#define EPX_API_NAMES_H

#include <epx/ll.h>

enum { EPX__BUFFERS_MAX = 4096 }; /* alive at once in one process */

/* A buffer gets its place; EPX_E_BUSY when all are taken. It can be found until it leaves. */
epx_status_t epx__buffer_enter(epx_buffer_t *buffer);
void epx__buffer_leave(epx_buffer_t *buffer);
/* The next number of the buffer's place, for a handle that is being taken. */
uint64_t epx__buffer_number(const epx_buffer_t *buffer);

epx_buffer_t *epx__buffer_name(const epx_buffer_t *buffer);
epx_handle_t *epx__handle_name(const epx_handle_t *handle);
epx_ll_handle_t *epx__ll_handle_name(const epx_ll_handle_t *handle);

/* A name in, an address out; else EPX_E_INVALID in words, and *pointer is as it was. A handle that is found may be free
 * (combined) when nothing has taken its slot since: its state says so. */
epx_status_t epx__buffer_find(epx_buffer_t **pointer, const char *call);
epx_status_t epx__handle_find(epx_handle_t **pointer, const char *call);
epx_status_t epx__ll_handle_find(epx_ll_handle_t **pointer, const char *call);

#endif
