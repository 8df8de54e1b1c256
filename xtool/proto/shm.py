"""The only doors to words that another domain can read or write at the same moment.

Facts about shared memory from CPython
--------------------------------------
* ``struct.pack_into`` zeroes its target before it packs. A reader on another core then sees 0 in some
  percent of its reads, and a Linux frontend that meets an index out of range gives its device up for good.
  An item assignment to ``memoryview.cast("I")`` is one plain 32-bit store.
* A processor may let a load overtake an earlier store to another word. "Publish my index, then look at the
  other's" needs ``mb()`` in between, or a wake-up is lost some day.
* The other side may change a slot while it is being read. ``snapshot`` copies once; whoever parses, parses
  the copy.
* A mapping cannot be closed while views of it exist, so whatever keeps a view has a ``release``.

Numbers are native-endian: Xen's rings are little-endian on every machine this runs on.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

#: Indexes on rings run freely and wrap here.
MASK32 = 0xFFFF_FFFF

_fence = Lock()


def mb() -> None:
    """A full memory barrier: taking an uncontended lock is a locked instruction on x86."""
    with _fence:
        pass


def load32(view: memoryview, offset: int) -> int:
    """The 32-bit word at byte ``offset``, in one load."""
    with view[offset : offset + 4] as part, part.cast("I") as word:
        return word[0]


def store32(view: memoryview, offset: int, value: int) -> None:
    """Store ``value`` at byte ``offset``, in one store."""
    with view[offset : offset + 4] as part, part.cast("I") as word:
        word[0] = value & MASK32


def load16(view: memoryview, offset: int) -> int:
    """The 16-bit word at byte ``offset``, in one load."""
    with view[offset : offset + 2] as part, part.cast("H") as word:
        return word[0]


def store16(view: memoryview, offset: int, value: int) -> None:
    """Store ``value`` at byte ``offset``, in one store."""
    with view[offset : offset + 2] as part, part.cast("H") as word:
        word[0] = value & 0xFFFF


def snapshot(view: memoryview, offset: int, size: int) -> bytes:
    """A private copy of ``size`` bytes at ``offset``: each byte of shared memory is read once."""
    return bytes(view[offset : offset + size])


def write(view: memoryview, offset: int, data: bytes) -> None:
    """Copy ``data`` to ``offset``: for slots and payload, whose index is published afterwards.

    The reader must not look before that: this is no single store.
    """
    view[offset : offset + len(data)] = data


class Words:
    """``count`` 32-bit words from byte ``offset`` on, for those who touch them often.

    ``load(i)`` and ``store(i, value)`` are one access each; ``value`` must be below 2**32.
    """

    __slots__ = ("_words", "load", "store")

    load: Callable[[int], int]
    store: Callable[[int, int], None]

    def __init__(self, view: memoryview, offset: int, count: int) -> None:
        with view[offset : offset + 4 * count] as part:
            self._words = part.cast("I")
        self.load = self._words.__getitem__
        self.store = self._words.__setitem__

    def release(self) -> None:
        self._words.release()
