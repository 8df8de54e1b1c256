"""What a store must do, asked of the in-memory daemon and, where Xen is, of the real one.

Everything is made below ``ROOT`` and removed afterwards.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator

import pytest

from xtool.errors import DeadlineError, LocalProtocolError, StoreError, XtoolError
from xtool.fake.store import FakeStoreDaemon
from xtool.fake.store_link import FakeLink
from xtool.xenstore import paths
from xtool.xenstore.client import StoreClient
from xtool.xenstore.perms import PRIVATE, owned_by
from xtool.xenstore.transport import DEVICE, SOCKETS, DeviceTransport, connect_default
from xtool.xenstore.watches import MAX_PENDING, wait_for

#: Of this process alone: somebody else may run the same tests on the same host.
ROOT = f"/tool/xtool-test-{os.getpid()}"
Opener = Callable[[], StoreClient]


def _dribble(daemon: FakeStoreDaemon) -> FakeLink:
    link = daemon.connect()
    link.chunk = 7  # splits every header and every reply
    return link


@pytest.fixture(
    params=[
        "fake",
        "fake-dribble",
        pytest.param("socket", marks=pytest.mark.xen),
        pytest.param("device", marks=pytest.mark.xen),
    ]
)
def opener(request: pytest.FixtureRequest) -> Iterator[Opener]:
    """Opens further clients of the same daemon."""
    connect: Callable[[], object]
    if request.param.startswith("fake"):
        daemon = FakeStoreDaemon()
        connect = daemon.connect if request.param == "fake" else lambda: _dribble(daemon)
    elif request.param == "socket":
        if not any(os.path.exists(path) for path in SOCKETS):
            pytest.skip("no xenstored on this machine: run in the lab's dom0")
        connect = connect_default
    else:
        if not os.path.exists(DEVICE):
            pytest.skip("no /dev/xen/xenbus on this machine: run in the lab's dom0")
        connect = DeviceTransport
    clients: list[StoreClient] = []

    def open_client() -> StoreClient:
        clients.append(StoreClient(connect))  # type: ignore[arg-type]
        return clients[-1]

    cleaner = open_client()
    cleaner.rm(ROOT)
    yield open_client
    cleaner.rm(ROOT)
    for client in clients:
        client.close()


@pytest.fixture
def store(opener: Opener) -> StoreClient:
    return opener()


class TestValues:
    def test_write_then_read(self, store: StoreClient) -> None:
        store.write(f"{ROOT}/a", "hello")
        assert store.read(f"{ROOT}/a") == b"hello"
        assert store.read_text(f"{ROOT}/a") == "hello"

    def test_empty_and_binary_values_survive(self, store: StoreClient) -> None:
        store.write(f"{ROOT}/empty", "")
        assert store.read(f"{ROOT}/empty") == b""
        store.write(f"{ROOT}/bin", bytes(range(1, 256)))
        assert store.read(f"{ROOT}/bin") == bytes(range(1, 256))
        assert "\\xff" in store.read_text(f"{ROOT}/bin")

    def test_parents_are_made_and_empty(self, store: StoreClient) -> None:
        store.write(f"{ROOT}/a/b/c", "1")
        assert store.read(f"{ROOT}/a/b") == b""
        assert store.list(f"{ROOT}/a") == ("b",)

    def test_missing_node(self, store: StoreClient) -> None:
        with pytest.raises(StoreError) as caught:
            store.read(f"{ROOT}/nothing")
        assert (caught.value.errno, caught.value.path) == ("ENOENT", f"{ROOT}/nothing")
        assert store.get(f"{ROOT}/nothing") is None
        assert store.get(f"{ROOT}/nothing", "x") == "x"
        assert not store.exists(f"{ROOT}/nothing")
        with pytest.raises(StoreError, match="ENOENT"):
            store.list(f"{ROOT}/nothing")

    def test_get_many(self, store: StoreClient) -> None:
        store.write(f"{ROOT}/a", "1")
        assert store.get_many([f"{ROOT}/a", f"{ROOT}/b"]) == {f"{ROOT}/a": "1", f"{ROOT}/b": None}
        assert store.get_many([]) == {}

    def test_list_and_perms_of_many(self, store: StoreClient) -> None:
        store.write(f"{ROOT}/a/x", "1", perms=owned_by(0, read=[5]))
        found = store.list_many([f"{ROOT}/a", f"{ROOT}/b", f"{ROOT}/a/x"])
        assert found == {f"{ROOT}/a": ("x",), f"{ROOT}/b": None, f"{ROOT}/a/x": ()}
        perms = store.get_perms_many([f"{ROOT}/a/x", f"{ROOT}/b"])
        assert perms == {f"{ROOT}/a/x": ("n0", "r5"), f"{ROOT}/b": None}

    def test_mkdir_keeps_what_is_there(self, store: StoreClient) -> None:
        store.write(f"{ROOT}/a", "kept")
        store.mkdir(f"{ROOT}/a")
        store.mkdir(f"{ROOT}/b/c")
        assert store.read(f"{ROOT}/a") == b"kept"
        assert store.read(f"{ROOT}/b/c") == b""

    def test_rm_removes_the_tree_and_may_find_nothing(self, store: StoreClient) -> None:
        store.write(f"{ROOT}/a/b/c", "1")
        store.rm(f"{ROOT}/a")
        assert not store.exists(f"{ROOT}/a/b/c")
        assert "a" not in store.list(ROOT)
        store.rm(f"{ROOT}/a")
        store.rm(f"{ROOT}/no/parent")

    def test_bad_requests_never_reach_the_daemon(self, store: StoreClient) -> None:
        for path in ("relative", "/a//b", "/a/", "/a b", "/ä", "/" + "x" * 3072, "@introduceDomain", ""):
            with pytest.raises(LocalProtocolError):
                store.read(path)
        with pytest.raises(LocalProtocolError, match="4096"):
            store.write(f"{ROOT}/a", "x" * 4096)
        with pytest.raises(LocalProtocolError):
            store.set_perms(ROOT, ["x0"])
        store.write(f"{ROOT}/a", "x" * 2000)  # oxenstored refuses more than 2048 from anybody

    def test_a_directory_longer_than_one_message(
        self, request: pytest.FixtureRequest, store: StoreClient
    ) -> None:
        names = [f"child-with-a-rather-long-name-{number:04d}" for number in range(250)]
        with store.batch() as batch:
            for name in names:
                batch.write(f"{ROOT}/many/{name}", "")
        try:
            assert sorted(store.list(f"{ROOT}/many")) == names
        except StoreError as error:  # oxenstored over a ring can send it neither whole nor in parts
            assert (error.errno, request.node.callspec.params["opener"]) == ("E2BIG", "device")
            return
        assert sorted(store.list_many([f"{ROOT}/many"])[f"{ROOT}/many"] or ()) == names


class TestPerms:
    def test_inherited_from_the_parent(self, store: StoreClient) -> None:
        store.mkdir(f"{ROOT}/a", perms=owned_by(0, read=[7]))
        store.write(f"{ROOT}/a/b/c", "1")
        assert store.get_perms(f"{ROOT}/a/b") == ("n0", "r7")
        assert store.get_perms(f"{ROOT}/a/b/c") == ("n0", "r7")

    def test_set_on_the_node_only(self, store: StoreClient) -> None:
        store.write(f"{ROOT}/a/b", "1", perms=("n0", "b9"))
        store.set_perms(f"{ROOT}/a", PRIVATE)
        assert store.get_perms(f"{ROOT}/a") == ("n0",)
        assert store.get_perms(f"{ROOT}/a/b") == ("n0", "b9")

    def test_of_a_missing_node(self, store: StoreClient) -> None:
        with pytest.raises(StoreError, match="ENOENT"):
            store.get_perms(f"{ROOT}/nothing")
        with pytest.raises(StoreError, match="ENOENT"):
            store.set_perms(f"{ROOT}/nothing", PRIVATE)


class TestBatch:
    def test_longer_than_the_window(self, store: StoreClient) -> None:
        with store.batch() as batch:
            for number in range(500):
                batch.write(f"{ROOT}/n/{number}", "x" * 200)
        assert len(store.list(f"{ROOT}/n")) == 500
        assert set(store.get_many(f"{ROOT}/n/{n}" for n in range(500)).values()) == {"x" * 200}

    def test_the_first_refusal_is_raised_and_the_rest_is_done(self, store: StoreClient) -> None:
        with pytest.raises(StoreError) as caught, store.batch() as batch:
            batch.write(f"{ROOT}/a", "1")
            batch.set_perms(f"{ROOT}/missing", PRIVATE)
            batch.rm(f"{ROOT}/no/parent")
            batch.write(f"{ROOT}/b", "2")
        assert (caught.value.operation, caught.value.path) == ("set-perms", f"{ROOT}/missing")
        assert store.get_many([f"{ROOT}/a", f"{ROOT}/b"]) == {f"{ROOT}/a": "1", f"{ROOT}/b": "2"}

    def test_an_exception_drops_it(self, store: StoreClient) -> None:
        with pytest.raises(KeyError), store.batch() as batch:
            batch.write(f"{ROOT}/a", "1")
            raise KeyError
        assert not store.exists(f"{ROOT}/a")


class TestTransactions:
    def test_commit(self, opener: Opener) -> None:
        store, other = opener(), opener()
        with store.transaction() as tx:
            tx.write(f"{ROOT}/a", "1", perms=("n0", "r3"))
            tx.mkdir(f"{ROOT}/d")
            assert tx.get(f"{ROOT}/a") == "1"
            assert tx.list(ROOT) in (("a", "d"), ("d", "a"))
            assert tx.get_perms(f"{ROOT}/a") == ("n0", "r3")
            assert not other.exists(f"{ROOT}/a")
        assert other.get(f"{ROOT}/a") == "1"

    def test_abort_on_exception_and_on_refusal(self, store: StoreClient) -> None:
        with pytest.raises(KeyError), store.transaction() as tx:
            tx.write(f"{ROOT}/a", "1")
            tx.exists(f"{ROOT}/a")
            raise KeyError
        with pytest.raises(StoreError, match="ENOENT"), store.transaction() as tx:
            tx.write(f"{ROOT}/a", "1")
            tx.set_perms(f"{ROOT}/missing", PRIVATE)
        assert not store.exists(f"{ROOT}/a")

    def test_conflict(self, opener: Opener) -> None:
        store, other = opener(), opener()
        store.write(f"{ROOT}/n", "1")
        with pytest.raises(StoreError) as caught, store.transaction() as tx:
            value = int(tx.read(f"{ROOT}/n"))
            other.write(f"{ROOT}/n", "10")
            tx.write(f"{ROOT}/n", str(value + 1))
        assert (caught.value.operation, caught.value.errno) == ("commit", "EAGAIN")
        assert store.get(f"{ROOT}/n") == "10"

    def test_atomically_tries_again(self, opener: Opener) -> None:
        store, other = opener(), opener()
        store.write(f"{ROOT}/n", "1")
        tries = []

        def add(tx: object) -> str:
            value = int(tx.read(f"{ROOT}/n"))  # type: ignore[attr-defined]
            if len(tries) < 3:
                other.write(f"{ROOT}/n", str(value + 100))
            tries.append(value)
            tx.write(f"{ROOT}/n", str(value + 1))  # type: ignore[attr-defined]
            return "done"

        assert store.atomically(add) == "done"
        assert tries == [1, 101, 201, 301]
        assert store.get(f"{ROOT}/n") == "302"

    def test_atomically_gives_up_or_falls_back(self, opener: Opener) -> None:
        store, other = opener(), opener()
        store.write(f"{ROOT}/n", "0")

        def change(tx: object) -> None:
            value = int(tx.read(f"{ROOT}/n"))  # type: ignore[attr-defined]
            other.write(f"{ROOT}/n", str(value + 1))
            tx.write(f"{ROOT}/mine", "x")  # type: ignore[attr-defined]
            tx.write(f"{ROOT}/n", "mine")  # type: ignore[attr-defined]

        with pytest.raises(StoreError, match="EAGAIN"):
            store.atomically(change, deadline=0.2)
        assert not store.exists(f"{ROOT}/mine")
        store.atomically(change, deadline=0.2, plain_fallback=True)
        assert store.get_many([f"{ROOT}/mine", f"{ROOT}/n"]) == {f"{ROOT}/mine": "x", f"{ROOT}/n": "mine"}

    def test_atomically_lets_other_errors_through(self, store: StoreClient) -> None:
        def change(tx: object) -> None:
            tx.write(f"{ROOT}/a", "1")  # type: ignore[attr-defined]
            raise XtoolError("no")

        with pytest.raises(XtoolError, match="no"):
            store.atomically(change)
        assert not store.exists(f"{ROOT}/a")


class TestWatches:
    def test_fires_at_once_and_on_change(self, opener: Opener) -> None:
        store, other = opener(), opener()
        with store.watch(f"{ROOT}/w") as watch:
            assert watch.wait(10) == (f"{ROOT}/w",)
            other.write(f"{ROOT}/w/a", "1")
            assert watch.wait(10) == (f"{ROOT}/w/a",)
            other.rm(f"{ROOT}/w")
            # oxenstored tells of each node below as well; xenstored only of the one removed.
            assert f"{ROOT}/w" in watch.wait(10)

    def test_removing_the_parent_fires(self, opener: Opener) -> None:
        store, other = opener(), opener()
        other.write(f"{ROOT}/p/w", "1")
        with store.watch(f"{ROOT}/p/w") as watch:
            watch.wait(10)
            other.rm(f"{ROOT}/p")
            assert watch.wait(10) == (f"{ROOT}/p/w",)

    def test_set_perms_fires_and_reading_does_not(self, opener: Opener) -> None:
        store, other = opener(), opener()
        other.write(f"{ROOT}/w", "1")
        with store.watch(f"{ROOT}/w") as watch:
            watch.wait(10)
            other.read(f"{ROOT}/w")
            assert watch.wait(0.05) == ()
            other.set_perms(f"{ROOT}/w", PRIVATE)
            assert watch.wait(10) == (f"{ROOT}/w",)

    def test_transaction_fires_on_commit_only(self, opener: Opener) -> None:
        store, other = opener(), opener()
        with store.watch(f"{ROOT}/w") as watch:
            watch.wait(10)
            with other.transaction() as tx:
                tx.write(f"{ROOT}/w", "1")
                tx.exists(f"{ROOT}/w")  # sends the write
                store.exists(ROOT)  # a round trip: an event sent before would be here now
                assert watch.pending() == ()
            assert watch.wait(10) == (f"{ROOT}/w",)

    def test_changes_are_coalesced_and_bounded(self, opener: Opener) -> None:
        store, other = opener(), opener()
        with store.watch(f"{ROOT}/w") as watch:
            watch.wait(10)
            with other.batch() as batch:
                for _ in range(50):
                    batch.write(f"{ROOT}/w/same", "x")
            store.exists(ROOT)
            assert watch.pending() == (f"{ROOT}/w/same",)
            with other.batch() as batch:
                for number in range(MAX_PENDING + 30):
                    batch.write(f"{ROOT}/w/{number}", "x")
            store.exists(ROOT)
            assert watch.pending() == (f"{ROOT}/w",)

    def test_events_that_come_between_replies_are_kept(self, store: StoreClient) -> None:
        with store.watch(f"{ROOT}/w") as watch:
            watch.wait(10)
            for number in range(5):
                store.write(f"{ROOT}/w/{number}", "x")
                assert store.read(f"{ROOT}/w/{number}") == b"x"
            assert watch.wait(10) == tuple(f"{ROOT}/w/{n}" for n in range(5))

    def test_several_watches_on_one_path(self, opener: Opener) -> None:
        store, other = opener(), opener()
        first, second = store.watch(f"{ROOT}/w"), store.watch(f"{ROOT}/w")
        first.wait(10), second.wait(10)
        first.close()
        other.write(f"{ROOT}/w", "1")
        assert second.wait(10) == (f"{ROOT}/w",)
        assert first.pending() == ()
        second.close()
        second.close()

    def test_fileno_is_readable_when_something_came(self, opener: Opener) -> None:
        store, other = opener(), opener()
        with store.watch(f"{ROOT}/w") as watch:
            watch.wait(10)
            other.write(f"{ROOT}/w", "1")
            assert select.select([watch.fileno()], [], [], 10)[0]
            assert watch.pending() == (f"{ROOT}/w",)

    def test_wait_for(self, opener: Opener) -> None:
        store, other = opener(), opener()
        path = f"{ROOT}/state"
        other.write(path, "1")
        with pytest.raises(DeadlineError, match="the state is 4"):
            wait_for(store, [path], lambda: store.get(path) == "4" or None, 0.05, "the state is 4")
        thread = threading.Thread(target=lambda: [other.write(path, str(n)) for n in range(5)])
        thread.start()
        assert wait_for(store, [path], lambda: store.get(path) == "4" or None, 20, "the state is 4")
        thread.join()

    def test_special_watches_can_be_registered(self, store: StoreClient) -> None:
        with store.watch(paths.INTRODUCE_DOMAIN) as first, store.watch(paths.RELEASE_DOMAIN) as second:
            assert first.wait(10) == (paths.INTRODUCE_DOMAIN,)
            assert second.wait(10) == (paths.RELEASE_DOMAIN,)


class TestDomains:
    def test_domain_zero(self, store: StoreClient) -> None:
        assert store.is_introduced(0)
        assert store.domain_path(0) == "/local/domain/0"
        assert store.domain_path(12) == paths.domain(12)

    def test_a_domain_that_is_not_there(self, store: StoreClient) -> None:
        assert not store.is_introduced(32000)
        store.release(32000)

    @pytest.mark.parametrize("domid", [0, -1, 0x7FF0])
    def test_no_guest_is_never_released_or_introduced(self, store: StoreClient, domid: int) -> None:
        """oxenstored would do it for domain 0, and remove the whole tree."""
        with pytest.raises(LocalProtocolError):
            store.release(domid)
        with pytest.raises(LocalProtocolError):
            store.introduce(domid, 1, 1)
        assert store.exists("/local/domain/0")
