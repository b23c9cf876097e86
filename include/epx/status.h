/*
 * Status codes. One table makes the enumerators, their names and their texts.
 */
#ifndef EPX_STATUS_H
#define EPX_STATUS_H

/* X(enumerator, value, text). Values are part of the ABI: append, never renumber. */
#define EPX_STATUS_MAP(X)                                                                                              \
    X(EPX_OK, 0, "success")                                                                                            \
    X(EPX_E_INVALID, 1, "an argument is wrong; nothing was done")                                                      \
    X(EPX_E_NOMEM, 2, "memory ran out")                                                                                \
    X(EPX_E_BUSY, 3, "a pool is used up (handles or leases); release one")                                             \
    X(EPX_E_TIMEOUT, 4, "a peer did not do its part before the deadline")                                              \
    X(EPX_E_PEER, 5, "a peer failed or is gone")                                                                       \
    X(EPX_E_MISMATCH, 6, "the ranks disagree (build, configuration, or order of operations)")                          \
    X(EPX_E_BROKEN, 7, "this object failed before; it can only be destroyed")                                          \
    X(EPX_E_UNSUPPORTED, 8, "not available on this machine or in this build")                                          \
    X(EPX_E_SYSTEM, 9, "the operating system refused a call")                                                          \
    X(EPX_E_DEVICE, 10, "the device or its driver refused a call")                                                     \
    X(EPX_E_NET, 11, "the network refused a call or lost a connection")                                                \
    X(EPX_E_OVERFLOW, 12, "more rows came than there is room for")                                                     \
    X(EPX_E_DATA, 13, "data that only the device knew was wrong (an expert id, say)")

typedef enum epx_status {
#define EPX__STATUS_ENUM(name, value, text) name = value,
    EPX_STATUS_MAP(EPX__STATUS_ENUM)
#undef EPX__STATUS_ENUM
} epx_status_t;

#endif
