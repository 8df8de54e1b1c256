"""Our block backend: a disk image behind one or more rings (``blockqueue``).

Nodes of its directory, beside those every vbd has (``devices/vbd.py``)
-----------------------------------------------------------------------
``xtool-bytes-per-second``, ``xtool-ops-per-second``   limits; none or 0 is no limit
``xtool-persistent``   ``1``: persistent grants are offered

An image that may keep its requests waiting has a thread of its own (``medium``): a batch at a time is carried
out there, and the loop goes on.

Facts about block frontends
---------------------------
* Linux looks at the size again when the backend writes its state once more (``blkback_changed``, Connected).
* After Closing a Linux frontend keeps its rings until the disk is not used any more; they are served on.
* An older blkfront writes ``feature-persistent`` whether or not we offer it, and without our offer it takes
  its grants back after each request: so both must have said it.
* A request's answer to an error is final for Linux: it gives the error to the file system, without a retry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from xtool.backends.blockdata import CopiedData
from xtool.backends.blockio import BlockEngine
from xtool.backends.blocklane import Lane
from xtool.backends.blockpages import MappedData, page_limit
from xtool.backends.blockqueue import Queue
from xtool.backends.frame import Backend, BackendContext, reason_of
from xtool.backends.images import Geometry
from xtool.backends.medium import Medium
from xtool.backends.throttle import Line, Throttle
from xtool.devices.xenbus import DeviceId
from xtool.errors import XtoolError
from xtool.grant.window import Buffer
from xtool.proto.blkfeatures import (
    BlockFrontend,
    BlockOffer,
    device_nodes,
    offer_nodes,
    parse_frontend,
)
from xtool.proto.blkif import SECTOR
from xtool.proto.nodes import Nodes

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
        self._queues: list[Queue] = []
        self.throttle = Throttle(context.loop.clock)
        self.line = Line(self.throttle, lambda pause, due: context.loop.call_later(pause, due, self.failed))
        self._open_image(taking_over=nodes.get("state") in ("4", "5"))
        self.parameters = self._offer()
        self.limits = self.parameters.limits()
        self._buffer = Buffer(BUFFER)
        copied = CopiedData(context.grants, context.domid, self._buffer, self.medium.complain)
        self.engine = BlockEngine(copied, self.medium.complain)
        self.lane = Lane(
            context.grants, context.domid, self._buffer, self.engine.counters, self.medium.complain
        )
        self._mapped: MappedData | None = None
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
            persistent=self.nodes.get("xtool-persistent") == "1",
            max_queues=MAX_QUEUES,
            physical_sector_size=geometry.physical_sector,
        )

    def _set_throttle(self) -> None:
        rates = tuple(_number(self.nodes.get(name)) for name in LIMIT_NODES)
        if rates != self.throttle.rates:
            self.throttle.set(*rates)
            self.line.hurry()

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
        self._attach(parse_frontend(frontend, self.parameters), self.parameters.persistent, fresh=True)
        return device_nodes(self.parameters)

    def resume(self, frontend: Nodes) -> None:
        offered = self._as_offered()
        self._attach(parse_frontend(frontend, offered), offered.persistent, fresh=False)
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
        return self.parameters._replace(
            max_ring_page_order=min(order, 4),
            max_queues=min(max(queues, 1), 64),
            persistent=self.nodes.get("feature-persistent") == "1",
        )

    def _attach(self, wanted: BlockFrontend, offered: bool, *, fresh: bool) -> None:
        """``offered``: whether the frontend was offered persistent grants."""
        self.disconnect_queues(keep=not fresh)
        for number, parameters in enumerate(wanted.queues):
            self._queues.append(Queue(self, number, wanted.layout, parameters, fresh=fresh))
        if offered and wanted.persistent:
            limit = page_limit(sum(queue.ring.size for queue in self._queues))
            context = self.context
            self._mapped = self.engine.mapped = MappedData(
                context.grants, context.domid, self._buffer, limit, context.loop.clock, self.medium.complain
            )

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
        mapped, self._mapped, self.engine.mapped = self._mapped, None, None
        if mapped is not None:
            mapped.detach()

    def close(self) -> None:
        self.medium.close()
        self.lane.close()
        self._buffer.close()

    def describe(self) -> dict[str, Any]:
        return {
            "image": self.medium.describe(),
            "params": self.nodes.get("params", ""),
            "sectors": self.parameters.sectors,
            "readonly": self.readonly,
            "bytes_per_second": self.throttle.rates[0],
            "ops_per_second": self.throttle.rates[1],
            "waiting": self.line.busy,
            "persistent": None if self._mapped is None else self._mapped.describe(),
            "queues": [queue.describe() for queue in self._queues],
            "counters": asdict(self.engine.counters),
        }


def _number(text: str | None, fallback: int = 0) -> int:
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 16 else fallback
