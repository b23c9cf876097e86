/* Where 127.0.0.1 is one place for two ranks. */
#ifndef EPX_BOOTSTRAP_IDENTITY_H
#define EPX_BOOTSTRAP_IDENTITY_H

#include <stdint.h>

/* Equal, byte for byte, on two ranks when it is: one boot of one kernel, one network namespace. */
typedef struct epx__identity {
    char boot[40];
    uint64_t namespace_device, namespace_inode;
} epx__identity_t;

void epx__identify(epx__identity_t *identity);

#endif
