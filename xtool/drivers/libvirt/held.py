"""``Link`` through the process that holds an embedded driver (``holder.py``); it is started if need be."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xtool import errors
from xtool.drivers.libvirt.holder import LOCK, LOG, LONGEST, LONGEST_WAIT, SOCKET
from xtool.drivers.libvirt.link import DomainFacts, Event, VcpuFacts
from xtool.errors import HostError, XtoolError


class HeldLink:
    """Raises ``HostError`` when the holder cannot be started or is gone."""

    def __init__(self, root: str, uri: str) -> None:
        self._root = Path(root)
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._socket = _connect(self._root, uri)
        except OSError as error:
            raise HostError(f"cannot use {root} for libvirt's embedded driver: {error.strerror}") from None
        self._stream = self._socket.makefile("rwb")

    def close(self) -> None:
        try:
            self._stream.close()
        except OSError:
            pass  # the holder is gone
        self._socket.close()

    def _ask(self, call: str, *args: Any) -> Any:
        try:
            self._stream.write(json.dumps({"call": call, "args": args}).encode() + b"\n")
            self._stream.flush()
            line = self._stream.readline(LONGEST)
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise HostError(
                f"the process that holds {self._root} has ended",
                hint="its guests go on; try again. "
                f"It wrote into {self._root / LOG}: {_last_line(self._root)}",
            )
        answer = json.loads(line)
        if "error" in answer:
            raise _raised(answer["error"])
        return answer["result"]

    def versions(self) -> dict[str, Any]:
        return dict(self._ask("versions"))

    def capabilities(self) -> str:
        return str(self._ask("capabilities"))

    def domain_capabilities(self) -> str:
        return str(self._ask("domain_capabilities"))

    def domains(self) -> list[DomainFacts]:
        return [DomainFacts(**plain) for plain in self._ask("domains")]

    def xml(self, uuid: str) -> str:
        return str(self._ask("xml", uuid))

    def vcpus(self, uuid: str) -> list[VcpuFacts]:
        return [
            VcpuFacts(**{**plain, "affinity": tuple(plain["affinity"])}) for plain in self._ask("vcpus", uuid)
        ]

    def create(self, xml: str, paused: bool) -> DomainFacts:
        return DomainFacts(**self._ask("create", xml, paused))

    def act(self, uuid: str, action: str) -> None:
        self._ask("act", uuid, action)

    def device(self, uuid: str, action: str, xml: str) -> None:
        self._ask("device", uuid, action, xml)

    def limit_disk(self, uuid: str, dev: str, limits: dict[str, int]) -> None:
        self._ask("limit_disk", uuid, dev, limits)

    def limit_interface(self, uuid: str, mac: str, limits: dict[str, int]) -> None:
        self._ask("limit_interface", uuid, mac, limits)

    def mark(self) -> int:
        return int(self._ask("mark"))

    def events(self, after: int, timeout: float) -> list[Event]:
        return [Event(**plain) for plain in self._ask("events", after, min(timeout, LONGEST_WAIT))]


def _raised(plain: dict[str, Any]) -> XtoolError:
    found = getattr(errors, str(plain["kind"]), XtoolError)
    if not (isinstance(found, type) and issubclass(found, XtoolError)):
        found = XtoolError
    try:
        return found(plain["message"], hint=plain["hint"])
    except TypeError:  # one that wants more than a message
        return XtoolError(plain["message"], hint=plain["hint"])


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Nobody else starts a holder, and none ends, meanwhile."""
    lock = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _connect(root: Path, uri: str) -> socket.socket:
    path = root / SOCKET
    with _locked(root):
        link = socket.socket(socket.AF_UNIX)
        try:
            link.connect(os.fspath(path))
            return link
        except (FileNotFoundError, ConnectionRefusedError):
            link.close()
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(path))
            listener.listen(64)
            _start(root, uri, listener)
            link = socket.socket(socket.AF_UNIX)
            link.connect(os.fspath(path))  # it waits in the queue until the holder is up
            return link


def _start(root: Path, uri: str, listener: socket.socket) -> None:
    log = os.open(root / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    # The same xtool as this one, wherever it is installed; and nothing from the folder we happen to be in.
    places = [os.fspath(Path(errors.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(":")]
    try:
        subprocess.Popen(
            [sys.executable, "-P", "-m", "xtool.drivers.libvirt.holder", root, uri, str(listener.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": ":".join(filter(None, places))},
        )
    finally:
        os.close(log)


def _last_line(root: Path) -> str:
    try:
        lines = (root / LOG).read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "nothing"
