/*
 * Where a rank's memory is, and how a peer's is reached: a small table of operations. cpu/ is in libepx.so, cuda/ in
 * the plug-in libepx_cuda.so, which src/device/plugin.c opens when a driver is there.
 */
#ifndef EPX_DEVICE_DEVICE_H
#define EPX_DEVICE_DEVICE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <epx/epx.h>

typedef enum epx__blob_kind {
    EPX__BLOB_NONE,
    EPX__BLOB_FABRIC, /* CUmemFabricHandle: for every GPU that the NVLink fabric and an IMEX channel reach */
} epx__blob_kind_t;

/* How windows go to other processes. */
typedef enum epx__handles {
    EPX__HANDLES_AUTO,   /* by descriptor on one host, by the backend's handle between hosts */
    EPX__HANDLES_FD,     /* by descriptor, and so on one host only */
    EPX__HANDLES_FABRIC, /* by the backend's handle, on one host too: how one host tests it */
} epx__handles_t;

/* What a peer needs to map a window, with a file descriptor where there is one. Plain bytes: it travels. */
typedef struct epx__export {
    uint64_t host;    /* hash of the boot id: equal on one kernel */
    uint64_t process; /* random number of the process */
    uint64_t pointer; /* base in the exporter's address space: a peer in the same process uses it as it is */
    uint64_t bytes;
    uint64_t key;         /* what to ask the exporter's fd server for; 0 when there is no descriptor */
    char socket[64];      /* its abstract UNIX name, without the leading 0 byte */
    uint8_t token[16];    /* without which it answers nobody */
    uint8_t blob[64];     /* an opaque handle of the backend's: any bytes, zeros too */
    uint32_t blob_kind;   /* what blob is (epx__blob_kind_t) */
    int32_t blob_refused; /* why there is none, in the backend's own numbers; 0: it never makes any */
} epx__export_t;

typedef struct epx__window {
    void *base; /* device address, 4096-aligned, zeroed */
    size_t bytes;
    int fd; /* shareable descriptor, -1 when none */
    void *backend;
} epx__window_t;

typedef struct epx__device epx__device_t;

typedef struct epx__device_ops {
    const char *name; /* "cpu", "cuda" */
    epx_backend_t backend;
    epx_status_t (*open)(int ordinal, epx__device_t **device); /* ordinal -1: none to choose */
    void (*close)(epx__device_t *device);
    epx_status_t (*window_alloc)(epx__device_t *device, size_t bytes, epx__window_t *window);
    void (*window_free)(epx__device_t *device, epx__window_t *window);
    /* Fill the backend's part of an export (blob). */
    epx_status_t (*window_export)(epx__device_t *device, const epx__window_t *window, epx__export_t *export_);
    /* Map a peer's window from its descriptor (owned by the caller, -1 when there is none) or blob. */
    epx_status_t (*window_map)(epx__device_t *device, const epx__export_t *export_, int fd, void **mapped);
    void (*window_unmap)(epx__device_t *device, const epx__export_t *export_, void *mapped);
    /* Same process, perhaps another device: may this device touch the exporter's pointer as it is? */
    epx_status_t (*window_attach)(epx__device_t *device, const epx__export_t *export_, void **mapped);
    /* Host-synchronous copies between host and device memory, for set-up and tests. */
    epx_status_t (*copy_in)(epx__device_t *device, void *to, const void *from_host, size_t bytes);
    epx_status_t (*copy_out)(epx__device_t *device, void *to_host, const void *from, size_t bytes);
    /* Is this pointer memory that this device can use? "words" in epx__detail when not. */
    epx_status_t (*check_pointer)(epx__device_t *device, const void *pointer, const char *what);
    /* Host memory for the device's threads: pinned, and seen by them at the same address, until unpinned. Ranks of one
     * process may pin the same memory. CPU: nothing to do. */
    epx_status_t (*host_pin)(epx__device_t *device, void *base, size_t bytes);
    void (*host_unpin)(epx__device_t *device, void *base);
    /* Zeroed words that the device's own threads share (tickets of port channels). */
    epx_status_t (*words_alloc)(epx__device_t *device, size_t count, uint64_t **words);
    void (*words_free)(epx__device_t *device, uint64_t *words);
} epx__device_ops_t;

struct epx__device {
    const epx__device_ops_t *ops;
    int ordinal;
    epx__handles_t handles;  /* chosen when it is opened; AUTO where there are descriptors alone */
    const char *windows_why; /* for epx info: how its windows go to other processes; NULL: nothing to say. Its own */
};

extern const epx__device_ops_t epx__device_cpu;

/* Passing descriptors between processes of one host: one server thread a group, on an abstract UNIX socket. It answers
 * peers of the same user that know the token. */
typedef struct epx__fdserver epx__fdserver_t;
epx_status_t epx__fdserver_open(epx__fdserver_t **server);
void epx__fdserver_close(epx__fdserver_t *server);
/* Offer fd (borrowed until withdrawn) and fill export_'s socket, token and key. */
epx_status_t epx__fdserver_offer(epx__fdserver_t *server, int fd, epx__export_t *export_);
void epx__fdserver_withdraw(epx__fdserver_t *server, uint64_t key);
/* Ask another process for a descriptor; the caller closes it. */
epx_status_t epx__fd_fetch(const epx__export_t *export_, uint64_t timeout_ms, int *fd);

/* Hash of this kernel's boot id (mixed with nothing else), and this process's random number (new after fork). The
 * host's is found once, by epx__host_id_find (EPX_E_SYSTEM without a descriptor to do it with); 0 before that. */
epx_status_t epx__host_id_find(void);
uint64_t epx__host_id(void);
uint64_t epx__process_id(void);

/* Window and export in one: alloc, then offer. */
epx_status_t epx__window_create(epx__device_t *device, epx__fdserver_t *server, size_t bytes, epx__window_t *window,
                                epx__export_t *export_);
void epx__window_destroy(epx__device_t *device, epx__fdserver_t *server, epx__window_t *window,
                         const epx__export_t *export_);
/* Map a peer's window: by pointer inside one process, by descriptor on one host, by blob elsewhere where the backend
 * can, and where device->handles says so. EPX_E_UNSUPPORTED with the reason when the peer's memory is out of reach:
 * then it is in another domain. */
/* Can this process be handed descriptors by the exporter, and so share memory of the host with it? Not from another
 * network namespace or user, though a fabric handle may lead there. */
bool epx__window_shares_host(const epx__export_t *export_, uint64_t timeout_ms);
epx_status_t epx__window_import(epx__device_t *device, const epx__export_t *export_, uint64_t timeout_ms,
                                void **mapped);
void epx__window_unimport(epx__device_t *device, const epx__export_t *export_, void *mapped);

#endif
