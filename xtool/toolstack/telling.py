"""What a forked process tells whoever forked it about its work: lines of JSON over a socket.

``{"step": text}`` and ``{"advance": [done, total]}`` while it works, at last one of ``{"result": ...}``,
``{"error": ...}`` and ``{"cancelled": true}``.
"""

from __future__ import annotations

import json
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from xtool.errors import XtoolError
from xtool.toolstack.signals import Terminated

#: Mere progress is told at most this often, seconds.
_ADVANCE_PAUSE = 0.1


def outcome(
    work: Callable[[], Any], failed: Callable[[BaseException], Any], numbers: Sequence[signal.Signals]
) -> dict[str, Any]:
    """What ``work`` came to, to be told; ``failed`` says an error in plain values. The first of the signals
    ``numbers`` interrupts it, as Ctrl-C does; the others, and all that come when it is over, change nothing.
    """
    interrupted = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupted
        if not interrupted:  # a second one would interrupt the undoing
            interrupted = True
            raise KeyboardInterrupt

    told: dict[str, Any]
    try:
        for number in numbers:
            signal.signal(number, interrupt)
        told = {"result": work()}
    except (KeyboardInterrupt, SystemExit, Terminated):
        told = {"cancelled": True}
    except XtoolError as error:
        told = {"error": failed(error)}
    except BaseException as error:
        traceback.print_exc()
        told = {"error": failed(error)}
    while True:
        try:
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)
            return told
        except KeyboardInterrupt:
            pass


def tell(link: socket.socket, told: dict[str, Any]) -> None:
    """Nobody to tell is no reason to stop: the work is not the listener's."""
    with suppress(OSError):
        link.sendall(json.dumps(told).encode() + b"\n")


class Teller:
    """``Progress``, told over a socket."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._last = 0.0

    def step(self, text: str) -> None:
        self._last = 0.0
        tell(self._link, {"step": text})

    def advance(self, done: int, total: int | None = None) -> None:
        now = time.monotonic()
        if now - self._last >= _ADVANCE_PAUSE or done == total:
            self._last = now
            tell(self._link, {"advance": [done, total]})
