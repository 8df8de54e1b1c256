"""Verbs that look: list, info, dmesg, domid, domname, vcpu-list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.client import connect
from xtool.cli.options import Domain, MaybeDomain, Output
from xtool.cli.output import MIB, check_format, columns, emit, escape, escape_lines, pairs, plain, write
from xtool.errors import DomainNotFoundError

if TYPE_CHECKING:
    from xtool.toolstack.api import DomainInfo, HostInfo, VcpuInfo

ListOutput = Annotated[
    str,
    typer.Option(
        "-o",
        "--output",
        metavar="table|json|yaml|names",
        help="What to print.",
        callback=lambda form: form if form == "names" else check_format(form),
    ),
]
_NUMBERS = ("ID", "Mem", "MaxMem", "VCPUs", "Time(s)", "VCPU", "CPU")


def list_domains(
    domain: MaybeDomain = None,
    output: ListOutput = "table",
    long: Annotated[
        bool, typer.Option("-l", "--long", help="More columns; with -o json or yaml, configurations too.")
    ] = False,
) -> None:
    """List the domains, or the one that is named. Memory is in MiB.

    \b
    Examples:
      xtool list
      xtool list --long -o json
    """
    with connect() as client:
        found = client.list(domain)
        configs = client.config(domain) if long and output in ("json", "yaml") else None
    if output == "names":
        write("\n".join(escape(d.name or str(d.domid)) for d in found))
        return
    if configs is not None:
        known = {one.uuid: one.config for one in configs}
        emit([{**plain(d), "config": known.get(d.uuid)} for d in found], output, str)
        return
    emit(found, output, lambda: _domains(found, long))


def _domains(found: list[DomainInfo], long: bool) -> str:
    header = ["Name", "ID", "Type", "Mem", "VCPUs", "State", "Time(s)"]
    rows: list[list[object]] = []
    for d in found:
        state = f"{d.state} ({d.reason})" if d.reason else d.state
        row: list[object] = [d.name, d.domid, d.type, d.memory // MIB, d.vcpus, state, f"{d.cpu_time:.1f}"]
        rows.append([*row, d.maxmem // MIB, d.uuid, "yes" if d.managed else "no"] if long else row)
    return columns([*header, "MaxMem", "UUID", "Managed"] if long else header, rows, _NUMBERS)


def info(output: Output = "table") -> None:
    """Show the host: the hypervisor, its CPUs and what they can do, memory. Memory is in MiB.

    \b
    Examples:
      xtool info
      xtool -H lab info -o json
    """
    with connect() as client:
        host = client.info()
    emit(host, output, lambda: _host(host))


def _host(host: HostInfo) -> str:
    def yes(value: bool | None) -> str:
        return "not known" if value is None else "yes" if value else "no"

    if host.driver:
        return pairs(
            [
                ("driver", host.driver),
                ("cpu vendor", host.vendor),
                ("cpu model", host.cpu_model),
                ("cpus", host.cpus),
                ("numa nodes", host.nodes),
                ("hardware virtualisation", host.hvm or "none"),
                ("total memory", host.total_memory // MIB),
                ("free memory", host.free_memory // MIB),
                ("domains", host.domains),
            ]
        )
    return pairs(
        [
            ("xen version", host.xen_version),
            ("interface versions", f"domctl {host.domctl_interface:#x}, sysctl {host.sysctl_interface:#x}"),
            ("xen capabilities", " ".join(host.xen_caps)),
            ("xen command line", host.xen_commandline),
            ("cpu vendor", host.vendor),
            ("cpu model", host.cpu_model),
            (
                "cpus",
                f"{host.cpus} ({host.cores_per_socket} cores/socket, {host.threads_per_core} threads/core)",
            ),
            ("cpu frequency", f"{host.cpu_khz / 1000:.0f} MHz"),
            ("numa nodes", host.nodes),
            ("hardware virtualisation", host.hvm or "none"),
            ("nested paging", yes(host.nested_paging)),
            ("ASID or VPID", yes(host.asid)),
            ("IOMMU", yes(host.iommu)),
            ("virtualisation capabilities", " ".join(host.virt_caps)),
            ("total memory", host.total_memory // MIB),
            ("free memory", host.free_memory // MIB),
            ("memory being scrubbed", host.scrub_memory // MIB),
            ("scheduler", host.scheduler),
            ("domains", host.domains),
        ]
    )


def dmesg(
    output: Output = "table",
    clear: Annotated[bool, typer.Option("-c", "--clear", help="Empty the buffer behind it.")] = False,
) -> None:
    """Show Xen's message buffer.

    \b
    Examples:
      xtool dmesg
      xtool dmesg -c
    """
    with connect() as client:
        text = client.dmesg(clear=clear)
    emit({"text": text}, output, lambda: escape_lines(text).rstrip("\n"))


def domid(domain: Domain, output: Output = "table") -> None:
    """Show the id of a domain.

    \b
    Examples:
      xtool domid web
      xtool domid web -o json
    """
    one = _one(domain)
    emit({"domid": one.domid}, output, lambda: str(one.domid))


def domname(domain: Domain, output: Output = "table") -> None:
    """Show the name of a domain.

    \b
    Examples:
      xtool domname 3
      xtool domname 3 -o json
    """
    one = _one(domain)
    emit({"name": one.name}, output, lambda: escape(one.name))


def _one(domain: str) -> DomainInfo:
    with connect() as client:
        found = client.list(domain)
    if not found:
        raise DomainNotFoundError(f"there is no domain {domain}", hint="xtool list shows those there are")
    return found[0]


def vcpu_list(domain: MaybeDomain = None, output: Output = "table") -> None:
    """List the vCPUs of all domains or of one: state, the CPU they run on, CPU time, affinity.

    \b
    Examples:
      xtool vcpu-list
      xtool vcpu-list web -o yaml
    """
    with connect() as client:
        found = client.vcpu_list(domain)
    emit(found, output, lambda: vcpu_table(found))


def vcpu_table(found: list[VcpuInfo]) -> str:
    """What ``vcpu-list`` shows."""
    rows = [
        [v.domain, v.domid, v.vcpu, "-" if v.cpu is None else v.cpu, v.state, f"{v.cpu_time:.1f}",
         f"{v.hard_affinity} / {v.soft_affinity}"]
        for v in found
    ]  # fmt: skip
    return columns(
        ["Name", "ID", "VCPU", "CPU", "State", "Time(s)", "Affinity (hard / soft)"], rows, _NUMBERS
    )
