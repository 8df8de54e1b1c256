"""CPU time of backends: of processes, of kernel threads, of domains.

Facts
-----
* The CPU-time clock of any process can be read by its number, in nanoseconds and with the threads that ended
  already: ``(~pid << 3) | CPUCLOCK_SCHED``. ``/proc/PID/stat`` says the same in steps of 10 ms.
* blkback's thread is ``<domid>.<dev>-<queue>`` (before Linux 4.x ``blkback.<domid>.<dev>``), netback's are
  ``vif<domid>.<handle>-q<queue>-guest-rx`` and ``...-dealloc``. What they hand on to others (work of loop
  devices, softirqs) is in domain 0's time only, which Xen counts: the fairer measure between backends.
* In a deterministic lab the processors take turns and share one clock: CPU time of one is charged while the
  other runs, if both are busy. Compare it between backends, not with a real machine.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from xtool.hypercall.port import Hypervisor

_CPUCLOCK_SCHED = 2
T = TypeVar("T")


def process_ns(pid: int) -> int:
    """CPU time of a process. Raises ``OSError`` when it is gone."""
    return time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)


def names() -> dict[int, str]:
    """Every process and kernel thread by its number."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                with open(f"/proc/{entry}/comm") as file:
                    found[int(entry)] = file.read().strip()
            except OSError:
                pass  # it ended
    return found


def blkback_threads(processes: Mapping[int, str], domid: int, vdev: str) -> list[int]:
    return _matching(processes, rf"(blkback\.)?{domid}\.{re.escape(vdev)}(-\d+)?")


def netback_threads(processes: Mapping[int, str], domid: int, handle: int) -> list[int]:
    return _matching(processes, rf"vif{domid}\.{handle}-q\d+-.*")


def named(processes: Mapping[int, str], name: str) -> list[int]:
    return _matching(processes, re.escape(name))


def _matching(processes: Mapping[int, str], pattern: str) -> list[int]:
    return sorted(pid for pid, name in processes.items() if re.fullmatch(pattern, name))


class Meter:
    """What domain 0 and a backend's ``pids`` spend while something is done. Without pids, as when none was
    found, there is no figure for the backend."""

    def __init__(self, hv: Hypervisor, pids: Iterable[int]) -> None:
        self._hv = hv
        self._pids = tuple(pids)

    def _read(self) -> dict[str, int]:
        dom0 = self._hv.domain(0)
        found = {"dom0": dom0.cpu_time} if dom0 else {}
        if self._pids:
            found["backend"] = sum(process_ns(pid) for pid in self._pids)
        return found

    def during(self, action: Callable[[], T]) -> tuple[T, dict[str, int]]:
        before = self._read()
        result = action()
        after = self._read()
        return result, {who: after[who] - before[who] for who in before if who in after}
