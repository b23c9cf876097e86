/* How the ranks learn who they are and where rank 0 listens. */
#ifndef EPX_BOOTSTRAP_MEET_H
#define EPX_BOOTSTRAP_MEET_H

#include "bootstrap/bootstrap.h"
#include "bootstrap/socket.h"

typedef struct epx__meeting {
    int rank, ranks;
    epx__id_t where;
    epx__socket_t listener; /* rank 0's, open when ranks > 1 */
} epx__meeting_t;

/* With one rank there is nothing to find. On failure nothing is left open. */
epx_status_t epx__meet(const epx__bootstrap_config_t *config, epx__meeting_t *meeting);

#endif
