"""What was measured, as text. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.contest import Cost, Outcome, cost
from benchmarks.stats import Comparison


def comparisons(rows: Iterable[Comparison]) -> str:
    lines = [
        f"{'ours / theirs':44} {'xtool':>10} {'theirs':>10} {'':4} {'ratio':>7} {'95 %':>13} {'goal':>7}"
    ]
    for row in rows:
        goal = "" if row.goal is None else f"{'>=' if row.at_least else '<='} {row.goal:g}"
        interval = f"{row.low:.2f}-{row.high:.2f}"
        line = (
            f"{row.name:44} {row.ours:10.5g} {row.theirs:10.5g} {row.unit:4} {row.ratio:7.3f} {interval:>13}"
            f" {goal:>7} {row.verdict}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


def costs(rows: Iterable[Cost], deterministic: bool) -> str:
    """``ns_per_op`` of a deterministic lab is instructions: there one nanosecond is one instruction."""
    work = "instr/op" if deterministic else "ns/op"
    lines = [
        f"{'':36} {'backend':12} {'rate':>10} {'':4} {'p50 µs':>8} {'p99 µs':>8} {work:>10}"
        f" {'backend s/GiB':>13} {'dom0 s/GiB':>10}"
    ]
    for row in rows:
        lines.append(
            f"{row.contest:36} {row.backend:12} {row.value:10.5g} {row.unit:4} {_cell(row.p50_us, 8)}"
            f" {_cell(row.p99_us, 8)} {_cell(row.ns_per_op, 10, '.0f')} {_cell(row.backend_s_per_gib, 13)}"
            f" {_cell(row.dom0_s_per_gib, 10)}"
        )
    return "\n".join(lines)


def _cell(value: float | None, width: int, form: str = ".4g") -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def all_costs(outcomes: Iterable[Outcome]) -> list[Cost]:
    return [
        cost(outcome.contest, name, samples)
        for outcome in outcomes
        for name, samples in outcome.samples.items()
        if samples
    ]


def verdicts(outcomes: Iterable[Outcome], broken: dict[str, str]) -> str:
    """How many goals are met and missed, and what nothing can be said about. ``broken`` are whole places that
    could not be set up."""
    outcomes = list(outcomes)
    judged = [row for outcome in outcomes for row in outcome.comparisons() if row.goal is not None]
    met = sum(row.verdict == "met" for row in judged)
    unknown = [name for outcome in outcomes for name in outcome.unjudged()]
    lines = [f"goals: {met} met, {len(judged) - met} missed, {len(unknown)} not measured"]
    lines += [f"  missed: {row.name} ({row.ratio:.3f})" for row in judged if row.verdict == "missed"]
    lines += [f"  not measured: {name}" for name in unknown]
    for outcome in outcomes:
        for name, why in outcome.failures.items():
            lines.append(f"FAILED {outcome.contest.name} on {name}: {why}")
    lines += [f"FAILED {place}: {why}" for place, why in broken.items()]
    return "\n".join(lines)


def instructions_note(deterministic: bool) -> str:
    if not deterministic:
        return "Wall clock: for information only. ns/op is time of the whole machine per request."
    return (
        "Deterministic lab: a nanosecond is an instruction of the whole machine (guest, Xen, domain 0), so\n"
        "instr/op is derived from the time per request; where the machine waits, that is in it, too.\n"
        "TCP's op is a segment of 1448 bytes. CPU seconds are of processors that share that one clock."
    )
