/*
 * Which way leads to a peer's window: descriptor, or the backend's own handle. On a device of paper whose windows are
 * the CPU's and whose handle names the exporter's descriptor under /proc, so that it really maps; its first byte is 0.
 * The exporter is a process of its own.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/fail.h"
#include "common/check.h"
#include "device/device.h"

#define BYTES ((size_t)1 << 16)
#define WORD 0x1122334455667788u

static int by_descriptor, by_handle; /* ways tried */
static epx__device_ops_t paper;      /* as the CPU's, but for the two below */

typedef struct paper_handle {
    uint8_t zero[8]; /* a handle may begin with anything */
    int32_t pid, fd;
} paper_handle_t;

static epx_status_t paper_export(epx__device_t *device, const epx__window_t *window, epx__export_t *export_)
{
    (void)device;
    paper_handle_t handle = {.pid = (int32_t)getpid(), .fd = window->fd};
    memcpy(export_->blob, &handle, sizeof handle);
    export_->blob_kind = EPX__BLOB_FABRIC;
    return EPX_OK;
}

static epx_status_t paper_map(epx__device_t *device, const epx__export_t *export_, int fd, void **mapped)
{
    paper_handle_t handle;
    char path[64];
    if (fd >= 0) {
        by_descriptor++;
        return epx__device_cpu.window_map(device, export_, fd, mapped);
    }
    by_handle++;
    if (export_->blob_kind != EPX__BLOB_FABRIC)
        return epx__fail(EPX_E_UNSUPPORTED, "paper: refused there, %d", (int)export_->blob_refused);
    memcpy(&handle, export_->blob, sizeof handle);
    snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)handle.pid, (int)handle.fd);
    fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return epx__fail(EPX_E_UNSUPPORTED, "paper: %s is gone", path);
    epx_status_t status = epx__device_cpu.window_map(device, export_, fd, mapped);
    close(fd);
    return status;
}

/* ---- the exporter ---- */

static int exporter(int out, int in)
{
    epx__device_t *device;
    epx__fdserver_t *server;
    epx__window_t window;
    epx__export_t exported;
    char end;
    if (epx__device_cpu.open(-1, &device) != EPX_OK || epx__fdserver_open(&server) != EPX_OK)
        return 1;
    device->ops = &paper;
    if (epx__window_create(device, server, BYTES, &window, &exported) != EPX_OK)
        return 2;
    *(uint64_t *)window.base = WORD;
    if (write(out, &exported, sizeof exported) != (ssize_t)sizeof exported || read(in, &end, 1) != 0)
        return 3;
    epx__window_destroy(device, server, &window, &exported);
    epx__fdserver_close(server);
    device->ops->close(device);
    return 0;
}

/* ---- the importer ---- */

typedef struct way {
    const char *name;
    epx__handles_t handles;
    bool other_host, no_descriptor, other_socket, no_handle, refused;
    epx_status_t status;
    int by_descriptor, by_handle; /* how often the device is asked */
    const char *words;            /* of the failure */
} way_t;

#define FD EPX__HANDLES_FD
#define FABRIC EPX__HANDLES_FABRIC
#define NO EPX_E_UNSUPPORTED
static const way_t ways[] = {
    {.name = "one host", .by_descriptor = 1},
    {.name = "one host, fd", .handles = FD, .by_descriptor = 1},
    {.name = "one host, fabric", .handles = FABRIC, .by_handle = 1},
    {.name = "no handle", .no_handle = true, .by_descriptor = 1},
    {.name = "no descriptor", .no_descriptor = true, .by_handle = 1},
    {.name = "another network namespace", .other_socket = true, .by_handle = 1},
    {.name = "the same, fd", .handles = FD, .other_socket = true, .status = NO, .words = "nobody passes descriptors"},
    {.name = "the same, no handle", .no_handle = true, .other_socket = true, .status = NO, .words = "nobody passes"},
    {.name = "fabric, never made", .handles = FABRIC, .no_handle = true, .status = NO, .words = "neither"},
    {.name = "fabric, refused there",
     .handles = FABRIC,
     .refused = true,
     .status = NO,
     .by_handle = 1,
     .words = "there, 801"},
    {.name = "another host", .other_host = true, .by_handle = 1},
    {.name = "another host, fd", .handles = FD, .other_host = true, .status = NO, .words = "EPX_CUDA_HANDLES=fd"},
    {.name = "another host, fabric", .handles = FABRIC, .other_host = true, .by_handle = 1},
    {.name = "another host, no handle", .other_host = true, .no_handle = true, .status = NO, .words = "another host"},
    {.name = "another host, refused",
     .other_host = true,
     .refused = true,
     .status = NO,
     .by_handle = 1,
     .words = "801"},
};

static void try_way(epx__device_t *device, const way_t *way, const epx__export_t *right)
{
    epx__export_t export_ = *right;
    void *mapped = NULL;
    export_.host += way->other_host;
    if (way->no_descriptor)
        export_.key = 0;
    if (way->other_socket)
        export_.socket[6] = export_.socket[6] == 'a' ? 'b' : 'a';
    if (way->no_handle || way->refused)
        export_.blob_kind = EPX__BLOB_NONE;
    if (way->refused)
        export_.blob_refused = 801;
    bool passed = !way->other_socket || way->no_handle || way->refused; /* where no handle leads, nobody asks */
    CHECK(epx__window_shares_host(&export_, 1000) == (!way->other_host && passed), "%s: memory of the host", way->name);
    device->handles = way->handles;
    by_descriptor = by_handle = 0;
    epx_status_t status = epx__window_import(device, &export_, 1000, &mapped);
    CHECK(status == way->status, "%s: %d: %s", way->name, (int)status, epx__detail());
    CHECK(by_descriptor == way->by_descriptor && by_handle == way->by_handle, "%s: %d by descriptor, %d by handle",
          way->name, by_descriptor, by_handle);
    CHECK(status == EPX_OK || (way->words && strstr(epx__detail(), way->words)), "%s: %s", way->name, epx__detail());
    CHECK((mapped != NULL) == (status == EPX_OK), "%s: output on success only", way->name);
    if (!mapped)
        return;
    CHECK(*(uint64_t *)mapped == WORD, "%s: other memory", way->name);
    epx__window_unimport(device, &export_, mapped);
}

int main(void)
{
    int up[2], down[2], status = -1;
    epx__export_t exported;
    epx__device_t *device;
    paper = epx__device_cpu;
    paper.window_export = paper_export;
    paper.window_map = paper_map;
    CHECK(pipe2(up, O_CLOEXEC) == 0 && pipe2(down, O_CLOEXEC) == 0, "pipes");
    pid_t child = fork();
    if (child == 0) {
        close(down[1]);
        _exit(exporter(up[1], down[0]));
    }
    CHECK(read(up[0], &exported, sizeof exported) == (ssize_t)sizeof exported, "no export came");
    CHECK(exported.blob[0] == 0 && exported.blob_kind == EPX__BLOB_FABRIC, "a handle that begins with 0 is one");
    CHECK(epx__device_cpu.open(-1, &device) == EPX_OK && device->handles == EPX__HANDLES_AUTO, "%s", epx__detail());
    device->ops = &paper;
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++)
        try_way(device, &ways[i], &exported);
    device->ops->close(device);
    close(down[1]);
    CHECK(waitpid(child, &status, 0) == child && status == 0, "exporter: %#x", status);
    return check_done();
}
