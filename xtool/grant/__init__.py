"""Grants: map or copy other domains' pages, share our own. ``docs/grant.md`` shows how."""

from xtool.grant.alloc import AllocDevice
from xtool.grant.copy import CopyBatch, CopySegment, Foreign
from xtool.grant.device import GrantDevice
from xtool.grant.persistent import PersistentGrants
from xtool.grant.port import GrantAllocator, Grants, Mapped, Shared
from xtool.grant.table import Entry, read_table
from xtool.grant.window import Buffer

__all__ = [
    "AllocDevice",
    "Buffer",
    "CopyBatch",
    "CopySegment",
    "Entry",
    "Foreign",
    "GrantAllocator",
    "GrantDevice",
    "Grants",
    "Mapped",
    "PersistentGrants",
    "Shared",
    "read_table",
]
