"""Numbers out of xenstore nodes that the other end wrote, for the split drivers.

A guest can write anything into its nodes, so what is not a plain decimal number within bounds is refused
with the node's name, before anything is mapped or allocated for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xtool.errors import BackendError, FrontendError

Nodes = Mapping[str, str]

#: Event channel ports end here with the largest table there is (FIFO).
MAX_PORTS = 1 << 17
#: What Linux writes for "no grant"; 0 is Xen's own reference for the console.
_NO_GRANT = 0xFFFF_FFFF


class Reader:
    """Typed look-ups in one directory's nodes; each raises ``error`` (node, reason) on nonsense."""

    def __init__(self, nodes: Nodes, error: type[FrontendError] | type[BackendError] = FrontendError) -> None:
        self.nodes = nodes
        self.error = error

    def number(self, node: str, low: int, high: int, default: int | None = None) -> int:
        """A decimal number from ``low`` to ``high``; without ``default`` the node must be there."""
        text = self.nodes.get(node)
        if text is None:
            if default is None:
                raise self.error(node, "is missing")
            return default
        if len(text) > 20 or not (text.isascii() and text.isdigit()):
            raise self.error(node, f"{text[:40]!r} is not a number")
        value = int(text)
        if not low <= value <= high:
            raise self.error(node, f"{value} is not between {low} and {high}")
        return value

    def flag(self, node: str, *, default: bool = False) -> bool:
        """A boolean: 0 is false, any other number true, as the kernels read it."""
        return self.number(node, 0, 0xFFFF_FFFF, int(default)) != 0

    def ref(self, node: str) -> int:
        """A grant reference."""
        value = self.number(node, 0, 0xFFFF_FFFF)
        if value in (0, _NO_GRANT):
            raise self.error(node, f"{value} is no grant reference")
        return value

    def port(self, node: str) -> int:
        """An event channel port of the peer."""
        return self.number(node, 1, MAX_PORTS - 1)

    def distinct(self, node: str, values: Iterable[int], what: str) -> None:
        """Refuse the same grant or port for two purposes."""
        seen: set[int] = set()
        for value in values:
            if value in seen:
                raise self.error(node, f"{what} {value} is used twice")
            seen.add(value)


def flags(**values: bool) -> dict[str, str]:
    """``feature_sg=True`` -> ``{"feature-sg": "1"}``."""
    return {name.replace("_", "-"): str(int(value)) for name, value in values.items()}
