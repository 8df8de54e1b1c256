"""Which verb is which HTTP request: one line per method of ``toolstack.api.Client``.

The server makes its routes, its checks and its OpenAPI document from this table and from the methods' own
signatures; the client makes its requests from the same. A new verb needs one line here.

What stands in braces in a path is the argument of that name. The other arguments are the query of a GET or a
DELETE, else the members of a JSON object.
"""

from __future__ import annotations

from typing import NamedTuple

#: Looks only: carried out in a thread of the daemon, allowed to the read-only group.
READ = "read"
#: Changes something: carried out in a process of its own; the answer waits for it.
CHANGE = "change"
#: May last: answered with 202 and an operation that is followed, and can be cancelled.
LONG = "long"


class Route(NamedTuple):
    """``changes_if``: an argument that makes a change of something that only looks."""

    method: str
    http: str
    path: str
    how: str
    summary: str
    changes_if: str = ""


_TABLE = (
    Route("create", "POST", "/v1/domains", LONG, "Start a domain from its configuration."),
    Route("dry_run", "POST", "/v1/dry-run", CHANGE, "Build a domain in memory only, and show the layout."),
    Route("list", "GET", "/v1/domains", READ, "List the domains, or one of them."),
    Route("info", "GET", "/v1/host", READ, "Show the host: Xen, CPUs, memory."),
    Route("dmesg", "POST", "/v1/host/dmesg", READ, "Show Xen's message buffer.", changes_if="clear"),
    Route("vcpu_list", "GET", "/v1/vcpus", READ, "List vCPUs: state, where they run, affinity."),
    Route("console", "GET", "/v1/domains/{domain}/console", READ, "Say where a domain's console is."),
    Route("console_log", "GET", "/v1/domains/{domain}/console-log", READ, "What a console printed."),
    Route("pause", "POST", "/v1/domains/{domain}/pause", CHANGE, "Stop a domain's vCPUs."),
    Route("unpause", "POST", "/v1/domains/{domain}/unpause", CHANGE, "Let a paused domain run."),
    Route("shutdown", "POST", "/v1/domains/{domain}/shutdown", LONG, "Ask a domain to power off."),
    Route("reboot", "POST", "/v1/domains/{domain}/reboot", LONG, "Ask a domain to reboot."),
    Route("destroy", "DELETE", "/v1/domains/{domain}", CHANGE, "End a domain at once."),
    Route("settle", "POST", "/v1/settle", LONG, "Carry out the action of a domain that has shut down."),
    Route("gc", "POST", "/v1/gc", LONG, "Clean up after creations that were killed."),
    Route("wiring", "GET", "/v1/wiring", READ, "Show the split drivers: both ends, ports, grants, rings."),
    Route("block_list", "GET", "/v1/domains/{domain}/disks", READ, "List a domain's disks."),
    Route("block_attach", "POST", "/v1/domains/{domain}/disks", LONG, "Give a running domain a disk."),
    Route("block_detach", "DELETE", "/v1/domains/{domain}/disks/{disk}", LONG, "Take a disk away."),
    Route("block_limit", "PATCH", "/v1/domains/{domain}/disks/{disk}", CHANGE, "Limit a disk's speed."),
    Route("cd_insert", "PUT", "/v1/domains/{domain}/drives/{drive}", CHANGE, "Put a medium into a drive."),
    Route("cd_eject", "DELETE", "/v1/domains/{domain}/drives/{drive}", CHANGE, "Take the medium out."),
    Route("network_list", "GET", "/v1/domains/{domain}/vifs", READ, "List a domain's interfaces."),
    Route("network_attach", "POST", "/v1/domains/{domain}/vifs", LONG, "Give a domain an interface."),
    Route("network_detach", "DELETE", "/v1/domains/{domain}/vifs/{vif}", LONG, "Take an interface away."),
    Route("network_limit", "PATCH", "/v1/domains/{domain}/vifs/{vif}", CHANGE, "Limit an interface."),
    # everyday
    Route("rename", "POST", "/v1/domains/{domain}/rename", CHANGE, "Give a domain another name."),
    Route("uptime", "POST", "/v1/uptime", READ, "For how long domains have run."),
    Route("config", "GET", "/v1/config", READ, "What domains were created with.", changes_if="secrets"),
    Route("set_config", "PATCH", "/v1/domains/{domain}/config", CHANGE, "Change a configuration."),
    Route("targets", "GET", "/v1/targets", READ, "What domains were told to have."),
    Route("define", "PUT", "/v1/domains/{domain}/config", CHANGE, "Define what its next start creates."),
    Route("wait_ready", "POST", "/v1/domains/{domain}/ready", LONG, "Wait until a guest is ready."),
    Route("channel_list", "GET", "/v1/domains/{domain}/channels", READ, "List a domain's channels."),
    Route("display", "GET", "/v1/domains/{domain}/display", READ, "Its VNC display.", changes_if="password"),
    Route("pci_list", "GET", "/v1/domains/{domain}/pci", READ, "List a domain's PCI devices."),
    Route("pci_assignable_list", "GET", "/v1/host/pci", READ, "List the PCI devices pciback holds."),
    Route("sample", "GET", "/v1/sample", READ, "What every domain uses at this moment."),
    Route("metrics", "GET", "/v1/metrics", READ, "The same as Prometheus text, in a JSON text."),
    Route("leftovers", "GET", "/v1/leftovers", READ, "What crashed toolstacks left behind."),
    Route("remove_leftovers", "DELETE", "/v1/leftovers", LONG, "Remove what is dead of it."),
    # tuning
    Route("vcpu_pin", "POST", "/v1/domains/{domain}/pin", CHANGE, "Say which CPUs a vCPU may use."),
    Route("vcpu_set", "POST", "/v1/domains/{domain}/vcpus", LONG, "Ask for another number of vCPUs."),
    Route("mem_set", "POST", "/v1/domains/{domain}/memory", LONG, "Ask to have more or less memory."),
    Route("mem_max", "PUT", "/v1/domains/{domain}/maxmem", CHANGE, "Set the most memory it may have."),
    Route("sched_credit", "GET", "/v1/sched/{scheduler}/domains", READ, "Weights and caps."),
    Route("sched_credit_set", "PATCH", "/v1/sched/{scheduler}/domains/{domain}", CHANGE, "Set them."),
    Route("sched_rtds", "POST", "/v1/rtds", READ, "Periods and budgets."),
    Route("sched_rtds_set", "PATCH", "/v1/rtds/{domain}", CHANGE, "Set them."),
    Route("sched_pool", "GET", "/v1/sched/{scheduler}/pools", READ, "A scheduler's own parameters."),
    Route("sched_pool_set", "PATCH", "/v1/sched/{scheduler}/pools", CHANGE, "Set them."),
    Route("cpupool_list", "GET", "/v1/cpupools", READ, "List the CPU pools."),
    Route("cpupool_create", "POST", "/v1/cpupools", CHANGE, "Make a CPU pool."),
    Route("cpupool_destroy", "DELETE", "/v1/cpupools/{pool}", CHANGE, "Take a CPU pool away."),
    Route("cpupool_rename", "POST", "/v1/cpupools/{pool}/rename", CHANGE, "Give it another name."),
    Route("cpupool_cpu_add", "POST", "/v1/cpupools/{pool}/cpus", CHANGE, "Put CPUs into it."),
    Route("cpupool_cpu_remove", "DELETE", "/v1/cpupools/{pool}/cpus", CHANGE, "Take CPUs out of it."),
    Route("cpupool_migrate", "PUT", "/v1/domains/{domain}/cpupool", CHANGE, "Move a domain into another."),
    Route("cpupool_numa_split", "POST", "/v1/cpupools/numa-split", CHANGE, "A CPU pool for each NUMA node."),
    Route("trigger", "POST", "/v1/domains/{domain}/trigger", CHANGE, "Send an NMI, press a button."),
    Route("sysrq", "POST", "/v1/domains/{domain}/sysrq", CHANGE, "Press a SysRq key of its kernel."),
    Route("debug_keys", "POST", "/v1/host/debug-keys", CHANGE, "Send debug keys to Xen."),
    Route("set_parameters", "PATCH", "/v1/host/parameters", CHANGE, "Set parameters of Xen."),
    Route("dump_core", "POST", "/v1/domains/{domain}/core", LONG, "Write its memory to a file there."),
)
ROUTES = {route.method: route for route in _TABLE}
#: Verbs that make sense in the caller's own process only, and why.
IN_PROCESS = {
    "block_serve": "it serves for as long as its caller lives, and its socket is for the caller",
    "close": "it ends the client",
}


def words_in(path: str) -> tuple[str, ...]:
    """The arguments a path names: ``/v1/domains/{domain}/disks/{disk}`` -> ``("domain", "disk")``."""
    return tuple(part[1:-1] for part in path.split("/") if part.startswith("{"))


def in_query(route: Route) -> bool:
    """Whether the arguments that are not in the path stand in the query."""
    return route.http in ("GET", "DELETE")
