"""``cloud_init:``: what a guest's cloud-init finds on its NoCloud seed.

Facts about cloud-init's NoCloud source: a file system labelled ``cidata`` or ``CIDATA`` with the files
``user-data`` and ``meta-data``, and ``network-config`` if there is any. ``instance-id`` is how it knows a
first boot from a later one. User-data is acted upon by its first line (``#cloud-config``, ``#!``, ...) and
ignored without one of those. Its YAML reader is PyYAML's.

Maps in the domain file become YAML text with every scalar as it was written (``"1"`` stays a text, ``1`` a
number); nothing in them is checked. Texts and files are taken as they are. All of it may hold secrets: it is
in no message and in no ``repr``.
"""

from __future__ import annotations

from io import StringIO
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from xtool.config.nodes import MapNode, Scalar, Source, parse_yaml
from xtool.config.rules import Broken, refuse_all
from xtool.config.units import refused, shown, to_path
from xtool.config.vdev import vdev_number
from xtool.errors import ConfigError

#: The most of one text: cloud-init reads it into memory as a whole.
MAX_SEED = 1 << 20
_FILES = {"user_data_file": "user_data", "network_config_file": "network_config"}
_STARTS = ("#cloud-config", "#!", "#include", "#cloud-boothook", "#part-handler", "## template:")
_MIME = ("content-type:", "mime-version:")
SUBKEYS = ("user_data", "user_data_file", "meta_data", "network_config", "network_config_file", "vdev")


def to_yaml(value: Any) -> str:
    """Plain lists, dicts and ``Scalar``s as YAML text, scalars with the types they were written with."""
    import yaml

    return str(yaml.serialize(_node(value), Dumper=yaml.SafeDumper, allow_unicode=True, width=100))


def _node(value: Any) -> Any:
    import yaml

    if isinstance(value, dict):
        pairs = [(_text(str(name)), _node(item)) for name, item in value.items()]
        return yaml.MappingNode("tag:yaml.org,2002:map", pairs, flow_style=False)
    if isinstance(value, (list, tuple)):
        return yaml.SequenceNode("tag:yaml.org,2002:seq", [_node(item) for item in value], flow_style=False)
    if isinstance(value, Scalar) and value.empty:
        return yaml.ScalarNode("tag:yaml.org,2002:null", "null")
    if isinstance(value, Scalar) and not value.quoted:
        # The tag that the plain text resolves to: so it is written plain again.
        resolver: Any = yaml.SafeLoader("")
        tag = resolver.resolve(yaml.ScalarNode, str(value), (True, False))
        return yaml.ScalarNode(tag, str(value))
    if isinstance(value, str):
        return _text(str(value))
    return yaml.SafeDumper(StringIO()).represent_data(value)


def _text(text: str) -> Any:
    import yaml

    style = "|" if "\n" in text else None
    return yaml.ScalarNode("tag:yaml.org,2002:str", text, style=style)


def _checked(text: str) -> str:
    for char in text:
        if (
            (ord(char) < 0x20 and char not in "\n\t\r")
            or 0x7F <= ord(char) < 0xA0
            or 0xD800 <= ord(char) < 0xE000
        ):
            raise refused(f"{char!a} is not allowed in it")
    if len(text.encode()) > MAX_SEED:
        raise refused("it is too long", f"{MAX_SEED >> 10} KiB at most")
    return text


def _to_user_data(value: Any) -> str:
    if isinstance(value, dict):
        return _checked("#cloud-config\n" + to_yaml(value)) if value else "#cloud-config\n{}\n"
    if not isinstance(value, str):
        raise refused(f"text or a map is wanted, not {shown(value)}")
    text = _checked(str.__str__(value))
    if not text.startswith(_STARTS) and not text.lower().startswith(_MIME):
        raise refused(
            "cloud-init would ignore this: it does not begin with #cloud-config or #!",
            "write a map, or begin the text with #cloud-config",
        )
    return text


def _to_document(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return _checked(to_yaml(value))
    if not isinstance(value, str) or not value.strip():
        raise refused("text or a map is wanted here")
    return _checked(str.__str__(value))


def _to_meta_data(value: Any) -> str:
    if isinstance(value, dict):
        return _checked(to_yaml(value)) if value else ""
    if not isinstance(value, str) or not (value == "" or _is_map(value)):
        what = shown(value) if not isinstance(value, str) else "other text"
        raise refused(f"a map is wanted, not {what}", "as in: meta_data: {local-hostname: web}")
    return _checked(str.__str__(value))


def _is_map(text: str) -> bool:
    """Whether a text is a YAML map, and no more than a map: ours are added to it."""
    source = Source("meta_data", text)
    try:
        root = parse_yaml(source, str.__str__(text))
    except ConfigError:
        return False
    return isinstance(root, MapNode)


def _to_seed_vdev(value: Any) -> str:
    word = str(value).strip()
    if vdev_number(word) is None:
        raise refused(f"{shown(word)} is no virtual device", "use xvdz, or hdc or hdd for an hvm guest")
    return word


class CloudInitConfig(BaseModel):
    """What is on the seed, as texts; ``meta_data`` is what the file adds to what xtool gives."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, defer_build=True)

    user_data: Annotated[str, BeforeValidator(_to_user_data)] = Field(
        "#cloud-config\n{}\n",
        repr=False,
        description="a map, which becomes #cloud-config, or the text itself; user_data_file names a file",
    )
    meta_data: Annotated[str, BeforeValidator(_to_meta_data)] = Field(
        "", repr=False, description="a map: more than instance-id (the uuid) and local-hostname (the name)"
    )
    network_config: Annotated[str, BeforeValidator(_to_document)] | None = Field(
        None, repr=False, description="a map or text; network_config_file names a file"
    )
    vdev: Annotated[str, BeforeValidator(_to_seed_vdev)] | None = Field(
        None, description="the drive it is on: xvdz, for hvm the CD drive hdd, if not given"
    )

    @model_validator(mode="before")
    @classmethod
    def _files(cls, data: Any, info: ValidationInfo) -> Any:
        """Files are read here, so that the configuration is whole: it may be used again on another host."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for name, key in _FILES.items():
            if name not in data:
                continue
            if key in data:
                refuse_all([Broken((name,), f"{name} and {key} are both given", "remove one of them")])
            path = to_path(data.pop(name), info)
            try:
                data[key] = Scalar(_read(path), True)
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
                refuse_all([Broken((name,), f"cloud_init.{name}: cannot read {path}: {reason}")])
        return data

    def to_dict(self) -> dict[str, Any]:
        """What is not default, as the texts they became."""
        return self.model_dump(exclude_defaults=True)


def _read(path: str) -> str:
    with open(path, "rb") as file:
        return file.read(MAX_SEED + 1).decode("utf-8")
