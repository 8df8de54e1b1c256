"""One disk or interface from words of a command line: xl's spec string, or ``key=value`` words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from xtool.config.devices import DiskConfig, VifConfig
from xtool.config.nodes import Scalar
from xtool.config.specs import SpecError, SpecItem, parse_disk_spec, parse_vif_spec
from xtool.config.units import to_byte_rate, to_op_rate
from xtool.errors import UsageError

D = TypeVar("D", bound=BaseModel)


def parse_disk(words: Sequence[str], base_dir: str | None = None, vdev: str | None = None) -> DiskConfig:
    """``["/images/a.img,raw,xvdb"]`` or ``["vdev=xvdb", "target=a.img"]``; relative targets are relative to
    ``base_dir`` (the working directory), ``vdev`` is for a spec that names none. Raises ``UsageError``."""

    def parse(text: str) -> list[SpecItem]:
        items = parse_disk_spec(text)
        if vdev is None or any(item.key == "vdev" for item in items):
            return items
        return [*items, SpecItem("vdev", vdev, 0)]

    return _parse(DiskConfig, "disk", words, parse, base_dir)


def parse_vif(words: Sequence[str]) -> VifConfig:
    """``["bridge=xenbr0,mac=00:16:3e:00:00:01"]``; no word is an interface of defaults. ``UsageError``."""
    return _parse(VifConfig, "vif", words, parse_vif_spec, None)


def limit(name: str, text: str | None) -> int | None:
    """``bytes-per-second`` or ``ops-per-second`` from a command line: None if it is not given, 0 for
    ``none``. Raises ``UsageError``."""
    if text is None:
        return None
    try:
        return (to_byte_rate if name == "bytes-per-second" else to_op_rate)(text) or 0
    except PydanticCustomError as error:
        context = error.context or {}
        raise UsageError(f"{name}: {context.get('message')}", hint=context.get("hint")) from None


def disk_from(plain: dict[str, Any]) -> DiskConfig:
    """A disk from what ``DiskConfig.to_dict`` gave."""
    return DiskConfig.model_validate(plain, context={"base_dir": "/"})


def _parse(model: type[D], what: str, words: Sequence[str], parse: Any, base_dir: str | None) -> D:
    try:
        # A target takes all that follows it, commas too.
        ordered = sorted(words, key=lambda word: word.startswith("target="))
        items: list[SpecItem] = parse(",".join(ordered))
    except SpecError as error:
        raise UsageError(f"{what}: {error.message}", hint=error.hint) from None
    values = {item.key: Scalar(item.value) for item in items}
    try:
        return model.model_validate(values, context={"base_dir": base_dir or os.getcwd()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        context = first.get("ctx") or {}
        name = ".".join(map(str, first["loc"]))
        text = "is missing" if first["type"] == "missing" else str(context.get("message") or first["msg"])
        raise UsageError(
            f"{what}: {name} {text}" if name else f"{what}: {text}", hint=context.get("hint")
        ) from None
