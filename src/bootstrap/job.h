/* What the launcher says about this process: torchrun, mpirun or srun. docs/bootstrap.md lists the variables. */
#ifndef EPX_BOOTSTRAP_JOB_H
#define EPX_BOOTSTRAP_JOB_H

#include "bootstrap/wire.h"

typedef struct epx__job {
    const char *launcher; /* "torchrun", "mpirun", "srun", or NULL: none */
    int rank, ranks;
    int ranks_here; /* on this host; 0 is unknown */
    char key[512];  /* names this job on this host; "" when the launcher gives no id */
} epx__job_t;

epx_status_t epx__job_find(epx__job_t *job);

/* Where rank 0 of the job listens, and the token: from EPX_ROOT and EPX_ROOT_TOKEN, else from job->key. */
epx_status_t epx__job_rendezvous(const epx__job_t *job, epx__id_t *where);

#endif
