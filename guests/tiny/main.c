/*
 * The part of the tiny guest that PV and PVH have in common: the console, and the wait for commands.
 *
 * Console input: p powers off, r reboots, c crashes; anything else is echoed. A request in xenstore
 * (control/shutdown) is honoured too, see store.c.
 */
#include "tiny.h"

u8 shared_info[PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));

static struct platform me;

void notify(u32 port)
{
    hypercall(HC_EVENT_CHANNEL_OP, EVTCHNOP_SEND, (unsigned long)&port, 0, 0);
}

static void clear_pending(u32 port)
{
    u8 *byte = shared_info + SHARED_INFO_EVTCHN_PENDING + port / 8;

    __asm__ volatile("lock; andb %1, %0" : "+m"(*byte) : "q"((u8)~(1u << port % 8)) : "memory", "cc");
}

/*
 * Sleep until one of our ports fires. Xen returns at once if one is pending already, so: act on the rings,
 * sleep, clear, act again; what fires in between is not lost.
 */
void poll_ports(void)
{
    u32 ports[2] = { me.console_port, me.store_port };
    struct sched_poll poll = { ports, me.store ? 2 : 1, 0 };

    hypercall(HC_SCHED_OP, SCHEDOP_POLL, (unsigned long)&poll, 0, 0);
    clear_pending(me.console_port);
    if (me.store)
        clear_pending(me.store_port);
    barrier();
}

static void put(char c)
{
    volatile struct console *ring = me.console;

    while (ring->out_prod - ring->out_cons >= sizeof(ring->out)) {
        notify(me.console_port);
        poll_ports();
    }
    ring->out[ring->out_prod % sizeof(ring->out)] = c;
    barrier();
    ring->out_prod = ring->out_prod + 1;
    if (c == '\n')
        notify(me.console_port);
}

void print(const char *text)
{
    while (*text)
        put(*text++);
}

void print_number(const char *label, u64 value)
{
    char digits[24];
    int n = 0;

    print(label);
    do { /* divide by ten 32 bits at a time: there is no libgcc here for more */
        u32 high = value >> 32, low = value;
        u32 quotient_high = high / 10, rest = high % 10, quotient_low;

        __asm__("divl %4" : "=a"(quotient_low), "=d"(rest) : "0"(low), "1"(rest), "r"(10u) : "cc");
        digits[n++] = '0' + rest;
        value = (u64)quotient_high << 32 | quotient_low;
    } while (value);
    while (n)
        put(digits[--n]);
}

void print_hex(const char *label, u32 value)
{
    int shift;

    print(label);
    for (shift = 28; shift >= 0; shift -= 4)
        put("0123456789abcdef"[value >> shift & 15]);
}

/* As zlib's adler32(), so that a test can compare. */
u32 adler32(const u8 *data, unsigned long size)
{
    u32 a = 1, b = 0;

    while (size) {
        unsigned long part = size < 5552 ? size : 5552;

        size -= part;
        while (part--) {
            a += *data++;
            b += a;
        }
        a %= 65521;
        b %= 65521;
    }
    return b << 16 | a;
}

void shut_down(u32 reason)
{
    for (;;)
        hypercall(HC_SCHED_OP, SCHEDOP_SHUTDOWN, (unsigned long)&reason, 0, 0);
}

static void command(char c)
{
    if (c == 'p') {
        print("XTOOL-TINY-POWEROFF\n");
        shut_down(SHUTDOWN_POWEROFF);
    }
    if (c == 'r') {
        print("XTOOL-TINY-REBOOT\n");
        shut_down(SHUTDOWN_REBOOT);
    }
    if (c == 'c') {
        print("XTOOL-TINY-CRASH\n");
        shut_down(SHUTDOWN_CRASH);
    }
    put(c == '\r' ? '\n' : c);
}

void run(const struct platform *platform)
{
    volatile struct console *ring;
    u32 consumed;

    me.console = platform->console;
    me.console_port = platform->console_port;
    me.store = platform->store;
    me.store_port = platform->store_port;
    ring = me.console;

    report();
    if (me.store)
        store_start(me.store, me.store_port);
    for (;;) {
        consumed = ring->in_cons;
        while (ring->in_cons != ring->in_prod) {
            char c = ring->in[ring->in_cons % sizeof(ring->in)];

            ring->in_cons = ring->in_cons + 1;
            command(c);
        }
        if (ring->in_cons != consumed)
            notify(me.console_port);
        if (me.store)
            store_handle();
        /* Waiting for room in a ring may have taken the event of another one: look before sleeping. */
        if (ring->in_cons == ring->in_prod && !(me.store && store_has_input()))
            poll_ports();
    }
}
