"""Whether a guest is ready: what ``ready:`` in its definition says, looked at from the host it runs on.

Facts: xenstored tells when a key changes; a console's log and a TCP port are looked at again and again. What
came true once counts, whatever becomes of it. A guest's text is looked through in bounded pieces.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

from xtool.config.ready import ReadyConfig, matches
from xtool.config.rules import tcp_place
from xtool.errors import DeadlineError, DomainError, XtoolError
from xtool.progress import SILENT, Progress
from xtool.toolstack import journal
from xtool.toolstack.definitions import Readiness
from xtool.toolstack.names import Named, uuid_text
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

#: Logs and ports are looked at this often; xenstore's word may be missed (seconds).
_LOOK, _RESCAN = 0.25, 2.0
_CONNECT_TIME = 1.0
#: Of a console's log, what is looked through at most; and a line's longest (characters).
_TEXT_MAX, _LINE_MAX = 1 << 20, 4096


def wait_ready(
    host: Host, found: Named, deadline: float | None = None, progress: Progress = SILENT
) -> Readiness:
    """Raises ``DeadlineError``, and ``DomainError`` when the domain ends meanwhile."""
    begin = monotonic()
    checks = _Checks(host, found)
    allowed = checks.timeout if deadline is None else deadline
    if checks.left:
        progress.step(f"waiting until {found.name} is ready: {', '.join(checks.left)}")
    with host.store.watch(checks.watched) as watch:
        while True:
            _must_run(host, found)
            checks.look()
            waited = monotonic() - begin
            if not checks.left:
                return Readiness(found.state.domid, found.name, ("running", *checks.true), waited)
            if waited >= allowed:
                raise DeadlineError(
                    f"{found.name} was not ready within {allowed:g} s: {checks.missing()}",
                    hint=f"xtool console {found.name} shows what it is doing; ready: says what is waited for",
                )
            watch.wait(min(allowed - waited, checks.pause))


def _must_run(host: Host, found: Named) -> None:
    state = host.hv.domain(found.state.domid)
    if state is None or state.dying or state.handle != found.state.handle:
        raise DomainError(f"{found.name} ended before it was ready", hint="its console's log may tell why")
    if state.shutdown:
        raise DomainError(
            f"{found.name} ended ({state.shutdown_reason}) before it was ready",
            hint="its console's log may tell why",
        )


class _Checks:
    """What is to come true of one domain, and what has."""

    def __init__(self, host: Host, found: Named) -> None:
        from xtool.config import parse_config

        self._host, self._found, self._uuid = host, found, uuid_text(found.state.handle)
        entry = journal.read(self._uuid)
        ready: ReadyConfig | None = None
        self._place: tuple[str, int] | None = None
        if entry is not None and entry.config and entry.config.get("ready"):
            import json

            config = parse_config(json.dumps(entry.config), "the domain's configuration", "/")
            ready, self._place = config.ready, tcp_place(config)
        self._ready = ready
        names = ("xenstore", "console", "tcp")
        self.left = [name for name in names if ready is not None and getattr(ready, name) is not None]
        self.true: list[str] = []
        self.timeout = ready.timeout if ready is not None else 0.0
        self._node = f"{paths.domain(found.state.domid)}/{ready.node[0]}" if ready and ready.xenstore else ""
        self.watched = self._node or "@releaseDomain"

    @property
    def pause(self) -> float:
        return _LOOK if {"console", "tcp"} & set(self.left) else _RESCAN

    def look(self) -> None:
        for name in list(self.left):
            if {"xenstore": self._xenstore, "console": self._console, "tcp": self._tcp}[name]():
                self.left.remove(name)
                self.true.append(name)

    def missing(self) -> str:
        assert self._ready is not None
        told = {
            "xenstore": f"the xenstore key {self._ready.xenstore} is not there",
            "console": f"its console did not print {self._ready.console!r}",
            "tcp": f"nothing takes connections on TCP port {self._place and _shown(self._place)}",
        }
        return "; ".join(told[name] for name in self.left)

    def _xenstore(self) -> bool:
        assert self._ready is not None
        wanted = self._ready.node[1]
        value = self._host.store.get(self._node)
        return value is not None and wanted in (None, value)

    def _console(self) -> bool:
        from xtool.toolstack.consoles import kept
        from xtool.toolstack.facts import start_times

        assert self._ready is not None
        [start] = start_times(self._host, [self._found])
        text = ""
        with suppress(XtoolError):  # no log yet
            for record in kept(self._host, self._uuid, 0, (start or 0.0) - 0.05):
                text = (text + record.text)[-_TEXT_MAX:]
        return any(matches(self._ready.console or "", line[:_LINE_MAX]) for line in text.split("\n"))

    def _tcp(self) -> bool:
        assert self._place is not None
        try:
            socket.create_connection(self._place, timeout=_CONNECT_TIME).close()
        except OSError:
            return False
        return True


def _shown(place: tuple[str, int]) -> str:
    address, port = place
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
