"""The pieces of guests' pages that a block request reads into or writes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

PAGE = 4096
#: One piece of a guest's page: grant reference, byte offset in the page, length in bytes.
Segment = tuple[int, int, int]


class WholePages(Sequence[Segment]):
    """Segments that are all whole pages, as most are: told by their grant references alone.

    Equal to the tuple of the same segments.
    """

    __slots__ = ("refs",)

    def __init__(self, refs: Sequence[int]) -> None:
        self.refs = refs

    def __len__(self) -> int:
        return len(self.refs)

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> WholePages: ...
    def __getitem__(self, index: int | slice) -> Segment | WholePages:
        if isinstance(index, slice):
            return WholePages(self.refs[index])
        return (self.refs[index], 0, PAGE)

    def __iter__(self) -> Iterator[Segment]:
        return ((ref, 0, PAGE) for ref in self.refs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (WholePages, tuple)) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"WholePages({list(self.refs)})"


Segments = tuple[Segment, ...] | WholePages
