"""Guests of a host in memory, which run nothing: in their place, what a page's reader sees of them."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from xtool.backends.consolelog import ConsoleLog, log_path
from xtool.toolstack.host import Host
from xtool.xenstore.client import StoreClient

HVM_PARAM_CALLBACK_IRQ = 0
#: What the test guests print when they are up.
READY = b"XTOOL-GUEST-READY\r\n"


class GuestsInMemory:
    """While it is entered: what is started prints ``READY`` on a console that xtool serves, and a guest that
    is asked to shut down or to reboot does."""

    def __init__(self, host: Host) -> None:
        assert isinstance(host.store, StoreClient)
        self._host = host
        self._store = StoreClient(host.store.connector)
        self._over = threading.Event()
        self._greeted: set[str] = set()
        self._watching = threading.Event()
        self._thread = threading.Thread(target=self._answer)

    def __enter__(self) -> GuestsInMemory:
        self._thread.start()
        assert self._watching.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._store.close()

    def _answer(self) -> None:
        with self._store.watch("/local/domain") as watch:
            self._watching.set()
            while not self._over.is_set():
                for path in watch.wait(0.1):
                    self._look(path.split("/"))

    def _look(self, words: list[str]) -> None:
        if len(words) < 5 or not words[3].isdecimal() or words[3] == "0":
            return
        domain, node = "/".join(words[:4]), "/".join(words[4:])
        if node == "control/shutdown":
            reason = {"poweroff": 0, "reboot": 1}.get(self._store.get(f"{domain}/{node}") or "")
            if reason is not None:
                self._host.hv.shutdown_domain(int(words[3]), reason)
        elif domain not in self._greeted and (console := self._store.get(f"{domain}/console/type")):
            self._greeted.add(domain)
            self._started(int(words[3]), (self._store.get(f"{domain}/vm") or "").rpartition("/")[2], console)

    def _started(self, domid: int, uuid: str, console: str) -> None:
        state = self._host.hv.domain(domid)
        if state is not None and state.hvm:  # its drivers are there, and hear a request
            self._host.hv.set_hvm_param(domid, HVM_PARAM_CALLBACK_IRQ, 1)
        if console == "xtool":
            log = ConsoleLog(log_path(uuid))
            log.add(READY, len(READY))
            log.close()


class KeptOpen:
    """One host over all commands of a page: each closes its client, the host stays."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return (lambda: None) if name == "close" else getattr(self._client, name)
