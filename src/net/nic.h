/*
 * Which of a host's network interfaces an endpoint takes, when nobody has named one: the nearest, in turns.
 *
 * Candidates are those of one network (the same fabric as the first with hardware behind it, else the first virtual
 * one, as containers have, else loopback): with interfaces in several networks it is not for us to guess which of them
 * all hosts share. Of these, the ones on the endpoint's own NUMA node; if there are none there, all. Of several equally
 * near, endpoints take turns, so that the proxies of one host use all.
 */
#ifndef EPX_NET_NIC_H
#define EPX_NET_NIC_H

#include <stdint.h>

typedef enum epx__nic_kind {
    EPX__NIC_CARD,    /* hardware is behind it */
    EPX__NIC_VIRTUAL, /* none: a container's, a bridge */
    EPX__NIC_LOOPBACK /* it leads nowhere else */
} epx__nic_kind_t;

typedef struct epx__nic {
    const char *name;   /* as libfabric and the system call it: eth0, mlx5_0 */
    const char *fabric; /* network, in libfabric's words */
    int node;           /* NUMA node; -1 unknown, or a virtual one's */
    epx__nic_kind_t kind;
} epx__nic_t;

/* NUMA node and kind of the interface `name`, from the system's files below `root` ("" is the system's own). */
void epx__nic_look(const char *root, epx__nic_t *nic);

/* NUMA node that the calling thread runs on; -1 unknown. */
int epx__nic_here(void);

/* Index of the one to take, of count > 0 in libfabric's order, each name once; *near: how many were equally near. */
int epx__nic_choose(const epx__nic_t *nics, int count, int node, uint32_t turn, int *near);

#endif
