"""What a user of grants may ask for: Protocols.

``xtool.grant.device`` and ``xtool.grant.alloc`` implement them on /dev/xen/gntdev and /dev/xen/gntalloc,
``xtool.fake.grants`` in memory; the tests in ``tests/contract`` run on both. Pages are 4096 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Protocol, TypeVar

from xtool.grant.copy import CopySegment

_S = TypeVar("_S")


class Pages(Protocol):
    """Shared pages in our address space, one after the other in ``view``. Drop every view taken from it
    before ``close``: that raises ``BufferError`` while one exists, and may be called again."""

    view: memoryview

    def notify_on_unmap(self, offset: int | None = None, port: int | None = None) -> None:
        """When this mapping goes away, also by our death: write 0 to the byte at ``offset``, send an event
        through ``port``, a port of this domain. None leaves out either; both None forgets it."""

    def close(self) -> None:
        """Unmap. May be called again."""

    def __enter__(self: _S) -> _S: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Mapped(Pages, Protocol):
    """Pages another domain granted to us; ``grants`` are the ``(domid, ref)`` in the order of the pages."""

    grants: tuple[tuple[int, int], ...]


class Shared(Pages, Protocol):
    """Pages of ours that another domain may use; ``refs`` are their grant references, in order.

    ``close`` ends the sharing, but a page that the peer has mapped stays shared until it lets go.
    """

    domid: int
    refs: tuple[int, ...]


class Grants(Protocol):
    """Other domains' pages. Raises ``GrantError`` naming the grant and the status Xen gave for it."""

    def map(self, domid: int, refs: Sequence[int], writable: bool = True) -> Mapped:
        """Map all of the pages or none."""

    def map_many(self, grants: Sequence[tuple[int, int]], writable: bool = True) -> Mapped:
        """The same for pages of several domains: ``(domid, ref)`` each."""

    def copy(self, segments: Iterable[CopySegment]) -> list[int]:
        """Copy; each segment's status: 0 or a negative ``GNTST_*``. ``CopyBatch`` does it faster."""

    def copy_block(self, address: int, count: int) -> None:
        """What ``CopyBatch`` calls."""

    def close(self) -> None:
        """Unmap everything that is mapped through this. May be called again."""

    def __enter__(self: _S) -> _S: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class GrantAllocator(Protocol):
    """Memory of ours for others to use. Raises ``GrantError``."""

    def share(self, domid: int, count: int, writable: bool = True) -> Shared:
        """``count`` pages of zeroes that ``domid`` may map and copy from, and write to if ``writable``."""

    def close(self) -> None:
        """End every sharing made through this. May be called again."""

    def __enter__(self: _S) -> _S: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
