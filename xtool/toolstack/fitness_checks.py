"""The checks of ``xtool doctor``, in the order they are told.

Facts
-----
- ``/sys/hypervisor/type`` says ``xen`` in every guest; only the control domain has ``control_d`` in
  ``/proc/xen/capabilities`` (xenfs) and 1 in ``/sys/hypervisor/start_flags/initdomain`` (Linux 6.3).
- xenstored is a process of domain 0, or a domain of its own (``/tool/xenstored/domid`` names it then); C and
  OCaml versions differ in what they limit.
- Without ``dom0_mem=...,max:...`` domain 0 owns all memory and every create must balloon it down, which xl
  does (``autoballoon``) and xtool does not.
- SeaBIOS and OVMF are files beside hvmloader; QEMU must have been built with ``--enable-xen``.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import stat
import subprocess
from collections.abc import Iterator

from xtool import paths
from xtool.toolstack.everydayrecords import CheckResult
from xtool.toolstack.fitness import Check, Look, bad, ok

MIB = 1 << 20
#: Device -> what for, whether nothing goes without it.
NODES = {
    "/dev/xen/privcmd": ("every hypercall", True),
    "/dev/xen/hypercall": ("memory for hypercall arguments (Linux 4.18)", True),
    "/dev/xen/xenbus": ("xenstore, where its socket is missing", False),
    "/dev/xen/evtchn": ("backendtype: xtool, console_backend: xtool", False),
    "/dev/xen/gntdev": ("backendtype: xtool, console_backend: xtool", False),
    "/dev/xen/gntalloc": ("frontends of xtool's own in domain 0", False),
    "/dev/loop-control": ("files as disks of the kernel's backend", False),
    "/dev/net/tun": ("emulated cards, and backendtype: xtool for interfaces", False),
}
#: Whose module has another name than the node.
_MODULE_OF = {"tun": "tun", "loop-control": "loop", "hypercall": "xen-privcmd", "xenbus": "xenfs"}
MODULES = {
    "xen-gntdev": "guests' pages for backends in user space",
    "xen-gntalloc": "pages that xtool's frontends share",
    "xen-evtchn": "event channels for backends in user space",
    "xen-blkback": "disks served by the kernel (phy)",
    "xen-netback": "interfaces served by the kernel (vif)",
    "loop": "files as disks",
    "tun": "tap devices",
}
LEAST_FREE = 64 * MIB
SPACE = {"/run": (16 * MIB, "xtool's journal and sockets"), "/var/log": (64 * MIB, "logs")}
LEAST_FILES = 1024
#: How long QEMU may take to say what it can do, seconds: long in emulation.
QEMU_TIME = 60.0


def xen(look: Look) -> Iterator[CheckResult]:
    """Is Xen there, and does this xtool know its version?"""
    why = "without it there is nothing to run guests on"
    if look.host is None:
        trouble = look.trouble
        words = trouble.message if trouble else "there is none"
        hint = (trouble.hint if trouble else None) or "boot Xen, or use: xtool lab up"
        yield bad("xen", words, why, hint)
        return
    versions = look.host.hv.versions
    interfaces = f"domctl {versions.domctl:#x}, sysctl {versions.sysctl:#x}"
    yield ok("xen", f"{versions.xen} ({interfaces})")


def control_domain(look: Look) -> Iterator[CheckResult]:
    name = "control domain"
    initial = look.read("/sys/hypervisor/start_flags/initdomain") == "1"
    if initial or "control_d" in look.read("/proc/xen/capabilities"):
        yield ok(name, "yes")
    elif look.host is not None:
        yield ok(name, "yes: Xen takes its orders")
    elif look.read("/sys/hypervisor/type") == "xen":
        yield bad(
            name,
            "this is a Xen guest, not the control domain",
            "only the control domain may make others",
            "run xtool in domain 0: xtool -H ssh://root@HOST ...",
        )


def privilege(look: Look) -> Iterator[CheckResult]:
    if os.geteuid() == 0:
        yield ok("privilege", "root")
    else:
        yield bad("privilege", f"user {os.geteuid()}", "Xen's devices are root's alone", "sudo xtool ...")


def devices(look: Look) -> Iterator[CheckResult]:
    """The nodes in /dev, that they are devices, and not everybody's."""
    for node, (purpose, needed) in NODES.items():
        path = look.at(node)
        try:
            status = path.stat()
        except OSError:
            module = _MODULE_OF.get(path.name, f"xen-{path.name}")
            yield bad(node, "missing", f"needed for {purpose}", f"modprobe {module}", warn=not needed)
            continue
        # Tests have files in their place, for only root can make devices.
        if look.root == look.root.parent and not stat.S_ISCHR(status.st_mode):
            yield bad(node, "is no device", f"needed for {purpose}", f"remove it and load its module: {node}")
        elif status.st_mode & 0o002 and node.startswith("/dev/xen/"):
            yield bad(
                node,
                f"mode {stat.S_IMODE(status.st_mode):o}: everybody may write",
                "whoever may use it owns every guest",
                f"chmod 600 {node}, and mend the udev rule that did this",
            )
        else:
            yield ok(node, f"mode {stat.S_IMODE(status.st_mode):o}")


def modules(look: Look) -> Iterator[CheckResult]:
    for name, purpose in MODULES.items():
        if look.module(name):
            yield ok(f"module {name}", "there")
        else:
            do = f"modprobe {name} (and a line in /etc/modules-load.d for the next boot)"
            yield bad(f"module {name}", "not loaded", f"needed for {purpose}", do, warn=True)


def daemons(look: Look) -> Iterator[CheckResult]:
    """xenstored and xenconsoled, whichever kind."""
    running = look.processes()
    store = sorted(name for name in running.values() if name in ("xenstored", "oxenstored"))
    own = look.host.store.get("/tool/xenstored/domid") if look.host else None
    if store:
        kind = {"oxenstored": "oxenstored (OCaml)", "xenstored": "xenstored (C)"}[store[0]]
        yield ok("xenstored", kind)
    elif own and own != "0":
        yield ok("xenstored", f"a domain of its own ({own})")
    else:
        why = "every domain, its name and its devices are in xenstore"
        yield bad("xenstored", "does not run", why, "start Xen's services: systemctl start xenstored")
    if "xenconsoled" in running.values():
        yield ok("xenconsoled", "runs")
    else:
        yield bad(
            "xenconsoled",
            "does not run",
            "it serves guests' consoles",
            "systemctl start xenconsoled, or console_backend: xtool in domain files",
            warn=True,
        )


def device_model(look: Look) -> Iterator[CheckResult]:
    """What hvm guests and QEMU's disks need."""
    from xtool.devicemodel.argv import BINARIES

    found = (path for pattern in BINARIES for path in sorted(look.root.glob(pattern.lstrip("/"))))
    qemu = next((path for path in found if os.access(path, os.X_OK)), None)
    install = "install one that has it (Debian: qemu-system-xen)"
    needed = "hvm guests and disks of the kind qdisk need it"
    if qemu is None:
        yield bad("QEMU", "none found", needed, install, warn=True)
    elif (words := _accelerators(str(qemu))) is None:
        yield bad("QEMU", f"{qemu} does not run", needed, f"try: {qemu} -accel help", warn=True)
    elif "xen" not in words:
        yield bad("QEMU", f"{qemu} was built without Xen", needed, install, warn=True)
    else:
        yield ok("QEMU", str(qemu))
    if look.host is None:
        return
    facts = look.host.facts()
    for name, file, package in (
        ("hvmloader", facts.hvmloader, "xen-utils"),
        ("SeaBIOS", facts.firmware.get("seabios"), "seabios"),
        ("OVMF", facts.firmware.get("ovmf"), "ovmf"),
    ):
        if file:
            yield ok(name, file)
        else:
            which = "firmware: ovmf" if name == "OVMF" else "hvm guests"
            yield bad(
                name, "not found", f"{which} start with it", f"install it (Debian: {package})", warn=True
            )


def _accelerators(qemu: str) -> set[str] | None:
    """What this QEMU can run guests on; None if it does not run."""
    try:
        done = subprocess.run(
            [qemu, "-accel", "help"], capture_output=True, text=True, timeout=QEMU_TIME, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return set(done.stdout.split())


def hardware(look: Look) -> Iterator[CheckResult]:
    """Hardware virtualisation and the IOMMU."""
    if look.host is None:
        return
    from xtool.toolstack.query import host_info

    info = host_info(look.host)
    if info.hvm:
        paging = "nested paging" if info.nested_paging else "shadow page tables"
        yield ok("hardware virtualisation", f"{info.hvm}, {paging}")
    else:
        yield bad(
            "hardware virtualisation",
            "none",
            "without it only pv guests run",
            "enable VT-x or SVM in the machine's firmware",
            warn=True,
        )
    if info.iommu:
        yield ok("IOMMU", "on")
    else:
        yield bad(
            "IOMMU",
            "off or not there",
            "PCI devices cannot be given to hvm and pvh guests",
            "enable VT-d or AMD-Vi in the firmware, and do not boot Xen with iommu=0",
            warn=True,
        )


def memory(look: Look) -> Iterator[CheckResult]:
    """Free memory, and whether domain 0 leaves any."""
    if look.host is None:
        return
    from xtool.toolstack.query import free_memory

    state = look.host.hv.host()
    free = free_memory(state)
    if free >= LEAST_FREE:
        yield ok("free memory", f"{free // MIB} MiB of {state.total_pages * 4096 // MIB}")
    else:
        yield bad(
            "free memory",
            f"{free // MIB} MiB",
            "a guest's memory comes from what Xen has free",
            "end a guest, or take memory from domain 0: xl mem-set 0 ...",
        )
    words = re.findall(r"(?<!\S)dom0_mem=(\S+)", look.host.hv.commandline())
    if any("max:" in word or re.fullmatch(r"\d+[BKMGTbkmgt]?", word) for word in words):
        yield ok("dom0_mem", words[-1])
    else:
        yield bad(
            "dom0_mem",
            words[-1] if words else "not on Xen's command line",
            "domain 0 then owns all memory, and xtool does not balloon it down for a guest",
            "boot Xen with dom0_mem=2G,max:2G (Debian: GRUB_CMDLINE_XEN in /etc/default/grub)",
            warn=True,
        )


def bridges(look: Look) -> Iterator[CheckResult]:
    """The bridge that an interface without bridge: goes to."""
    from xtool.devices.vif import DEFAULT_BRIDGE

    try:
        names = sorted(os.listdir(look.at("/sys/class/net")))
    except OSError:
        names = []
    found = [name for name in names if look.exists(f"/sys/class/net/{name}/bridge")]
    if DEFAULT_BRIDGE in found:
        state = look.read(f"/sys/class/net/{DEFAULT_BRIDGE}/operstate") or "unknown"
        yield ok("bridge", f"{DEFAULT_BRIDGE} ({state}); all: {', '.join(found)}")
        return
    yield bad(
        "bridge",
        f"no {DEFAULT_BRIDGE}; there are: {', '.join(found) or 'none'}",
        f"an interface without bridge: goes to {DEFAULT_BRIDGE}",
        f"ip link add {DEFAULT_BRIDGE} type bridge; ip link set {DEFAULT_BRIDGE} up, or set bridge:, "
        "or network: user",
        warn=True,
    )


def disk_space(look: Look) -> Iterator[CheckResult]:
    places = {**SPACE, str(paths.cache_dir()): (256 * MIB, "decompressed kernels")}
    for place, (least, purpose) in places.items():
        path = look.at(place)
        while not path.exists() and path != path.parent:
            path = path.parent
        free = shutil.disk_usage(path).free
        if free >= least:
            yield ok(f"space in {place}", f"{free // MIB} MiB free")
        else:
            why = f"{purpose} are kept there"
            yield bad(f"space in {place}", f"{free // MIB} MiB free", why, f"make room in {place}", warn=True)


def limits(look: Look) -> Iterator[CheckResult]:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= LEAST_FILES:
        yield ok("open files", str(soft))
    else:
        why = "each disk, interface and console takes some"
        yield bad("open files", str(soft), why, f"ulimit -n {LEAST_FILES}", warn=True)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if os.geteuid() != 0 and locked != resource.RLIM_INFINITY and locked < MIB:
        why = "hypercall arguments lie in locked memory"
        yield bad("locked memory", f"{locked >> 10} KiB", why, "ulimit -l unlimited", warn=True)


def clock(look: Look) -> Iterator[CheckResult]:
    """Guests start with the host's time."""
    import time

    now = time.time()
    if now < 1_700_000_000:  # November 2023: before this was written
        yield bad(
            "clock",
            time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)),
            "guests start with this time, and certificates fail",
            "set it: timedatectl set-ntp true",
            warn=True,
        )
        return
    source = look.read("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    yield ok(
        "clock", f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(now))}, clock source {source or '?'}"
    )


def leftovers(look: Look) -> Iterator[CheckResult]:
    """What ``gc`` would remove, and name."""
    host = look.host
    if host is None:
        return
    from xtool.toolstack.leftovers import find_leftovers

    found = find_leftovers(host)
    dead = [item for item in found if item.certain]
    if dead:
        names = ", ".join(item.what for item in dead[:3]) + (" ..." if len(dead) > 3 else "")
        why = "a toolstack that crashed left them; they hold memory, images or names"
        yield bad(
            "leftovers",
            f"{len(dead)}: {names}",
            why,
            "xtool gc shows them, xtool gc --yes removes them",
            warn=True,
        )
    elif found:
        yield bad(
            "leftovers",
            f"{len(found)} that may be somebody's",
            "xtool cannot tell whether they are in use",
            "xtool gc shows them",
            warn=True,
        )
    else:
        yield ok("leftovers", "none")


def keepers(look: Look) -> Iterator[CheckResult]:
    """The processes that carry out on_reboot and the like."""
    host = look.host
    if host is None:
        return
    from xtool.toolstack import journal
    from xtool.toolstack.names import uuid_text
    from xtool.toolstack.samples import keeper_lives

    alive = {uuid_text(state.handle) for state in host.hv.domains() if not state.dying}
    entries = [entry for entry in journal.entries() if entry.uuid in alive]
    gone = [entry.name for entry in entries if keeper_lives(entry) is False]
    if gone:
        yield bad(
            "keepers",
            f"missing for {', '.join(gone)}",
            "on_poweroff, on_reboot and on_crash are not carried out by themselves",
            "xtool gc --yes starts what is missing; xtool console and shutdown -w carry them out, too",
            warn=True,
        )
    else:
        yield ok("keepers", f"{len(entries)} of {len(entries)} live")


CHECKS: tuple[tuple[str, Check], ...] = (
    ("xen", xen),
    ("control domain", control_domain),
    ("privilege", privilege),
    ("devices", devices),
    ("modules", modules),
    ("daemons", daemons),
    ("device model", device_model),
    ("hardware", hardware),
    ("memory", memory),
    ("bridge", bridges),
    ("space", disk_space),
    ("limits", limits),
    ("clock", clock),
    ("leftovers", leftovers),
    ("keepers", keepers),
)
