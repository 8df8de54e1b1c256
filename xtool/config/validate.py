"""A checked tree to ``DomainConfig``, and pydantic's complaints to problems with places."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from xtool.config.keycheck import Findings
from xtool.config.model import DomainConfig
from xtool.config.nodes import MapNode, find_mark

Loc = tuple[str | int, ...]
#: What stands for a required value that is wrong, while the other keys are looked at.
_STAND_INS = {"name": "x", "memory": "1TiB"}


def validate(root: MapNode, base_dir: str, found: Findings) -> DomainConfig | None:
    """None, and problems in ``found``, when anything is wrong."""
    data = root.data()
    context = {"base_dir": base_dir}
    try:
        return DomainConfig.model_validate(data, context=context)
    except ValidationError as error:
        bad = _report(root, error, found)
        if not any(e["type"] == "broken_rules" and not e["loc"] for e in error.errors(include_input=False)):
            _rules_of_the_rest(root, data, bad, context, found)
        if not found.problems:
            found.problems.append(root.mark.problem(error.title + ": not a domain"))
        return None


def _report(root: MapNode, error: ValidationError, found: Findings) -> set[str]:
    """Note what is wrong; the top-level keys it is about."""
    bad = set(found.gone)
    for loc, message, hint in _details(error.errors(include_url=False, include_input=False)):
        key = str(loc[0]) if loc else ""
        if key in ("maxmem", "maxvcpus") and key not in root.entries:
            continue  # it took its value from memory, vcpus: reported there
        where = dotted(loc)
        if " is missing" in message:
            name = message.removeprefix(f"{where}: ").split()[0]
            bad.add(key or name)
            if (where, name) in found.meant or name in found.gone:
                continue  # it is there, misspelt or taken out: reported already
        if key:
            bad.add(key)
        found.problems.append(find_mark(root, loc).problem(message, hint, key=where))
    return bad


def _rules_of_the_rest(
    root: MapNode, data: dict[str, Any], bad: set[str], context: dict[str, str], found: Findings
) -> None:
    """The rules between keys, for what is right: so that all mistakes are told at once."""
    if "type" in bad or "type" not in data:
        return
    rest = {key: value for key, value in data.items() if key not in bad}
    rest |= {key: value for key, value in _STAND_INS.items() if key not in rest}
    bad = bad | {key for key in _STAND_INS if key not in data}
    told = {problem.message for problem in found.problems}
    try:
        DomainConfig.model_validate(rest, context=context)
    except ValidationError as error:
        for loc, message, hint in _details(error.errors(include_url=False, include_input=False)):
            words = set(re.findall(r"\w+", message))
            if loc and loc[0] in ("maxmem", "maxvcpus") and loc[0] not in root.entries:
                continue
            meant = any(("", word) in found.meant for word in words)
            if not (words & bad) and not meant and message not in told:
                found.problems.append(find_mark(root, loc).problem(message, hint, key=dotted(loc)))


def _details(errors: Sequence[Any]) -> Iterator[tuple[Loc, str, str | None]]:
    """``(loc, message, hint)`` of each pydantic error."""
    for error in errors:
        loc, context = tuple(error["loc"]), error.get("ctx") or {}
        where = dotted(loc)
        if error["type"] == "broken_rules":
            for rule in context["broken"]:
                yield loc + rule.loc, rule.message, rule.hint
        elif error["type"] == "refused":
            message = context["message"]
            yield loc, f"{where}: {message}" if where else message, context["hint"]
        elif error["type"] == "missing":
            outer = f"{dotted(loc[:-1])}: " if loc[:-1] else ""
            yield loc[:-1], f"{outer}{loc[-1]} is missing", f"add {loc[-1]}: ..."
        elif error["type"] in ("model_type", "dict_type", "model_attributes_type"):
            yield loc, f"{where}: a map of keys is wanted", None
        else:
            yield loc, f"{where}: {error['msg']}", None


def dotted(loc: Loc) -> str:
    """``("disk", 0, "vdev")`` -> ``disk[0].vdev``."""
    text = ""
    for step in loc:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text
