"""Network interfaces by netlink: find, rename, set up, put on a bridge.

Facts about netlink and interfaces
----------------------------------
- An interface cannot be renamed while it is up, and netback brings it up by itself once connected: so the
  name comes first, then the bridge, then up.
- A bridge takes the lowest MAC address among its ports as its own: Xen's ends get fe:ff:ff:ff:ff:ff, which
  is the highest, so that a starting guest never changes the bridge's address.
- A bridge's MTU follows the lowest one of its ports: the port's is set before it is put there.
- netback refuses an MTU above 1500 until its frontend has said that it takes scattered packets. Xen's script
  goes on with 1500 then, and so do we: the guest is told what the interface has.
- ``ifalias`` shows in ``ip link``; 255 bytes.

pyroute2 is imported only here, and late: it costs a quarter of a second.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from xtool.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

VIF_ADDRESS = "fe:ff:ff:ff:ff:ff"
_NET = "/sys/class/net"


class Link(NamedTuple):
    number: int
    mtu: int
    bridge: bool


def exists(name: str) -> bool:
    return os.path.isdir(f"{_NET}/{name}") and "/" not in name


def look(name: str) -> Link | None:
    """An interface of this name, from sysfs; None if there is none."""
    if not exists(name):
        return None
    try:
        index = int(_read(name, "ifindex"))
        return Link(index, int(_read(name, "mtu")), os.path.isdir(f"{_NET}/{name}/bridge"))
    except (OSError, ValueError):
        return None  # it went while we looked


def _read(name: str, attribute: str) -> str:
    with open(f"{_NET}/{name}/{attribute}") as file:
        return file.read()


@contextmanager
def netlink() -> Iterator[Any]:
    """A netlink socket. Raises ``HostError`` for what the kernel refuses within."""
    try:
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError
    except ImportError as error:
        raise HostError(
            "the Python package pyroute2 is missing: xtool sets interfaces up with it",
            hint="install xtool with its dependencies",
        ) from error
    try:
        with IPRoute() as ip:
            yield ip
    except NetlinkError as error:
        raise HostError(f"the kernel refused to change an interface: {error.args[-1]}") from error


def prepare(ip: Any, link: Link, *, name: str | None, mtu: int, master: int, alias: str) -> int:
    """Name, address, MTU, bridge, up: in this order. Returns the MTU it has then."""
    ip.link("set", index=link.number, state="down")
    changes: dict[str, object] = {"address": VIF_ADDRESS, "ifalias": alias[:255]}
    if name is not None:
        changes["ifname"] = name
    ip.link("set", index=link.number, **changes)
    try:
        ip.link("set", index=link.number, mtu=mtu)
    except Exception as error:
        if getattr(error, "code", 0) != errno.EINVAL or mtu <= link.mtu:
            raise
        mtu = link.mtu
    ip.link("set", index=link.number, master=master)
    ip.link("set", index=link.number, state="up")
    return mtu
