"""The consoles our own backend serves, for those who look: where their sockets are, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING
from uuid import UUID

from xtool.backends.consolelog import BOOT, log_path, older, read_log
from xtool.backends.viewers import socket_path
from xtool.errors import DeviceError, DomainNotFoundError, HostError
from xtool.toolstack.api import ConsoleRecord
from xtool.toolstack.names import find, uuid_text
from xtool.toolstack.wiring import records

if TYPE_CHECKING:
    from xtool.toolstack.host import Host


def socket_of(host: Host, domid: int, number: int) -> str:
    """Where viewers of the console connect to; empty if it is not ours. Asked of the toolstack's own record.

    Raises ``DeviceError`` when the domain has no console of that number.
    """
    for record in records(host, domid, ("console",)):
        if record.device.devid == number and record.device.folder == "xtool-console":
            path = host.store.get(f"{record.device.backend}/path")
            return path or str(socket_path(domid, number))
    if number:
        raise DeviceError(
            f"domain {domid} has no console {number}", hint="channel: in the domain file adds one"
        )
    return ""


def kept(host: Host, domain: str, number: int, since: float) -> Iterator[ConsoleRecord]:
    """What the console printed since then. Raises ``DomainNotFoundError``, ``DeviceError`` without a log,
    ``HostError`` when it cannot be read."""
    uuid = _uuid(host, domain)
    path = log_path(uuid, number)
    if not (path.exists() or older(path).exists()):
        raise DeviceError(
            f"nothing is kept of console {number} of {domain}",
            hint="console_backend: xtool in the domain file keeps what is printed",
        )
    try:
        for record in read_log(path):
            if record.time >= since:
                text = record.data.decode("utf-8", "backslashreplace")
                yield ConsoleRecord(record.time, text, record.kind == BOOT, record.skipped)
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}") from None


def _uuid(host: Host, domain: str) -> str:
    try:
        return uuid_text(find(host, domain).state.handle)
    except DomainNotFoundError:
        try:
            return str(UUID(domain))  # of one that is gone; its log may be there
        except ValueError:
            pass
        raise
