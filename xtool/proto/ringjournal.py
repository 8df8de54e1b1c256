"""What a backend was about to answer, kept where a ``kill -9`` does not reach it.

A ring holds a response in the slot of its request. So from the first byte of a response until ``rsp_prod``
is stored, that request exists nowhere; killed in between, a backend could neither repeat it nor finish the
answer. The journal closes the gap: a batch of responses is recorded here (a mapped file) before any
slot is overwritten.

::

    word 0   commit: 0, or the record's sequence number, stored last
    word 1   index of the first response
    word 2   number of responses
    word 3   bytes of one response
    word 4   CRC-32 of words 0 to 3 and the payload
    64...    the responses

One record is enough: a new one is written only after ``rsp_prod`` covers the last. This survives the death
of a process at any instruction, not that of the machine; a guest does not survive that either.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple
from zlib import crc32

from xtool.errors import LocalProtocolError
from xtool.proto.shm import MASK32, Words, snapshot, write

HEADER_SIZE = 64

_COMMIT, _FIRST, _COUNT, _SIZE, _CRC = range(5)
_SUMMED = Struct("<IIII")


class Record(NamedTuple):
    """A committed batch: response ``first + i`` is ``responses[i]``."""

    first: int
    responses: tuple[bytes, ...]


class ResponseJournal:
    """One record in ``view``, which must outlive the process: a shared mapping of a file."""

    def __init__(self, view: memoryview) -> None:
        if len(view) < HEADER_SIZE:
            raise LocalProtocolError(f"a response journal of {len(view)} bytes")
        self._view = view
        self._words = Words(view, 0, HEADER_SIZE // 4)
        self._sequence = self._words.load(_COMMIT)

    @staticmethod
    def size_for(slots: int, response_size: int) -> int:
        """Bytes needed for a ring of ``slots``, all answered at once."""
        return HEADER_SIZE + slots * response_size

    def record(self, first: int, responses: list[bytes] | tuple[bytes, ...]) -> None:
        """Replace the record. All responses are equally long.

        Raises ``LocalProtocolError`` when they do not fit, before anything is changed.
        """
        payload, size = b"".join(responses), len(responses[0])
        if len(payload) != len(responses) * size:
            raise LocalProtocolError("responses of different sizes in one batch")
        self.record_block(first, payload, size)

    def record_block(self, first: int, payload: bytes, size: int) -> None:
        """As ``record``, the responses of ``size`` bytes one after the other."""
        count = len(payload) // size
        if HEADER_SIZE + len(payload) > len(self._view):
            raise LocalProtocolError(f"{len(payload)} bytes of responses do not fit the journal")
        sequence = (self._sequence + 1) & MASK32 or 1
        store = self._words.store
        store(_COMMIT, 0)
        write(self._view, HEADER_SIZE, payload)
        store(_FIRST, first)
        store(_COUNT, count)
        store(_SIZE, size)
        store(_CRC, _checksum(sequence, first, count, size, payload))
        store(_COMMIT, sequence)
        self._sequence = sequence

    def clear(self) -> None:
        """Forget the record: the ring it spoke of is gone."""
        self._words.store(_COMMIT, 0)

    def read(self) -> Record | None:
        """The committed record, or None if there is none or it was not finished."""
        load = self._words.load
        sequence, first, count, size = (load(i) for i in (_COMMIT, _FIRST, _COUNT, _SIZE))
        if not sequence or not count or not size or HEADER_SIZE + count * size > len(self._view):
            return None
        payload = snapshot(self._view, HEADER_SIZE, count * size)
        if load(_CRC) != _checksum(sequence, first, count, size, payload):
            return None
        return Record(first, tuple(payload[i : i + size] for i in range(0, count * size, size)))

    def release(self) -> None:
        """Let go of the view."""
        self._words.release()


def _checksum(sequence: int, first: int, count: int, size: int, payload: bytes) -> int:
    return crc32(payload, crc32(_SUMMED.pack(sequence, first, count, size)))
