"""XML that is read piece by piece, and what of it nobody looked at."""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree.ElementTree import Element

_LONGEST = 60


class Seen:
    """Whoever takes a value says so by taking it here; ``left_over`` names the rest."""

    def __init__(self, root: Element) -> None:
        self.root = root
        self._elements = {id(root)}
        self._attributes: set[tuple[int, str]] = set()

    def attr(self, element: Element | None, name: str) -> str:
        """The attribute's text, "" where there is none (or no element)."""
        if element is None:
            return ""
        self._attributes.add((id(element), name))
        return element.get(name, "")

    def child(self, element: Element | None, path: str) -> Element | None:
        """The first at ``path`` (no wildcards)."""
        for step in path.split("/"):
            element = element.find(step) if element is not None else None
            if element is not None:
                self._elements.add(id(element))
        return element

    def text(self, element: Element | None, path: str, *, strip: bool = True) -> str:
        found = self.child(element, path)
        text = (found.text or "") if found is not None else ""
        return text.strip() if strip else text

    def children(self, element: Element | None, name: str) -> list[Element]:
        found = element.findall(name) if element is not None else []
        self._elements |= {id(each) for each in found}
        return found

    def whole(self, element: Element | None) -> None:
        """All within counts as seen: it says nothing, or what we would do anyway."""
        for each in element.iter() if element is not None else ():
            self._elements.add(id(each))
            self._attributes |= {(id(each), name) for name in each.attrib}

    def drop(self, element: Element) -> None:
        """It was looked at and cannot be carried over: name it as a whole."""
        self._elements.discard(id(element))

    def left_over(self) -> list[str]:
        """A line for each element or attribute that nobody took, in the order they stand."""
        return list(self._walk(self.root, ""))

    def _walk(self, element: Element, path: str) -> Iterator[str]:
        for name, value in element.items():
            if (id(element), name) not in self._attributes:
                yield f"{path or _plain(element.tag)} {_plain(name)}={_short(value)}"
        counts: dict[str, int] = {}
        for child in element:
            tag = _plain(str(child.tag))
            counts[tag] = counts.get(tag, 0) + 1
            several = sum(other.tag == child.tag for other in element) > 1
            where = f"{path}/{tag}" if path else tag
            where += f"[{counts[tag]}]" if several else ""
            if id(child) in self._elements:
                yield from self._walk(child, where)
            else:
                words = [f"{_plain(k)}={_short(v)}" for k, v in child.items()]
                text = (child.text or "").strip()
                words += [_short(text)] if text else []
                yield " ".join([where, *words])


def _plain(name: str) -> str:
    return name.rpartition("}")[2]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
