"""libnbd's Python binding, which comes with the system: Debian's package ``python3-libnbd``.

It is not on PyPI. A virtual environment and a Python without its ``site`` module do not see Debian's folder
of modules, so the binding's two are looked up there by name; nothing else of that folder comes along. A
binding made for another version of Python has another file name, and is not found.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import ModuleType

from xtool.errors import HostError

DEBIAN = "/usr/lib/python3/dist-packages"


def binding() -> ModuleType:
    """The module ``nbd``. Raises ``HostError`` when there is none for this Python."""
    for name in ("libnbdmod", "nbd"):  # the second imports the first
        try:
            import_module(name)
            continue
        except ImportError:
            spec = PathFinder.find_spec(name, [DEBIAN])
        if spec is None or spec.loader is None:
            raise HostError(
                "libnbd's Python binding is missing",
                hint=f"install python3-libnbd (it is for Python {_debian_python()})",
            )
        module = sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            del sys.modules[name]
            raise HostError(f"libnbd's Python binding does not load: {error}") from error
    return sys.modules["nbd"]


def _debian_python() -> str:
    """For the hint: which Python the host's packages are for."""
    import os

    target = os.path.basename(os.path.realpath("/usr/bin/python3"))
    return target.removeprefix("python") or "of the system"
