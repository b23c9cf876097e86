/* Which networks a test can have here. */
#ifndef EPX_TEST_NETS_H
#define EPX_TEST_NETS_H

#include <stdbool.h>
#include <stdio.h>

#include "base/fail.h"
#include "net/net.h"

/* Can it be opened on the loopback interface? Says why not. */
static inline bool test_net_here(const char *spec)
{
    epx__net_config_t config = {.address = "127.0.0.1", .peers_max = 1, .puts_max = 16, .notices_max = 16};
    epx__net_t *net = NULL;
    bool there = epx__net_open(spec, &config, &net) == EPX_OK;
    if (!there)
        printf("%s: not here: %s\n", spec, epx__detail());
    epx__net_close(net);
    return there;
}

#endif
