"""libnbd's Python binding, which comes with the system: Debian's package ``python3-libnbd``. It is not on
PyPI."""

from __future__ import annotations

from types import ModuleType

from xtool.systempython import system_module


def binding() -> ModuleType:
    """The module ``nbd``. Raises ``HostError`` when there is none for this Python."""
    return system_module(("libnbdmod", "nbd"), "libnbd's", "python3-libnbd")
