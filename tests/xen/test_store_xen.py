"""The xenstore client against the real daemon, where a real domain is needed."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import suppress

import pytest

from xtool.errors import HypercallError
from xtool.hypercall.port import CreateSpec
from xtool.toolstack.host import Host
from xtool.xenstore import paths
from xtool.xenstore.client import StoreClient, open_store
from xtool.xenstore.perms import owned_by
from xtool.xenstore.transport import DeviceTransport


@pytest.fixture
def domid(xen_host: Host) -> Iterator[int]:
    number = xen_host.hv.create_domain(CreateSpec(handle=uuid.uuid4().bytes, max_vcpus=1))
    yield number
    xen_host.store.rm(paths.domain(number))
    with suppress(HypercallError):  # a test may have destroyed it
        xen_host.hv.destroy_domain(number)


def introduce(host: Host, domid: int) -> int:
    """Give the domain a page and a port for xenstore, and introduce it; the frame."""
    host.hv.set_max_memory(domid, 1 << 20)
    [frame] = host.hv.populate(domid, [0])
    host.hv.clear_page(domid, frame)
    port = host.hv.alloc_unbound(domid, 0)
    # xenstored maps the page by grant reference 1 (GNTTAB_RESERVED_XENSTORE) when the domain has it.
    with host.hv.map_grant_table(domid) as table:
        table.view[8:16] = (1).to_bytes(2, "little") + (0).to_bytes(2, "little") + frame.to_bytes(4, "little")
    host.store.introduce(domid, frame, port)
    return frame


def test_introduce(xen_host: Host, domid: int) -> None:
    store = xen_host.store
    store.mkdir(paths.domain(domid), perms=owned_by(0, read=[domid]))
    with store.watch(paths.INTRODUCE_DOMAIN) as came:
        came.wait(30)
        assert not store.is_introduced(domid)
        introduce(xen_host, domid)
        assert came.wait(30) == (paths.INTRODUCE_DOMAIN,)
        assert store.is_introduced(domid)


def test_a_destroyed_domain_is_released(xen_host: Host, domid: int) -> None:
    store = xen_host.store
    introduce(xen_host, domid)
    with store.watch(paths.RELEASE_DOMAIN) as went:
        went.wait(30)
        xen_host.hv.destroy_domain(domid)
        assert went.wait(30) == (paths.RELEASE_DOMAIN,)
    assert not store.is_introduced(domid)


def test_socket_and_device_see_the_same(xen_host: Host) -> None:
    with open_store() as by_socket, StoreClient(DeviceTransport) as by_device:
        by_socket.write("/tool/xtool-test/x", "1")
        assert by_device.get("/tool/xtool-test/x") == "1"
        by_device.rm("/tool/xtool-test")
        assert not by_socket.exists("/tool/xtool-test/x")
