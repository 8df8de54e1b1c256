"""Media of CD drives: put one in, take it out, while the guest runs.

Facts: an HVM guest's drives are QEMU's, and QEMU changes their media when it is told to over QMP; its
``blockdev-change-medium`` takes the format with the file, so that a guest's medium never chooses how it is
read (XSA-142, XSA-266). In the block protocol a medium cannot change under Linux's blkback or QEMU's disk
backend: for those it takes a detach and an attach.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from xtool.config.vdev import vdev_number
from xtool.devicemodel.spec import emulated_place
from xtool.devices.backendkinds import FOLDERS
from xtool.devices.vbd import Vbd, params
from xtool.errors import DeviceError, HostError, UsageError
from xtool.toolstack import journal
from xtool.toolstack.api import DeviceResult
from xtool.toolstack.images import check_free
from xtool.toolstack.names import uuid_text
from xtool.toolstack.query import kind_of
from xtool.toolstack.wiring import Record, records

if TYPE_CHECKING:
    from xtool.toolstack.host import Host
    from xtool.toolstack.names import Named
    from xtool.xenstore.port import Transaction

_QMP_TIME = 10.0


def change_medium(host: Host, found: Named, drive: str, target: str | None) -> DeviceResult:
    """Put ``target`` (an absolute path, raw) into a CD drive in place of what is there; None ejects.

    Raises ``DeviceError`` when the domain has no such drive, ``HostError`` for a target that is no file or
    block device, ``ImageInUseError``.
    """
    if target is not None:
        if not target.startswith("/"):
            raise UsageError(f"the medium {target} must be an absolute path")
        facts = host.hotplug.look_at(target)
        if facts.kind not in ("file", "block"):
            raise HostError(f"the medium {target} {facts.detail or 'is neither a file nor a block device'}")
    number, uuid = vdev_number(drive), uuid_text(found.state.handle)
    action = "ejected" if target is None else "inserted"
    with journal.locked(uuid):
        with journal.naming():
            medium = Vbd(drive, number or 0, target, readonly=True, cdrom=True)
            check_free(host, [medium], uuid)
            if kind_of(found.state) == "hvm":
                name = _emulated(host, found, uuid, number, drive, target)
            else:
                name = _paravirtual(host, found, uuid, number, drive, target)
        return DeviceResult(found.state.domid, "vbd", number or 0, name, action)


def _emulated(host: Host, found: Named, uuid: str, number: int | None, drive: str, target: str | None) -> str:
    entry = journal.read(uuid)
    config = (entry.config if entry else None) or {}
    for disk in config.get("disk", ()):
        vdev = str(disk.get("vdev"))
        place = emulated_place(vdev, str(config.get("hdtype", "ide")))
        if vdev_number(vdev) == number and disk.get("devtype") == "cdrom" and place:
            if host.real:
                _tell_qemu(found.state.domid, f"{place[0]}{place[1]}", target)
            _remember(uuid, vdev, target)
            return vdev
    raise _no_drive(found, drive)


def _tell_qemu(domid: int, drive: str, target: str | None) -> None:
    from xtool.devicemodel.process import qmp_path
    from xtool.devicemodel.qmp import query

    if target is None:
        # force: also when the guest has locked the tray, as its user pulling the pin would.
        query(qmp_path(domid), "eject", {"id": drive, "force": True}, deadline=_QMP_TIME)
        return
    arguments = {"id": drive, "filename": target, "format": "raw", "read-only-mode": "read-only"}
    query(qmp_path(domid), "blockdev-change-medium", {**arguments, "force": True}, deadline=_QMP_TIME)


def _paravirtual(
    host: Host, found: Named, uuid: str, number: int | None, drive: str, target: str | None
) -> str:
    for record in records(host, found.state.domid, ("vbd",)):
        if record.device.devid == number and record.notes.get("device-type") == "cdrom":
            _write_params(host, record, target)
            vdev = record.notes.get("dev", drive)
            _remember(uuid, vdev, target)
            return vdev
    raise _no_drive(found, drive)


def _write_params(host: Host, record: Record, target: str | None) -> None:
    device = record.device
    kind = FOLDERS.get(device.folder)
    if kind is None or not kind.changes_media:
        raise UsageError(
            f"the backend {device.folder} cannot change the medium of a running guest's drive",
            hint="block-detach and block-attach the drive, or give it backendtype: xtool",
        )
    text = params(Vbd("", 0, target, kind=kind.name))

    def change(tx: Transaction) -> None:
        tx.write(f"{device.backend}/params", text)
        tx.write(f"{device.mirror}/params", text)

    host.store.atomically(change)


def _remember(uuid: str, vdev: str, target: str | None) -> None:
    """So that a restart brings the same medium."""
    entry = journal.read(uuid)
    if entry is None or entry.config is None:
        return
    disks = []
    for disk in entry.config.get("disk", ()):
        if disk.get("vdev") == vdev:
            disk = {name: value for name, value in disk.items() if name not in ("target", "format")}
            disk |= {"target": target} if target else {}
        disks.append(disk)
    journal.write(replace(entry, config={**entry.config, "disk": disks}))


def _no_drive(found: Named, drive: str) -> DeviceError:
    return DeviceError(
        f"{found.name} has no CD drive {drive}",
        hint=f"xtool block-list {found.state.domid} shows the drives it has",
    )
