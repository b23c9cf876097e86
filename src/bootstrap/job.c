/* Rank, size and rendezvous from the environment: see job.h. */
#include "bootstrap/job.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/env.h"
#include "base/fail.h"

/* Derived ports lie below the range from which Linux takes ports for outgoing connections (32768 and up). */
enum { PORT_FIRST = 20000, PORT_COUNT = 12000 };

static const char *variable(const char *name)
{
    const char *value = getenv(name);
    return value && value[0] ? value : NULL;
}

static epx_status_t number(const char *name, int low, int high, int *out)
{
    const char *text = variable(name);
    char *end = NULL;
    long value = text ? strtol(text, &end, 10) : 0;
    if (!text || *end || value < low || value > high)
        return epx__fail(EPX_E_INVALID, "%s is %s%.40s%s; it must be a whole number from %d to %d", name,
                         text ? "\"" : "", text ? text : "not set", text ? "\"" : "", low, high);
    *out = (int)value;
    return EPX_OK;
}

static const char *or_empty(const char *name)
{
    const char *value = variable(name);
    return value ? value : "";
}

static epx_status_t ranks_of(epx__job_t *job, const char *rank, const char *ranks, const char *here)
{
    EPX__TRY(number(ranks, 1, EPX__RANKS_MAX, &job->ranks));
    EPX__TRY(number(rank, 0, job->ranks - 1, &job->rank));
    if (here && variable(here))
        EPX__TRY(number(here, 1, job->ranks, &job->ranks_here));
    return EPX_OK;
}

static epx_status_t torchrun(epx__job_t *job)
{
    job->launcher = "torchrun";
    EPX__TRY(ranks_of(job, "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"));
    if (variable("TORCHELASTIC_RUN_ID") || variable("MASTER_PORT"))
        snprintf(job->key, sizeof(job->key), "torchrun/%.128s/%.128s/%.16s/%.16s", or_empty("TORCHELASTIC_RUN_ID"),
                 or_empty("MASTER_ADDR"), or_empty("MASTER_PORT"), or_empty("TORCHELASTIC_RESTART_COUNT"));
    return EPX_OK;
}

static epx_status_t mpirun(epx__job_t *job)
{
    job->launcher = "mpirun";
    EPX__TRY(ranks_of(job, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"));
    const char *names[] = {"PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_ess_jobid"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]) && !job->key[0]; i++)
        if (variable(names[i]))
            snprintf(job->key, sizeof(job->key), "mpirun/%.256s", variable(names[i]));
    return EPX_OK;
}

static epx_status_t srun(epx__job_t *job)
{
    job->launcher = "srun";
    const char *ranks = variable("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS";
    EPX__TRY(ranks_of(job, "SLURM_PROCID", ranks, NULL));
    int nodes = 0;
    const char *count = variable("SLURM_STEP_NUM_NODES") ? "SLURM_STEP_NUM_NODES" : "SLURM_NNODES";
    if (variable(count)) {
        EPX__TRY(number(count, 1, INT_MAX, &nodes));
        job->ranks_here = nodes == 1 ? job->ranks : 1; /* 1 of several: not all are here, which is all that counts */
    }
    snprintf(job->key, sizeof(job->key), "srun/%.64s/%.64s", or_empty("SLURM_JOB_ID"), or_empty("SLURM_STEP_ID"));
    return EPX_OK;
}

epx_status_t epx__job_find(epx__job_t *job)
{
    *job = (epx__job_t){.rank = 0, .ranks = 1, .ranks_here = 1};
    if (variable("RANK") && variable("WORLD_SIZE")) {
        job->ranks_here = 0;
        return torchrun(job);
    }
    if (variable("OMPI_COMM_WORLD_RANK") && variable("OMPI_COMM_WORLD_SIZE")) {
        job->ranks_here = 0;
        return mpirun(job);
    }
    /* A batch script has SLURM_PROCID and SLURM_NTASKS too, but no step: it is one process, not one of many. */
    if (variable("SLURM_PROCID") && variable("SLURM_NTASKS") && variable("SLURM_STEP_ID")) {
        job->ranks_here = 0;
        return srun(job);
    }
    return EPX_OK;
}

static void token_from(const char *purpose, const char *secret, uint8_t token[EPX__TOKEN_BYTES])
{
    for (uint64_t lane = 0; lane < EPX__TOKEN_BYTES / 8; lane++) {
        uint64_t seed = epx__hash_bytes(lane, purpose, strlen(purpose));
        uint64_t word = epx__hash_bytes(seed, secret, strlen(secret));
        memcpy(token + 8 * lane, &word, 8);
    }
}

epx_status_t epx__job_rendezvous(const epx__job_t *job, epx__id_t *where)
{
    char key[sizeof(job->key) + 64];
    snprintf(key, sizeof(key), "%s/uid %u", job->key, (unsigned)getuid());
    const char *root = epx__env_value(EPX__ENV_ROOT), *secret = epx__env_value(EPX__ENV_ROOT_TOKEN);
    if (secret)
        token_from("EPX_ROOT_TOKEN", secret, where->token);
    else
        token_from("job", key, where->token);
    if (root) {
        const char *wrong = epx__endpoint_parse(root, &where->endpoint);
        return wrong ? epx__fail(EPX_E_INVALID, "EPX_ROOT is \"%.80s\": %s", root, wrong) : EPX_OK;
    }
    if (!job->key[0])
        return epx__fail(EPX_E_INVALID,
                         "%d ranks, but nothing says where they meet: give a unique id or an all-gather, or set "
                         "EPX_ROOT=IP:port on all ranks (and EPX_ROOT_TOKEN to a secret)",
                         job->ranks);
    if (job->ranks_here && job->ranks_here != job->ranks)
        return epx__fail(EPX_E_INVALID,
                         "the %s job has ranks on several hosts: set EPX_ROOT=IP:port on all ranks, an address of rank "
                         "0's host (and EPX_ROOT_TOKEN to a secret)",
                         job->launcher ? job->launcher : "given");
    where->endpoint = (epx__endpoint_t){.family = 4, .address = {127, 0, 0, 1}};
    where->endpoint.port = (uint16_t)(PORT_FIRST + epx__hash_bytes(1, key, strlen(key)) % PORT_COUNT);
    return EPX_OK;
}
