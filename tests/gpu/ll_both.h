/*
 * A low-latency test on both ways that rows arrive: with flags, and in-band (EPX_LL_INBAND). Before the test:
 *
 *     #include "gpu/ll_both.h"
 *     #define main one_way
 *
 * and ll_both in the real main. A value in the environment asks for that way alone.
 */
#ifndef EPX_TEST_LL_BOTH_H
#define EPX_TEST_LL_BOTH_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int one_way(int argc, char **argv); /* the test's main */

static int ll_both(int argc, char **argv)
{
    const char *given = getenv("EPX_LL_INBAND");
    char only = given ? given[0] : 0;
    int status = 0;
    for (int inband = 0; inband < 2; inband++) {
        if (only && only != '0' + inband)
            continue;
        setenv("EPX_LL_INBAND", inband ? "1" : "0", 1);
        printf("---- %s\n", inband ? "in-band" : "with flags");
        fflush(stdout);
        status = one_way(argc, argv); /* xt_done's, which counts both ways */
    }
    return status;
}

#endif
