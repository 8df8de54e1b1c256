"""Tap devices: made to stay, and removed.

The host's end of an interface that a process of ours serves; ``xtool.backends.tap`` tells how they work.
"""

from __future__ import annotations

import os
from fcntl import ioctl
from struct import Struct

from xtool.abi import tun
from xtool.errors import HostError

_FLAGS = tun.IFF_TAP | tun.IFF_NO_PI | tun.IFF_VNET_HDR | tun.IFF_MULTI_QUEUE
_IFREQ_SHORT = Struct("=16sH22x")  # struct ifreq with ifr_flags


def make(name: str) -> None:
    """A tap device that stays when nobody has it open, if there is none yet. Raises ``HostError``."""
    fd = open_queue(name)
    try:
        ioctl(fd, tun.TUNSETPERSIST, 1)
    except OSError as error:
        raise refused(name, error) from error
    finally:
        os.close(fd)


def remove(name: str) -> None:
    """Remove it, if it is there and a tap device. Raises ``HostError``."""
    if "/" in name or not os.path.exists(f"/sys/class/net/{name}/tun_flags"):
        return
    fd = open_queue(name)
    try:
        ioctl(fd, tun.TUNSETPERSIST, 0)
    except OSError as error:
        raise refused(name, error) from error
    finally:
        os.close(fd)


def open_queue(name: str, flags: int = _FLAGS) -> int:
    """A new queue of the tap device, which is made if there is none. Raises ``HostError``."""
    try:
        fd = os.open(tun.DEV_NET_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"cannot open {tun.DEV_NET_TUN}: {os.strerror(error.errno or 0)}", hint="modprobe tun"
        ) from error
    try:
        ioctl(fd, tun.TUNSETIFF, _IFREQ_SHORT.pack(raw_name(name), flags))
    except OSError as error:
        os.close(fd)
        raise refused(name, error) from error
    return fd


def refused(name: str, error: OSError) -> HostError:
    return HostError(f"the tap device {name} cannot be used: {os.strerror(error.errno or 0)}")


def raw_name(name: str) -> bytes:
    raw = name.encode()
    if not 0 < len(raw) < tun.IFNAMSIZ or b"/" in raw:
        raise HostError(f"{name!r} is no name of an interface")
    return raw
