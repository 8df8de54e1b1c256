"""The toolstack's verbs, carried out by libvirt.

What libvirt has no counterpart for is refused by name (``__getattr__``), never left out in silence. libvirt
itself carries out on_poweroff, on_reboot and on_crash.
"""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, cast
from uuid import uuid4
from xml.etree.ElementTree import Element

from xtool.drivers.libvirt import domainxml, honour, readxml
from xtool.drivers.libvirt.accel import find_emulator, kvm_works
from xtool.drivers.libvirt.devices import DeviceVerbs
from xtool.drivers.libvirt.facts import Facts
from xtool.drivers.libvirt.link import DomainFacts, Link, wait_until
from xtool.drivers.libvirt.uri import Target, parse_target
from xtool.drivers.libvirt.xmltext import parse_xml
from xtool.errors import (
    DeadlineError,
    DomainError,
    DomainExistsError,
    DomainNotFoundError,
    HostError,
    UnsupportedError,
)
from xtool.progress import SILENT, Progress
from xtool.toolstack.api import (
    Client,
    ConsoleTarget,
    CreateOptions,
    CreateResult,
    DomainInfo,
    HostInfo,
    LifecycleResult,
    Span,
    VcpuInfo,
)
from xtool.toolstack.query import cpu_ranges

if TYPE_CHECKING:
    from xtool.config import DomainConfig

#: virDomainState; "being shut down" still runs.
_STATES = ("running", "running", "blocked", "paused", "running", "shutdown", "crashed", "paused")
_TYPES = {"linux": "pv", "xen": "pv", "xenpvh": "pvh"}
_VCPU_STATES = ("offline", "running", "blocked")
_HINT = "use it on a Xen host, without -H or with -H ssh://"


class LibvirtClient(DeviceVerbs):
    """``Client`` on a ``Link``. A verb it does not have raises ``UnsupportedError``."""

    def __init__(self, link: Link, target: Target) -> None:
        self.link = link
        self.target = target

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("_") or not hasattr(Client, name):
            raise AttributeError(name)

        def refuse(*_: object, **__: object) -> NoReturn:
            raise self.unsupported(name)

        return refuse

    def unsupported(self, verb: str, why: str = "") -> UnsupportedError:
        reason = why or f"{self.target.name} has nothing like it"
        return UnsupportedError(
            f"xtool {verb.replace('_', '-')} needs Xen's own driver: {reason}", hint=_HINT
        )

    def close(self) -> None:
        self.link.close()

    @cached_property
    def facts(self) -> Facts:
        """Raises ``HostError`` when an embedded driver has no QEMU."""
        target = self.target
        if target.kind != "qemu":
            return Facts(target.kind, target.name)
        if not target.root:
            kvm = "<domain>kvm</domain>" in self.link.domain_capabilities()
            return Facts("qemu", target.name, target.accel or ("kvm" if kvm else "tcg"))
        emulator = find_emulator()
        if emulator is None:
            raise HostError("there is no QEMU here", hint="install it (Debian: qemu-system-x86)")
        accel = target.accel or ("kvm" if kvm_works(emulator) else "tcg")
        return Facts("qemu", target.name, accel, emulator, True)

    def find(self, text: str) -> DomainFacts:
        """By domid, name or uuid. Raises ``DomainNotFoundError``."""
        for found in self.link.domains():
            if text.isdecimal():
                if found.domid == int(text):
                    return found
            elif text == found.name or text.lower() == found.uuid:
                return found
        raise DomainNotFoundError(f"there is no domain {text!r}", hint="xtool list shows those there are")

    def xml(self, found: DomainFacts) -> Element:
        return parse_xml(self.link.xml(found.uuid))

    # --- making and ending ------------------------------------------------------------------------
    def create(
        self, config: DomainConfig, options: CreateOptions, progress: Progress = SILENT
    ) -> CreateResult:
        """Raises ``ConfigError`` for keys the driver cannot honour, ``DomainExistsError``."""
        begin = time.monotonic()
        spans: list[Span] = []

        def step(name: str, work: Callable[[], Any]) -> Any:
            start = time.monotonic()
            result = work()
            spans.append(Span(name, start - begin, time.monotonic() - start))
            return result

        facts = step("facts", lambda: self.facts)
        honour.check(config, facts)
        uuid = str(config.uuid or uuid4())
        for other in self.link.domains():
            if config.name == other.name or uuid == other.uuid:
                raise DomainExistsError(
                    f"domain {other.domid} is already named {config.name!r}"
                    if config.name == other.name
                    else f"domain {other.domid} already has the uuid {uuid}",
                    hint="choose another name (--set name=...), or xtool destroy it first",
                )
        text = step("render", lambda: domainxml.render(config, facts, uuid))
        progress.step("starting the domain")
        made = step("start", lambda: self.link.create(text, options.paused))
        return CreateResult(
            made.name, made.domid, made.uuid, config.type, time.monotonic() - begin, tuple(spans)
        )

    def destroy(self, domain: str) -> LifecycleResult:
        found = self.find(domain)
        self.link.act(found.uuid, "destroy")
        return LifecycleResult(found.domid, found.name, "destroyed")

    def gc(self) -> builtins.list[LifecycleResult]:
        """libvirt rolls back what it did not finish."""
        return []

    def settle(self, domid: int, uuid: str, progress: Progress = SILENT) -> LifecycleResult | None:
        return None

    # --- asking -----------------------------------------------------------------------------------
    def list(self, domain: str | None = None) -> builtins.list[DomainInfo]:
        found = self.link.domains() if domain is None else [self.find(domain)]
        return [
            DomainInfo(
                domid=d.domid,
                name=d.name,
                uuid=d.uuid,
                type=_TYPES.get(d.os_type, d.os_type),
                state=(state := _STATES[d.state] if d.state < len(_STATES) else "running"),
                reason={"shutdown": "poweroff", "crashed": "crash"}.get(state, ""),
                memory=d.memory,
                maxmem=d.maxmem,
                vcpus=d.vcpus,
                cpu_time=d.cpu_time,
                managed=d.managed,
            )
            for d in found
        ]

    def info(self) -> HostInfo:
        versions = self.link.versions()
        cpu = parse_xml(self.link.capabilities()).find("host/cpu")
        model, memory, cpus, mhz, nodes, _sockets, cores, threads = versions["node"]
        return HostInfo(
            xen_version="",
            xen_caps=(),
            xen_commandline="",
            domctl_interface=0,
            sysctl_interface=0,
            vendor=(cpu.findtext("vendor") or "") if cpu is not None else "",
            cpu_model=(cpu.findtext("model") or model) if cpu is not None else model,
            hvm="KVM" if self.target.kind == "qemu" and self.facts.accel == "kvm" else "",
            nested_paging=False,
            asid=None,
            iommu=False,
            virt_caps=(),
            cpus=cpus,
            threads_per_core=threads,
            cores_per_socket=cores,
            nodes=nodes,
            cpu_khz=mhz * 1000,
            total_memory=memory << 20,
            free_memory=versions["free"],
            scrub_memory=0,
            scheduler="",
            domains=len(self.link.domains()),
            driver=f"{versions['type']} {versions['hypervisor']}, libvirt {versions['libvirt']}, "
            + self.target.uri,
        )

    def vcpu_list(self, domain: str | None = None) -> builtins.list[VcpuInfo]:
        total = int(self.link.versions()["node"][2])
        found = self.link.domains() if domain is None else [self.find(domain)]
        return [
            VcpuInfo(
                domain=d.name,
                domid=d.domid,
                vcpu=vcpu.number,
                cpu=vcpu.cpu,
                state=_VCPU_STATES[vcpu.state] if vcpu.state < len(_VCPU_STATES) else "running",
                cpu_time=vcpu.cpu_time,
                hard_affinity=cpu_ranges(frozenset(vcpu.affinity), total),
                soft_affinity="all",
            )
            for d in found
            for vcpu in self.link.vcpus(d.uuid)
        ]

    def console(
        self, domain: str, kind: str | None = None, *, number: int = 0, deadline: float = 10.0
    ) -> ConsoleTarget:
        found = self.find(domain)
        if self.target.remote:
            raise self.unsupported("console", "the console is a device of another host's")
        root = self.xml(found)
        serial, pv = readxml.serials(root), readxml.pv_consoles(root)
        kind = kind or ("serial" if serial and not number else "pv")
        ports = serial if kind == "serial" else [*pv[:1], *readxml.channels(root)]
        if kind == "pv" and not pv and number:
            number -= 1  # there is no first one to count
        if number >= len(ports):
            hint = "the domain file needs serial: pty" if kind == "serial" else None
            raise DomainError(f"{found.name} has no {kind} console {number or ''}".rstrip(), hint=hint)
        port = ports[number]
        if not port.tty and not port.socket:
            raise DomainError(
                f"the {kind} console of {found.name} goes to a {port.type or 'place unknown'}, not to a pty",
                hint="the domain file needs serial: pty",
            )
        return ConsoleTarget(found.domid, found.name, kind, port.tty, port.socket, number)

    # --- changing its state -----------------------------------------------------------------------
    def pause(self, domain: str) -> LifecycleResult:
        return self._act(domain, "suspend", "paused")

    def unpause(self, domain: str) -> LifecycleResult:
        return self._act(domain, "resume", "unpaused")

    def _act(self, domain: str, action: str, result: str) -> LifecycleResult:
        found = self.find(domain)
        paused = _STATES[found.state] == "paused" if found.state < len(_STATES) else False
        if paused != (action == "suspend"):  # libvirt refuses what is so already; xl does not
            self.link.act(found.uuid, action)
        return LifecycleResult(found.domid, found.name, result)

    def shutdown(
        self, domain: str, *, wait: bool = False, acpi_fallback: bool = False, deadline: float = 600.0
    ) -> LifecycleResult:
        return self._ask(domain, "shutdown", wait, acpi_fallback, deadline)

    def reboot(
        self, domain: str, *, wait: bool = False, acpi_fallback: bool = False, deadline: float = 600.0
    ) -> LifecycleResult:
        return self._ask(domain, "reboot", wait, acpi_fallback, deadline)

    def _ask(
        self, domain: str, verb: str, wait: bool, acpi_fallback: bool, deadline: float
    ) -> LifecycleResult:
        found = self.find(domain)
        mark = self.link.mark()
        if self.target.kind == "xen":
            try:
                self.link.act(found.uuid, f"{verb}-pv")
            except DomainError:
                if not acpi_fallback:
                    raise
                self.link.act(found.uuid, f"{verb}-acpi")
        else:
            self.link.act(found.uuid, f"{verb}-acpi" if self.target.kind == "qemu" else verb)
        if not wait:
            return LifecycleResult(found.domid, found.name, "requested")
        now: builtins.list[DomainFacts] = []

        def done() -> bool:
            now[:] = [d for d in self.link.domains() if d.uuid == found.uuid]
            again = any(
                event.uuid == found.uuid and event.kind in ("reboot", "started")
                for event in self.link.events(mark, 0.0)
            )
            return again or not now or now[0].domid != found.domid

        if not wait_until(self.link, done, deadline):
            raise DeadlineError(
                f"{found.name} has not obeyed within {deadline:.0f} s",
                hint="does the guest listen to its power button? xtool destroy ends it",
            )
        if now:
            return LifecycleResult(found.domid, found.name, "restarted", now[0].domid)
        return LifecycleResult(found.domid, found.name, "destroyed")


def open_client(uri: str) -> Client:
    target = parse_target(uri)
    link: Link
    if target.root:
        from xtool.drivers.libvirt.binding import binding
        from xtool.drivers.libvirt.held import HeldLink

        binding()  # better missed here than in the holder's log
        link = HeldLink(target.root, target.uri)
    else:
        from xtool.drivers.libvirt.direct import DirectLink

        link = DirectLink(target.uri)
    return cast(Client, LibvirtClient(link, target))
