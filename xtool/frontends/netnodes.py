"""Where the nodes of an interface are. The kernel's netfront looks below ``/local/domain/0/device`` only, so
domain 0's own lie elsewhere (``toolstack/dom0.py``)."""

from __future__ import annotations

from typing import NamedTuple


class NetDevice(NamedTuple):
    """Where both ends have their nodes, and which domain the backend is in."""

    frontend: str
    backend: str
    backend_domid: int = 0
