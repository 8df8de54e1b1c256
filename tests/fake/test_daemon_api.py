"""The API by its own OpenAPI document: no request gets a 5xx, and every answer is as the document says."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from xtool.client.routes import ROUTES, in_query
from xtool.config import DomainConfig
from xtool.daemon.access import Access, Level, Peer
from xtool.daemon.endpoints import TEXT_MAX
from xtool.daemon.hosts import shared
from xtool.daemon.main import Daemon
from xtool.daemon.openapi import docs_page, document
from xtool.daemon.own import OWN
from xtool.daemon.threads import ThreadRunner
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis.errors import Unsatisfiable  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
#: Of each request, in each mode. XTOOL_LONG asks for more, XTOOL_FUZZ (minutes) for many more.
LONG = bool(os.environ.get("XTOOL_LONG"))
EXAMPLES = (6 if LONG else 2) + 20 * int(os.environ.get("XTOOL_FUZZ") or 0)


class Everybody(Access):
    """A TCP connection has no peer the kernel knows: for this test only."""

    def peer(self, connection: socket.socket) -> Peer:
        return Peer(0, 0, Level.FULL)


class Api(NamedTuple):
    schema: Any
    url: str


@cache
def _loaded() -> Any:
    found = json.loads(json.dumps(document()))
    return schemathesis.openapi.from_dict(found if LONG else _without_long_texts(found))


def _without_long_texts(value: Any) -> Any:
    """To make up a text of more than 4096 characters takes seconds: ``test_texts_that_are_too_long``."""
    if isinstance(value, dict):
        long = isinstance(value.get("maxLength"), int) and value["maxLength"] >= TEXT_MAX
        return {k: _without_long_texts(v) for k, v in value.items() if not (long and k == "maxLength")}
    return [_without_long_texts(item) for item in value] if isinstance(value, list) else value


@pytest.fixture
def api(host: Host, config: Callable[..., DomainConfig], tmp_path: Path) -> Iterator[Api]:
    (tmp_path / "run").mkdir()
    LocalClient(host).create(config("pv", name="web"), CreateOptions())
    hosts = shared(host)
    daemon = Daemon(hosts, ThreadRunner(hosts), Everybody())
    listener = socket.create_server(("127.0.0.1", 0))
    daemon.start([listener], adopt=False)
    assert daemon.watcher.ready.wait(20)
    yield Api(_loaded(), f"http://127.0.0.1:{listener.getsockname()[1]}")
    daemon.close()


def _requests() -> Iterator[Any]:
    for path, methods in document()["paths"].items():
        for method, said in methods.items():
            # In a path all are texts: whether there is a wrong one takes the generator hundreds of attempts.
            only_texts = "requestBody" not in said and all(
                parameter["in"] == "path" for parameter in said.get("parameters", [])
            )
            for mode in GenerationMode:
                if LONG or mode is GenerationMode.POSITIVE or not only_texts:
                    word = path.strip("/").replace("/", ".")
                    yield pytest.param(path, method, mode, id=f"{word}-{method}-{mode.name.lower()}")


@pytest.mark.parametrize(("path", "method", "mode"), list(_requests()))
def test_whatever_is_asked(api: Api, path: str, method: str, mode: GenerationMode) -> None:
    """``positive``: as the document wants it; ``negative``: against it somewhere, which must be refused."""
    asked = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.generate],  # what fails tells enough; making it smaller asks hundreds of times
    )
    @seed(7)
    @given(case=api.schema[path][method.upper()].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        nonlocal asked
        asked += 1
        _aim(case)
        began = time.monotonic()
        case.validate_response(case.call(base_url=api.url, timeout=20), checks=CHECKS)
        assert time.monotonic() - began < 10

    try:
        ask()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE  # nothing can be wrong with a request of no arguments
        return
    assert asked


@pytest.mark.parametrize(
    "body", [b"\t", b" ", b"\r\n", b"null", b"[]", b"1", b'"a"', b"{", b"\xff", b"{} {}", b"\0"]
)
def test_a_body_that_is_no_object(api: Api, body: bytes) -> None:
    """A body is a JSON object, or there is none; those that take none take not even a blank."""
    link = http.client.HTTPConnection(api.url.removeprefix("http://"), timeout=20)
    for route in [*ROUTES.values(), *OWN]:
        path = re.sub(r"{\w+}", "1", route.path)
        link.request(route.http, path, body, {"content-type": "application/json"})
        answer = link.getresponse()
        said = json.loads(answer.read())
        assert (answer.status, said["kind"]) == (400, "Usage"), (route, said)
    link.close()


def test_texts_that_are_too_long(api: Api) -> None:
    link = http.client.HTTPConnection(api.url.removeprefix("http://"), timeout=20)
    asked = 0
    for route in ROUTES.values():
        if "{domain}" not in route.path:
            continue
        path = re.sub(r"{\w+}", "1", route.path.replace("{domain}", "x" * (TEXT_MAX + 1)))
        link.request(route.http, path, None if in_query(route) else b"{}")
        answer = link.getresponse()
        said = json.loads(answer.read())
        assert answer.status == 400 and f"at most {TEXT_MAX} characters" in said["detail"], (route, said)
        asked += 1
    link.close()
    assert asked > 20


def _aim(case: Any) -> None:
    """Half of what names a domain names the one there is; nothing waits for long."""
    query = case.query
    if isinstance(query, dict):
        if "follow" not in query and case.path.endswith("/events"):
            query["follow"] = "false"
        if query.get("follow") in (True, "true"):
            query["follow"] = "false"
        if case.path.endswith("/console"):
            query.setdefault("deadline", 0.05)  # its default is ten seconds
        for name in ("deadline", "wait"):
            if isinstance(query.get(name), (int, float)):
                query[name] = min(query[name], 0.05)
    parameters = case.path_parameters
    if (
        isinstance(parameters, dict)
        and isinstance(parameters.get("domain"), str)
        and len(str(parameters)) % 2
    ):
        parameters["domain"] = "web"


def test_the_document_has_every_verb() -> None:
    found = document()
    names = {said["operationId"] for methods in found["paths"].values() for said in methods.values()}
    assert set(ROUTES) <= names and {"events", "operations", "cancel"} <= names
    assert all(reference in _components(found) for reference in _references(found))


def test_the_page_for_people_needs_nothing_else() -> None:
    page = docs_page()
    assert "<script" not in page and "http:" not in page and "https:" not in page
    for route in ROUTES.values():
        assert route.path in page and escape(route.summary) in page


def _components(found: dict[str, Any]) -> set[str]:
    return {f"#/components/schemas/{name}" for name in found["components"]["schemas"]}


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)
