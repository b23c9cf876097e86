/* Nearest network interface: the system's files, and the rule of nic.h. */
#include "net/nic.h"

#include <net/if_arp.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The number in root/sys/class/CLASS/NAME/device/numa_node; false when there is no such file. */
static bool read_node(const char *root, const char *class, const char *name, int *node)
{
    char path[256];
    int length = snprintf(path, sizeof path, "%s/sys/class/%s/%s/device/numa_node", root, class, name);
    FILE *file = length > 0 && length < (int)sizeof path ? fopen(path, "re") : NULL;
    if (!file)
        return false;
    if (fscanf(file, "%d", node) != 1)
        *node = -1;
    fclose(file);
    return true;
}

/* An interface that has no device: loopback by the hardware type that the system gives it. */
static bool is_loopback(const char *root, const char *name)
{
    char path[256];
    int length = snprintf(path, sizeof path, "%s/sys/class/net/%s/type", root, name), type = 0;
    FILE *file = length > 0 && length < (int)sizeof path ? fopen(path, "re") : NULL;
    if (!file)
        return false;
    bool read = fscanf(file, "%d", &type) == 1;
    fclose(file);
    return read && type == ARPHRD_LOOPBACK;
}

static bool is_there(const char *root, const char *name, const char *what)
{
    char path[256];
    int length = snprintf(path, sizeof path, "%s/sys/class/net/%s%s", root, name, what);
    return length > 0 && length < (int)sizeof path && access(path, F_OK) == 0;
}

void epx__nic_look(const char *root, epx__nic_t *nic)
{
    nic->node = -1;
    nic->kind = EPX__NIC_CARD;
    if (read_node(root, "infiniband", nic->name, &nic->node) || read_node(root, "net", nic->name, &nic->node))
        return;
    if (is_there(root, nic->name, "") && !is_there(root, nic->name, "/device"))
        nic->kind = is_loopback(root, nic->name) ? EPX__NIC_LOOPBACK : EPX__NIC_VIRTUAL;
}

int epx__nic_here(void)
{
    unsigned cpu = 0, node = 0;
    return syscall(SYS_getcpu, &cpu, &node, NULL) == 0 ? (int)node : -1;
}

/* May `nic` be taken, when `first` is the first of the best kind? `node` < 0: on any node. */
static bool candidate(const epx__nic_t *nic, const epx__nic_t *first, int node)
{
    return strcmp(nic->fabric, first->fabric) == 0 && nic->kind == first->kind && (node < 0 || nic->node == node);
}

static int count_candidates(const epx__nic_t *nics, int count, const epx__nic_t *first, int node)
{
    int found = 0;
    for (int i = 0; i < count; i++)
        found += candidate(&nics[i], first, node);
    return found;
}

int epx__nic_choose(const epx__nic_t *nics, int count, int node, uint32_t turn, int *near)
{
    int first = 0;
    for (int i = 1; i < count; i++)
        if (nics[i].kind < nics[first].kind)
            first = i;
    *near = count_candidates(nics, count, &nics[first], node);
    if (*near == 0)
        *near = count_candidates(nics, count, &nics[first], node = -1);
    int wanted = (int)(turn % (uint32_t)*near);
    for (int i = 0; i < count; i++)
        if (candidate(&nics[i], &nics[first], node) && wanted-- == 0)
            return i;
    return first;
}
