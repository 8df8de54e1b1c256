"""Verbs for a domain's vCPUs and memory: vcpu-pin, vcpu-set, mem-set, mem-max."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.client import connect
from xtool.cli.options import Domain, Output
from xtool.cli.output import MIB, emit, escape, note
from xtool.cli.query import vcpu_table
from xtool.errors import UsageError

if TYPE_CHECKING:
    from xtool.toolstack.api import MemoryInfo, VcpuCount

Size = Annotated[str, typer.Argument(metavar="SIZE", help="MiB, or with a unit: 512MiB, 2GiB.")]
Wait = Annotated[
    bool, typer.Option("-w", "--wait", help="Return when the guest has done it, or fail when it has not.")
]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait, with -w.", min=0)]


def vcpu_pin(
    domain: Domain,
    vcpu: Annotated[str, typer.Argument(metavar="VCPU|all", help="Which vCPU.")],
    hard: Annotated[str, typer.Argument(metavar="HARD|-", help="CPUs it may run on; - leaves that.")],
    soft: Annotated[
        str, typer.Argument(metavar="[SOFT|-]", help="CPUs it should run on; - leaves that.")
    ] = "-",
    force: Annotated[
        bool, typer.Option("-f", "--force", help="Undo an override that the guest's kernel made.")
    ] = False,
    output: Output = "table",
) -> None:
    """Say which CPUs a vCPU may use, and which it should. CPUs are 0-3,^1 or node:0 or all.

    \b
    Examples:
      xtool vcpu-pin web 0 2-3
      xtool vcpu-pin web all - node:0
    """
    if vcpu != "all" and not (vcpu.isascii() and vcpu.isdigit()):
        raise UsageError(f"{vcpu!r} is no vCPU", hint="its number, or all")
    number = None if vcpu == "all" else int(vcpu)
    with connect() as client:
        found = client.vcpu_pin(domain, number, hard, soft, force=force)
    emit(found, output, lambda: vcpu_table(found))


def vcpu_set(
    domain: Domain,
    count: Annotated[int, typer.Argument(metavar="VCPUS", help="How many are to be online.")],
    ignore_host: Annotated[
        bool, typer.Option("-i", "--ignore-host", help="Also more than the host has CPUs.")
    ] = False,
    wait: Wait = False,
    timeout: Timeout = 60.0,
    output: Output = "table",
) -> None:
    """Ask a domain to have so many vCPUs online. Its own kernel takes them up or down.

    \b
    Examples:
      xtool vcpu-set web 4
      xtool vcpu-set web 1 -w --timeout 10
    """
    with connect() as client:
        done = client.vcpu_set(domain, count, ignore_host=ignore_host, wait=timeout if wait else None)
    emit(done, output, lambda: _count(done))


def _count(done: VcpuCount) -> str:
    name = f"{escape(done.name)} (domain {done.domid})"
    return f"{name}: {done.online} of {done.most} vCPUs online, {done.wanted} asked for"


def mem_set(
    domain: Domain,
    size: Size,
    wait: Wait = False,
    timeout: Timeout = 60.0,
    output: Output = "table",
) -> None:
    """Ask a domain to have so much memory. Its balloon driver gives it up or takes it.

    \b
    Examples:
      xtool mem-set web 512
      xtool mem-set web 2GiB -w
    """
    wanted = size_argument(size)
    with connect() as client:
        done = client.mem_set(domain, wanted, wait=timeout if wait else None)
    emit(done, output, lambda: _memory(done))


def mem_max(domain: Domain, size: Size, output: Output = "table") -> None:
    """Set the most memory a domain may be asked to have. Its kernel may have been told another at boot.

    \b
    Examples:
      xtool mem-max web 2048
      xtool mem-max web 4GiB -o json
    """
    wanted = size_argument(size)
    with connect() as client:
        done = client.mem_max(domain, wanted)
    emit(done, output, lambda: _memory(done))
    if output == "table" and done.limit < done.maximum:
        note("Xen keeps it at less until it is asked for more: xtool mem-set")


def _memory(done: MemoryInfo) -> str:
    name = f"{escape(done.name)} (domain {done.domid})"
    sizes = f"has {done.current // MIB} MiB, should have {done.target // MIB}, may have {done.maximum // MIB}"
    return f"{name}: {sizes}"


def size_argument(text: str) -> int:
    """MiB as a plain number, or with a unit -> bytes. Raises ``UsageError``."""
    from pydantic_core import PydanticCustomError

    from xtool.config.units import to_size

    try:
        return to_size(int(text) if text.isascii() and text.isdigit() else text)
    except PydanticCustomError as error:
        raise UsageError(error.message(), hint="write MiB as a plain number, or 512MiB, 2GiB") from None
