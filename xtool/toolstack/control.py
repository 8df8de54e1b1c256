"""Buttons and signals of a domain, debug keys and parameters of Xen.

Facts: Xen passes on NMIs to any guest and ACPI buttons to PVH and HVM guests; to reset and init, which xl
offers as well, Xen on x86 answers ENOSYS. An HVM guest asleep (S3) is woken by its device model. A guest's
kernel reads ``control/sysrq`` and empties it. Xen's parameters are entries of its file system (since 4.14);
most are texts that Xen parses by itself.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xtool.abi import domctl as d
from xtool.abi import hypfs as f
from xtool.errors import DomainError, HostError, HypercallError, UsageError
from xtool.hypercall.tuningport import XenParameter
from xtool.toolstack.api import LifecycleResult, ParameterChange
from xtool.toolstack.names import Named
from xtool.toolstack.query import kind_of
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

TRIGGERS = {
    "nmi": d.XEN_DOMCTL_SENDTRIGGER_NMI,
    "reset": d.XEN_DOMCTL_SENDTRIGGER_RESET,
    "init": d.XEN_DOMCTL_SENDTRIGGER_INIT,
    "power": d.XEN_DOMCTL_SENDTRIGGER_POWER,
    "sleep": d.XEN_DOMCTL_SENDTRIGGER_SLEEP,
}
S3_RESUME = "s3resume"
_YES = {
    **dict.fromkeys(("1", "true", "yes", "on", "enable"), 1),
    **dict.fromkeys(("0", "false", "no", "off", "disable"), 0),
}


def trigger(host: Host, found: Named, what: str, vcpu: int = 0) -> LifecycleResult:
    """Raises ``UsageError`` for what does not exist, ``DomainError`` for what this guest cannot get."""
    domid = found.state.domid
    if what != S3_RESUME and what not in TRIGGERS:
        raise UsageError(
            f"there is no trigger {what!r}", hint=f"it is one of {', '.join((*TRIGGERS, S3_RESUME))}"
        )
    if domid == 0:
        raise UsageError("domain 0 is the host itself: nothing of this is meant for it")
    if what == S3_RESUME:
        _wake(host, found)
        return LifecycleResult(domid, found.name, "woken")
    count = found.state.max_vcpu_id + 1
    if not 0 <= vcpu < count:
        raise UsageError(f"{found.name} has no vCPU {vcpu}", hint=f"its vCPUs are 0 to {count - 1}")
    if what in ("power", "sleep") and not found.state.hvm:
        raise DomainError(
            f"{found.name} is a pv guest, which has no ACPI buttons",
            hint="xtool shutdown asks it to power off" if what == "power" else "xtool pause stops its vCPUs",
        )
    try:
        host.hv.send_trigger(domid, TRIGGERS[what], vcpu)
    except HypercallError as error:
        if error.errno != errno.ENOSYS:
            raise
        raise DomainError(
            f"Xen {host.hv.versions.xen} cannot {what} a vCPU from outside",
            hint="xtool reboot asks the guest; xtool destroy and create start it again",
        ) from None
    return LifecycleResult(
        domid, found.name, f"sent {what} to vCPU {vcpu}" if what == "nmi" else f"sent {what}"
    )


def _wake(host: Host, found: Named) -> None:
    from xtool.devicemodel.process import qmp_path
    from xtool.devicemodel.qmp import query

    domid = found.state.domid
    if kind_of(found.state) != "hvm":
        raise DomainError(f"{found.name} cannot sleep (S3): only hvm guests can", hint="xtool unpause?")
    if host.real:
        ours, theirs = qmp_path(domid), Path(f"/run/xen/qmp-libxl-{domid}")
        query(ours if ours.exists() else theirs, "system_wakeup")


def sysrq(host: Host, found: Named, letter: str) -> LifecycleResult:
    """Press a magic SysRq key of the guest's kernel. Raises ``UsageError`` for more than a letter."""
    if len(letter) != 1 or not (letter.isascii() and letter.isalnum()):
        raise UsageError(f"{letter!r} is not a SysRq key", hint="one letter or digit, such as h for help")
    host.store.write(f"{paths.domain(found.state.domid)}/control/sysrq", letter)
    return LifecycleResult(found.state.domid, found.name, f"sent sysrq {letter}")


def debug_keys(host: Host, keys: str) -> str:
    """Let Xen act on its debug keys, in their order; what it says is in its log. Raises ``UsageError``."""
    if not keys or len(keys) > 1024 or not keys.isascii():
        raise UsageError(
            "debug keys are 1 to 1024 ASCII characters", hint="h prints what there is to xtool dmesg"
        )
    host.hv.debug_keys(keys)
    return keys


# --- parameters -------------------------------------------------------------------------------------
def set_parameters(host: Host, settings: Sequence[str]) -> list[ParameterChange]:
    """``name=value`` each. All are looked up before the first is set.

    Raises ``UsageError`` for a name or value that Xen does not take, ``HostError`` where it has none.
    """
    wanted = []
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.removeprefix("/params/").strip()
        if not name or name != name.strip("/") or ".." in name:
            raise UsageError(f"{setting!r} sets nothing", hint="write name=value, such as loglvl=all")
        # A switch alone is on, and with "no-" in front of it off, as on Xen's command line.
        if not equals and name.startswith("no-"):
            name, value, equals = name.removeprefix("no-"), "0", "="
        known = _parameter(host, name)
        if not equals and known.type != f.XEN_HYPFS_TYPE_BOOL:
            raise UsageError(f"{name} wants a value", hint=f"{name}={_text(known)} is what it has")
        wanted.append((name, known, value if equals else "1"))
    return [_set(host, *setting) for setting in wanted]


def _parameter(host: Host, name: str) -> XenParameter:
    try:
        return host.hv.parameter(f"/params/{name}")
    except HypercallError as error:
        if error.errno == errno.ENOSYS:
            raise HostError(
                "this host's Xen has no run-time parameters", hint="it was built without hypfs"
            ) from None
        if error.errno not in (errno.ENOENT, errno.EINVAL):
            raise
        raise UsageError(
            f"Xen has no run-time parameter {name!r}",
            hint="others are set on Xen's command line, for the next boot (Debian: GRUB_CMDLINE_XEN)",
        ) from None


def _set(host: Host, name: str, known: XenParameter, value: str) -> ParameterChange:
    content = _content(name, known, value)
    try:
        host.hv.set_parameter(f"/params/{name}", content)
    except HypercallError as error:
        if error.errno == errno.EACCES:
            raise UsageError(f"Xen's {name} cannot be changed while it runs") from None
        raise UsageError(
            f"Xen does not take {value!r} for {name}: {error.message.rpartition(': ')[2]}",
            hint=f"it is {_text(known)!r} now; xen-command-line(7) says what is possible",
        ) from None
    return ParameterChange(name, _text(known), _text(_parameter(host, name)))


def _content(name: str, known: XenParameter, value: str) -> bytes:
    if known.type in (f.XEN_HYPFS_TYPE_STRING, f.XEN_HYPFS_TYPE_BLOB):
        return value.encode() + b"\0"
    if known.type == f.XEN_HYPFS_TYPE_BOOL:
        if value not in _YES:
            raise UsageError(f"{name} is a switch, not {value!r}", hint="write 1 or 0")
        return bytes([_YES[value]])
    try:
        signed = known.type == f.XEN_HYPFS_TYPE_INT
        return int(value, 0).to_bytes(len(known.content), "little", signed=signed)
    except (ValueError, OverflowError):
        raise UsageError(f"{value!r} is no number for {name}", hint=f"it is {_text(known)} now") from None


def _text(known: XenParameter) -> str:
    if known.type in (f.XEN_HYPFS_TYPE_STRING, f.XEN_HYPFS_TYPE_BLOB):
        return known.content.split(b"\0")[0].decode("utf-8", "backslashreplace")
    number = int.from_bytes(known.content, "little", signed=known.type == f.XEN_HYPFS_TYPE_INT)
    return str(number)
