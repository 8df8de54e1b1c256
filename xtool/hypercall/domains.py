"""Domains and their vCPUs: domctls, event channels and scheduler operations."""

from __future__ import annotations

import errno
from ctypes import c_uint8

from xtool.abi import domctl as d
from xtool.abi import xen as x
from xtool.errors import HypercallError
from xtool.hypercall.calls import Calls
from xtool.hypercall.port import CreateSpec, DomainState, EvtchnState, VcpuState

_EVTCHN = ("closed", "unbound", "interdomain", "pirq", "virq", "ipi")


def domain_state(info: d.GetDomainInfo) -> DomainState:
    return DomainState(
        domid=info.domain,
        flags=info.flags,
        pages=info.tot_pages,
        max_pages=info.max_pages,
        outstanding_pages=info.outstanding_pages,
        shared_info_frame=info.shared_info_frame,
        cpu_time=info.cpu_time,
        online_vcpus=info.nr_online_vcpus,
        max_vcpu_id=info.max_vcpu_id,
        handle=bytes(info.handle),
        emulation_flags=info.arch_config.emulation_flags,
        cpupool=info.cpupool,
    )


class DomainCalls(Calls):
    def domain(self, domid: int) -> DomainState | None:
        try:
            info = self._domctl_out("getdomaininfo", d.XEN_DOMCTL_getdomaininfo, domid, d.GetDomainInfo())
        except HypercallError as error:
            if error.errno == errno.ESRCH:
                return None
            raise
        # Before 4.19 Xen answers with the next domain there is.
        return domain_state(info) if info.domain == domid else None

    def create_domain(self, spec: CreateSpec) -> int:
        version = self.versions.domctl
        flags = d.XEN_DOMCTL_CDF_hvm if spec.hvm else 0
        flags |= d.XEN_DOMCTL_CDF_hap if spec.hap else 0
        flags |= d.XEN_DOMCTL_CDF_nested_virt if spec.nested else 0
        payload = d.CREATEDOMAIN[version](
            ssidref=spec.ssidref,
            handle=(c_uint8 * 16)(*spec.handle),
            flags=flags,
            max_vcpus=spec.max_vcpus,
            max_evtchn_port=spec.max_evtchn_port,
            max_grant_frames=spec.max_grant_frames,
            max_maptrack_frames=spec.max_maptrack_frames,
            grant_opts=spec.grant_version,
            cpupool_id=spec.cpupool,
            arch=d.ArchDomainConfig(spec.emulation_flags, 0),
        )
        self._domctl("createdomain", d.XEN_DOMCTL_createdomain, d.AUTO_DOMID[version], payload)
        return int(d.Domctl.from_buffer_copy(self._device.get(d.Domctl.size())).domain)

    def destroy_domain(self, domid: int) -> None:
        while True:
            try:
                self._domctl("destroydomain", d.XEN_DOMCTL_destroydomain, domid)
                return
            except HypercallError as error:
                # Freeing a large guest's memory comes back to us between slices.
                if error.errno != errno.EAGAIN:
                    raise

    def pause_domain(self, domid: int) -> None:
        self._domctl("pausedomain", d.XEN_DOMCTL_pausedomain, domid)

    def unpause_domain(self, domid: int) -> None:
        self._domctl("unpausedomain", d.XEN_DOMCTL_unpausedomain, domid)

    def shutdown_domain(self, domid: int, reason: int) -> None:
        address = self._device.put(x.RemoteShutdown(domain_id=domid, reason=reason))
        self._device.call(
            f"remote_shutdown of domain {domid}", x.OP_SCHED, x.SCHEDOP_remote_shutdown, address
        )

    def send_trigger(self, domid: int, trigger: int, vcpu: int = 0) -> None:
        self._domctl("sendtrigger", d.XEN_DOMCTL_sendtrigger, domid, d.SendTrigger(trigger, vcpu))

    def set_max_vcpus(self, domid: int, count: int) -> None:
        self._domctl("max_vcpus", d.XEN_DOMCTL_max_vcpus, domid, d.MaxVcpus(count))

    def set_max_memory(self, domid: int, size: int) -> None:
        self._domctl("max_mem", d.XEN_DOMCTL_max_mem, domid, d.MaxMem(size >> 10))

    def set_paging_pool(self, domid: int, size: int) -> None:
        self._domctl(
            "set_paging_mempool_size", d.XEN_DOMCTL_set_paging_mempool_size, domid, d.PagingMempool(size)
        )

    def set_time_offset(self, domid: int, seconds: int) -> None:
        self._domctl("settimeoffset", d.XEN_DOMCTL_settimeoffset, domid, d.SetTimeOffset(seconds))

    def set_tsc_mode(self, domid: int, mode: int) -> None:
        self._domctl("settscinfo", d.XEN_DOMCTL_settscinfo, domid, d.TscInfo(tsc_mode=mode))

    def set_cpu_policy(self, domid: int, leaves: bytes) -> None:
        payload = d.CpuPolicy(
            nr_leaves=len(leaves) // 24,
            leaves=self._device.put_bulk(leaves),
            err_leaf=0xFFFFFFFF,
            err_subleaf=0xFFFFFFFF,
            err_msr=0xFFFFFFFF,
        )
        try:
            self._domctl("set_cpu_policy", d.XEN_DOMCTL_set_cpu_policy, domid, payload)
        except HypercallError as error:
            raw = self._device.get(d.HEADER_SIZE + d.CpuPolicy.size())
            seen = d.CpuPolicy.from_buffer_copy(raw, d.HEADER_SIZE)
            detail = f"CPUID leaf {seen.err_leaf:#x} subleaf {seen.err_subleaf:#x}"
            raise HypercallError(error.operation, error.errno, detail=detail) from None

    def vcpu(self, domid: int, vcpu: int) -> VcpuState | None:
        try:
            info = self._domctl_out("getvcpuinfo", d.XEN_DOMCTL_getvcpuinfo, domid, d.GetVcpuInfo(vcpu=vcpu))
        except HypercallError as error:
            if error.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT):
                return None
            raise
        return VcpuState(
            vcpu, bool(info.online), bool(info.blocked), bool(info.running), info.cpu, info.cpu_time
        )

    def set_vcpu_context(self, domid: int, vcpu: int, context: bytes) -> None:
        payload = d.VcpuContext(vcpu=vcpu, ctxt=self._device.put_bulk(context))
        self._domctl("setvcpucontext", d.XEN_DOMCTL_setvcpucontext, domid, payload)

    def hvm_context(self, domid: int) -> bytes:
        # A question without a buffer answers with the size: about 5 KiB a vCPU.
        name, cmd = "gethvmcontext", d.XEN_DOMCTL_gethvmcontext
        size = self._domctl_out(name, cmd, domid, d.HvmContext(size_=0, buffer=0)).size_
        area, address = self._device.locked_buffer(size)
        with area:
            answer = self._domctl_out(name, cmd, domid, d.HvmContext(size_=size, buffer=address))
            return bytes(area.view[: answer.size_])

    def set_hvm_context(self, domid: int, records: bytes) -> None:
        area, address = self._device.locked_buffer(len(records))
        with area:
            area.view[: len(records)] = records
            payload = d.HvmContext(size_=len(records), buffer=address)
            self._domctl("sethvmcontext", d.XEN_DOMCTL_sethvmcontext, domid, payload)

    def init_hypercall_page(self, domid: int, gfn: int) -> None:
        self._domctl("hypercall_init", d.XEN_DOMCTL_hypercall_init, domid, d.HypercallInit(gfn))

    def alloc_unbound(self, domid: int, remote: int) -> int:
        address = self._device.put(x.EvtchnAllocUnbound(dom=domid, remote_dom=remote))
        self._device.call(
            f"alloc_unbound for domain {domid}", x.OP_EVENT_CHANNEL, x.EVTCHNOP_alloc_unbound, address
        )
        raw = self._device.get(x.EvtchnAllocUnbound.size())
        return int(x.EvtchnAllocUnbound.from_buffer_copy(raw).port)

    def evtchn_status(self, domid: int, port: int) -> EvtchnState | None:
        address = self._device.put(x.EvtchnStatus(dom=domid, port=port))
        try:
            self._device.call("evtchn status", x.OP_EVENT_CHANNEL, x.EVTCHNOP_status, address)
        except HypercallError as error:
            if error.errno == errno.EINVAL:
                return None
            raise
        info = x.EvtchnStatus.from_buffer_copy(self._device.get(x.EvtchnStatus.size()))
        status = _EVTCHN[info.status]
        peer = info.u & 0xFFFF if status in ("unbound", "interdomain") else None
        return EvtchnState(
            status,
            peer,
            info.remote_port if status == "interdomain" else None,
            info.u if status in ("pirq", "virq") else None,
            info.vcpu,
        )
