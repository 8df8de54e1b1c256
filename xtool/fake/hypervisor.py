"""A hypervisor in memory: the same ``Hypervisor`` protocol, for fast tests and for dry runs.

It keeps real pages, so what a builder writes can be read back, and it refuses what Xen refuses. Machine
frames are handed out so that they never equal guest frames and adjacent extents are not adjacent frames:
code that mixes the two up fails here as it would on Xen.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable, Sequence
from types import TracebackType

from xtool.abi import domctl as d
from xtool.abi import sysctl as s
from xtool.abi.base import PAGE_SHIFT, PAGE_SIZE
from xtool.fake.domain import FakeDomain, refuse
from xtool.fake.inspect import FakeInspect
from xtool.fake.machine import GRANT_FRAMES, PORTS, SHARED_FRAMES, FakeMachine
from xtool.fake.tuning import FakeTuning
from xtool.hypercall.port import (
    CreateSpec,
    DomainState,
    E820Entry,
    EvtchnState,
    GrantTableSize,
    HostState,
    VcpuState,
    Versions,
)

_FIRST_MFN = 0x100000


class FakeMapping:
    """A gathered copy of some frames, written back when it is closed."""

    def __init__(self, machine: FakeHypervisor, mfns: Sequence[int], *, writable: bool = True) -> None:
        self._machine = machine
        self._mfns = mfns if writable else ()
        self._area = mmap.mmap(-1, len(mfns) * PAGE_SIZE)
        self._whole = memoryview(self._area)
        for index, mfn in enumerate(mfns):
            page = machine.machine.page(mfn) if mfn >= SHARED_FRAMES else machine.frames.get(mfn)
            if page is not None:
                self._whole[index * PAGE_SIZE : (index + 1) * PAGE_SIZE] = page
        self.view = self._whole if writable else self._whole.toreadonly()

    def close(self) -> None:
        empty = bytes(PAGE_SIZE)
        for index, mfn in enumerate(self._mfns):
            page = bytes(self.view[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
            if page != empty or mfn in self._machine.frames:
                self._machine.frames[mfn] = page
        self.view.release()
        self._whole.release()
        self._area.close()
        self._machine.mapped -= 1

    def __enter__(self) -> FakeMapping:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FakeHypervisor(FakeTuning, FakeInspect):
    """``memory`` in bytes is what guests can get. ``fail`` maps a method's name to an errno to raise."""

    def __init__(self, memory: int = 16 << 30, cpus: int = 4) -> None:
        self.versions = Versions("4.17.0-fake", 0x15, 0x15)
        self.count = 0
        self.frames: dict[int, bytes] = {}
        self.mapped = 0
        self.all: dict[int, FakeDomain] = {}
        self.fail: dict[str, int] = {}
        #: Told the domid of every domain that ends; a fake xenstored wants to know.
        self.gone: Callable[[int], None] = lambda domid: None
        #: Event channels and grants between its domains.
        self.machine = FakeMachine()
        self._total = memory >> PAGE_SHIFT
        self._free = self._total
        self._next_mfn = _FIRST_MFN
        self._next_domid = 1
        FakeTuning.__init__(self, cpus)

    def close(self) -> None:
        pass

    # --- the host ---------------------------------------------------------------------------------
    def _op(self, name: str) -> None:
        self.count += 1
        if name in self.fail:
            raise refuse(name, self.fail[name])

    def _get(self, name: str, domid: int) -> FakeDomain:
        self._op(name)
        if domid not in self.all:
            raise refuse(f"{name} of domain {domid}", errno.ESRCH)
        return self.all[domid]

    def host(self) -> HostState:
        self._op("host")
        caps = s.XEN_SYSCTL_PHYSCAP_hvm | s.XEN_SYSCTL_PHYSCAP_pv | s.XEN_SYSCTL_PHYSCAP_hap
        caps |= s.XEN_SYSCTL_PHYSCAP_gnttab_v1 | s.XEN_SYSCTL_PHYSCAP_gnttab_v2
        claimed = sum(domain.claimed for domain in self.all.values())
        cpus, total = self._cpus, self._total
        return HostState(1, cpus, cpus, cpus - 1, 1, 1000000, caps, total, self._free, 0, claimed, ())

    def capabilities(self) -> tuple[str, ...]:
        return ("xen-3.0-x86_64", "hvm-3.0-x86_32", "hvm-3.0-x86_32p", "hvm-3.0-x86_64")

    def commandline(self) -> str:
        return "fake"

    def console_ring(self, *, clear: bool = False) -> bytes:
        return b"(XEN) fake\n"

    def default_cpu_policy(self, *, hvm: bool) -> bytes:
        self._op("default_cpu_policy")
        leaf = [1, 0xFFFFFFFF, 0x800F12, 0x00010800, 0, 0x178BFBFF]
        vendor = [0, 0xFFFFFFFF, 0xD, 0x68747541, 0x444D4163, 0x69746E65]
        return b"".join(v.to_bytes(4, "little") for v in vendor + leaf)

    # --- domains ----------------------------------------------------------------------------------
    def _state(self, domain: FakeDomain) -> DomainState:
        flags = domain.flags | (d.XEN_DOMINF_paused if domain.pause_count else d.XEN_DOMINF_blocked)
        return DomainState(
            domain.domid,
            flags,
            len(domain.owned),
            domain.max_pages,
            domain.claimed,
            domain.shared_info,
            0,
            len(domain.online),
            max(domain.vcpus - 1, 0),
            domain.spec.handle,
            domain.spec.emulation_flags,
            domain.pool,
        )

    def domains(self) -> list[DomainState]:
        self._op("domains")
        return [self._state(self.all[domid]) for domid in sorted(self.all)]

    def domain(self, domid: int) -> DomainState | None:
        self._op("domain")
        return self._state(self.all[domid]) if domid in self.all else None

    def create_domain(self, spec: CreateSpec) -> int:
        self._op("create_domain")
        if len(spec.handle) != 16 or not 1 <= spec.max_vcpus <= (128 if spec.hvm else 8192):
            raise refuse("createdomain", errno.EINVAL)
        if spec.hap and not spec.hvm:
            raise refuse("createdomain", errno.EINVAL)
        self._pool_for_new(spec.cpupool)
        domid = self._next_domid
        self._next_domid += 1
        domain = FakeDomain(domid, spec, d.XEN_DOMINF_hvm_guest if spec.hvm else 0)
        domain.pool = spec.cpupool
        domain.shared_info, domain.grant_table = self._frame(), self._frame(GRANT_FRAMES)
        self.all[domid] = domain
        self.machine.add_domain(domid)
        return domid

    def destroy_domain(self, domid: int) -> None:
        domain = self._get("destroy_domain", domid)
        table = range(domain.grant_table, domain.grant_table + GRANT_FRAMES)
        for mfn in (*domain.owned, domain.shared_info, *table):
            self.frames.pop(mfn, None)
        self._free += len(domain.owned)
        del self.all[domid]
        self.machine.remove_domain(domid)
        self.gone(domid)

    def pause_domain(self, domid: int) -> None:
        self._get("pause_domain", domid).pause_count += 1

    def unpause_domain(self, domid: int) -> None:
        domain = self._get("unpause_domain", domid)
        if not domain.pause_count:
            raise refuse(f"unpausedomain of domain {domid}", errno.EINVAL)
        domain.pause_count -= 1

    def shutdown_domain(self, domid: int, reason: int) -> None:
        domain = self._get("shutdown_domain", domid)
        domain.flags |= d.XEN_DOMINF_shutdown | reason << d.XEN_DOMINF_shutdownshift

    def set_max_vcpus(self, domid: int, count: int) -> None:
        domain = self._get("set_max_vcpus", domid)
        if count > domain.spec.max_vcpus:
            raise refuse("max_vcpus", errno.EINVAL)
        domain.vcpus = count

    def set_max_memory(self, domid: int, size: int) -> None:
        self._get("set_max_memory", domid).max_pages = size >> PAGE_SHIFT

    def set_paging_pool(self, domid: int, size: int) -> None:
        domain = self._get("set_paging_pool", domid)
        if not domain.spec.hvm:
            raise refuse("set_paging_mempool_size", errno.EINVAL)
        domain.paging_pool = size

    def set_time_offset(self, domid: int, seconds: int) -> None:
        self._get("set_time_offset", domid)

    def set_tsc_mode(self, domid: int, mode: int) -> None:
        self._get("set_tsc_mode", domid)

    def set_cpu_policy(self, domid: int, leaves: bytes) -> None:
        domain = self._get("set_cpu_policy", domid)
        if len(leaves) % 24:
            raise refuse("set_cpu_policy", errno.EINVAL)
        domain.policy = leaves

    def vcpu(self, domid: int, vcpu: int) -> VcpuState | None:
        self._op("vcpu")
        domain = self.all.get(domid)
        if domain is None or vcpu >= domain.vcpus:
            return None
        return VcpuState(vcpu, vcpu in domain.online, not domain.pause_count, False, 0, 0)

    def set_vcpu_context(self, domid: int, vcpu: int, context: bytes) -> None:
        domain = self._get("set_vcpu_context", domid)
        if domain.spec.hvm or len(context) != 5168 or vcpu >= domain.vcpus:
            raise refuse("setvcpucontext", errno.EINVAL)
        domain.contexts[vcpu] = context
        domain.online.add(vcpu)

    def hvm_context(self, domid: int) -> bytes:
        if not self._get("hvm_context", domid).spec.hvm:
            raise refuse("gethvmcontext", errno.EINVAL)
        header = b"\x01\0\0\0\x18\0\0\0" + bytes(24)
        mtrr = b"\x0e\0\0\0\xf0\0\0\0" + bytes(240)
        return header + mtrr + bytes(8)

    def set_hvm_context(self, domid: int, records: bytes) -> None:
        domain = self._get("set_hvm_context", domid)
        domain.hvm_records.append(records)
        domain.online.add(0)

    def init_hypercall_page(self, domid: int, gfn: int) -> None:
        domain = self._get("init_hypercall_page", domid)
        self._resolve(domain, gfn)
        domain.hypercall_page = gfn

    # --- memory -----------------------------------------------------------------------------------
    def _frame(self, count: int = 1) -> int:
        # A gap after each extent keeps neighbours apart.
        mfn = self._next_mfn
        self._next_mfn += count + 1 if count == 1 else 2 * count
        return mfn

    def _resolve(self, domain: FakeDomain, gfn: int) -> int:
        if domain.spec.hvm:
            if gfn in domain.p2m:
                return domain.p2m[gfn]
            if domain.cache and any(gfn in run for run in domain.promised):
                return domain.p2m.setdefault(gfn, domain.cache.pop())
        elif gfn in domain.owned or gfn == domain.shared_info:
            return gfn
        raise refuse(f"mapping frame {gfn:#x} of domain {domain.domid}", errno.EINVAL)

    def populate(
        self, domid: int, extents: Sequence[int], order: int = 0, *, on_demand: bool = False
    ) -> list[int]:
        domain = self._get("populate", domid)
        size = 1 << order
        given: list[int] = []
        for gfn in extents:
            if gfn & (size - 1):
                raise refuse("populate_physmap", errno.EINVAL)
            if on_demand:
                domain.promised.append(range(gfn, gfn + size))
                given.append(gfn)
                continue
            spare = self._free - sum(other.claimed for other in self.all.values()) + domain.claimed
            if spare < size or len(domain.owned) + size > domain.max_pages:
                break
            mfn = self._frame(size)
            self._free -= size
            domain.claimed = max(0, domain.claimed - size)
            domain.p2m.update(zip(range(gfn, gfn + size), range(mfn, mfn + size), strict=True))
            domain.owned.update(range(mfn, mfn + size))
            given.append(gfn if domain.spec.hvm else mfn)
        return given

    def set_pod_target(self, domid: int, pages: int) -> None:
        domain = self._get("set_pod_target", domid)
        populated = len(domain.owned) - len(domain.cache)
        entries = self.pod_state(domid).entries
        if (populated and not entries) or pages < len(domain.owned):
            return  # the balloon driver's business
        more = min(pages - populated, entries if populated else pages) - len(domain.cache)
        if more <= 0:
            return
        mfn = self._frame(more)
        self._free -= more
        domain.claimed = max(0, domain.claimed - more)
        domain.cache += range(mfn, mfn + more)
        domain.owned.update(domain.cache)

    def claim(self, domid: int, pages: int) -> None:
        domain = self._get("claim", domid)
        if pages and pages > self._free - sum(other.claimed for other in self.all.values()):
            raise refuse(f"claim_pages for domain {domid}", errno.ENOMEM)
        domain.claimed = pages

    def set_memory_map(self, domid: int, entries: Sequence[E820Entry]) -> None:
        self._get("set_memory_map", domid).memory_map = tuple(entries)

    def clear_page(self, domid: int, gfn: int) -> None:
        self.frames.pop(self._resolve(self._get("clear_page", domid), gfn), None)

    def pin_l4_table(self, domid: int, mfn: int) -> None:
        domain = self._get("pin_l4_table", domid)
        if mfn not in domain.owned:
            raise refuse("pin_l4_table", errno.EINVAL)
        domain.pinned.append(mfn)

    def map_foreign(self, domid: int, gfns: Sequence[int], *, writable: bool = True) -> FakeMapping:
        """Pages that were granted through ``machine`` can be read this way, not written."""
        domain = self._get("map_foreign", domid)
        shared: set[int] = set() if writable else self.machine.shared_frames(domid)
        mfns = [gfn if gfn in shared else self._resolve(domain, gfn) for gfn in gfns]
        self.mapped += 1
        return FakeMapping(self, mfns, writable=writable)

    def grant_table_size(self, domid: int) -> GrantTableSize:
        self._get("grant_table_size", domid)
        return GrantTableSize(1, self.machine.guests[domid].grant_frames, GRANT_FRAMES)

    def map_grant_table(self, domid: int, frames: int = 1) -> FakeMapping:
        """What was written there, and the grants made through ``machine``."""
        domain = self._get("map_grant_table", domid)
        self.mapped += 1
        mapping = FakeMapping(self, range(domain.grant_table, domain.grant_table + frames))
        self.machine.show_grants(domid, mapping.view)
        return mapping

    def map_grant_status(self, domid: int, frames: int) -> FakeMapping:
        raise refuse(f"mapping resource 1 of domain {domid}", errno.EINVAL)  # the table has version 1

    def read(self, domid: int, gfn: int) -> bytes:
        """For tests: a page as it stands."""
        return self.frames.get(self._resolve(self.all[domid], gfn), bytes(PAGE_SIZE))

    # --- HVM parameters and event channels ----------------------------------------------------------
    def set_hvm_param(self, domid: int, index: int, value: int) -> None:
        domain = self._get("set_hvm_param", domid)
        if not domain.spec.hvm:
            raise refuse("set_param", errno.EINVAL)
        domain.params[index] = value

    def hvm_param(self, domid: int, index: int) -> int:
        return self._get("hvm_param", domid).params.get(index, 0)

    def alloc_unbound(self, domid: int, remote: int) -> int:
        domain = self._get("alloc_unbound", domid)
        return self.machine.alloc_unbound(domain.domid, remote)

    def evtchn_status(self, domid: int, port: int) -> EvtchnState | None:
        guest = self.machine.guests.get(domid)
        if guest is None or not 0 <= port < PORTS:
            return None
        channel = guest.ports.get(port)
        if channel is None:
            return EvtchnState("closed", None, None, None)
        return EvtchnState(channel.state, channel.remote_domid, channel.remote_port, channel.virq)
