/* What a kernel sees. See emulate.h. */
#include "emulate.h"
