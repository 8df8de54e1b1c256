"""Domain files to ``DomainConfig``: read, override, check keys, expand xl's strings, validate."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from xtool.config.model import FIELDS, MERGED, DomainConfig, guests_of
from xtool.config.nodes import (
    Entry,
    ListNode,
    MapNode,
    Mark,
    Node,
    Scalar,
    ScalarNode,
    Source,
    find_mark,
    parse_yaml,
)
from xtool.config.overrides import apply_override
from xtool.config.problems import ConfigErrors, did_you_mean, problems_of, raise_problems
from xtool.config.specs import (
    CHANNEL_KEYS,
    DISK_FLAGS,
    DISK_KEYS,
    DISK_LATER,
    VIF_FLAGS,
    VIF_KEYS,
    SpecError,
    parse_channel_spec,
    parse_disk_spec,
    parse_vif_spec,
)
from xtool.config.xlkeys import INSTEAD, UNSUPPORTED
from xtool.errors import ConfigError

_SPECS = {"disk": parse_disk_spec, "vif": parse_vif_spec, "channel": parse_channel_spec}
_SUBKEYS = {"disk": {*DISK_KEYS, *DISK_FLAGS}, "vif": {*VIF_KEYS, *VIF_FLAGS}, "channel": {*CHANNEL_KEYS}}
_MAX_FILE = 1 << 20


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> DomainConfig:
    """Read a domain file. ``overrides`` are ``key=value`` texts (``memory=2GiB``, ``disk[0].vdev=xvdb``).

    Raises ``ConfigError``, or ``ConfigErrors`` with everything that is wrong.
    """
    return load_placed(path, overrides)[0]


def load_placed(
    path: str | os.PathLike[str], overrides: Iterable[str] = ()
) -> tuple[DomainConfig, Callable[[ConfigError], ConfigError]]:
    """The same, and what gives a problem found later, which has a ``loc`` only, its place in the file."""
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            raw = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read the domain file {name}: {error.strerror}", file=name, hint="check the path"
        ) from None
    if len(raw) > _MAX_FILE:
        raise ConfigError(f"{name} is too large for a domain file", file=name)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        raise ConfigError(
            message, file=name, line=line, column=column, hint="save the file as UTF-8"
        ) from None
    config, root = _parse(text, name, os.path.dirname(os.path.abspath(name)), overrides)

    def place(error: ConfigError) -> ConfigError:
        placed = [
            problem if problem.line else find_mark(root, problem.loc).problem(problem.message, problem.hint)
            for problem in problems_of(error)
        ]
        return placed[0] if len(placed) == 1 else ConfigErrors(sorted(placed, key=lambda p: p.line))

    return config, place


def parse_config(
    text: str, file: str = "<text>", base_dir: str | None = None, overrides: Iterable[str] = ()
) -> DomainConfig:
    """The same for a text. Relative paths in it are relative to ``base_dir`` (default: the working
    directory); ``file`` is how errors call it."""
    return _parse(text, file, base_dir, overrides)[0]


def _parse(
    text: str, file: str, base_dir: str | None, overrides: Iterable[str]
) -> tuple[DomainConfig, MapNode]:
    source = Source(file, text)
    start = Mark(source, 1, 1)
    root = parse_yaml(source, text)
    if root is None or (isinstance(root, ScalarNode) and root.value.empty):
        root = MapNode(start, {})
    if not isinstance(root, MapNode):
        raise root.mark.problem("a domain file is a map of keys", "write lines such as memory: 256")
    problems: list[ConfigError] = []
    _expand_specs(root, problems)
    for override in overrides:
        apply_override(root, override)
    _expand_specs(root, problems)
    _check_keys(root, problems)
    _merge_cmdline(root, problems)
    config = _validate(root, base_dir or os.getcwd(), problems)
    raise_problems(problems)
    assert config is not None
    return config, root


def _expand_specs(root: MapNode, problems: list[ConfigError]) -> None:
    """Put maps in the place of xl's spec strings, marks kept where the string stands as it is written."""
    for key, parse in _SPECS.items():
        entry = root.entries.get(key)
        if entry is None or not isinstance(entry.value, ListNode):
            continue
        kept: list[Node] = []
        for item in entry.value.items:
            if isinstance(item, ScalarNode) and not item.value.empty:
                try:
                    expanded = MapNode(item.mark, {})
                    for sub in parse(str(item.value)):
                        mark = _inside(item, sub.offset)
                        expanded.entries[sub.key] = Entry(mark, ScalarNode(mark, Scalar(sub.value), True))
                    kept.append(expanded)
                except SpecError as error:
                    mark = _inside(item, error.offset)
                    problems.append(mark.problem(f"{key}: {error.message}", error.hint))
            else:
                kept.append(item)
        entry.value.items[:] = kept


def _inside(node: ScalarNode, offset: int) -> Mark:
    return node.mark.right(offset + node.value.quoted) if node.verbatim else node.mark


def _check_keys(root: MapNode, problems: list[ConfigError]) -> None:
    """Take out, and report, keys that are unknown, not supported, without a value or without effect."""
    guest = root.text("type")
    for key, (mark, value) in list(root.entries.items()):
        problem = _key_problem(key, mark, guest)
        if problem is None and isinstance(value, ScalarNode) and value.value.empty:
            problem = mark.problem(f"{key} has no value", f"write one, or remove {key}")
        if problem is not None:
            problems.append(problem)
            del root.entries[key]
        elif key in _SUBKEYS and isinstance(value, ListNode):
            for item in value.items:
                if isinstance(item, MapNode):
                    _check_subkeys(key, item, problems)
            if value.items and guest in guests_of(key, "later"):
                problems.append(mark.problem(f"xtool does not act on {key} for type: {guest} yet"))


def _key_problem(key: str, mark: Mark, guest: str | None) -> ConfigError | None:
    if key in UNSUPPORTED:
        return mark.problem(f"xl's {key} is not supported by xtool yet", INSTEAD.get(key, f"remove {key}"))
    if key not in FIELDS and key not in MERGED:
        return mark.problem(f"unknown key {_short(key)}", did_you_mean(key, [*FIELDS, *MERGED]))
    guests = guests_of(key)
    if guest in ("pv", "pvh", "hvm") and guest not in guests:
        return mark.problem(
            f"{key} has no effect for type: {guest}", f"it is for type: {' or '.join(guests)}"
        )
    return None


def _short(key: str) -> str:
    text = key if len(key) <= 40 else key[:37] + "..."
    return text if text.isprintable() else ascii(text)


def _check_subkeys(key: str, item: MapNode, problems: list[ConfigError]) -> None:
    for sub, (mark, value) in list(item.entries.items()):
        problem = None
        if key == "disk" and sub in DISK_LATER:
            problem = mark.problem(f"disk: xl's {sub} is not supported by xtool yet", f"remove {sub}")
        elif key == "vif" and sub == "netdev":
            problem = mark.problem("vif: netdev is deprecated", "use gatewaydev")
        elif sub not in _SUBKEYS[key]:
            problem = mark.problem(f"{key}: unknown sub-key {_short(sub)}", did_you_mean(sub, _SUBKEYS[key]))
        elif isinstance(value, ScalarNode) and value.value.empty:
            problem = mark.problem(f"{key}: {sub} has no value", f"write one, or remove {sub}")
        if problem is not None:
            problems.append(problem)
            del item.entries[sub]


def _merge_cmdline(root: MapNode, problems: list[ConfigError]) -> None:
    """xl's ``root`` and ``extra`` become ``cmdline``; beside a ``cmdline`` they would have no effect."""
    parts: list[str] = []
    first: Entry | None = None
    for key in MERGED:
        entry = root.entries.pop(key, None)
        if entry is None:
            continue
        if not isinstance(entry.value, ScalarNode):
            problems.append(entry.value.mark.problem(f"{key}: text is wanted, not {entry.value.KIND}"))
        elif "cmdline" in root.entries:
            problems.append(
                entry.mark.problem(f"{key} has no effect when cmdline is given", "put it into cmdline")
            )
        else:
            first = first or entry
            parts.append(f"root={entry.value.value}" if key == "root" else str(entry.value.value))
    if first is not None and "cmdline" not in root.entries:
        merged = ScalarNode(first.value.mark, Scalar(" ".join(parts), True))
        root.entries["cmdline"] = Entry(first.mark, merged)


def _validate(root: MapNode, base_dir: str, problems: list[ConfigError]) -> DomainConfig | None:
    try:
        return DomainConfig.model_validate(root.data(), context={"base_dir": base_dir})
    except ValidationError as error:
        # A key taken out above leaves a gap that need not be reported a second time.
        gone = {problem.message.split()[0] for problem in problems}
        for loc, message, hint in _details(error.errors(include_url=False)):
            if loc[:1] and loc[0] in ("maxmem", "maxvcpus") and loc[0] not in root.entries:
                continue  # it took its value from memory, vcpus: reported there
            if message.endswith(" is missing") and message.split()[0] in gone:
                continue
            problems.append(find_mark(root, loc).problem(message, hint))
        if not problems:
            problems.append(root.mark.problem(str(error)))
        return None


def _details(errors: Sequence[Any]) -> Iterator[tuple[tuple[str | int, ...], str, str | None]]:
    """``(loc, message, hint)`` of each pydantic error."""
    for error in errors:
        loc, context = tuple(error["loc"]), error.get("ctx") or {}
        where = _dotted(loc)
        if error["type"] == "broken_rules":
            for rule in context["broken"]:
                yield loc + rule.loc, rule.message, rule.hint
        elif error["type"] == "refused":
            message = context["message"]
            yield loc, f"{where}: {message}" if where else message, context["hint"]
        elif error["type"] == "missing":
            outer = f"{_dotted(loc[:-1])}: " if loc[:-1] else ""
            yield loc[:-1], f"{outer}{loc[-1]} is missing", f"add {loc[-1]}: ..."
        elif error["type"] in ("model_type", "dict_type", "model_attributes_type"):
            yield loc, f"{where}: a map of keys is wanted", None
        else:
            yield loc, f"{where}: {error['msg']}", None


def _dotted(loc: tuple[str | int, ...]) -> str:
    text = ""
    for step in loc:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text
