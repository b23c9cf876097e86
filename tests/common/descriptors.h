/* How many descriptors this process holds: a test that leaves some behind fails. */
#ifndef EPX_TEST_DESCRIPTORS_H
#define EPX_TEST_DESCRIPTORS_H

#include <dirent.h>

static inline int count_entries(const char *folder)
{
    DIR *dir = opendir(folder);
    if (!dir)
        return -1;
    int count = 0;
    while (readdir(dir))
        count++;
    closedir(dir);
    return count;
}

static inline int count_descriptors(void)
{
    return count_entries("/proc/self/fd");
}

#endif
