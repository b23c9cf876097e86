/* Waiting until a process has stopped. */
#ifndef EPX_TEST_STOPPED_H
#define EPX_TEST_STOPPED_H

#include <dirent.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

/* 'T' is a thread that is stopped; 0 one that is not there. */
static inline char thread_state(pid_t pid, const char *thread)
{
    char path[300], line[256] = "";
    snprintf(path, sizeof path, "/proc/%d/task/%s/stat", (int)pid, thread);
    FILE *file = fopen(path, "r");
    if (!file)
        return 0;
    char *got = fgets(line, sizeof line, file), *name_end = got ? strrchr(line, ')') : NULL;
    fclose(file);
    return name_end && name_end[1] ? name_end[2] : 0;
}

/* All threads of `pid`, which may be about to raise SIGSTOP, stand still; false after 10 s. */
static inline bool wait_stopped(pid_t pid)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/%d/task", (int)pid);
    for (int turn = 0; turn < 10000; turn++) {
        int threads = 0, stopped = 0;
        DIR *folder = opendir(path);
        for (const struct dirent *entry; folder && (entry = readdir(folder)) != NULL;)
            if (entry->d_name[0] != '.') {
                threads++;
                stopped += thread_state(pid, entry->d_name) == 'T';
            }
        if (folder)
            closedir(folder);
        if (threads > 0 && stopped == threads)
            return true;
        usleep(1000);
    }
    return false;
}

#endif
