"""A daemon on the host in memory, in threads of the test's process, and clients of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from xtool.client.socketclient import SocketClient
from xtool.daemon.access import Access
from xtool.daemon.hosts import Hosts, shared
from xtool.daemon.main import Daemon, listen
from xtool.daemon.operations import Runner
from xtool.daemon.threads import ThreadRunner
from xtool.toolstack.host import Host


class Running(NamedTuple):
    daemon: Daemon
    path: Path
    host: Host
    hosts: Hosts

    def client(self) -> SocketClient:
        return SocketClient(str(self.path))

    def connect(self) -> socket.socket:
        link = socket.socket(socket.AF_UNIX)
        link.connect(str(self.path))
        link.settimeout(20)
        return link


@contextmanager
def running(
    host: Host, folder: Path, access: Access | None = None, runner: Runner | None = None
) -> Iterator[Running]:
    """Serves ``host`` on a socket in ``folder``; ready when it is given out."""
    hosts = shared(host)
    access = access or Access()
    daemon = Daemon(hosts, runner or ThreadRunner(hosts), access)
    path = folder / "xtoold.sock"
    daemon.start([listen(path, access)])
    assert daemon.watcher.ready.wait(20)
    try:
        yield Running(daemon, path, host, hosts)
    finally:
        daemon.close()
