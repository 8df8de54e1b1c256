"""/dev/xen/evtchn: event channels from user space.

Facts about /dev/xen/evtchn
---------------------------
* A port belongs to the open file that bound it: others get ENOTCONN. Closing the file closes its ports.
* When an event comes, the kernel masks the port and puts its number into a ring that ``read`` empties, four
  bytes each, up to 4096 bytes per call. ``write`` of port numbers unmasks; numbers that are not ours are
  skipped without a word.
* The ring grows with the number of bound ports and a masked port cannot enter it twice, so it does not
  overflow. Old kernels had a fixed ring: then ``read`` gives EFBIG until ``IOCTL_EVTCHN_RESET``,
  which empties the ring. What was in it is lost, so every port counts as pending.
* A number can stay in the ring after its port was closed, and be read when the number is in use again. So an
  event is never more than a hint to look.
* The bind ioctls return the port as the ioctl's result, which Python gives only with a mutable argument.
* Notifying a port whose other end is gone succeeds: Xen drops it.
* ``IOCTL_EVTCHN_RESTRICT_DOMID`` works once, for a guest's domid only.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Iterable
from fcntl import ioctl
from struct import Struct
from types import TracebackType

from xtool.abi import linux as lx
from xtool.abi.base import Abi
from xtool.devnode import open_device
from xtool.errors import EventChannelError
from xtool.evtchn.port import PORTS_AT_ONCE

_PORT = Struct("<I")


class EventDevice:
    """The ``EventChannels`` of this domain. Raises ``NoXenError`` or ``PrivilegeError`` when it cannot be
    opened. For one thread, but for ``notify``."""

    def __init__(self) -> None:
        self._fd = open_device(lx.EVTCHN, "xen-evtchn", os.O_NONBLOCK)
        self._ports: set[int] = set()

    # --- binding ------------------------------------------------------------------------------------
    def _bind(self, what: str, request: int, argument: Abi) -> int:
        try:
            port = int(ioctl(self._fd, request, bytearray(argument), True))
        except OSError as error:
            raise EventChannelError(what, error.errno or 0) from None
        self._ports.add(port)
        return port

    def bind_unbound(self, domid: int) -> int:
        return self._bind(
            f"a new event channel for domain {domid}",
            lx.IOCTL_EVTCHN_BIND_UNBOUND_PORT,
            lx.EvtchnBindUnboundPort(remote_domain=domid),
        )

    def bind_interdomain(self, domid: int, remote_port: int) -> int:
        what = f"binding to event channel {remote_port} of domain {domid}"
        if not 0 <= remote_port <= 0xFFFF_FFFF:  # a peer's word, and ctypes would cut it short
            raise EventChannelError(what, errno.EINVAL)
        return self._bind(
            what,
            lx.IOCTL_EVTCHN_BIND_INTERDOMAIN,
            lx.EvtchnBindInterdomain(remote_domain=domid, remote_port=remote_port),
        )

    def bind_virq(self, virq: int) -> int:
        return self._bind(f"binding VIRQ {virq}", lx.IOCTL_EVTCHN_BIND_VIRQ, lx.EvtchnBindVirq(virq=virq))

    def unbind(self, port: int) -> None:
        try:
            ioctl(self._fd, lx.IOCTL_EVTCHN_UNBIND, _PORT.pack(port))
        except OSError as error:
            raise EventChannelError(f"closing event channel {port}", error.errno or 0) from None
        self._ports.discard(port)

    def restrict(self, domid: int) -> None:
        try:
            ioctl(self._fd, lx.IOCTL_EVTCHN_RESTRICT_DOMID, bytes(lx.EvtchnRestrictDomid(domid=domid)))
        except OSError as error:
            raise EventChannelError(
                f"restricting event channels to domain {domid}", error.errno or 0
            ) from None

    # --- events -------------------------------------------------------------------------------------
    def notify(self, port: int) -> None:
        try:
            ioctl(self._fd, lx.IOCTL_EVTCHN_NOTIFY, _PORT.pack(port))
        except OSError as error:
            raise EventChannelError(f"notifying event channel {port}", error.errno or 0) from None

    def pending(self, limit: int = PORTS_AT_ONCE) -> list[int]:
        try:
            return array("I", os.read(self._fd, 4 * min(limit, PORTS_AT_ONCE))).tolist()
        except BlockingIOError:
            return []
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise EventChannelError("reading events", error.errno or 0) from None
        ioctl(self._fd, lx.IOCTL_EVTCHN_RESET)
        return sorted(self._ports)

    def unmask(self, ports: Iterable[int]) -> None:
        raw = array("I", ports).tobytes()
        try:
            for start in range(0, len(raw), 4 * PORTS_AT_ONCE):
                os.write(self._fd, raw[start : start + 4 * PORTS_AT_ONCE])
        except OSError as error:
            raise EventChannelError("unmasking event channels", error.errno or 0) from None

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._ports.clear()

    def __enter__(self) -> EventDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
