"""Tests on real Xen: they run in the lab's dom0 (or on a real Xen host), and nothing may be left behind."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from cells import write_collected

from xtool.errors import DomainNotFoundError
from xtool.toolstack import leaks
from xtool.toolstack.host import Host, open_host
from xtool.toolstack.keeper import reap_children
from xtool.toolstack.local import LocalClient

#: Nothing is promised by such a test yet. Taking the mark off is the last step of finishing what it tests.
_UNPROVEN = "not yet seen passing on real Xen: XTOOL_UNPROVEN=1 runs it"
#: Minutes of emulation each, and shorter tests look at the same code: not in every run.
_LONG = "long: XTOOL_LONG=1 runs it"
#: Tests that are compared with one look at the host: each look costs seconds in emulation. What one of them
#: leaves behind shows in itself and not in the next, which starts from a new look.
_TESTS_PER_LOOK = 20

#: Of Xen's log, in the report of a failed test.
_LOG_LINES = 40

#: How long Xen, the daemons and the kernel may take to let go of everything, seconds.
SETTLE = 60.0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaves_things: what the test leaves behind is intended")
    config.addinivalue_line(
        "markers", "cell(device, backend, frontend, guest): of the interop matrix; cells.py"
    )
    config.addinivalue_line("markers", "long: minutes of emulation; see _LONG")
    config.addinivalue_line("markers", "unproven: written, not yet seen passing on real Xen; see _UNPROVEN")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.xen)
            if item.get_closest_marker("unproven") and not os.environ.get("XTOOL_UNPROVEN"):
                item.add_marker(pytest.mark.skip(reason=_UNPROVEN))
            if item.get_closest_marker("long") and not os.environ.get("XTOOL_LONG"):
                item.add_marker(pytest.mark.skip(reason=_LONG))
            if not os.path.exists("/dev/xen/privcmd"):
                item.add_marker(pytest.mark.skip(reason="no Xen on this machine: run in the lab's dom0"))


def pytest_collection_finish(session: pytest.Session) -> None:
    if path := os.environ.get("XTOOL_CELLS"):
        write_collected(session.items, path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What Xen said lately is part of a failure: why a guest crashed is nowhere else."""
    report = yield
    if report.failed and "xen_host" in getattr(item, "funcargs", {}):
        with closing(LocalClient(open_host())) as client:  # the test's own may be closed by now
            report.sections.append(("Xen's log", "\n".join(client.dmesg().splitlines()[-_LOG_LINES:])))
    return report


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """pytest's folder, gone right after the test: in the lab it lies in memory, and disk images do in it."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


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
            with suppress(DomainNotFoundError):  # it has ended by itself meanwhile
                client.destroy(str(domain.domid))


class _Look:
    """The look at the host that several tests in a row are compared with."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._seen: leaks.HostSnapshot | None = None
        self._uses = 0

    def before(self, host: Host) -> leaks.HostSnapshot:
        if self._seen is None or self._uses == _TESTS_PER_LOOK:
            self._seen, self._uses = leaks.snapshot(host), 0
        self._uses += 1
        return self._seen


_look = _Look()


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test when the host does not look afterwards as it did before.

    A test that leaves things on purpose (for the next step of a story) is marked ``leaves_things``.
    """
    if request.node.get_closest_marker("leaves_things"):
        _look.forget()
        yield
        return
    host: Host = request.getfixturevalue("xen_host")
    before = _look.before(host)
    yield
    left = leaks.wait_clean(host, before, SETTLE)
    if left:
        _look.forget()
        pytest.fail("left behind:\n" + "\n".join(f"  {leak}" for leak in left), pytrace=False)
