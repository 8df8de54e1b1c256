"""Everyday verbs: rename, vm-list, uptime, set, config-show, channel-list, vncviewer, pci-list,
pci-assignable-list."""

from __future__ import annotations

import os
import shutil
import subprocess
from time import localtime, strftime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xtool.cli.client import connect
from xtool.cli.options import Domain, MaybeDomain, MaybeDomains, Output
from xtool.cli.output import columns, emit, escape, note, write
from xtool.errors import DomainError, HostError

if TYPE_CHECKING:
    from xtool.toolstack.everydayrecords import (
        DisplayInfo,
        DomainConfigInfo,
        SettingResult,
        UptimeInfo,
    )

Name = Annotated[str, typer.Argument(metavar="NEW-NAME", help="What to call it.", show_default=False)]
Settings = Annotated[
    list[str],
    typer.Argument(metavar="KEY=VALUE...", help="As for create --set: memory=512MiB.", show_default=False),
]


def rename(domain: Domain, name: Name, output: Output = "table") -> None:
    """Give a running domain another name. A restart keeps it.

    \b
    Examples:
      xtool rename web web-old
      xtool rename 3 db -o json
    """
    with connect() as client:
        result = client.rename(domain, name)
    emit(result, output, lambda: f"{escape(result.name)} (domain {result.domid}): {escape(result.action)}")


def vm_list(output: Output = "table") -> None:
    """List the guests: uuid, id and name; without domain 0.

    \b
    Examples:
      xtool vm-list
      xtool vm-list -o json
    """
    with connect() as client:
        found = [{"uuid": d.uuid, "domid": d.domid, "name": d.name} for d in client.list() if d.domid]
    rows = [[d["uuid"], d["domid"], d["name"]] for d in found]
    emit(found, output, lambda: columns(["UUID", "ID", "Name"], rows, ["ID"]))


def uptime(
    domains: MaybeDomains = None,
    short: Annotated[bool, typer.Option("-s", "--short", help="One line each, without a heading.")] = False,
    output: Output = "table",
) -> None:
    """Show for how long domains have run: those named, or all.

    \b
    Examples:
      xtool uptime
      xtool uptime -s web db
    """
    with connect() as client:
        found = client.uptime(domains or [])
    emit(found, output, lambda: _uptimes(found, short))


def _uptimes(found: list[UptimeInfo], short: bool) -> str:
    if short:
        now = strftime("%H:%M:%S", localtime())
        return "\n".join(f"{now} up {span(d.uptime)}, {escape(d.name)} ({d.domid})" for d in found)
    return columns(["Name", "ID", "Uptime"], [[d.name, d.domid, span(d.uptime)] for d in found], ["ID"])


def span(seconds: float | None) -> str:
    """``1 day, 2:03:04``; ``-`` where it is not known."""
    if seconds is None:
        return "-"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    text = f"{hour}:{minute:02}:{second:02}"
    return f"{days} day{'s' if days > 1 else ''}, {text}" if days else text


def set_(domain: Domain, settings: Settings, output: Output = "table") -> None:
    """Change the configuration of a running domain: now where that can be, else when it starts next.

    A restart (xtool reboot, or the guest's own) creates the domain from the changed configuration. Values are
    checked as those of a domain file are; if one is wrong, nothing is changed.

    \b
    Examples:
      xtool set web memory=512MiB on_crash=restart
      xtool set web cmdline='console=hvc0 single' 'vif[0].rate=10Mb/s'
    """
    with connect() as client:
        result = client.set_config(domain, settings, base_dir=os.getcwd())
    emit(result, output, lambda: _changes(result))


def _changes(result: SettingResult) -> str:
    if not result.changes:
        return f"{escape(result.name)}: nothing changed, it is so already"
    rows = [[c.key, _shown(c.before), _shown(c.after), c.when, c.why] for c in result.changes]
    return columns(["Key", "Before", "After", "When", "Why not now"], rows)


def _shown(value: Any) -> str:
    import json

    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def config_show(
    domain: MaybeDomain = None,
    secrets: Annotated[bool, typer.Option(help="Passwords too.")] = False,
    output: Output = "table",
) -> None:
    """Show what a domain was created with and what was changed since, as a domain file; or every domain's.

    \b
    Examples:
      xtool config-show web > web.yaml
      xtool config-show -o json
    """
    with connect() as client:
        found = client.config(domain, secrets=secrets)
    if domain is not None and found[0].config is None:
        raise DomainError(
            f"{found[0].name or domain} was not created by xtool, which does not know its configuration",
            hint="xl list -l shows what xl knows of it",
        )
    for one in found:
        if one.hidden:
            note(f"{escape(one.name)}: {', '.join(one.hidden)} is left out; --secrets shows it")
    if output == "table":
        write("\n---\n".join(_as_file(one) for one in found))
    else:
        emit(found if domain is None else found[0], output, str)


def _as_file(one: DomainConfigInfo) -> str:
    import yaml

    if one.config is None:
        return f"# {escape(one.name)} (domain {one.domid}) was not created by xtool"
    return str(yaml.safe_dump(one.config, sort_keys=False, allow_unicode=False, width=100)).rstrip("\n")


def channel_list(domain: Domain, output: Output = "table") -> None:
    """List a domain's channels: consoles for programs, and where the host's end of each is.

    \b
    Examples:
      xtool channel-list web
      xtool channel-list web -o json
    """
    with connect() as client:
        found = client.channel_list(domain)
    rows = [[c.devid, c.name, c.connection, c.backend, c.state or "-", c.path or "-"] for c in found]
    emit(found, output, lambda: columns(["Devid", "Name", "Connection", "Backend", "State", "Path"], rows))


def vncviewer(
    domain: Domain,
    autopass: Annotated[
        bool, typer.Option("-a", "--autopass", help="Give the viewer the password that is known.")
    ] = False,
    show: Annotated[bool, typer.Option("-n", "--no-viewer", help="Only say where the display is.")] = False,
    output: Output = "table",
) -> int:
    """Show a domain's VNC display: in a viewer where there is one, else its host and port.

    \b
    Examples:
      xtool vncviewer windows
      xtool vncviewer windows --no-viewer -o json
    """
    with connect() as client:
        found = client.display(domain, password=autopass)
    argv = None if show or output != "table" else viewer(found)
    if argv is None:
        emit(found, output, lambda: _place(found))
        return 0
    given = f"{found.password}\n".encode() if found.password else None
    try:
        return subprocess.run(argv, input=given, check=False).returncode
    except OSError as error:
        raise HostError(f"cannot start {argv[0]}: {error.strerror}") from None


def _place(found: DisplayInfo) -> str:
    where = f"{found.host}:{found.port}"
    if found.password:
        return f"{where} password {escape(found.password)}"
    return f"{where} (has a password)" if found.protected else where


def viewer(found: DisplayInfo) -> list[str] | None:
    """The command line of a VNC viewer for this display; None without a viewer, or a screen to show it on."""
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return None
    # A display that listens on every address is reached on this machine's own.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(found.host, found.host)
    bracketed = f"[{host}]" if ":" in host else host
    if path := shutil.which("vncviewer"):
        return [path, *(["-autopass"] if found.password else []), f"{bracketed}::{found.port}"]
    if path := shutil.which("gvncviewer"):
        return [path, f"{bracketed}:{found.port - 5900}"]
    if path := shutil.which("remote-viewer"):
        return [path, f"vnc://{bracketed}:{found.port}"]
    return None


def pci_list(domain: Domain, output: Output = "table") -> None:
    """List the PCI devices a domain was given.

    \b
    Examples:
      xtool pci-list web
      xtool pci-list web -o json
    """
    with connect() as client:
        found = client.pci_list(domain)
    rows = [[d.vdevfn or "-", d.address, d.state, d.description or "-"] for d in found]
    emit(found, output, lambda: columns(["Vdevfn", "Device", "State", "What"], rows))


def pci_assignable_list(output: Output = "table") -> None:
    """List the PCI devices that pciback holds, and which domain has each.

    \b
    Examples:
      xtool pci-assignable-list
      xtool pci-assignable-list -o json
    """
    with connect() as client:
        found = client.pci_assignable_list()
    rows = [
        [
            d.address,
            f"{d.vendor}:{d.device}",
            d.device_class,
            d.iommu_group or "-",
            d.original_driver or "-",
            "-" if d.assigned is None else d.assigned,
        ]
        for d in found
    ]
    header = ["Device", "Vendor:device", "Class", "IOMMU group", "Driver before", "Domain"]
    emit(found, output, lambda: columns(header, rows))
