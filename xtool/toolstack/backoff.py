"""How fast a domain may be started again when it ends again and again. Pure.

A life shorter than ``SHORT_LIFE`` counts as short, and short lives in a row are counted: the first restart
after one comes at once, the next no sooner than ``SPACING[1]`` seconds after the last start, and so on to a
minute. xl, too, never restarts a domain faster than every ten seconds. The counts are kept in the journal's
``history``, so they outlive whoever carries the restart out; times in it are seconds since the host's boot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHORT_LIFE = 10.0
#: Least seconds between two starts, by how many short lives there were in a row; the last one goes on.
SPACING = (0.0, 10.0, 20.0, 40.0, 60.0)

_MOST = 1e12

History = Mapping[str, Any]


def _number(history: History | None, key: str) -> float:
    value = (history or {}).get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return 0.0
    return float(value) if -_MOST < value < _MOST else 0.0  # and so no infinity, no NaN


def short_lives(history: History | None) -> int:
    return max(0, int(_number(history, "short")))


def started(history: History | None, now: float) -> dict[str, Any]:
    """The history of a domain that starts now."""
    known = dict(history or {})
    known.pop("ended", None)
    known.pop("until", None)
    return {**known, "started": now}


def ended(history: History | None, now: float, reason: str) -> dict[str, Any]:
    """The history of a domain that was found ended now; found again, it stays what it is.

    ``until`` is when it may start again.
    """
    known = dict(history or {})
    if "ended" in known:
        return known
    since = _number(history, "started")
    short = short_lives(history) + 1 if now - since < SHORT_LIFE else 0
    until = since + SPACING[min(short, len(SPACING)) - 1] if short else now
    return {**known, "ended": now, "reason": reason, "short": short, "until": until}


def pause(history: History | None, now: float) -> float:
    """Seconds until it may start again; never more than the longest spacing, whatever the file says."""
    return min(SPACING[-1], max(0.0, _number(history, "until") - now))
