"""Another host's xtoold, over ssh: its socket, forwarded to one of this host.

Facts about OpenSSH: a master that runs takes ``-O forward`` and ``-O cancel`` at once, with no new login; it
binds a forwarded socket 0600 and does not remove it; whether anybody listens at the far end shows only when
something connects, and then the master complains on its own standard error.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from xtool.client import start
from xtool.errors import XtoolError

if TYPE_CHECKING:
    from xtool.cli.remote import Remote

#: Where it listens there.
SOCKET = "/run/xtool/xtoold.sock"
#: Verbs that need nothing of the other host but its daemon: neither its files nor its folders.
VERBS = frozenset(
    (
        *("list", "info", "dmesg", "domid", "domname", "vcpu-list", "console", "events", "wiring", "gc"),
        *("pause", "unpause", "shutdown", "reboot", "destroy"),
        *("block-detach", "block-list", "block-limit", "cd-eject"),
        *("network-attach", "network-detach", "network-list", "network-limit"),
        *("plan", "diff", "apply"),
    )
)
#: Of those, the ones that read files of this machine and so are never carried out there.
HERE = ("plan", "diff", "apply")
#: How long the daemon there may take to answer, seconds.
_ANSWER_TIME = 10.0


def wanted(argv: list[str]) -> bool:
    """Whether this command line may be carried out over a forwarded socket."""
    help_asked = {"-h", "--help"} & set(argv)
    if argv[0] in HERE:
        return not help_asked
    return argv[0] in VERBS and not help_asked and os.environ.get("XTOOL_FORWARD") != "0"


@contextmanager
def forwarded(remote: Remote) -> Iterator[Path | None]:
    """A socket of this host that leads to the daemon there, or None if none answers (or not to us).

    ``remote`` has a master.
    """
    if not remote.held and not _listens(remote):  # in a lab the complaint goes nowhere: connect and see
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="xtool-", dir=_runtime()) as folder:
        path = Path(folder) / "xtoold.sock"
        way = ["-L", f"{path}:{SOCKET}"]
        if _master(remote, "forward", way) != 0:
            yield None
            return
        try:
            yield path if _answers(path) else None
        finally:
            _master(remote, "cancel", way)


def _runtime() -> str | None:
    folder = os.environ.get("XDG_RUNTIME_DIR", "")
    return folder if folder.startswith("/") and os.path.isdir(folder) else None


def _listens(remote: Remote) -> bool:
    look = remote.argv(f"test -S {SOCKET}", "-T", "-n")
    return subprocess.run(look, stderr=subprocess.DEVNULL, check=False).returncode == 0


def _master(remote: Remote, what: str, way: list[str]) -> int:
    argv = ["ssh", *remote.options, "-O", what, *way, "--", remote.address]
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
    ).returncode


def _answers(path: Path) -> bool:
    try:
        link = start.connect(path)
        if link is None:
            return False
        with link:
            link.settimeout(_ANSWER_TIME)
            link.sendall(b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return link.recv(12).startswith(b"HTTP/1.1 200")
    except (OSError, XtoolError):
        return False
