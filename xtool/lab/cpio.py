"""Initramfs archives: the newc cpio format, written directly so that no root and no mknod is needed.

Format: ``Documentation/driver-api/early-userspace/buffer-format.rst`` of Linux. Times and inode numbers
are fixed, so equal contents give equal bytes.
"""

from __future__ import annotations

import gzip
import stat
from pathlib import Path


class CpioArchive:
    """Collects files, then gives the archive's bytes. Paths have no leading slash."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 1
        self._folders: set[str] = set()

    def _entry(self, name: str, mode: int, data: bytes = b"", rdev: tuple[int, int] = (0, 0)) -> None:
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *rdev, len(encoded), 0)
        self._inode += 1
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._parts += [header, b"\0" * (-len(header) % 4), data, b"\0" * (-len(data) % 4)]

    def folder(self, name: str) -> None:
        """Add a folder and, before it, the folders above it; adding one twice is fine."""
        parts = name.strip("/").split("/")
        for depth in range(1, len(parts) + 1):
            path = "/".join(parts[:depth])
            if path and path not in self._folders:
                self._folders.add(path)
                self._entry(path, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        if "/" in name:
            self.folder(name.rsplit("/", 1)[0])
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        if "/" in name:
            self.folder(name.rsplit("/", 1)[0])
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def device(self, name: str, major: int, minor: int) -> None:
        """Add a character device."""
        self.folder(name.rsplit("/", 1)[0])
        self._entry(name, stat.S_IFCHR | 0o600, rdev=(major, minor))

    def to_bytes(self) -> bytes:
        before, inode = list(self._parts), self._inode
        self._entry("TRAILER!!!", 0)
        whole = b"".join(self._parts)
        self._parts, self._inode = before, inode
        return whole + b"\0" * (-len(whole) % 512)


def write_initramfs(archive: CpioArchive, path: Path) -> None:
    """Write the archive gzip-compressed."""
    path.write_bytes(gzip.compress(archive.to_bytes(), 9, mtime=0))
