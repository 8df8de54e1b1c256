"""``xtool __complete KIND [DOMAIN]``: names for the shells' completion, one a line.

A shell asks at each Tab, so nothing is imported that is not needed, and whatever goes wrong is silent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtool.cli.client import connect
from xtool.cli.output import write
from xtool.errors import XtoolError

if TYPE_CHECKING:
    from xtool.toolstack.api import Client


def main(words: list[str]) -> int:
    """Print what there is of ``domains``, ``vdevs`` or ``devices``; 1 if that cannot be told."""
    kind, domain = (*words, "", "")[:2]
    try:
        with connect() as client:
            found = _names(client, kind, domain)
    except XtoolError:
        return 1
    # A name that could confuse a shell's lines is left out.
    write("\n".join(name for name in found if name and name.isprintable()))
    return 0


def _names(client: Client, kind: str, domain: str) -> list[str]:
    if kind == "domains":
        return [found.name for found in client.list() if found.domid]
    if kind == "vdevs" and domain:
        return [disk.vdev for disk in client.block_list(domain)]
    if kind == "devices" and domain:
        return [name for vif in client.network_list(domain) for name in (str(vif.devid), vif.mac)]
    return []
