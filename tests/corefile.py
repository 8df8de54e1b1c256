"""Reads core files by what the format's description says, with none of our own code."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from hashlib import sha256
from mmap import ACCESS_READ, mmap
from pathlib import Path
from struct import Struct

PAGE_SIZE = 4096
INVALID = 0xFFFF_FFFF_FFFF_FFFF


class Core:
    """A core file taken apart again, with nothing but what the format's description says."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.raw = mmap(file.fileno(), 0, access=ACCESS_READ)
        header = Struct("<16sHHIQQQIHHHHHH").unpack_from(self.raw)
        assert header[0][:7] == b"\x7fELF\x02\x01\x01" and header[1:4] == (4, 62, 1)
        start, size, count, names = header[6], header[11], header[12], header[13]
        entry = Struct("<IIQQQQIIQQ")
        assert size == entry.size
        raw = [entry.unpack_from(self.raw, start + size * i) for i in range(count)]
        strings = self.raw[raw[names][4] : raw[names][4] + raw[names][5]]
        self.at = {strings[e[0] :].split(b"\0")[0].decode(): (e[4], e[5]) for e in raw}
        self.entry_sizes = {strings[e[0] :].split(b"\0")[0].decode(): e[9] for e in raw}
        assert max(start + size for start, size in self.at.values()) == len(self.raw)

    def section(self, name: str) -> bytes:
        start, size = self.at[name]
        return self.raw[start : start + size]

    def notes(self) -> dict[int, bytes]:
        rest, found = self.section(".note.Xen"), {}
        while rest:
            name, size, kind = Struct("<III").unpack_from(rest)
            assert name == 4 and rest[12:16] == b"Xen\0"
            found[kind], rest = rest[16 : 16 + size], rest[16 + size :]
        return found

    def table(self, name: str) -> array[int]:
        table = array("Q")
        table.frombytes(self.section(name))
        return table

    def pages(self) -> dict[int, bytes]:
        """By what the guest calls them."""
        return dict(self._pages())

    def digests(self) -> dict[int, bytes]:
        """A hash of each, which takes no memory to speak of."""
        return {pfn: sha256(page).digest() for pfn, page in self._pages()}

    def _pages(self) -> Iterator[tuple[int, bytes]]:
        wide = ".xen_p2m" in self.at
        table = self.table(".xen_p2m")[::2] if wide else self.table(".xen_pfn")
        start, size = self.at[".xen_pages"]
        assert size == len(table) * PAGE_SIZE
        for at, pfn in enumerate(table):
            if pfn != INVALID:
                yield pfn, self.raw[start + at * PAGE_SIZE : start + (at + 1) * PAGE_SIZE]
