"""Watches: bounded queues of changed paths, and waiting for a condition on the store.

Facts about watches
-------------------
- A watch fires once when it is registered, so "register, then look" never misses a change.
- Events may be spurious, and a guest can cause as many as it likes. So each watch remembers each changed
  path once, and at most ``MAX_PENDING`` of them: beyond that it says only "something below my path".
- An event may still arrive after the watch was removed; it is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

from xtool.errors import DeadlineError

if TYPE_CHECKING:
    from xtool.xenstore.client import StoreClient
    from xtool.xenstore.port import Store

T = TypeVar("T")

#: How many different changed paths one watch remembers.
MAX_PENDING = 64


class ClientWatch:
    """A watch of a ``StoreClient``; ``token`` is unique on its connection."""

    def __init__(self, client: StoreClient, path: str, token: str) -> None:
        self.path = path
        self.token = token
        self._client = client
        self._changed: dict[str, None] = {}
        self._overflowed = False
        self._closed = False

    def notice(self, path: str) -> None:
        """The daemon reported a change of ``path``."""
        if self._overflowed:
            return
        self._changed[path] = None
        if len(self._changed) > MAX_PENDING:
            self._changed = {self.path: None}
            self._overflowed = True

    def has_pending(self) -> bool:
        return bool(self._changed)

    def pending(self) -> tuple[str, ...]:
        if not self._changed:
            self._client.pump(0)
        return self._take()

    def wait(self, deadline: float) -> tuple[str, ...]:
        end = time.monotonic() + deadline
        while not self._changed and (left := end - time.monotonic()) > 0:
            self._client.pump(left)
        return self._take()

    def _take(self) -> tuple[str, ...]:
        changed, self._changed, self._overflowed = self._changed, {}, False
        return tuple(changed)

    def fileno(self) -> int:
        return self._client.fileno()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._client.unwatch(self)

    def __enter__(self) -> ClientWatch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def wait_for(
    store: Store, paths: Sequence[str], check: Callable[[], T | None], deadline: float, what: str
) -> T:
    """Call ``check`` now and after each change below ``paths`` until it returns something.

    Raises ``DeadlineError`` saying ``what`` did not happen after ``deadline`` seconds.
    """
    end = time.monotonic() + deadline
    with ExitStack() as stack:
        watches = [stack.enter_context(store.watch(path)) for path in paths]
        while (found := check()) is None:
            left = end - time.monotonic()
            if left <= 0 or not store.wait_any(watches, left):
                raise DeadlineError(f"{what} (waited {deadline:g} s)")
            for watch in watches:
                watch.pending()
    return found
