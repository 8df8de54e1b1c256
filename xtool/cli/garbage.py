"""``xtool gc``: what crashed toolstacks left behind; shown first, removed when asked to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from xtool.cli.client import connect
from xtool.cli.options import Output
from xtool.cli.output import columns, emit

if TYPE_CHECKING:
    from xtool.toolstack.everydayrecords import Leftover


def gc(
    remove: Annotated[
        bool, typer.Option("-y", "--yes", "--remove", help="Remove what is certain to be dead.")
    ] = False,
    output: Output = "table",
) -> int:
    """Find what crashed toolstacks left behind: half-built domains, nodes, loop devices, taps, processes.

    Without --yes nothing is changed. What may be somebody's is named and never touched, nor is anything
    that a running domain uses, whoever created it. The exit status is 1 if something could not be removed.

    \b
    Examples:
      xtool gc
      xtool gc --yes
    """
    with connect() as client:
        found = client.remove_leftovers() if remove else client.leftovers()
    emit(found, output, lambda: _table(found, remove))
    return int(any(item.problem for item in found))


def _table(found: list[Leftover], remove: bool) -> str:
    if not found:
        return "nothing was left behind"
    rows = [[item.kind, item.what, _fate(item, remove), item.problem or item.why] for item in found]
    text = columns(["Kind", "What", "", "Why"], rows)
    if not remove and any(item.certain for item in found):
        text += "\n\nxtool gc --yes removes what is dead."
    return text


def _fate(item: Leftover, remove: bool) -> str:
    if item.removed:
        return "removed"
    if item.problem:
        return "not removed"
    return "dead" if item.certain else "not sure"
