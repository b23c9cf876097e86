/*
 * GPU windows over a driver of paper (tests/emulate/cuda.h): which kinds of handles are asked for, what is left when
 * the driver refuses, what an export says, how a peer's is imported, in which words it fails. What a window takes is
 * counted, and is given back, whatever fails.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/fail.h"
#include "common/check.h"
#include "common/descriptors.h"
#include "device/cuda/cuda_device.h"

#define MIB ((size_t)1 << 20)
#define FD CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
#define FABRIC CU_MEM_HANDLE_TYPE_FABRIC

/* ---- the driver ---- */

static struct {
    int fabric, rdma;             /* attributes */
    CUresult refuse_fabric;       /* by create, when fabric handles are asked for */
    CUresult refuse_rdma, refuse; /* by create: RDMA; anything */
    CUresult refuse_grain;        /* the granularity of what has fabric handles */
    CUresult refuse_export;       /* of a fabric handle */
    CUresult refuse_import, refuse_access;
    int creates, asked_fabric;     /* calls; and those that asked for fabric handles */
    int types, rdma_given;         /* of the last that succeeded */
    int handles, ranges, mappings; /* alive */
    size_t bytes;
    int imported; /* the kind of the last import */
} paper;

static CUresult get_granularity(size_t *grain, const CUmemAllocationProp *p, CUmemAllocationGranularity_flags flags)
{
    (void)flags;
    *grain = p->requestedHandleTypes & FABRIC ? 4 * MIB : 2 * MIB;
    return p->requestedHandleTypes & FABRIC ? paper.refuse_grain : CUDA_SUCCESS;
}

static CUresult create(CUmemGenericAllocationHandle *handle, size_t bytes, const CUmemAllocationProp *p,
                       unsigned long long flags)
{
    (void)flags;
    paper.creates++;
    paper.asked_fabric += (p->requestedHandleTypes & FABRIC) != 0;
    CHECK(p->requestedHandleTypes & FD, "a descriptor is always asked for: %d", (int)p->requestedHandleTypes);
    CHECK(bytes % (p->requestedHandleTypes & FABRIC ? 4 * MIB : 2 * MIB) == 0, "%zu bytes", bytes);
    if (paper.refuse)
        return paper.refuse;
    if (paper.refuse_fabric && p->requestedHandleTypes & FABRIC)
        return paper.refuse_fabric;
    if (paper.refuse_rdma && p->allocFlags.gpuDirectRDMACapable)
        return paper.refuse_rdma;
    paper.types = (int)p->requestedHandleTypes;
    paper.rdma_given = p->allocFlags.gpuDirectRDMACapable;
    paper.bytes = bytes;
    paper.handles++;
    *handle = 77;
    return CUDA_SUCCESS;
}

static CUresult release(CUmemGenericAllocationHandle handle)
{
    CHECK(handle == 77 || handle == 78, "released: %llu", handle);
    paper.handles--;
    return CUDA_SUCCESS;
}

static CUresult export_handle(void *out, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType type,
                              unsigned long long flags)
{
    (void)flags;
    CHECK(handle == 77 && paper.types & (int)type, "exported as %d, asked for %d", (int)type, paper.types);
    if (type == FABRIC && paper.refuse_export)
        return paper.refuse_export;
    if (type == FABRIC) {
        memset(out, 0, sizeof(CUmemFabricHandle)); /* begins with 0, and has more of them */
        memset((char *)out + 40, 0x5a, 24);
    } else {
        int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
        memcpy(out, &fd, sizeof fd);
    }
    return CUDA_SUCCESS;
}

static CUresult import_handle(CUmemGenericAllocationHandle *handle, void *from, CUmemAllocationHandleType type)
{
    paper.imported = (int)type;
    if (paper.refuse_import)
        return paper.refuse_import;
    if (type == FABRIC)
        CHECK(((char *)from)[0] == 0 && ((char *)from)[40] == 0x5a && ((char *)from)[63] == 0x5a, "another handle");
    paper.handles++;
    *handle = 78;
    return CUDA_SUCCESS;
}

static CUresult reserve(CUdeviceptr *at, size_t bytes, size_t align, CUdeviceptr wish, unsigned long long flags)
{
    (void)align;
    (void)wish;
    (void)flags;
    void *memory = NULL;
    if (posix_memalign(&memory, 4096, bytes))
        return CUDA_ERROR_OUT_OF_MEMORY;
    paper.ranges++;
    *at = (CUdeviceptr)(uintptr_t)memory;
    return CUDA_SUCCESS;
}

static CUresult give_range(CUdeviceptr at, size_t bytes)
{
    (void)bytes;
    free((void *)(uintptr_t)at);
    paper.ranges--;
    return CUDA_SUCCESS;
}

static CUresult map(CUdeviceptr at, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle,
                    unsigned long long flags)
{
    (void)at;
    (void)handle;
    (void)flags;
    CHECK(bytes == paper.bytes && offset == 0, "%zu of %zu bytes mapped", bytes, paper.bytes);
    paper.mappings++;
    return CUDA_SUCCESS;
}

static CUresult unmap(CUdeviceptr at, size_t bytes)
{
    (void)at;
    (void)bytes;
    paper.mappings--;
    return CUDA_SUCCESS;
}

static CUresult set_access(CUdeviceptr at, size_t bytes, const CUmemAccessDesc *access, size_t count)
{
    (void)at;
    (void)bytes;
    (void)access;
    (void)count;
    return paper.refuse_access;
}

static CUresult attribute(int *value, CUdevice_attribute what, CUdevice device)
{
    (void)device;
    *value = what == CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED ? paper.fabric : paper.rdma;
    return CUDA_SUCCESS;
}

static CUresult text_of(CUresult result, const char **text)
{
    *text = result == CUDA_ERROR_NOT_PERMITTED ? "operation not permitted" : "refused on paper";
    return CUDA_SUCCESS;
}

const epx__cuda_driver_t *epx__cuda_driver(const char **why)
{
    static const epx__cuda_driver_t table = {create,        release,    get_granularity, export_handle,
                                             import_handle, reserve,    give_range,      map,
                                             unmap,         set_access, attribute,       text_of};
    if (why)
        *why = "paper";
    return &table;
}

/* What else windows.c takes from driver.c. */
epx_status_t epx__cuda_fail(cudaError_t error, const char *what)
{
    return epx__fail(EPX_E_DEVICE, "%s: %d", what, (int)error);
}
epx_status_t epx__cuda_driver_fail(CUresult result, const char *what)
{
    return epx__fail(result == CUDA_ERROR_OUT_OF_MEMORY ? EPX_E_NOMEM : EPX_E_DEVICE, "%s: %d", what, (int)result);
}
epx_status_t epx__cuda_enter(int ordinal, int *before)
{
    *before = ordinal;
    return EPX_OK;
}
void epx__cuda_leave(int ordinal, int before)
{
    (void)ordinal;
    (void)before;
}

/* ---- the tests ---- */

typedef struct one {
    epx__cuda_device_t device;
    epx__window_t window;
    epx__export_t exported;
} one_t;

static void start(one_t *one, epx__handles_t handles)
{
    memset(one, 0, sizeof *one);
    epx__cuda_fabric_look(&one->device, handles);
}

/* A window and its export; false when there is none. */
static bool make(one_t *one, size_t bytes)
{
    memset(&one->exported, 0, sizeof one->exported);
    if (epx__cuda_window_alloc(&one->device.base, bytes, &one->window) != EPX_OK)
        return false;
    const uint64_t *words = one->window.base;
    CHECK(one->window.bytes == paper.bytes && one->window.bytes >= bytes && one->window.fd >= 0, "%zu bytes, fd %d",
          one->window.bytes, one->window.fd);
    CHECK(words[0] == 0 && words[one->window.bytes / 8 - 1] == 0, "a new window is zeroed");
    one->exported.bytes = one->window.bytes;
    CHECK(epx__cuda_window_export(&one->device.base, &one->window, &one->exported) == EPX_OK, "%s", epx__detail());
    return true;
}

static void drop(one_t *one)
{
    epx__cuda_window_free(&one->device.base, &one->window);
    CHECK(paper.handles == 0 && paper.ranges == 0 && paper.mappings == 0, "%d handles, %d ranges, %d mappings are left",
          paper.handles, paper.ranges, paper.mappings);
}

static bool says(const one_t *one, const char *words)
{
    return strstr(one->device.base.windows_why, words) != NULL;
}

static void reset(void)
{
    memset(&paper, 0, sizeof paper);
    paper.fabric = paper.rdma = 1;
}

static void test_both(void)
{
    one_t one;
    reset();
    start(&one, EPX__HANDLES_AUTO);
    CHECK(make(&one, 100), "%s", epx__detail());
    CHECK(paper.types == (FD | FABRIC) && paper.rdma_given && paper.creates == 1, "types %d", paper.types);
    CHECK(one.window.bytes == 4 * MIB, "in units of what was asked for: %zu", one.window.bytes);
    CHECK(one.exported.blob_kind == EPX__BLOB_FABRIC && one.exported.blob_refused == 0 && one.exported.blob[63] == 0x5a,
          "no fabric handle");
    CHECK(says(&one, "by descriptor on one host, by fabric handle between hosts"), "%s", one.device.windows_why);
    void *mapped = NULL;
    CHECK(epx__cuda_window_map(&one.device.base, &one.exported, -1, &mapped) == EPX_OK && paper.imported == FABRIC,
          "%s", epx__detail());
    CHECK(mapped && paper.mappings == 2 && paper.handles == 1, "the mapping holds what was imported");
    epx__cuda_window_unmap(&one.device.base, &one.exported, mapped);
    CHECK(epx__cuda_window_map(&one.device.base, &one.exported, one.window.fd, &mapped) == EPX_OK &&
              paper.imported == FD,
          "%s", epx__detail());
    epx__cuda_window_unmap(&one.device.base, &one.exported, mapped);
    drop(&one);
    /* RDMA is what gives way, not the handles. */
    reset();
    paper.refuse_rdma = CUDA_ERROR_NOT_SUPPORTED;
    start(&one, EPX__HANDLES_FABRIC);
    CHECK(make(&one, 5 * MIB) && paper.types == (FD | FABRIC) && !paper.rdma_given, "types %d", paper.types);
    CHECK(one.window.bytes == 8 * MIB && says(&one, "as EPX_CUDA_HANDLES asks"), "%s", one.device.windows_why);
    drop(&one);
}

/* Without: never asked for, or refused, once. */
static void test_fallback(void)
{
    static const struct {
        epx__handles_t handles;
        int fabric;
        CUresult refuse, refuse_grain, refuse_export;
        int asked; /* for two windows */
        const char *words, *peer;
    } cases[] = {
        {EPX__HANDLES_FD, 1, 0, 0, 0, 0, "by descriptor, as EPX_CUDA_HANDLES asks", "EPX_CUDA_HANDLES=fd there"},
        {EPX__HANDLES_AUTO, 0, 0, 0, 0, 0, "no fabric handles: the GPU or its driver has none", "has none"},
        {EPX__HANDLES_AUTO, 1, CUDA_ERROR_NOT_PERMITTED, 0, 0, 2, "not permitted (800), no IMEX channel", "IMEX"},
        {EPX__HANDLES_FABRIC, 1, CUDA_ERROR_NOT_SUPPORTED, 0, 0, 2, "EPX_CUDA_HANDLES asks for: the driver refused",
         "801"},
        {EPX__HANDLES_AUTO, 1, CUDA_ERROR_INVALID_VALUE, 0, 0, 2, "refused on paper (1)", "refused on paper (1)"},
        {EPX__HANDLES_AUTO, 1, 0, CUDA_ERROR_INVALID_VALUE, 0, 0, "refused on paper (1)", "refused on paper (1)"},
        {EPX__HANDLES_AUTO, 1, 0, 0, CUDA_ERROR_NOT_PERMITTED, 1, "IMEX", "IMEX"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        one_t one;
        reset();
        paper.fabric = cases[i].fabric;
        paper.refuse_fabric = cases[i].refuse;
        paper.refuse_grain = cases[i].refuse_grain;
        paper.refuse_export = cases[i].refuse_export;
        start(&one, cases[i].handles);
        for (int again = 0; again < 2; again++) {
            void *mapped = NULL;
            CHECK(make(&one, MIB), "case %zu: %s", i, epx__detail());
            CHECK(one.exported.blob_kind == EPX__BLOB_NONE && one.exported.blob_refused != 0, "case %zu", i);
            CHECK(says(&one, cases[i].words), "case %zu: %s", i, one.device.windows_why);
            CHECK(epx__cuda_window_map(&one.device.base, &one.exported, -1, &mapped) == EPX_E_UNSUPPORTED && !mapped &&
                      strstr(epx__detail(), "has no fabric handle: ") && strstr(epx__detail(), cases[i].peer),
                  "case %zu: %s", i, epx__detail());
            CHECK(epx__cuda_window_map(&one.device.base, &one.exported, one.window.fd, &mapped) == EPX_OK,
                  "case %zu: %s", i, epx__detail());
            epx__cuda_window_unmap(&one.device.base, &one.exported, mapped);
            drop(&one);
        }
        CHECK(paper.asked_fabric == cases[i].asked, "case %zu: asked %d times", i, paper.asked_fabric);
    }
}

/* Memory that is short says nothing about handles: the next window asks again. */
static void test_short_of_memory(void)
{
    one_t one;
    reset();
    start(&one, EPX__HANDLES_AUTO);
    paper.refuse = CUDA_ERROR_OUT_OF_MEMORY;
    CHECK(!make(&one, MIB) && strstr(epx__detail(), "GPU memory for a window"), "%s", epx__detail());
    CHECK(epx__cuda_window_alloc(&one.device.base, MIB, &one.window) == EPX_E_NOMEM, "%s", epx__detail());
    drop(&one);
    paper.refuse = CUDA_SUCCESS;
    paper.refuse_fabric = CUDA_ERROR_OUT_OF_MEMORY; /* the larger unit was too much */
    CHECK(make(&one, MIB) && paper.types == FD && one.exported.blob_refused == CUDA_ERROR_OUT_OF_MEMORY, "%s",
          epx__detail());
    drop(&one);
    paper.refuse_fabric = CUDA_SUCCESS;
    CHECK(make(&one, MIB) && one.exported.blob_kind == EPX__BLOB_FABRIC, "it does not ask again");
    drop(&one);
}

/* A peer's handle that this process, or this GPU, may not use. */
static void test_refused_import(void)
{
    static const struct {
        CUresult import, access;
        epx_status_t status;
        const char *words;
    } cases[] = {{CUDA_ERROR_NOT_PERMITTED, 0, EPX_E_UNSUPPORTED, "one IMEX channel"},
                 {CUDA_ERROR_NOT_SUPPORTED, 0, EPX_E_UNSUPPORTED, "cannot be imported: refused on paper (801)"},
                 {CUDA_ERROR_OUT_OF_MEMORY, 0, EPX_E_NOMEM, "cannot be imported"},
                 {0, CUDA_ERROR_INVALID_VALUE, EPX_E_UNSUPPORTED, "cannot access the peer's GPU memory"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        one_t one;
        void *mapped = NULL;
        reset();
        start(&one, EPX__HANDLES_FABRIC);
        CHECK(make(&one, MIB), "%s", epx__detail());
        paper.refuse_import = cases[i].import;
        paper.refuse_access = cases[i].access;
        epx_status_t status = epx__cuda_window_map(&one.device.base, &one.exported, -1, &mapped);
        CHECK(status == cases[i].status && !mapped && strstr(epx__detail(), cases[i].words), "case %zu: %d: %s", i,
              (int)status, epx__detail());
        drop(&one);
    }
}

int main(void)
{
    int64_t live = epx__alloc_live();
    int descriptors = count_descriptors();
    test_both();
    test_fallback();
    test_short_of_memory();
    test_refused_import();
    CHECK(epx__alloc_live() == live && count_descriptors() == descriptors, "%lld allocations, %d descriptors left",
          (long long)(epx__alloc_live() - live), count_descriptors() - descriptors);
    return check_done();
}
