"""What a decoder raises for bad input. It knows no file name; ``decompress`` adds that."""

from __future__ import annotations


class BadData(ValueError):
    """``str(error)`` completes the sentence "the kernel /boot/vmlinuz ..."."""

    def __init__(self, reason: str, *, hint: str = "copy or download the file again") -> None:
        super().__init__(reason)
        self.hint = hint


def truncated(compression: str) -> BadData:
    return BadData(f"is cut off: its {compression} data ends in the middle")


def trailing(count: int, compression: str) -> BadData:
    return BadData(f"has {count} unexpected bytes after the end of its {compression} data")
