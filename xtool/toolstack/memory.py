"""How much memory a running domain should have, and may have.

Facts: ``memory/target`` in xenstore is what the guest's balloon driver aims at, in KiB and without the video
memory. Xen only keeps the limit, and never takes memory back by itself: a guest without a balloon driver
keeps what it has. The limit is 1 MiB above, for pages that are no RAM, as under libxl. A domain whose memory
was promised on demand gets its pool adjusted too.
"""

from __future__ import annotations

from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from xtool.abi.base import PAGE_SHIFT
from xtool.builder.domain import SLACK
from xtool.errors import DeadlineError, DomainError, UsageError
from xtool.toolstack import journal
from xtool.toolstack.api import MemoryInfo
from xtool.toolstack.names import Named, uuid_text
from xtool.toolstack.vcpus import LOOK
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.toolstack.host import Host

MIB = 1 << 20
#: Less would not let domain 0 do its work (libxl draws the same line).
MIN_DOM0 = 128 * MIB
#: How near the guest must come: balloon drivers work in larger pieces, and some pages are no RAM.
_NEAR = 4 * MIB


def set_target(host: Host, found: Named, size: int, *, wait: float | None = None) -> MemoryInfo:
    """Ask the guest to have ``size`` bytes; with ``wait``, until it has or as many seconds are over.

    Raises ``UsageError`` for a size that cannot be, ``DomainError``, ``DeadlineError``.
    """
    domid = found.state.domid
    now = memory_info(host, found)
    videoram = _node(host, domid, "videoram") or 0
    target = size - videoram
    if target > now.maximum:
        raise UsageError(
            f"{found.name} may have {now.maximum // MIB} MiB at most, not {size // MIB}",
            hint=f"raise that first: xtool mem-max {found.name} {size // MIB}",
        )
    least = MIN_DOM0 if domid == 0 else MIB
    if target < least:
        raise UsageError(f"{size // MIB} MiB are too few for {found.name}", hint=f"{least // MIB} at least")
    uuid = uuid_text(found.state.handle)
    with journal.locked(uuid):
        host.hv.set_max_memory(domid, size + SLACK)
        if found.state.hvm:
            host.hv.set_pod_target(domid, (target + SLACK) >> PAGE_SHIFT)
        host.store.write(f"{paths.domain(domid)}/memory/target", str(target >> 10))

        def remember(config: dict[str, Any]) -> dict[str, Any]:
            most = config.get("maxmem", config.get("memory", 0))
            return {**config, "memory": size // MIB, "maxmem": max(most, size // MIB)}

        journal.change_config(uuid, remember)
    if wait is not None:
        _wait(host, found, size, wait)
    return memory_info(host, found)


def set_maximum(host: Host, found: Named, size: int) -> MemoryInfo:
    """Let the guest grow to ``size`` bytes, or no further than that. Raises ``UsageError``."""
    domid = found.state.domid
    target = memory_info(host, found).target
    if size < target:
        raise UsageError(
            f"{found.name} is asked to have {target // MIB} MiB, more than {size // MIB}",
            hint=f"lower that first: xtool mem-set {found.name} {size // MIB}",
        )
    uuid = uuid_text(found.state.handle)
    with journal.locked(uuid):
        host.hv.set_max_memory(domid, size + SLACK)
        host.store.write(f"{paths.domain(domid)}/memory/static-max", str(size >> 10))
        journal.change_config(uuid, lambda config: {**config, "maxmem": size // MIB})
    return memory_info(host, found)


def memory_info(host: Host, found: Named) -> MemoryInfo:
    """Raises ``DomainError`` where xenstore does not say what the guest should have."""
    domid = found.state.domid
    state = host.hv.domain(domid) or found.state
    current = state.pages << PAGE_SHIFT
    limit = min(state.max_pages, 1 << 40) << PAGE_SHIFT
    target, maximum = _node(host, domid, "target"), _node(host, domid, "static-max")
    if domid == 0:  # a host that was never told has no nodes
        whole = host.hv.host().total_pages << PAGE_SHIFT
        target = current if target is None else target
        maximum = min(limit, whole) if maximum is None else maximum
        limit = min(limit, whole)
    if target is None or maximum is None:
        raise DomainError(
            f"xenstore does not say how much memory {found.name or f'domain {domid}'} should have",
            hint="a toolstack that is still creating it, or did not, leaves it so",
        )
    return MemoryInfo(domid, found.name, target, current, maximum, limit)


def _node(host: Host, domid: int, name: str) -> int | None:
    """Bytes of a node in KiB. The nodes are domain 0's own; what is no number counts as missing."""
    text = host.store.get(f"{paths.domain(domid)}/memory/{name}")
    return int(text) << 10 if text and text.isdecimal() and len(text) < 16 else None


def _wait(host: Host, found: Named, size: int, seconds: float) -> None:
    until = monotonic() + seconds
    while (state := host.hv.domain(found.state.domid)) is not None:
        current = state.pages << PAGE_SHIFT
        if abs(current - size) <= _NEAR:
            return
        if monotonic() >= until:
            raise DeadlineError(
                f"{found.name} has {current // MIB} MiB after {seconds:g} s, not {size // MIB}",
                hint="it needs a balloon driver, and may keep what its programs use; the target stays set",
            )
        sleep(LOOK)  # Xen tells nobody when memory changes hands
