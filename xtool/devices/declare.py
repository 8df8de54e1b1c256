"""The nodes of a domain in xenstore, as data: what to write, who may read it, what to remove. Pure.

The toolstack writes ``domain_nodes`` in one transaction and then introduces the domain to xenstored::

    store.atomically(lambda tx: write(tx, domain_nodes(spec)))

Facts about what others expect there (Xen's ``docs/misc/xenstore-paths.pandoc`` and its tools):

- A domain's own tree is readable for it and written by domain 0, except for the few nodes and folders the
  guest itself fills: those it owns. Nothing it may read holds a secret, a host path or a process id.
- The guest must not be able to change its ``console`` nodes: xenconsoled and ``xl console`` trust them
  (XSA-57).
- hvmloader reads ``hvmloader/*`` and ``platform/*`` once, early; xenconsoled reads ``console/*`` when the
  domain is introduced and puts the pty it made into ``console/tty``.
- xl lists a domain by ``name``, tells HVM from PVH by ``/libxl/<domid>/type``, counts its uptime from
  ``/vm/<uuid>/start_time``, and when it destroys one ends the process ``image/device-model-pid`` and
  removes ``/libxl/<domid>``, ``/vm/<uuid>``, the domain's tree and its device model's.
- A node made by domain 0 takes its parent's permissions, so they are set only where they differ: setting
  costs as much as writing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from xtool.proto.xsperms import PRIVATE, Perms, owned_by
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.xenstore.port import Writer

#: How much unread output xenconsoled keeps, in bytes; a guest cannot make it keep more.
CONSOLE_LIMIT = 1 << 20

#: Folders and nodes below the domain's own that the guest writes.
GUEST_OWNED = (
    "device/suspend/event-channel",
    "control/shutdown",
    "control/feature-poweroff",
    "control/feature-reboot",
    "control/feature-suspend",
    "control/sysrq",
    "data",
    "drivers",
    "feature",
    "attr",
    "error",
)
#: The same, for guests with emulated power management.
GUEST_OWNED_HVM = ("control/feature-s3", "control/feature-s4")


class Node(NamedTuple):
    """One node: ``perms`` are those it shall have, whether set or inherited."""

    path: str
    value: str
    perms: Perms


@dataclass(frozen=True)
class HvmNodes:
    """What hvmloader is told. ``firmware``: ``seabios``, ``ovmf`` or ``rombios``; ``mmio_hole`` in bytes."""

    firmware: str = "seabios"
    acpi: bool = True
    acpi_s3: bool = True
    acpi_s4: bool = True
    mmio_hole: int | None = None
    #: Windows' VM generation id, 128 bits; None for no such id.
    generation_id: int | None = None
    #: Names and values below ``bios-strings``.
    bios_strings: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class DomainNodes:
    """A domain as its nodes show it. Sizes are bytes; ``start_time`` is seconds since the epoch.

    ``memory`` is what it starts with and ``maxmem`` the most it may have, both with ``videoram``. ``hvm``
    is set for type ``hvm`` and no other.
    """

    domid: int
    uuid: str
    name: str
    type: str
    memory: int
    maxmem: int
    vcpus: int
    maxvcpus: int
    store_port: int
    store_gfn: int
    console_port: int
    console_gfn: int
    start_time: float
    videoram: int = 0
    #: Who serves console 0: ``xenconsoled`` or ``xtool``.
    console_type: str = "xenconsoled"
    hvm: HvmNodes | None = None


def domain_nodes(spec: DomainNodes) -> list[Node]:
    """Everything a new domain gets, parents before children."""
    readable = owned_by(0, read=[spec.domid])
    own = owned_by(spec.domid)
    root, vm, libxl = paths.domain(spec.domid), paths.vm(spec.uuid), paths.libxl(spec.domid)
    nodes = [Node(root, "", readable)]
    nodes += [Node(f"{root}/{path}", value, readable) for path, value in _read_only(spec)]
    nodes += [Node(f"{root}/{path}", "", own) for path in _guest_owned(spec)]
    nodes.append(Node(vm, "", readable))
    nodes += [Node(f"{vm}/{name}", value, readable) for name, value in _vm(spec)]
    nodes.append(Node(libxl, "", PRIVATE))
    nodes.append(Node(f"{libxl}/type", spec.type, PRIVATE))
    if spec.hvm:
        nodes.append(Node(f"{libxl}/dm-version", "qemu_xen", PRIVATE))
    return nodes


def _read_only(spec: DomainNodes) -> Iterator[tuple[str, str]]:
    yield "vm", paths.vm(spec.uuid)
    yield "name", spec.name
    yield "domid", str(spec.domid)
    for vcpu in range(spec.maxvcpus):
        yield f"cpu/{vcpu}/availability", "online" if vcpu < spec.vcpus else "offline"
    yield "memory/static-max", _kib(spec.maxmem)
    yield "memory/target", _kib(_balloon_target(spec))
    yield "memory/videoram", _kib(spec.videoram)
    yield "control/platform-feature-multiprocessor-suspend", "1"
    yield "control/platform-feature-xs_reset_watches", "1"
    yield "store/port", str(spec.store_port)
    yield "store/ring-ref", str(spec.store_gfn)
    yield from _console(spec)
    if spec.hvm:
        yield from _hvmloader(spec.hvm)


def _console(spec: DomainNodes) -> Iterator[tuple[str, str]]:
    yield "console/type", spec.console_type
    if spec.console_type == "xtool":
        yield "console/state", "4"  # in the guest's place, whose ring is ready from the start
    yield "console/output", "pty"
    yield "console/limit", str(CONSOLE_LIMIT)
    yield "console/tty", ""
    yield "console/port", str(spec.console_port)
    yield "console/ring-ref", str(spec.console_gfn)


def _hvmloader(hvm: HvmNodes) -> Iterator[tuple[str, str]]:
    yield "hvmloader/bios", hvm.firmware
    yield "hvmloader/allow-memory-relocate", "0"  # QEMU's view of the memory is fixed when it starts
    yield "platform/acpi", str(int(hvm.acpi))
    yield "platform/acpi_s3", str(int(hvm.acpi_s3))
    yield "platform/acpi_s4", str(int(hvm.acpi_s4))
    yield "platform/acpi_laptop_slate", "0"
    if hvm.mmio_hole is not None:
        yield "platform/mmio_hole_size", str(hvm.mmio_hole)
    if hvm.generation_id is not None:
        low, high = hvm.generation_id & (1 << 64) - 1, hvm.generation_id >> 64
        yield "platform/generation-id", f"{low}:{high}"
    for name, value in hvm.bios_strings:
        yield f"bios-strings/{name}", value
    yield "platform/device-model", "qemu_xen"


def _guest_owned(spec: DomainNodes) -> tuple[str, ...]:
    return GUEST_OWNED + (GUEST_OWNED_HVM if spec.hvm else ())


def _vm(spec: DomainNodes) -> Iterator[tuple[str, str]]:
    yield "uuid", spec.uuid
    yield "name", spec.name
    yield "start_time", f"{spec.start_time:.2f}"


def _balloon_target(spec: DomainNodes) -> int:
    """What the guest's balloon aims at: its memory without the video memory, which it does not see as RAM.

    An HVM guest with room to grow aims 1 MiB lower, as under libxl: its firmware and special pages are
    taken from the same allowance.
    """
    target = spec.memory - spec.videoram
    return target - (1 << 20) if spec.hvm and spec.maxmem > spec.memory else target


def _kib(size: int) -> str:
    return str(size >> 10)


def device_model_nodes(
    domid: int, pid: int, *, ttys: Mapping[int, str] | None = None, vnc: tuple[str, str] | None = None
) -> list[Node]:
    """What the rest of the host finds a device model by: its pid, the ptys of serial ports, where VNC is.

    These are for domain 0 alone. A VNC password is never written.
    """
    root = paths.domain(domid)
    nodes = [Node(f"{root}/image/device-model-pid", str(pid), PRIVATE)]
    nodes += [
        Node(f"{paths.serial(domid, number)}/tty", tty, PRIVATE)
        for number, tty in sorted((ttys or {}).items())
    ]
    if vnc:
        nodes.append(Node(f"{root}/console/vnc-listen", vnc[0], PRIVATE))
        nodes.append(Node(f"{root}/console/vnc-port", vnc[1], PRIVATE))
    return nodes


def stale_paths(domid: int) -> tuple[str, ...]:
    """What a former domain of this number may have left (it was killed hard, or a tool crashed).

    To be removed before the nodes are written. The device model's own folder
    (``paths.device_model(domid)``) is not among them: it must go before the device model *starts*, which is
    earlier; what is there when the nodes are written is the new one's.
    """
    return (paths.domain(domid), paths.libxl(domid))


def leaving_paths(domid: int, uuid: str, *, backends: Iterable[tuple[int, str]] = ()) -> tuple[str, ...]:
    """What is removed when a domain goes, its device model having ended.

    ``backends``: (backend domain, kind) of devices it had, each a whole folder ``backend/<kind>/<domid>``.
    """
    folders = (f"{paths.domain(domain)}/backend/{kind}/{domid}" for domain, kind in backends)
    return (*folders, *stale_paths(domid), paths.device_model(domid), paths.vm(uuid))


def write(writer: Writer, nodes: Iterable[Node]) -> None:
    """Write nodes in order, setting permissions only where those inherited would be others.

    A node whose parent is not among ``nodes`` is taken to inherit what we do not know: it is set.
    """
    known: dict[str, Perms] = {}
    for node in nodes:
        inherited = _inherited(node.path, known)
        writer.write(node.path, node.value, perms=None if inherited == node.perms else node.perms)
        known[node.path] = node.perms


def _inherited(path: str, known: Mapping[str, Perms]) -> Perms | None:
    """Permissions of the nearest ancestor written before: folders between are made with the same."""
    while (path := paths.parent(path)) != "/":
        if path in known:
            return known[path]
    return None
