"""Which domains have ended? As cheaply as the hypervisor can be asked, for processes that stay.

``Glance`` asks for one domain and keeps a page, where ``XenHypervisor`` keeps 256 KiB of locked memory: there
may be hundreds of who uses it. ``Census`` asks for all at once.
"""

from __future__ import annotations

import errno
from ctypes import c_uint64
from fcntl import ioctl
from typing import NamedTuple

from xtool.abi import domctl as d
from xtool.abi import sysctl as s
from xtool.abi import xen as x
from xtool.abi.base import PAGE_SIZE
from xtool.abi.linux import IOCTL_PRIVCMD_HYPERCALL, PrivcmdHypercall
from xtool.errors import HypercallError, UnknownInterfaceError
from xtool.hypercall.calls import Calls
from xtool.hypercall.port import Versions
from xtool.hypercall.privcmd import Privcmd

_FLAGS = d.HEADER_SIZE + d.GetDomainInfo.flags.offset
_DOMAIN = d.HEADER_SIZE + d.GetDomainInfo.domain.offset
_HANDLE = d.HEADER_SIZE + d.GetDomainInfo.handle.offset
_SIZE = d.HEADER_SIZE + d.GetDomainInfo.size()
_ENDED = d.XEN_DOMINF_dying | d.XEN_DOMINF_shutdown
_INFO = d.GetDomainInfo.size()
#: Room for the answer about all domains, bytes, and so many domains in one answer.
_CENSUS = 16 * PAGE_SIZE
_AT_ONCE = _CENSUS // _INFO


class Glance:
    """Raises ``NoXenError``, ``PrivilegeError``, ``UnknownInterfaceError``, ``HypercallError``."""

    def __init__(self) -> None:
        self._device = Privcmd(bulk=0)
        arguments = (c_uint64 * 5)(self._device.argument)
        self._request = bytes(PrivcmdHypercall(x.OP_DOMCTL, arguments))
        self._question = b""
        try:
            self._question = self._understood()
        except BaseException:
            self.close()
            raise

    def _understood(self) -> bytes:
        """The question in the version the hypervisor speaks."""
        for version in d.DOMCTL_VERSIONS:
            raw = bytearray(_SIZE)
            header = bytes(d.Domctl(cmd=d.XEN_DOMCTL_getdomaininfo, interface_version=version, domain=0))
            raw[: d.HEADER_SIZE] = header[: d.HEADER_SIZE]
            self._question = bytes(raw)
            try:
                self._ask(0)
            except OSError as error:
                if error.errno == errno.EACCES:  # a version it does not speak
                    continue
                raise HypercallError("getdomaininfo of domain 0", error.errno or 0) from None
            return self._question
        raise UnknownInterfaceError("Xen speaks a domctl interface xtool does not know")

    def _ask(self, domid: int) -> bytes:
        self._device.put(self._question)
        at = d.Domctl.domain.offset
        self._device.put_at(at, domid.to_bytes(2, "little"))
        ioctl(self._device.fileno(), IOCTL_PRIVCMD_HYPERCALL, bytearray(self._request), True)
        return self._device.get(_SIZE)

    def ended(self, domid: int, handle: bytes = b"") -> bool:
        """Whether it has shut down, is gone or going, or (with ``handle``) is another domain by now."""
        if domid < 0:
            return True
        try:
            answer = self._ask(domid)
        except OSError as error:
            if error.errno == errno.ESRCH:
                return True
            raise HypercallError(f"getdomaininfo of domain {domid}", error.errno or 0) from None
        if int.from_bytes(answer[_DOMAIN : _DOMAIN + 2], "little") != domid:
            return True
        if handle and answer[_HANDLE : _HANDLE + 16] != handle:
            return True
        return bool(int.from_bytes(answer[_FLAGS : _FLAGS + 4], "little") & _ENDED)

    def close(self) -> None:
        self._device.close()


class Domains(NamedTuple):
    """Those that are there, by ``domain_key``; none that is going."""

    running: set[bytes]
    ended: set[bytes]


def domain_key(domid: int, handle: bytes) -> bytes:
    """One life of a domain: neither its number nor its handle alone says which."""
    return domid.to_bytes(2, "little") + handle


def sort(raw: bytes, into: Domains) -> None:
    """Add what an array of ``xen_domctl_getdomaininfo`` says."""
    flags, handle = d.GetDomainInfo.flags.offset, d.GetDomainInfo.handle.offset
    for at in range(0, len(raw), _INFO):
        word = int.from_bytes(raw[at + flags : at + flags + 4], "little")
        if not word & d.XEN_DOMINF_dying:
            key = raw[at : at + 2] + raw[at + handle : at + handle + 16]
            (into.ended if word & d.XEN_DOMINF_shutdown else into.running).add(key)


class Census(Calls):
    """Raises what ``Glance`` does."""

    def __init__(self) -> None:
        super().__init__(Privcmd(bulk=_CENSUS))
        try:
            self.versions = Versions("", 0, self._understood())
        except BaseException:
            self.close()
            raise

    def _understood(self) -> int:
        """The version of sysctls that the hypervisor speaks."""
        for version in s.SYSCTL_VERSIONS:
            self.versions = Versions("", 0, version)
            try:
                self._some(0)
            except HypercallError as error:
                if error.errno == errno.EACCES:
                    continue
                raise
            return version
        raise UnknownInterfaceError("Xen speaks a sysctl interface xtool does not know")

    def _some(self, first: int) -> bytes:
        """What it says of the domains from this number on; as many as fit."""
        wanted = s.GetDomainInfoList(first_domain=first, max_domains=_AT_ONCE, buffer=self._device.bulk)
        answer = self._sysctl("getdomaininfolist", s.XEN_SYSCTL_getdomaininfolist, wanted)
        return self._device.get_bulk(answer.num_domains * _INFO)

    def domains(self) -> Domains:
        found = Domains(set(), set())
        first = 0
        while raw := self._some(first):
            sort(raw, found)
            first = int.from_bytes(raw[-_INFO:][:2], "little") + 1
            if len(raw) < _AT_ONCE * _INFO:
                break
        return found

    def close(self) -> None:
        self._device.close()
