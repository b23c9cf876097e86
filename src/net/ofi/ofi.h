/* What the files of libepx_ofi.so share. */
#ifndef EPX_NET_OFI_OFI_H
#define EPX_NET_OFI_OFI_H

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include "net/net.h"

struct epx__net_memory {
    struct fid_mr *mr;
    void *desc;
    char *base;
    size_t bytes;
};

/* One put under way. libfabric may write the first part while it is. */
typedef struct ofi_context {
    struct fi_context2 fabric;
    struct ofi_context *next;
    uint64_t cookie;
    uint32_t peer;
} ofi_context_t;

typedef struct ofi_peer {
    fi_addr_t address;
    epx__net_key_t scratch; /* where a notice alone is written */
    bool dead;
    uint32_t puts;             /* under way to it */
    uint64_t refused_since_ns; /* 0: it took the last one */
    struct ofi *here;          /* shm: the endpoint itself, where it is of this process; counted in its `users` */
} ofi_peer_t;

typedef struct ofi {
    epx__net_t net; /* first */
    struct fi_info *info;
    struct fid_fabric *fabric;
    struct fid_domain *domain;
    struct fid_cq *cq;
    struct fid_av *av;
    struct fid_ep *ep;
    int fd; /* of the queue, -1 none */
    ofi_peer_t *peers;
    uint32_t peer_count, peers_max;
    ofi_context_t *contexts, *idle;
    uint32_t puts, puts_max;
    uint64_t lost_ms;
    size_t cq_most;
    uint64_t next_key;
    epx__net_memory_t any; /* net.any, where the provider takes sources that are not registered */
    uint64_t scratch[8];   /* peers write it, nobody reads it */
    epx__net_memory_t *scratch_memory;
    epx__net_key_t scratch_key;
    char why[240];
    struct ofi *left_before; /* of endpoints that could not be closed */
    /* shm only, else 0: close.c's */
    uint32_t users; /* its owner, and the endpoints of this process that are connected to it */
    struct ofi *next_of_shm;
    char name[224];
    size_t name_bytes;
} ofi_t;

extern const epx__net_host_t *epx__ofi_host;
extern const epx__net_ops_t epx__net_ofi;

epx_status_t epx__ofi_fail(long error, const char *doing);

/* choose.c: fills info, put_bytes_max, device_memory, why. */
epx_status_t epx__ofi_choose(ofi_t *self, const epx__net_config_t *config);

/* close.c */
epx_status_t epx__ofi_opened(ofi_t *self);
void epx__ofi_connected(const ofi_t *self, ofi_peer_t *to, const void *name, size_t bytes);
void epx__ofi_close(epx__net_t *net); /* any that was begun, or a part of it */

/* memory.c */
epx_status_t epx__ofi_enroll(epx__net_t *net, void *base, size_t bytes, bool device, epx__net_memory_t **memory,
                             epx__net_key_t *key);
void epx__ofi_withdraw(epx__net_t *net, epx__net_memory_t *memory);

#endif
