"""Questions about the host: sysctls and xen_version."""

from __future__ import annotations

from xtool.abi import domctl as d
from xtool.abi import sysctl as s
from xtool.abi import xen as x
from xtool.hypercall.calls import Calls
from xtool.hypercall.domains import domain_state
from xtool.hypercall.port import DomainState, HostState

_BATCH = 1024
_LEAF_SIZE = 24


class HostCalls(Calls):
    def host(self) -> HostState:
        info = self._sysctl("physinfo", s.XEN_SYSCTL_physinfo, s.PhysInfo())
        return HostState(
            threads_per_core=info.threads_per_core,
            cores_per_socket=info.cores_per_socket,
            cpus=info.nr_cpus,
            max_cpu_id=info.max_cpu_id,
            nodes=info.nr_nodes,
            cpu_khz=info.cpu_khz,
            capabilities=info.capabilities,
            total_pages=info.total_pages,
            free_pages=info.free_pages,
            scrub_pages=info.scrub_pages,
            outstanding_pages=info.outstanding_pages,
            hw_cap=tuple(info.hw_cap),
        )

    def capabilities(self) -> tuple[str, ...]:
        return tuple(self._text("xen_version capabilities", x.XENVER_capabilities, 1024).split())

    def commandline(self) -> str:
        return self._text("xen_version commandline", x.XENVER_commandline, 1024)

    def console_ring(self, *, clear: bool = False) -> bytes:
        size = self._device.bulk_size
        answer = self._sysctl(
            "readconsole",
            s.XEN_SYSCTL_readconsole,
            s.ReadConsole(clear=clear, buffer=self._device.bulk, count=size),
        )
        return self._device.get_bulk(min(answer.count, size))

    def debug_keys(self, keys: str) -> None:
        raw = keys.encode("ascii")
        self._sysctl(
            "debug_keys",
            s.XEN_SYSCTL_debug_keys,
            s.DebugKeys(keys=self._device.put_bulk(raw), nr_keys=len(raw)),
        )

    def domains(self) -> list[DomainState]:
        size = d.GetDomainInfo.size()
        found: list[DomainState] = []
        first = 0
        while True:
            answer = self._sysctl(
                "getdomaininfolist",
                s.XEN_SYSCTL_getdomaininfolist,
                s.GetDomainInfoList(first_domain=first, max_domains=_BATCH, buffer=self._device.bulk),
            )
            raw = self._device.get_bulk(answer.num_domains * size)
            found += [
                domain_state(d.GetDomainInfo.from_buffer_copy(raw, i)) for i in range(0, len(raw), size)
            ]
            if answer.num_domains < _BATCH:
                return found
            first = found[-1].domid + 1

    def default_cpu_policy(self, *, hvm: bool) -> bytes:
        index = s.XEN_SYSCTL_cpu_policy_hvm_default if hvm else s.XEN_SYSCTL_cpu_policy_pv_default
        request = s.SystemCpuPolicy(
            index=index, nr_leaves=self._device.bulk_size // _LEAF_SIZE, leaves=self._device.bulk
        )
        answer = self._sysctl("get_cpu_policy", s.XEN_SYSCTL_get_cpu_policy, request)
        return self._device.get_bulk(answer.nr_leaves * _LEAF_SIZE)
