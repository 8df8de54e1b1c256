"""What the groups of hypercalls share: the device, and how a domctl or sysctl is put together."""

from __future__ import annotations

from ctypes import Structure, sizeof
from typing import TypeVar

from xtool.abi import domctl as d
from xtool.abi import sysctl as s
from xtool.abi import xen as x
from xtool.hypercall.port import Versions
from xtool.hypercall.privcmd import Privcmd

_P = TypeVar("_P", bound=Structure)


class Calls:
    versions: Versions

    def __init__(self, device: Privcmd) -> None:
        self._device = device

    def _domctl(self, name: str, cmd: int, domid: int, payload: Structure | None = None) -> bytes:
        """Carry out a domctl; the payload's bytes afterwards."""
        raw = bytearray(d.Domctl(cmd=cmd, interface_version=self.versions.domctl, domain=domid))
        size = 0
        if payload is not None:
            size = sizeof(payload)
            raw[d.HEADER_SIZE : d.HEADER_SIZE + size] = bytes(payload)
        self._device.call(f"{name} of domain {domid}", x.OP_DOMCTL, self._device.put(raw))
        return self._device.get(d.HEADER_SIZE + size)[d.HEADER_SIZE :]

    def _domctl_out(self, name: str, cmd: int, domid: int, payload: _P) -> _P:
        """The same, decoded again into the payload's type."""
        return type(payload).from_buffer_copy(self._domctl(name, cmd, domid, payload))

    def _sysctl(self, name: str, cmd: int, payload: _P) -> _P:
        raw = bytearray(s.Sysctl(cmd=cmd, interface_version=self.versions.sysctl))
        size = sizeof(payload)
        raw[s.HEADER_SIZE : s.HEADER_SIZE + size] = bytes(payload)
        self._device.call(name, x.OP_SYSCTL, self._device.put(raw))
        return type(payload).from_buffer_copy(self._device.get(s.HEADER_SIZE + size), s.HEADER_SIZE)

    def _text(self, name: str, cmd: int, size: int) -> str:
        self._device.put(bytes(size))
        self._device.call(name, x.OP_XEN_VERSION, cmd, self._device.argument)
        return self._device.get(size).split(b"\0", 1)[0].decode("ascii", "replace")
