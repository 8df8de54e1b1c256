"""Questions: domains, vCPUs, the host. Nothing here changes anything."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from xtool.abi import domctl as d
from xtool.abi import sysctl as s
from xtool.hypercall.port import DomainState, HostState
from xtool.toolstack import journal
from xtool.toolstack.api import DomainInfo, HostInfo, VcpuInfo
from xtool.toolstack.names import Named, find, named_domains, uuid_text

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

_PAGE = 4096
_LEAF = Struct("<6I")
_SCHEDULERS = {
    d.XEN_SCHEDULER_CREDIT: "credit",
    d.XEN_SCHEDULER_CREDIT2: "credit2",
    d.XEN_SCHEDULER_ARINC653: "arinc653",
    d.XEN_SCHEDULER_RTDS: "rtds",
    d.XEN_SCHEDULER_NULL: "null",
}
_VENDORS = {
    "GenuineIntel": ("Intel", "VT-x"),
    "AuthenticAMD": ("AMD", "SVM"),
    "HygonGenuine": ("Hygon", "SVM"),
}
_CAPS = (
    (s.XEN_SYSCTL_PHYSCAP_pv, "pv"),
    (s.XEN_SYSCTL_PHYSCAP_hvm, "hvm"),
    (s.XEN_SYSCTL_PHYSCAP_directio, "directio"),
    (s.XEN_SYSCTL_PHYSCAP_hap, "hap"),
    (s.XEN_SYSCTL_PHYSCAP_shadow, "shadow"),
    (s.XEN_SYSCTL_PHYSCAP_iommu_hap_pt_share, "iommu_hap_pt_share"),
    (s.XEN_SYSCTL_PHYSCAP_vmtrace, "vmtrace"),
    (s.XEN_SYSCTL_PHYSCAP_vpmu, "vpmu"),
    (s.XEN_SYSCTL_PHYSCAP_gnttab_v1, "gnttab-v1"),
    (s.XEN_SYSCTL_PHYSCAP_gnttab_v2, "gnttab-v2"),
)


def kind_of(state: DomainState) -> str:
    """pv, pvh or hvm; an HVM domain has more emulated than the local APIC."""
    if not state.hvm:
        return "pv"
    return "pvh" if state.emulation_flags & d.XEN_X86_EMU_ALL in (0, d.XEN_X86_EMU_LAPIC) else "hvm"


def state_of(state: DomainState) -> str:
    if state.dying:
        return "dying"
    if state.shutdown:
        return "crashed" if state.shutdown_reason in ("crash", "watchdog") else "shutdown"
    if state.paused:
        return "paused"
    return "running" if state.running else "blocked"


def domain_info(found: Named, managed: frozenset[str]) -> DomainInfo:
    state = found.state
    uuid = uuid_text(state.handle)
    # Before 4.18 an unlimited domain 0 shows a limit near 2^64.
    limit = state.max_pages * _PAGE if state.max_pages < 1 << 40 else state.pages * _PAGE
    return DomainInfo(
        domid=state.domid,
        name=found.name,
        uuid=uuid,
        type=kind_of(state),
        state=state_of(state),
        reason=state.shutdown_reason,
        memory=(state.pages + state.outstanding_pages) * _PAGE,
        maxmem=limit,
        vcpus=state.online_vcpus,
        cpu_time=state.cpu_time / 1e9,
        managed=uuid in managed,
    )


def domains(host: Host, domain: str | None = None) -> list[DomainInfo]:
    managed = frozenset(entry.uuid for entry in journal.entries())
    chosen = named_domains(host) if domain is None else [find(host, domain)]
    return [domain_info(found, managed) for found in chosen]


def vcpus(host: Host, domain: str | None = None) -> list[VcpuInfo]:
    chosen = named_domains(host) if domain is None else [find(host, domain)]
    cpus = host.hv.host().max_cpu_id + 1
    result = []
    for found in chosen:
        for number in range(found.state.max_vcpu_id + 1):
            info = host.hv.vcpu(found.state.domid, number)
            if info is None:
                continue
            hard, soft = host.hv.affinity(found.state.domid, number)
            result.append(
                VcpuInfo(
                    domain=found.name,
                    domid=found.state.domid,
                    vcpu=number,
                    cpu=info.cpu if info.online else None,
                    state=_vcpu_state(info.online, info.blocked, info.running),
                    cpu_time=info.cpu_time / 1e9,
                    hard_affinity=cpu_ranges(hard, cpus),
                    soft_affinity=cpu_ranges(soft, cpus),
                )
            )
    return result


def _vcpu_state(online: bool, blocked: bool, running: bool) -> str:
    if not online:
        return "offline"
    return "running" if running else "blocked" if blocked else "runnable"


def cpu_ranges(cpus: frozenset[int], total: int) -> str:
    """``{0, 1, 2, 5}`` -> ``"0-2,5"``; every CPU of the host is ``"all"``."""
    if all(cpu in cpus for cpu in range(total)):
        return "all"
    parts: list[list[int]] = []
    for cpu in sorted(cpu for cpu in cpus if cpu < total):
        if parts and parts[-1][1] == cpu - 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "none"


def host_info(host: Host) -> HostInfo:
    state = host.hv.host()
    vendor_id, model = cpu_name(host.hv.default_cpu_policy(hvm=False))
    vendor, hvm = _VENDORS.get(vendor_id, (vendor_id, ""))
    has_hvm = bool(state.capabilities & s.XEN_SYSCTL_PHYSCAP_hvm)
    log = host.hv.console_ring()
    return HostInfo(
        xen_version=host.hv.versions.xen,
        xen_caps=host.hv.capabilities(),
        xen_commandline=host.hv.commandline(),
        domctl_interface=host.hv.versions.domctl,
        sysctl_interface=host.hv.versions.sysctl,
        vendor=vendor,
        cpu_model=model or _linux_cpu_model(),
        hvm=hvm if has_hvm else "",
        nested_paging=bool(state.capabilities & s.XEN_SYSCTL_PHYSCAP_hap),
        asid=has_hvm and tagged_tlb(log),
        iommu=bool(state.capabilities & s.XEN_SYSCTL_PHYSCAP_directio),
        virt_caps=tuple(name for bit, name in _CAPS if state.capabilities & bit),
        cpus=state.cpus,
        threads_per_core=state.threads_per_core,
        cores_per_socket=state.cores_per_socket,
        nodes=state.nodes,
        cpu_khz=state.cpu_khz,
        total_memory=state.total_pages * _PAGE,
        free_memory=free_memory(state),
        scrub_memory=state.scrub_pages * _PAGE,
        scheduler=_SCHEDULERS.get(host.hv.scheduler(), "unknown"),
        domains=len(host.hv.domains()),
    )


def free_memory(state: HostState) -> int:
    """Bytes a new domain could get: free, less what others have claimed."""
    return max(0, state.free_pages - state.outstanding_pages) * _PAGE


def tagged_tlb(log: bytes) -> bool | None:
    """Whether Xen tags TLB entries by guest (ASID, VPID). Only its boot log says; None if that is gone."""
    if b"Virtual-Processor Identifiers" in log or b"ASIDs enabled" in log:
        return True
    return False if b"ASIDs disabled" in log or b"HVM:" in log else None


def cpu_name(leaves: bytes) -> tuple[str, str]:
    """Vendor and brand string from packed CPUID leaves."""
    vendor = ""
    brand: dict[int, bytes] = {}
    for leaf, _, eax, ebx, ecx, edx in _LEAF.iter_unpack(leaves):
        if leaf == 0:
            vendor = b"".join(v.to_bytes(4, "little") for v in (ebx, edx, ecx)).decode("ascii", "replace")
        elif 0x80000002 <= leaf <= 0x80000004:
            brand[leaf] = b"".join(v.to_bytes(4, "little") for v in (eax, ebx, ecx, edx))
    text = b"".join(brand[leaf] for leaf in sorted(brand)).split(b"\0")[0]
    return vendor, " ".join(text.decode("ascii", "replace").split())


def _linux_cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""
