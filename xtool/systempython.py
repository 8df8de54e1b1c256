"""Python bindings that come with the system: Debian's packages, which pip often cannot build.

A virtual environment and a Python without its ``site`` module do not see Debian's folder of modules, so a
binding is looked up there by name; nothing else of that folder comes along. A binding made for another
version of Python has another file name, and is not found.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import ModuleType

from xtool.errors import HostError

DEBIAN = "/usr/lib/python3/dist-packages"


def system_module(names: Sequence[str], what: str, package: str) -> ModuleType:
    """The last of ``names``, which imports those before it. ``what`` is for the error: "libnbd's".

    Raises ``HostError``, which names the Debian ``package``, when there is none for this Python.
    """
    for name in names:
        try:
            import_module(name)
            continue
        except ImportError:
            spec = PathFinder.find_spec(name, [DEBIAN])
        if spec is None or spec.loader is None:
            raise HostError(
                f"{what} Python binding is missing",
                hint=f"install {package} (it is for Python {_debian_python()})",
            )
        module = sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            del sys.modules[name]
            raise HostError(f"{what} Python binding does not load: {error}") from error
    return sys.modules[names[-1]]


def _debian_python() -> str:
    """For the hint: which Python the host's packages are for."""
    import os

    target = os.path.basename(os.path.realpath("/usr/bin/python3"))
    return target.removeprefix("python") or "of the system"
