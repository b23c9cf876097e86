/*
 * The environment variables, all of them. The library reads them when a group or a buffer is made, never later.
 */
#ifndef EPX_BASE_ENV_H
#define EPX_BASE_ENV_H

#include <stdint.h>

#include <epx/status.h>

/* X(NAME, default as text ("" is none), meaning) -- the variable is EPX_NAME */
#define EPX__ENV_MAP(X)                                                                                                \
    X(LOG, "1", "log level on stderr: 0 nothing, 1 warnings, 2 info, 3 debug")                                         \
    X(ROOT, "", "rendezvous as IP:port, where rank 0 listens, when no unique id is given")                             \
    X(ROOT_TOKEN, "", "secret that every rank of the job shares, for a rendezvous without a unique id")                \
    X(ADDRESS, "", "IP that this rank's rendezvous and network listen on; default: 127.0.0.1 if all are on one host")  \
    X(BACKEND, "auto", "auto, cpu or cuda")                                                                            \
    X(THREADS, "", "CPU threads that copy for one rank; default: cores / ranks on this host, at least 1")              \
    X(RANKS_PER_DOMAIN, "", "split domains into pieces of that many ranks; default: as found")                         \
    X(TIMEOUT_MS, "30000", "deadline of every wait, in milliseconds")                                                  \
    X(LEASE_BYTES, "536870912", "window memory for leases, in bytes")                                                  \
    X(RESERVE_BYTES, "", "window memory for rounds, in bytes; default: 33554432, twice that with CUDA")                \
    X(SPIN, "", "polls before a wait yields; default: 20000, 2000 between domains, 100 with fewer cores than ranks")   \
    X(STREAMING, "auto", "streaming stores for row copies: auto, 0, 1, or halves (half of each row by plain stores)")  \
    X(NET, "", "network between domains: ofi, ofi:PROVIDER, loop, sim[:SEED]; default: ofi")                           \
    X(PROXIES, "", "proxy threads of a rank; default: by docs/channels.md's rule")                                     \
    X(CHANNELS, "", "port channels to each peer; default: by docs/channels.md's rule")                                 \
    X(NIC, "", "network interface or device to use, by name; default: the nearest, in turns")                          \
    X(SMS, "", "CUDA: SMs per call; default: by docs/PERFORMANCE.md's formula")                                        \
    X(CUDA_HANDLES, "auto", "CUDA: windows reach other processes by fd, fabric, or auto: fabric between hosts only")   \
    X(LL_INBAND, "auto", "CUDA, low latency: rows are their own arrival signal: auto (where possible), 0 or 1")

typedef enum epx__env {
#define EPX__ENV_ENUM(name, default_text, meaning) EPX__ENV_##name,
    EPX__ENV_MAP(EPX__ENV_ENUM)
#undef EPX__ENV_ENUM
        EPX__ENV_COUNT
} epx__env_t;

typedef struct epx__env_info {
    const char *name, *default_text, *meaning;
} epx__env_info_t;

const epx__env_info_t *epx__env_info(epx__env_t variable);
const char *epx__env_value(epx__env_t variable); /* as set; NULL when unset or empty */
const char *epx__env_text(epx__env_t variable);  /* as set, else the default, else NULL */

/* As a number in [low, high]: the value, else the default, else `fallback`. EPX_E_INVALID in words when it is none. */
epx_status_t epx__env_u64(epx__env_t variable, uint64_t low, uint64_t high, uint64_t fallback, uint64_t *out);

/* As one of `words` (NULL at the end): its place among them. EPX_E_INVALID in words when it is none. */
epx_status_t epx__env_choice(epx__env_t variable, const char *const *words, int *out);

#endif
