"""Domain files: YAML text in, a frozen ``DomainConfig`` out; every refusal names file, line and column.

::

    config = load_config("web.yaml", overrides=["memory=2GiB", "disk[0].target=other.img"])
    config.memory                      # bytes
    config.file_references()           # every file of this machine the domain needs
    parse_config(config.to_yaml())     # the same config again

======================  =========================================================
``nodes.py``            YAML events to a tree in which every key and value has a mark
``units.py``            what a number, a size, a switch, a text may look like
``specs.py``            xl's disk and vif strings, both ways
``cpus.py``             xl's CPU lists
``hvmwords.py``         enlightenments, SMBIOS strings, timer modes
``model.py``            every key, its type, default and meaning; ``field.py`` how that is noted
``devices.py``          ``DiskConfig`` and ``VifConfig``
``seed.py``             ``CloudInitConfig``
``ready.py``            ``ReadyConfig``: when a guest counts as ready
``changes.py``          how each key can change for a domain that runs
``rules.py``            what must hold between keys
``xlkeys.py``           keys xl has and xtool has not, and why
``template.py``         jinja2, with the place in the original of all it renders
``layers.py``           templates and host defaults: where they are, how they merge
``keycheck.py``         every key known, wanted and not empty
``validate.py``         a checked tree to ``DomainConfig``; pydantic's complaints to problems with places
``load.py``             puts it together
``problems.py``         ``ConfigErrors``: all that is wrong with one file, at once
``explain.py``          where each value came from
``schema.py``           the JSON Schema, made from the model
``reference.py``        the tables of docs/configuration.md, made from the model
``xlcfg.py``            xl.cfg's grammar; ``xlspecs.py``: its spec strings of all ages
``fromxl.py``           an xl.cfg made a domain file; ``toxl.py``: the other way round
======================  =========================================================

The names below are looked up on first use, so that importing this package loads neither PyYAML nor
pydantic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xtool.config.devices import DiskConfig, VifConfig
    from xtool.config.load import load_config, parse_config
    from xtool.config.model import DomainConfig, FileReference
    from xtool.config.problems import ConfigErrors

__all__ = [
    "ConfigErrors",
    "DiskConfig",
    "DomainConfig",
    "FileReference",
    "VifConfig",
    "load_config",
    "parse_config",
]

_HOMES = {
    "ConfigErrors": "problems",
    "DiskConfig": "devices",
    "DomainConfig": "model",
    "FileReference": "model",
    "VifConfig": "devices",
    "load_config": "load",
    "parse_config": "load",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{home}"), name)
