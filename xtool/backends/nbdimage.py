"""An image behind an NBD connection: qcow2, vmdk, vhd and vhdx through qemu-nbd, and other hosts' disks.

When the server is gone
-----------------------
* The connection is made again, with pauses of ``Times.pause`` up to ``Times.pause_most`` seconds; a qemu-nbd
  is started again. Requests wait meanwhile, also those that were under way, and are carried out again: reads
  and writes of sectors can be repeated.
* ``Times.retry`` seconds after the connection was lost they fail, with EIO. From then on requests fail at
  once, but for the one that tries the connection again; when that is there, all is as before.
* A server that leaves requests unanswered for ``Times.request`` seconds counts as gone.
* A server may forget what it answered since the last flush: qemu-nbd that is killed does. So these writes are
  kept here, ``KEPT`` bytes at most (then we flush), and written again over the new connection. If the server
  refuses them then, data are lost: each flush fails until the image is opened anew, as with a raw file.
* What cannot be helped: this process and the server killed at once lose what was not flushed.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from xtool.backends.images import Geometry, Job, Results
from xtool.backends.nbdlink import TRIM_MOST, Cancel, CancelledError, LinkGoneError, NbdLink, Op
from xtool.backends.nbdsource import Source
from xtool.errors import HostError

#: Written bytes that are kept until they are flushed.
KEPT = 32 << 20
#: Pieces of a discard under way at a time.
_TRIMS = 16
_SECTOR = 512
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FLUSH = Op("flush", 0, 0)


class Times(NamedTuple):
    """Seconds; see above. ``connect``: one attempt. ``opening``: how long somebody else may hold the image's
    lock when it is opened first, who may be about to end."""

    connect: float = 5.0
    opening: float = 5.0
    request: float = 30.0
    retry: float = 60.0
    pause: float = 0.05
    pause_most: float = 5.0


TIMES = Times()


class AwayError(OSError):
    """The server is gone: nothing is known of what the request did."""


class NbdImage:
    """A ``SlowImage``; nothing is opened before ``open`` or the first request. ``tell`` gets a line when the
    server goes and comes."""

    waits = True

    def __init__(
        self, source: Source, *, readonly: bool, tell: Callable[[str], None], times: Times | None = None
    ) -> None:
        self.readonly = readonly
        self._source = source
        self._tell = tell
        self._times = times or TIMES
        self._cancel = Cancel()
        self._link: NbdLink | None = None
        self._geometry: Geometry | None = None
        self._flushes = True
        self._kept: list[list[Op]] = []
        self._kept_bytes = 0
        self._lost: OSError | None = None
        self._away_since: float | None = None
        self._pause = 0.0
        self._next_try = 0.0
        self._connections = 0

    # --- opening and closing
    def open(self) -> None:
        """The first connection. Raises ``HostError``."""
        until = time.monotonic() + self._times.opening
        try:
            while True:
                try:
                    self._link = self._connect()
                    return
                except LinkGoneError as error:
                    if not error.locked or time.monotonic() > until:
                        raise HostError(f"{self._source.name} cannot be opened: {error}") from None
                self._cancel.wait(0.05)
        except CancelledError:
            raise HostError(f"{self._source.name} did not open in time") from None

    def assume(self, geometry: Geometry) -> None:
        """What it was like when our predecessor had it open."""
        self._geometry = geometry

    def cancel(self) -> None:
        """From another thread: have whatever waits fail now, until ``allow``."""
        self._cancel.set()

    def allow(self) -> None:
        self._cancel.clear()

    def close(self) -> None:
        """qemu-nbd writes out what it has and ends; that may take longer than this call."""
        self._drop()
        self._source.close()
        self._cancel.close()

    def geometry(self) -> Geometry:
        if self._geometry is None:
            raise OSError(errno.ENOTCONN, "it is not open yet")
        return self._geometry

    def refresh(self) -> None:
        """Look at the size again, which takes a new connection. Errors show with the next request."""
        if self._source.resizes:
            try:
                self.flush()
            except OSError as error:
                self._tell(f"flush: {error}")
            self._drop()
            self._carry_out([])

    def describe(self) -> dict[str, object]:
        return {
            **self._source.describe(),
            "connected": self._link is not None,
            "connections": self._connections,
            "unflushed": self._kept_bytes,
        }

    # --- what a guest asks for
    def read(self, jobs: Sequence[Job]) -> Results:
        return self._carry_out([Op("read", offset, len(view), view) for offset, view in jobs])

    def write(self, jobs: Sequence[Job]) -> Results:
        if self._kept_bytes >= KEPT:
            try:
                self.flush()
            except OSError as error:
                if self._lost is None:  # else nothing is kept any more
                    return [error] * len(jobs)
        ops = [Op("write", offset, len(view), view) for offset, view in jobs]
        results = self._carry_out(ops)
        done = [op for op, error in zip(ops, results, strict=True) if error is None]
        self._keep([op._replace(view=bytes(op.view)) for op in done])
        return results

    def flush(self) -> None:
        if self._lost is not None:
            raise self._lost
        [error] = self._carry_out([_FLUSH])
        if self._lost is not None:  # found out while the connection was made again
            raise self._lost
        if error is not None and self._flushes:
            # Without room nothing is thrown away: the same may succeed later.
            if not isinstance(error, AwayError) and error.errno not in _FULL:
                self._give_up(error)
            raise error
        self._forget()

    def discard(self, offset: int, length: int) -> None:
        pieces = [
            Op("trim", at, min(TRIM_MOST, offset + length - at))
            for at in range(offset, offset + length, TRIM_MOST)
        ]
        for start in range(0, len(pieces), _TRIMS):
            part = pieces[start : start + _TRIMS]
            error = next((found for found in self._carry_out(part) if found is not None), None)
            if error is not None:
                raise error
            self._keep(part)

    # --- what is not durable yet
    def _keep(self, ops: list[Op]) -> None:
        if ops and self._flushes and self._lost is None:
            self._kept.append(ops)
            # A trim costs memory, too.
            self._kept_bytes += sum(len(op.view) or _SECTOR for op in ops)

    def _forget(self) -> None:
        self._kept.clear()
        self._kept_bytes = 0

    def _give_up(self, error: OSError) -> None:
        """Data that were answered are lost."""
        self._lost = error
        self._forget()

    # --- the connection
    def _carry_out(self, ops: Sequence[Op]) -> Results:
        while True:
            try:
                self._cancel.wait(0)
                if self._link is None:
                    self._link = self._reconnect()
                results = self._link.run(ops, self._times.request)
            except CancelledError:
                self._drop()
                return [AwayError(errno.ECANCELED, "the image is being closed")] * len(ops)
            except LinkGoneError as error:
                self._went(error)
                if self._is_given_up():
                    reason = f"{self._source.name} is gone: {error}"
                    return [AwayError(errno.EIO, reason)] * len(ops)
            else:
                self._is_back()
                return results

    def _is_given_up(self) -> bool:
        since = self._away_since
        return since is not None and time.monotonic() - since > self._times.retry

    def _went(self, error: LinkGoneError) -> None:
        had = self._link is not None
        self._drop()
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            self._tell(f"{self._source.name} is gone: {error}")
        if had or now >= self._next_try:
            self._pause = min(max(2 * self._pause, self._times.pause), self._times.pause_most)
            self._next_try = now + self._pause

    def _is_back(self) -> None:
        """Not before a batch was answered: a server may take connections and do no more."""
        if self._away_since is not None:
            self._tell(f"{self._source.name} is back after {time.monotonic() - self._away_since:.1f} s")
            self._away_since = None
        self._pause = 0.0

    def _drop(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.drop()

    def _reconnect(self) -> NbdLink:
        wait = self._next_try - time.monotonic()
        if wait > 0:
            if self._is_given_up():
                raise LinkGoneError("it did not answer, and is not asked again yet")
            self._cancel.wait(wait)
        return self._connect()

    def _connect(self) -> NbdLink:
        try:
            link = self._source.connect(self._cancel, self._times.connect)
        except HostError as error:
            raise LinkGoneError(error.message) from None
        try:
            self._look_over(link)
            self._replay(link)
        except BaseException:
            link.drop()
            raise
        self._connections += 1
        return link

    def _look_over(self, link: NbdLink) -> None:
        if link.readonly and not self.readonly:
            raise LinkGoneError("the server lets nobody write: write access: ro")
        if link.least > _SECTOR:
            raise LinkGoneError(f"the server takes accesses of {link.least} bytes and more only")
        granularity = max(_SECTOR, min(link.preferred, 1 << 20))
        trims = link.can_trim and not self.readonly
        self._geometry = Geometry(link.size, min(granularity, 4096), granularity if trims else 0)
        self._flushes = link.can_flush and not self.readonly

    def _replay(self, link: NbdLink) -> None:
        for ops in self._kept:
            errors = link.run(ops, self._times.request)
            error = next((found for found in errors if found is not None), None)
            if error is not None:
                self._tell(f"what was written since the last flush is lost: {error}")
                self._give_up(error)
                return
