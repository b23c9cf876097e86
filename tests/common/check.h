/* The smallest test help: CHECK counts, names what failed and goes on; check_done() is main's return value. */
#ifndef EPX_TEST_CHECK_H
#define EPX_TEST_CHECK_H

#include <stdatomic.h>
#include <stdio.h>

static atomic_long check_passed, check_failed;

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (condition) {                                                                                               \
            atomic_fetch_add(&check_passed, 1);                                                                        \
        } else if (atomic_fetch_add(&check_failed, 1) < 20) {                                                          \
            fprintf(stderr, "%s:%d: %s:", __FILE__, __LINE__, #condition);                                             \
            fprintf(stderr, " " __VA_ARGS__);                                                                          \
            fputc('\n', stderr);                                                                                       \
        }                                                                                                              \
    } while (0)

static inline int check_done(void)
{
    printf("%ld checks passed, %ld failed\n", atomic_load(&check_passed), atomic_load(&check_failed));
    return atomic_load(&check_failed) != 0 || atomic_load(&check_passed) == 0;
}

#define SKIP(reason)                                                                                                   \
    do {                                                                                                               \
        printf("skipped: %s\n", reason);                                                                               \
        return 77;                                                                                                     \
    } while (0)

#endif
