/* The part of a buffer that crosses domains. */
#ifndef EPX_API_RAILS_H
#define EPX_API_RAILS_H

#include "api/objects.h"

/* Group: which network, checked by opening it once; fills net and net_why. Local. */
epx_status_t epx__group_choose_net(epx_group_t *group, const char *asked);
/* Where networks listen: as asked for, or on the loopback interface where all ranks have the same; NULL: the network
 * chooses. */
const char *epx__group_address(const epx_group_t *group);
/* Buffer: window, imports, channels; fills x.net. Collective. */
epx_status_t epx__buffer_rails_open(epx_buffer_t *buffer);
void epx__buffer_rails_close(epx_buffer_t *buffer); /* local, bounded */
/* To other domains' failures, while there is an exchange that they can interrupt. Once; not even once is fine. */
epx_status_t epx__buffer_rails_listen(epx_buffer_t *buffer);
void epx__buffer_rails_listen_no_more(epx_buffer_t *buffer);
void epx__buffer_rails_lost(epx_buffer_t *buffer, int rank); /* from any thread: that rank is dead */
/* Port channels of a buffer, with what all of them are made with; `config` has peers, memories and sizes. Collective.
 */
struct epx__channels_config;
struct epx_channels;
epx_status_t epx__buffer_channels_create(epx_buffer_t *buffer, struct epx__channels_config *config,
                                         struct epx_channels **channels);
/* Ranks of the group that die while these channels leave are not waited for. NULL channels are fine. */
void epx__group_channels_destroy(epx_group_t *group, struct epx_channels *channels);

/* The part of low latency that crosses domains (ll_net.c); fills x.ll_net, NULL when there is none. Collective. */
epx_status_t epx__buffer_ll_net_open(epx_buffer_t *buffer);
void epx__buffer_ll_net_close(epx_buffer_t *buffer); /* local, bounded */

#endif
