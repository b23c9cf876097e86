/* The part of a buffer that crosses domains. */
#ifndef EPX_API_RAILS_H
#define EPX_API_RAILS_H

#include "api/objects.h"

/* Group: which network, checked by opening it once; fills net and net_why. Local. */
epx_status_t epx__group_choose_net(epx_group_t *group, const char *asked);
/* Buffer: window, imports, channels; fills x.net. Collective. */
epx_status_t epx__buffer_rails_open(epx_buffer_t *buffer);
void epx__buffer_rails_close(epx_buffer_t *buffer); /* local, bounded */

#endif
