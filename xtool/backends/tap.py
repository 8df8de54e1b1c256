"""A tap device: the host's end of a guest's interface, on a bridge.

Facts about tap devices (Linux's ``drivers/net/tun.c``)
-------------------------------------------------------
* ``TUNSETIFF`` makes the interface or, where one of that name is there with the same flags, opens it; without
  ``IFF_MULTI_QUEUE`` a second opener gets EBUSY. With it, each open file is a queue.
* A persistent interface stays when its last file is closed: a backend that was killed leaves it on its
  bridge, and its successor opens it again. Meanwhile the kernel drops what comes for it.
* Each ``read`` gives one frame and each ``write`` takes one, with a virtio-net header in front. A read into
  too little room cuts the frame, silently.
* A write is refused with EINVAL for a header that does not fit its frame, with EIO while the interface is
  down; that frame is lost. An interface that was deleted gives EBADFD, and POLLERR.
* ``TUNSETOFFLOAD`` holds for the whole interface: what the other side may leave to do in frames that are
  read.
* Interface ioctls need any socket; ``SIOCBRADDIF`` goes by the interface's index.

The toolstack makes the interface and puts it on its bridge by netlink. Here it is made again when somebody
deleted it while the guest runs, with ioctls, which need no library.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from fcntl import ioctl
from struct import Struct

from xtool.abi import tun
from xtool.backends import vnethdr
from xtool.backends.link import Link, LinkGoneError, LinkSource
from xtool.backends.vnethdr import Offload
from xtool.devices.hotplug.tap import open_queue, raw_name, refused
from xtool.errors import HostError

HEAD = vnethdr.HEADER.size
QUEUES_MAX = 8
#: What an end in the host gets: see ``devices.hotplug.link``.
_ADDRESS = bytes.fromhex("feffffffffff")

_INT = Struct("=i")
_IFREQ_SHORT = Struct("=16sH22x")  # struct ifreq with ifr_flags
_IFREQ_INT = Struct("=16si20x")  # with ifr_mtu, ifr_ifindex
_IFREQ_ADDRESS = Struct("=16sH14s8x")  # with ifr_hwaddr
_GONE = (errno.EBADFD, errno.ENODEV, errno.ENXIO)


class Tap(Link):
    """One queue of the tap device ``name``. Raises ``HostError`` when it cannot be opened."""

    head = HEAD
    offloads = True

    def __init__(self, name: str) -> None:
        self.name = name
        self._fd = open_queue(name)
        try:
            ioctl(self._fd, tun.TUNSETVNETHDRSZ, _INT.pack(HEAD))
            ioctl(self._fd, tun.TUNSETPERSIST, 1)
        except OSError as error:
            self.close()
            raise refused(name, error) from error

    def fileno(self) -> int:
        return self._fd

    def set_offload(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        flags = 0
        if csum:
            flags = tun.TUN_F_CSUM | (tun.TUN_F_TSO4 if tso4 else 0) | (tun.TUN_F_TSO6 if tso6 else 0)
            flags |= tun.TUN_F_TSO_ECN if tso4 or tso6 else 0
        try:
            ioctl(self._fd, tun.TUNSETOFFLOAD, flags)
        except OSError as error:
            raise self._failure(error) from error

    def set_persistent(self, on: bool) -> None:
        """Whether the interface outlives its files."""
        try:
            ioctl(self._fd, tun.TUNSETPERSIST, int(on))
        except OSError as error:
            raise self._failure(error) from error

    def prepare(self, room: memoryview, todo: Offload) -> None:
        room[:HEAD] = vnethdr.encode(room, todo, HEAD)

    def send(self, frames: Sequence[memoryview]) -> int:
        fd, write, lost = self._fd, os.write, 0
        for frame in frames:
            try:
                write(fd, frame)
            except OSError as error:
                if error.errno in _GONE:
                    raise self._failure(error) from error
                lost += 1  # EINVAL, EIO, EAGAIN: a network may lose frames
        return lost

    def flush(self) -> None:
        """Nothing is ever kept."""

    def receive(self, room: memoryview) -> int:
        try:
            return os.readv(self._fd, (room,))
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._failure(error) from error

    def offload(self, room: memoryview, size: int, csum: tuple[bool, bool]) -> Offload:
        return vnethdr.decode_at(room, size, csum)

    def _failure(self, error: OSError) -> HostError:
        return LinkGoneError(f"the interface {self.name} is gone ({os.strerror(error.errno or 0)})")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class TapSource(LinkSource):
    """The interface ``name``, which the toolstack has made; ``bridge`` and ``mtu`` are for making it
    again."""

    def __init__(self, name: str, bridge: str | None, mtu: int | None = None, *, queues: int = 1) -> None:
        self.name = name
        self.bridge = bridge
        self.mtu = mtu
        self.queues = queues
        self._open: list[Tap] = []

    def open(self, count: int) -> Sequence[Link]:
        self._close()
        there = os.path.isdir(f"/sys/class/net/{self.name}")
        try:
            for _ in range(count):
                self._open.append(Tap(self.name))
            if not there and self.bridge is not None:
                plug(self.name, self.bridge, self.mtu)
        except HostError:
            if not there:
                self.close(for_good=True)
            self._close()
            raise
        return tuple(self._open)

    def accept(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        for tap in self._open[:1]:
            tap.set_offload(csum=csum, tso4=tso4, tso6=tso6)

    def describe(self) -> dict[str, object]:
        return {"interface": self.name, "bridge": self.bridge}

    def _close(self) -> None:
        while self._open:
            self._open.pop().close()

    def close(self, *, for_good: bool) -> None:
        if for_good:
            try:
                for tap in self._open[:1] or [Tap(self.name)]:
                    tap.set_persistent(False)
                    tap.close()
            except HostError:
                pass  # it is gone already
        self._close()


def plug(name: str, bridge: str, mtu: int | None) -> None:
    """Put an interface on a bridge and up. Raises ``HostError``."""
    raw = raw_name(name)
    if not os.path.isdir(f"/sys/class/net/{bridge}/bridge"):
        raise HostError(f"this host has no bridge {bridge}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            address = _IFREQ_ADDRESS.pack(raw, tun.ARPHRD_ETHER, _ADDRESS)
            ioctl(sock, tun.SIOCSIFHWADDR, address)
            if mtu is None:
                mtu = _mtu(sock, bridge)
            ioctl(sock, tun.SIOCSIFMTU, _IFREQ_INT.pack(raw, mtu))
            index = socket.if_nametoindex(name)
            ioctl(sock, tun.SIOCBRADDIF, _IFREQ_INT.pack(raw_name(bridge), index))
            flags = _IFREQ_SHORT.unpack(ioctl(sock, tun.SIOCGIFFLAGS, _IFREQ_SHORT.pack(raw, 0)))[1]
            ioctl(sock, tun.SIOCSIFFLAGS, _IFREQ_SHORT.pack(raw, flags | tun.IFF_UP))
        except OSError as error:
            raise HostError(
                f"{name} cannot be put on the bridge {bridge}: {os.strerror(error.errno or 0)}"
            ) from error


def _mtu(sock: socket.socket, name: str) -> int:
    return int(_IFREQ_INT.unpack(ioctl(sock, tun.SIOCGIFMTU, _IFREQ_INT.pack(raw_name(name), 0)))[1])


def mtu_of(name: str) -> int | None:
    """The interface's MTU, or None if there is none."""
    try:
        with open(f"/sys/class/net/{name}/mtu") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None
