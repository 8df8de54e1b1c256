"""Pages for data under way, shared with the backend's domain for as long as the frontend lives."""

from __future__ import annotations

from collections.abc import Sequence

from xtool.grant.port import GrantAllocator

PAGE = 4096


class PagePool:
    """``count`` shared pages, lent by number. ``refs`` are their grants.

    Raises ``GrantError``.
    """

    def __init__(self, allocator: GrantAllocator, domid: int, count: int) -> None:
        self._shared = allocator.share(domid, count)
        self.refs = self._shared.refs
        self._free = list(range(count))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Some of the free pages; there must be so many."""
        # Those given back last: a backend that keeps pages mapped, and not all of them, has these.
        cut = len(self._free) - count
        pages, self._free = self._free[cut:], self._free[:cut]
        return pages

    def give(self, pages: Sequence[int]) -> None:
        self._free += pages

    def fill(self, pages: Sequence[int], data: memoryview) -> None:
        """Copy ``data`` into the pages, one after the other."""
        view = self._shared.view
        for number, page in enumerate(pages):
            part = data[number * PAGE : (number + 1) * PAGE]
            view[page * PAGE : page * PAGE + len(part)] = part

    def drain(self, pages: Sequence[int], data: memoryview) -> None:
        """Copy the pages' contents out into ``data``."""
        view = self._shared.view
        for number, page in enumerate(pages):
            length = min(PAGE, len(data) - number * PAGE)
            data[number * PAGE : number * PAGE + length] = view[page * PAGE : page * PAGE + length]

    def close(self) -> None:
        self._shared.close()
