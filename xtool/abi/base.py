"""How Xen's C layouts are written down here.

A layout is a ``ctypes.LittleEndianStructure`` with the C field names unchanged and every gap spelt out as
``_padN``. ``@layout`` says which C type it mirrors and how large that is on x86-64; a drift raises at
import, and ``tests/abi`` compares every field's offset with the real headers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int16, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Any, ClassVar, NewType, TypeAlias, TypeVar

u8: TypeAlias = c_uint8
u16: TypeAlias = c_uint16
s16: TypeAlias = c_int16
u32: TypeAlias = c_uint32
u64: TypeAlias = c_uint64
#: What ctypes takes as ``_fields_``.
Fields: TypeAlias = list[tuple[str, Any]]

#: A domain's number. 0 is the control domain; numbers from 0x7FF0 have special meanings.
Domid = NewType("Domid", int)
#: A machine frame: 4 KiB of real memory. A guest frame: what the guest calls it (a PV guest's pfn).
Mfn = NewType("Mfn", int)
Gfn = NewType("Gfn", int)
Pfn = NewType("Pfn", int)
GrantRef = NewType("GrantRef", int)
#: An event channel port, local to one domain.
Port = NewType("Port", int)

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT


class Abi(ctypes.LittleEndianStructure):
    """Base of every layout. ``C_NAME`` and ``HEADER`` (below ``xen/include/public``) name its source;
    ``SINCE``/``UNTIL`` bound the domctl interface versions it holds for, where it changed."""

    C_NAME: ClassVar[str] = ""
    HEADER: ClassVar[str] = ""
    #: Python field name -> C member, where they differ (anonymous unions, nested members).
    C_MEMBERS: ClassVar[dict[str, str]] = {}

    @classmethod
    def size(cls) -> int:
        return ctypes.sizeof(cls)


LAYOUTS: list[type[ctypes.Structure]] = []

_T = TypeVar("_T", bound=type[ctypes.Structure])


def layout(size: int, c_name: str = "", header: str = "") -> Callable[[_T], _T]:
    """Register a layout and raise ``TypeError`` at import if it is not ``size`` bytes.

    Without ``c_name`` the layout is private (a part of a union) and only its size is checked.
    """

    def check(cls: _T) -> _T:
        actual = ctypes.sizeof(cls)
        if actual != size:
            raise TypeError(f"{cls.__name__} is {actual} bytes, {c_name or 'its C type'} is {size}")
        cls.C_NAME = c_name  # type: ignore[attr-defined]
        cls.HEADER = header  # type: ignore[attr-defined]
        if c_name:
            LAYOUTS.append(cls)
        return cls

    return check


def ioc(magic: str, number: int, size: int) -> int:
    """Linux ``_IOC(_IOC_NONE, magic, number, size)``, the form all Xen device ioctls use."""
    return size << 16 | ord(magic) << 8 | number


def page_up(value: int) -> int:
    """Round bytes up to whole pages' bytes."""
    return (value + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)


def pages(value: int) -> int:
    """How many pages hold ``value`` bytes."""
    return (value + PAGE_SIZE - 1) >> PAGE_SHIFT


def fields_of(cls: type[ctypes.Structure]) -> list[tuple[str, Any]]:
    """``(name, type)`` of every declared field, explicit padding left out."""
    return [(f[0], f[1]) for f in cls._fields_ if not f[0].startswith("_pad")]
