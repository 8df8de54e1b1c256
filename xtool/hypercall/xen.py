"""The real hypervisor: ``Hypervisor`` over /dev/xen/privcmd. One short method per operation."""

from __future__ import annotations

from xtool.abi import domctl as d
from xtool.abi import sysctl as s
from xtool.abi import xen as x
from xtool.errors import HypercallError, UnknownInterfaceError
from xtool.hypercall.domains import DomainCalls
from xtool.hypercall.hosts import HostCalls
from xtool.hypercall.inspect import InspectCalls
from xtool.hypercall.memory import MemoryCalls
from xtool.hypercall.port import Versions
from xtool.hypercall.privcmd import Privcmd
from xtool.hypercall.tuning import TuningCalls

#: Which Xen releases speak which domctl version, for the message when none fits.
KNOWN_RELEASES = "4.17 to 4.22"


class XenHypervisor(DomainCalls, HostCalls, MemoryCalls, TuningCalls, InspectCalls):
    """Open it, use it, ``close`` it.

    Raises ``NoXenError``, ``PrivilegeError``, or ``UnknownInterfaceError`` when the hypervisor speaks an
    interface version that is in none of our tables.
    """

    def __init__(
        self,
        domctl_versions: tuple[int, ...] = d.DOMCTL_VERSIONS,
        sysctl_versions: tuple[int, ...] = s.SYSCTL_VERSIONS,
    ) -> None:
        super().__init__(Privcmd())
        try:
            self.versions = Versions(self._version_text(), 0, 0)
            self.versions = self.versions._replace(
                domctl=self._probe("domctl", domctl_versions), sysctl=self._probe("sysctl", sysctl_versions)
            )
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        return self._device.count

    def close(self) -> None:
        self._device.close()

    def _version_text(self) -> str:
        number = self._device.call("xen_version", x.OP_XEN_VERSION, x.XENVER_version, 0)
        extra = self._text("xen_version extraversion", x.XENVER_extraversion, 16)
        return f"{number >> 16}.{number & 0xFFFF}{extra}"

    def _probe(self, what: str, candidates: tuple[int, ...]) -> int:
        """The first version the hypervisor accepts for a harmless question; EACCES says "not mine"."""
        for version in candidates:
            try:
                if what == "domctl":
                    self._try_domctl(version)
                else:
                    self._try_sysctl(version)
            except HypercallError as error:
                if error.errno == 13:
                    continue
                raise
            return version
        known = ", ".join(f"{version:#x}" for version in candidates)
        raise UnknownInterfaceError(
            f"Xen {self.versions.xen} speaks a {what} interface xtool does not know (it knows {known}, "
            f"Xen {KNOWN_RELEASES})",
            hint="use a newer xtool, or one of these Xen releases",
        )

    def _try_domctl(self, version: int) -> None:
        info = d.GetDomainInfo()
        header = d.Domctl(cmd=d.XEN_DOMCTL_getdomaininfo, interface_version=version, domain=0)
        raw = bytearray(header)
        raw[d.HEADER_SIZE : d.HEADER_SIZE + info.size()] = bytes(info)
        self._device.call("domctl getdomaininfo", x.OP_DOMCTL, self._device.put(raw))

    def _try_sysctl(self, version: int) -> None:
        header = s.Sysctl(cmd=s.XEN_SYSCTL_sched_id, interface_version=version)
        self._device.call("sysctl sched_id", x.OP_SYSCTL, self._device.put(header))
