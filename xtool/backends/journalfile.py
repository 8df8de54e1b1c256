"""A response journal in a file: it outlives the process that a ring is served by."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from xtool.errors import HostError
from xtool.grant.window import Window
from xtool.proto.ringjournal import ResponseJournal


class JournalFile:
    """``journal`` in a file of at least ``size`` bytes at ``path``, made if there is none.

    Raises ``HostError``, with room for the record allocated: a full disk is met here, not in a later write.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
                self._window = Window.of_file(fd, 0, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise HostError(f"the journal {path} cannot be used: {error.strerror}") from None
        self.journal = ResponseJournal(self._window.view)

    def close(self) -> None:
        """Keep the file."""
        if not self._window.closed:
            self.journal.release()
            self._window.close()

    def remove(self) -> None:
        self.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
