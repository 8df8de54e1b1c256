"""What is known of running domains: since when they run, their configuration, channels and displays.

Facts: ``/vm/<uuid>/start_time`` is seconds since the epoch, written by whoever started the domain; domain
0 has none. QEMU's VNC address is in ``console/vnc-listen`` and ``vnc-port``, which the guest cannot write; xl
keeps a password in ``/vm/<uuid>/vncpasswd``, we keep ours in the journal alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtool.errors import DeviceError
from xtool.toolstack import journal
from xtool.toolstack.everydayrecords import ChannelInfo, DisplayInfo, DomainConfigInfo, UptimeInfo
from xtool.toolstack.names import Named, find, named_domains, uuid_text
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

#: Keys of a domain file whose values are not for every eye.
SECRETS = ("vncpasswd",)
_UPTIME = Path("/proc/uptime")


# --- since when -----------------------------------------------------------------------------------------
def uptimes(host: Host, domains: Sequence[str] = ()) -> list[UptimeInfo]:
    """Of the named domains, or of all."""
    chosen = [find(host, domain) for domain in domains] if domains else named_domains(host)
    now = time.time()
    return [
        UptimeInfo(found.state.domid, found.name, start, None if start is None else max(0.0, now - start))
        for found, start in zip(chosen, start_times(host, chosen), strict=True)
    ]


def start_times(host: Host, domains: Sequence[Named]) -> list[float | None]:
    """Seconds since the epoch, in one pipeline; None where nobody noted it."""
    nodes = [f"{paths.vm(uuid_text(found.state.handle))}/start_time" for found in domains]
    values = host.store.get_many(nodes)
    return [
        _host_start(host) if found.state.domid == 0 else _number(values[node])
        for found, node in zip(domains, nodes, strict=True)
    ]


def _host_start(host: Host) -> float | None:
    if not host.real:
        return None
    try:
        return time.time() - float(_UPTIME.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text and len(text) < 32 else None
    except ValueError:
        return None


# --- configuration --------------------------------------------------------------------------------------
def configs(host: Host, domain: str | None, *, secrets: bool) -> list[DomainConfigInfo]:
    """Of one domain, or of every one but domain 0."""
    chosen = [find(host, domain)] if domain is not None else named_domains(host)
    known = {entry.uuid: entry for entry in journal.entries()}
    found = []
    for one in chosen:
        if domain is None and one.state.domid == 0:
            continue
        found.append(shown_config(one, known.get(uuid_text(one.state.handle)), secrets=secrets))
    return found


def shown_config(one: Named, entry: journal.Entry | None, *, secrets: bool) -> DomainConfigInfo:
    config, hidden = _without_secrets(entry.config if entry else None, secrets)
    waiting = tuple(entry.waiting or ()) if entry else ()
    source = entry.source if entry else ""
    uuid = uuid_text(one.state.handle)
    return DomainConfigInfo(one.state.domid, one.name, uuid, config, hidden, waiting, source)


def _without_secrets(
    config: dict[str, Any] | None, show: bool
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    if config is None or show:
        return config, ()
    hidden = tuple(key for key in SECRETS if key in config)
    return {key: value for key, value in config.items() if key not in hidden}, hidden


# --- channels -------------------------------------------------------------------------------------------
def channels(host: Host, found: Named) -> list[ChannelInfo]:
    """The domain's consoles for programs: every console but the first, whoever serves it."""
    from xtool.backends.viewers import socket_path
    from xtool.toolstack.devices import state_words
    from xtool.toolstack.wiring import records

    domid = found.state.domid
    found_there = [r for r in records(host, domid, ("console",)) if r.device.devid]
    listed, states = [r.device for r in found_there], state_words(host, found_there)
    names = ("name", "connection", "path", "tty")
    nodes = host.store.get_many([f"{d.backend}/{n}" for d in listed for n in (*names, "output")])
    made = []
    for device in listed:
        name, connection, path, tty = (nodes[f"{device.backend}/{n}"] or "" for n in names)
        if not path and device.folder == "xtool-console":
            path = str(socket_path(domid, device.devid))
        made.append(
            ChannelInfo(
                domid,
                device.devid,
                name,
                connection or nodes[f"{device.backend}/output"] or "",
                "xtool" if device.folder == "xtool-console" else device.folder,
                device.backend_domid,
                states[device],
                path or tty,
            )
        )
    return made


# --- displays -------------------------------------------------------------------------------------------
def display(host: Host, found: Named, *, password: bool) -> DisplayInfo:
    """Where its VNC display listens. Raises ``DeviceError`` when it has none."""
    domid, uuid = found.state.domid, uuid_text(found.state.handle)
    root = paths.console(domid)
    kept = f"{paths.vm(uuid)}/vncpasswd"
    nodes = host.store.get_many([f"{root}/vnc-listen", f"{root}/vnc-port", kept])
    port = nodes[f"{root}/vnc-port"]
    if not (port and port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536):
        raise DeviceError(
            f"{found.name or domid} has no VNC display",
            hint="vnc: true in the domain file of an hvm domain gives it one",
        )
    entry = journal.read(uuid)
    secret = str((entry.config or {}).get("vncpasswd") or "") if entry else ""
    secret = secret or nodes[kept] or ""
    return DisplayInfo(
        domid,
        found.name,
        nodes[f"{root}/vnc-listen"] or "127.0.0.1",
        int(port),
        bool(secret),
        secret if password else "",
    )
