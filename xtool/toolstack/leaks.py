"""Was anything left behind? Snapshots of a host, compared.

A snapshot is a set of probes; a probe is a flat table of text, so all of it can be stored, compared and
printed in one way::

    before = snapshot(host)
    ...                                   # create, destroy, crash
    leaks = wait_clean(host, before)      # looks again until nothing is left, or time is up

The probes are in ``leak_probes`` (Xen and xenstore) and ``leak_files`` (Linux). A probe that cannot run
says why in ``HostSnapshot.missing``; what is missing on either side is not compared, and is reported as
such by ``incomparable``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from xtool.errors import UsageError, XtoolError
from xtool.hypercall.port import Hypervisor
from xtool.xenstore.port import Store

FORMAT = 1
#: Between two looks of ``wait_clean``, seconds.
LOOK_PAUSE = 0.1
Table = dict[str, str]
Kind = Literal["new", "gone", "changed"]


class ProbedHost(Protocol):
    """What a snapshot looks at; ``xtool.toolstack.host.Host`` is one."""

    @property
    def hv(self) -> Hypervisor: ...

    @property
    def store(self) -> Store: ...


@dataclass(frozen=True)
class HostSnapshot:
    """``probes``: probe -> key -> value. ``missing``: probe -> why it was not taken."""

    probes: Mapping[str, Table]
    missing: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "probes": self.probes, "missing": self.missing}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "the snapshot") -> HostSnapshot:
        """Raises ``UsageError`` for anything but what ``to_json`` gives."""
        try:
            raw: Any = json.loads(text)
            if raw["format"] != FORMAT:
                raise UsageError(f"{where} has format {raw['format']!r}, this xtool reads {FORMAT}")
            probes = {
                str(p): {str(k): str(v) for k, v in table.items()} for p, table in raw["probes"].items()
            }
            return cls(probes, {str(p): str(why) for p, why in raw["missing"].items()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(
                f"{where} is not a snapshot of a host", hint="make one with: xtool doctor snapshot FILE"
            ) from None


@dataclass(frozen=True)
class Leak:
    """One difference. ``before`` is empty for what is new, ``after`` for what is gone."""

    probe: str
    key: str
    kind: Kind
    before: str
    after: str

    def __str__(self) -> str:
        if self.kind == "changed":
            return f"{self.probe}: {self.key}: was {self.before}, is {self.after}"
        return f"{self.probe}: {self.kind}: {self.key} {self.before or self.after}".rstrip()


class Suppression(NamedTuple):
    """Differences that are no leaks: probe and key match wholly, for the reason given."""

    probe: str
    key: str
    reason: str
    kinds: tuple[Kind, ...] = ("new", "gone", "changed")


#: Probes of things that end by themselves: only what is new counts.
ONLY_NEW = frozenset(("processes", "files", "kernel log", "xen log"))

SUPPRESSIONS = (
    Suppression("xenstore", r"/local/domain/0/memory(/.*)?", "dom0's own balloon driver writes here"),
    Suppression("xenstore", r"/local/domain/0/data(/.*)?", "scratch space that dom0's tools own"),
    Suppression(
        "xenstore",
        r"/local/domain/0/(error/?)?(backend(/[a-z0-9-]+)?)?",
        "empty backend folders stay by custom",
    ),
    Suppression(
        "xenstore", r"/vm|/libxl|/local/domain/0/device-model", "folders, made once by the first domain"
    ),
    Suppression("files", r"/run/xen/domid-history", "libxl remembers which numbers it used"),
    Suppression("xenstore", r"/tool/xenstored(/.*)?", "xenstored's notes about itself"),
    Suppression("files", r"/var/log/xen/console(/.*)?", "xenconsoled's logs outlive the domain by intent"),
    Suppression("files", r"/var/log/xen/xen-hotplug\.log", "the log of xl's hotplug scripts"),
    Suppression("files", r"/var/log/xen/xenstored-access\.log\.\d+", "xenstored rotates its log"),
    Suppression("files", r"/var/log/xen/xl-[^/]*\.log.*", "xl keeps the logs of domains that ended"),
    Suppression("files", r"/var/log/xen/qemu-dm-[^/]*", "libxl keeps the logs of device models that ended"),
    Suppression("files", r"/var/log/xtool/[^/]+\.log(\.\d+)?", "device models' logs outlive them by intent"),
    Suppression("files", r"/var/log/xtool/console(/[^/]+\.log(\.1)?)?", "so does what guests printed"),
    Suppression("files", r"/var/lock/(subsys|lvm|dmeventd)(/.*)?", "other programs' locks"),
    Suppression(
        "files", r"/tmp/(pytest-|xtool-pytest|systemd-private-|\.X11|\.ICE|\.font|\.XIM).*", "not ours"
    ),
    Suppression(
        "files",
        r"/run/xtool(/domains|/seeds|/domains/names\.lock|/hvm-boot\.bin)?",
        "made once, by the first create",
    ),
    Suppression(
        "files", r"/run/xtool/watcher\.(lock|sock)", "the watcher's; a killed one's socket is for the next"
    ),
    Suppression("files", r"/var/log/xtool", "made once, by the first create"),
    Suppression("processes", r"\d+@\d+ \[.*\]", "kernel threads come and go"),
    Suppression(
        "processes", r"\d+@\d+ (sshd|sshd-session|systemd-.*|\(sd-pam\)|cron|agetty|login)", "not ours"
    ),
)

#: How much a number may grow, and why: (probe, key) -> (at most, reason).
DRIFT = {
    ("memory", "used by Xen itself"): (256, "Xen keeps pages it has cut up for small structures"),
}

Probe = Callable[[ProbedHost], Table]


def all_probes() -> dict[str, Probe]:
    """Name -> probe, in the order of a report."""
    from xtool.toolstack import leak_files, leak_probes

    return {**leak_probes.PROBES, **leak_files.PROBES}


def snapshot(host: ProbedHost, probes: Mapping[str, Probe] | None = None) -> HostSnapshot:
    """Look at everything. A probe that fails is noted, and does not stop the others."""
    tables: dict[str, Table] = {}
    missing: dict[str, str] = {}
    for name, probe in (all_probes() if probes is None else probes).items():
        try:
            tables[name] = dict(sorted(probe(host).items()))
        except (XtoolError, OSError) as error:
            missing[name] = str(error)
    return HostSnapshot(tables, missing)


def diff(
    before: HostSnapshot, after: HostSnapshot, suppressions: tuple[Suppression, ...] = SUPPRESSIONS
) -> list[Leak]:
    """What is different and not suppressed, in the order of the probes."""
    found = []
    for probe, old in before.probes.items():
        new = after.probes.get(probe)
        if new is None:
            continue
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) == new.get(key) or _drift(probe, key, old.get(key), new.get(key)):
                continue
            kind: Kind = "changed" if key in old and key in new else "new" if key in new else "gone"
            if probe in ONLY_NEW and kind != "new":
                continue
            if not _suppressed(probe, key, kind, suppressions):
                found.append(Leak(probe, key, kind, old.get(key, ""), new.get(key, "")))
    return found


def _drift(probe: str, key: str, old: str | None, new: str | None) -> bool:
    """Whether a number grew by no more than it may, or shrank."""
    most = DRIFT.get((probe, key), (0, ""))[0]
    return bool(most and old and new) and int(new or 0) - int(old or 0) <= most


def _suppressed(probe: str, key: str, kind: Kind, suppressions: tuple[Suppression, ...]) -> bool:
    return any(
        rule.probe == probe and kind in rule.kinds and re.fullmatch(rule.key, key, re.DOTALL)
        for rule in suppressions
    )


def incomparable(before: HostSnapshot, after: HostSnapshot) -> dict[str, str]:
    """Probe -> why it was not compared."""
    return {**before.missing, **after.missing}


def wait_clean(
    host: ProbedHost,
    before: HostSnapshot,
    deadline: float = 30.0,
    suppressions: tuple[Suppression, ...] = SUPPRESSIONS,
) -> list[Leak]:
    """What is still left after ``deadline`` seconds; comes back at once when nothing is.

    Much ends shortly after the last reference to it: dying domains, scrubbed memory, closed sockets,
    reaped processes. Only the probes that differ are taken again.
    """
    end = time.monotonic() + deadline
    suspects = {name: probe for name, probe in all_probes().items() if name in before.probes}
    while True:
        now = snapshot(host, suspects)
        old = HostSnapshot({name: before.probes[name] for name in suspects})
        leaks = diff(old, now, suppressions)
        # What could be looked at before and cannot now (no xenstored any more, say) is not clean.
        leaks += [Leak(name, "the probe itself", "gone", "", why) for name, why in now.missing.items()]
        if not leaks or time.monotonic() >= end:
            return leaks
        suspects = {name: suspects[name] for name in dict.fromkeys(leak.probe for leak in leaks)}
        time.sleep(LOOK_PAUSE)
