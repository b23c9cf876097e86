/*
 * CPU memory as a device: a window is a memfd, mapped shared, so that it has no name in any file system and vanishes
 * with its last user. Pages come zeroed, when first touched.
 */
#include "device/device.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/fail.h"

#define PAGE ((size_t)4096)
#define HUGE_PAGE ((size_t)2 << 20)

/* A descriptor that a peer got may not be used to shrink the memory under its owner: reading past a file's end kills.
 */
#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

static epx_status_t cpu_open(int ordinal, epx__device_t **device)
{
    if (ordinal > 0)
        return epx__fail(EPX_E_INVALID, "device %d: the CPU backend has only device 0", ordinal);
    epx__device_t *made = epx__calloc(1, sizeof *made);
    if (!made)
        return epx__fail(EPX_E_NOMEM, "no memory for a device object");
    made->ops = &epx__device_cpu;
    made->ordinal = -1;
    *device = made;
    return EPX_OK;
}

static void cpu_close(epx__device_t *device)
{
    epx__free(device);
}

/*
 * Map shared at a huge page's boundary, and ask for huge pages where the kernel gives them to shared memory
 * (/sys/kernel/mm/transparent_hugepage/shmem_enabled: advise). Worth little: row copies were 2 to 4 % faster in
 * anonymous huge pages; first touch of 512 MiB takes 131072 faults without, 0.3 s. Harmless elsewhere.
 */
static void *map_shared(int fd, size_t bytes)
{
    size_t room = bytes + HUGE_PAGE;
    char *hint = MAP_FAILED;
    if (bytes >= HUGE_PAGE && room > bytes)
        hint = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (hint == MAP_FAILED)
        return mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    char *base = (char *)(((uintptr_t)hint + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1));
    void *mapped = mmap(base, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, fd, 0);
    if (mapped == MAP_FAILED) {
        int error = errno;
        munmap(hint, room);
        errno = error;
        return MAP_FAILED;
    }
    if (base > hint)
        munmap(hint, (size_t)(base - hint));
    munmap(base + bytes, (size_t)(hint + room - (base + bytes)));
    (void)madvise(base, bytes, MADV_HUGEPAGE);
    return mapped;
}

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008u /* Linux 6.3; some systems insist on it */
#endif

static int make_memory_file(void)
{
    int fd = memfd_create("epx", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    return fd < 0 && errno == EINVAL ? memfd_create("epx", MFD_CLOEXEC | MFD_ALLOW_SEALING) : fd;
}

static epx_status_t cpu_window_alloc(epx__device_t *device, size_t bytes, epx__window_t *window)
{
    (void)device;
    if (bytes == 0 || bytes > SIZE_MAX / 2)
        return epx__fail(EPX_E_INVALID, "window of %zu bytes: must be 1 to %zu", bytes, SIZE_MAX / 2);
    size_t rounded = (bytes + PAGE - 1) & ~(PAGE - 1);
    if (epx__alloc_fault())
        return epx__fail(EPX_E_NOMEM, "no memory for a window of %zu bytes", rounded);
    int fd = make_memory_file();
    if (fd < 0)
        return epx__fail(EPX_E_SYSTEM, "memfd_create for a window: %s", strerror(errno));
    void *base = MAP_FAILED;
    if (ftruncate(fd, (off_t)rounded) == 0 && fcntl(fd, F_ADD_SEALS, SEALS) == 0)
        base = map_shared(fd, rounded);
    if (base == MAP_FAILED) {
        int error = errno;
        close(fd);
        return epx__fail(error == ENOMEM || error == EFBIG ? EPX_E_NOMEM : EPX_E_SYSTEM,
                         "window of %zu bytes of shared memory: %s", rounded, strerror(error));
    }
    *window = (epx__window_t){.base = base, .bytes = rounded, .fd = fd, .backend = NULL};
    return EPX_OK;
}

static void cpu_window_free(epx__device_t *device, epx__window_t *window)
{
    (void)device;
    if (window->base)
        munmap(window->base, window->bytes);
    if (window->fd >= 0)
        close(window->fd);
    *window = (epx__window_t){.base = NULL, .bytes = 0, .fd = -1, .backend = NULL};
}

static epx_status_t cpu_window_export(epx__device_t *device, const epx__window_t *window, epx__export_t *export_)
{
    (void)device;
    (void)window;
    export_->blob_kind = EPX__BLOB_NONE; /* the descriptor is all there is */
    return EPX_OK;
}

static epx_status_t cpu_window_map(epx__device_t *device, const epx__export_t *export_, int fd, void **mapped)
{
    (void)device;
    if (fd < 0)
        return epx__fail(EPX_E_UNSUPPORTED, "a window in another host's CPU memory cannot be mapped");
    if (epx__alloc_fault())
        return epx__fail(EPX_E_NOMEM, "no memory to map a peer's window");
    struct stat file;
    if (fstat(fd, &file) != 0)
        return epx__fail(EPX_E_SYSTEM, "fstat of a peer's window: %s", strerror(errno));
    int seals = fcntl(fd, F_GET_SEALS);
    if (export_->bytes == 0 || export_->bytes > SIZE_MAX / 2 || export_->bytes % PAGE != 0 || file.st_size < 0 ||
        (uint64_t)file.st_size < export_->bytes || seals < 0 || !(seals & F_SEAL_SHRINK))
        return epx__fail(EPX_E_PEER,
                         "a peer's window claims %llu bytes, its descriptor has %lld (seals %d): not a window of epx",
                         (unsigned long long)export_->bytes, (long long)file.st_size, seals);
    void *base = map_shared(fd, (size_t)export_->bytes);
    if (base == MAP_FAILED)
        return epx__fail(errno == ENOMEM ? EPX_E_NOMEM : EPX_E_SYSTEM, "mapping a peer's window of %llu bytes: %s",
                         (unsigned long long)export_->bytes, strerror(errno));
    *mapped = base;
    return EPX_OK;
}

static void cpu_window_unmap(epx__device_t *device, const epx__export_t *export_, void *mapped)
{
    (void)device;
    munmap(mapped, (size_t)export_->bytes);
}

static epx_status_t cpu_window_attach(epx__device_t *device, const epx__export_t *export_, void **mapped)
{
    (void)device;
    *mapped = (void *)(uintptr_t)export_->pointer;
    return EPX_OK;
}

static epx_status_t cpu_copy(epx__device_t *device, void *to, const void *from, size_t bytes)
{
    (void)device;
    if (bytes > 0)
        memcpy(to, from, bytes);
    return EPX_OK;
}

static epx_status_t cpu_check_pointer(epx__device_t *device, const void *pointer, const char *what)
{
    (void)device;
    if (!pointer)
        return epx__fail(EPX_E_INVALID, "%s is NULL: memory of this process is needed", what);
    return EPX_OK;
}

static epx_status_t cpu_host_pin(epx__device_t *device, void *base, size_t bytes)
{
    (void)device;
    (void)base;
    (void)bytes;
    return EPX_OK;
}

static void cpu_host_unpin(epx__device_t *device, void *base)
{
    (void)device;
    (void)base;
}

static epx_status_t cpu_words_alloc(epx__device_t *device, size_t count, uint64_t **words)
{
    (void)device;
    *words = epx__calloc(count, sizeof **words);
    return *words ? EPX_OK : epx__fail(EPX_E_NOMEM, "no memory for %zu words", count);
}

static void cpu_words_free(epx__device_t *device, uint64_t *words)
{
    (void)device;
    epx__free(words);
}

const epx__device_ops_t epx__device_cpu = {
    .name = "cpu",
    .backend = EPX_BACKEND_CPU,
    .open = cpu_open,
    .close = cpu_close,
    .window_alloc = cpu_window_alloc,
    .window_free = cpu_window_free,
    .window_export = cpu_window_export,
    .window_map = cpu_window_map,
    .window_unmap = cpu_window_unmap,
    .window_attach = cpu_window_attach,
    .copy_in = cpu_copy,
    .copy_out = cpu_copy,
    .check_pointer = cpu_check_pointer,
    .host_pin = cpu_host_pin,
    .host_unpin = cpu_host_unpin,
    .words_alloc = cpu_words_alloc,
    .words_free = cpu_words_free,
};
