"""XML in: bounded, and with none of what makes XML dangerous (entities, DTDs, external references)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xtool.errors import ConfigError
from xtool.systempython import system_module

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

MAX_TEXT = 1 << 20
_MAX_DEPTH = 64


def parse_xml(text: str, file: str = "") -> Element:
    """The root. Raises ``ConfigError`` with line and column, ``HostError`` without defusedxml."""
    defused: Any = system_module(
        ("defusedxml", "defusedxml.ElementTree"),
        "defusedxml's",
        "python3-defusedxml, or xtool[libvirt] by pip",
    )
    common: Any = system_module(("defusedxml.common",), "defusedxml's", "python3-defusedxml")
    if len(text) > MAX_TEXT:
        raise ConfigError("this is too large for a domain's XML", file=file)
    try:
        root: Element = defused.fromstring(text, forbid_dtd=True)
    except common.DefusedXmlException as error:
        raise ConfigError(
            f"the XML has a declaration ({type(error).__name__.removesuffix('Forbidden')}), which is refused",
            file=file,
            hint="a domain needs no DTD and no entities: remove them",
        ) from None
    except defused.ParseError as error:
        line, column = error.position
        lines = text.splitlines()
        raise ConfigError(
            f"this is no XML: {error}",
            file=file,
            line=line,
            column=column + 1,
            source=lines[line - 1] if 0 < line <= len(lines) else None,
        ) from None
    except ValueError as error:  # an encoding declaration of another kind, a null character
        raise ConfigError(f"this is no XML: {error}", file=file) from None
    _bounded(root, file)
    return root


def _bounded(root: Element, file: str) -> None:
    level, depth = [root], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ConfigError("the XML is nested too deeply", file=file)
        level = [child for element in level for child in element]


def to_text(element: Element) -> str:
    from xml.etree.ElementTree import tostring

    return tostring(element, encoding="unicode")


def attr(element: Element | None, path: str, name: str) -> str:
    """Attribute ``name`` of the first element at ``path``; "" where there is none."""
    found = element.find(path) if element is not None and path else element
    return found.get(name, "") if found is not None else ""
