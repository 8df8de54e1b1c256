"""The JSON Schema of domain files, for editors: made from the model, so that the two cannot differ.

A validator of ``units.py`` and its neighbours that knows its values says so in an attribute: ``choices``,
``later`` or ``bounds``; the kind of a key (``key()`` in ``model.py``) says the rest. The schema is for what
YAML makes of a file, so it allows what the model allows and refuses what can be seen without the model: a
wrong unit, a misspelt word, a key without effect for the domain's type. It is no template's: what ``{{ }}``
stands for is not known to an editor.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from xtool.config.devices import ChannelConfig, DiskConfig, VifConfig
from xtool.config.field import ALL
from xtool.config.hvmwords import ENLIGHTENMENTS, SMBIOS
from xtool.config.model import FIELDS, MERGED, about, guests_of
from xtool.config.ready import ReadyConfig
from xtool.config.seed import CloudInitConfig
from xtool.config.specs import DISK_FLAGS, VIF_FLAGS
from xtool.config.units import MIB
from xtool.config.xlkeys import INSTEAD, UNSUPPORTED

Schema = dict[str, Any]
#: Its name; it is published beside the documentation.
ID = "xtool.schema.json"
_SWITCH: Schema = {"enum": [True, False, 0, 1, "yes", "no", "on", "off"]}
_TEXT: Schema = {"type": ["string", "integer", "number", "boolean"]}
_SIZE_TEXT = r"^\s*[0-9]{1,12}\s*([kKmMgGtT]([iI][bB])?)?\s*$"
_NUMBER_TEXT = r"^-?(0x[0-9a-fA-F]+|[0-9]+)$"
_EXAMPLES = {
    "name": ["web"],
    "uuid": ["8d2a5d4e-3c6f-4a52-9b3e-2f7f8f0b1c2d"],
    "memory": [512, "2GiB"],
    "maxmem": ["4GiB"],
    "cpus": ["0-3,^1", "nodes:0", ["0", "1"]],
    "kernel": ["/boot/vmlinuz"],
    "cmdline": ["root=/dev/xvda1 console=hvc0"],
    "disk": [[{"vdev": "xvda", "target": "web.img"}], ["/images/web.img,raw,xvda,rw"]],
    "vif": [[{"bridge": "xenbr0"}], ["mac=00:16:3e:12:34:56,bridge=xenbr0"]],
    "serial": ["pty"],
    "vnclisten": ["127.0.0.1", "0.0.0.0:1"],
    "boot": ["dc"],
    "viridian": [True, ["defaults", "synic"]],
    "smbios": [{"system_product_name": "web"}],
    "cloud_init": [{"user_data": {"hostname": "web", "ssh_authorized_keys": ["ssh-ed25519 AAAA..."]}}],
    "depends_on": ["db", ["db", "cache"]],
    "ready": [{"tcp": "10.0.0.5:5432", "timeout": "2m"}, {"xenstore": "data/ready=1"}],
    "extends": ["webserver", ["base.yaml", "../web.yaml"]],
}


def domain_schema(*, template: bool = False) -> Schema:
    """Of one document; ``template``: of a file that others extend, where nothing is required."""
    properties: dict[str, Schema] = {}
    for name in FIELDS:
        properties[name] = {**_of_key(name), "description": _about_key(name)}
    for name, text in MERGED.items():
        properties[name] = {**_TEXT, "description": text}
    properties["extends"] = {
        "description": "templates this domain is built on, by name or path; what is here wins",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    for name, examples in _EXAMPLES.items():
        properties[name]["examples"] = examples
    for name, reason in UNSUPPORTED.items():
        hint = INSTEAD.get(name, f"remove {name}")
        properties[name] = {"not": {}, "description": f"xl's {name} is not supported: {reason}. {hint}"}
    whole: Schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": ID,
        "title": "xtool domain file",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "allOf": [_for_guest(guest) for guest in ALL],
    }
    if not template:
        whole["required"] = ["name"]
        whole["anyOf"] = [{"required": ["extends"]}, {"required": ["type", "memory"]}]
        whole["allOf"].append(
            {
                "if": {"properties": {"type": {"enum": ["pv", "pvh"]}}, "required": ["type"]},
                "then": {"anyOf": [{"required": ["extends"]}, {"required": ["kernel"]}]},
            }
        )
    return whole


def _about_key(name: str) -> str:
    guests = guests_of(name)
    parts = [FIELDS[name].description or ""]
    if default := about(name, "default"):
        parts.append(f"default: {default}")
    elif FIELDS[name].default not in (None, ()):
        parts.append(f"default: {str(FIELDS[name].default).lower()}")
    if len(guests) < len(ALL):
        parts.append(f"for type: {' or '.join(guests)}")
    return "; ".join(parts)


def _for_guest(guest: str) -> Schema:
    """Keys without effect for a type are refused."""
    useless = {name: False for name in FIELDS if guest not in guests_of(name)}
    condition = {"properties": {"type": {"const": guest}}, "required": ["type"]}
    return {"if": condition, "then": {"properties": useless}}


def _of_key(name: str) -> Schema:
    kind = about(name, "kind")
    devices: dict[str, tuple[type[BaseModel], dict[str, tuple[str, str]]]] = {
        "disk": (DiskConfig, DISK_FLAGS),
        "vif": (VifConfig, VIF_FLAGS),
        "channel": (ChannelConfig, {}),
    }
    if name in devices:
        return {"type": "array", "items": {"anyOf": [{"type": "string"}, _of_model(*devices[name])]}}
    if name == "cloud_init":
        return _of_cloud_init()
    if name == "ready":
        return {**_of_model(ReadyConfig, {}), "minProperties": 1}
    if name == "viridian":
        words = [*ENLIGHTENMENTS, "defaults", "all"]
        return {"anyOf": [_SWITCH, {"type": "array", "items": {"enum": [*words, *(f"!{w}" for w in words)]}}]}
    if name == "smbios":
        strings = {word: {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]} for word in SMBIOS}
        entries = {"type": "string", "pattern": f"^({'|'.join(SMBIOS)})="}
        mapping = {"type": "object", "properties": strings, "additionalProperties": False}
        return {"anyOf": [mapping, {"type": "array", "items": entries}]}
    return _of_field(FIELDS[name], kind)


def _of_field(field: FieldInfo, kind: str) -> Schema:
    """From the kind, and what the validators know."""
    known = _known(field)
    choices = known.get("choices")
    if kind in ("choice", "action") and choices:
        return {"enum": choices}
    if kind == "choice or path":
        return {"anyOf": [{"enum": choices}, {"type": "string", "pattern": "/"}]}
    if kind == "switch":
        return dict(_SWITCH)
    if kind in ("number", "seconds"):
        return {"anyOf": [{"type": "integer", **_bounds(known, 1)}, {"type": "string", "pattern": "^-?0x"}]}
    if kind == "size":
        return {
            "anyOf": [
                {"type": "integer", **_bounds(known, MIB)},
                {"type": "string", "pattern": _SIZE_TEXT},
            ]
        }
    if kind == "uuid":
        return {"type": "string", "pattern": "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"}
    if kind in ("text or list", "list"):
        return {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
    if kind == "path":
        return {"type": "string", "minLength": 1, "pattern": "^[^~]"}
    return dict(_TEXT)


def _bounds(known: Schema, unit: int) -> Schema:
    low, high = known.get("bounds", (None, None))
    found = {"minimum": low, "maximum": high}
    return {name: value // unit for name, value in found.items() if value is not None}


def _known(field: FieldInfo) -> Schema:
    """``choices`` and ``bounds`` of a field's validators."""
    found: Schema = {}
    for validator in (*field.metadata, *_metadata(field.annotation)):
        function = getattr(validator, "func", None)
        for name in ("choices", "bounds"):
            if hasattr(function, name):
                found.setdefault(name, getattr(function, name))
    return found


def _metadata(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        yield from metadata
        yield from _metadata(inner)
    elif get_origin(annotation) in (Union, types.UnionType):
        for each in get_args(annotation):
            yield from _metadata(each)


def _of_model(model: type[BaseModel], flags: dict[str, tuple[str, str]]) -> Schema:
    """Sub-keys as ``docs/configuration.md`` has them, and xl's flags as switches."""
    properties: dict[str, Schema] = {flag: dict(_SWITCH) for flag in flags}
    required = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        known = _known(field)
        if "choices" in known:
            schema: Schema = {"enum": known["choices"]}
        elif bool in (field.annotation, *get_args(field.annotation)):
            schema = dict(_SWITCH)
        elif "bounds" in known:
            schema = {"type": "integer", **_bounds(known, 1)}
        elif key == "forwards":
            schema = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]}
        else:
            schema = dict(_TEXT)
        properties[key] = {**schema, "description": field.description or ""}
        if field.is_required():
            required.append(key)
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "required": required,
    }


def _of_cloud_init() -> Schema:
    described = {name: field.description or "" for name, field in CloudInitConfig.model_fields.items()}
    document = {"type": ["object", "string"]}
    starts = (
        r"^(#cloud-config|#!|#include|#cloud-boothook|#part-handler|## template:|[Cc]ontent-[Tt]ype:|MIME-)"
    )
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "user_data": {
                "anyOf": [{"type": "object"}, {"type": "string", "pattern": starts}],
                "description": described["user_data"],
            },
            "user_data_file": {"type": "string", "description": "a file with the user-data as it is"},
            "meta_data": {**document, "description": described["meta_data"]},
            "network_config": {**document, "description": described["network_config"]},
            "network_config_file": {"type": "string", "description": "a file with the network-config"},
            "vdev": {"type": "string", "description": described["vdev"]},
        },
    }


def schema_text(*, template: bool = False) -> str:
    """As it is published, with a line's end at its end."""
    import json

    return json.dumps(domain_schema(template=template), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write(schema_text())
