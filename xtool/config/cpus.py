"""xl's CPU lists, as ``cpus:`` takes them: ``0-3,^1``, ``nodes:0-1,^node:1``, ``all``; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

MAX_CPU = 4095


class CpuTerm(NamedTuple):
    """One term: physical CPUs, or NUMA nodes, ``first`` to ``last``; added, or taken away (``exclude``)."""

    exclude: bool
    nodes: bool
    first: int
    last: int


def parse_cpu_list(text: str) -> tuple[CpuTerm, ...] | None:
    """The terms of a list, in order; None if it is no CPU list."""
    terms = []
    for part in text.split(","):
        word = part.strip()
        exclude = word.startswith("^")
        word = word.removeprefix("^")
        nodes = word.startswith(("nodes:", "node:"))
        word = word.partition(":")[2] if nodes else word
        if word == "all" and not exclude:
            terms.append(CpuTerm(False, nodes, 0, MAX_CPU))
            continue
        first, dash, last = word.partition("-")
        last = last if dash else first
        if not all(t.isascii() and t.isdigit() and len(t) <= 4 for t in (first, last)):
            return None
        if not int(first) <= int(last) <= MAX_CPU:
            return None
        terms.append(CpuTerm(exclude, nodes, int(first), int(last)))
    return tuple(terms)


def resolve_cpus(text: str, cpus: Iterable[int], nodes: Mapping[int, Iterable[int]]) -> frozenset[int]:
    """The host's CPUs a list means; ``cpus`` are those that exist, ``nodes`` maps a NUMA node to its own.

    Terms count in order, so ``0-3,^1`` and ``^1,0-3`` differ. The result may be empty: that is for the
    caller to refuse. Raises ``ValueError`` for what is no CPU list.
    """
    terms = parse_cpu_list(text)
    if terms is None:
        raise ValueError(f"not a CPU list: {text!r}")
    host = frozenset(cpus)
    chosen: frozenset[int] = frozenset()
    for term in terms:
        if term.nodes:
            meant = {c for n, own in nodes.items() if term.first <= n <= term.last for c in own} & host
        else:
            meant = {c for c in host if term.first <= c <= term.last}
        chosen = chosen - meant if term.exclude else chosen | meant
    return chosen
