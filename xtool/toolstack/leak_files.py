"""What Linux holds: processes, files, loop devices, network links, descriptors of Xen's daemons, kernel log.

``ROOT`` is where ``/proc``, ``/sys``, ``/dev`` and the folders are looked for; tests give their own.

Facts about ``/proc``
---------------------
- A pid is used again; pid and start time (field 22 of ``stat``) together are not.
- The name in ``stat`` may hold spaces and brackets: what follows the last ``)`` is safe to split.
- Processes end while they are looked at: a file that is gone is no error. One that was seen and ends by
  itself is no leak: ``leaks.wait_clean`` looks again.
- Opening a file in ``/proc/PID`` costs thirty times what a ``stat`` of the folder does (12 ms against
  0.4 ms in emulation). The folder's inode goes with its process, so what was read under one inode number
  and time is this process still.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from xtool import paths
from xtool.errors import HostError
from xtool.toolstack.leaks import Probe, ProbedHost, Table

ROOT = Path("/")
FOLDERS = ("/var/run/xen", "/run/xen", "/var/log/xen", "/var/lib/xen", "/var/lock", "/tmp")
DAEMONS = ("xenstored", "oxenstored", "xenconsoled")
KERNEL_TROUBLE = re.compile(b"WARNING:|BUG:|Oops|general protection|grant still in use|xen_grant|leak")
FILES_MAX = 100_000


class Process:
    """One line of ``/proc/PID/stat``."""

    def __init__(self, stat: str) -> None:
        head, _, tail = stat.rpartition(")")
        pid, _, self.name = head.partition(" (")
        fields = tail.split()
        self.pid = int(pid)
        self.state, self.parent, self.start = fields[0], int(fields[1]), int(fields[19])
        self.in_kernel = self.parent == 2 or self.pid == 2


#: The folder of a process and what its inode was -> what was read there.
_known: dict[str, tuple[tuple[int, int], Process]] = {}


def _all_processes() -> dict[int, Process]:
    found = {}
    proc = str(ROOT / "proc")
    for name in os.listdir(proc):
        if name.isdecimal():
            try:
                process = _process(f"{proc}/{name}")
            except (OSError, ValueError, IndexError):
                continue
            found[process.pid] = process
    for folder in _known.keys() - {f"{proc}/{pid}" for pid in found}:
        del _known[folder]
    return found


def _process(folder: str) -> Process:
    status = os.stat(folder)
    inode = (status.st_ino, status.st_ctime_ns)
    known = _known.get(folder)
    if known is not None and known[0] == inode:
        return known[1]
    with open(f"{folder}/stat", "rb", buffering=0) as file:
        process = Process(file.read().decode(errors="replace"))
    _known[folder] = inode, process
    return process


def processes(host: ProbedHost) -> Table:
    """``pid@start name`` -> command line; zombies are marked. We and our ancestors are left out."""
    table = _all_processes()
    ours = set(_ancestors(table, os.getpid()))
    return {
        _process_key(process): "" if process.in_kernel else _command_line(process)
        for process in table.values()
        if process.pid not in ours
    }


def _process_key(process: Process) -> str:
    name = f"[{process.name}]" if process.in_kernel else process.name
    return f"{process.pid}@{process.start} {name}"


def _ancestors(table: dict[int, Process], pid: int) -> Iterator[int]:
    while pid in table:
        yield pid
        pid = table[pid].parent


def _command_line(process: Process) -> str:
    if process.state == "Z":
        return "zombie"
    try:
        raw = (ROOT / "proc" / str(process.pid) / "cmdline").read_bytes()
    except OSError:
        return ""
    return raw.rstrip(b"\0").replace(b"\0", b" ").decode(errors="backslashreplace")[:500]


def daemon_descriptors(host: ProbedHost) -> Table:
    """What Xen's daemons have open -> how many of each kind."""
    found: Counter[str] = Counter()
    for process in _all_processes().values():
        if process.name not in DAEMONS:
            continue
        folder = str(ROOT / "proc" / str(process.pid) / "fd")
        for name in os.listdir(folder):
            try:
                found[f"{process.name} {descriptor_kind(os.readlink(f'{folder}/{name}'))}"] += 1
            except FileNotFoundError:
                continue
    return {name: str(count) for name, count in found.items()}


def descriptor_kind(target: str) -> str:
    """``socket:[123]`` -> ``socket``, ``/dev/pts/7`` -> ``/dev/pts``."""
    if target.startswith("/dev/pts/"):
        return "/dev/pts"
    return target.partition(":[")[0] if not target.startswith("anon_inode:") else target


def block_devices(host: ProbedHost) -> Table:
    """Loop devices in use -> their file; device-mapper and nbd devices -> their name or owner."""
    found = {}
    folder = ROOT / "sys/block"
    for name in os.listdir(folder) if folder.is_dir() else ():
        for kind, attribute in (("loop", "loop/backing_file"), ("dm-", "dm/name"), ("nbd", "pid")):
            if name.startswith(kind):
                value = _read(folder / name / attribute)
                if value is not None:
                    found[name] = value
    return found


def network_links(host: ProbedHost) -> Table:
    """Interface -> its kind and the bridge it is in."""
    folder = ROOT / "sys/class/net"
    found = {}
    for name in os.listdir(folder) if folder.is_dir() else ():
        if not (folder / name).is_dir():
            continue  # bonding_masters is a file
        kind = next((k for k, a in _LINK_KINDS if (folder / name / a).exists()), "link")
        master = folder / name / "master"
        bridge = os.path.basename(os.readlink(master)) if master.is_symlink() else ""
        found[name] = f"{kind} in {bridge}" if bridge else kind
    return found


_LINK_KINDS = (("tap", "tun_flags"), ("bridge", "bridge"), ("device", "device"))


def files(host: ProbedHost) -> Table:
    """Path -> its kind, below the folders where Xen's tools and ours keep things."""
    found: Table = {}
    own = (paths.run_dir(), paths.log_dir(), paths.cache_dir() / "sent")
    roots = dict.fromkeys(os.path.realpath(f) for f in (*(ROOT / f[1:] for f in FOLDERS), *own))
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            for name in (*subfolders, *names):
                path = os.path.join(folder, name)
                found[_shown(path)] = _file_kind(path)
            if len(found) > FILES_MAX:
                raise HostError(f"more than {FILES_MAX} files below {root}")
    return found


def _shown(path: str) -> str:
    """As seen from ``ROOT``, under the name people use: /run/lock is /var/lock."""
    inside = "/" + os.path.relpath(path, os.path.realpath(ROOT))
    return "/var" + inside.removeprefix("/run") if inside.startswith("/run/lock") else inside


def _file_kind(path: str) -> str:
    if os.path.islink(path):
        return "link"
    if os.path.isdir(path):
        return "folder"
    return "file" if os.path.isfile(path) else "special file"


def kernel_log(host: ProbedHost) -> Table:
    """Sequence number -> text, for lines that tell of trouble."""
    path = ROOT / "dev/kmsg"
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    found = {}
    try:
        while True:
            try:
                record = os.read(fd, 8192)
            except BlockingIOError:
                break
            except BrokenPipeError:  # the oldest records went while we read: go on with the next
                continue
            if not record:
                break
            if not KERNEL_TROUBLE.search(record):
                continue
            for line in record.decode(errors="replace").splitlines():
                head, _, text = line.partition(";")
                fields = head.split(",")
                if len(fields) >= 3 and KERNEL_TROUBLE.search(text.encode()):
                    found[f"message {fields[1]}"] = text
    finally:
        os.close(fd)
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="backslashreplace").strip()
    except OSError:
        return None


PROBES: dict[str, Probe] = {
    "block devices": block_devices,
    "network links": network_links,
    "processes": processes,
    "daemon descriptors": daemon_descriptors,
    "files": files,
    "kernel log": kernel_log,
}
