"""The process that holds an embedded QEMU driver open: one per root, until its last domain has ended.

An embedded driver lives in the process that opened it, and locks its root: without a holder two commands at
once would exclude each other, and nobody would act when a guest powers off or crashes. The holder serves
``Link`` on a Unix socket in the root, a JSON object per line::

    -> {"call": "act", "args": ["6f1c...", "suspend"]}
    <- {"result": null}        or {"error": {"kind": "Domain", "message": "...", "hint": null}}

It is started on demand with the socket already listening, and ends by itself when no domain runs and nobody
is connected. Killing it harms no guest: QEMU goes on, and the next holder takes it up again. Only what is
to be done when a guest ends is done late then.

Who may connect is a matter of the root's mode, 0700.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import sys
import threading
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from xtool.drivers.libvirt.direct import DirectLink
from xtool.drivers.libvirt.link import Event
from xtool.errors import XtoolError

#: Calls that may be asked for: ``Link`` without ``close``.
CALLS = frozenset(
    (
        *("versions", "capabilities", "domain_capabilities", "domains", "xml", "vcpus", "create", "act"),
        *("device", "limit_disk", "limit_interface", "mark", "events"),
    )
)
LONGEST = 4 << 20
#: A call for events is answered after this many seconds, whatever happened.
LONGEST_WAIT = 30.0
_MOST_CLIENTS = 64
#: How long an idle holder stays, seconds: a create often follows a list.
_LINGER = 2.0
SOCKET, LOCK, LOG = "xtool.sock", "xtool.lock", "xtool.log"

_CONF = """\
# Written once by xtool; change it as you like, it is not written again.
# libvirt's own logging daemon is not there for an embedded driver.
stdio_handler = "file"
"""
_CONF_ROOT = """\
# Started by root, QEMU runs as root, as Xen's device models do: it reads any image and kernel root can read.
# To confine it, name a user, let libvirt hand the images over, and keep them where that user can reach them:
#   user = "libvirt-qemu"
#   group = "kvm"
#   dynamic_ownership = 1
user = "root"
group = "root"
dynamic_ownership = 0
"""


def write_settings(root: Path) -> None:
    """``etc/qemu.conf`` of a new root."""
    path = root / "etc" / "qemu.conf"
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_CONF + (_CONF_ROOT if os.geteuid() == 0 else ""))


def encode(value: Any) -> Any:
    """A result as JSON can hold it."""
    if isinstance(value, list):
        return [encode(item) for item in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


class Holder:
    def __init__(self, root: Path, uri: str, listener: socket.socket) -> None:
        self._root, self._listener = root, listener
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._clients = 0
        self._lock = threading.Lock()
        self._link: DirectLink | None = None
        self._failed: XtoolError | None = None
        try:
            write_settings(root)
            self._link = DirectLink(uri, self._on_event)
        except XtoolError as error:
            self._failed = error  # for those who wait on the socket

    def run(self) -> None:
        """Serve until there is nothing to hold."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(int(_LINGER * 1000) if self._idle() else None)}
            if self._wake.fileno() in ready:
                self._wake.recv(4096)
            if self._listener.fileno() in ready:
                self._accept()
            elif not ready and self._idle() and self._leave():
                return

    def _idle(self) -> bool:
        with self._lock:
            if self._clients:
                return False
        return self._link is None or not self._link.domains()

    def _leave(self) -> bool:
        """Take the socket away, unless somebody is about to connect."""
        lock = os.open(self._root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return False
        if select.select([self._listener], [], [], 0)[0]:
            os.close(lock)
            return False
        (self._root / SOCKET).unlink(missing_ok=True)
        self._listener.close()
        if self._link is not None:
            self._link.close()
        return True  # the lock goes with the process: by then the driver has let go of the root

    def _on_event(self, event: Event) -> None:
        if event.kind == "stopped":
            self._nudge()

    def _nudge(self) -> None:
        try:
            self._waker.send(b"x")
        except BlockingIOError:
            pass

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        with self._lock:
            if self._clients >= _MOST_CLIENTS:
                connection.close()
                return
            self._clients += 1
        threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rwb") as stream:
                while line := stream.readline(LONGEST):
                    stream.write(json.dumps(self._answer(line)).encode() + b"\n")
                    stream.flush()
        except OSError:
            pass  # the command is gone
        finally:
            with self._lock:
                self._clients -= 1
            self._nudge()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            if self._failed is not None or self._link is None:
                raise self._failed or XtoolError("the driver is not open")
            asked = json.loads(line)
            call, args = asked["call"], asked["args"]
            if call not in CALLS:
                raise XtoolError(f"no such call: {call}", hint="is this holder of another version of xtool?")
            if call == "events":
                args = [int(args[0]), min(float(args[1]), LONGEST_WAIT)]
            return {"result": encode(getattr(self._link, call)(*args))}
        except XtoolError as error:
            return {"error": {"kind": type(error).__name__, "message": error.message, "hint": error.hint}}
        except Exception as error:  # a bug, or nonsense on the socket: told to whoever asked
            return {
                "error": {"kind": "XtoolError", "message": f"{type(error).__name__}: {error}", "hint": None}
            }


def main(root: str, uri: str, fd: str) -> None:
    """``python -m xtool.drivers.libvirt.holder ROOT URI FD``: FD is the listening socket."""
    os.chdir("/")
    Holder(Path(root), uri, socket.socket(fileno=int(fd))).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
