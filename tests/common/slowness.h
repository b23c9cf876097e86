/* How much longer things may take here and now than on a machine that has a core for each of its threads. */
#ifndef EPX_TEST_SLOWNESS_H
#define EPX_TEST_SLOWNESS_H

#include <stdio.h>
#include <unistd.h>

/* 1, or by how much threads that want to run outnumber the cores: now, or on average over the last minute. Upper bounds
 * of tests are multiplied by it: they are there to tell "at once" from "at the deadline", not to measure the machine.
 */
static inline double slowness(void)
{
    double load = 0, cores = (double)sysconf(_SC_NPROCESSORS_ONLN), now = 0;
    FILE *file = fopen("/proc/loadavg", "r");
    if (!file)
        return 1;
    if (fscanf(file, "%lf %*f %*f %lf/", &load, &now) != 2)
        load = now = 0;
    fclose(file);
    double most = (load > now ? load : now) / cores;
    return most > 1 ? most : 1;
}

/* `most` on a machine as it is, but always short of the deadline that it must be told from. Same unit. For a deadline
 * that must pass before another does, `deadline` is a part of that one only.
 */
static inline double well_before(double deadline, double most)
{
    double stretched = most * slowness();
    return stretched < 0.9 * deadline ? stretched : 0.9 * deadline;
}

#endif
