"""A trace as others read it: Chrome's trace events (chrome://tracing, Perfetto) and OpenTelemetry's JSON.
Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from xtool.errors import UsageError
from xtool.toolstack.everydayrecords import TraceSpan

FORMATS = ("chrome", "otlp")
#: Each category is a line of its own in Chrome's picture, in this order.
CATEGORIES = ("create", "stage", "hypercall", "xenstore", "hotplug", "qemu", "guest")


def format_of(file: str, wanted: str = "") -> str:
    """``wanted``, or what the file's name says: ``.otlp`` and ``.otlp.json`` are OpenTelemetry's.

    Raises ``UsageError`` for a format that is none.
    """
    if wanted and wanted not in FORMATS:
        raise UsageError(f"unknown trace format {wanted!r}", hint=f"it is one of {', '.join(FORMATS)}")
    return wanted or ("otlp" if file.endswith((".otlp", ".otlp.json")) else "chrome")


def render(spans: Sequence[TraceSpan], form: str) -> str:
    """JSON text of ``form``."""
    made = chrome(spans) if form == "chrome" else otlp(spans)
    return json.dumps(made, indent=1) + "\n"


def chrome(spans: Sequence[TraceSpan]) -> dict[str, Any]:
    """Trace Event Format: complete events (``X``), times in microseconds."""
    names: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": category}}
        for number, category in enumerate(CATEGORIES, 1)
    ]
    names.append({"name": "process_name", "ph": "M", "pid": 1, "tid": 1, "args": {"name": "xtool create"}})
    events = [
        {
            "name": span.name,
            "cat": span.category,
            "ph": "X",
            "ts": round(span.start * 1e6, 3),
            "dur": round(span.duration * 1e6, 3),
            "pid": 1,
            "tid": CATEGORIES.index(span.category) + 1,
            "args": span.detail,
        }
        for span in spans
    ]
    return {"traceEvents": [*names, *events], "displayTimeUnit": "ms"}


def otlp(spans: Sequence[TraceSpan]) -> dict[str, Any]:
    """OTLP/JSON, as an ``otlphttp`` exporter sends it. The first span is the whole, the parent of the
    stages; a stage is the parent of what lies within it."""
    if not spans:
        return {"resourceSpans": []}
    whole = spans[0]
    epoch = float(whole.detail.get("epoch", 0.0))
    seed = f"{whole.detail.get('uuid')} {epoch}"
    trace = sha256(seed.encode()).hexdigest()[:32]
    ids = [sha256(f"{seed} {number}".encode()).hexdigest()[:16] for number in range(len(spans))]
    stages = [number for number, span in enumerate(spans) if span.category == "stage"]
    made = []
    for number, span in enumerate(spans):
        one: dict[str, Any] = {
            "traceId": trace,
            "spanId": ids[number],
            "name": span.name,
            "kind": 1,  # SPAN_KIND_INTERNAL
            "startTimeUnixNano": str(_nanoseconds(epoch, span.start)),
            "endTimeUnixNano": str(_nanoseconds(epoch, span.start + span.duration)),
            "attributes": _attributes({"category": span.category, **span.detail}),
            "status": {"code": 2} if "error" in span.detail else {},
        }
        if number:
            one["parentSpanId"] = ids[_parent(spans, number, stages)]
        made.append(one)
    resource = {"attributes": _attributes({"service.name": "xtool"})}
    return {
        "resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {"name": "xtool"}, "spans": made}]}]
    }


def _parent(spans: Sequence[TraceSpan], number: int, stages: Sequence[int]) -> int:
    """The shortest stage that ``number`` lies in; else the whole."""
    span = spans[number]
    if span.category in ("stage", "guest"):
        return 0
    around = [
        stage
        for stage in stages
        if spans[stage].start <= span.start
        and span.start + span.duration <= spans[stage].start + spans[stage].duration
    ]
    return min(around, key=lambda stage: spans[stage].duration, default=0)


def _nanoseconds(epoch: float, seconds: float) -> int:
    return int(epoch * 1e9) + int(seconds * 1e9)


def _attributes(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in values.items()]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    return {"doubleValue": value} if isinstance(value, float) else {"stringValue": str(value)}
