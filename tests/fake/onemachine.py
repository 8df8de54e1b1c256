"""The machine in memory as a process of its own, which other processes share: a daemon, its jobs, plain
commands and keepers, all of them real, any of which may be killed.

``python onemachine.py machine|daemon|command|zygote FOLDER [ARGUMENT ...]``

The machine serves two sockets in ``FOLDER``: ``store`` speaks xenstored's protocol, ``xen`` takes calls of
the hypervisor's and the kernel's methods. What a caller has mapped or open ends with its connection, as with
a process on a real host; a page is stored when its mapping is closed.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from xtool.errors import HostError, HostMemoryError, HypercallError, XtoolError

_PAGE = 4096


# --- the machine ----------------------------------------------------------------------------------------
def machine(folder: Path) -> None:
    from xtool.devices.hotplug.fake import FakeKernel
    from xtool.fake.hypervisor import FakeHypervisor
    from xtool.fake.store import FakeStoreDaemon

    daemon = FakeStoreDaemon()
    hv = FakeHypervisor()
    hv.gone = daemon.domain_gone
    kernel = FakeKernel(daemon)
    whole = _Machine(daemon, hv, kernel)
    store = socket.socket(socket.AF_UNIX)
    store.bind(str(folder / "store"))
    store.listen(128)
    threading.Thread(target=_accept_store, args=(daemon, store), daemon=True).start()
    with Listener(str(folder / "xen"), "AF_UNIX", backlog=128) as listener:
        print("ready", flush=True)
        while True:
            threading.Thread(target=whole.serve, args=(listener.accept(),), daemon=True).start()


class _Machine:
    def __init__(self, daemon: Any, hv: Any, kernel: Any) -> None:
        from xtool.fake.store_link import _LOCK

        self.daemon, self.hv, self.kernel = daemon, hv, kernel
        self.lock = _LOCK  # the drivers work within xenstored's requests: one lock for all

    def serve(self, link: Connection) -> None:
        held: dict[int, Any] = {}
        with suppress(EOFError, OSError), link:
            while True:
                what, name, args, keys = link.recv()
                with self.lock:
                    try:
                        answer: Any = ("done", self._call(held, what, name, args, keys))
                    except HypercallError as error:
                        answer = ("refused", (type(error) is HostMemoryError, error.operation, error.errno))
                    except XtoolError as error:
                        answer = ("error", (error.message, error.hint))
                link.send(answer)
        with self.lock:
            for thing in held.values():  # whoever held it is gone, and wrote nothing back
                if hasattr(thing, "view"):
                    thing._mfns = ()
                thing.close()

    def _call(self, held: dict[int, Any], what: str, name: str, args: Any, keys: Any) -> Any:
        if what == "close":
            thing = held.pop(args[0])
            if args[1] is not None:
                thing.view[:] = args[1]
            thing.close()
            return None
        if what == "state":
            return {
                "domains": sorted(self.hv.all),
                "mapped": self.hv.mapped,
                "free": self.hv._free,
                "claimed": sum(domain.claimed for domain in self.hv.all.values()),
                "nodes": sorted(self.daemon.dump()),
                "introduced": sorted(self.daemon.introduced),
                "loops": dict.fromkeys(self.kernel.loops),
                "served": [str(device) for device in self.kernel.served],
            }
        if what == "end":
            self.hv.shutdown_domain(*args)
            self.daemon._fire("@releaseDomain", exact=False)
            return None
        found = getattr(self.hv if what == "hv" else self.kernel, name)
        if not callable(found):
            return found
        made = found(*args, **keys)
        if name in ("map_foreign", "map_grant_table", "open_disk"):
            held[id(made)] = made
            if name == "open_disk":
                return id(made), (made.path, made.major, made.minor, made.loop)
            return id(made), bytes(made.view)
        return made


def _accept_store(daemon: Any, listener: socket.socket) -> None:
    while True:
        near, _ = listener.accept()
        threading.Thread(target=_relay, args=(daemon, near), daemon=True).start()


def _relay(daemon: Any, near: socket.socket) -> None:
    """Between a client's socket and a connection of the xenstored in memory."""
    from xtool.fake.store_link import _LOCK

    with _LOCK:
        link = daemon.connect()
    with suppress(OSError), near:
        while True:
            ready = select.select([near, link.fileno()], [], [])[0]
            if near in ready:
                data = near.recv(65536)
                if not data:
                    break
                link.send(data)
            while answer := link.recv():
                near.sendall(answer)
    link.close()


# --- its users ------------------------------------------------------------------------------------------
class Remote:
    """The methods of ``what``, carried out over there. Belongs to one thread."""

    def __init__(self, folder: Path, what: str) -> None:
        self._link = Client(str(folder / "xen"), "AF_UNIX")
        self._what = what
        self._lock = threading.Lock()
        self.count = 0

    def ask(self, what: str, name: str = "", *args: Any, **keys: Any) -> Any:
        with self._lock:
            try:
                self._link.send((what, name, args, keys))
                kind, answer = self._link.recv()
            except (EOFError, OSError) as error:
                raise HostError(f"the machine is gone: {error}") from None
        self.count += 1
        if kind == "refused":
            short, operation, number = answer
            raise (HostMemoryError if short else HypercallError)(operation, number)
        if kind == "error":
            raise HostError(answer[0], hint=answer[1])
        return answer

    @property
    def versions(self) -> Any:
        return self.ask("hv", "versions")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **keys: self.ask(self._what, name, *args, **keys)

    def map_foreign(self, domid: int, gfns: Sequence[int], *, writable: bool = True) -> _Mapping:
        return _Mapping(self, *self.ask("hv", "map_foreign", domid, list(gfns), writable=writable), writable)

    def map_grant_table(self, domid: int, frames: int = 1) -> _Mapping:
        return _Mapping(self, *self.ask("hv", "map_grant_table", domid, frames), True)

    def open_disk(self, target: str, **keys: Any) -> Any:
        number, (path, major, minor, loop) = self.ask("kernel", "open_disk", target, **keys)
        close = lambda: self.ask("close", "", number, None)  # noqa: E731
        return SimpleNamespace(path=path, major=major, minor=minor, loop=loop, close=close)

    def close(self) -> None:
        self._link.close()


class _Mapping:
    def __init__(self, remote: Remote, number: int, data: bytes, writable: bool) -> None:
        self._remote, self._number = remote, number
        self._area = mmap.mmap(-1, len(data))
        self._whole = memoryview(self._area)
        self._whole[:] = data
        self._writable = writable
        self.view = self._whole if writable else self._whole.toreadonly()

    def close(self) -> None:
        data = bytes(self._whole) if self._writable else None
        self.view.release()
        self._whole.release()
        self._area.close()
        self._remote.ask("close", "", self._number, data)

    def __enter__(self) -> _Mapping:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Glance:
    """What a keeper asks the hypervisor."""

    def __init__(self, folder: Path) -> None:
        self._remote = Remote(folder, "hv")

    def ended(self, domid: int, handle: bytes = b"") -> bool:
        state = self._remote.domain(domid) if domid >= 0 else None
        return state is None or state.shutdown or bool(handle and state.handle != handle)

    def close(self) -> None:
        self._remote.close()


class _Census:
    """What the watcher asks it."""

    def __init__(self, folder: Path) -> None:
        self._remote = Remote(folder, "hv")

    def domains(self) -> Any:
        from xtool.hypercall.glance import Domains, domain_key

        found = Domains(set(), set())
        for state in self._remote.domains():
            if not state.dying:
                (found.ended if state.shutdown else found.running).add(domain_key(state.domid, state.handle))
        return found

    def close(self) -> None:
        self._remote.close()


def settle_in(folder: Path) -> None:
    """From here on this process' Xen is the machine in ``folder``."""
    from xtool.toolstack import host as host_module
    from xtool.xenstore import transport

    transport.SOCKETS = (str(folder / "store"),)  # type: ignore[assignment]

    def open_host(uri: str = "xen:") -> Any:
        from xtool.xenstore.client import open_store

        hv: Any = Remote(folder, "hv")
        kernel: Any = Remote(folder, "kernel")
        return host_module.Host(hv, open_store(), hotplug=kernel)

    host_module.open_host = open_host
    from xtool.daemon import watcher
    from xtool.toolstack import deathwatch, keeping, watching, watchlink

    watcher.KEEPER_PERIOD = 0.2
    watchlink.PATIENCE = 3.0
    for module in (keeping, watching):
        module._RESCAN = 1.0
        module._RETRY = 0.2
    deathwatch.Glance = lambda: _Glance(folder)  # type: ignore[assignment, misc]
    deathwatch.Census = lambda: _Census(folder)  # type: ignore[assignment, misc]


def main() -> int:
    what, folder, rest = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if what == "machine":
        machine(folder)
        return 0
    settle_in(folder)
    if what == "daemon":
        from xtool.daemon.main import run

        return run("xen:", folder / "xtoold.sock", int(rest[0]))
    if what == "zygote":
        from xtool.daemon import zygote

        sys.argv[:] = ["zygote"]
        zygote.main()
        return 0
    os.environ["XTOOL_CONNECT"] = "xen:"
    from xtool.cli import app

    return app.main(rest)


if __name__ == "__main__":
    sys.exit(main())
