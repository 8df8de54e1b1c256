/*
 * Just enough of a xenstore client to be shut down politely: watch control/shutdown, and when it says
 * poweroff, halt or reboot, write it back empty (the acknowledgement toolstacks wait for) and do it.
 * Protocol: xen/include/public/io/xs_wire.h.
 */
#include "tiny.h"

static const char path[] = "control/shutdown"; /* its final zero is part of each message */

static volatile struct store *ring;
static u32 ring_port;

static void send_bytes(const void *from, u32 size)
{
    const u8 *bytes = from;

    while (size--) {
        while (ring->req_prod - ring->req_cons >= sizeof(ring->req)) {
            notify(ring_port);
            poll_ports();
        }
        ring->req[ring->req_prod % sizeof(ring->req)] = *bytes++;
        barrier();
        ring->req_prod = ring->req_prod + 1;
    }
}

static void receive_bytes(void *to, u32 size)
{
    u8 *bytes = to;

    while (size--) {
        while (ring->rsp_cons == ring->rsp_prod) {
            notify(ring_port);
            poll_ports();
        }
        *bytes++ = ring->rsp[ring->rsp_cons % sizeof(ring->rsp)];
        barrier();
        ring->rsp_cons = ring->rsp_cons + 1;
    }
}

static void send_message(u32 type, const char *tail, u32 tail_size)
{
    struct store_header header = { type, type, 0, sizeof(path) + tail_size };

    send_bytes(&header, sizeof(header));
    send_bytes(path, sizeof(path));
    send_bytes(tail, tail_size);
    notify(ring_port);
}

/* One message; at most `room - 1` bytes of it are kept, and a zero is put behind them. */
static u32 receive_message(char *body, u32 room)
{
    struct store_header header;
    u32 i;

    receive_bytes(&header, sizeof(header));
    for (i = 0; i < header.len; i++) {
        char c;

        receive_bytes(&c, 1);
        if (i < room - 1)
            body[i] = c;
    }
    body[header.len < room - 1 ? header.len : room - 1] = 0;
    notify(ring_port);
    return header.type;
}

static int starts_with(const char *text, const char *start)
{
    while (*start)
        if (*text++ != *start++)
            return 0;
    return 1;
}

static void obey(const char *request)
{
    u32 reason = starts_with(request, "reboot") ? SHUTDOWN_REBOOT : SHUTDOWN_POWEROFF;

    if (reason == SHUTDOWN_POWEROFF && !starts_with(request, "poweroff") && !starts_with(request, "halt"))
        return; /* nothing asked yet, or something this guest does not do */
    send_message(XS_WRITE, "", 0);
    print("XTOOL-TINY-ASKED ");
    print(request);
    print("\n");
    for (;;) { /* until the write is acknowledged, so that it is seen before the guest is gone */
        char body[64];
        u32 type = receive_message(body, sizeof(body));

        if (type == XS_WRITE || type == XS_ERROR)
            shut_down(reason);
    }
}

void store_start(struct store *store, u32 port)
{
    ring = store;
    ring_port = port;
    send_message(XS_WATCH, "t", 2);
}

int store_has_input(void)
{
    return ring->rsp_cons != ring->rsp_prod;
}

/* Handle what has arrived. The watch fires once when it is set, so the first read follows by itself. */
void store_handle(void)
{
    while (store_has_input()) {
        char body[64];
        u32 type = receive_message(body, sizeof(body));

        if (type == XS_WATCH_EVENT)
            send_message(XS_READ, "", 0);
        else if (type == XS_READ)
            obey(body);
    }
}
