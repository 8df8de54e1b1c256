"""Creating, destroying and listing guests by a request, by a process of ours, by xl; and a bench on which
they take turns."""

from __future__ import annotations

import gc
import json
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

from benchmarks.contest import BenchError
from benchmarks.stats import Comparison, Figure
from xtool.config import parse_config
from xtool.toolstack.api import Client, CreateOptions

GUESTS = Path(__file__).resolve().parents[1] / "build" / "guest"
PREFIX = "xtool-bench"


@dataclass(frozen=True)
class Wanted:
    """One guest. ``disk`` is an image's path, ``bridge`` an interface's; ``ours``: processes of ours serve
    them, else the kernel does."""

    name: str
    kind: str = "pv"
    memory: int = 128
    disk: str | None = None
    bridge: str | None = None
    paused: bool = True
    ours: bool = False

    def keys(self) -> dict[str, Any]:
        keys: dict[str, Any] = {"name": self.name, "type": self.kind, "memory": self.memory}
        if self.kind == "hvm":
            keys |= {"serial": "pty", "vga": "stdvga"}
        else:
            keys["kernel"] = str(GUESTS / f"tiny-{self.kind}.elf")
        if self.disk:
            backend = "xtool" if self.ours else "phy"
            keys["disk"] = [f"format=raw,vdev=xvda,access=rw,backendtype={backend},target={self.disk}"]
        if self.bridge:
            keys["vif"] = [f"bridge={self.bridge}{',backendtype=xtool' if self.ours else ''}"]
        return keys


class Side(Protocol):
    """One way to do it. ``create`` returns when the guest is there."""

    def create(self, wanted: Wanted) -> None: ...
    def destroy(self, name: str) -> None: ...
    def list_all(self) -> None: ...


class Api:
    """``open_one`` gives a client; each thread gets its own."""

    def __init__(self, open_one: Callable[[], Client]) -> None:
        self._open = open_one
        self._own = threading.local()

    @property
    def _client(self) -> Client:
        if not hasattr(self._own, "client"):
            self._own.client = self._open()
        client: Client = self._own.client
        return client

    def create(self, wanted: Wanted) -> None:
        config = parse_config(json.dumps(wanted.keys()), f"{wanted.name}.yaml", "/")
        self._client.create(config, CreateOptions(paused=wanted.paused))

    def destroy(self, name: str) -> None:
        self._client.destroy(name)

    def list_all(self) -> None:
        self._client.list()

    def names(self) -> list[str]:
        return [domain.name for domain in self._client.list()]


class Commands:
    """A process for each verb. ``program`` is ``xtool`` or ``xl``."""

    def __init__(self, program: str, folder: Path) -> None:
        self._program, self._folder = program, folder

    def create(self, wanted: Wanted) -> None:
        # Each side has files of its own, written before the clock runs: see ``prepare``.
        paused = ["-p"] if wanted.paused else []
        self._run("create", *paused, *(["-q"] if self._program == "xl" else []), str(self.prepare(wanted)))

    def prepare(self, wanted: Wanted) -> Path:
        file = self._folder / f"{wanted.name}-{self._program}.{'cfg' if self._program == 'xl' else 'yaml'}"
        if self._program == "xl":
            text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in wanted.keys().items())
        else:
            text = json.dumps(wanted.keys())
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        return file

    def destroy(self, name: str) -> None:
        self._run("destroy", name)

    def list_all(self) -> None:
        self._run("list")

    def _run(self, *words: str) -> None:
        done = subprocess.run([self._program, *words], capture_output=True, text=True)
        if done.returncode:
            raise BenchError(f"{self._program} {' '.join(words)}: {done.stderr.strip()[-500:]}")


def timed(action: Callable[[], object]) -> float:
    """Seconds."""
    gc.collect()
    began = perf_counter()
    action()
    return perf_counter() - began


@dataclass
class Bench:
    """``bridge`` and ``disk`` are given to guests that want one. ``pss`` gives the bytes of memory that all
    processes but this one have."""

    api: Side
    cold: Side
    xl: Side
    samples: int = 9
    guests: int = 100
    bridge: str = ""
    disks: Path = Path("/tmp")
    pss: Callable[[], int] = lambda: 0
    tell: Callable[[str], None] = lambda text: None
    rows: list[Comparison] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    standing: list[str] = field(default_factory=list)

    def row(self, row: Comparison) -> None:
        self.rows.append(row)
        self.tell(f"{row.name}: {row.ours:.4g} / {row.theirs:.4g} {row.unit} = {row.ratio:.3f} {row.verdict}")

    def figure(self, figure: Figure) -> None:
        self.figures.append(figure)
        self.tell(f"{figure.name}: {figure.value:.4g} {figure.unit} {figure.verdict}")

    def sides(self) -> dict[str, Side]:
        return {"api": self.api, "cold": self.cold, "xl": self.xl}

    def stand_by(self, count: int) -> None:
        """So many guests run beside what is measured."""
        while len(self.standing) < count:
            name = f"{PREFIX}-by-{len(self.standing)}"
            self.api.create(Wanted(name, memory=8))
            self.standing.append(name)
            if not len(self.standing) % 25:
                self.tell(f"{len(self.standing)} guests stand by")

    def leave(self) -> None:
        while self.standing:
            self.api.destroy(self.standing[-1])
            self.standing.pop()

    def turns(
        self, sides: Sequence[str], samples: int = 0, **keys: Any
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Seconds of create and of destroy, by side; the first round does not count."""
        creates: dict[str, list[float]] = {side: [] for side in sides}
        destroys: dict[str, list[float]] = {side: [] for side in sides}
        for number in range((samples or self.samples) + 1):
            for name in sides:
                side = self.sides()[name]
                wanted = self.wanted(f"{PREFIX}-{name}", **keys)
                if isinstance(side, Commands):
                    side.prepare(wanted)
                create = timed(lambda side=side, wanted=wanted: side.create(wanted))  # type: ignore[misc]
                destroy = timed(lambda side=side, wanted=wanted: side.destroy(wanted.name))  # type: ignore[misc]
                if number:
                    creates[name].append(create)
                    destroys[name].append(destroy)
        return creates, destroys

    def wanted(self, name: str, *, disk: bool = False, vif: bool = False, **keys: Any) -> Wanted:
        image = None
        if disk:
            file = self.disks / f"{name}.img"
            if not file.exists():
                file.write_bytes(bytes(1 << 20))
            image = str(file)
        return Wanted(name, disk=image, bridge=self.bridge if vif else None, **keys)
