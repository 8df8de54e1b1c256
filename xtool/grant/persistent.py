"""Granted pages kept mapped between requests, in a bounded number."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import TracebackType

from xtool.grant.port import Grants, Mapped


class _Page:
    __slots__ = ("mapped", "used_at", "users", "view")

    def __init__(self, mapped: Mapped) -> None:
        self.mapped = mapped
        self.view = mapped.view
        self.users = 0
        self.used_at = 0.0


class PersistentGrants:
    """A cache of at most ``limit`` mapped pages, the least recently used going first.

    A page in use is never unmapped: each ``acquire`` needs its ``release``. Where every page is in use, or
    was within the last ``idle`` seconds (of ``clock``), ``acquire`` gives None, and the request is served by
    a grant copy instead: so a peer that goes through more pages than ``limit`` cannot make us map and unmap
    all the time.
    """

    def __init__(
        self,
        grants: Grants,
        limit: int,
        *,
        writable: bool = True,
        idle: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit = limit
        self._idle = idle
        self._clock = clock
        self._grants = grants
        self._writable = writable
        self._pages: OrderedDict[tuple[int, int], _Page] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, grant: tuple[int, int]) -> bool:
        return grant in self._pages

    def acquire(self, domid: int, ref: int) -> memoryview | None:
        """The page, mapped now if it was not. Raises ``GrantError``. Take no view of it beyond
        ``release``."""
        key = (domid, ref)
        page = self._pages.get(key)
        if page is None:
            if len(self._pages) >= self.limit and not self._evict():
                return None
            page = self._pages[key] = _Page(self._grants.map(domid, (ref,), self._writable))
        else:
            self._pages.move_to_end(key)
        page.users += 1
        page.used_at = self._clock()
        return page.view

    def acquire_mapped(self, domid: int, refs: Iterable[int]) -> list[memoryview | None]:
        """As ``acquire`` for each, but nothing is mapped: None for a page that is not, which then needs no
        ``release``. For hot paths."""
        pages, now = self._pages, self._clock()
        found: list[memoryview | None] = []
        for ref in refs:
            key = (domid, ref)
            page = pages.get(key)
            if page is None:
                found.append(None)
                continue
            pages.move_to_end(key)
            page.users += 1
            page.used_at = now
            found.append(page.view)
        return found

    def release(self, domid: int, ref: int) -> None:
        self.release_all(domid, (ref,))

    def release_all(self, domid: int, refs: Iterable[int]) -> None:
        pages = self._pages
        for ref in refs:
            page = pages.get((domid, ref))
            if page is not None and page.users:
                page.users -= 1

    def forget(self, domid: int, ref: int) -> bool:
        """Unmap one page, for a peer that takes the grant back. False if it is in use, or not here."""
        page = self._pages.get((domid, ref))
        if page is None or page.users:
            return False
        page.mapped.close()
        del self._pages[domid, ref]
        return True

    def _evict(self) -> bool:
        latest = self._clock() - self._idle
        for key, page in self._pages.items():
            if page.used_at > latest:
                return False  # and those after it were used later still
            if not page.users:
                return self.forget(*key)
        return False

    def close(self) -> None:
        """Unmap all of them, in use or not. Raises ``BufferError``, after unmapping the others, while
        somebody holds a view; may be called again."""
        busy = None
        for key, page in list(self._pages.items()):
            try:
                page.mapped.close()
                del self._pages[key]
            except BufferError as error:
                busy = error
        if busy is not None:
            raise busy

    def __enter__(self) -> PersistentGrants:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
