"""Our block backend: a disk image behind one or more rings.

A queue takes all the requests it finds (bounded by the round's budget), carries them out as one batch
(``blockio``), and answers them in their order through the response journal. So whenever this process dies,
the requests from ``rsp_prod`` on are those without an answer, and a successor carries them out again: reads
and writes of sectors can be repeated.

An image that may keep its requests waiting has a thread of its own (``medium``): a batch at a time is carried
out there, and the loop goes on.

Facts about block frontends
---------------------------
* Linux looks at the size again when the backend writes its state once more (``blkback_changed``, Connected).
* After Closing a Linux frontend keeps its rings until the disk is not used any more; they are served on.
* ``feature-persistent`` is not offered: with grant copy there is nothing to keep mapped.
* A request's answer to an error is final for Linux: it gives the error to the file system, without a retry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from xtool.backends.blockio import BlockEngine
from xtool.backends.frame import Backend, BackendContext, reason_of
from xtool.backends.images import Geometry
from xtool.backends.journalfile import JournalFile
from xtool.backends.medium import Medium
from xtool.backends.throttle import Throttle
from xtool.devices.xenbus import DeviceId
from xtool.errors import RingError, XtoolError
from xtool.evtchn.dispatch import Verdict
from xtool.grant.window import Buffer
from xtool.proto.blkfeatures import (
    BlockFrontend,
    BlockOffer,
    BlockQueue,
    device_nodes,
    offer_nodes,
    parse_frontend,
)
from xtool.proto.blkif import (
    SECTOR,
    Layout,
    Request,
    build_response,
    parse_request,
)
from xtool.proto.nodes import Nodes
from xtool.proto.ring import BackRing
from xtool.proto.ringjournal import ResponseJournal

#: Data under way at a time, bytes, of all queues of a disk together. The largest request has 1 MiB.
BUFFER = 2 << 20
MAX_QUEUES = 4
#: Nodes of our directory for limits; domain 0 writes them.
LIMIT_NODES = ("xtool-bytes-per-second", "xtool-ops-per-second")


class BlockBackend(Backend):
    """One disk. Raises ``HostError`` when its image cannot be opened."""

    def __init__(self, context: BackendContext, device: DeviceId, nodes: Nodes) -> None:
        super().__init__(context, device, nodes)
        self.readonly = "w" not in nodes.get("mode", "r")
        self.medium = Medium(context, self.failed, self.complain)
        self._look = False  # at the size, when the medium is free
        self._queues: list[_Queue] = []
        self.throttle = Throttle(context.loop.clock)
        self._open_image(taking_over=nodes.get("state") in ("4", "5"))
        self.parameters = self._offer()
        self.limits = self.parameters.limits()
        self._buffer = Buffer(BUFFER)
        self.engine = BlockEngine(context.grants, context.domid, self._buffer, self.medium.complain)
        self._set_throttle()

    # --- the image
    def _open_image(self, *, taking_over: bool = False) -> None:
        before = self._predecessors_geometry() if taking_over else None
        self.medium.open(self.nodes.get("params", ""), readonly=self.readonly, before=before)

    def _predecessors_geometry(self) -> Geometry:
        names = ("sectors", "physical-sector-size", "discard-granularity")
        sectors, physical, granularity = (_number(self.nodes.get(name)) for name in names)
        return Geometry(sectors * SECTOR, max(SECTOR, physical), granularity)

    def _geometry(self) -> Geometry:
        if self.medium.image is None:
            return Geometry(0)
        try:
            return self.medium.image.geometry()
        except OSError as error:
            self.complain(f"its size: {error}")
            return Geometry(0)

    def _offer(self) -> BlockOffer:
        geometry = self._geometry()
        discard = self.nodes.get("discard-enable", "1") != "0" and not self.readonly
        return BlockOffer(
            sectors=geometry.size // SECTOR,
            readonly=self.readonly,
            cdrom=self.nodes.get("device-type") == "cdrom",
            removable=self.nodes.get("removable") == "1",
            barrier=True,
            discard_granularity=geometry.discard_granularity if discard else 0,
            max_queues=MAX_QUEUES,
            physical_sector_size=geometry.physical_sector,
        )

    def _set_throttle(self) -> None:
        rates = [_number(self.nodes.get(name)) for name in LIMIT_NODES]
        self.throttle = Throttle(self.context.loop.clock, *rates)

    def reconfigure(self, nodes: Nodes) -> None:
        """Another medium, another size, other limits: what changed is taken up, with the rings running."""
        before, self.nodes = self.nodes, nodes
        self._set_throttle()
        if nodes.get("params", "") != before.get("params", ""):
            self.medium.interrupt(forget=False)
            self.medium.close()
            try:
                self._open_image()
            except XtoolError as error:
                self.complain(reason_of(error))  # the drive is empty now
        self._look = True
        self.look_again()

    def look_again(self) -> None:
        """When the medium is free: at its size if that was asked for, and at the rings."""
        if self.medium.busy:
            return
        look, self._look = self._look, False
        if look and self.medium.refresh(self.look_again):
            return
        self.look_at_size()
        if self.medium.worker is not None:
            for queue in self._queues:
                queue.call_soon()

    def look_at_size(self) -> None:
        """Tell the frontend when the image has another size now."""
        geometry = self._geometry()
        if geometry.size // SECTOR != self.parameters.sectors:
            self.parameters = self.parameters._replace(sectors=geometry.size // SECTOR)
            self.limits = self.parameters.limits()
            if self._queues:
                self.context.publish(self.id, {"sectors": str(self.parameters.sectors)})

    # --- the states
    def offer(self) -> Mapping[str, str]:
        return offer_nodes(self.parameters)

    def connect(self, frontend: Nodes) -> Mapping[str, str]:
        self._attach(parse_frontend(frontend, self.parameters), fresh=True)
        return device_nodes(self.parameters)

    def resume(self, frontend: Nodes) -> None:
        offered = self._as_offered()
        self._attach(parse_frontend(frontend, offered), fresh=False)
        for queue in self._queues:
            queue.wake_peer()
        if self.nodes.get("sectors") != str(self.parameters.sectors):
            self.context.publish(self.id, {"sectors": str(self.parameters.sectors)})

    def _as_offered(self) -> BlockOffer:
        """What our predecessor offered, by its nodes: another version may have had other limits."""
        order, queues = (
            _number(self.nodes.get(name), fallback)
            for name, fallback in (("max-ring-page-order", 0), ("multi-queue-max-queues", 1))
        )
        return self.parameters._replace(max_ring_page_order=min(order, 4), max_queues=min(max(queues, 1), 64))

    def _attach(self, wanted: BlockFrontend, *, fresh: bool) -> None:
        self.disconnect_queues(keep=not fresh)
        for number, parameters in enumerate(wanted.queues):
            self._queues.append(_Queue(self, number, wanted.layout, parameters, fresh=fresh))

    def disconnect(self) -> None:
        self.disconnect_queues(keep=False)

    def suspend(self) -> None:
        self.disconnect_queues(keep=True)

    def disconnect_queues(self, *, keep: bool) -> None:
        """``keep`` the journals, for a successor."""
        self.medium.interrupt(forget=True)
        self.unbind_all()
        while self._queues:
            self._queues.pop().close(keep=keep)

    def close(self) -> None:
        self.medium.close()
        self._buffer.close()

    def describe(self) -> dict[str, Any]:
        return {
            "image": self.medium.describe(),
            "params": self.nodes.get("params", ""),
            "sectors": self.parameters.sectors,
            "readonly": self.readonly,
            "queues": [queue.describe() for queue in self._queues],
            "counters": asdict(self.engine.counters),
        }


class _Queue:
    """One ring, its port and its journal."""

    def __init__(
        self, backend: BlockBackend, number: int, layout: Layout, parameters: BlockQueue, *, fresh: bool
    ) -> None:
        self._backend = backend
        self._layout = layout
        self._parameters = parameters
        self._delayed = False
        context = backend.context
        self._mapped = context.grants.map(context.domid, parameters.refs)
        self._journal: JournalFile | None = None
        self._ring: BackRing | None = None
        self._port = 0
        try:
            path = context.folder / f"vbd-{backend.id.devid}-{number}.journal"
            # The ring's slots are of the larger size, so there are at most so many.
            slots = len(self._mapped.view) // layout.slot_size
            size = ResponseJournal.size_for(slots, layout.response.size)
            self._journal = JournalFile(path, size)
            attach = BackRing if fresh else BackRing.recover
            view = self._mapped.view[:]
            try:
                self._ring = attach(view, layout.slot_size, self._journal.journal)
            except RingError:
                view.release()
                raise
            self._port = backend.bind(parameters.port, self._handle)
        except Exception:
            self.close(keep=not fresh)
            raise

    @property
    def ring(self) -> BackRing:
        assert self._ring is not None
        return self._ring

    def wake_peer(self) -> None:
        """A notification may have been lost with our predecessor."""
        self.ring.publish()
        self._backend.notify(self._port)

    def _handle(self, budget: int) -> Verdict:
        ring, backend = self.ring, self._backend
        medium = backend.medium
        done = 0
        while done < budget:
            if medium.busy:
                return Verdict.DONE  # called again when it is free
            if backend.throttle and (wait := backend.throttle.wait()) > 0:
                self._delay(wait)
                return Verdict.DONE
            slots = ring.take(budget - done)
            if not slots:
                if ring.final_check():
                    continue
                return Verdict.DONE if done else Verdict.IDLE
            done += len(slots)
            self._serve(slots)
        return Verdict.MORE

    def _serve(self, slots: list[bytes]) -> None:
        backend, layout = self._backend, self._layout
        requests = [parse_request(slot, backend.limits, layout) for slot in slots]
        before = backend.engine.counters.bytes
        image, worker = backend.medium.image, backend.medium.worker
        if worker is None:
            self._answer(requests, before, backend.engine.run(image, requests, backend.limits))
            return
        step = partial(backend.engine.run, image, requests, backend.limits)
        worker.start(step, partial(self._answer, requests, before))

    def _answer(self, requests: list[Request], before: int, statuses: list[int]) -> None:
        backend, layout = self._backend, self._layout
        self.ring.put(
            [build_response(r, status, layout) for r, status in zip(requests, statuses, strict=True)]
        )
        if self.ring.publish():
            backend.notify(self._port)
        if backend.throttle:
            backend.throttle.charge(backend.engine.counters.bytes - before, len(requests))
        if backend.medium.worker is not None:
            backend.look_again()

    def call_soon(self) -> None:
        """Look at the ring in the loop's next round."""
        dispatcher = self._backend.context.loop.dispatcher
        dispatcher.add(self._port, self._handle, lambda _, error: self._backend.failed(error))

    def _delay(self, seconds: float) -> None:
        """Look again later; events that come meanwhile find that there is time yet."""
        if self._delayed:
            return
        self._delayed = True
        port = self._port

        def again() -> None:
            self._delayed = False
            if port in self._backend.ports:
                self.call_soon()

        self._backend.context.loop.call_later(seconds, again)

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "port": self._port,
            "remote_port": self._parameters.port,
            "refs": list(self._parameters.refs),
            "protocol": self._layout.protocol,
        }
        ring = self._ring
        if ring is not None:
            found |= {
                "slots": ring.size,
                "req_cons": ring.req_cons,
                "rsp_prod": ring.rsp_prod,
                "unanswered": ring.unanswered,
                "broken": ring.broken,
            }
            try:
                found["pending"] = ring.pending()
            except RingError as error:
                found["broken"] = error.message
        return found

    def close(self, *, keep: bool) -> None:
        if self._ring is not None:
            self._ring.release()
            self._ring = None
        journal, self._journal = self._journal, None
        if journal is not None:
            if keep:
                journal.close()
            else:
                journal.remove()
        self._mapped.close()


def _number(text: str | None, fallback: int = 0) -> int:
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 16 else fallback
