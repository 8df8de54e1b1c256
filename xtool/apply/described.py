"""Domain files and folders as what is to run: every domain once, in the order of what depends on what."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from xtool.config.load import Inputs, Loaded, load_all
from xtool.config.model import DomainConfig
from xtool.config.nodes import ListNode, Mark
from xtool.config.problems import did_you_mean, problems_of, raise_problems
from xtool.errors import ConfigError

ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True)
class Described:
    """One domain of a file. ``config`` is what it is to be where it runs (its files may be elsewhere there);
    ``given`` are the keys that stand in the file, its templates or the host's defaults."""

    config: DomainConfig
    loaded: Loaded
    file: str
    line: int
    given: frozenset[str] = field(default_factory=frozenset)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def source(self) -> str:
        return source_of(self.file)

    def mark(self, dependency: str) -> Mark:
        """Where it says that it depends on that."""
        node = self.loaded.root.entries["depends_on"].value
        if isinstance(node, ListNode):
            return node.items[self.config.depends_on.index(dependency)].mark
        return node.mark


def source_of(path: str) -> str:
    """``machine:/real/path``: what a domain made by apply is marked with."""
    return f"{socket.gethostname()}:{os.path.realpath(path)}"


def covers(paths: Iterable[str], source: str) -> bool:
    """Whether a domain with that mark was described by one of the paths, or in one of the folders."""
    for path in paths:
        own = source_of(path)
        if source == own or (os.path.isdir(path) and os.path.dirname(source) == own.rstrip("/")):
            return True
    return False


def read(paths: Sequence[str], inputs: Inputs) -> list[Described]:
    """Every domain the paths describe, in the order they are given in; folders by name.

    Raises ``ConfigError``, or ``ConfigErrors`` with all that is wrong.
    """
    found: list[Described] = []
    problems: list[ConfigError] = []
    for file in files_of(paths):
        try:
            found += [_described(file, one) for one in load_all(file, inputs)]
        except ConfigError as error:
            problems += problems_of(error)
    first: dict[str, Described] = {}
    for one in found:
        mark = one.loaded.root.entries["name"].value.mark
        before = first.setdefault(one.name, one)
        if before is not one:
            hint = f"it is in {before.file}, line {before.line}, already"
            problems.append(mark.problem(f"the name {one.name} is used twice", hint, key="name"))
    raise_problems(problems)
    return found


def _described(file: str, loaded: Loaded) -> Described:
    line = loaded.root.entries["name"].mark.line
    return Described(loaded.config, loaded, file, line, frozenset(loaded.root.entries))


def with_files(one: Described, elsewhere: Mapping[str, str]) -> Described:
    """The same with files at other places: path here -> path there."""
    return replace(one, config=one.config.with_files(dict(elsewhere)))


def files_of(paths: Iterable[str]) -> list[str]:
    """The files, each once; of a folder its ``*.yaml`` and ``*.yml``. Raises ``ConfigError``."""
    found: dict[str, str] = {}
    for path in paths:
        if not os.path.isdir(path):
            found.setdefault(os.path.realpath(path), path)
            continue
        try:
            names = sorted(os.listdir(path))
        except OSError as error:
            raise ConfigError(f"cannot read the folder {path}: {error.strerror}", file=path) from None
        for name in names:
            if name.endswith(ENDINGS) and not name.startswith("."):
                file = os.path.join(path, name)
                found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def in_order(described: Sequence[Described], running: Iterable[str] = ()) -> list[Described]:
    """What others depend on first; else as they stand. Domains that run need not be described.

    Raises ``ConfigError``, with the place, for a dependency that is nowhere and for a circle.
    """
    by_name = {one.name: one for one in described}
    known = {*by_name, *running}
    problems = [
        one.mark(name).problem(
            f"{one.name} depends on {name}, which is neither described here nor runs",
            did_you_mean(name, sorted(known)) or "give its file too, or remove it",
            key="depends_on",
        )
        for one in described
        for name in one.config.depends_on
        if name not in known
    ]
    raise_problems(problems)
    circle = find_circle({one.name: [n for n in one.config.depends_on if n in by_name] for one in described})
    if circle:
        one = by_name[circle[0]]
        way = " -> ".join((*circle, circle[0]))
        raise one.mark(circle[1] if len(circle) > 1 else circle[0]).problem(
            f"these domains wait for each other: {way}", "remove one of these dependencies", key="depends_on"
        )
    ordered: dict[str, Described] = {}
    left = list(described)
    while left:
        ready = [one for one in left if all(n in ordered or n not in by_name for n in one.config.depends_on)]
        ordered |= {one.name: one for one in ready}
        left = [one for one in left if one.name not in ordered]
    return list(ordered.values())


def find_circle(depends: Mapping[str, Sequence[str]]) -> list[str]:
    """Names each of which depends on the next, the last on the first; empty if there is no circle. Pure."""
    done: set[str] = set()
    for start in depends:
        path: list[str] = []
        stack: list[tuple[str, int]] = [(start, 0)]
        while stack:
            name, at = stack.pop()
            if at == 0:
                if name in done:
                    continue
                path.append(name)
            following = [n for n in depends.get(name, ()) if n in depends]
            if at == len(following):
                done.add(path.pop())
                continue
            stack.append((name, at + 1))
            if following[at] in path:
                return path[path.index(following[at]) :]
            stack.append((following[at], 0))
    return []
