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
    needs = disk.only_xtool
    if disk.format not in kind.formats:
        why = f", which {needs[0]} needs," if needs and disk.backendtype is None else ""
        raise UsageError(
            f"disk {disk.vdev}: backendtype: {kind.name}{why} reads {', '.join(kind.formats)}, "
            f"not {disk.format}",
            hint=f"remove {needs[0]}"
            if needs
            else f"use backendtype: {_readers(disk.format)}, or leave it out",
        )
    if facts.kind == "remote" and kind.name != "xtool":
        raise UsageError(
            f"disk {disk.vdev}: backendtype: {kind.name} takes files and block devices, not {disk.target}",
            hint="use backendtype: xtool, or leave it out",
        )
    if disk.script and (kind.name != "phy" or needs):
        taker = f"{needs[0]}" if needs else f"backendtype: {kind.name}"
        raise UsageError(
            f"disk {disk.vdev}: a script makes a block device, which {taker} does not take",
            hint=f"remove {needs[0]}" if needs else "leave backendtype out",
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


class AutoRule(NamedTuple):
    """One line of how ``auto`` chooses. ``need`` is what must be true of the disk: a ``script``, an ``empty``
    drive, a ``remote`` target (a URL), or ``own``: keys that only xtool's backend knows. ``format`` and
    ``target`` (``file``, ``block``) must be these; empty is any. ``why`` may name the disk's ``format``,
    ``script`` and ``key``."""

    need: str
    format: str
    target: str
    kind: str
    why: str


#: The first rule that fits a disk chooses; ``docs/devices.md`` shows them.
AUTO: tuple[AutoRule, ...] = (
    AutoRule("script", "", "", "phy", "the script {script} makes it a block device"),
    AutoRule("empty", "", "", "xtool", "a CD drive without a medium"),
    AutoRule("own", "", "", "xtool", "{key} is for xtool's own backend"),
    AutoRule("remote", "", "", "xtool", "a disk that another program or host has"),
    AutoRule("", "raw", "block", "phy", "a raw block device, which the kernel serves itself"),
    AutoRule("", "raw", "", "phy", "a raw file, which the kernel serves through a loop device"),
    AutoRule("", "vmdk", "", "xtool", "{format} images are read by xtool, through qemu-nbd"),
    AutoRule("", "vhdx", "", "xtool", "{format} images are read by xtool, through qemu-nbd"),
    AutoRule("", "", "", "qdisk", "{format} images are read by QEMU"),
)


def _automatic(disk: DiskConfig, facts: TargetFacts) -> Choice:
    own = disk.only_xtool
    true_of_it = {"script": bool(disk.script), "empty": disk.target is None, "own": bool(own), "": True}
    true_of_it["remote"] = disk.remote
    rule = next(
        rule
        for rule in AUTO
        if true_of_it[rule.need] and rule.format in ("", disk.format) and rule.target in ("", facts.kind)
    )
    why = rule.why.format(script=disk.script, format=disk.format, key=own[0] if own else "")
    return Choice(KINDS["vbd", rule.kind], why)


def auto_table() -> str:
    """The rules for people, in Markdown."""
    needs = {
        "script": "with a `script`",
        "empty": "a CD drive without a medium",
        "remote": "a URL",
        "own": "with `bytes-per-second`, `ops-per-second` or `persistent`",
    }
    rows = ["| a disk | is served by | because |", "|---|---|---|"]
    for rule in AUTO:
        target = {"block": "block devices", "file": "files", "": "files"}[rule.target]
        what = needs.get(rule.need) or (f"{rule.format} {target}" if rule.format else "every other format")
        why = rule.why.format(script="`script`", format="these", key="this")
        rows.append(f"| {what} | `{rule.kind}` | {why} |")
    return "\n".join(rows)


def choose_vif_backend(vif: VifConfig) -> Choice:
    """Who serves an interface, and why."""
    if vif.backendtype is not None:
        return Choice(KINDS["vif", vif.backendtype], "the domain file says so")
    if vif.network == "user":
        return Choice(KINDS["vif", "xtool"], "network: user is served by xtool, through passt")
    return Choice(KINDS["vif", "vif"], "the kernel's netback, on a bridge")
