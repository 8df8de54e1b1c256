"""Who may have a command line carried out by the zygote, which runs as root.

root and the group ``xtool`` may do everything: whoever may start domains with disks of his choice is root in
all but name. The group ``xtool-ro`` may look: verbs that change nothing and read no file he names. Everybody
else, and everything else, is carried out with the caller's own rights in the caller's own process.

Facts: ``SO_PEERCRED`` and ``SO_PEERGROUPS`` are what the kernel noted when the caller connected; a
container's root with a user namespace of its own shows as the user it is outside.
"""

from __future__ import annotations

import grp
import re
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

FULL_GROUP, LOOKING_GROUP = "xtool", "xtool-ro"
_SO_PEERGROUPS = 59  # asm-generic/socket.h
_MOST_GROUPS = 256

Access = Literal["root", "full", "look", "none"]

#: What ``xtool-ro`` may do. No verb that writes, takes a file's name, or keeps the zygote's child for long.
LOOKING_VERBS = frozenset(
    ("list", "info", "domid", "domname", "vcpu-list", "block-list", "network-list", "uptime", "vm-list")
)
#: What of a stranger's environment has a meaning for output, and cannot name a file.
_KEPT = re.compile(rb"TERM|COLORTERM|NO_COLOR|COLUMNS|LINES|LANG|LC_[A-Z]+|XTOOL_WARM")
_HARMLESS = re.compile(rb"[A-Za-z0-9_.:@+-]{0,64}")


class Groups(NamedTuple):
    """The numbers of the two groups, None where there is none."""

    full: int | None
    looking: int | None


def known_groups() -> Groups:
    def number(name: str) -> int | None:
        try:
            return grp.getgrnam(name).gr_gid
        except KeyError:
            return None

    return Groups(number(FULL_GROUP), number(LOOKING_GROUP))


def access_of(link: socket.socket, groups: Groups) -> Access:
    """What the caller at the other end may do."""
    _, uid, gid = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid == 0:
        return "root"
    return access_for({gid, *_groups(link)}, groups)


def access_for(gids: set[int], groups: Groups) -> Access:
    if groups.full in gids:
        return "full"
    return "look" if groups.looking in gids else "none"


def _groups(link: socket.socket) -> Sequence[int]:
    """The supplementary groups; none for who is in more than Python's ``getsockopt`` has room for."""
    try:
        raw = link.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * 4)
    except OSError:
        return ()
    return struct.unpack(f"{len(raw) // 4}I", raw)


def may_look(arguments: Sequence[str]) -> bool:
    """Whether ``xtool-ro`` may have this command line carried out."""
    from xtool.cli.app import find_verb, parse_globals
    from xtool.errors import UsageError

    try:
        line = parse_globals(list(arguments))
        if line.host is not None:
            return False
        return line.show is not None or not line.rest or find_verb(line.rest[0]) in LOOKING_VERBS
    except UsageError:
        return False


def environment_for(
    access: Access, theirs: Mapping[bytes, bytes], ours: Mapping[bytes, bytes]
) -> dict[bytes, bytes]:
    """What a command line is carried out with: root's own, else ours and what of theirs concerns output."""
    if access == "root":
        return dict(theirs)
    kept = {
        name: value for name, value in theirs.items() if _KEPT.fullmatch(name) and _HARMLESS.fullmatch(value)
    }
    return {**{name: value for name, value in ours.items() if not _KEPT.fullmatch(name)}, **kept}
