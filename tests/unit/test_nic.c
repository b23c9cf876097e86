/* Which network interface is taken: the rule on lists made here, and the system's files below a folder made here. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/check.h"
#include "net/nic.h"

static int take(const epx__nic_t *nics, int count, int node, uint32_t turn)
{
    int near = 0, at = epx__nic_choose(nics, count, node, turn, &near);
    CHECK(near >= 1 && at >= 0 && at < count, "%d of %d, %d near", at, count, near);
    return at;
}

static void test_rule(void)
{
    static const epx__nic_t lone[] = {{"lo", "127.0.0.1/32", -1, EPX__NIC_LOOPBACK}};
    static const epx__nic_t container[] = {{"lo", "127.0.0.1/32", -1, EPX__NIC_LOOPBACK},
                                           {"eth0", "198.51.100.0/24", -1, EPX__NIC_VIRTUAL}};
    static const epx__nic_t usual[] = {{"docker0", "172.17.0.0/16", -1, EPX__NIC_VIRTUAL},
                                       {"eth0", "192.0.2.0/24", 0, EPX__NIC_CARD},
                                       {"lo", "127.0.0.1/32", -1, EPX__NIC_LOOPBACK}};
    static const epx__nic_t eight[] = {{"mlx5_0", "IB", 0, EPX__NIC_CARD},
                                       {"mlx5_1", "IB", 0, EPX__NIC_CARD},
                                       {"mlx5_2", "IB", 1, EPX__NIC_CARD},
                                       {"mlx5_3", "IB", 1, EPX__NIC_CARD},
                                       {"mlx5_4", "OTHER", 1, EPX__NIC_CARD}};
    CHECK(take(lone, 1, 0, 3) == 0, "nothing else is there");
    for (uint32_t turn = 0; turn < 4; turn++) {
        CHECK(take(container, 2, 0, turn) == 1, "the one that leads somewhere, turn %u", turn);
        CHECK(take(usual, 3, 0, turn) == 1, "the one that is real, turn %u", turn);
        CHECK(take(usual, 3, 1, turn) == 1, "from another node too, turn %u", turn);
        CHECK(take(eight, 5, 0, turn) == (int)(turn % 2), "node 0, turn %u", turn);
        CHECK(take(eight, 5, 1, turn) == 2 + (int)(turn % 2), "node 1 and the first's network, turn %u", turn);
        CHECK(take(eight, 5, -1, turn) == (int)turn, "node unknown: all of the first's network, turn %u", turn);
        CHECK(take(eight, 5, 7, turn) == (int)turn, "nothing on that node: all, turn %u", turn);
    }
}

static char root[64];

static void file(const char *path, const char *text)
{
    char whole[256], command[512];
    snprintf(whole, sizeof whole, "%s/%s", root, path);
    snprintf(command, sizeof command, "mkdir -p \"$(dirname '%s')\"", whole);
    if (system(command) != 0)
        exit(1);
    FILE *to = fopen(whole, "w");
    if (!to)
        exit(1);
    fputs(text, to);
    fclose(to);
}

static void look(const char *name, int node, epx__nic_kind_t kind)
{
    epx__nic_t nic = {.name = name, .fabric = "", .node = 77, .kind = (epx__nic_kind_t)77};
    epx__nic_look(root, &nic);
    CHECK(nic.node == node && nic.kind == kind, "%s: node %d, kind %d", name, nic.node, (int)nic.kind);
}

static void test_files(void)
{
    snprintf(root, sizeof root, "/tmp/epx-nic-XXXXXX");
    if (!mkdtemp(root))
        exit(1);
    file("sys/class/net/eth0/device/numa_node", "1\n");
    file("sys/class/net/eth1/device/vendor", "0x1af4\n"); /* a real one whose node nobody knows */
    file("sys/class/net/lo/type", "772\n");
    file("sys/class/net/veth0/type", "1\n");
    file("sys/class/net/tunnel/address", "00:00:00:00:00:00\n");
    file("sys/class/infiniband/mlx5_0/device/numa_node", "3\n");
    file("sys/class/infiniband/mlx5_1/device/numa_node", "-1\n");
    file("sys/class/infiniband/mlx5_2/device/numa_node", "what\n");
    look("eth0", 1, EPX__NIC_CARD);
    look("eth1", -1, EPX__NIC_CARD);
    look("lo", -1, EPX__NIC_LOOPBACK);
    look("veth0", -1, EPX__NIC_VIRTUAL);
    look("tunnel", -1, EPX__NIC_VIRTUAL);
    look("mlx5_0", 3, EPX__NIC_CARD);
    look("mlx5_1", -1, EPX__NIC_CARD);
    look("mlx5_2", -1, EPX__NIC_CARD);
    look("shm", -1, EPX__NIC_CARD); /* no interface at all */
    char command[128];
    snprintf(command, sizeof command, "rm -r '%s'", root);
    CHECK(system(command) == 0, "the folder is gone");
}

int main(void)
{
    test_rule();
    test_files();
    CHECK(epx__nic_here() >= -1, "this thread's node");
    return check_done();
}
