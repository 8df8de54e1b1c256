"""One question to the hypervisor, as cheaply as it can be asked: has this domain ended?

For processes of which there are hundreds: ``XenHypervisor`` keeps 256 KiB of locked memory, this keeps a
page.
"""

from __future__ import annotations

import errno
from ctypes import c_uint64
from fcntl import ioctl

from xtool.abi import domctl as d
from xtool.abi import xen as x
from xtool.abi.linux import IOCTL_PRIVCMD_HYPERCALL, PrivcmdHypercall
from xtool.errors import HypercallError, UnknownInterfaceError
from xtool.hypercall.privcmd import Privcmd

_FLAGS = d.HEADER_SIZE + d.GetDomainInfo.flags.offset
_DOMAIN = d.HEADER_SIZE + d.GetDomainInfo.domain.offset
_HANDLE = d.HEADER_SIZE + d.GetDomainInfo.handle.offset
_SIZE = d.HEADER_SIZE + d.GetDomainInfo.size()
_ENDED = d.XEN_DOMINF_dying | d.XEN_DOMINF_shutdown


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
