"""Tests on real Xen: they run in the lab's dom0 (or on a real Xen host), and nothing may be left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from xtool.toolstack import leaks
from xtool.toolstack.host import Host, open_host
from xtool.toolstack.keeper import reap_children
from xtool.toolstack.local import LocalClient

#: How long Xen, the daemons and the kernel may take to let go of everything, seconds.
SETTLE = 60.0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaves_things: what the test leaves behind is intended")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.xen)
            if not os.path.exists("/dev/xen/privcmd"):
                item.add_marker(pytest.mark.skip(reason="no Xen on this machine: run in the lab's dom0"))


@pytest.fixture(scope="session")
def xen_host() -> Iterator[Host]:
    """This host's ports: ``host.hv``, ``host.store``."""
    host = open_host()
    before = signal.signal(signal.SIGCHLD, lambda *_: reap_children())
    yield host
    signal.signal(signal.SIGCHLD, before)
    host.close()


@pytest.fixture
def client(xen_host: Host) -> Iterator[LocalClient]:
    """The verbs on this host; test domains that are left are destroyed."""
    client = LocalClient(xen_host)
    yield client
    for domain in client.list():
        if domain.name.startswith("xtool-test-"):
            client.destroy(str(domain.domid))


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test when the host does not look afterwards as it did before.

    A test that leaves things on purpose (for the next step of a story) is marked ``leaves_things``.
    """
    if request.node.get_closest_marker("leaves_things"):
        yield
        return
    host: Host = request.getfixturevalue("xen_host")
    before = leaks.snapshot(host)
    yield
    left = leaks.wait_clean(host, before, SETTLE)
    if left:
        pytest.fail("left behind:\n" + "\n".join(f"  {leak}" for leak in left), pytrace=False)
