/*
 * A raw stream of puts between the ranks of a bench, for the floor between domains. It lies in libepx_bench_ofi.so
 * (ofi/stream_ofi.c, plain libfabric, nothing of the library's) and is opened only when a floor needs it. That library
 * exports
 *
 *     const stream_ops_t *epx_bench_stream(void);
 */
#ifndef EPX_TOOL_STREAM_H
#define EPX_TOOL_STREAM_H

#include <stddef.h>
#include <stdint.h>

enum { STREAM_ABI = 2 };

typedef struct stream_plan {
    const char *provider; /* what follows "ofi:" in the library's own name: "tcp;ofi_rxm", "shm" */
    int rank, ranks;
    const size_t *to_bytes;   /* [ranks] this rank sends there; 0: nobody */
    const size_t *from_bytes; /* [ranks] it receives from there; each rank's `to_bytes` must say the same */
    const size_t *to_at;      /* [ranks] where in that rank's `into` */
    char *from;               /* what is sent: bytes for each rank in turn, `from_total` in all */
    size_t from_total;
    char *into; /* where what others send lands */
    size_t into_total;
    /* Or NULL, both: asked in a run how many bytes of `from` are there to be sent, growing up to from_total; told how
     * many have come, in all. What others send comes in any order, so the last bytes told may be on the way until all
     * have come. NULL, or words. The two of carry_ops_t in mem.h. */
    const char *(*ready)(void *carry, size_t *bytes);
    const char *(*landed)(void *carry, size_t bytes);
    void *carry;
    int (*allgather)(void *context, const void *mine, size_t bytes, void *all); /* at most 512 bytes each */
    void *allgather_context;
} stream_plan_t;

typedef struct stream_ops {
    uint32_t abi;                                          /* STREAM_ABI */
    int (*open)(const stream_plan_t *plan, void **stream); /* collective; 0, or non-zero and words */
    /* Send all, in puts of `chunk` bytes, and receive all. Collective. */
    int (*run)(void *stream, size_t chunk);
    void (*close)(void *stream);
    const char *(*words)(void); /* of the thread's last failure */
} stream_ops_t;

/* Opens the plug-in; NULL with `why` (one line, good until the thread asks again). */
const stream_ops_t *stream_ops_open(const char **why);

#endif
