"""The hosts that the daemon's threads work on.

Facts: a ``StoreClient`` belongs to one thread, so each thread that works gets a host of its own out of a pool
and gives it back. A host on which something failed in a way that says nothing about the request is closed,
not given back. The hypervisor in memory has no locks, so all its hosts share it through one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any, cast

from xtool.errors import StoreGoneError, XtoolError
from xtool.toolstack.host import Host, open_host
from xtool.toolstack.local import LocalClient

if TYPE_CHECKING:
    from xtool.hypercall.port import Hypervisor

#: Hosts that are kept open while nobody works on them.
IDLE_MAX = 8


class Hosts:
    """``open`` makes another host of the same machine; any thread may call."""

    def __init__(self, open_one: Callable[[], Host], *, uri: str = "xen:") -> None:
        self.uri = uri
        self.open = open_one
        self._idle: list[Host] = []
        self._lock = Lock()

    @contextmanager
    def client(self) -> Iterator[LocalClient]:
        """A client for one verb. Raises what opening a host raises."""
        with self._lock:
            host = self._idle.pop() if self._idle else None
        host = host or self.open()
        try:
            yield LocalClient(host)
        except StoreGoneError:
            host.close()
            raise
        except XtoolError:
            self._give_back(host)  # it said no to this request, and is as good as before
            raise
        except BaseException:
            host.close()
            raise
        self._give_back(host)

    def _give_back(self, host: Host) -> None:
        with self._lock:
            if len(self._idle) < IDLE_MAX:
                self._idle.append(host)
                return
        host.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for host in idle:
            host.close()


def hosts_of(uri: str = "xen:") -> Hosts:
    """Of this machine's Xen (``xen:``), or of one machine in memory (``fake:``)."""
    if uri != "fake:":
        return Hosts(lambda: open_host(uri), uri=uri)
    return shared(open_host(uri))


def shared(host: Host) -> Hosts:
    """Of a host in memory: all see the same domains and the same xenstore, each by its own connection."""
    from xtool.xenstore.client import StoreClient

    assert isinstance(host.store, StoreClient)
    connect = host.store.connector
    hv = cast("Hypervisor", _Locked(host.hv))
    return Hosts(lambda: replace(host, hv=hv, store=StoreClient(connect)), uri="fake:")


class _Locked:
    """An object whose methods exclude each other; closing it does nothing."""

    def __init__(self, inner: object) -> None:
        self._inner, self._lock = inner, RLock()

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                return found(*args, **kwargs)

        return call
