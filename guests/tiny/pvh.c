/* The PVH part: 32-bit, no paging; everything comes from hvm_start_info and HVM parameters. */
#include "tiny.h"

extern char hypercall_page[];

static const struct hvm_start_info *start;

static void *at(u64 paddr)
{
    return (void *)(unsigned long)paddr;
}

static void cpuid(u32 leaf, u32 out[4])
{
    __asm__ volatile("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(0));
}

static int set_up_hypercalls(void)
{
    u32 leaf, r[4];

    for (leaf = 0x40000000; leaf < 0x40010000; leaf += 0x100) {
        cpuid(leaf, r);
        if (r[1] == 0x566e6558 && r[2] == 0x65584d4d && r[3] == 0x4d4d566e) { /* XenVMMXenVMM */
            cpuid(leaf + 2, r);
            __asm__ volatile("wrmsr" : : "c"(r[1]), "a"((u32)hypercall_page), "d"(0) : "memory");
            return 1;
        }
    }
    return 0;
}

static u32 param(u32 index)
{
    struct hvm_param p = { DOMID_SELF, 0, index, 0 };

    return hypercall(HC_HVM_OP, HVMOP_GET_PARAM, (unsigned long)&p, 0, 0) ? 0 : (u32)p.value;
}

static u64 total_ram(void)
{
    const struct hvm_memmap *map = at(start->memmap_paddr);
    u64 total = 0;
    u32 i;

    for (i = 0; i < start->memmap_entries; i++)
        if (map[i].type == 1)
            total += map[i].size;
    return total;
}

static int sums_to_zero(const u8 *data, u32 size)
{
    u8 sum = 0;

    while (size--)
        sum += *data++;
    return sum == 0;
}

static void count_lapics(const u8 *madt, u32 *all, u32 *enabled)
{
    u32 size = *(const u32 *)(madt + 4), i;

    for (i = 44; i + 2 <= size && madt[i + 1] >= 2; i += madt[i + 1]) {
        if (madt[i] != 0 && madt[i] != 9) /* a local APIC, or a local x2APIC */
            continue;
        ++*all;
        *enabled += madt[i + (madt[i] ? 8 : 4)] & 1;
    }
}

/* Walk RSDP, XSDT and the tables it names, and check every sum. */
static const char *check_acpi(u32 *lapics, u32 *enabled)
{
    const u8 *rsdp = at(start->rsdp_paddr), *xsdt;
    u32 i;

    if (!start->rsdp_paddr)
        return "none";
    if (!sums_to_zero(rsdp, 20) || !sums_to_zero(rsdp, 36) || *(const u32 *)(rsdp + 28))
        return "bad-rsdp";
    xsdt = at(*(const u32 *)(rsdp + 24));
    if (*(const u32 *)xsdt != 0x54445358 || !sums_to_zero(xsdt, *(const u32 *)(xsdt + 4)))
        return "bad-xsdt";
    for (i = 36; i < *(const u32 *)(xsdt + 4); i += 8) {
        const u8 *table = at(*(const u32 *)(xsdt + i));

        if (!sums_to_zero(table, *(const u32 *)(table + 4)))
            return "bad-table";
        if (*(const u32 *)table == 0x43495041) /* APIC */
            count_lapics(table, lapics, enabled);
    }
    return "ok";
}

void report(void)
{
    const struct hvm_module *module = at(start->modlist_paddr);
    u32 lapics = 0, enabled = 0;
    const char *acpi = check_acpi(&lapics, &enabled);

    print("XTOOL-TINY-READY pvh");
    print_number(" memory_kib=", total_ram() >> 10);
    print_number(" memmap=", start->memmap_entries);
    print_number(" vcpus=", enabled);
    print_number(" lapics=", lapics);
    print(" acpi=");
    print(acpi);
    print_number(" modules=", start->nr_modules);
    print_number(" ramdisk=", start->nr_modules ? module->size : 0);
    print_hex(":", start->nr_modules ? adler32(at(module->paddr), module->size) : 1);
    print(" cmdline=");
    if (start->cmdline_paddr)
        print(at(start->cmdline_paddr));
    print("\n");
}

void pvh_main(const struct hvm_start_info *info)
{
    struct add_to_physmap map = { DOMID_SELF, 0, 0, 0, (unsigned long)shared_info / PAGE_SIZE };
    struct platform platform;

    start = info;
    if (info->magic != HVM_START_MAGIC || !set_up_hypercalls())
        __asm__ volatile("ud2");
    if (hypercall(HC_MEMORY_OP, XENMEM_ADD_TO_PHYSMAP, (unsigned long)&map, 0, 0))
        shut_down(SHUTDOWN_CRASH);
    platform.console = at((u64)param(HVM_PARAM_CONSOLE_PFN) * PAGE_SIZE);
    platform.console_port = param(HVM_PARAM_CONSOLE_EVTCHN);
    platform.store_port = param(HVM_PARAM_STORE_EVTCHN);
    platform.store = platform.store_port ? at((u64)param(HVM_PARAM_STORE_PFN) * PAGE_SIZE) : 0;
    run(&platform);
}
