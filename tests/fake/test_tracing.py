"""The trace of a create: what is in it, and what Chrome and OpenTelemetry read."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtool.cli import app
from xtool.cli.remoteargs import split_file, split_trace
from xtool.config import DomainConfig
from xtool.errors import HypercallError, UsageError
from xtool.fake.hypervisor import FakeHypervisor
from xtool.toolstack import traceformat, tracing
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.everydayrecords import TraceSpan
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

Config = Callable[..., DomainConfig]
TRACED = CreateOptions(devices=0.3, trace=0.0)


@pytest.fixture
def client(host: Host) -> LocalClient:
    return LocalClient(host)


def by(spans: tuple[TraceSpan, ...], category: str) -> list[TraceSpan]:
    return [span for span in spans if span.category == category]


def test_every_call_is_there(host: Host, client: LocalClient, config: Config, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(4096))
    before = host.hv.count
    done = client.create(config(disk=f"['{tmp_path}/a,raw,xvda']", vif="['bridge=xenbr0']"), TRACED)
    calls = host.hv.count - before
    whole = done.trace[0]
    assert (whole.category, whole.detail["domain"], whole.detail["domid"]) == ("create", "test", done.domid)
    stages = [span.name for span in by(done.trace, "stage")]
    assert stages == [span.name for span in done.timings] and "devices" in stages
    named = {span.name for span in by(done.trace, "hypercall")}
    assert {"create_domain", "populate", "map_foreign", "pin_l4_table", "unpause_domain"} <= named
    counted = sum(span.detail["hypercalls"] for span in by(done.trace, "hypercall"))
    assert 0 <= calls - counted <= 2  # what recovery asks before it is not the create's
    store = by(done.trace, "xenstore")
    assert {"atomically", "introduce"} <= {span.name for span in store}
    assert {"open_disk", "plug"} <= {span.name for span in by(done.trace, "hotplug")}
    starts = [span.start for span in done.trace]
    assert starts == sorted(starts) and all(s.duration >= 0 and s.start >= 0 for s in done.trace)
    assert all(s.start + s.duration <= whole.duration + 1e-9 for s in done.trace)
    # The client's own host is as it was.
    assert isinstance(client.host.hv, FakeHypervisor) and client.host.tracer is None


def test_without_being_asked_there_is_none(client: LocalClient, config: Config) -> None:
    assert client.create(config(), CreateOptions()).trace == ()


def test_no_value_of_xenstores_is_in_a_trace(client: LocalClient, config: Config) -> None:
    done = client.create(config(name="secret-name"), TRACED)
    assert all("secret-name" not in json.dumps(span.detail) for span in by(done.trace, "xenstore"))


def test_a_call_that_fails_says_so(host: Host) -> None:
    tracer = tracing.Tracer()
    wrapped = tracer.wrap(host)
    with pytest.raises(HypercallError):
        wrapped.hv.pause_domain(99)
    with wrapped.store.batch() as batch:
        batch.write("/x", "y")
    assert wrapped.store.get("/x") == "y"
    spans = tracer._spans
    assert [s.name for s in spans] == ["pause_domain", "batch", "get"]
    assert spans[0].detail["error"] == "HypercallError" and spans[2].detail == {"path": "/x"}


def test_a_trace_is_bounded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MOST", 3)
    tracer = tracing.Tracer()
    wrapped = tracer.wrap(host)
    for _ in range(10):
        wrapped.store.get("/x")
    assert len(tracer._spans) == 3 and tracer.dropped == 7


def test_the_first_console_byte(host: Host, client: LocalClient, config: Config) -> None:
    """The guest writes while somebody waits: the producer index of its console's ring tells."""
    hv = host.hv
    assert isinstance(hv, FakeHypervisor)
    done = client.create(config("pvh"), CreateOptions())
    gfn = int(host.store.read_text(f"/local/domain/{done.domid}/console/ring-ref"))
    tracer = tracing.Tracer()
    tracing.first_signs(host, done.domid, tracer, 0.05)
    assert tracer._spans == []  # nothing yet

    def write() -> None:
        with hv.map_foreign(done.domid, [gfn]) as page:
            page.view[3084:3088] = struct.pack("<I", 5)

    timer = threading.Timer(0.2, write)
    timer.start()
    tracing.first_signs(host, done.domid, tracer, 60.0)
    timer.join()
    [span] = tracer._spans
    assert span.name == "first console byte" and 0.05 < span.duration < 50


def test_a_guest_that_ends_is_not_waited_for(host: Host, client: LocalClient, config: Config) -> None:
    done = client.create(config(), CreateOptions())
    host.hv.shutdown_domain(done.domid, 3)
    tracing.first_signs(host, done.domid, tracing.Tracer(), 3600.0)
    client.destroy("test")
    tracing.first_signs(host, done.domid, tracing.Tracer(), 3600.0)


def test_the_first_packet(
    host: Host, client: LocalClient, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = client.create(config("pvh", vif="['bridge=xenbr0']"), CreateOptions(devices=0.3))
    sent = iter([False, False, True])
    monkeypatch.setattr(tracing, "_wrote", lambda host, domid: True)
    monkeypatch.setattr(tracing, "_sent", lambda host, domid: next(sent))
    tracer = tracing.Tracer()
    tracing.first_signs(host, done.domid, tracer, 60.0)
    assert [span.name for span in tracer._spans] == ["first console byte", "first packet"]


# --- formats --------------------------------------------------------------------------------------------
SPANS = (
    TraceSpan("create", "create", 0.0, 2.0, {"uuid": "u", "epoch": 1700000000.5, "domid": 3}),
    TraceSpan("memory", "stage", 0.5, 1.0, {"hypercalls": 7}),
    TraceSpan("populate", "hypercall", 0.6, 0.25, {"domid": 3}),
    TraceSpan("get", "xenstore", 1.75, 0.1, {"path": "/x", "error": "StoreError"}),
    TraceSpan("first console byte", "guest", 1.9, 0.1, {}),
)


def test_chromes_format() -> None:
    events = traceformat.chrome(SPANS)["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found = [e for e in events if e["ph"] == "X"]
    assert [(e["name"], lanes[e["tid"]]) for e in found] == [(s.name, s.category) for s in SPANS]
    assert (found[2]["ts"], found[2]["dur"], found[2]["args"]) == (600000.0, 250000.0, {"domid": 3})


def test_opentelemetrys_format() -> None:
    [resource] = traceformat.otlp(SPANS)["resourceSpans"]
    [scope] = resource["scopeSpans"]
    spans = {span["name"]: span for span in scope["spans"]}
    ids = {name: span["spanId"] for name, span in spans.items()}
    assert len(set(ids.values())) == len(SPANS) and all(len(i) == 16 for i in ids.values())
    assert {span["traceId"] for span in spans.values()} == {spans["create"]["traceId"]}
    assert len(spans["create"]["traceId"]) == 32 and "parentSpanId" not in spans["create"]
    assert spans["populate"]["parentSpanId"] == ids["memory"]
    assert {spans[n]["parentSpanId"] for n in ("memory", "get", "first console byte")} == {ids["create"]}
    assert spans["memory"]["startTimeUnixNano"] == "1700000001000000000"
    assert spans["get"]["status"] == {"code": 2}
    assert {"key": "domid", "value": {"intValue": "3"}} in spans["populate"]["attributes"]


_DETAIL = st.dictionaries(
    st.text(max_size=5), st.one_of(st.text(), st.integers(), st.booleans(), st.floats(0, 1))
)
_SPAN = st.builds(
    TraceSpan,
    st.text(),
    st.sampled_from(traceformat.CATEGORIES),
    st.floats(0, 1e4),
    st.floats(0, 1e4),
    _DETAIL,
)


@given(spans=st.lists(_SPAN, max_size=6), form=st.sampled_from(traceformat.FORMATS))
def test_any_trace_is_valid_json(spans: list[TraceSpan], form: str) -> None:
    text = traceformat.render(spans, form)
    made: dict[str, Any] = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    if form == "chrome":
        assert len([e for e in made["traceEvents"] if e["ph"] == "X"]) == len(spans)


@pytest.mark.parametrize(
    ("file", "wanted", "form"),
    [
        ("a.json", "", "chrome"),
        ("a.otlp", "", "otlp"),
        ("a.otlp.json", "", "otlp"),
        ("a.otlp", "chrome", "chrome"),
    ],
)
def test_the_format_goes_by_name_or_option(file: str, wanted: str, form: str) -> None:
    assert traceformat.format_of(file, wanted) == form
    with pytest.raises(UsageError):
        traceformat.format_of(file, "jaeger")


# --- the command line -----------------------------------------------------------------------------------
def test_create_writes_it(
    client: LocalClient, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client.close = lambda: None  # type: ignore[method-assign]
    file = tmp_path / "guest.yaml"
    file.write_text(config().to_yaml())
    trace = tmp_path / "t.json"
    argv = ["create", str(file), "--trace", str(trace), "--trace-wait", "0", "-o", "json"]
    assert app.main(argv, opener=lambda: client) == 0
    assert json.loads(capsys.readouterr().out)["trace"] == []  # it is in its file
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"create", "memory", "populate", "introduce"} <= names
    assert app.main([*argv[:2], "--trace-format", "otlp"], opener=lambda: client) == 2
    assert app.main([*argv[:3], str(trace), "--dry-run"], opener=lambda: client) == 2
    # A trace that cannot be written is no reason to have no domain.
    client.destroy("test")
    assert app.main([*argv[:3], str(tmp_path / "no/t.json"), "--trace-wait=0"], opener=lambda: client) == 0
    assert "cannot be written" in capsys.readouterr().err and client.list("test")


def test_a_trace_is_of_one_domain(
    client: LocalClient, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client.close = lambda: None  # type: ignore[method-assign]
    file, trace = tmp_path / "two.yaml", tmp_path / "t.json"
    file.write_text(f"{config(name='one').to_yaml()}---\n{config(name='two').to_yaml()}")
    argv = ["create", str(file), "--trace", str(trace), "--trace-wait", "0"]
    assert app.main(argv, opener=lambda: client) == 2
    assert "--trace is for one domain" in capsys.readouterr().err
    assert not trace.exists() and client.list() == []
    assert app.main([*argv, "--only", "two"], opener=lambda: client) == 0
    assert json.loads(trace.read_text())["traceEvents"]
    assert [each.name for each in client.list()] == ["two"]


def test_with_h_the_file_is_fetched() -> None:
    argv = ["create", "--trace", "t.otlp", "web.yaml", "--trace-wait", "3", "-o", "json"]
    file, _, rest = split_file(argv)
    assert file == "web.yaml" and rest == ["create", "--trace", "t.otlp", "--trace-wait", "3", "-o", "json"]
    made, [(there, here)] = split_trace(rest)
    assert here == "t.otlp" and there.startswith("/tmp/xtool-trace-") and there.endswith(".otlp")
    assert made == ["create", "--trace", there, *rest[3:]]
    assert split_trace(["create", "--trace=x.json"])[1][0][1] == "x.json"
    assert split_trace(["list"]) == (["list"], [])


def test_a_create_without_a_trace_imports_nothing_of_it() -> None:
    code = (
        "import sys; from xtool.cli.app import main; main(['create', '--help']);"
        "print([m for m in sys.modules if 'trac' in m and m.startswith('xtool')], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
