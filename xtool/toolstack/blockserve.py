"""A disk on a Unix socket for every program that speaks NBD: attached to domain 0, served until stopped."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from xtool import paths
from xtool.errors import DeviceError, ImageInUseError, UsageError
from xtool.frontends.nbd import NbdServer
from xtool.toolstack.api import ServedDisk, ServeOptions
from xtool.toolstack.dom0disk import attached
from xtool.toolstack.names import find
from xtool.toolstack.wiring import records

if TYPE_CHECKING:
    from xtool.config import DiskConfig
    from xtool.frontends.block import BlockFrontend
    from xtool.toolstack.host import Host

#: How often the backend is asked whether it still serves the disk, seconds.
_CHECK = 1.0


def serve(host: Host, options: ServeOptions, ready: Callable[[ServedDisk], None]) -> None:
    """Attach the disk, call ``ready`` once it is served, and go on until an exception (Ctrl-C, SIGTERM).

    Raises what ``attached`` raises, ``DomainNotFoundError``, ``DeviceError`` for a domain without the disk,
    ``UsageError`` for a socket that cannot be, ``HostError`` when the backend gives the disk up.
    """
    disk = options.disk or disk_of(host, options.domain, options.vdev)
    if options.readonly or options.force_share:
        disk = disk.model_copy(update={"access": "ro"})
    path = Path(options.socket or paths.run_dir() / f"block-serve-{os.getpid()}.sock").absolute()
    _check_socket(path)
    try:
        with attached(host, disk, force_share=options.force_share) as front:
            server = _listen(front, path)
            try:
                url = f"nbd+unix:///?socket={quote(str(path))}"
                ready(ServedDisk(url, str(path), disk.target or "", front.size, front.offer.readonly))
                check_at = time.monotonic() + _CHECK
                while True:
                    server.step(_CHECK)
                    if time.monotonic() >= check_at:
                        front.check()
                        check_at = time.monotonic() + _CHECK
            finally:
                server.close()
    except ImageInUseError as error:
        hint = "--force-share (-U) reads it all the same; what is read need not fit together"
        raise ImageInUseError(error.message, hint=hint if disk.readonly else error.hint) from None


def disk_of(host: Host, domain: str, vdev: str) -> DiskConfig:
    """The disk of a running domain, read-only: what it has open for writing is its own.

    Raises ``DomainNotFoundError``, ``DeviceError``, ``UsageError``.
    """
    from xtool.config.single import disk_from
    from xtool.config.vdev import vdev_number

    found = find(host, domain)
    number = vdev_number(vdev)
    for record in records(host, found.state.domid, ("vbd",)):
        if record.device.devid != number:
            continue
        notes = record.notes
        form, _, path = notes.get("params", "").partition(":")
        if form.startswith("/"):
            form, path = "raw", notes["params"]
        if not path:
            raise DeviceError(f"the drive {vdev} of {found.name} is empty")
        if notes.get("xtool-script"):
            raise UsageError(
                f"a script made the disk {vdev} of {found.name}",
                hint="serve the block device it made: xtool block-serve --read-only /dev/...",
            )
        form = notes.get("xtool-format") or ("raw" if form == "aio" else form)
        return disk_from({"target": path, "format": form, "vdev": "xvda", "access": "ro"})
    raise DeviceError(
        f"{found.name} has no disk {vdev}", hint=f"xtool block-list {found.state.domid} shows those it has"
    )


def _check_socket(path: Path) -> None:
    """Make way for the socket: what a killed server left is removed, nothing else is."""
    if len(os.fsencode(path)) > 107:
        raise UsageError(f"{path} is too long for a Unix socket", hint="107 bytes are the most")
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:
                path.unlink(missing_ok=True)
                return
        raise UsageError(f"somebody listens at {path} already", hint="choose another --socket")
    if path.exists():
        raise UsageError(f"{path} is there already, and is no socket", hint="choose another --socket")


def _listen(front: BlockFrontend, path: Path) -> NbdServer:
    if path.parent == paths.run_dir():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    try:
        return NbdServer(front, path)
    except OSError as error:
        raise UsageError(
            f"cannot listen at {path}: {error.strerror}", hint="choose another --socket"
        ) from None
