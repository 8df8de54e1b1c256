"""Where xtool keeps things. Every other module asks here; nothing else spells these folders.

=========  ==================================  ===========================================
what       default                             holds
=========  ==================================  ===========================================
run        ``/run/xtool``                      one journal file per domain, sockets, pids
log        ``/var/log/xtool``                  device model logs
cache      ``$XDG_CACHE_HOME/xtool``           decompressed kernels, lab images, firmware, sent files
state      ``$XDG_STATE_HOME/xtool``           labs
config     ``$XDG_CONFIG_HOME/xtool``,         defaults of domain files, templates
           ``/etc/xtool``
=========  ==================================  ===========================================

``XTOOL_RUN_DIR``, ``XTOOL_LOG_DIR`` and ``XTOOL_ETC_DIR`` (for ``/etc/xtool``) move some (tests use them).
"""

from __future__ import annotations

import os
from pathlib import Path


def _xdg(variable: str, fallback: str) -> Path:
    value = os.environ.get(variable, "")
    return Path(value) if value.startswith("/") else Path.home() / fallback


def run_dir() -> Path:
    return Path(os.environ.get("XTOOL_RUN_DIR") or "/run/xtool")


def log_dir() -> Path:
    return Path(os.environ.get("XTOOL_LOG_DIR") or "/var/log/xtool")


def dump_dir() -> Path:
    """Cores of domains (``on_crash: coredump-destroy``); xl's place."""
    return Path(os.environ.get("XTOOL_DUMP_DIR") or "/var/lib/xen/dump")


def cache_dir() -> Path:
    return _xdg("XDG_CACHE_HOME", ".cache") / "xtool"


def firmware_dir() -> Path:
    """hvmloader and SeaBIOS out of the lab's image, for dry runs on machines that have none of their own."""
    return cache_dir() / "firmware"


def state_dir() -> Path:
    return _xdg("XDG_STATE_HOME", ".local/state") / "xtool"


def config_dirs() -> list[Path]:
    """Where defaults and templates are, strongest first: the user's, the host's."""
    return [
        _xdg("XDG_CONFIG_HOME", ".config") / "xtool",
        Path(os.environ.get("XTOOL_ETC_DIR") or "/etc/xtool"),
    ]


def seed_file(uuid: str) -> Path:
    """A domain's cloud-init seed."""
    return run_dir() / "seeds" / f"{uuid}.iso"
