/* Random bytes, for tokens and names. */
#ifndef EPX_DEVICE_IDENTITY_H
#define EPX_DEVICE_IDENTITY_H

#include <stddef.h>

#include <epx/status.h>

epx_status_t epx__random_fill(void *out, size_t bytes);

#endif
