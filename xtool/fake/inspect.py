"""What a core dump asks of the hypervisor in memory."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Sequence

from xtool.fake.domain import FakeDomain, refuse
from xtool.hypercall.tuningport import PodState, XenVersion

_NOBODY = 0xFFFF_FFFF_FFFF_FFFF


class FakeInspect:
    """A part of ``FakeHypervisor``."""

    all: dict[int, FakeDomain]
    _next_mfn: int

    def _get(self, name: str, domid: int) -> FakeDomain:
        raise NotImplementedError

    def xen_version(self) -> XenVersion:
        def text(value: bytes, size: int) -> bytes:
            return value.ljust(size, b"\0")

        return XenVersion(
            4,
            17,
            text(b".0-fake", 16),
            text(b"none", 144),
            text(b"xen-3.0-x86_64 hvm-3.0-x86_64 ", 1024),
            text(b"none", 64),
            0xFFFF800000000000,
            4096,
        )

    def vcpu_context(self, domid: int, vcpu: int) -> bytes | None:
        domain = self._get("vcpu_context", domid)
        # Of a PVH or HVM guest Xen puts one together from what its own record says.
        started = vcpu == 0 and bool(domain.hvm_records)
        return domain.contexts.get(vcpu, bytes(5168) if started else None)

    def max_gpfn(self, domid: int) -> int:
        domain = self._get("max_gpfn", domid)
        return max([*domain.p2m, *(run.stop - 1 for run in domain.promised)], default=0)

    def present(self, domid: int, frames: Sequence[int]) -> list[bool]:
        domain = self._get("present", domid)
        if not domain.spec.hvm:
            return [frame in domain.owned for frame in frames]
        return [self._present(domain, frame) for frame in frames]

    @staticmethod
    def _present(domain: FakeDomain, frame: int) -> bool:
        if frame not in domain.p2m and domain.cache and any(frame in run for run in domain.promised):
            domain.p2m[frame] = domain.cache.pop()
        return frame in domain.p2m

    def pod_state(self, domid: int) -> PodState:
        domain = self._get("pod_state", domid)
        if not domain.spec.hvm:
            raise refuse(f"get_pod_target of domain {domid}", errno.EINVAL)
        promised = {frame for run in domain.promised for frame in run}
        return PodState(len(domain.cache), len(promised - domain.p2m.keys()))

    def ram_end(self) -> int:
        return self._next_mfn

    def machine_to_phys(self, first: int, count: int) -> array[int]:
        known = {
            mfn: pfn for domain in self.all.values() if not domain.spec.hvm for pfn, mfn in domain.p2m.items()
        }
        return array("Q", (known.get(mfn, _NOBODY) for mfn in range(first, first + count)))
