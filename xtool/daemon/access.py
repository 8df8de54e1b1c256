"""Who may do what: the kernel's word on the process at the other end of a connection, nothing it says itself.

Root, the daemon's own user and the group ``xtool`` may do everything; the group ``xtool-ro`` may look.
Whoever is in ``xtool`` is as good as root: a domain file names any file of the host as a disk.

Facts: SO_PEERCRED is who called ``connect`` (or ``socketpair``), as of then; SO_PEERGROUPS (Linux 4.13) are
its supplementary groups as of then, as u32, ERANGE if there is no room for all. Python takes at most 1024
bytes: 256 groups. A process in more of them counts as in none.
"""

from __future__ import annotations

import grp
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from struct import Struct, iter_unpack

GROUP, READ_GROUP = "xtool", "xtool-ro"
_UCRED = Struct("<iII")
_SO_PEERGROUPS = 59  # asm-generic/socket.h
_GROUPS_ROOM = 1024


class Level(IntEnum):
    NOTHING = 0
    READ = 1
    FULL = 2


@dataclass(frozen=True)
class Peer:
    pid: int
    uid: int
    level: Level


@dataclass(frozen=True)
class Access:
    """``group`` and ``read_group`` are ids, None for groups this host does not have."""

    group: int | None = None
    read_group: int | None = None

    def peer(self, connection: socket.socket) -> Peer:
        """Who is at the other end of a Unix socket."""
        pid, uid, gid = _UCRED.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        return Peer(pid, uid, self.level(uid, {gid, *_groups(connection)}))

    def level(self, uid: int, groups: set[int]) -> Level:
        if uid in (0, os.geteuid()) or self.group in groups:
            return Level.FULL
        return Level.READ if self.read_group in groups else Level.NOTHING

    def open_to(self, path: Path) -> None:
        """Let those reach a socket whom ``peer`` lets do something.

        A file has one group only. Where the read-only group exists too, anybody may connect: who is in
        neither group is told so, and nothing else.
        """
        mode = 0o600
        if self.group is not None:
            with suppress(OSError):
                os.chown(path, -1, self.group)
                mode = 0o660
        if self.read_group is not None:
            mode = 0o666
        os.chmod(path, mode)
        if mode != 0o600:
            # Only passing through: what lies there is each protected by itself.
            folder = path.parent
            os.chmod(folder, folder.stat().st_mode & 0o777 | 0o011)


def _groups(connection: socket.socket) -> set[int]:
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_ROOM)
    except OSError:
        return set()
    return {gid for (gid,) in iter_unpack("<I", raw[: len(raw) & ~3])}


def host_access() -> Access:
    """By this host's groups."""
    return Access(_gid(GROUP), _gid(READ_GROUP))


def _gid(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None
