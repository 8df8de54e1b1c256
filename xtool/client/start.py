"""Finding the daemon of this host, and starting it when there is none."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from xtool import paths
from xtool.errors import DeadlineError, HostError, PrivilegeError, XtoolError

#: The exit status of a daemon that found another one.
ALREADY = 75
#: How long a daemon may take to come up, seconds: importing is slow on an emulated CPU.
START_TIME = 120.0


def socket_path() -> Path:
    return paths.run_dir() / "xtoold.sock"


def lock_path() -> Path:
    """Held by the daemon as long as it lives; holds its pid."""
    return paths.run_dir() / "xtoold.lock"


def connect(path: str | os.PathLike[str]) -> socket.socket | None:
    """A connection, or None when nobody listens there: no file, or one whose process is gone.

    Raises ``PrivilegeError``, ``HostError``.
    """
    link = socket.socket(socket.AF_UNIX)
    try:
        link.connect(os.fspath(path))
    except (FileNotFoundError, ConnectionRefusedError):
        link.close()
        return None
    except PermissionError:
        link.close()
        raise PrivilegeError(
            f"this user may not use {path}", hint="be root, or in the group xtool (or xtool-ro, to look)"
        ) from None
    except OSError as error:
        link.close()
        raise HostError(f"cannot connect to {path}: {error.strerror}") from None
    return link


def running(path: str | os.PathLike[str] | None = None) -> bool:
    """Whether a daemon listens there that this user may use."""
    with suppress(XtoolError):
        link = connect(path or socket_path())
        if link is not None:
            link.close()
            return True
    return False


def start(uri: str = "xen:") -> None:
    """Start the daemon, detached, unless it runs; returns when it listens.

    Raises ``HostError`` with its last words when it does not come up, ``DeadlineError``.
    """
    import select
    import subprocess
    import sys
    import time

    log = paths.log_dir() / "xtoold.log"
    try:
        paths.log_dir().mkdir(parents=True, exist_ok=True)
        output = open(log, "ab")  # noqa: SIM115 (it is closed below)
    except OSError as error:
        raise HostError(
            f"cannot write {log}: {error.strerror}", hint="run as root, or set XTOOL_LOG_DIR"
        ) from None
    read, write = os.pipe()
    try:
        with output:
            argv = [sys.executable, "-m", "xtool.daemon", "--host", uri, "--ready-fd", str(write)]
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(write,),
                start_new_session=True,
                cwd="/",
                env={**os.environ, "PYTHONPATH": _import_path()},
            )
    finally:
        os.close(write)
    end = time.monotonic() + START_TIME
    try:
        ready = select.select([read], [], [], START_TIME)[0]
        if ready and os.read(read, 1):
            return
    finally:
        os.close(read)
    if not ready:
        raise DeadlineError(f"xtoold did not come up within {START_TIME:g} s", hint=f"see {log}")
    if child.wait() == ALREADY:
        while time.monotonic() < end:
            link = connect(socket_path())
            if link is not None:
                link.close()
                return
            time.sleep(0.05)
    raise HostError(f"xtoold did not start: {_last_words(log)}", hint=f"see {log}")


def _import_path() -> str:
    """Where this process found xtool: the new one is to be the same."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(
        dict.fromkeys((here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))))
    )


def _last_words(log: Path) -> str:
    try:
        lines = log.read_bytes()[-4096:].decode("utf-8", "replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else "it said nothing"
