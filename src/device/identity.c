/*
 * Who we are: this kernel, this process. Two ranks may use each other's pointers only when both numbers are equal, so a
 * child after fork must never pass for its parent.
 */
#include "device/identity.h"
#include "device/device.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/fail.h"

epx_status_t epx__random_fill(void *out, size_t bytes)
{
    size_t done = 0;
    while (done < bytes) {
        ssize_t got = getrandom((char *)out + done, bytes - done, 0);
        if (got > 0)
            done += (size_t)got;
        else if (got < 0 && errno != EINTR)
            return epx__fail(EPX_E_SYSTEM, "getrandom: %s: no random numbers for tokens", strerror(errno));
    }
    return EPX_OK;
}

static uint64_t mix(uint64_t hash, const void *data, size_t bytes)
{
    const unsigned char *byte = data;
    for (size_t i = 0; i < bytes; i++)
        hash = (hash ^ byte[i]) * 0x100000001b3u; /* FNV-1a */
    return hash;
}

#define FNV_START 0xcbf29ce484222325u

static uint64_t host_found; /* 0: not yet; settled once, since what it is read from may be out of reach later */

/* Without /proc the host's name is the next best. A lack of descriptors is no lack of /proc: the same host would have
 * two numbers. */
epx_status_t epx__host_id_find(void)
{
    char text[64];
    if (__atomic_load_n(&host_found, __ATOMIC_ACQUIRE) != 0)
        return EPX_OK;
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    if (fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM))
        return epx__fail(EPX_E_SYSTEM, "reading which host this is: %s", strerror(errno));
    ssize_t got = fd >= 0 ? read(fd, text, sizeof text) : -1;
    if (fd >= 0)
        close(fd);
    struct utsname name;
    uint64_t found = FNV_START;
    if (got > 0)
        found = mix(FNV_START, text, (size_t)got);
    else if (uname(&name) == 0)
        found = mix(FNV_START, name.nodename, strlen(name.nodename));
    __atomic_store_n(&host_found, found ? found : 1, __ATOMIC_RELEASE);
    return EPX_OK;
}

uint64_t epx__host_id(void)
{
    (void)epx__host_id_find();
    return __atomic_load_n(&host_found, __ATOMIC_ACQUIRE);
}

/*
 * The process id lies in a page that the kernel empties in a child (MADV_WIPEONFORK), so that the child draws anew
 * without any handler of ours. Where that is refused, the pid is mixed in: it differs from the parent's too.
 */
static uint64_t *identity_page; /* set once, never freed */
static uint64_t fallback_seed;

static uint64_t random_u64(void)
{
    uint64_t number = 0;
    if (getrandom(&number, sizeof number, 0) != (ssize_t)sizeof number) {
        uint64_t mess[3] = {epx__now_ns(), (uint64_t)getpid(), (uint64_t)(uintptr_t)&number};
        number = mix(FNV_START, mess, sizeof mess);
    }
    return number ? number : 1;
}

/* Set *word if it is 0; the value it has then. */
static uint64_t settle(uint64_t *word)
{
    uint64_t have = __atomic_load_n(word, __ATOMIC_ACQUIRE);
    if (have != 0)
        return have;
    uint64_t drawn = random_u64();
    return __atomic_compare_exchange_n(word, &have, drawn, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE) ? drawn : have;
}

static uint64_t *wiped_page(void)
{
    uint64_t *page = __atomic_load_n(&identity_page, __ATOMIC_ACQUIRE);
    if (page)
        return page;
    page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return NULL;
    uint64_t *none = NULL;
    if (madvise(page, 4096, MADV_WIPEONFORK) != 0 ||
        !__atomic_compare_exchange_n(&identity_page, &none, page, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        munmap(page, 4096);
        return none; /* another thread's page, or NULL */
    }
    return page;
}

uint64_t epx__process_id(void)
{
    uint64_t *page = wiped_page();
    if (page)
        return settle(page);
    pid_t pid = getpid();
    return mix(settle(&fallback_seed), &pid, sizeof pid);
}
