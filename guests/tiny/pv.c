/* The PV part: everything comes from the start_info page. */
#include "tiny.h"

#define MACHINE_TO_PHYS ((const unsigned long *)0xffff800000000000ul)
#define INVALID_MFN (~0ul)

extern char hypercall_page[];

static const struct start_info *start;

static void *pfn_to_virt(unsigned long pfn)
{
    return (void *)(VIRT_BASE + pfn * PAGE_SIZE);
}

/* Each frame the p2m names must be ours, and Xen's own table must agree. */
static int p2m_is_right(void)
{
    const unsigned long *p2m = (const unsigned long *)start->mfn_list;
    unsigned long pfn;

    for (pfn = 0; pfn < start->nr_pages; pfn++)
        if (p2m[pfn] != INVALID_MFN && MACHINE_TO_PHYS[p2m[pfn]] != pfn)
            return 0;
    return 1;
}

static int vcpus(void)
{
    int n = 0;

    while (hypercall(HC_VCPU_OP, VCPUOP_IS_UP, n, 0, 0) >= 0)
        n++;
    return n;
}

void report(void)
{
    print("XTOOL-TINY-READY pv");
    print_number(" memory_kib=", (u64)start->nr_pages * 4);
    print_number(" vcpus=", vcpus());
    print_number(" ramdisk=", start->mod_len);
    print_hex(":", start->mod_len ? adler32((const u8 *)start->mod_start, start->mod_len) : 1);
    print(p2m_is_right() ? " p2m=ok" : " p2m=bad");
    print(" cmdline=");
    print(start->cmd_line);
    print("\n");
}

void pv_main(const struct start_info *info)
{
    struct platform platform;

    start = info;
    /* Present, writable, user (as all of a 64-bit PV guest is), accessed, dirty; 2: flush this address. */
    if (hypercall(HC_UPDATE_VA_MAPPING, (unsigned long)shared_info, info->shared_info | 0x67, 2, 0))
        shut_down(SHUTDOWN_CRASH);
    platform.console = pfn_to_virt(MACHINE_TO_PHYS[info->console_mfn]);
    platform.console_port = info->console_evtchn;
    platform.store = info->store_evtchn ? pfn_to_virt(MACHINE_TO_PHYS[info->store_mfn]) : 0;
    platform.store_port = info->store_evtchn;
    run(&platform);
}
