/*
 * The two messages of the fd server (fdserver.c) and its client (fdfetch.c), over an abstract SOCK_SEQPACKET socket:
 * one request, one reply, then the connection ends. A reply with status EPX_OK carries exactly one descriptor.
 */
#ifndef EPX_DEVICE_FDSERVER_H
#define EPX_DEVICE_FDSERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/un.h>

#define EPX__FD_REQUEST_MAGIC 0x71667865u /* "exfq" */
#define EPX__FD_REPLY_MAGIC 0x72667865u   /* "exfr" */

typedef struct epx__fd_request {
    uint32_t magic;
    uint32_t spare;
    uint64_t key;
    uint8_t token[16];
} epx__fd_request_t;

typedef struct epx__fd_reply {
    uint32_t magic;
    int32_t status; /* epx_status_t */
} epx__fd_reply_t;

/* Room for one descriptor beside a message, aligned as the kernel wants it. */
typedef union epx__fd_control {
    struct cmsghdr header;
    char bytes[CMSG_SPACE(sizeof(int))];
} epx__fd_control_t;

/* Address of an abstract name (text without the leading 0 byte); its length for bind and connect, 0 when it does not
 * fit. */
socklen_t epx__fd_address(const char *name, size_t name_room, struct sockaddr_un *address);

/* Is the process at the other end of the same user, or root? */
bool epx__fd_peer_allowed(int socket);

#endif
