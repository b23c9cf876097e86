/* See identity.h. */
#include "bootstrap/identity.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "bootstrap/socket.h"

void epx__identify(epx__identity_t *identity)
{
    struct stat network;
    memset(identity, 0, sizeof(*identity));
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t got = fd >= 0 ? read(fd, identity->boot, sizeof(identity->boot) - 1) : -1;
    if (fd >= 0)
        close(fd);
    if (got <= 0 && gethostname(identity->boot, sizeof(identity->boot) - 1))
        epx__random_bytes(identity->boot, sizeof(identity->boot)); /* equal to nobody */
    if (stat("/proc/self/ns/net", &network) == 0) {
        identity->namespace_device = (uint64_t)network.st_dev;
        identity->namespace_inode = (uint64_t)network.st_ino;
    }
}
