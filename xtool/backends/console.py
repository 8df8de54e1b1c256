"""Our backend of a guest's consoles: what it prints goes into a bounded log and to everybody who looks.

Number 0 is the console every guest has. Its ring is there before the guest runs, which writes no state for
it: the toolstack writes ``console/state`` = Connected in its place. The others (``channel``) are devices like
any other, with a ring that the guest allocates.

The order of things is: log, consume, show. Killed in between, the successor finds the bytes in the ring, and
by the ring's index in the log whether they are kept already: nothing is lost and nothing is kept twice.

Facts about consoles
--------------------
* The builder grants the page of console 0 to us under the reserved reference 0 (GNTTAB_RESERVED_CONSOLE),
  which Linux leaves alone; ``console/ring-ref`` is a frame number and not used here.
* xenconsoled leaves a console alone whose ``console/type`` is not ``xenconsoled``. It serves no other
  console than 0.
* hvc_xen tells us after every write and every read. With a full ring it spins until there is room: a console
  that is read slowly costs the guest's own CPU time.
* The nodes of console 0 are domain 0's (XSA-57); those of the others are the guest's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from xtool.backends.consolefeed import Position, Since, feed_path
from xtool.backends.consolelog import DATA, ConsoleLog, Record, encode, log_path
from xtool.backends.frame import Backend, BackendContext
from xtool.backends.loop import Timer
from xtool.backends.viewers import Past, Viewers, socket_path
from xtool.devices.xenbus import DeviceId
from xtool.evtchn.dispatch import Verdict
from xtool.grant.port import Mapped
from xtool.proto import consolering
from xtool.proto.nodes import Nodes, Reader
from xtool.proto.shm import MASK32
from xtool.xenstore import paths as nodes_of
from xtool.xenstore.port import Transaction

#: The grant reference of console 0's page (``public/grant_table.h``: GNTTAB_RESERVED_CONSOLE).
RESERVED_CONSOLE = 0
#: Bytes a second taken from a guest over time, and at once: what one console may cost this process.
DRAIN_RATE, DRAIN_BURST = 8 << 20, 8 << 20
#: Looks at the ring in one round, whatever the budget: up to 2 KiB each.
_LOOKS = 16
#: After this many seconds without output the log says what it left out.
_NOTE_AFTER = 1.0
_UUID = re.compile(r"/vm/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")


class ConsoleBackend(Backend):
    """One console. Its log and its socket are there as long as the device, connected or not."""

    drain_rate: ClassVar[int] = DRAIN_RATE
    drain_burst: ClassVar[int] = DRAIN_BURST

    def __init__(self, context: BackendContext, device: DeviceId, nodes: Nodes) -> None:
        super().__init__(context, device, nodes)
        self._ring: consolering.ConsoleBackend | None = None
        self._mapped: Mapped | None = None
        self._port = -1
        self._taken = self._given = 0
        self._credit, self._credited = float(self.drain_burst), context.loop.clock()
        self._pause: Timer | None = None
        self._note: Timer | None = None
        vm = context.store.get(f"{nodes_of.domain(device.domid)}/vm") or ""
        match = _UUID.fullmatch(vm)
        name = match[1] if match else f"domain-{device.domid}"
        self.log = ConsoleLog(log_path(name, device.devid))
        place = nodes.get("path")
        try:
            feed = feed_path(device.domid, device.devid)
            if place:  # for a program of the user's, which wants to see what comes from now on
                self.viewers = Viewers(Path(place), list, feed=feed, past=self._past)
            else:
                path = socket_path(device.domid, device.devid)
                self.viewers = Viewers(path, self.log.since_boot, feed=feed, past=self._past)
        except BaseException:
            self.log.close()
            raise
        context.loop.watch(self.viewers.fileno(), self._look_at_viewers, fault=self.failed)
        if nodes.get("connection", "pty") == "pty":
            self._announce(self.viewers.open_pty())

    def _past(self, position: Position | None) -> Past:
        """What a viewer that stands at ``position`` has not seen."""
        if position is None:
            return self.log.since_boot(), encode
        pieces, boots = self.log.whole()
        return pieces, Since(position, boots)

    @property
    def primary(self) -> bool:
        return self.id.devid == 0

    def _announce(self, tty: str) -> None:
        """Write the pty's name where tools look for it, and where the guest cannot (XSA-57)."""
        place = nodes_of.console(self.id.domid) if self.primary else self.id.backend

        def change(tx: Transaction) -> None:
            if tx.exists(place):  # removed meanwhile: writing would bring a part of it back
                tx.write(f"{place}/tty", tty)

        self.context.store.atomically(change)

    # --- the device's life
    def offer(self) -> Mapping[str, str]:
        return {}

    def connect(self, frontend: Nodes) -> Mapping[str, str]:
        ring = self._attach(frontend)
        self.viewers.show(self.log.boot(ring.consumed))
        return {}

    def resume(self, frontend: Nodes) -> None:
        ring = self._attach(frontend)
        kept = self.log.last_end
        if kept is not None:
            ahead = (kept - ring.consumed) & MASK32
            # Kept by our predecessor, which died before it could give the room back.
            if 0 < ahead <= ring.pending():
                ring.consume(ahead)
                self.notify(self._port)

    def _attach(self, frontend: Nodes) -> consolering.ConsoleBackend:
        self.disconnect()
        read = Reader(frontend)
        ref = RESERVED_CONSOLE if self.primary else read.ref("ring-ref")
        remote = read.port("port")
        self._mapped = self.context.grants.map(self.id.domid, [ref])
        self._ring = consolering.ConsoleBackend(self._mapped.view[:])
        self._port = self.bind(remote, self._work)
        return self._ring

    def disconnect(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self.unbind_all()
        self._port = -1
        if self._ring is not None:
            self._ring.release()
            self._ring = None
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None

    def close(self) -> None:
        self.disconnect()
        if self._note is not None:
            self._note.cancel()
            self._note = None
        self.context.loop.unwatch(self.viewers.fileno())
        self.viewers.close()
        self.log.close()

    # --- at work
    def _work(self, budget: int) -> Verdict:
        """Take what the guest printed; give it what was typed."""
        ring = self._ring
        if ring is None:
            return Verdict.IDLE
        taken, now = 0, time.time()
        for _ in range(min(budget, _LOOKS)):
            data = ring.peek()
            if not data:
                break
            end = (ring.consumed + len(data)) & MASK32
            if not self.log.add(data, end):
                self._note_later()
            ring.consume(len(data))
            taken += len(data)
            self.viewers.show(Record(DATA, now, end, data))
        given = self._give(ring)
        if not (taken or given):
            return Verdict.IDLE
        self._taken += taken
        self.notify(self._port)
        if self._slow_down(taken):
            return Verdict.DONE
        return Verdict.MORE if ring.pending() else Verdict.DONE

    def _slow_down(self, taken: int) -> bool:
        """True if the guest printed more than its share: then its port stays masked for a while."""
        now = self.context.loop.clock()
        self._credit += (now - self._credited) * self.drain_rate
        self._credit = min(self._credit, self.drain_burst) - taken
        self._credited = now
        if self._credit > 0:
            return False
        # A removed port is not unmasked, and one that is added is called without an event.
        self.context.loop.dispatcher.remove(self._port)
        self._pause = self.context.loop.call_later(0.02, self._go_on, self.failed)
        return True

    def _go_on(self) -> None:
        self._pause = None
        if self._port >= 0:
            self.context.loop.dispatcher.add(self._port, self._work, lambda _, error: self.failed(error))

    def _give(self, ring: consolering.ConsoleBackend) -> int:
        """Put what was typed into the ring, as far as it goes."""
        if not self.viewers.input:
            return 0
        count = ring.write(bytes(self.viewers.input))
        if count:
            self.viewers.taken(count)
            self._given += count
        return count

    def _look_at_viewers(self, _events: int) -> None:
        if self.viewers.ready() and self._ring is not None and self._give(self._ring):
            self.notify(self._port)

    def _note_later(self) -> None:
        if self._note is None:
            self.complain("the guest prints more than is kept")
            self._note = self.context.loop.call_later(_NOTE_AFTER, self._write_note, self.failed)

    def _write_note(self) -> None:
        self._note = None
        self.log.note_missing()

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "read": self._taken,
            "written": self._given,
            "viewers": len(self.viewers),
            "viewers_cut": self.viewers.cut,
            "not_kept": self.log.skipped,
            "complaints": self.complain.count,
            "last_complaint": self.complain.last,
        }
        if self._ring is not None and self._mapped is not None:
            names = ("in_cons", "in_prod", "out_cons", "out_prod")
            found |= {
                "rings": [dict(zip(names, self._ring.indexes(), strict=True))],
                "ports": list(self.ports),
                "grants": [ref for _, ref in self._mapped.grants],
            }
        return found
