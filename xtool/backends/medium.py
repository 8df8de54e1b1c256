"""What is in a drive: nothing, an image, or an image with a thread that carries out its requests.

A thread is for images that may keep requests waiting (``SlowImage``). Whoever lets go of rings or image
interrupts what is under way, and waits for that alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from xtool.backends.frame import BackendContext
from xtool.backends.images import Geometry, Image, SlowImage, open_image, parse_params
from xtool.backends.loop import Fault
from xtool.backends.worker import Worker

#: How long opening an image may keep the domain's other devices waiting, seconds.
OPEN_TIME = 12.0


class Medium:
    """Empty to begin with. ``failed`` is told what the thread raises, ``complain`` gets lines for the log."""

    def __init__(self, context: BackendContext, failed: Fault, complain: Callable[[str], None]) -> None:
        self._context = context
        self._failed = failed
        self._complain = complain
        self._interrupting = False
        self.image: Image | None = None
        self.worker: Worker | None = None

    def open(self, params: str, *, readonly: bool, before: Geometry | None) -> None:
        """Put in what ``params`` names. ``before`` is how it looked to the process whose rings are taken
        over: a slow image is opened with the first request then, for its server may be away. Raises
        ``HostError``, ``DeadlineError``."""
        wanted = parse_params(params)
        if wanted is None:
            return
        form, target = wanted
        folder = self._context.folder
        self.image = open_image(target, form, readonly=readonly, folder=folder, tell=self._complain)
        slow = self._slow
        if slow is None:
            return
        self.worker = Worker(self._context.loop, self._failed)
        if before is not None:
            slow.assume(before)
            return
        try:
            self.worker.call(slow.open, OPEN_TIME)
        except BaseException:
            self.close()
            raise

    @property
    def _slow(self) -> SlowImage | None:
        return cast(SlowImage, self.image) if self.image is not None and self.image.waits else None

    @property
    def busy(self) -> bool:
        """Nothing else can be carried out now."""
        return self.worker is not None and self.worker.busy

    def refresh(self, then: Callable[[], None]) -> bool:
        """Have the image look at its geometry, then call ``then``. False if it needs no time for that."""
        slow, worker = self._slow, self.worker
        if slow is None or worker is None:
            return False
        worker.start(slow.refresh, lambda _: then())
        return True

    def interrupt(self, *, forget: bool) -> None:
        """Nothing is under way afterwards. ``forget``: it gets no answers, else errors."""
        slow, worker = self._slow, self.worker
        if slow is not None and worker is not None and worker.busy:
            self._interrupting = True
            slow.cancel()
            worker.settle(forget=forget)
            slow.allow()
            self._interrupting = False

    def complain(self, text: str) -> None:
        """About a request."""
        if not self._interrupting:
            self._complain(text)

    def close(self) -> None:
        """Empty again."""
        self.interrupt(forget=True)
        slow, image, worker = self._slow, self.image, self.worker
        self.image = self.worker = None
        if slow is not None:
            slow.cancel()  # an opening that did not end in time
        if worker is not None:
            worker.close()
        if image is not None:
            image.close()

    def describe(self) -> dict[str, object]:
        slow = self._slow
        return slow.describe() if slow is not None else {}
