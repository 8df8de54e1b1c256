"""What the rest of xtool may ask of xenstore. ``StoreClient`` is the one that speaks to a daemon.

Paths are absolute. Values go in as ``str`` or ``bytes`` and come back as ``bytes`` (``read``) or text
(``read_text``, ``get``), where bytes that are not UTF-8 show as backslash escapes: a guest may have
written them. ``deadline`` is seconds: from now for a watch, the longest time without an answer for
requests, how long to try again for ``atomically``. Every method raises ``StoreError`` with the daemon's
errno name, ``StoreGoneError`` when the connection is lost, ``DeadlineError`` when no answer came in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar, overload

T = TypeVar("T")
D = TypeVar("D")


class Reader(Protocol):
    """Looking: the whole store, or one transaction's view of it."""

    def read(self, path: str) -> bytes: ...

    def read_text(self, path: str) -> str: ...

    @overload
    def get(self, path: str) -> str | None: ...
    @overload
    def get(self, path: str, default: D) -> str | D: ...

    def get_many(self, paths: Iterable[str]) -> Mapping[str, str | None]:
        """All values in one pipeline; None for a node that does not exist."""

    def list(self, path: str) -> tuple[str, ...]:
        """The names of the children, in the daemon's order."""

    def exists(self, path: str) -> bool: ...

    def get_perms(self, path: str) -> tuple[str, ...]: ...


class Writer(Protocol):
    """Changing. In a batch or a transaction these are queued; the error comes when they are sent."""

    def write(self, path: str, value: str | bytes, *, perms: Iterable[str] | None = None) -> None:
        """Set the value; parents are made as needed. ``perms`` are set on this node only."""

    def mkdir(self, path: str, *, perms: Iterable[str] | None = None) -> None: ...

    def rm(self, path: str) -> None:
        """Remove the node and all below. It need not exist."""

    def set_perms(self, path: str, perms: Iterable[str]) -> None: ...


class Transaction(Reader, Writer, Protocol):
    """All of it happens, or nothing."""


class Watch(Protocol):
    """A registered watch. It fires once when registered, and again after the daemon came back."""

    @property
    def path(self) -> str: ...

    def has_pending(self) -> bool:
        """Whether something is queued here already; does not look at the connection."""

    def pending(self) -> tuple[str, ...]:
        """The paths that changed since last asked, without waiting; each once, oldest first."""

    def wait(self, deadline: float) -> tuple[str, ...]:
        """The same, waiting until there is one; empty when nothing came within ``deadline`` seconds.

        More than ``MAX_PENDING`` different paths are given as the watch's own path: look at it all.
        """

    def fileno(self) -> int:
        """Readable when something may have come; then call ``pending``."""

    def close(self) -> None: ...

    def __enter__(self) -> Watch: ...

    def __exit__(self, *error: object) -> None: ...


class Store(Reader, Writer, Protocol):
    """xenstore, as the control domain sees it."""

    def list_many(self, paths: Iterable[str]) -> Mapping[str, tuple[str, ...] | None]:
        """The children of many nodes in one pipeline; None for a node that does not exist."""

    def get_perms_many(self, paths: Iterable[str]) -> Mapping[str, tuple[str, ...] | None]:
        """The permissions of many nodes in one pipeline; None for a node that does not exist."""

    def batch(self, *, deadline: float | None = None) -> AbstractContextManager[Writer]:
        """Queue changes and send them in one pipeline at the end of the ``with``. Not atomic."""

    def transaction(self, *, deadline: float | None = None) -> AbstractContextManager[Transaction]:
        """Commits at the end of the ``with``, aborts on an exception.

        A conflict raises ``StoreError`` with errno EAGAIN; ``atomically`` is the one that tries again.
        """

    def atomically(
        self, change: Callable[[Transaction], T], *, deadline: float = 10.0, plain_fallback: bool = False
    ) -> T:
        """Run ``change`` in a transaction, again after each conflict. ``change`` must bear repetition.

        When the conflicts do not end: with ``plain_fallback`` the change is made outside a transaction
        (for a single writer whose paths nobody else changes), else ``StoreError`` EAGAIN.
        """

    def watch(self, path: str) -> Watch: ...

    def wait_any(self, watches: Sequence[Watch], deadline: float) -> bool:
        """Until one of these watches of this store has something pending; False when time is up."""

    def fileno(self) -> int:
        """For ``select``: readable when watch events may have come. Changes when the daemon comes back."""

    def introduce(self, domid: int, gfn: int, port: int) -> None:
        """Let the domain speak to xenstored over this page and event channel."""

    def release(self, domid: int) -> None:
        """End that. A domain that was not introduced is no error.

        Seldom right: the daemon notices by itself when a domain is destroyed, and ``oxenstored`` never
        closes the event channel of a domain that was released before it was destroyed.
        """

    def is_introduced(self, domid: int) -> bool: ...

    def domain_path(self, domid: int) -> str: ...

    def close(self) -> None: ...
