"""libvirt in this process.

Facts about libvirt-python (9.0)
- Events and an embedded driver's own work want an event loop in the process; the default one runs in a
  thread, for the whole life of the process, and must be registered before the first connection.
- Calls release the interpreter's lock, and connections may be used from several threads.
- An embedded driver locks its root: a second process that opens it fails at once. Its guests outlive it.
- The embedded driver prints warnings to stderr unless ``LIBVIRT_LOG_OUTPUTS`` says otherwise, and reads that
  when it is loaded.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable
from typing import Any
from uuid import UUID

from xtool.drivers.libvirt.binding import binding, translated
from xtool.drivers.libvirt.domainxml import METADATA
from xtool.drivers.libvirt.link import LIFECYCLE, DomainFacts, Event, VcpuFacts

#: Events that are kept for those who ask later.
_KEPT = 1024

_loop: threading.Thread | None = None
_loop_lock = threading.Lock()


def _run_loop(libvirt: Any) -> None:
    global _loop
    with _loop_lock:
        if _loop is not None:
            return
        libvirt.virEventRegisterDefaultImpl()

        def run() -> None:
            while True:
                libvirt.virEventRunDefaultImpl()

        _loop = threading.Thread(target=run, name="libvirt events", daemon=True)
        _loop.start()


class DirectLink:
    """``Link`` by libvirt-python. ``on_event`` is called from the event thread.

    Raises ``HostError`` when libvirt is missing or cannot be reached.
    """

    def __init__(self, uri: str, on_event: Callable[[Event], None] | None = None) -> None:
        self._lv: Any = binding()
        _run_loop(self._lv)
        self._events: deque[Event] = deque(maxlen=_KEPT)
        self._number = 0
        self._changed = threading.Condition()
        self._on_event = on_event
        with translated(self._lv, f"open {uri}"):
            self._conn = self._lv.open(uri)
            self._subscribe()

    def close(self) -> None:
        with translated(self._lv, "close the connection"):
            for callback in self._callbacks:
                self._conn.domainEventDeregisterAny(callback)
            self._callbacks.clear()
            self._conn.close()

    # --- events -----------------------------------------------------------------------------------
    def _subscribe(self) -> None:
        lv = self._lv

        def note(domain: Any, kind: str, detail: str = "") -> None:
            with self._changed:
                self._number += 1
                event = Event(self._number, domain.UUIDString(), kind, detail)
                self._events.append(event)
                self._changed.notify_all()
            if self._on_event:
                self._on_event(event)

        def lifecycle(_conn: Any, domain: Any, event: int, _detail: int, _opaque: Any) -> None:
            note(domain, LIFECYCLE[event] if event < len(LIFECYCLE) else str(event))

        wanted: list[tuple[int, Callable[..., None]]] = [
            (lv.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
            (lv.VIR_DOMAIN_EVENT_ID_REBOOT, lambda _c, domain, _o: note(domain, "reboot")),
            (lv.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, lambda _c, d, dev, _o: note(d, "device-removed", dev)),
            (lv.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, lambda _c, d, dev, _o: note(d, "device-added", dev)),
        ]
        self._callbacks: list[int] = []
        for event_id, function in wanted:
            try:
                self._callbacks.append(self._conn.domainEventRegisterAny(None, event_id, function, None))
            except lv.libvirtError:  # a driver without such events: those who wait look again by themselves
                continue

    def mark(self) -> int:
        with self._changed:
            return self._number

    def events(self, after: int, timeout: float) -> list[Event]:
        with self._changed:
            self._changed.wait_for(lambda: self._number > after, timeout)
            return [event for event in self._events if event.number > after]

    # --- asking -----------------------------------------------------------------------------------
    def versions(self) -> dict[str, Any]:
        def text(number: int) -> str:
            return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"

        with translated(self._lv, "look at the host"):
            conn = self._conn
            try:
                free = conn.getFreeMemory()
            except self._lv.libvirtError:
                free = 0
            return {
                "type": conn.getType(),
                "hypervisor": text(conn.getVersion()),
                "libvirt": text(conn.getLibVersion()),
                "hostname": conn.getHostname(),
                "node": list(conn.getInfo()),
                "free": free,
            }

    def capabilities(self) -> str:
        with translated(self._lv, "read the capabilities"):
            return str(self._conn.getCapabilities())

    def domain_capabilities(self) -> str:
        try:
            return str(self._conn.getDomainCapabilities(None, "x86_64", None, None))
        except self._lv.libvirtError:
            return ""

    def domains(self) -> list[DomainFacts]:
        found = []
        with translated(self._lv, "list the domains"):
            domains = self._conn.listAllDomains(self._lv.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        for domain in domains:
            try:
                facts = self._facts(domain)
            except self._lv.libvirtError as error:
                if error.get_error_code() != self._lv.VIR_ERR_NO_DOMAIN:
                    raise
                continue  # it ended since
            if facts.domid >= 0:
                found.append(facts)
        return sorted(found, key=lambda facts: facts.domid)

    def _facts(self, domain: Any) -> DomainFacts:
        state, maxmem, memory, vcpus, cpu_time = domain.info()
        try:
            managed = bool(domain.metadata(self._lv.VIR_DOMAIN_METADATA_ELEMENT, METADATA))
        except self._lv.libvirtError:
            managed = False
        return DomainFacts(
            name=domain.name(),
            uuid=domain.UUIDString(),
            domid=domain.ID(),
            state=state,
            os_type=self._os_type(domain),
            memory=memory << 10,
            maxmem=maxmem << 10,
            vcpus=vcpus,
            cpu_time=cpu_time / 1e9,
            managed=managed,
        )

    def _os_type(self, domain: Any) -> str:
        if self._conn.getType().lower() == "test":  # it says linux of every domain
            match = re.search(r"<type[^>]*>([^<]+)</type>", domain.XMLDesc())
            return match[1] if match else ""
        return str(domain.OSType())

    def xml(self, uuid: str) -> str:
        with translated(self._lv, "read the domain's XML"):
            return str(self._domain(uuid).XMLDesc())

    def vcpus(self, uuid: str) -> list[VcpuFacts]:
        with translated(self._lv, "list the vCPUs"):
            info, maps = self._domain(uuid).vcpus()
        return [
            VcpuFacts(
                number, state, cpu_time / 1e9, cpu if cpu >= 0 else None,
                tuple(index for index, usable in enumerate(affinity) if usable),
            )
            for (number, state, cpu_time, cpu), affinity in zip(info, maps, strict=True)
        ]  # fmt: skip

    def _domain(self, uuid: str) -> Any:
        return self._conn.lookupByUUID(UUID(uuid).bytes)

    # --- changing ---------------------------------------------------------------------------------
    def create(self, xml: str, paused: bool) -> DomainFacts:
        lv = self._lv
        with translated(lv, "create the domain"):
            if paused and self._conn.getType().lower() == "test":  # it cannot begin paused
                domain = self._conn.createXML(xml, lv.VIR_DOMAIN_START_VALIDATE)
                domain.suspend()
            else:
                flags = lv.VIR_DOMAIN_START_VALIDATE | (lv.VIR_DOMAIN_START_PAUSED if paused else 0)
                domain = self._conn.createXML(xml, flags)
            return self._facts(domain)

    def act(self, uuid: str, action: str) -> None:
        lv = self._lv
        with translated(lv, f"{action.partition('-')[0]} the domain"):
            domain = self._domain(uuid)
            verb, _, how = action.partition("-")
            if verb == "shutdown":
                flags = {"acpi": lv.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN, "pv": lv.VIR_DOMAIN_SHUTDOWN_PARAVIRT}
                domain.shutdownFlags(flags.get(how, 0))
            elif verb == "reboot":
                flags = {"acpi": lv.VIR_DOMAIN_REBOOT_ACPI_POWER_BTN, "pv": lv.VIR_DOMAIN_REBOOT_PARAVIRT}
                domain.reboot(flags.get(how, 0))
            else:
                {"suspend": domain.suspend, "resume": domain.resume, "destroy": domain.destroy}[verb]()

    def device(self, uuid: str, action: str, xml: str) -> None:
        live = self._lv.VIR_DOMAIN_AFFECT_LIVE
        with translated(self._lv, f"{action} the device"):
            domain = self._domain(uuid)
            change = {
                "attach": domain.attachDeviceFlags,
                "detach": domain.detachDeviceFlags,
                "update": domain.updateDeviceFlags,
            }[action]
            change(xml, live)

    def limit_disk(self, uuid: str, dev: str, limits: dict[str, int]) -> None:
        with translated(self._lv, "limit the disk"):
            self._domain(uuid).setBlockIoTune(dev, limits, self._lv.VIR_DOMAIN_AFFECT_LIVE)

    def limit_interface(self, uuid: str, mac: str, limits: dict[str, int]) -> None:
        with translated(self._lv, "limit the interface"):
            self._domain(uuid).setInterfaceParameters(mac, limits, self._lv.VIR_DOMAIN_AFFECT_LIVE)
