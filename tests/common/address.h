/* Where tests of networks listen: EPX_TEST_ADDRESS, for providers that cannot use the loopback interface. */
#ifndef EPX_TEST_ADDRESS_H
#define EPX_TEST_ADDRESS_H

#include <stdlib.h>

static inline const char *test_address(void)
{
    const char *address = getenv("EPX_TEST_ADDRESS");
    return address ? address : "127.0.0.1";
}

#endif
