"""Verbs that press buttons: trigger, sysrq, debug-keys, set-parameters, dump-core."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.client import connect
from xtool.cli.lifecycle import describe
from xtool.cli.options import Domain, Output
from xtool.cli.output import columns, emit, escape

if TYPE_CHECKING:
    from xtool.toolstack.api import CoreDump


def trigger(
    domain: Domain,
    what: Annotated[str, typer.Argument(metavar="nmi|reset|init|power|sleep|s3resume", help="Which one.")],
    vcpu: Annotated[int, typer.Argument(metavar="[VCPU]", help="For nmi: which vCPU.", min=0)] = 0,
    output: Output = "table",
) -> None:
    """Send a domain what hardware sends: an NMI, the press of a button, the end of its sleep.

    \b
    Examples:
      xtool trigger web power
      xtool trigger web nmi 1
    """
    with connect() as client:
        done = client.trigger(domain, what, vcpu)
    emit(done, output, lambda: describe(done))


def sysrq(
    domain: Domain,
    letter: Annotated[str, typer.Argument(metavar="LETTER", help="The key, such as h for help.")],
    output: Output = "table",
) -> None:
    """Press a magic SysRq key of a domain's Linux kernel. What it says is on its console.

    \b
    Examples:
      xtool sysrq web s
      xtool sysrq web t -o json
    """
    with connect() as client:
        done = client.sysrq(domain, letter)
    emit(done, output, lambda: describe(done))


def debug_keys(
    keys: Annotated[str, typer.Argument(metavar="KEYS", help="One or more, such as h for help.")],
    output: Output = "table",
) -> None:
    """Send debug keys to Xen. What it says to them is in its log: xtool dmesg.

    \b
    Examples:
      xtool debug-keys h
      xtool debug-keys q -o json
    """
    with connect() as client:
        sent = client.debug_keys(keys)
    emit({"keys": sent}, output, lambda: "")


def set_parameters(
    settings: Annotated[list[str], typer.Argument(metavar="NAME=VALUE...", help="Xen's parameters.")],
    output: Output = "table",
) -> None:
    """Set parameters of Xen while it runs, those that can be. A switch alone is on, no-SWITCH off.

    \b
    Examples:
      xtool set-parameters loglvl=all guest_loglvl=warning
      xtool set-parameters gnttab_max_frames=128
    """
    words = [word for setting in settings for word in setting.split()]
    with connect() as client:
        done = client.set_parameters(words)
    rows = [[change.name, change.before, change.value] for change in done]
    emit(done, output, lambda: columns(["Parameter", "Before", "Now"], rows))


def dump_core(
    domain: Domain,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The core file to write.")],
    live: Annotated[
        bool, typer.Option("-L", "--live", help="Do not pause it: pages may change meanwhile.")
    ] = False,
    crash: Annotated[
        bool, typer.Option("-C", "--crash", help="Then make it crash, which does its on_crash action.")
    ] = False,
    reset: Annotated[
        bool, typer.Option("-R", "--reset", help="Then end it as for a reboot, which does its on_reboot.")
    ] = False,
    output: Output = "table",
) -> None:
    """Write a domain's memory and registers to a file. The file has all secrets of the guest in it.

    \b
    Examples:
      xtool dump-core web /var/crash/web.core
      xtool dump-core web web.core -L -o json
    """
    from xtool.cli.progress import progress

    with progress() as steps, connect() as client:
        done = client.dump_core(domain, file.absolute(), live=live, crash=crash, reset=reset, progress=steps)
    emit(done, output, lambda: _dump(done))


def _dump(done: CoreDump) -> str:
    what = f"{done.pages >> 8} MiB, {done.vcpus} vCPUs"
    missing = f"; {done.missing} pages went away meanwhile" if done.missing else ""
    action = "" if done.action == "unchanged" else f"; then {done.action}"
    return f"{escape(done.name)} (domain {done.domid}): {what} in {escape(done.path)}{missing}{action}"
