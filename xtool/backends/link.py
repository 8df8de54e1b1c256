"""The host's end of an interface, as the net backend sees it: something that takes frames and gives frames.

``tap.py`` is one on the host's network, ``passt.py`` one that needs nothing of the host's network.

Each frame has ``head`` bytes in front of it that belong to the link. The backend leaves room for them, so
that a frame is copied once: from the guest's pages to where the link takes it from, and the other way round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from xtool.backends.vnethdr import Offload
from xtool.errors import HostError
from xtool.proto.netif import MAX_FRAME

#: The most bytes before a frame that any link wants, and what a frame may take up with them.
HEAD_MAX = 16
FRAME_ROOM = HEAD_MAX + MAX_FRAME + 1


class LinkGoneError(HostError):
    """The interface was deleted, the helper died: to be made again."""


class Link(ABC):
    """One queue of a link. Nothing here waits. ``LinkGoneError`` may come out of every call but ``close``."""

    head: int
    #: Whether frames with blank checksums, and those to be cut (IPv4, IPv6), may be sent, and may come.
    offloads: bool

    @abstractmethod
    def fileno(self) -> int:
        """Readable when ``receive`` has a frame, writable when ``blocked`` may be over."""

    @abstractmethod
    def prepare(self, room: memoryview, todo: Offload) -> None:
        """Fill in the first ``head`` bytes of ``room``, which is all of what will be sent.

        Raises ``RemoteProtocolError`` for a frame that must be dropped.
        """

    @abstractmethod
    def send(self, frames: Sequence[memoryview]) -> int:
        """Send prepared frames; how many were lost. Those that cannot go yet are kept (a copy), and
        ``blocked`` is true."""

    @property
    def blocked(self) -> bool:
        """Send nothing before this is false: see ``flush``."""
        return False

    @abstractmethod
    def flush(self) -> None:
        """Send what was kept, as far as it goes now."""

    @abstractmethod
    def receive(self, room: memoryview) -> int:
        """The next frame with its head, into ``room`` (``FRAME_ROOM`` bytes or more); its size with the head,
        0 if there is none now."""

    @property
    def holds(self) -> bool:
        """``receive`` has something though ``fileno`` may not be readable: it was read already."""
        return False

    @abstractmethod
    def offload(self, room: memoryview, size: int, csum: tuple[bool, bool]) -> Offload:
        """What is left to do to a frame that ``receive`` gave, ``size`` bytes with its head, for a frontend
        that takes blank checksums as ``csum`` says (IPv4, IPv6). Raises ``RemoteProtocolError`` for one that
        is to be dropped."""

    @abstractmethod
    def close(self) -> None:
        """May be called again."""


class LinkSource(ABC):
    """Makes the queues of one interface, again if they went away."""

    #: How many queues there can be.
    queues: int = 1

    @abstractmethod
    def open(self, count: int) -> Sequence[Link]:
        """``count`` queues; those that were open are closed. Raises ``HostError`` when that cannot be done
        now; it may be tried again."""

    @abstractmethod
    def accept(self, *, csum: bool, tso4: bool, tso6: bool) -> None:
        """What the frontend takes: the others' frames must come so. The queues are open."""

    def last_words(self) -> str:
        """What a helper said, for the reason when it fails."""
        return ""

    def describe(self) -> dict[str, object]:
        return {}

    @abstractmethod
    def close(self, *, for_good: bool) -> None:
        """Let go. ``for_good``: the interface is not needed any more, by a successor either."""
