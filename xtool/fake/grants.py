"""/dev/xen/gntdev and /dev/xen/gntalloc in memory, for one domain of a ``FakeMachine``."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from xtool.abi.base import PAGE_SIZE
from xtool.abi.grant import (
    GNTCOPY_dest_gref,
    GNTCOPY_source_gref,
    GNTST_no_device_space,
    GNTST_okay,
    status_name,
)
from xtool.abi.linux import GntdevGrantCopySegment
from xtool.errors import GrantError, LocalProtocolError
from xtool.fake.machine import FakeMachine, Grant
from xtool.grant.copy import SEGMENT_SIZE, CopySegment, copy_all
from xtool.grant.window import Window

#: Pages all users of gntalloc together may have.
ALLOC_LIMIT = 1024


class FakePages:
    """Mapped or shared pages. ``let_go`` gives back what they are held by."""

    def __init__(
        self,
        machine: FakeMachine,
        domid: int,
        frames: Sequence[int],
        let_go: Callable[[FakePages], None],
        *,
        writable: bool,
        grants: tuple[tuple[int, int], ...] = (),
        peer: int = 0,
        refs: tuple[int, ...] = (),
    ) -> None:
        self.grants = grants
        self.domid = peer
        self.refs = refs
        self._machine = machine
        self._owner = domid
        self._let_go = let_go
        self._writable = writable
        self._notify: dict[int, tuple[int | None, int | None]] = {}
        self._window = Window.of_pages(machine.file, [f * PAGE_SIZE for f in frames], writable=writable)
        self._frames = tuple(frames)
        self.view = self._window.view

    def notify_on_unmap(self, offset: int | None = None, port: int | None = None) -> None:
        if offset is not None and not 0 <= offset < self._window.size:
            raise LocalProtocolError(f"unmap notification at byte {offset} of {self._window.size}")
        guest = self._machine.guests[self._owner]
        if (port is not None and port not in guest.ports) or (offset is not None and not self._writable):
            raise GrantError("an unmap notification", errno.EINVAL)
        # gntalloc has one for each page, gntdev one for each mapping.
        self._notify[(offset or 0) // PAGE_SIZE if self.refs else 0] = (offset, port)

    def close(self) -> None:
        if self._window.closed:
            return
        self._window.close()
        for offset, port in self._notify.values():
            if offset is not None:
                place = self._frames[offset // PAGE_SIZE] * PAGE_SIZE + offset % PAGE_SIZE
                os.pwrite(self._machine.file, b"\0", place)
            with self._machine.lock:
                guest = self._machine.guests.get(self._owner)
                if port is not None and guest is not None and port in guest.ports:
                    self._machine.send(self._owner, port)
        self._let_go(self)

    def __enter__(self) -> FakePages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Device:
    def __init__(self, machine: FakeMachine, domid: int) -> None:
        self._machine = machine
        self._domid = domid
        self.live: set[FakePages] = set()

    def close(self) -> None:
        """As the kernel does when a process dies."""
        busy = None
        for pages in list(self.live):
            try:
                pages.close()
            except BufferError as error:
                busy = error
        if busy is not None:
            raise busy

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FakeGrants(_Device):
    """The ``Grants`` of a domain. ``maps`` and ``copies`` count operations, for tests; ``fail`` is an errno
    that every one of them meets."""

    def __init__(self, machine: FakeMachine, domid: int) -> None:
        super().__init__(machine, domid)
        self.maps = 0
        self.copies = 0
        self.fail = 0

    def __enter__(self) -> FakeGrants:
        return self

    def map(self, domid: int, refs: Sequence[int], writable: bool = True) -> FakePages:
        return self.map_many([(domid, ref) for ref in refs], writable)

    def map_many(self, grants: Sequence[tuple[int, int]], writable: bool = True) -> FakePages:
        if not grants:
            raise LocalProtocolError("no grants to map")
        self.maps += 1
        if self.fail:
            raise GrantError(f"mapping {len(grants)} grants", self.fail)
        machine = self._machine
        with machine.lock:
            found: list[Grant] = []
            room = machine.maptrack - sum(len(pages.grants) for pages in self.live)
            for domid, ref in grants:
                status, grant = machine.check(self._domid, domid, ref, writable)
                if len(found) >= room:
                    status, grant = GNTST_no_device_space, None
                if grant is None:
                    raise GrantError(
                        f"mapping grant {ref} of domain {domid}",
                        errno.EINVAL,
                        domid=domid,
                        ref=ref,
                        status=status,
                        detail=status_name(status),
                    )
                found.append(grant)
            for grant in found:
                machine.mapped(grant)

        def let_go(pages: FakePages) -> None:
            self.live.discard(pages)
            for (domid, ref), grant in zip(grants, found, strict=True):
                machine.unmapped(domid, ref, grant)

        pages = FakePages(
            machine,
            self._domid,
            [grant.frame for grant in found],
            let_go,
            writable=writable,
            grants=tuple(grants),
        )
        self.live.add(pages)
        return pages

    def copy(self, segments: Iterable[CopySegment]) -> list[int]:
        return copy_all(self, segments)

    def copy_block(self, address: int, count: int) -> None:
        self.copies += 1
        what = f"a copy of {count} segments"
        if self.fail:
            raise GrantError(what, self.fail)
        for number in range(count):
            segment = GntdevGrantCopySegment.from_address(address + number * SEGMENT_SIZE)
            sides = ((segment.source, GNTCOPY_source_gref), (segment.dest, GNTCOPY_dest_gref))
            if not segment.flags & (GNTCOPY_source_gref | GNTCOPY_dest_gref):
                raise GrantError(what, errno.EINVAL)
            for word, flag in sides:
                if segment.flags & flag and (word >> 32 & 0xFFFF) + segment.len > PAGE_SIZE:
                    raise GrantError(what, errno.EINVAL)
            segment.status = self._copy_one(segment) if segment.len else GNTST_okay

    def _copy_one(self, segment: GntdevGrantCopySegment) -> int:
        machine = self._machine
        places: list[int] = []  # in the machine's file, for the granted sides
        for word, flag, writable in (
            (segment.source, GNTCOPY_source_gref, False),
            (segment.dest, GNTCOPY_dest_gref, True),
        ):
            if not segment.flags & flag:
                continue
            domid, ref, offset = word >> 48, word & 0xFFFF_FFFF, word >> 32 & 0xFFFF
            machine.before_copy(domid, ref)
            with machine.lock:
                status, grant = machine.check(self._domid, domid, ref, writable)
            if grant is None:
                return status
            places.append(grant.frame * PAGE_SIZE + offset)
        if segment.flags & GNTCOPY_source_gref:
            data = os.pread(machine.file, segment.len, places.pop(0))
        else:
            data = ctypes.string_at(segment.source, segment.len)
        if segment.flags & GNTCOPY_dest_gref:
            os.pwrite(machine.file, data, places.pop(0))
        else:
            ctypes.memmove(segment.dest, data, len(data))
        return GNTST_okay


class FakeAllocator(_Device):
    """The ``GrantAllocator`` of a domain."""

    def __enter__(self) -> FakeAllocator:
        return self

    def share(self, domid: int, count: int, writable: bool = True) -> FakePages:
        if count < 1:
            raise LocalProtocolError("no pages to share")
        machine = self._machine
        with machine.lock:
            if sum(len(pages.refs) for pages in self.live) + count > ALLOC_LIMIT:
                raise GrantError(f"sharing {count} pages with domain {domid}", errno.ENOSPC, domid=domid)
            frames = [machine.new_frame() for _ in range(count)]
            refs = tuple(machine.grant(self._domid, domid, f, readonly=not writable) for f in frames)

        def let_go(pages: FakePages) -> None:
            self.live.discard(pages)
            for ref, frame in zip(refs, frames, strict=True):
                machine.end_grant(self._domid, ref)
                machine.drop(frame)

        pages = FakePages(machine, self._domid, frames, let_go, writable=True, peer=domid, refs=refs)
        self.live.add(pages)
        return pages
