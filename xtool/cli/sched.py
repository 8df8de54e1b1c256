"""Verbs for schedulers: sched-credit, sched-credit2, sched-rtds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.client import connect
from xtool.cli.options import Output
from xtool.cli.output import columns, emit
from xtool.errors import UsageError

if TYPE_CHECKING:
    from xtool.toolstack.api import CreditInfo, PoolScheduler, RtdsInfo

Which = Annotated[
    str | None, typer.Option("-d", "--domain", metavar="DOMAIN", help="One domain: its name, id or uuid.")
]
Weight = Annotated[int | None, typer.Option("-w", "--weight", help="Its share against others: 1 to 65535.")]
Cap = Annotated[
    int | None, typer.Option("-c", "--cap", help="Most it may take, percent of one CPU; 0 is no cap.")
]
Params = Annotated[
    bool, typer.Option("-s", "--schedparam", help="What the scheduler itself goes by, not a domain.")
]
RateLimit = Annotated[
    int | None,
    typer.Option("-r", "--ratelimit_us", metavar="US", help="A vCPU runs so long at least; 0 is no limit."),
]
Pool = Annotated[str | None, typer.Option("-p", "--cpupool", metavar="CPUPOOL", help="Only this CPU pool.")]


def sched_credit(
    domain: Which = None,
    weight: Weight = None,
    cap: Cap = None,
    schedparam: Params = False,
    tslice: Annotated[
        int | None, typer.Option("-t", "--tslice_ms", metavar="MS", help="The time slice, milliseconds.")
    ] = None,
    ratelimit: RateLimit = None,
    delay: Annotated[
        int | None,
        typer.Option("-m", "--migration_delay_us", metavar="US", help="How long a CPU's cache counts."),
    ] = None,
    pool: Pool = None,
    output: Output = "table",
) -> None:
    """Show or set what the credit scheduler goes by.

    \b
    Examples:
      xtool sched-credit -d web -w 512 -c 50
      xtool sched-credit -s -t 10 -p batch
    """
    _credit("credit", domain, weight, cap, schedparam, tslice, ratelimit, delay, pool, output)


def sched_credit2(
    domain: Which = None,
    weight: Weight = None,
    cap: Cap = None,
    schedparam: Params = False,
    ratelimit: RateLimit = None,
    pool: Pool = None,
    output: Output = "table",
) -> None:
    """Show or set what the credit2 scheduler goes by.

    \b
    Examples:
      xtool sched-credit2
      xtool sched-credit2 -d web -w 512
    """
    _credit("credit2", domain, weight, cap, schedparam, None, ratelimit, None, pool, output)


def _credit(
    scheduler: str,
    domain: str | None,
    weight: int | None,
    cap: int | None,
    schedparam: bool,
    tslice: int | None,
    ratelimit: int | None,
    delay: int | None,
    pool: str | None,
    output: str,
) -> None:
    of_domain, of_pool = (weight, cap), (tslice, ratelimit, delay)
    if domain is None and _given(*of_domain):
        raise UsageError(
            "a weight or cap is a domain's", hint=f"as in: xtool sched-{scheduler} -d web -w 512"
        )
    if not schedparam and _given(*of_pool):
        raise UsageError("that is the scheduler's own, not a domain's", hint="say -s as well")
    if domain is not None and (schedparam or pool is not None):
        raise UsageError("-d is one domain, -s and -p are for all", hint="leave one of them out")
    with connect() as client:
        if schedparam:
            if _given(*of_pool):
                params = client.sched_pool_set(
                    scheduler, pool, ratelimit_us=ratelimit, tslice_ms=tslice, migration_delay_us=delay
                )
            else:
                params = client.sched_pool(scheduler, pool)
            emit(params, output, lambda: _params(params))
            return
        if domain is not None and _given(*of_domain):
            rows = client.sched_credit_set(scheduler, domain, weight=weight, cap=cap)
        else:
            rows = client.sched_credit(scheduler, domain, pool)
    emit(rows, output, lambda: _credits(rows))


def _given(*values: object) -> bool:
    return any(value is not None for value in values)


def _credits(rows: list[CreditInfo]) -> str:
    header = ["Name", "ID", "Pool", "Weight", "Cap"]
    return columns(header, [[r.name, r.domid, r.pool, r.weight, r.cap] for r in rows], header[1:])


def _params(rows: list[PoolScheduler]) -> str:
    header = ["Pool", "Scheduler", "Ratelimit(us)", "Timeslice(ms)", "Migration delay(us)"]
    cells = [
        [
            r.pool,
            r.scheduler,
            *("-" if v is None else v for v in (r.ratelimit_us, r.tslice_ms, r.migration_delay_us)),
        ]
        for r in rows
    ]
    return columns(header, cells, header[2:])


def sched_rtds(
    domain: Which = None,
    vcpus: Annotated[
        list[str] | None, typer.Option("-v", "--vcpuid", metavar="VCPU|all", help="Which; may be repeated.")
    ] = None,
    periods: Annotated[
        list[int] | None, typer.Option("-p", "--period", metavar="US", help="For each -v, or for all.")
    ] = None,
    budgets: Annotated[
        list[int] | None, typer.Option("-b", "--budget", metavar="US", help="Of each period.")
    ] = None,
    extratimes: Annotated[
        list[int] | None, typer.Option("-e", "--extratime", metavar="0|1", help="May it use idle time?")
    ] = None,
    pool: Annotated[
        str | None, typer.Option("-c", "--cpupool", metavar="CPUPOOL", help="Only this CPU pool.")
    ] = None,
    output: Output = "table",
) -> None:
    """Show or set what the rtds scheduler goes by, vCPU by vCPU. Times are microseconds.

    \b
    Examples:
      xtool sched-rtds -d web -v all -p 10000 -b 2500
      xtool sched-rtds -d web -v 0 -p 10000 -b 2500 -v 1 -p 20000 -b 4000
    """
    setting = bool(periods or budgets or extratimes)
    if domain is None and (setting or vcpus):
        raise UsageError("whose vCPUs?", hint="as in: xtool sched-rtds -d web -v 0 -p 10000 -b 2500")
    if domain is not None and pool is not None:
        raise UsageError("-d is one domain, -c is for all of a pool", hint="leave one of them out")
    numbers = vcpu_numbers(vcpus or ["all"])
    with connect() as client:
        if domain is None or not setting:
            rows = client.sched_rtds(domain, pool, numbers)
        else:
            rows = []
            for group, period, budget, extratime in _groups(numbers, periods, budgets, extratimes):
                extra = None if extratime is None else bool(extratime)
                rows += client.sched_rtds_set(domain, group, period=period, budget=budget, extratime=extra)
    emit(rows, output, lambda: _rtds(rows))


def vcpu_numbers(words: list[str]) -> list[int] | None:
    """``["0", "3"]`` -> numbers, ``["all"]`` -> None. Raises ``UsageError``."""
    if words == ["all"]:
        return None
    if not all(word.isascii() and word.isdigit() for word in words):
        raise UsageError("-v wants a number, or all alone")
    return [int(word) for word in words]


def _groups(
    numbers: list[int] | None, *settings: list[int] | None
) -> list[tuple[list[int] | None, int | None, int | None, int | None]]:
    """What to set for which vCPUs: one value for all of them, or one for each."""
    count = max((len(values) for values in settings if values), default=1)
    groups: list[list[int] | None] = [numbers]
    if count > 1:
        groups = [[number] for number in numbers or []]
    if len(groups) != count or any(values and len(values) not in (1, count) for values in settings):
        raise UsageError("-p, -b and -e are given once, or once for each -v")
    period, budget, extratime = (_each(values, count) for values in settings)
    return list(zip(groups, period, budget, extratime, strict=True))


def _each(values: list[int] | None, count: int) -> list[int | None]:
    one: list[int | None] = [*values] if values else [None]
    return one * count if len(one) == 1 else one


def _rtds(rows: list[RtdsInfo]) -> str:
    header = ["Name", "ID", "Pool", "VCPU", "Period", "Budget", "Extratime"]
    cells = [
        [r.name, r.domid, r.pool, r.vcpu, r.period, r.budget, "yes" if r.extratime else "no"] for r in rows
    ]
    return columns(header, cells, ["ID", "VCPU", "Period", "Budget"])
