"""What Xen and xenstore hold: domains, memory, event channels, grants, nodes.

Facts about counting
--------------------
- Xen frees a domain's memory page by page while the domain is ``dying``; a page somebody still maps keeps
  it dying. So dying domains are listed, and memory is exact only once there are none.
- ``free + scrub + every domain's pages`` is all but what Xen uses itself; that difference moves when Xen
  leaks, and does not when dom0's balloon driver takes or gives pages.
- Grants are only told by Xen's debug key ``g``, in its message ring, which may lose its beginning.
- dom0's ports change their numbers, so event channels are counted by what they are connected to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from uuid import UUID

from xtool.errors import HostError
from xtool.hypercall.port import Hypervisor
from xtool.toolstack.leaks import Probe, ProbedHost, Table
from xtool.xenstore.paths import join
from xtool.xenstore.port import Store

STORE_ROOTS = ("/local/domain", "/libxl", "/vm", "/tool", "/xtool")
#: Bounds, so that a hostile guest's nodes do not make a snapshot endless.
STORE_NODES_MAX = 200_000
PORTS_MAX = 131_072  # FIFO event channels; the two-level kind has 4096
#: Signs of trouble in Xen's own log.
XEN_TROUBLE = (
    "Over-allocation",
    "WARN",
    "BUG at",
    "Assertion",
    "pinned",
    "leak",
    "still has",
    "double fault",
)


def domains(host: ProbedHost) -> Table:
    """domid -> uuid and whether it is dying."""
    return {
        f"domain {state.domid}": f"{UUID(bytes=state.handle)}{' dying' if state.dying else ''}"
        for state in host.hv.domains()
    }


def memory(host: ProbedHost) -> Table:
    """In pages, to the page."""
    states = host.hv.domains()
    now = host.hv.host()
    owned = sum(state.pages for state in states)
    return {
        "used by Xen itself": str(now.total_pages - now.free_pages - now.scrub_pages - owned),
        "claimed": str(now.outstanding_pages),
        **{f"domain {state.domid}": str(state.pages) for state in states if state.domid},
    }


def event_channels(host: ProbedHost) -> Table:
    """What dom0's ports are connected to -> how many."""
    found: Counter[str] = Counter()
    for port in range(1, PORTS_MAX):
        state = host.hv.evtchn_status(0, port)
        if state is None:
            break
        if state.status == "closed":
            continue
        name = state.status
        if state.remote_domid is not None:
            name += f" with domain {state.remote_domid}"
        if state.number is not None:
            name += f" {state.number}"
        found[name] += 1
    return {name: str(count) for name, count in found.items()}


def grants(host: ProbedHost) -> Table:
    """Other domains' pages that dom0 has mapped."""
    host.hv.debug_keys("g")
    return dict(parse_grants(host.hv.console_ring().decode(errors="replace")))


def parse_grants(log: str) -> Iterator[tuple[str, str]]:
    """``("domain 5 grant 0x3", "mapped by domain 0")`` for each entry in the log's last dump.

    Raises ``HostError`` when the dump is not whole.
    """
    start = log.rfind("gnttab_usage_print_all [")
    end = log.find("gnttab_usage_print_all ]", start)
    if start < 0 or end < 0:
        raise HostError(
            "the dump of grants does not fit Xen's message ring", hint="boot Xen with a larger conring_size"
        )
    owner = "?"
    for line in log[start:end].splitlines():
        text = line.rpartition("(XEN) ")[2].strip()
        if text.startswith("grant-table for remote d"):
            owner = text.removeprefix("grant-table for remote d").split()[0]
        elif text.startswith("[0x"):
            ref, _, rest = text[1:].partition("]")
            mapper = rest.split()[0]
            if mapper == "0" and owner != "0":
                yield f"domain {owner} grant {ref}", f"mapped by domain {mapper}"


def xenstore(host: ProbedHost) -> Table:
    """Every node below the roots -> its value and permissions."""
    return dict(walk(host.store, STORE_ROOTS))


def walk(store: Store, roots: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Level by level, each level in three pipelines. Nodes that go meanwhile are left out."""
    level: list[str] = list(roots)
    seen = 0
    while level:
        seen += len(level)
        if seen > STORE_NODES_MAX:
            raise HostError(f"xenstore has more than {STORE_NODES_MAX} nodes", hint="who made them?")
        values = store.get_many(level)
        perms = store.get_perms_many(level)
        children = store.list_many(level)
        following = []
        for path in level:
            value, names = values[path], children[path]
            if value is None or names is None:
                continue
            yield path, f"{value!r} {','.join(perms[path] or ())}"
            following += [join(path, name) for name in names if name]
        level = following


def xen_log(host: ProbedHost) -> Table:
    """Lines in Xen's log that tell of trouble -> how many of each."""
    return xen_trouble(host.hv)


def xen_trouble(hv: Hypervisor) -> Table:
    lines = Counter(
        line.strip()
        for line in hv.console_ring().decode(errors="replace").splitlines()
        if any(sign in line for sign in XEN_TROUBLE)
    )
    return {line: str(count) for line, count in lines.items()}


PROBES: dict[str, Probe] = {
    "domains": domains,
    "memory": memory,
    "event channels": event_channels,
    "grants": grants,
    "xenstore": xenstore,
    "xen log": xen_log,
}
