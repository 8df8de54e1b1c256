"""Limits of a running domain's disks and interfaces: changed at once, and kept for its restart.

Facts: Linux's netback watches ``rate`` and takes up what it says; no node is no limit. blkback and QEMU know
no limits. Our backends look at their directory whenever anything in it changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xtool.config.devices import parse_rate
from xtool.config.vdev import vdev_number
from xtool.devices.declare import Node, write
from xtool.devices.vbd import limit_nodes
from xtool.errors import DeviceError, UsageError
from xtool.proto.xsperms import PRIVATE, owned_by
from xtool.toolstack import journal
from xtool.toolstack.api import DeviceResult
from xtool.toolstack.deviceplan import credit
from xtool.toolstack.devices import find_device, vif_index
from xtool.toolstack.names import uuid_text

if TYPE_CHECKING:
    from xtool.devices.xenbus import DeviceId
    from xtool.toolstack.host import Host
    from xtool.toolstack.names import Named
    from xtool.toolstack.wiring import Record
    from xtool.xenstore.port import Transaction

Config = dict[str, Any]


def limit_disk(
    host: Host, found: Named, which: str, bytes_per_second: int | None, ops_per_second: int | None
) -> DeviceResult:
    """Other limits for a disk of our backend's; None leaves one as it is, 0 takes it away.

    Raises ``DeviceError`` when there is no such disk, ``UsageError`` for another backend's.
    """
    domid, uuid = found.state.domid, uuid_text(found.state.handle)
    wanted = {"bytes-per-second": bytes_per_second, "ops-per-second": ops_per_second}
    given = {name: value for name, value in wanted.items() if value is not None}
    with journal.locked(uuid):
        record = limit_disk_now(host, found, which, given)
        device = record.device

        def remember(config: Config) -> Config:
            disks = [
                _with_limits(disk, given) if vdev_number(str(disk.get("vdev"))) == device.devid else disk
                for disk in config.get("disk", ())
            ]
            return {**config, "disk": disks} if disks else config

        journal.change_config(uuid, remember)
    return DeviceResult(domid, "vbd", device.devid, record.notes.get("dev", which), "limited")


def limit_disk_now(host: Host, found: Named, which: str, given: Mapping[str, int]) -> Record:
    """The same for who holds the domain's lock and keeps its configuration: ``bytes-per-second``,
    ``ops-per-second``."""
    record = find_device(host, found, "vbd", which)
    device = record.device
    if device.folder != "xtool-vbd":
        raise UsageError(
            f"disk {which} is served by {record.notes.get('xtool-kind') or device.folder}, "
            "which knows no limits",
            hint="block-detach it, and block-attach it with backendtype=xtool",
        )
    values = limit_nodes(given.get("bytes-per-second"), given.get("ops-per-second"))
    _change(host, device, {f"xtool-{name}": values.get(f"xtool-{name}") for name in given})
    return record


def limit_vif(host: Host, found: Named, which: str, rate: str | None, rate_in: str | None) -> DeviceResult:
    """Other rates (``10Mb/s``) for an interface; None leaves one as it is, "" takes it away.

    Raises ``DeviceError`` when there is no such interface, ``UsageError`` for a rate that is none and for
    ``rate_in`` where another backend serves it.
    """
    domid, uuid = found.state.domid, uuid_text(found.state.handle)
    given = {name: text for name, text in (("rate", rate), ("rate-in", rate_in)) if text is not None}
    with journal.locked(uuid):
        device = limit_vif_now(host, found, which, given).device

        def remember(config: Config) -> Config:
            vifs = list(config.get("vif", ()))
            index = vif_index(vifs, device.devid)
            if index is None:
                return config
            vifs[index] = _with_limits(vifs[index], given)
            return {**config, "vif": vifs}

        journal.change_config(uuid, remember)
    return DeviceResult(domid, "vif", device.devid, f"vif{domid}.{device.devid}", "limited")


def limit_vif_now(host: Host, found: Named, which: str, given: Mapping[str, str]) -> Record:
    """The same for who holds the domain's lock and keeps its configuration: ``rate``, ``rate-in``."""
    nodes = {name: _rate_node(text) for name, text in given.items()}
    record = find_device(host, found, "vif", which)
    device = record.device
    if "rate-in" in given and device.folder != "xtool-vif":
        raise UsageError(
            f"interface {which} is served by netback, which limits only what the guest sends",
            hint="leave --rate-in out, or give the interface backendtype=xtool",
        )
    _change(host, device, nodes, perms=owned_by(device.backend_domid, read=[device.domid]))
    return record


def _rate_node(text: str) -> str | None:
    if not text:
        return None
    limit = credit(parse_rate(text))
    if limit is None:
        raise UsageError(f"{text!r} is not a rate", hint="write 10Mb/s, 250KB/s, 1MB/s@20ms, or none")
    return f"{limit[0]},{limit[1]}"


def _with_limits(device: Config, given: Mapping[str, int | str]) -> Config:
    kept = {name: value for name, value in device.items() if name not in given}
    return {**kept, **{name: value for name, value in given.items() if value}}


def _change(
    host: Host, device: DeviceId, nodes: Mapping[str, str | None], perms: tuple[str, ...] = PRIVATE
) -> None:
    """Write nodes of the backend's, or remove those that are None, and the same in our own record."""

    def change(tx: Transaction) -> None:
        if not tx.exists(f"{device.backend}/frontend"):
            raise DeviceError(f"{device} is being taken away")
        for root, allowed in ((device.backend, perms), (device.mirror, PRIVATE)):
            for name, value in nodes.items():
                if value is None:
                    tx.rm(f"{root}/{name}")
                else:
                    write(tx, [Node(f"{root}/{name}", value, allowed)])

    host.store.atomically(change)
