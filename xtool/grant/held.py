"""Pages that one of the grant devices maps for us, and that are ours until they are closed."""

from __future__ import annotations

from fcntl import ioctl
from types import TracebackType
from typing import Protocol, Self

from xtool.abi import linux as lx
from xtool.errors import GrantError, LocalProtocolError
from xtool.grant.window import Window


class Holder(Protocol):
    """A device, as its pages see it."""

    #: The device's own SET_UNMAP_NOTIFY.
    NOTIFY: int

    def fileno(self) -> int: ...

    def forget(self, pages: HeldPages, index: int, count: int) -> None:
        """``count`` pages at offset ``index`` of the device are mapped no longer."""


class HeldPages:
    """``count`` pages, shown by ``view``; ``index`` is their offset within the device."""

    def __init__(self, device: Holder, window: Window, index: int, count: int) -> None:
        self.view = window.view
        self._device = device
        self._window = window
        self._index = index
        self._count = count

    def notify_on_unmap(self, offset: int | None = None, port: int | None = None) -> None:
        size = self._window.size
        if offset is not None and not 0 <= offset < size:
            raise LocalProtocolError(f"unmap notification at byte {offset} of {size}")
        action = 0 if offset is None else lx.UNMAP_NOTIFY_CLEAR_BYTE
        action |= 0 if port is None else lx.UNMAP_NOTIFY_SEND_EVENT
        request = bytes(
            lx.GntdevUnmapNotify(
                index=self._index + (offset or 0), action=action, event_channel_port=port or 0
            )
        )
        try:
            ioctl(self._device.fileno(), self._device.NOTIFY, request)
        except OSError as error:
            raise GrantError("an unmap notification", error.errno or 0) from None

    def close(self) -> None:
        # Unmapping comes first since it may be refused. The order makes no difference to the kernel.
        if not self._window.closed:
            self._window.close()
            self._device.forget(self, self._index, self._count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
