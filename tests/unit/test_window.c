/*
 * Windows: made, exported, imported by another process through the fd server, both directions; inside one process by
 * pointer; and refused in words with a wrong token, a wrong key, or a dead exporter. The server against garbage,
 * silence and clients that vanish. Nothing stays behind: no descriptor, no file, no memory.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/clock.h"
#include "base/fail.h"
#include "common/check.h"
#include "common/descriptors.h"
#include "common/slowness.h"
#include "device/device.h"
#include "device/fdserver.h"

#define BYTES ((size_t)3 << 20)

typedef struct end {
    epx__device_t *device;
    epx__fdserver_t *server;
    epx__window_t window;
    epx__export_t exported;
} end_t;

static bool open_end(end_t *end, size_t bytes)
{
    memset(end, 0, sizeof *end);
    return epx__device_cpu.open(-1, &end->device) == EPX_OK && epx__fdserver_open(&end->server) == EPX_OK &&
           epx__window_create(end->device, end->server, bytes, &end->window, &end->exported) == EPX_OK;
}

static void close_end(end_t *end)
{
    epx__window_destroy(end->device, end->server, &end->window, &end->exported);
    epx__fdserver_close(end->server);
    end->device->ops->close(end->device);
}

static void test_same_process(void)
{
    end_t end;
    CHECK(open_end(&end, BYTES - 100), "%s", epx__detail());
    CHECK(end.window.bytes == BYTES && end.exported.bytes == BYTES, "rounded up to pages: %zu", end.window.bytes);
    CHECK((uintptr_t)end.window.base % 4096 == 0, "page-aligned");
    const uint64_t *words = end.window.base;
    uint64_t any = 0;
    for (size_t i = 0; i < BYTES / 8; i++)
        any |= words[i];
    CHECK(any == 0, "a new window is zeroed");
    void *mapped = NULL;
    CHECK(epx__window_import(end.device, &end.exported, 1000, &mapped) == EPX_OK, "%s", epx__detail());
    CHECK(mapped == end.window.base, "inside one process it is the exporter's own pointer");
    epx__window_unimport(end.device, &end.exported, mapped);
    CHECK(words[7] == 0, "still mapped");
    close_end(&end);
    epx__window_destroy(NULL, NULL, &end.window, &end.exported); /* once more: nothing */
}

/* Ranks that are threads: a window outlives its owner's destroy while another rank has it. */
static void test_orphan(void)
{
    end_t end;
    CHECK(open_end(&end, BYTES), "%s", epx__detail());
    epx__export_t exported = end.exported;
    void *first = NULL, *second = NULL, *third = NULL;
    CHECK(epx__window_import(end.device, &exported, 1000, &first) == EPX_OK, "%s", epx__detail());
    CHECK(epx__window_import(end.device, &exported, 1000, &second) == EPX_OK, "%s", epx__detail());
    epx__window_destroy(end.device, end.server, &end.window, &end.exported);
    CHECK(epx__window_import(end.device, &exported, 1000, &third) == EPX_E_PEER && !third, "a destroyed window");
    memset(first, 1, BYTES);
    epx__window_unimport(end.device, &exported, first);
    memset(second, 2, BYTES); /* not unmapped before the last has let go */
    epx__window_unimport(end.device, &exported, second);
    epx__fdserver_close(end.server);
    end.device->ops->close(end.device);
}

/* ---- two processes: the child gets the parent's export over a pipe and sends its own ---- */

typedef struct link {
    int in, out;
} link_t;

static bool send_all(int fd, const void *data, size_t bytes)
{
    return write(fd, data, bytes) == (ssize_t)bytes;
}

static bool receive_all(int fd, void *data, size_t bytes)
{
    size_t done = 0;
    ssize_t got;
    while (done < bytes && (got = read(fd, (char *)data + done, bytes - done)) > 0)
        done += (size_t)got;
    return done == bytes;
}

/* Fork; links[0] is returned, the child runs main_ with the other end and exits with its answer. */
static pid_t start_child(int (*main_)(link_t link, const void *argument), const void *argument, link_t *link)
{
    int down[2], up[2];
    fflush(stdout);
    fflush(stderr);
    if (pipe2(down, O_CLOEXEC) != 0 || pipe2(up, O_CLOEXEC) != 0)
        return -1;
    pid_t child = fork();
    if (child == 0) {
        close(down[1]);
        close(up[0]);
        _exit(main_((link_t){.in = down[0], .out = up[1]}, argument));
    }
    close(down[0]);
    close(up[1]);
    *link = (link_t){.in = up[0], .out = down[1]};
    return child;
}

static int end_child(pid_t child, link_t *link)
{
    int status = -1;
    close(link->in);
    close(link->out);
    return waitpid(child, &status, 0) == child ? status : -1;
}

/* Import the peer's, write our pattern to its end, tell; then look for its pattern in ours. Both sides run this. */
static bool exchange(link_t link, end_t *end, uint64_t mine, uint64_t theirs)
{
    epx__export_t peer;
    void *mapped = NULL;
    char token = 0;
    if (!send_all(link.out, &end->exported, sizeof end->exported) || !receive_all(link.in, &peer, sizeof peer))
        return false;
    if (peer.host != end->exported.host || peer.process == end->exported.process)
        return false;
    if (epx__window_import(end->device, &peer, 2000, &mapped) != EPX_OK) {
        fprintf(stderr, "import: %s\n", epx__detail());
        return false;
    }
    uint64_t *far = mapped, *near = end->window.base;
    size_t last = (size_t)peer.bytes / 8 - 1;
    bool fine = far[0] == 0 && near[0] != theirs + 1 && mapped != end->window.base;
    __atomic_store_n(&far[1], mine, __ATOMIC_RELAXED);
    __atomic_store_n(&far[last], mine + 1, __ATOMIC_RELAXED);
    fine = send_all(link.out, &token, 1) && receive_all(link.in, &token, 1) && fine;
    fine = fine && __atomic_load_n(&near[1], __ATOMIC_RELAXED) == theirs;
    fine = fine && __atomic_load_n(&near[end->window.bytes / 8 - 1], __ATOMIC_RELAXED) == theirs + 1;
    epx__window_unimport(end->device, &peer, mapped);
    return fine;
}

static int exchange_child(link_t link, const void *argument)
{
    const uint64_t *parent_id = argument;
    if (epx__process_id() == *parent_id || epx__process_id() != epx__process_id())
        return 2; /* fork did not give a new number */
    end_t end;
    if (!open_end(&end, 2 * BYTES))
        return 3;
    bool fine = exchange(link, &end, 7000, 4000);
    close_end(&end);
    return fine ? 0 : 4;
}

static void test_two_processes(void)
{
    uint64_t id = epx__process_id();
    CHECK(id != 0 && id == epx__process_id(), "the process number stays");
    link_t link;
    pid_t child = start_child(exchange_child, &id, &link); /* before any thread of ours */
    end_t end;
    CHECK(open_end(&end, BYTES), "%s", epx__detail());
    CHECK(exchange(link, &end, 4000, 7000), "both directions");
    int status = end_child(child, &link);
    CHECK(status == 0, "child: %#x", status);
    close_end(&end);
}

/* ---- refusals, asked by a child so that nothing is taken as of one process ---- */

static bool refused(end_t *end, const epx__export_t *wrong, epx_status_t want, const char *words)
{
    enum { PATIENT_MS = 5000 };
    void *mapped = NULL;
    uint64_t start = epx__now_ns();
    epx_status_t status = epx__window_import(end->device, wrong, PATIENT_MS, &mapped);
    bool fine = status == want && mapped == NULL && strstr(epx__detail(), words) != NULL;
    if (!fine)
        fprintf(stderr, "status %d instead of %d: %s\n", status, want, epx__detail());
    return fine && (double)(epx__now_ns() - start) < well_before(PATIENT_MS, 1000) * 1e6;
}

static int refusals_child(link_t link, const void *argument)
{
    (void)argument;
    epx__export_t right, wrong;
    end_t end = {0};
    int failures = 0;
    if (epx__device_cpu.open(-1, &end.device) != EPX_OK || !receive_all(link.in, &right, sizeof right))
        return 100;
    for (int byte = 0; byte < 16; byte++) {
        wrong = right;
        wrong.token[byte] ^= 1;
        failures += !refused(&end, &wrong, EPX_E_PEER, "token");
    }
    wrong = right;
    wrong.key += 1000;
    failures += !refused(&end, &wrong, EPX_E_PEER, "no longer offers");
    wrong = right;
    wrong.bytes *= 2;
    failures += !refused(&end, &wrong, EPX_E_PEER, "claims");
    wrong = right;
    wrong.socket[6] = wrong.socket[6] == 'a' ? 'b' : 'a';
    failures += !refused(&end, &wrong, EPX_E_UNSUPPORTED, "nobody passes descriptors");
    wrong = right;
    wrong.host++;
    failures += !refused(&end, &wrong, EPX_E_UNSUPPORTED, "another host");
    wrong = right;
    wrong.key = 0;
    failures += !refused(&end, &wrong, EPX_E_UNSUPPORTED, "neither");
    wrong = right;
    memset(wrong.socket, 'x', sizeof wrong.socket); /* not terminated */
    failures += !refused(&end, &wrong, EPX_E_INVALID, "names no descriptor server");
    void *mapped = NULL;
    failures += epx__window_import(end.device, &right, 500, &mapped) != EPX_OK; /* and the right one works */
    int fd = -1;
    failures += epx__fd_fetch(&right, 500, &fd) != EPX_OK || !(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    failures += ftruncate(fd, 4096) == 0; /* sealed: nobody can cut it under its owner */
    close(fd);
    epx__window_unimport(end.device, &right, mapped);
    end.device->ops->close(end.device);
    return failures;
}

static void test_refusals(void)
{
    link_t link;
    pid_t child = start_child(refusals_child, NULL, &link);
    end_t end;
    CHECK(open_end(&end, BYTES), "%s", epx__detail());
    CHECK(send_all(link.out, &end.exported, sizeof end.exported), "pipe");
    int status = end_child(child, &link);
    CHECK(status == 0, "child: %#x: that many refusals were wrong", status);
    close_end(&end);
}

/* ---- an exporter that is killed ---- */

static int doomed_child(link_t link, const void *argument)
{
    (void)argument;
    end_t end;
    char token;
    if (!open_end(&end, BYTES))
        return 1;
    memset(end.window.base, 0x5a, 4096);
    (void)!send_all(link.out, &end.exported, sizeof end.exported);
    (void)receive_all(link.in, &token, 1); /* never comes */
    return 2;
}

static void test_killed_exporter(void)
{
    link_t link;
    end_t end = {0};
    epx__export_t peer;
    void *mapped = NULL;
    pid_t child = start_child(doomed_child, NULL, &link);
    CHECK(epx__device_cpu.open(-1, &end.device) == EPX_OK, "%s", epx__detail());
    CHECK(receive_all(link.in, &peer, sizeof peer), "no export came");
    CHECK(epx__window_import(end.device, &peer, 2000, &mapped) == EPX_OK, "%s", epx__detail());
    kill(child, SIGKILL);
    int status = end_child(child, &link);
    CHECK(WIFSIGNALED(status), "%#x", status);
    CHECK(((const uint8_t *)mapped)[100] == 0x5a, "memory that is mapped outlives its exporter");
    epx__window_unimport(end.device, &peer, mapped);
    CHECK(refused(&end, &peer, EPX_E_UNSUPPORTED, "gone"), "a dead exporter is noticed at once");
    end.device->ops->close(end.device);
}

/* ---- the server under bad clients ---- */

static int connect_to(const epx__export_t *exported)
{
    struct sockaddr_un address;
    socklen_t bytes = epx__fd_address(exported->socket, sizeof exported->socket, &address);
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (connect(fd, (struct sockaddr *)&address, bytes) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Of these connections, how many the server has not ended. */
static int held(const int *sockets, int count)
{
    int open = 0;
    char byte;
    for (int i = 0; i < count; i++)
        open += recv(sockets[i], &byte, 1, MSG_DONTWAIT) < 0 && errno == EAGAIN;
    return open;
}

/* How long an honest client takes beside silent ones, more than are held at once, and some that vanish. */
static uint64_t served_among_bad_ns(const epx__export_t *exported)
{
    enum { SILENT = 150, VANISHING = 200 };
    static int silent[SILENT];
    for (int i = 0; i < SILENT; i++)
        silent[i] = connect_to(exported);
    for (int i = 0; i < VANISHING; i++) {
        int fd = connect_to(exported);
        char garbage[200];
        memset(garbage, i, sizeof garbage);
        epx__fd_request_t request = {.magic = EPX__FD_REQUEST_MAGIC, .key = exported->key};
        memcpy(request.token, exported->token, sizeof request.token);
        if (i % 3 == 0) /* any length from 0, longer than a request too */
            (void)!send(fd, garbage, (size_t)i, MSG_NOSIGNAL);
        else if (i % 3 == 1) /* a good request, gone before its answer */
            (void)!send(fd, &request, sizeof request, MSG_NOSIGNAL);
        close(fd);
    }
    int got = -1;
    uint64_t start = epx__now_ns();
    CHECK(epx__fd_fetch(exported, 8000, &got) == EPX_OK, "an honest client beside them: %s", epx__detail());
    uint64_t took = epx__now_ns() - start;
    printf("honest client beside %d silent ones: %llu us\n", SILENT, (unsigned long long)took / 1000);
    if (got >= 0)
        close(got);
    for (int i = 0; i < SILENT; i++)
        if (silent[i] >= 0)
            close(silent[i]);
    return took;
}

/* How long it takes to end a server that has a silent client. */
static uint64_t closed_ns(void)
{
    end_t end;
    CHECK(open_end(&end, BYTES), "%s", epx__detail());
    int silent = connect_to(&end.exported), fd = -1;
    CHECK(epx__fd_fetch(&end.exported, 8000, &fd) == EPX_OK, "%s", epx__detail()); /* the silent one came before */
    close(fd);
    uint64_t start = epx__now_ns();
    close_end(&end);
    uint64_t took = epx__now_ns() - start;
    close(silent);
    return took;
}

static void test_bad_clients(void)
{
    end_t end;
    CHECK(open_end(&end, BYTES), "%s", epx__detail());
    /* If it had to wait until they are ended, after their second, it would have to every time. */
    uint64_t took = UINT64_MAX;
    for (int turn = 0; turn < 5 && took > 700000000u; turn++)
        took = served_among_bad_ns(&end.exported);
    CHECK(took < 700000000u, "silent clients do not give way: %llu ms", (unsigned long long)took / 1000000);
    /* A few silent ones, for whom there is room, are ended by the server all the same. */
    enum { FEW = 10 };
    int few[FEW];
    for (int i = 0; i < FEW; i++)
        CHECK((few[i] = connect_to(&end.exported)) >= 0, "connect");
    uint64_t start = epx__now_ns();
    while (held(few, FEW) > 0 && epx__now_ns() - start < 10000000000u)
        epx__sleep_ns(10000000);
    double seconds = (double)(epx__now_ns() - start) * 1e-9;
    CHECK(held(few, FEW) == 0 && seconds < well_before(10, 2), "%d silent connections are still open after %.1f s",
          held(few, FEW), seconds);
    for (int i = 0; i < FEW; i++)
        close(few[i]);
    close_end(&end);
    took = UINT64_MAX;
    for (int turn = 0; turn < 5 && took > 500000000u; turn++)
        took = closed_ns();
    CHECK(took < 500000000u, "closing waits for a client: %llu ms", (unsigned long long)took / 1000000);
}

/* A server that answers nothing, or nonsense: the fetch ends in words. */
static void test_bad_server(void)
{
    epx__export_t fake;
    memset(&fake, 0, sizeof fake);
    fake.key = 1;
    snprintf(fake.socket, sizeof fake.socket, "epx-test-%llx", (unsigned long long)epx__process_id());
    struct sockaddr_un address;
    socklen_t bytes = epx__fd_address(fake.socket, sizeof fake.socket, &address);
    int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    CHECK(bind(listener, (struct sockaddr *)&address, bytes) == 0 && listen(listener, 4) == 0, "listen");
    int fd = -1;
    uint64_t start = epx__now_ns();
    CHECK(epx__fd_fetch(&fake, 150, &fd) == EPX_E_TIMEOUT && fd == -1, "%s", epx__detail());
    uint64_t waited = epx__now_ns() - start;
    CHECK(waited >= 150000000u && (double)waited < 1e9 * slowness(), "waited %llu ms",
          (unsigned long long)waited / 1000000);
    close(listener);
}

/* A child that inherited a server closes it without touching its parent's. */
static void test_fork_and_close(void)
{
    end_t end;
    CHECK(open_end(&end, BYTES), "%s", epx__detail());
    pid_t child = fork();
    if (child == 0) {
        close_end(&end);
        _exit(0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && status == 0, "%#x", status);
    int fd = -1;
    CHECK(epx__fd_fetch(&end.exported, 1000, &fd) == EPX_OK, "the parent still serves: %s", epx__detail());
    close(fd);
    close_end(&end);
}

static void test_arguments(void)
{
    epx__device_t *device = NULL;
    epx__window_t window;
    CHECK(epx__device_cpu.open(3, &device) == EPX_E_INVALID && !device, "there is no CPU device 3");
    CHECK(epx__device_cpu.open(-1, &device) == EPX_OK, "%s", epx__detail());
    CHECK(device->ops->window_alloc(device, 0, &window) == EPX_E_INVALID, "a window of nothing");
    epx_status_t status = device->ops->window_alloc(device, SIZE_MAX / 4, &window);
    CHECK(status == EPX_E_NOMEM || status == EPX_E_SYSTEM, "a window larger than any address space: %d", status);
    CHECK(device->ops->check_pointer(device, NULL, "x") == EPX_E_INVALID && strstr(epx__detail(), "x is NULL"), "%s",
          epx__detail());
    CHECK(device->ops->check_pointer(device, &window, "x") == EPX_OK, "any memory serves");
    char from[3] = "ab", to[3] = "";
    CHECK(device->ops->copy_in(device, to, from, 3) == EPX_OK && to[1] == 'b', "copy");
    device->ops->close(device);
    epx__fdserver_close(NULL);
    CHECK(epx__host_id() == epx__host_id() && epx__host_id() != 0, "host number");
}

/* A host has one number, however few descriptors there are; without one that can be had, none. In a child that has not
 * asked yet. */
static void test_host_without_descriptors(void)
{
    pid_t child = fork();
    if (child == 0) {
        struct rlimit many, none;
        if (getrlimit(RLIMIT_NOFILE, &many))
            _exit(1);
        none = many;
        none.rlim_cur = 0;
        if (setrlimit(RLIMIT_NOFILE, &none))
            _exit(1);
        if (epx__host_id_find() != EPX_E_SYSTEM || !strstr(epx__detail(), "which host") || epx__host_id() != 0)
            _exit(2);
        if (setrlimit(RLIMIT_NOFILE, &many) || epx__host_id_find() != EPX_OK)
            _exit(3);
        uint64_t found = epx__host_id();
        if (setrlimit(RLIMIT_NOFILE, &none))
            _exit(1);
        _exit(found != 0 && epx__host_id() == found ? 0 : 4);
    }
    int end = -1;
    CHECK(child > 0 && waitpid(child, &end, 0) == child && WIFEXITED(end) && WEXITSTATUS(end) == 0, "ended with %d",
          WEXITSTATUS(end));
}

int main(void)
{
    test_host_without_descriptors();
    int shm = count_entries("/dev/shm"), descriptors = count_descriptors();
    int64_t live = epx__alloc_live();
    test_two_processes();
    test_refusals();
    test_killed_exporter();
    test_same_process();
    test_orphan();
    test_bad_clients();
    test_bad_server();
    test_fork_and_close();
    test_arguments();
    CHECK(count_descriptors() == descriptors, "%d descriptors, %d before", count_descriptors(), descriptors);
    CHECK(epx__alloc_live() == live, "%lld allocations left", (long long)(epx__alloc_live() - live));
    CHECK(count_entries("/dev/shm") <= shm, "something stayed in /dev/shm");
    return check_done();
}
