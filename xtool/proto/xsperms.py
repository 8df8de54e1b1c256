"""xenstore permissions: a tuple of strings, the first naming the owner.

``("n0", "r5")``: domain 0 owns the node and may do all, domain 5 may read, everybody else nothing (the
letter of the first entry is what everybody else may do). A new node inherits its parent's permissions;
one that an unprivileged domain makes is owned by that domain.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from xtool.proto.xenstore import check_perm

Perms = tuple[str, ...]

#: Only the control domain.
PRIVATE: Perms = ("n0",)


class Perm(NamedTuple):
    """One entry, taken apart."""

    domid: int
    read: bool
    write: bool

    @classmethod
    def parse(cls, text: str) -> Perm:
        """``"r5"`` -> ``Perm(5, True, False)``; raises ``LocalProtocolError``."""
        letter = check_perm(text)[0]
        return cls(int(text[1:]), letter in "rb", letter in "wb")

    def __str__(self) -> str:
        return f"{'nrwb'[self.read + 2 * self.write]}{self.domid}"


def owned_by(owner: int, *, read: Iterable[int] = (), both: Iterable[int] = ()) -> Perms:
    """``owned_by(0, read=[5])`` -> ``("n0", "r5")``."""
    return (f"n{owner}", *(f"r{domid}" for domid in read), *(f"b{domid}" for domid in both))


def may_read(perms: Iterable[str], domid: int) -> bool:
    """Whether ``domid`` may read a node with ``perms`` (domain 0 always may)."""
    return _allowed(perms, domid).read


def may_write(perms: Iterable[str], domid: int) -> bool:
    return _allowed(perms, domid).write


def _allowed(perms: Iterable[str], domid: int) -> Perm:
    entries = [Perm.parse(text) for text in perms]
    if domid == 0 or (entries and entries[0].domid == domid):
        return Perm(domid, True, True)
    for entry in entries[1:]:
        if entry.domid == domid:
            return entry
    return entries[0] if entries else Perm(domid, False, False)
