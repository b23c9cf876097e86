/* Argument checks: each says in words what is off, and fills in defaults. Nothing else happens here. */
#ifndef EPX_API_CHECK_H
#define EPX_API_CHECK_H

#include "api/objects.h"
#include "plan/format.h"

/* Device memory of the buffer's device, aligned; NULL only when nothing is `needed` there. */
epx_status_t epx__check_memory(epx_buffer_t *buffer, const char *call, const char *what, const void *pointer,
                               size_t align, bool needed);
/* Milliseconds that still fit, as nanoseconds, into a deadline. */
epx_status_t epx__check_timeout(const char *call, uint64_t timeout_ms);
epx_status_t epx__check_layout(epx_buffer_t *buffer, const epx_layout_t *layout);
epx_status_t epx__check_routing(epx_buffer_t *buffer, const char *call, const void *topk_idx, int *bits,
                                uint32_t tokens, uint32_t topk, uint32_t experts, epx__experts_t *map);
epx_status_t epx__check_rows(epx_buffer_t *buffer, const char *call, epx_rows_t *rows, uint32_t tokens);
epx_status_t epx__check_dispatch(epx_buffer_t *buffer, epx_dispatch_t *dispatch, epx__experts_t *map);
/* topk_idx_bits: of the ids that will be written; 0 is 64, as in a dispatch. */
epx_status_t epx__check_place(epx_buffer_t *buffer, const char *call, const epx_place_t *place, int topk_idx_bits,
                              const epx_received_t *received);
epx_status_t epx__check_combine(epx_buffer_t *buffer, const epx_handle_t *handle, epx_combine_t *combine,
                                uint32_t rows);

#endif
