"""The API's description, for programs (OpenAPI 3.1) and for people, from the tables of routes."""

from __future__ import annotations

from html import escape
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from xtool import __version__
from xtool.client.records import Operation, Problem
from xtool.client.routes import LONG, in_query, words_in
from xtool.client.wire import PROBLEM_TYPE
from xtool.daemon.endpoints import Endpoint, endpoints
from xtool.daemon.own import OWN, Own

_REF = "#/components/schemas/{model}"
_DESCRIPTION = (
    "The verbs of xtool over a Unix socket. Domains are named by their name, number or uuid. Verbs that may "
    "last answer 202 with an operation: follow it at /v1/operations/{id}/events, cancel it by DELETE. Every "
    "error is a problem object; docs/exit-codes.md lists the kinds. The group xtool-ro may only look."
)
_PATH_TEXT = {"type": "string", "minLength": 1, "maxLength": 4096, "pattern": "^[^\\x00]*$"}


class _Schemas:
    """All types at once, so that each stands in the document once."""

    def __init__(self) -> None:
        self._wanted: dict[tuple[str, JsonSchemaMode], TypeAdapter[Any]] = {}
        self.made: dict[tuple[str, JsonSchemaMode], dict[str, Any]] = {}
        self.components: dict[str, Any] = {}

    def want(self, key: str, mode: JsonSchemaMode, kind: Any) -> None:
        self._wanted[key, mode] = kind if isinstance(kind, TypeAdapter) else TypeAdapter(kind)

    def make(self) -> None:
        inputs = [(key, mode, adapter) for (key, mode), adapter in self._wanted.items()]
        made, definitions = TypeAdapter.json_schemas(inputs, ref_template=_REF)
        self.made = {(key, mode): schema for (key, mode), schema in made.items()}
        self.components = definitions.get("$defs", {})


def document() -> dict[str, Any]:
    schemas = _Schemas()
    for method, endpoint in endpoints().items():
        schemas.want(method, "validation", endpoint.model)
        schemas.want(method, "serialization", endpoint.answer)
    for own in OWN:
        if own.answer is not None:
            schemas.want(f"own-{own.name}", "serialization", own.answer)
        schemas.want(f"own-{own.name}", "validation", own.model)
    schemas.want("operation", "serialization", Operation)
    schemas.want("problem", "serialization", Problem)
    schemas.make()
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints().values():
        paths.setdefault(endpoint.route.path, {})[endpoint.route.http.lower()] = _verb(endpoint, schemas)
    for own in OWN:
        paths.setdefault(own.path, {})[own.http.lower()] = _own(own, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": "xtoold", "version": __version__, "description": _DESCRIPTION},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": _without_titles(schemas.components)},
    }


def _verb(endpoint: Endpoint, schemas: _Schemas) -> dict[str, Any]:
    route = endpoint.route
    asked = _resolved(schemas, route.method)
    members, required = dict(asked.get("properties", {})), set(asked.get("required", ()))
    found: dict[str, Any] = {
        "operationId": route.method,
        "summary": route.summary,
        "tags": ["verbs"],
        "x-xtool-access": "look" if route.how == "read" else "change",
    }
    parameters = []
    for name in words_in(route.path):
        members.pop(name, None)
        parameters.append({"name": name, "in": "path", "required": True, "schema": _PATH_TEXT})
    if in_query(route):
        parameters += _query_parameters(members, required)
    elif members:
        body = {
            "type": "object",
            "properties": members,
            "required": sorted(required & set(members)),
            "additionalProperties": False,
        }
        found["requestBody"] = {
            "required": bool(required & set(members)),
            "content": {"application/json": {"schema": body}},
        }
    if parameters:
        found["parameters"] = parameters
    answer = schemas.made[route.method, "serialization"]
    if route.how == LONG:
        follow = {"description": "Where to follow it", "schema": {"type": "string"}}
        said = "Begun. The operation's result will be: " + _name_of(answer)
        good = {"202": _content(said, schemas.made["operation", "serialization"])}
        good["202"]["headers"] = {"Location": follow}
    elif endpoint.streams:
        good = {"200": _content("One record a line", answer, "application/x-ndjson")}
    else:
        good = {"200": _content("Done", answer)}
    return {**found, "responses": {**good, **_problems(schemas)}}


def _own(own: Own, schemas: _Schemas) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": _PATH_TEXT} for name in words_in(own.path)
    ]
    members = _resolved(schemas, f"own-{own.name}").get("properties", {})
    parameters += _query_parameters(members, set())
    good: dict[str, Any] = {"description": own.summary}
    if own.answer is not None:
        good = _content(own.summary, schemas.made[f"own-{own.name}", "serialization"], own.content_type)
        if own.content_type == "text/event-stream":  # of each event
            data = {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": schemas.made[f"own-{own.name}", "serialization"],
            }
            members = {"data": data, "event": {"type": "string"}, "id": {"type": "string"}}
            schema = {"type": "object", "properties": members, "required": ["data"]}
            good["content"] = {own.content_type: {"schema": schema}}
    return {
        "operationId": own.name,
        "summary": own.summary,
        "tags": ["daemon"],
        "x-xtool-access": "look" if own.level == 1 else "change",
        **({"parameters": parameters} if parameters else {}),
        "responses": {str(own.status): good, **_problems(schemas)},
    }


def _query_parameters(members: dict[str, Any], required: set[str]) -> list[dict[str, Any]]:
    made = []
    for name, schema in members.items():
        arms = [arm for arm in schema.get("anyOf", ()) if arm.get("type") != "null"]
        single = (
            arms[0] if len(arms) == 1 else {k: v for k, v in schema.items() if k not in ("title", "default")}
        )
        made.append({"name": name, "in": "query", "required": name in required, "schema": single})
    return made


def _resolved(schemas: _Schemas, key: str) -> dict[str, Any]:
    schema = schemas.made[key, "validation"]
    reference = schema.get("$ref", "")
    return schemas.components[reference.rpartition("/")[2]] if reference else schema


def _content(description: str, schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
    return {"description": description, "content": {kind: {"schema": schema}}}


def _problems(schemas: _Schemas) -> dict[str, Any]:
    schema = schemas.made["problem", "serialization"]
    said = {
        "400": "The request makes no sense",
        "403": "The caller may not do that",
        "404": "There is no such domain, operation or path",
        "405": "Not this method",
        "408": "The request did not come in time",
        "409": "Not in the state that domain or device is in, or not in time",
        "413": "Too large",
        "422": "The configuration is wrong",
        "424": "This host cannot, or Xen or xenstored refused",
        "426": "To be upgraded",
        "429": "Too much at once",
        "431": "Too large a head",
    }
    return {code: _content(text, schema, PROBLEM_TYPE) for code, text in said.items()}


def _name_of(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if schema.get("type") == "array":
        return f"list of {_name_of(schema.get('items', {}))}"
    arms = [_name_of(arm) for arm in schema.get("anyOf", ())]
    return " or ".join(arms) or str(schema.get("type", "anything"))


def _without_titles(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_titles(item)
            for key, item in value.items()
            if not (key == "title" and isinstance(item, str))
        }
    return [_without_titles(item) for item in value] if isinstance(value, list) else value


# --- for people -----------------------------------------------------------------------------------------
_STYLE = """body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
code,pre{font:14px monospace;background:#f4f4f4;padding:.1em .3em}h2{margin-top:2em}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.2em .6em;
border-bottom:1px solid #ddd}section{border-top:2px solid
#ccc;margin-top:1.5em}.m{font-weight:bold;color:#046}"""


def docs_page() -> str:
    """The document as one page that needs nothing else: no script, no network."""
    found = document()
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>xtoold {escape(found['info']['version'])}</title><style>{_STYLE}</style>",
        f"<h1>xtoold</h1><p>{escape(found['info']['description'])}</p>",
        "<p><a href=/openapi.json>openapi.json</a></p><h2>Requests</h2>",
    ]
    for path, methods in found["paths"].items():
        parts += [_request(path, method, said) for method, said in methods.items()]
    parts.append("<h2>Records</h2>")
    parts += [_record(name, schema) for name, schema in sorted(found["components"]["schemas"].items())]
    return "\n".join(parts) + "</html>\n"


def _request(path: str, method: str, said: dict[str, Any]) -> str:
    rows = [
        _row(f"{p['name']} ({p['in']})", p["schema"], p.get("required", False))
        for p in said.get("parameters", ())
    ]
    body = said.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    rows += [
        _row(name, schema, name in body["required"]) for name, schema in body.get("properties", {}).items()
    ]
    code, good = next(iter(said["responses"].items()))
    answer = [_name_of(content["schema"]) for content in good.get("content", {}).values()]
    table = f"<table>{''.join(rows)}</table>" if rows else ""
    return (
        f"<section id={escape(said['operationId'])}><h3><span class=m>{method.upper()}</span> "
        f"<code>{escape(path)}</code></h3><p>{escape(said['summary'])} <i>({said['x-xtool-access']})</i></p>"
        f"{table}<p>{code}: {escape(good['description'])} {escape(' '.join(answer))}</p></section>"
    )


def _record(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = "".join(_row(key, part, key in required) for key, part in schema.get("properties", {}).items())
    return (
        f"<section id={escape(name)}><h3>{escape(name)}</h3><p>{escape(schema.get('description', ''))}</p>"
        f"<table>{rows}</table></section>"
    )


def _row(name: str, schema: dict[str, Any], required: bool) -> str:
    mark = "" if required else " (optional)"
    return (
        f"<tr><td><code>{escape(name)}</code>{mark}<td>{escape(_name_of(schema))}"
        f"<td>{escape(schema.get('description', ''))}</tr>"
    )
