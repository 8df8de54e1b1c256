"""Who can serve a device: one object per kind of backend, and how one is chosen. Pure.

A new kind is one more entry in ``KINDS``; what the toolstack does for it follows from ``server``:

``kernel``   a Linux driver finds the device by itself; disks need ``physical-device``, interfaces a bridge
``qemu``     a QEMU process of the domain (its device model, or one started for this)
``process``  a process of ours, started by ``toolstack.backends.start_backends``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from xtool.errors import HostError, UsageError

if TYPE_CHECKING:
    from xtool.config.devices import DiskConfig, VifConfig


@dataclass(frozen=True)
class BackendKind:
    """``name`` is what ``backendtype`` calls it, ``device`` what it serves, ``folder`` its place in
    xenstore (``backend/<folder>/<domid>/<devid>``), ``type`` the disk type xl is told."""

    name: str
    device: Literal["vbd", "vif", "console"]
    folder: str
    server: Literal["kernel", "qemu", "process"]
    type: str = ""
    #: Image formats it reads; empty for interfaces.
    formats: tuple[str, ...] = ()
    #: Whether a CD drive may be without a medium, and change it while the guest runs.
    changes_media: bool = False


_KINDS = (
    BackendKind("phy", "vbd", "vbd", "kernel", type="phy", formats=("raw",)),
    BackendKind(
        "qdisk", "vbd", "qdisk", "qemu", type="qdisk", formats=("raw", "qcow", "qcow2", "vhd", "qed")
    ),
    BackendKind(
        "xtool",
        "vbd",
        "xtool-vbd",
        "process",
        type="phy",
        formats=("raw", "qcow2", "vmdk", "vhd", "vhdx"),
        changes_media=True,
    ),
    BackendKind("vif", "vif", "vif", "kernel"),
    BackendKind("xtool", "vif", "xtool-vif", "process"),
    BackendKind("xtool", "console", "xtool-console", "process"),
)
KINDS: Mapping[tuple[str, str], BackendKind] = {(kind.device, kind.name): kind for kind in _KINDS}
FOLDERS: Mapping[str, BackendKind] = {kind.folder: kind for kind in _KINDS}
#: Backends that are processes: they let go of a device without the guest's help when it is not connected.
PATIENT = frozenset(kind.folder for kind in _KINDS if kind.server != "kernel")


class TargetFacts(NamedTuple):
    """What a disk's target is on this host: ``file``, ``block``, ``other``, ``missing``, ``remote`` (a URL),
    or ``none`` (an empty drive); ``size`` in bytes, 0 if it is not known; ``detail`` says why it cannot be
    looked at."""

    kind: str
    size: int = 0
    detail: str = ""


class Choice(NamedTuple):
    kind: BackendKind
    reason: str


def choose_backend(disk: DiskConfig, facts: TargetFacts) -> Choice:
    """Who serves a disk, and why. Raises ``HostError`` for a target that cannot be served here,
    ``UsageError`` for a ``backendtype`` that cannot serve it."""
    if facts.kind in ("missing", "other") and not disk.script:
        why = {"missing": "does not exist", "other": "is neither a file nor a block device"}[facts.kind]
        raise HostError(
            f"disk {disk.vdev}: {disk.target} {facts.detail or why}",
            hint="check target in the domain file" if facts.kind == "missing" else None,
        )
    choice = _asked_for(disk) or _automatic(disk, facts)
    kind = choice.kind
    if disk.format not in kind.formats:
        raise UsageError(
            f"disk {disk.vdev}: backendtype: {kind.name} reads {', '.join(kind.formats)}, not {disk.format}",
            hint=f"use backendtype: {_readers(disk.format)}, or leave it out",
        )
    if facts.kind == "remote" and kind.name != "xtool":
        raise UsageError(
            f"disk {disk.vdev}: backendtype: {kind.name} takes files and block devices, not {disk.target}",
            hint="use backendtype: xtool, or leave it out",
        )
    if disk.script and kind.name != "phy":
        raise UsageError(
            f"disk {disk.vdev}: a script makes a block device, which backendtype: {kind.name} does not take",
            hint="leave backendtype out",
        )
    if disk.target is None and not kind.changes_media:
        raise UsageError(
            f"disk {disk.vdev}: backendtype: {kind.name} serves no CD drive without a medium",
            hint="give it a target, or use backendtype: xtool",
        )
    return choice


def _asked_for(disk: DiskConfig) -> Choice | None:
    if disk.backendtype is None:
        return None
    return Choice(KINDS["vbd", disk.backendtype], "the domain file says so")


def _readers(form: str) -> str:
    return " or ".join(kind.name for kind in _KINDS if form in kind.formats)


def _automatic(disk: DiskConfig, facts: TargetFacts) -> Choice:
    phy, qdisk, ours = (KINDS["vbd", name] for name in ("phy", "qdisk", "xtool"))
    if disk.script:
        return Choice(phy, f"the script {disk.script} makes it a block device")
    if disk.target is None:
        return Choice(ours, "a CD drive without a medium")
    if disk.remote:
        return Choice(ours, "a disk that another program or host has")
    if disk.format not in qdisk.formats:
        return Choice(ours, f"{disk.format} images are read by xtool, through qemu-nbd")
    if disk.format != "raw":
        return Choice(qdisk, f"{disk.format} images are read by QEMU")
    if facts.kind == "block":
        return Choice(phy, "a raw block device, which the kernel serves itself")
    return Choice(phy, "a raw file, which the kernel serves through a loop device")


def choose_vif_backend(vif: VifConfig) -> Choice:
    """Who serves an interface, and why."""
    if vif.backendtype is not None:
        return Choice(KINDS["vif", vif.backendtype], "the domain file says so")
    if vif.network == "user":
        return Choice(KINDS["vif", "xtool"], "network: user is served by xtool, through passt")
    return Choice(KINDS["vif", "vif"], "the kernel's netback, on a bridge")
