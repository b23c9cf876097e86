/*
 * Between a GPU and pinned host memory by the copy engines, one for each direction, in pieces: a few copies out are
 * enqueued ahead, an event behind each tells that it has come; copies in follow what has landed, a whole piece at a
 * time. Both begin when the stream has come to where the run began, and the stream goes on when both are done.
 */
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>

#include "cuda/carry_cuda.h"

#define PIECE ((size_t)1 << 20)
#define AHEAD 8u

typedef struct carry {
    cudaStream_t stream, out_stream, in_stream; /* the first is the caller's */
    cudaEvent_t began, in_done, piece_done[AHEAD];
    char *out, *in, *device_out, *device_in;
    size_t out_bytes, in_bytes; /* of this run */
    size_t enqueued, ready;     /* of out_bytes */
    size_t moved;               /* of in_bytes */
} carry_t;

static const char *words_of(cudaError_t error, const char *what)
{
    static thread_local char words[200];
    if (error == cudaSuccess)
        return NULL;
    snprintf(words, sizeof words, "%s: %s", what, cudaGetErrorString(error));
    (void)cudaGetLastError();
    return words;
}

static size_t piece_at(size_t at, size_t bytes)
{
    return bytes - at < PIECE ? bytes - at : PIECE;
}

/* The first of several calls that failed; those after it are not made. */
#define TRY(error, call) ((error) = (error) == cudaSuccess ? (call) : (error))

static const char *open_parts(carry_t *c, int device, size_t bytes)
{
    cudaError_t error = cudaSetDevice(device);
    TRY(error, cudaStreamCreateWithFlags(&c->out_stream, cudaStreamNonBlocking));
    TRY(error, cudaStreamCreateWithFlags(&c->in_stream, cudaStreamNonBlocking));
    TRY(error, cudaEventCreateWithFlags(&c->began, cudaEventDisableTiming));
    TRY(error, cudaEventCreateWithFlags(&c->in_done, cudaEventDisableTiming));
    for (uint32_t i = 0; i < AHEAD; i++)
        TRY(error, cudaEventCreateWithFlags(&c->piece_done[i], cudaEventDisableTiming));
    if (error != cudaSuccess)
        return words_of(error, "streams and events of the copies through host memory");
    TRY(error, cudaMalloc((void **)&c->device_out, bytes));
    TRY(error, cudaMalloc((void **)&c->device_in, bytes));
    TRY(error, cudaMemsetAsync(c->device_out, 0, bytes, c->stream));
    TRY(error, cudaMemsetAsync(c->device_in, 0, bytes, c->stream));
    if (error != cudaSuccess)
        return words_of(error, "GPU memory for the rows between domains");
    TRY(error, cudaHostAlloc((void **)&c->out, bytes, cudaHostAllocPortable));
    TRY(error, cudaHostAlloc((void **)&c->in, bytes, cudaHostAllocPortable));
    TRY(error, cudaStreamSynchronize(c->stream));
    return words_of(error, "pinned host memory for the rows between domains");
}

const char *carry_cuda_open(int device, void *stream, size_t bytes, void **carry, char **out, char **in)
{
    carry_t *c = (carry_t *)calloc(1, sizeof *c);
    if (!c)
        return "no memory for the floor";
    c->stream = (cudaStream_t)stream;
    const char *error = open_parts(c, device, bytes ? bytes : 1);
    if (error) {
        carry_cuda_close(c);
        return error;
    }
    *carry = c;
    *out = c->out;
    *in = c->in;
    return NULL;
}

const char *carry_cuda_begin(void *carry, size_t out_bytes, size_t in_bytes)
{
    carry_t *c = (carry_t *)carry;
    cudaError_t error = cudaEventRecord(c->began, c->stream);
    TRY(error, cudaStreamWaitEvent(c->out_stream, c->began, 0));
    TRY(error, cudaStreamWaitEvent(c->in_stream, c->began, 0));
    c->out_bytes = out_bytes;
    c->in_bytes = in_bytes;
    c->enqueued = c->ready = c->moved = 0;
    return words_of(error, "beginning the copies through host memory");
}

static cudaEvent_t event_of(const carry_t *c, size_t at)
{
    return c->piece_done[at / PIECE % AHEAD];
}

const char *carry_cuda_ready(void *carry, size_t *bytes)
{
    carry_t *c = (carry_t *)carry;
    cudaError_t error = cudaSuccess;
    while (error == cudaSuccess && c->ready < c->enqueued) {
        error = cudaEventQuery(event_of(c, c->ready));
        if (error == cudaSuccess)
            c->ready += piece_at(c->ready, c->out_bytes);
    }
    error = error == cudaErrorNotReady ? cudaSuccess : error;
    while (error == cudaSuccess && c->enqueued < c->out_bytes && c->enqueued - c->ready < AHEAD * PIECE) {
        size_t at = c->enqueued, piece = piece_at(at, c->out_bytes);
        error = cudaMemcpyAsync(c->out + at, c->device_out + at, piece, cudaMemcpyDeviceToHost, c->out_stream);
        TRY(error, cudaEventRecord(event_of(c, at), c->out_stream));
        c->enqueued += piece;
    }
    *bytes = c->ready;
    return words_of(error, "copying from the GPU to host memory");
}

const char *carry_cuda_landed(void *carry, size_t bytes)
{
    carry_t *c = (carry_t *)carry;
    cudaError_t error = cudaSuccess;
    while (error == cudaSuccess && c->moved < bytes && (bytes - c->moved >= PIECE || bytes == c->in_bytes)) {
        size_t piece = piece_at(c->moved, bytes);
        error = cudaMemcpyAsync(c->device_in + c->moved, c->in + c->moved, piece, cudaMemcpyHostToDevice, c->in_stream);
        c->moved += piece;
    }
    return words_of(error, "copying from host memory to the GPU");
}

/* Out needs no event of its own: what left was ready. */
const char *carry_cuda_end(void *carry)
{
    carry_t *c = (carry_t *)carry;
    const char *words = carry_cuda_landed(carry, c->in_bytes);
    if (words)
        return words;
    cudaError_t error = cudaEventRecord(c->in_done, c->in_stream);
    TRY(error, cudaStreamWaitEvent(c->stream, c->in_done, 0));
    return words_of(error, "ending the copies through host memory");
}

/* Whatever is there of it. */
void carry_cuda_close(void *carry)
{
    carry_t *c = (carry_t *)carry;
    cudaStream_t const streams[] = {c->out_stream, c->in_stream};
    cudaEvent_t events[2 + AHEAD] = {c->began, c->in_done};
    for (uint32_t i = 0; i < AHEAD; i++)
        events[2 + i] = c->piece_done[i];
    (void)cudaStreamSynchronize(c->stream);
    for (size_t i = 0; i < sizeof streams / sizeof *streams; i++)
        if (streams[i]) {
            (void)cudaStreamSynchronize(streams[i]);
            (void)cudaStreamDestroy(streams[i]);
        }
    for (size_t i = 0; i < sizeof events / sizeof *events; i++)
        if (events[i])
            (void)cudaEventDestroy(events[i]);
    (void)cudaFree(c->device_out);
    (void)cudaFree(c->device_in);
    (void)cudaFreeHost(c->out);
    (void)cudaFreeHost(c->in);
    (void)cudaGetLastError(); /* it may have been an error that led here */
    free(c);
}
