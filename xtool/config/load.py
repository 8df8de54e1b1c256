"""Domain files to ``DomainConfig``: read, render, merge, override, check keys, expand specs, validate."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xtool.config.keycheck import Findings, check_keys, expand_specs, merge_cmdline
from xtool.config.layers import HostDefaults, default_layers, merge, with_templates
from xtool.config.model import FIELDS, MERGED, DomainConfig
from xtool.config.nodes import (
    Entry,
    MapNode,
    Mark,
    Node,
    ScalarNode,
    Source,
    find_mark,
    find_node,
    parse_documents,
    parse_yaml,
)
from xtool.config.overrides import apply_override, plain_sets
from xtool.config.problems import collected, did_you_mean, problems_of, raise_problems
from xtool.config.validate import dotted, validate
from xtool.errors import ConfigError

_MAX_FILE = 1 << 20
#: A file whose first line this is, is no template and takes no defaults: what xtool wrote itself.
PLAIN = "# xtool: plain"


@dataclass
class Loaded:
    """One domain, and the tree it was made from: every entry of ``root`` has the place it came from;
    ``shadowed`` has what stronger layers replaced, weakest first."""

    config: DomainConfig
    root: MapNode
    shadowed: dict[str, list[Entry]] = field(default_factory=dict)

    def relative_files(self) -> set[str]:
        """The absolute forms of this machine's files: those written as relative paths."""
        found = set()
        for reference in self.config.file_references():
            loc: list[str | int] = []
            for step in reference.key.replace("[", ".[").split("."):
                loc.append(int(step[1:-1]) if step.startswith("[") else step)
            node = find_node(self.root, tuple(loc))
            if not isinstance(node, ScalarNode) or node.mark.source.where:
                continue
            if not node.value.strip().startswith("/"):
                found.add(reference.path)
        return found

    def place(self, error: ConfigError) -> ConfigError:
        """What a driver refused, which has a ``loc`` only, with the place it was written at."""
        return collected(
            [
                problem
                if problem.line
                else find_mark(self.root, problem.loc).problem(
                    problem.message, problem.hint, key=problem.key or dotted(problem.loc)
                )
                for problem in problems_of(error)
            ]
        )


@dataclass(frozen=True)
class Inputs:
    """What a domain file is read with: ``--set`` arguments, files of variables, and whether the host's
    defaults count."""

    overrides: Sequence[str] = ()
    vars_files: Sequence[str] = ()
    defaults: bool = True


_NOTHING = Inputs()


def load_config(
    path: str | os.PathLike[str], overrides: Iterable[str] = (), vars_files: Iterable[str] = ()
) -> DomainConfig:
    """Read a domain file with one document. ``overrides`` are ``key=value`` texts (``memory=2GiB``,
    ``disk[0].vdev=xvdb``), which are the variables of a template too, like the maps in ``vars_files``.

    Raises ``ConfigError``, or ``ConfigErrors`` with everything that is wrong.
    """
    loaded = load_all(path, Inputs(tuple(overrides), tuple(vars_files)))
    return single(loaded).config


def load_placed(
    path: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    vars_files: Iterable[str] = (),
    only: str | None = None,
) -> tuple[DomainConfig, Callable[[ConfigError], ConfigError]]:
    """The same, and what gives a problem found later, which has a ``loc`` only, its place in the file.
    ``only`` names one of several documents."""
    loaded = single(load_all(path, Inputs(tuple(overrides), tuple(vars_files)), only))
    return loaded.config, loaded.place


def single(loaded: list[Loaded]) -> Loaded:
    """The only one. Raises ``ConfigError`` when there are several."""
    if len(loaded) > 1:
        names = ", ".join(each.config.name for each in loaded)
        raise loaded[1].root.mark.problem(
            f"one domain is wanted here, this file has {len(loaded)}: {names}", "choose one with --only NAME"
        )
    return loaded[0]


def load_all(
    path: str | os.PathLike[str], inputs: Inputs = _NOTHING, only: str | None = None
) -> list[Loaded]:
    """Every domain of a file, in its order, or the one named ``only``. Raises as ``load_config``."""
    name = os.fspath(path)
    files = _Files(inputs)
    text = read_text(name)
    roots = files.parse(name, text, "file")
    folder = os.path.dirname(os.path.abspath(name))
    roots = [root for root in roots if not _empty(root)] or roots[:1]
    start = Mark(Source(name, text), 1, 1)
    defaults = [] if files.plain or not inputs.defaults else list(default_layers(files.read))
    loaded: list[Loaded] = []
    problems: list[ConfigError] = []
    names: dict[str, int] = {}
    for root in roots or [MapNode(start, {})]:
        try:
            one = _domain(root, folder, files, defaults)
        except ConfigError as error:
            problems += problems_of(error)
            continue
        if (before := names.get(one.config.name)) is not None:
            mark = one.root.entries["name"].value.mark
            problems.append(
                mark.problem(
                    f"the name {one.config.name} is used twice", f"it is on line {before} already", key="name"
                )
            )
        names[one.config.name] = one.root.entries["name"].mark.line
        loaded.append(one)
    # A loop in a template makes the same mistake in each of its rounds.
    raise_problems(list({(p.file, p.line, p.column, p.message): p for p in problems}.values()))
    if only is None:
        return loaded
    chosen = [one for one in loaded if one.config.name == only]
    if not chosen:
        hint = did_you_mean(only, names) or f"it has {', '.join(names)}"
        raise ConfigError(f"{name} has no domain {only!r}", file=name, hint=hint)
    return chosen


def parse_config(
    text: str, file: str = "<text>", base_dir: str | None = None, overrides: Iterable[str] = ()
) -> DomainConfig:
    """One domain from a text that is no template and takes no defaults. Relative paths in it are relative to
    ``base_dir`` (default: the working directory); ``file`` is how errors call it."""
    source = Source(file, text)
    root = parse_yaml(source, text)
    if root is None or _empty(root):
        root = MapNode(Mark(source, 1, 1), {})
    return finish(_map(root), base_dir or os.getcwd(), overrides).config


def finish(
    root: MapNode,
    base_dir: str,
    overrides: Iterable[str] = (),
    shadowed: dict[str, list[Entry]] | None = None,
) -> Loaded:
    """The last steps for a merged tree. Raises as ``load_config``."""
    found = Findings()
    expand_specs(root, found)
    shadowed = {} if shadowed is None else shadowed
    for override in overrides:
        apply_override(root, override, shadowed)
    expand_specs(root, found)
    if (extends := root.entries.pop("extends", None)) is not None:
        found.problems.append(extends.mark.problem("extends is for domain files only", key="extends"))
    check_keys(root, found)
    merge_cmdline(root, found)
    config = validate(root, base_dir, found)
    raise_problems(found.problems)
    assert config is not None
    return Loaded(config, root, shadowed)


def _domain(root: Node, folder: str, files: _Files, defaults: list[MapNode]) -> Loaded:
    templates, own = with_templates(_map(root), folder, files.read)
    shadowed: dict[str, list[Entry]] = {}
    merged = MapNode(own.mark, {})
    for layer in (*defaults, *templates, own):
        merged = merge(merged, layer, shadowed)
    if own.entries:
        merged.mark = own.mark
    return finish(merged, folder, files.overrides(), shadowed)


def _empty(root: Node) -> bool:
    return isinstance(root, ScalarNode) and root.value.empty


def _map(root: Node) -> MapNode:
    if _empty(root):
        return MapNode(root.mark, {})
    if not isinstance(root, MapNode):
        raise root.mark.problem("a domain file is a map of keys", "write lines such as memory: 256")
    # A copy: what is done to it must not show in a template that another document extends as well.
    return MapNode(root.mark, dict(root.entries))


class _Files:
    """Reads the files of one load: rendered, where they are templates, with the same variables."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._sets = plain_sets(inputs.overrides)
        self._used: set[str] = set()
        self._values: Mapping[str, Any] | None = None
        self.plain = False

    def read(self, path: str, role: str, another: HostDefaults | None = None) -> list[Node]:
        if another is None:
            return self.parse(path, read_text(path), role)
        return self.parse(path, another.text, role, another.host)

    def parse(self, path: str, text: str, role: str, where: str = "") -> list[Node]:
        folder = os.path.dirname(os.path.abspath(path))
        if role == "file":
            self.plain = text.startswith(PLAIN)
        if ("{{" not in text and "{%" not in text) or self.plain:
            return parse_documents(Source(path, text, role=role, folder=folder, where=where), text)
        from xtool.config import template

        self._used |= template.names_used(text)
        rendered = template.render(Source(path, text, role=role, where=where), text, self._variables())
        source = Source(path, text, role=role, folder=folder, where=where, places=rendered.places)
        return parse_documents(source, rendered.text)

    def overrides(self) -> list[str]:
        """The ``--set`` arguments that set keys: not those that are nothing but a template's variable."""
        keys = {*FIELDS, *MERGED}
        return [
            text
            for text in self._inputs.overrides
            if (name := text.partition("=")[0]) in keys or name not in self._used
        ]

    def _variables(self) -> Mapping[str, Any]:
        if self._values is None:
            from xtool.config.template import variables

            files = [
                (Source(path, text), text) for path in self._inputs.vars_files for text in [read_text(path)]
            ]
            self._values = variables(self._sets, files)
        return self._values


def read_text(name: str, what: str = "domain file") -> str:
    """A file's text. Raises ``ConfigError``."""
    try:
        with open(name, "rb") as file:
            raw = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read the {what} {name}: {error.strerror}", file=name, hint="check the path"
        ) from None
    except ValueError:
        raise ConfigError(f"cannot read the {what} {name!a}: no path can have a NUL", file=name) from None
    if len(raw) > _MAX_FILE:
        raise ConfigError(f"{name} is too large for a {what}", file=name)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        raise ConfigError(
            message, file=name, line=line, column=column, hint="save the file as UTF-8"
        ) from None
