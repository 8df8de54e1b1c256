"""How long work tells what it is doing, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A listener. ``advance`` may be called often; units are whatever ``total`` counts (often bytes)."""

    def step(self, text: str) -> None:
        """A new step begins."""

    def advance(self, done: int, total: int | None = None) -> None:
        """How far the current step is; ``total`` None means unknown."""


class NullProgress:
    def step(self, text: str) -> None:
        pass

    def advance(self, done: int, total: int | None = None) -> None:
        pass


SILENT: Progress = NullProgress()
