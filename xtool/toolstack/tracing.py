"""What a create does, call by call: every port of the host wrapped, so that each call leaves a span.

A span has a name, when it began and how long it took; of xenstore's requests the path, never a value. The
wrapped host is used for one create; nothing is wrapped where no trace was asked for.

The guest's first signs of life are looked for without taking anything from anybody: the producer index of its
console's ring tells of the first byte, the counters of its interfaces' backends of the first packet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtool.builder.spec import Timeline
from xtool.errors import XtoolError
from xtool.proto.shm import load32
from xtool.toolstack.everydayrecords import TraceSpan
from xtool.toolstack.samples import interfaces
from xtool.toolstack.wiring import records
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.progress import Progress
    from xtool.toolstack.api import CreateOptions, CreateResult
    from xtool.toolstack.host import Host

#: A create that makes more calls than this is cut off.
MOST = 50_000
#: Of ``struct xencons_interface``: what the guest has written so far.
_OUT_PROD = 3084
#: Between two looks for the guest's first signs, seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05


class Tracer:
    """Spans of one create. ``timeline`` is set by it: the stages."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.origin = clock()
        self.epoch = time.time()
        self.timeline: Timeline | None = None
        self.dropped = 0
        self._spans: list[TraceSpan] = []

    def wrap(self, host: Host) -> Host:
        """The same host, whose calls leave spans."""
        hv: Any = _Port(host.hv, "hypercall", self)
        store: Any = _Port(host.store, "xenstore", self)
        hotplug: Any = _Port(host.hotplug, "hotplug", self)
        return replace(host, hv=hv, store=store, hotplug=hotplug, tracer=self)

    def finish(
        self, host: Host, result: CreateResult, options: CreateOptions, progress: Progress
    ) -> CreateResult:
        """See what the guest does first, as ``options`` say; the result with the trace."""
        if options.trace and not options.paused:
            progress.step(f"waiting for the first signs of {result.name}")
            first_signs(host, result.domid, self, options.trace)
        return replace(result, trace=self.spans(result))

    @contextmanager
    def span(self, name: str, category: str, **detail: Any) -> Iterator[dict[str, Any]]:
        """Around something; ``detail`` may be added to within."""
        began = self._clock()
        try:
            yield detail
        except BaseException as error:
            detail["error"] = type(error).__name__
            raise
        finally:
            self.add(TraceSpan(name, category, began - self.origin, self._clock() - began, detail))

    def add(self, span: TraceSpan) -> None:
        if len(self._spans) < MOST:
            self._spans.append(span)
        else:
            self.dropped += 1

    def now(self) -> float:
        """Seconds since the trace began."""
        return self._clock() - self.origin

    def spans(self, result: CreateResult) -> tuple[TraceSpan, ...]:
        """All of them, stages too, below one for the whole; by their beginning."""
        found = list(self._spans)
        if self.timeline is not None:
            shift = self.timeline.origin - self.origin
            found += (
                TraceSpan(s.name, "stage", s.start + shift, s.duration, {"hypercalls": s.hypercalls})
                for s in self.timeline.stages
            )
        end = max((s.start + s.duration for s in found), default=0.0)
        whole = {"domain": result.name, "domid": result.domid, "uuid": result.uuid, "epoch": self.epoch}
        if self.dropped:
            whole["dropped"] = self.dropped
        found.sort(key=lambda span: (span.start, -span.duration))
        return (TraceSpan("create", "create", 0.0, end, whole), *found)


#: Methods that give a context manager whose end is what counts.
_CONTEXTS = ("batch", "transaction")


class _Port:
    """Another object's attributes; its methods are timed."""

    def __init__(self, inner: Any, category: str, tracer: Tracer) -> None:
        self._inner, self._category, self._tracer = inner, category, tracer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value) or name.startswith("_"):
            return value
        timed = self._context(name, value) if name in _CONTEXTS else self._call(name, value)
        # Asked for once; ``count`` and the like stay alive.
        self.__dict__[name] = timed
        return timed

    def _call(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            before = self._count()
            with self._tracer.span(name, self._category, **self._about(args)) as detail:
                result = method(*args, **more)
                if before is not None:
                    detail["hypercalls"] = self._inner.count - before
            return result

        return call

    def _context(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def context(*args: Any, **more: Any) -> Iterator[Any]:
            with self._tracer.span(name, self._category), method(*args, **more) as inside:
                yield inside

        return context

    def _count(self) -> int | None:
        return int(self._inner.count) if self._category == "hypercall" else None

    def _about(self, args: tuple[Any, ...]) -> dict[str, Any]:
        if self._category == "xenstore":
            return {"path": args[0]} if args and isinstance(args[0], str) else {}
        if self._category == "hotplug":
            return {"what": str(args[0])[:200]} if args else {}
        return {"domid": args[0]} if args and isinstance(args[0], int) else {}


# --- the guest's first signs ----------------------------------------------------------------------------
def first_signs(host: Host, domid: int, tracer: Tracer, deadline: float) -> None:
    """Wait up to ``deadline`` seconds for the guest's first console byte and, if it has interfaces, its first
    packet; each leaves a span from now to when it was seen. A guest that ends is not waited for."""
    began, end = tracer.now(), time.monotonic() + deadline
    looks: dict[str, Callable[[], bool]] = {"first console byte": lambda: _wrote(host, domid)}
    if records(host, domid, ("vif",)):
        looks["first packet"] = lambda: _sent(host, domid)
    pause = _FIRST_PAUSE
    while looks and time.monotonic() < end:
        for name, look in list(looks.items()):
            try:
                seen = look()
            except XtoolError:
                return  # it is gone, or its console cannot be looked at
            if seen:
                tracer.add(TraceSpan(name, "guest", began, tracer.now() - began, {"within": pause}))
                del looks[name]
        state = host.hv.domain(domid)
        if state is None or state.dying or state.shutdown:
            return
        time.sleep(pause)
        pause = min(_LONGEST_PAUSE, pause * 1.2)


def _wrote(host: Host, domid: int) -> bool:
    text = host.store.get(f"{paths.console(domid)}/ring-ref") or ""
    if not text.isdecimal() or not int(text):
        return False
    with host.hv.map_foreign(domid, [int(text)], writable=False) as page:
        return load32(page.view, _OUT_PROD) != 0


def _sent(host: Host, domid: int) -> bool:
    found = interfaces(host, domid, Path("/") if host.real else None)
    return any(sample.sent_packets for sample in found)
