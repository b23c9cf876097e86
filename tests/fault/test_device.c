/*
 * Faults of the device layer: every allocation and system resource on the way to a shared window fails once; a server
 * that has no descriptors left; a client that has none. Each time words, nothing left behind, and it works again after.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/clock.h"
#include "base/fail.h"
#include "common/check.h"
#include "common/descriptors.h"
#include "device/cpu/copy.h"
#include "device/device.h"

#define BYTES ((size_t)1 << 20)
/* device, server, its thread, window, offer, sharing, socket, mapping, workers, 2 threads */
#define PLACES 11

typedef struct all {
    epx__device_t *device;
    epx__fdserver_t *server;
    epx__window_t window;
    epx__export_t exported;
    int fd;
    void *mapped;
    epx__workers_t *workers;
} all_t;

/* The whole way. What succeeded is in `all`. */
static epx_status_t make_all(all_t *all)
{
    EPX__TRY(epx__device_cpu.open(-1, &all->device));
    EPX__TRY(epx__fdserver_open(&all->server));
    EPX__TRY(epx__window_create(all->device, all->server, BYTES, &all->window, &all->exported));
    EPX__TRY(epx__fd_fetch(&all->exported, 8000, &all->fd));
    EPX__TRY(all->device->ops->window_map(all->device, &all->exported, all->fd, &all->mapped));
    return epx__workers_create(3, &all->workers);
}

static void drop_all(all_t *all)
{
    epx__workers_destroy(all->workers);
    if (all->mapped)
        all->device->ops->window_unmap(all->device, &all->exported, all->mapped);
    if (all->fd >= 0)
        close(all->fd);
    epx__window_destroy(all->device, all->server, &all->window, &all->exported);
    epx__fdserver_close(all->server);
    if (all->device)
        all->device->ops->close(all->device);
}

static void test_allocations(bool sticky)
{
    int64_t live = epx__alloc_live();
    int descriptors = count_descriptors();
    uint64_t failed = 0;
    for (uint64_t n = 1; n <= 20; n++) {
        all_t all;
        memset(&all, 0, sizeof all);
        all.fd = -1;
        epx__detail_set("");
        epx__alloc_fail_at(n, sticky);
        epx_status_t status = make_all(&all);
        epx__alloc_fail_at(0, 0);
        failed += status != EPX_OK;
        CHECK(status == EPX_OK || status == EPX_E_NOMEM || status == EPX_E_SYSTEM, "failure %d: status %d", (int)n,
              status);
        CHECK(status == EPX_OK || epx__detail()[0], "failure %d has no words", (int)n);
        CHECK(status != EPX_OK || n > PLACES, "failure %d went unnoticed", (int)n);
        drop_all(&all);
        CHECK(epx__alloc_live() == live, "failure %d leaves %d allocations", (int)n, (int)(epx__alloc_live() - live));
        CHECK(count_descriptors() == descriptors, "failure %d leaves descriptors", (int)n);
    }
    CHECK(failed == PLACES, "%d places can fail, %d are known", (int)failed, PLACES);
}

/* The soft limit so that no further descriptor can be opened; the old limit. */
static rlim_t allow_no_more_descriptors(void)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    rlim_t before = limit.rlim_cur;
    int next = fcntl(0, F_DUPFD_CLOEXEC, 0); /* the lowest that is free: all below are taken */
    close(next);
    limit.rlim_cur = (rlim_t)next;
    setrlimit(RLIMIT_NOFILE, &limit);
    return before;
}

static void allow_descriptors(rlim_t before)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = before;
    setrlimit(RLIMIT_NOFILE, &limit);
}

static uint64_t process_cpu_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Child: serves without a descriptor to accept with until it is told, then with, until it is told again. Exits 0 if the
 * first cost little CPU. */
static int starved_server(int out, int told)
{
    char byte;
    all_t all;
    memset(&all, 0, sizeof all);
    if (epx__device_cpu.open(-1, &all.device) != EPX_OK || epx__fdserver_open(&all.server) != EPX_OK ||
        epx__window_create(all.device, all.server, BYTES, &all.window, &all.exported) != EPX_OK)
        return 1;
    rlim_t before = allow_no_more_descriptors();
    uint64_t cpu = process_cpu_ns(), start = epx__now_ns();
    if (write(out, &all.exported, sizeof all.exported) != (ssize_t)sizeof all.exported)
        return 2;
    if (read(told, &byte, 1) != 1)
        return 4;
    cpu = process_cpu_ns() - cpu;
    uint64_t took = epx__now_ns() - start;
    allow_descriptors(before);
    if (read(told, &byte, 1) != 1)
        return 5;
    all.fd = -1;
    drop_all(&all);
    return cpu < took / 10 ? 0 : 3;
}

static void test_starved_server(void)
{
    int up[2], down[2];
    CHECK(pipe2(up, O_CLOEXEC) == 0 && pipe2(down, O_CLOEXEC) == 0, "pipe");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0)
        _exit(starved_server(up[1], down[0]));
    epx__export_t exported;
    int fd = -1, status = -1;
    CHECK(read(up[0], &exported, sizeof exported) == (ssize_t)sizeof exported, "no export came");
    CHECK(epx__fd_fetch(&exported, 700, &fd) == EPX_E_TIMEOUT && fd == -1, "a server that cannot accept: %s",
          epx__detail());
    CHECK(write(down[1], "", 1) == 1, "pipe");
    CHECK(epx__fd_fetch(&exported, 8000, &fd) == EPX_OK, "it can again: %s", epx__detail());
    CHECK(write(down[1], "", 1) == 1, "pipe");
    close(fd);
    for (int end = 0; end < 2; end++) {
        close(up[end]);
        close(down[end]);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0, "child: %#x (0x300: the starved server spins)", status);
}

/* Room for the client's socket, none for the descriptor that comes. */
static void test_starved_client(void)
{
    all_t all;
    memset(&all, 0, sizeof all);
    all.fd = -1;
    CHECK(make_all(&all) == EPX_OK, "%s", epx__detail());
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        struct rlimit limit;
        rlim_t before = allow_no_more_descriptors();
        int fd = -1;
        bool fine = epx__fd_fetch(&all.exported, 8000, &fd) == EPX_E_SYSTEM && fd == -1;
        getrlimit(RLIMIT_NOFILE, &limit);
        limit.rlim_cur++;
        setrlimit(RLIMIT_NOFILE, &limit);
        int descriptors;
        fine = epx__fd_fetch(&all.exported, 8000, &fd) == EPX_E_SYSTEM && fd == -1 && fine;
        fine = strstr(epx__detail(), "no room in this process") != NULL && fine;
        allow_descriptors(before);
        descriptors = count_descriptors();
        fine = epx__fd_fetch(&all.exported, 8000, &fd) == EPX_OK && count_descriptors() == descriptors + 1 && fine;
        _exit(fine ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && status == 0, "child: %#x", status);
    drop_all(&all);
}

int main(void)
{
    test_starved_server(); /* first: the child's server must be the only thread there */
    test_allocations(false);
    test_allocations(true);
    test_starved_client();
    return check_done();
}
