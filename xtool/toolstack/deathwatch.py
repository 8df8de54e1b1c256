"""How keepers and the watcher learn that a domain ended: xenstored's announcement, and a glance at the
hypervisor.

Facts: ``@releaseDomain`` fires for every domain that shuts down or goes, and does not say which. A watch
fires once when it is registered. A connection's watches die with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic

from xtool.errors import XtoolError
from xtool.hypercall.glance import Census, Domains, Glance
from xtool.proto.xenstore import Op, PacketParser, encode, strings
from xtool.xenstore import paths
from xtool.xenstore.transport import Transport, connect_default

#: xenstored is tried again after so many seconds.
_RETRY = 2.0
#: How long it may take to answer the one question it is asked, seconds: the watcher must not hang with it.
_ANSWER = 5.0


class Announcements:
    """``fileno`` may change with each call of ``drain``; it is -1 while xenstored is away."""

    def __init__(self) -> None:
        self._link: Transport | None = None
        self._tried = float("-inf")
        self._connect()

    def fileno(self) -> int:
        return self._link.fileno() if self._link else -1

    def drain(self) -> bool:
        """Take in what xenstored said; whether it said something, which is all we need."""
        if self._link is None:
            if monotonic() - self._tried >= _RETRY:
                self._connect()
            return False
        heard = False
        try:
            while data := self._link.recv():
                heard = True
                if len(data) < 4096:
                    return True
            if data is None:
                return heard
        except OSError:
            pass
        self._link.close()
        self._link = None
        return heard

    def _connect(self) -> None:
        self._tried = monotonic()
        try:
            self._link = connect_default()
            self._link.send(encode(Op.WATCH, 1, strings("@releaseDomain", "end")))
        except (OSError, XtoolError):
            self.disconnect()

    def disconnect(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def close(self) -> None:
        self.disconnect()


class DeathWatch(Announcements):
    """Over one domain: a keeper's."""

    def __init__(self, domid: int, handle: bytes) -> None:
        self._glance = Glance()
        self.follow(domid, handle)
        super().__init__()

    def follow(self, domid: int, handle: bytes) -> None:
        """Watch over this domain from now on."""
        self._domid, self._handle = domid, handle

    def ended(self) -> bool:
        """Whether the domain has shut down or is gone."""
        return self._glance.ended(self._domid, self._handle)

    def close(self) -> None:
        super().close()
        self._glance.close()


class Lookout(Announcements):
    """Over all domains: the watcher's."""

    def __init__(self) -> None:
        self._census = Census()
        super().__init__()

    def domains(self) -> Domains:
        """Those there are now. Raises ``HypercallError``."""
        return self._census.domains()

    def close(self) -> None:
        super().close()
        self._census.close()


def device_models(domids: Sequence[int]) -> set[int]:
    """Which of these domains a QEMU was noted for. Raises ``XtoolError``."""
    from xtool.xenstore.client import open_store

    with open_store(deadline=_ANSWER) as store:
        found = store.get_many([paths.device_model_pid(domid) for domid in domids])
    return {domid for domid in domids if (found[paths.device_model_pid(domid)] or "").isdecimal()}


def device_model_pid(domid: int) -> int:
    """What the toolstack noted as the pid of the domain's QEMU, 0 if it has none or nobody answers."""
    import select

    try:
        link = connect_default()
    except XtoolError:
        return 0
    parser = PacketParser()
    end = monotonic() + _ANSWER
    try:
        link.send(encode(Op.READ, 2, strings(paths.device_model_pid(domid))))
        poller = select.poll()
        poller.register(link.fileno(), select.POLLIN)
        while (left := end - monotonic()) > 0:
            poller.poll(left * 1000)
            data = link.recv()
            if data == b"":
                return 0
            parser.receive_data(data or b"")
            packet = parser.next_packet()
            if packet is not None and packet.req_id == 2:
                return int(packet.payload) if packet.op is Op.READ and packet.payload.isdigit() else 0
        return 0
    except (OSError, XtoolError):
        return 0
    finally:
        link.close()
