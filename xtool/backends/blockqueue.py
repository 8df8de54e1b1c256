"""One ring of a disk, its port and its journal.

A queue takes all the requests it finds (bounded by the round's budget), carries them out as one batch
(``blockio``), and answers them in their order through the response journal. So whenever this process dies,
the requests from ``rsp_prod`` on are those without an answer, and a successor carries them out again: reads
and writes of sectors can be repeated.

Where the disk has limits, requests that were taken and must wait are held here, so the ring bounds them. All
queues of the disk stand in one line.

While the image's thread is at work (``medium``), nothing is taken; the disk then has every queue look again.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from xtool.backends.images import RawImage
from xtool.backends.journalfile import JournalFile
from xtool.errors import RingError
from xtool.evtchn.dispatch import Verdict
from xtool.proto.blkfeatures import BlockQueue
from xtool.proto.blkif import (
    SECTOR,
    BadRequest,
    Discard,
    Indirect,
    Layout,
    Request,
    build_response,
    parse_request,
)
from xtool.proto.ring import BackRing
from xtool.proto.ringjournal import ResponseJournal

if TYPE_CHECKING:
    from xtool.backends.block import BlockBackend

_PAGE = 4096
#: Requests carried out in one turn of the line.
_TURN = 64


class Queue:
    """Raises ``GrantError``, ``EventChannelError``, ``RingError``."""

    def __init__(
        self, backend: BlockBackend, number: int, layout: Layout, parameters: BlockQueue, *, fresh: bool
    ) -> None:
        self._backend = backend
        self._layout = layout
        self._parameters = parameters
        self._held: list[bytes] = []
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
        line = self._backend.line
        if line.busy:  # nobody goes past those who wait
            line.join(self, self._turn)
            return Verdict.IDLE
        return self._work(budget)

    def _turn(self) -> None:
        """Our turn in the line."""
        try:
            if self._work(_TURN) is Verdict.MORE:
                self._backend.line.join(self, self._turn)
        except Exception as error:
            self._backend.failed(error)

    def _work(self, budget: int) -> Verdict:
        ring, backend = self.ring, self._backend
        done = 0
        while done < budget:
            if backend.medium.busy:
                return Verdict.DONE  # called again when it is free
            if not self._held:
                self._held = ring.take(budget - done)
            if not self._held:
                if ring.final_check():
                    continue
                return Verdict.DONE if done else Verdict.IDLE
            share = self._share()
            if not share:
                backend.line.join(self, self._turn)
                return Verdict.DONE
            slots, self._held = self._held[:share], self._held[share:]
            done += share
            self._serve(slots)
        return Verdict.MORE

    def _share(self) -> int:
        """How many of the held requests the limits let through now; the last may go beyond them."""
        throttle = self._backend.throttle
        if not throttle:
            return len(self._held)
        if throttle.wait() > 0:
            return 0
        bytes_left, ops_left = throttle.room()
        count = 0
        for slot in self._held:
            bytes_left -= _most_bytes(parse_request(slot, self._backend.limits, self._layout))
            ops_left -= 1
            if count and (bytes_left < 0 or ops_left < 0):
                break
            count += 1
        return count

    def _serve(self, slots: list[bytes]) -> None:
        backend, layout, limits = self._backend, self._layout, self._backend.limits
        image, worker = backend.medium.image, backend.medium.worker
        before = backend.engine.counters.bytes
        if type(image) is RawImage and backend.engine.mapped is None:
            answers = backend.lane.carry_out(image, slots, limits, layout)
            if answers is not None:
                self._reply(answers, before)
                return
        requests = [parse_request(slot, limits, layout) for slot in slots]
        step = partial(backend.engine.run, image, requests, limits)
        if worker is None:
            self._answer(requests, before, step())
        else:
            worker.start(step, partial(self._answer, requests, before))

    def _answer(self, requests: list[Request], before: int, statuses: list[int]) -> None:
        layout = self._layout
        answers = [build_response(r, status, layout) for r, status in zip(requests, statuses, strict=True)]
        self._reply(answers, before)

    def _reply(self, answers: list[bytes], before: int) -> None:
        backend = self._backend
        self.ring.put(answers)
        if self.ring.publish():
            backend.notify(self._port)
        if backend.throttle:
            backend.throttle.charge(backend.engine.counters.bytes - before, len(answers))
        if backend.medium.worker is not None:
            backend.look_again()

    def call_soon(self) -> None:
        """Look at the ring in the loop's next round."""
        dispatcher = self._backend.context.loop.dispatcher
        dispatcher.add(self._port, self._handle, lambda _, error: self._backend.failed(error))

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
                "held": len(self._held),
                "broken": ring.broken,
            }
            try:
                found["pending"] = ring.pending()
            except RingError as error:
                found["broken"] = error.message
        return found

    def close(self, *, keep: bool) -> None:
        """``keep`` the journal, for a successor: it finds what is held here on the ring."""
        self._backend.line.leave(self)
        self._held = []
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


def _most_bytes(request: Request) -> int:
    """What a request may move, at most."""
    if isinstance(request, Indirect):
        return request.nr_segments * _PAGE
    return 0 if isinstance(request, Discard | BadRequest) else request.sectors * SECTOR
