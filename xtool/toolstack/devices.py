"""Disks and interfaces of running domains: list, attach, detach.

While a change is under way the journal says so (``pending``); if we are killed, ``recover`` takes the device
away, whichever way it was going. A domain's journal also keeps its devices as its file would have them, so
that a restart brings back what was attached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xtool.devices.backendkinds import FOLDERS, PATIENT
from xtool.devices.declare import device_model_nodes, write
from xtool.devices.vbd import Vbd
from xtool.devices.vif import Vif, rate_text
from xtool.devices.xenbus import DeviceId, backend_states, close, removal_paths
from xtool.errors import DeadlineError, DeviceError, UsageError
from xtool.toolstack import journal
from xtool.toolstack.api import BlockInfo, DeviceResult, LifecycleResult, NetworkInfo
from xtool.toolstack.backends import check_served, stop_backends
from xtool.toolstack.deviceplan import lowest_free, plan_disk, plan_vif
from xtool.toolstack.images import check_free
from xtool.toolstack.keeper import look_again
from xtool.toolstack.live import Ask, Live
from xtool.toolstack.names import now, uuid_text
from xtool.toolstack.query import kind_of
from xtool.toolstack.signals import undone_on_failure
from xtool.toolstack.wiring import Record, Wiring, offline, records, remove_taps, wait_let_go
from xtool.xenstore.paths import parent

if TYPE_CHECKING:
    from xtool.config import DiskConfig, VifConfig
    from xtool.hypercall.port import DomainState
    from xtool.toolstack.host import Host
    from xtool.toolstack.names import Named
    from xtool.xenstore.port import Transaction

#: How long a QEMU that only serves disks may take to come up, seconds.
_QEMU_TIME = 60.0
#: How long a process of ours may take to let go of a tap device, seconds.
_TAP_TIME = 2.0


# --- listing --------------------------------------------------------------------------------------------
def disks(host: Host, found: Named, ask_backends: Ask | None = None) -> list[BlockInfo]:
    """The domain's disks by number, those that are only emulated last. ``ask_backends`` is for tests."""
    domid = found.state.domid
    listed = records(host, domid, ("vbd",))
    states = state_words(host, listed)
    live = Live(host, domid, states, ask_backends)
    infos = [_block_info(record, states[record.device], live) for record in listed]
    shown = {info.vdev for info in infos}
    entry = journal.read(uuid_text(found.state.handle))
    if entry and entry.type == "hvm":
        infos += [_emulated_info(domid, disk) for disk in _disks_of(entry) if disk.vdev not in shown]
    return infos


def state_words(host: Host, listed: list[Record]) -> dict[DeviceId, str]:
    """Their backends' states in words (``init-wait``); ``gone`` for one without a directory."""
    states = backend_states(host.store, [record.device for record in listed])
    return {device: "gone" if state is None else state.word for device, state in states.items()}


def _block_info(record: Record, state: str, live: Live) -> BlockInfo:
    notes, device = record.notes, record.device
    form, _, path = notes.get("params", "").partition(":")
    if form.startswith("/"):
        form, path = "raw", notes["params"]
    return BlockInfo(
        domid=device.domid,
        devid=device.devid,
        vdev=notes.get("dev", str(device.devid)),
        backend=notes.get("xtool-kind") or notes.get("type", device.folder),
        backend_domid=device.backend_domid,
        state=state,
        target=path,
        format=notes.get("xtool-format") or form,
        readonly="w" not in notes.get("mode", ""),
        cdrom=notes.get("device-type") == "cdrom",
        reason=notes.get("xtool-reason", ""),
        bytes_per_second=int(notes.get("xtool-bytes-per-second", 0)) or None,
        ops_per_second=int(notes.get("xtool-ops-per-second", 0)) or None,
        problem=live.problem(device, state),
        live=live.told(device),
    )


def _emulated_info(domid: int, disk: DiskConfig) -> BlockInfo:
    return BlockInfo(
        domid=domid,
        devid=disk.number,
        vdev=disk.vdev,
        backend="emulated",
        backend_domid=0,
        state="",
        target=disk.target or "",
        format=disk.format,
        readonly=disk.readonly,
        cdrom=disk.cdrom,
        reason="CD drives of hvm guests are emulated" if disk.cdrom else "xen_platform_pci: false",
    )


def _disks_of(entry: journal.Entry) -> list[DiskConfig]:
    from xtool.config.single import disk_from

    return [disk_from(disk) for disk in (entry.config or {}).get("disk", ())]


def networks(host: Host, found: Named, ask_backends: Ask | None = None) -> list[NetworkInfo]:
    """The domain's paravirtual interfaces, by number. ``ask_backends`` is for tests."""
    listed = records(host, found.state.domid, ("vif",))
    states = state_words(host, listed)
    live = Live(host, found.state.domid, states, ask_backends)
    return [_network_info(record, states[record.device], live) for record in listed]


def _network_info(record: Record, state: str, live: Live) -> NetworkInfo:
    notes, device = record.notes, record.device
    return NetworkInfo(
        domid=device.domid,
        devid=device.devid,
        mac=notes.get("mac", ""),
        backend=notes.get("xtool-kind", device.folder),
        backend_domid=device.backend_domid,
        state=state,
        bridge=notes.get("bridge", ""),
        interface=notes.get("vifname") or f"vif{device.domid}.{device.devid}",
        type=notes.get("type", "vif"),
        reason=notes.get("xtool-reason", ""),
        rate=rate_text(notes.get("rate", "")),
        rate_in=rate_text(notes.get("rate-in", "")),
        problem=live.problem(device, state),
        live=live.told(device),
    )


# --- attaching ------------------------------------------------------------------------------------------
def attach_disk(host: Host, found: Named, disk: DiskConfig, deadline: float) -> DeviceResult:
    """Give a running domain a disk. Returns when its backend is up; the guest takes it from there.

    Raises ``DeviceError`` when the domain has one of this number, and what ``plan_disk``, ``check_free``
    and the backends raise; then nothing has changed.
    """
    uuid, guest = uuid_text(found.state.handle), kind_of(found.state)
    if guest == "hvm" and disk.cdrom:
        raise UsageError(
            "an hvm guest's CD drives are emulated: none can be added while it runs",
            hint="xtool cd-insert puts a medium into a drive it has",
        )
    vbd = plan_disk(disk, host.targets([disk.target]))
    with journal.locked(uuid), undone_on_failure() as undo:
        found = now(host, found)
        domid = found.state.domid
        with journal.naming():
            check_free(host, [vbd], "")
            _begin(host, undo, uuid, vbd.id(domid), lambda config: _with(config, "disk", disk.to_dict()))
        if vbd.backend_kind.server == "qemu" and guest != "hvm":
            _serve_qdisks(host, found, uuid, undo)
        _add(host, undo, Wiring(host, domid, guest, disks=[vbd]), vbd, deadline)
        _finish(uuid)
        undo.pop_all()
    return DeviceResult(domid, "vbd", vbd.devid, vbd.vdev, "attached")


def attach_vif(host: Host, found: Named, vif: VifConfig, deadline: float) -> DeviceResult:
    """Give a running domain an interface; as ``attach_disk``."""
    uuid, guest = uuid_text(found.state.handle), kind_of(found.state)
    with journal.locked(uuid), undone_on_failure() as undo:
        found = now(host, found)
        domid = found.state.domid
        present = records(host, domid, ("vif",))
        devid = vif.devid if vif.devid is not None else lowest_free(r.device.devid for r in present)
        planned = plan_vif(vif, uuid, devid, guest, hotplug=True)
        if any(record.notes.get("mac") == planned.mac for record in present):
            raise DeviceError(f"{found.name} has an interface with the address {planned.mac} already")
        if not planned.script and planned.network != "user":
            host.hotplug.check_bridge(planned.bridge)
        kept = {**vif.to_dict(), "devid": devid, "mac": planned.mac}
        _begin(host, undo, uuid, planned.id(domid), lambda config: _with(config, "vif", kept))
        _add(host, undo, Wiring(host, domid, guest, vifs=[planned]), planned, deadline)
        _finish(uuid)
        undo.pop_all()
    return DeviceResult(domid, "vif", devid, planned.interface(domid), "attached")


def _begin(
    host: Host,
    undo: ExitStack,
    uuid: str,
    device: DeviceId,
    change: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Note in the journal what is about to be done, and what the configuration will be."""
    check_served(host, [device])
    if host.store.exists(device.mirror):
        raise DeviceError(
            f"there is a {device} already",
            hint=f"choose another {'vdev' if device.kind == 'vbd' else 'devid'}",
        )
    entry = journal.read(uuid)
    if entry is None:
        return  # not a domain of ours: xenstore alone knows of its devices
    undo.callback(journal.update, uuid, config=entry.config, pending=None)
    before = {"kind": device.kind, "devid": device.devid, "config": entry.config}
    journal.write(replace(entry, config=change(entry.config or {}), pending=before))


def _finish(uuid: str) -> None:
    journal.update(uuid, pending=None)


def _with(config: dict[str, Any], key: str, device: dict[str, Any]) -> dict[str, Any]:
    return {**config, key: [*config.get(key, ()), device]}


def _without(config: dict[str, Any], device: DeviceId, notes: Mapping[str, str]) -> dict[str, Any]:
    """The configuration without a device: a disk by its number, an interface by number or address."""
    if device.kind == "vbd":
        from xtool.config.vdev import vdev_number

        kept = [d for d in config.get("disk", ()) if vdev_number(str(d.get("vdev"))) != device.devid]
        return _set(config, "disk", kept)
    vifs = list(config.get("vif", ()))
    index = vif_index(vifs, device.devid)
    return config if index is None else _set(config, "vif", _numbered(vifs, index))


def vif_index(vifs: list[dict[str, Any]], wanted: int) -> int | None:
    """Which of a configuration's interfaces has this number; None: none."""
    taken = {vif["devid"] for vif in vifs if "devid" in vif}
    for index, vif in enumerate(vifs):
        devid = vif.get("devid")
        if devid is None:  # numbered as plan_vifs did
            devid = lowest_free(taken)
            taken.add(devid)
        if devid == wanted:
            return index
    return None


def _numbered(vifs: list[dict[str, Any]], gone: int) -> list[dict[str, Any]]:
    """The others keep the numbers they had."""
    taken = {vif["devid"] for vif in vifs if "devid" in vif}
    kept = []
    for index, vif in enumerate(vifs):
        if "devid" not in vif:
            vif = {**vif, "devid": lowest_free(taken)}
            taken.add(vif["devid"])
        if index != gone:
            kept.append(vif)
    return kept


def _set(config: dict[str, Any], key: str, devices: list[Any]) -> dict[str, Any]:
    rest = {name: value for name, value in config.items() if name != key}
    return {**rest, key: devices} if devices else rest


def _add(host: Host, undo: ExitStack, wiring: Wiring, spec: Vbd | Vif, deadline: float) -> None:
    """From here on as at creation: nodes in one transaction, then wait."""
    [device] = wiring.devices
    wiring.open(undo)
    nodes = wiring.nodes()

    def change(tx: Transaction) -> None:
        if tx.exists(device.mirror):
            raise DeviceError(f"there is a {device} already")
        for path in removal_paths(device):
            tx.rm(path)
        write(tx, nodes)

    undo.callback(_take_away, host, device)
    host.store.atomically(change)
    wiring.ready(deadline)


def _take_away(host: Host, device: DeviceId) -> None:
    """Remove a device, whatever its guest and its backend do."""
    found = [r for r in records(host, device.domid, (device.kind,)) if r.device == device]
    offline(host, found)
    with host.store.batch() as batch:
        for path in removal_paths(device):
            batch.rm(path)
    # The domain's folder for this kind goes with its last device: nobody removes it later.
    folders = [parent(path) for path in (device.backend, device.error)]
    lists = host.store.list_many(folders)
    with host.store.batch() as batch:
        for path in folders:
            if lists[path] == ():
                batch.rm(path)
    remove_taps(host, found or [Record(device, {})], _TAP_TIME)
    wait_let_go(host, device.domid, [f"{device.kind}-{device.domid}-{device.devid}"])


def _serve_qdisks(host: Host, found: Named, uuid: str, undo: ExitStack) -> None:
    """See that a QEMU serves this PV or PVH domain's disks."""
    if not host.real:
        return
    from xtool.devicemodel.process import find, spawn
    from xtool.devicemodel.qdisk import QdiskSpec

    domid = found.state.domid
    running = find(domid)
    if running:
        running.close()
        return
    undo.callback(_stop_qemu, domid, uuid)
    model = spawn(QdiskSpec(found.name or f"domain-{domid}", uuid), domid)
    model.wait_ready(_QEMU_TIME)
    model.close()
    with host.store.batch() as batch:
        write(batch, device_model_nodes(domid, model.pid))
    look_again(domid, uuid, host)


def _stop_qemu(domid: int, uuid: str) -> None:
    from xtool.devicemodel.process import find

    model = find(domid, uuid=uuid)
    if model:
        model.stop(grace=0.2)


# --- detaching ------------------------------------------------------------------------------------------
def detach(host: Host, found: Named, kind: str, which: str, *, force: bool, deadline: float) -> DeviceResult:
    """Take a device away from a running domain: ``which`` is a disk's vdev or number, an interface's number
    or MAC address.

    Raises ``DeviceError`` when there is none, ``DeadlineError`` when the guest does not let go; then it has
    been asked, and the device goes with a second try or with ``force``.
    """
    uuid = uuid_text(found.state.handle)
    with journal.locked(uuid):
        found = now(host, found)
        domid = found.state.domid
        record = find_device(host, found, kind, which)
        device = record.device
        patient = frozenset() if found.state.paused else PATIENT
        try:
            close(host.store, [device], deadline, patient=patient)
        except DeadlineError as error:
            if not force:
                raise DeadlineError(
                    error.message, hint="is the guest running, and done with it? --force takes it away"
                ) from None
        entry = journal.read(uuid)
        if entry:
            pending = {"kind": device.kind, "devid": device.devid}
            config = _without(entry.config or {}, device, record.notes)
            journal.write(replace(entry, config=config, pending=pending))
        _take_away(host, device)
        _finish(uuid)
    name = record.notes.get("dev") or f"vif{domid}.{device.devid}"
    return DeviceResult(domid, device.kind, device.devid, name, "detached")


def find_device(host: Host, found: Named, kind: str, which: str) -> Record:
    from xtool.config.vdev import vdev_number

    listed = records(host, found.state.domid, (kind,))
    number = vdev_number(which) if kind == "vbd" else None
    if kind == "vif" and which.isascii() and which.isdecimal() and len(which) < 10:
        number = int(which)
    for record in listed:
        if record.device.devid == number or (kind == "vif" and record.notes.get("mac") == which.lower()):
            return record
    what, verb = ("disk", "block-list") if kind == "vbd" else ("interface", "network-list")
    raise DeviceError(
        f"{found.name} has no {what} {which}", hint=f"xtool {verb} {found.state.domid} shows those it has"
    )


def remove_all(host: Host, domid: int) -> None:
    """Take every device of a domain away that has ended and stays."""
    for record in records(host, domid):
        _take_away(host, record.device)
    stop_backends(host, domid)


def finish_pending(host: Host, entry: journal.Entry, state: DomainState) -> LifecycleResult:
    """Roll back (or carry through) what somebody was killed at; the caller holds the domain's lock."""
    pending = entry.pending or {}
    kind, devid = str(pending.get("kind")), pending.get("devid")
    if kind in ("vbd", "vif") and isinstance(devid, int):
        # Its record may be gone already, so it is looked for below each backend there is.
        for folder in (known.folder for known in FOLDERS.values() if known.device == kind):
            _take_away(host, DeviceId(state.domid, kind, devid, folder))
    config = pending.get("config", entry.config)
    journal.write(replace(entry, config=config, pending=None))
    return LifecycleResult(state.domid, entry.name, f"{kind} {devid} removed")
