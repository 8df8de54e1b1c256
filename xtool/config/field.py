"""What is noted of a key beside its type: its meaning, the guests it is for, how its value is written."""

from __future__ import annotations

from typing import Any

from pydantic import Field

PV, PVH, HVM = "pv", "pvh", "hvm"
ALL = (PV, PVH, HVM)


def key(
    text: str,
    kind: str,
    default: Any = None,
    types: tuple[str, ...] = ALL,
    *,
    later: tuple[str, ...] = (),
    shown_default: str = "",
    alias: str | None = None,
    secret: bool = False,
) -> Any:
    """A field and what the reference table says of it.

    ``types`` are the guests the key is for in xl, ``later`` those of them xtool does not act upon it for.
    What is ``secret`` is in no ``repr``.
    """
    return Field(
        default,
        description=text,
        alias=alias,
        repr=not secret,
        json_schema_extra={
            "kind": kind,
            "types": " ".join(types),
            "later": " ".join(later),
            "default": shown_default,
        },
    )
