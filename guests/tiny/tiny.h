/* What the parts of the tiny guest share. */
#ifndef TINY_H
#define TINY_H

#include "xen.h"

/* start-pv.S and start-pvh.S: call Xen. */
long hypercall(u32 number, unsigned long a, unsigned long b, unsigned long c, unsigned long d);

/* The shared info page, mapped by the platform's part. */
extern u8 shared_info[PAGE_SIZE];

/* pv.c or pvh.c: map what is needed, then report what the guest sees. */
struct platform {
    struct console *console;
    u32 console_port;
    struct store *store;
    u32 store_port;
};
void report(void);

/* main.c */
void run(const struct platform *platform) __attribute__((noreturn));
void print(const char *text);
void print_number(const char *label, u64 value);
void print_hex(const char *label, u32 value);
void shut_down(u32 reason) __attribute__((noreturn));
u32 adler32(const u8 *data, unsigned long size);

/* store.c */
void store_start(struct store *store, u32 port);
void store_handle(void);
int store_has_input(void);

/* main.c, for store.c */
void notify(u32 port);
void poll_ports(void);

#define barrier() __sync_synchronize()

#endif
