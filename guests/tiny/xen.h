/*
 * The few parts of Xen's guest interface the tiny guest uses. Numbers are those of xen/include/public:
 * xen.h, sched.h, event_channel.h, memory.h, vcpu.h, hvm/hvm_op.h, hvm/params.h, io/console.h,
 * arch-x86/hvm/start_info.h. `unsigned long` is as wide as the guest, as in those headers.
 */
#ifndef TINY_XEN_H
#define TINY_XEN_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define PAGE_SIZE 4096
#define DOMID_SELF 0x7ff0

/* Hypercall numbers. */
#define HC_MEMORY_OP 12
#define HC_UPDATE_VA_MAPPING 14
#define HC_VCPU_OP 24
#define HC_SCHED_OP 29
#define HC_EVENT_CHANNEL_OP 32
#define HC_HVM_OP 34

#define SCHEDOP_SHUTDOWN 2
#define SCHEDOP_POLL 3
#define SHUTDOWN_POWEROFF 0
#define SHUTDOWN_REBOOT 1
#define SHUTDOWN_CRASH 3
#define EVTCHNOP_SEND 4
#define VCPUOP_IS_UP 3
#define XENMEM_ADD_TO_PHYSMAP 7
#define HVMOP_GET_PARAM 1
#define HVM_PARAM_STORE_PFN 1
#define HVM_PARAM_STORE_EVTCHN 2
#define HVM_PARAM_CONSOLE_PFN 17
#define HVM_PARAM_CONSOLE_EVTCHN 18

struct sched_poll {
    u32 *ports;
    u32 nr_ports;
    u64 timeout;
};

struct hvm_param {
    u16 domid;
    u16 pad;
    u32 index;
    u64 value;
};

struct add_to_physmap {
    u16 domid;
    u16 size;
    u32 space;
    unsigned long idx;
    unsigned long gpfn;
};

/* The console ring: the guest reads `in` and writes `out`; indices run freely. */
struct console {
    char in[1024];
    char out[2048];
    u32 in_cons, in_prod, out_cons, out_prod;
};

/* The xenstore ring: the guest writes `req` and reads `rsp`. */
struct store {
    u8 req[1024];
    u8 rsp[1024];
    u32 req_cons, req_prod, rsp_cons, rsp_prod;
};

struct store_header {
    u32 type, req_id, tx_id, len;
};

#define XS_READ 2
#define XS_WATCH 4
#define XS_WRITE 11
#define XS_WATCH_EVENT 15
#define XS_ERROR 16

/* Event channels: a bit per port behind the 32 vcpu_info of 64 bytes each. */
#define SHARED_INFO_EVTCHN_PENDING 2048

/* PV: what %rsi points to at the start. */
struct start_info {
    char magic[32];
    unsigned long nr_pages;
    unsigned long shared_info; /* machine address */
    u32 flags;
    unsigned long store_mfn;
    u32 store_evtchn;
    unsigned long console_mfn;
    u32 console_evtchn;
    unsigned long pt_base;
    unsigned long nr_pt_frames;
    unsigned long mfn_list; /* virtual address of the p2m */
    unsigned long mod_start;
    unsigned long mod_len;
    char cmd_line[1024];
    unsigned long first_p2m_pfn;
    unsigned long nr_p2m_frames;
};

/* PVH: what %ebx points to at the start. */
struct hvm_start_info {
    u32 magic, version, flags, nr_modules;
    u64 modlist_paddr, cmdline_paddr, rsdp_paddr, memmap_paddr;
    u32 memmap_entries, reserved;
};

struct hvm_module {
    u64 paddr, size, cmdline_paddr, reserved;
};

struct hvm_memmap {
    u64 addr, size;
    u32 type, reserved;
};

#define HVM_START_MAGIC 0x336ec578

#endif
