"""Collecting what ``xtool wiring`` shows: xenstore, Xen's word on ports and grants, and the rings' pages.

Nothing is changed, and nothing stays mapped: a page is copied, then the mapping goes.

Which devices a domain has is asked of the toolstack's own tree. What their frontends wrote is a hint: a frame
out of a guest's grant table is mapped as a frame of that guest, and Xen refuses one that is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xtool.abi.base import PAGE_SIZE
from xtool.backends.control import ask
from xtool.devices import wiringmodel as m
from xtool.devices.backendkinds import FOLDERS
from xtool.devices.xenbus import DeviceId, parse_state
from xtool.errors import HypercallError, XtoolError
from xtool.grant.table import Entry, read_table
from xtool.toolstack.query import kind_of
from xtool.toolstack.wiring import records
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.hypercall.port import Hypervisor
    from xtool.toolstack.host import Host
    from xtool.toolstack.names import Named

#: Console 0's page is granted under this reference (GNTTAB_RESERVED_CONSOLE).
_RESERVED_CONSOLE = 0
#: Nodes of one frontend that are looked at, at most.
_NODES = 256

Ask = Callable[[int], list[dict[str, Any]]]


def wiring_of(host: Host, found: Iterable[Named], ask_backends: Ask = ask) -> list[m.WiringView]:
    """The split drivers of some domains. What cannot be looked at becomes a problem of that device."""
    return [_domain(host, domain, ask_backends) for domain in found]


def _domain(host: Host, found: Named, ask_backends: Ask) -> m.WiringView:
    domid = found.state.domid
    look = _Look(host, domid)
    devices = []
    listed = records(host, domid, ("vbd", "vif", "console"))
    told = _told(domid, ask_backends) if any(_server(r.device.folder) == "process" for r in listed) else {}
    if all((r.device.kind, r.device.devid) != ("console", 0) for r in listed):
        devices.append(look.unlisted_console())
    for record in listed:
        device = record.device
        details = told.get((device.folder, device.devid), {})
        devices.append(look.device(device, record.notes, details))
    return m.WiringView(domid, found.name or "", kind_of(found.state), tuple(d for d in devices if d))


def _told(domid: int, ask_backends: Ask) -> dict[tuple[str, int], dict[str, Any]]:
    """What our backends say of themselves, by folder and number."""
    try:
        answers = ask_backends(domid)
    except XtoolError:
        return {}
    return {(str(a["folder"]), int(a["devid"])): a for a in answers if "folder" in a and "devid" in a}


def _server(folder: str) -> str:
    known = FOLDERS.get(folder)
    return known.server if known else "daemon"


class _Look:
    """One domain, looked at once: its grant table is read when it is first needed."""

    def __init__(self, host: Host, domid: int) -> None:
        self._store = host.store
        self._hv: Hypervisor = host.hv
        self._domid = domid
        self._table: dict[int, Entry] | None = None

    def device(self, device: DeviceId, notes: Mapping[str, str], details: dict[str, Any]) -> m.DeviceView:
        nodes = self._nodes(device.frontend)
        state = self._store.get(f"{device.backend}/state")
        name = notes.get("dev") or (f"vif{device.domid}.{device.devid}" if device.kind == "vif" else "")
        view = m.DeviceView(
            kind=device.kind,
            devid=device.devid,
            name=name or notes.get("name", "") or f"{device.kind} {device.devid}",
            backend_kind=notes.get("xtool-kind") or notes.get("type") or device.folder,
            server=_server(device.folder),
            frontend=m.EndView(device.domid, device.frontend, _word(nodes.get("state"))),
            backend=m.EndView(device.backend_domid, device.backend, _word(state)),
            details={
                key: value
                for key, value in details.items()
                if key not in ("folder", "kind", "domid", "devid")
            },
        )
        if device.kind == "console" and device.devid == 0:
            return self._console0(view, nodes)
        plans, problems = m.parse_frontend(device.kind, nodes)
        queues = [self._queue(view, plan, problems) for plan in plans]
        return self._judged(replace(view, queues=tuple(queues)), problems)

    def unlisted_console(self) -> m.DeviceView | None:
        """Console 0 of a domain whose toolstack keeps no record of it: xenconsoled serves it."""
        path = paths.console(self._domid)
        nodes = self._nodes(path)
        if "port" not in nodes:
            return None
        kind = nodes.get("type", "xenconsoled")
        view = m.DeviceView(
            kind="console",
            devid=0,
            name="console 0",
            backend_kind=kind,
            server="qemu" if kind == "ioemu" else "daemon",
            frontend=m.EndView(self._domid, path),
            backend=m.EndView(0, nodes.get("tty", "")),
        )
        return self._console0(view, nodes)

    def _console0(self, view: m.DeviceView, nodes: Mapping[str, str]) -> m.DeviceView:
        problems: list[str] = []
        port, frame = nodes.get("port", ""), nodes.get("ring-ref", "")
        channels = [self._channel("", int(port), problems)] if _number(port) else []
        grants = [self._grant(_RESERVED_CONSOLE, problems)]
        page = self._pages([int(frame)], problems) if _number(frame) else None
        rings, wrong = m.console_rings(grants, page)
        queue = m.QueueView(0, tuple(channels), tuple(rings))
        return self._judged(replace(view, queues=(queue,)), problems + wrong)

    def _judged(self, view: m.DeviceView, problems: list[str]) -> m.DeviceView:
        return replace(view, problems=tuple(dict.fromkeys([*problems, *m.judge(view)])))

    def _queue(self, view: m.DeviceView, plan: m.QueuePlan, problems: list[str]) -> m.QueueView:
        channels = [self._channel(role, port, problems) for role, port in plan.ports]
        rings: list[m.RingView] = []
        for ring in plan.rings:
            grants = [self._grant(ref, problems) for ref in ring.refs[: m.MAX_PAGES]]
            frames = [g.frame for g in grants[:1] if g.frame is not None and g.domid == view.backend.domid]
            page = self._pages(frames, problems) if frames else None
            if view.kind == "console":
                found, wrong = m.console_rings(grants, page)
                rings += found
                problems += wrong
            else:
                one, problem = m.shared_ring(ring, grants, page)
                rings.append(one)
                problems += [problem] if problem else []
        return m.QueueView(plan.number, tuple(channels), tuple(rings))

    # --- asking
    def _nodes(self, root: str) -> dict[str, str]:
        """The nodes of a directory and of its ``queue-N`` folders; no more than is sensible."""
        names = [n for n in self._store.list_many([root])[root] or () if "/" not in n][:_NODES]
        folders = [name for name in names if name.startswith("queue-")][: m.MAX_QUEUES]
        lists = self._store.list_many(f"{root}/{name}" for name in folders)
        names += [f"{folder}/{name}" for folder in folders for name in (lists[f"{root}/{folder}"] or ())[:32]]
        values = self._store.get_many(f"{root}/{name}" for name in names)
        return {name: value for name in names if (value := values[f"{root}/{name}"]) is not None}

    def _channel(self, role: str, port: int, problems: list[str]) -> m.ChannelView:
        try:
            near = self._hv.evtchn_status(self._domid, port)
            if near is None:
                return m.ChannelView(role, port, "beyond the domain's table")
            far = None
            if near.remote_domid is not None and near.remote_port is not None:
                far = self._hv.evtchn_status(near.remote_domid, near.remote_port)
        except HypercallError as error:
            problems.append(error.message)
            return m.ChannelView(role, port)
        status = far.status if far else ""
        return m.ChannelView(role, port, near.status, near.remote_domid, near.remote_port, status)

    def _grant(self, ref: int, problems: list[str]) -> m.GrantView:
        if self._table is None:
            try:
                self._table = {entry.ref: entry for entry in read_table(self._hv, self._domid)}
            except HypercallError as error:
                problems.append(error.message)
                self._table = {}
        entry = self._table.get(ref)
        if entry is None or entry.kind != "access":
            return m.GrantView(ref)
        return m.GrantView(ref, entry.frame, entry.domid, entry.readonly, entry.mapped)

    def _pages(self, frames: list[int], problems: list[str]) -> bytes | None:
        """A copy of some of the domain's pages."""
        try:
            with self._hv.map_foreign(self._domid, frames, writable=False) as mapping:
                return bytes(mapping.view[: len(frames) * PAGE_SIZE])
        except HypercallError as error:
            problems.append(error.message)
            return None


def _word(text: str | None) -> str:
    return "" if text is None else parse_state(text).word


def _number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 16
