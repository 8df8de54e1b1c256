"""Cutting what a caller asks for into requests. Pure."""

from __future__ import annotations

from typing import NamedTuple


class Chunk(NamedTuple):
    """``data`` is what is written, or where what is read goes; ``length`` (bytes) counts for a discard."""

    operation: int
    offset: int
    length: int
    data: memoryview


def cut(operation: int, offset: int, data: memoryview, step: int) -> list[Chunk]:
    """Pieces of at most ``step`` bytes."""
    return [
        Chunk(operation, offset + at, len(data[at : at + step]), data[at : at + step])
        for at in range(0, len(data), step)
    ]
