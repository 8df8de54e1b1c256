"""Where NBD connections come from: a server somewhere, or a ``qemu-nbd`` of our own for an image.

Facts about qemu-nbd
--------------------
* Without ``--persistent`` it ends when its client closes the connection: it writes out what it has in memory
  and closes the image. So it goes with this process, however that ends, and loses nothing that was
  answered. SIGTERM does the same; ``setpriv`` has the kernel send it when we are gone.
* While it starts it forgets a SIGTERM, and a client that goes before the handshake does not end it. One that
  is orphaned at that moment is found by its folder, and told again (``sweep``).
* Killed, it loses the part of an image's own tables that it had not written yet: writes since the last
  flush, although they were answered. Who uses it must be able to do them again.
* It holds QEMU's lock on an image that it may write to, so that no other QEMU opens it; until it has ended.
* ``json:{...}`` as the file name says format and protocol; nothing is guessed, no shell is in between.
* Web sources need ``block-curl.so``, which Debian has in ``qemu-block-extra``. A server must know ranges.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from xtool import paths
from xtool.backends.imageheader import check_local, check_web
from xtool.backends.nbdlink import Cancel, LinkGoneError, NbdLink
from xtool.diskurl import DiskUrl, parse_url
from xtool.errors import HostError

#: Formats as ``disk:`` has them, and QEMU's drivers.
DRIVERS = {"raw": "raw", "qcow2": "qcow2", "vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx"}
#: Formats a web source may have. A vmdk names the files that hold its data: a stranger's would name ours.
WEB_FORMATS = ("raw", "qcow2", "vhd", "vhdx")
#: Who reads what comes from the web: nobody.
_NOBODY = 65534
#: Seconds a web server may take for one answer.
_WEB_TIME = 20
#: What of our environment it gets.
_ENVIRONMENT = ("PATH", "http_proxy", "https_proxy", "no_proxy", "all_proxy")
#: How much of what qemu-nbd says is kept for the reason, bytes.
_LAST_WORDS = 2000
#: Seconds a qemu-nbd without a client may take to write out what it has, before it is killed or left alone.
KILL_TIME, LEAVE_TIME = 3.0, 1.0
#: Seconds after which a process that was being started has become qemu-nbd, and how long one that was told
#: to end is waited for.
_STARTING, _SWEEP_TIME = 10.0, 0.3


class Source(Protocol):
    """``name`` is for messages. ``resizes``: it may have another size next time."""

    name: str
    resizes: bool

    def connect(self, cancel: Cancel, patience: float) -> NbdLink:
        """A new connection; the one before was dropped. Raises ``LinkGoneError``, ``CancelledError``."""

    def close(self) -> None: ...

    def describe(self) -> dict[str, object]: ...


class NbdServer:
    """Somebody's server."""

    resizes = True

    def __init__(self, url: DiskUrl) -> None:
        self._url = url
        self.name = url.text

    def connect(self, cancel: Cancel, patience: float) -> NbdLink:
        url = self._url

        def begin(handle: Any) -> None:
            if url.socket:
                handle.aio_connect_unix(url.socket)
            else:
                handle.aio_connect_tcp(url.host, str(url.port))

        return NbdLink(begin, url.name, cancel, patience=patience)

    def close(self) -> None:
        """Nothing of it is ours."""

    def describe(self) -> dict[str, object]:
        return {"server": self.name}


def file_name(target: str, form: str, *, readonly: bool) -> str:
    """What qemu-nbd opens, as its ``json:`` file name. Raises ``HostError`` for what cannot be."""
    protocol: dict[str, object]
    options: dict[str, object] = {"driver": DRIVERS[form]}
    if target.startswith("/"):
        try:
            device = stat.S_ISBLK(os.stat(target).st_mode)
        except OSError as error:
            raise HostError(f"{target} cannot be opened: {error.strerror}") from None
        protocol = {"driver": "host_device" if device else "file", "filename": target}
    else:
        url = _web(target, form, readonly)
        protocol = {"driver": url.scheme, "url": target, "timeout": _WEB_TIME}
        if form == "qcow2":
            options["backing"] = None  # a stranger's image names no file of ours
    return "json:" + json.dumps({**options, "file": protocol})


def _parsed(target: str) -> DiskUrl:
    try:
        return parse_url(target)
    except ValueError as error:
        raise HostError(f"{target[:200]}: {error}") from None


def _web(target: str, form: str, readonly: bool) -> DiskUrl:
    url = _parsed(target)
    if not url.web or form not in WEB_FORMATS:
        raise HostError(f"{target}: images of format {form} are not served from there")
    if not readonly:
        raise HostError(f"{target} can only be read", hint="write access: ro")
    return url


class QemuNbd:
    """A qemu-nbd for one image: started for each connection, one at a time. ``folder`` is for its socket,
    ours alone. Raises ``HostError`` for what it cannot serve at all."""

    resizes = False  # nobody can while it has the image

    def __init__(self, target: str, form: str, *, readonly: bool, folder: Path | None = None) -> None:
        self.name = target
        self._form = form
        self._readonly = readonly
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._linked = False  # it had a client
        self._words = -1
        self._said = b""
        self.starts = 0
        file_name(target, form, readonly=readonly)

    def command(self, directory: int) -> list[str]:
        """``directory`` is the descriptor of the socket's folder: nobody's way there leads through others."""
        drop = []
        if not self.name.startswith("/") and os.geteuid() == 0:
            drop = [f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--no-new-privs"]
        return [
            *("setpriv", "--pdeathsig=TERM", *drop, "--"),
            *("qemu-nbd", f"--socket=/proc/self/fd/{directory}/nbd", "--cache=writeback", "--discard=unmap"),
            *(["--read-only"] if self._readonly else []),
            file_name(self.name, self._form, readonly=self._readonly),
        ]

    def connect(self, cancel: Cancel, patience: float) -> NbdLink:
        until = time.monotonic() + patience
        self._end(cancel)
        try:
            if self.name.startswith("/"):
                check_local(self.name, self._form)
            else:
                check_web(self.name, self._form, patience)
            base = self._base()
            sweep(base)
            folder = tempfile.mkdtemp(prefix=f"nbd-{os.getpid()}-", dir=base)
        except HostError as error:
            raise LinkGoneError(error.message) from None
        except OSError as error:
            raise LinkGoneError(f"no place for a socket: {error}") from None
        try:
            self._start(folder)
            sock = self._reach(folder, until, cancel)
            link = _shake_hands(sock, cancel, max(0.1, until - time.monotonic()))
            self._linked = True
            return link
        except LinkGoneError as error:
            # It may listen before it has opened the image.
            words = self._last_words() or str(error)
            raise LinkGoneError(words, locked='Failed to get "' in words) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _base(self) -> Path:
        folder = self._folder or paths.run_dir()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def _start(self, folder: str) -> None:
        if os.geteuid() == 0:
            os.chown(folder, _NOBODY, _NOBODY)
        self._said = b""
        self._linked = False
        # Its end does not wait: what nobody reads is not said.
        self._words, stderr = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        directory = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        try:
            self._process = subprocess.Popen(
                self.command(directory),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(directory,),
                cwd="/",
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {"LC_ALL": "C"},
                start_new_session=True,
            )
        except (OSError, HostError) as error:
            os.close(self._words)
            self._words = -1
            raise LinkGoneError(f"cannot start qemu-nbd: {error}") from error
        finally:
            os.close(stderr)
            os.close(directory)
        self.starts += 1

    def _reach(self, folder: str, until: float, cancel: Cancel) -> socket.socket:
        """Connect as soon as it listens."""
        process = self._process
        assert process is not None
        while True:
            with suppress(OSError):
                return _dial(folder)
            if process.poll() is not None:
                raise LinkGoneError(f"qemu-nbd ended with status {process.returncode}")
            if time.monotonic() > until:
                raise LinkGoneError("qemu-nbd does not come up")
            cancel.wait(0.002)

    def _last_words(self) -> str:
        with suppress(OSError):
            while self._words >= 0 and (piece := os.read(self._words, 1 << 16)):
                self._said = (self._said + piece)[-_LAST_WORDS:]
        lines = self._said.decode("ascii", "backslashreplace").strip().splitlines()
        line = lines[0] if lines else ""
        for prefix in ("setpriv: ", "qemu-nbd: "):
            line = line.removeprefix(prefix)
        # Without the file name in front, which is our own json.
        return line.partition("}': ")[2] or line

    def _end(self, cancel: Cancel | None = None) -> None:
        """It has lost its client: see it off. One that hangs is killed if its image is to be opened again."""
        process = self._process
        if process is None:
            return
        if not self._linked:
            process.kill()  # it has nothing of anybody's
        until = time.monotonic() + (KILL_TIME if cancel else LEAVE_TIME)
        while process.poll() is None and time.monotonic() < until:
            if cancel is not None:
                cancel.wait(0.005)
            else:
                time.sleep(0.005)
        if process.poll() is None:
            if cancel is None:
                process.terminate()  # ends when it has written out what it has
            else:
                process.kill()
                until = time.monotonic() + KILL_TIME
                while process.poll() is None:
                    if time.monotonic() > until:
                        raise LinkGoneError("qemu-nbd hangs in the kernel")
                    cancel.wait(0.005)
        self._process = None
        os.close(self._words)
        self._words = -1

    def close(self) -> None:
        self._end()

    def describe(self) -> dict[str, object]:
        process = self._process
        running = process.pid if process is not None and process.poll() is None else None
        return {"helper": "qemu-nbd", "pid": running, "starts": self.starts}


def _dial(folder: str) -> socket.socket:
    """Connect to the socket in a folder; the path's length does not matter. Raises ``OSError``."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    directory = -1
    try:
        directory = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        sock.connect(f"/proc/self/fd/{directory}/nbd")
    except OSError:
        sock.close()
        raise
    finally:
        if directory >= 0:
            os.close(directory)
    return sock


def _shake_hands(sock: socket.socket, cancel: Cancel, patience: float) -> NbdLink:
    # The descriptor becomes libnbd's.
    return NbdLink(lambda handle: handle.aio_connect_socket(sock.detach()), "", cancel, patience=patience)


def sweep(base: Path) -> None:
    """End each qemu-nbd that a process was killed over while it started it, and remove its folder. ``base``
    is a folder of sockets that no other process uses any more."""
    for folder in base.glob("nbd-*-*"):
        if folder.name.split("-")[1] == str(os.getpid()):
            continue  # another disk's, being started
        holders = _holders(str(folder))
        for pid in holders:
            _end_process(pid, str(folder))
        with suppress(OSError):
            # A process that is just becoming qemu-nbd may be overlooked: so it is looked for again.
            if not holders and time.time() - folder.stat().st_mtime > _STARTING:
                shutil.rmtree(folder, ignore_errors=True)


def _holders(folder: str) -> list[int]:
    """The processes of ours that have the folder open."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (entry / "comm").read_text().strip() in ("qemu-nbd", "setpriv") and _holds(entry, folder):
                found.append(int(entry.name))
    return found


def _holds(process: Path, folder: str) -> bool:
    for link in (process / "fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(link) == folder:
                return True
    return False


def _end_process(pid: int, folder: str) -> None:
    """Tell it to end, and wait a little."""
    with suppress(OSError):  # it has gone
        handle = os.pidfd_open(pid)
        try:
            # Asked after it was opened: from then on the number cannot come to mean another process.
            if _holds(Path(f"/proc/{pid}"), folder):
                signal.pidfd_send_signal(handle, signal.SIGTERM)
                select.select([handle], [], [], _SWEEP_TIME)
        finally:
            os.close(handle)


def source_for(target: str, form: str, *, readonly: bool, folder: Path | None) -> Source:
    """What serves an image. Raises ``HostError``."""
    if form not in DRIVERS:
        raise HostError(f"{target}: images of format {form} are not served here")
    if not target.startswith("/"):
        url = _parsed(target)
        if not url.web:
            if form != "raw":
                raise HostError(f"{target}: an NBD server gives a disk as it is, not as {form}")
            return NbdServer(url)
    return QemuNbd(target, form, readonly=readonly, folder=folder)
