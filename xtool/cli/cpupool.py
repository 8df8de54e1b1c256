"""Verbs for CPU pools: ``cpupool-list`` and those beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.client import connect
from xtool.cli.lifecycle import describe
from xtool.cli.options import Domain, Output
from xtool.cli.output import columns, emit, escape, note
from xtool.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from xtool.toolstack.api import PoolInfo

Pool = Annotated[str, typer.Argument(metavar="CPUPOOL", help="Its name or number.")]
Cpus = Annotated[str, typer.Argument(metavar="CPU|node:N", help="CPUs: 3, or 2-5,^3, or node:1.")]


def cpupool_list(
    pool: Annotated[
        str | None, typer.Argument(metavar="[CPUPOOL]", help="Its name or number.", show_default=False)
    ] = None,
    cpus: Annotated[bool, typer.Option("-c", "--cpus", help="Which CPUs, not how many.")] = False,
    output: Output = "table",
) -> None:
    """List the CPU pools.

    \b
    Examples:
      xtool cpupool-list
      xtool cpupool-list -c -o json
    """
    with connect() as client:
        found = client.cpupool_list(pool)
    emit(found, output, lambda: _pools(found, cpus))


def _pools(found: list[PoolInfo], cpus: bool) -> str:
    if cpus:
        return columns(["Name", "CPU list"], [[p.name, ",".join(map(str, p.cpus))] for p in found])
    header = ["Name", "ID", "CPUs", "Scheduler", "Domains"]
    rows = [[p.name, p.id, len(p.cpus), p.scheduler, p.domains] for p in found]
    return columns(header, rows, ["ID", "CPUs", "Domains"])


def cpupool_create(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE] [KEY=VALUE]...",
            help="A YAML file with name, sched, cpus, nodes; what stands behind it counts more.",
            show_default=False,
        ),
    ] = None,
    defconfig: Annotated[
        Path | None, typer.Option("-f", "--defconfig", metavar="FILE", help="The file.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("-n", "--dryrun", help="Show what would be made, and make nothing.")
    ] = False,
    output: Output = "table",
) -> None:
    """Make a CPU pool of free CPUs. Without cpus and nodes it gets one; without sched, the host's scheduler.

    \b
    Examples:
      xtool cpupool-create name=batch cpus=2-3 sched=credit
      xtool cpupool-create batch.yaml -n
    """
    from xtool.config.cpupool import parse_pool
    from xtool.toolstack.api import PoolRequest

    rest = list(words or ())
    file = defconfig
    if file is None and rest and "=" not in rest[0]:
        file = Path(rest.pop(0))
    text = ""
    if file is not None:
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text"
            raise ConfigError(f"cannot read {file}: {reason}", file=str(file)) from None
    keys = parse_pool(text, str(file or ""), rest)
    if not keys["name"] and file is not None:
        keys["name"] = file.stem  # as xl does
    if not keys["name"]:
        raise UsageError("a CPU pool wants a name", hint="as in: xtool cpupool-create name=batch cpus=2-3")
    request = PoolRequest(keys["name"], keys["sched"], keys["cpus"], keys["nodes"])
    if dry_run:
        emit(request, output, lambda: "\n".join(f"{key}: {value}" for key, value in keys.items() if value))
        return
    with connect() as client:
        made = client.cpupool_create(request)
    emit(made, output, lambda: _pools([made], False))


def cpupool_destroy(pool: Pool, output: Output = "table") -> None:
    """Take a CPU pool away that has no domains. Its CPUs are free then.

    \b
    Examples:
      xtool cpupool-destroy batch
      xtool cpupool-destroy 1 -o json
    """
    with connect() as client:
        gone = client.cpupool_destroy(pool)
    cpus = ",".join(map(str, gone.cpus))
    emit(gone, output, lambda: f"{escape(gone.name)}: destroyed")
    if cpus and output == "table":
        note(f"CPU {cpus} is in no pool now: xtool cpupool-cpu-add Pool-0 {cpus} gives it back")


def cpupool_rename(
    pool: Pool,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new name.")],
    output: Output = "table",
) -> None:
    """Give a CPU pool another name.

    \b
    Examples:
      xtool cpupool-rename batch night
      xtool cpupool-rename 1 night
    """
    with connect() as client:
        done = client.cpupool_rename(pool, name)
    emit(done, output, lambda: _pools([done], False))


def cpupool_cpu_add(pool: Pool, cpus: Cpus, output: Output = "table") -> None:
    """Put free CPUs into a CPU pool.

    \b
    Examples:
      xtool cpupool-cpu-add batch 3
      xtool cpupool-cpu-add batch node:1
    """
    with connect() as client:
        done = client.cpupool_cpu_add(pool, cpus)
    emit(done, output, lambda: _pools([done], True))


def cpupool_cpu_remove(pool: Pool, cpus: Cpus, output: Output = "table") -> None:
    """Take CPUs out of a CPU pool. They are free then.

    \b
    Examples:
      xtool cpupool-cpu-remove Pool-0 3
      xtool cpupool-cpu-remove batch node:1
    """
    with connect() as client:
        done = client.cpupool_cpu_remove(pool, cpus)
    emit(done, output, lambda: _pools([done], True))


def cpupool_migrate(domain: Domain, pool: Pool, output: Output = "table") -> None:
    """Move a domain into another CPU pool. It forgets its affinity and its weight there.

    \b
    Examples:
      xtool cpupool-migrate web batch
      xtool cpupool-migrate web Pool-0
    """
    with connect() as client:
        done = client.cpupool_migrate(domain, pool)
    emit(done, output, lambda: describe(done))


def cpupool_numa_split(output: Output = "table") -> None:
    """Make a CPU pool of each NUMA node, Pool-node0 and so on. Domain 0 stays on the first.

    \b
    Examples:
      xtool cpupool-numa-split
      xtool cpupool-numa-split -o yaml
    """
    with connect() as client:
        found = client.cpupool_numa_split()
    emit(found, output, lambda: _pools(found, True))
