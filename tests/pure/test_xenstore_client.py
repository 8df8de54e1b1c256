"""The xenstore client when things go wrong, and what it costs. The daemon is the in-memory one."""

from __future__ import annotations

import select
import signal
import socket
import threading
from collections.abc import Iterator

import pytest

from xtool.errors import DeadlineError, NoXenError, PrivilegeError, StoreError, StoreGoneError
from xtool.fake.store import FakeStoreDaemon
from xtool.fake.store_link import FakeLink
from xtool.proto.xenstore import Op, encode
from xtool.xenstore import paths, transport
from xtool.xenstore.channel import WINDOW, WINDOW_BYTES
from xtool.xenstore.client import StoreClient, open_store
from xtool.xenstore.perms import owned_by
from xtool.xenstore.transport import SocketTransport


@pytest.fixture
def daemon() -> FakeStoreDaemon:
    return FakeStoreDaemon()


@pytest.fixture
def store(daemon: FakeStoreDaemon) -> StoreClient:
    return StoreClient(daemon.connect)


class TestGone:
    def test_the_daemon_dies_and_comes_back(self, daemon: FakeStoreDaemon, store: StoreClient) -> None:
        store.write("/tool/a", "1")
        watch = store.watch("/tool/w")
        watch.wait(5)
        daemon.crash()
        with pytest.raises(StoreGoneError):
            store.read("/tool/a")
        assert store.get("/tool/a") is None  # connected again, to an empty store
        assert watch.wait(5) == ("/tool/w",)  # registered again, so it fired
        store.write("/tool/w", "2")
        assert watch.wait(5) == ("/tool/w",)

    def test_while_waiting_for_a_watch(self, daemon: FakeStoreDaemon, store: StoreClient) -> None:
        watch = store.watch("/tool/w")
        watch.wait(5)
        daemon.crash()
        with pytest.raises(StoreGoneError):
            watch.wait(5)
        assert watch.wait(5) == ("/tool/w",)

    def test_a_transaction_does_not_survive(self, daemon: FakeStoreDaemon, store: StoreClient) -> None:
        with pytest.raises(StoreGoneError), store.transaction() as tx:
            tx.write("/tool/a", "1")
            daemon.crash()
            tx.exists("/tool/a")
        with pytest.raises(StoreGoneError, match="ECONNRESET"), store.transaction() as tx:
            tx.write("/tool/a", "1")
            daemon.crash()
            with pytest.raises(StoreGoneError):
                store.read("/tool/a")
            store.exists("/tool/a")  # a new connection; the transaction must not move to it
        assert not store.exists("/tool/a")
        assert daemon.counts["transaction_start"] == 2

    def test_closing_a_watch_of_a_dead_connection(self, daemon: FakeStoreDaemon, store: StoreClient) -> None:
        with store.watch("/tool/w"):
            daemon.crash()

    def test_a_hung_daemon_costs_one_deadline(self, daemon: FakeStoreDaemon) -> None:
        store = StoreClient(daemon.connect, deadline=0.05)
        store.write("/tool/a", "1")
        daemon.hung = True
        with pytest.raises(DeadlineError, match=r"read /tool/a within 0\.05 s"):
            store.read("/tool/a")
        assert daemon.links == []  # closed: the late answer must not be taken for another one's
        daemon.hung = False
        assert store.read("/tool/a") == b"1"

    def test_events_alone_do_not_outlast_a_deadline(self, daemon: FakeStoreDaemon) -> None:
        class Chatty(FakeLink):
            def recv(self) -> bytes | None:
                self.push_event("/tool/w", "nobody")
                return super().recv()

        def connect() -> FakeLink:
            link = Chatty(daemon, 0)
            link.push_event("/tool/w", "nobody")
            return link

        daemon.hung = True
        with pytest.raises(DeadlineError):
            StoreClient(connect, deadline=0.05).read("/tool/a")

    @pytest.mark.parametrize(
        "nonsense",
        [
            b"\xff" * 64,
            encode(Op.READ, 77, b""),
            encode(Op.WRITE, 1, b"OK\0"),
            encode(Op.READ, 1, b"x" * 4096)[:12] + b"\xff\xff\0\0" + b"x" * 5000,
        ],
    )
    def test_nonsense_ends_the_connection(self, daemon: FakeStoreDaemon, nonsense: bytes) -> None:
        store = StoreClient(daemon.connect)
        daemon.hung = True
        store.connect()
        daemon.links[0].push(nonsense)
        with pytest.raises(StoreGoneError, match="EPROTO"):
            store.read("/tool/a")
        assert daemon.links == []

    @pytest.mark.parametrize("answer", [b"", b"OK", b"NO\0"])
    def test_an_acknowledgement_must_be_one(self, daemon: FakeStoreDaemon, answer: bytes) -> None:
        store = StoreClient(daemon.connect)
        daemon.hung = True
        store.connect()
        daemon.links[0].push(encode(Op.INTRODUCE, 1, answer))
        with pytest.raises(StoreGoneError, match="EPROTO"):
            store.introduce(5, 1, 1)

    @pytest.mark.parametrize("answer", [b"", b"0\0", b"-1\0", b"4294967296\0", b"x\0"])
    def test_a_transaction_number_must_be_one(self, daemon: FakeStoreDaemon, answer: bytes) -> None:
        store = StoreClient(daemon.connect)
        daemon.hung = True
        store.connect()
        daemon.links[0].push(encode(Op.TRANSACTION_START, 1, answer))
        with pytest.raises(StoreGoneError, match="EPROTO"):
            store.transaction()

    def test_an_interrupt_closes_the_connection(self, daemon: FakeStoreDaemon, store: StoreClient) -> None:
        store.connect()
        daemon.hung = True

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        old = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                store.read("/tool/a")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
        assert daemon.links == []


class TestDirectory:
    NAMES = tuple(f"child-{number:04d}" for number in range(700))

    def test_in_parts(self, store: StoreClient, daemon: FakeStoreDaemon) -> None:
        with store.batch() as batch:
            for name in self.NAMES:
                batch.write(f"/tool/d/{name}", "")
        assert store.list("/tool/d") == self.NAMES
        assert daemon.counts["directory_part"] == 2

    def test_a_daemon_that_cannot(self) -> None:
        store = StoreClient(FakeStoreDaemon(directory_part=False).connect)
        with store.batch() as batch:
            for name in self.NAMES:
                batch.write(f"/tool/d/{name}", "")
        with pytest.raises(StoreError, match="E2BIG"):
            store.list("/tool/d")

    def test_changed_between_parts(self, store: StoreClient, daemon: FakeStoreDaemon) -> None:
        with store.batch() as batch:
            for name in self.NAMES:
                batch.write(f"/tool/d/{name}", "")
        other = StoreClient(daemon.connect)
        handle, changes = daemon.handle, []

        def meddle(link: FakeLink, packet: object) -> None:
            handle(link, packet)  # type: ignore[arg-type]
            if packet.op is Op.DIRECTORY_PART and len(changes) < 2:  # type: ignore[attr-defined]
                changes.append(1)
                other.write(f"/tool/d/new-{len(changes)}", "")

        daemon.handle = meddle  # type: ignore[method-assign, assignment]
        assert store.list("/tool/d") == (*self.NAMES, "new-1", "new-2")


class TestSocket:
    """A real socket with small buffers: neither side may block the other."""

    @pytest.fixture
    def served(self, daemon: FakeStoreDaemon) -> Iterator[StoreClient]:
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        thread = threading.Thread(target=self.serve, args=(daemon, theirs), daemon=True)
        thread.start()
        client = StoreClient(lambda: SocketTransport(ours), deadline=30)
        yield client
        client.close()
        thread.join(10)
        assert not thread.is_alive()

    @staticmethod
    def serve(daemon: FakeStoreDaemon, sock: socket.socket) -> None:
        """Moves bytes; like the real daemon it does not read while it has something to say."""
        link = daemon.connect()
        with sock:
            while data := sock.recv(512):
                while data:
                    data = data[link.send(data) :]
                while reply := link.recv():
                    sock.sendall(reply)

    def test_a_long_pipeline(self, served: StoreClient) -> None:
        with served.batch() as batch:
            for number in range(300):
                batch.write(f"/tool/n/{number}", "x" * 1500)
        found = served.get_many(f"/tool/n/{number}" for number in range(300))
        assert set(found.values()) == {"x" * 1500}

    def test_hang_up(self, daemon: FakeStoreDaemon) -> None:
        ours, theirs = socket.socketpair()
        store = StoreClient(lambda: SocketTransport(ours))
        store.connect()
        theirs.close()
        with pytest.raises(StoreGoneError):
            store.read("/tool/a")


class TestCost:
    def test_a_transaction_is_three_round_trips(self, daemon: FakeStoreDaemon) -> None:
        turns = []

        class Counting(FakeLink):
            def send(self, data: bytes) -> int:
                turns.append(len(data))
                return super().send(data)

        store = StoreClient(lambda: Counting(daemon, 0))
        with store.transaction() as tx:
            for number in range(30):
                tx.write(f"/tool/n/{number}", "x", perms=("n0",))
        assert len(turns) == 3
        assert daemon.counts == daemon.counts | {"write": 30, "set_perms": 30, "transaction_end": 1}

    def test_a_transport_that_cannot_pipeline_gets_one_request_at_a_time(
        self, daemon: FakeStoreDaemon
    ) -> None:
        turns = []

        class Single(FakeLink):
            pipelines = False

            def send(self, data: bytes) -> int:
                before = sum(daemon.counts.values())
                taken = super().send(data)
                turns.append((len(data), sum(daemon.counts.values()) - before))
                return taken

        store = StoreClient(lambda: Single(daemon, 0))
        with store.batch() as batch:
            for number in range(10):
                batch.write(f"/tool/n/{number}", "x")
        assert [requests for _, requests in turns] == [1] * 10

    def test_the_window_bounds_what_is_unanswered(self, daemon: FakeStoreDaemon) -> None:
        waiting, most = [0, 0], [0, 0]

        class Watching(FakeLink):
            def send(self, data: bytes) -> int:
                before = sum(daemon.counts.values())
                taken = super().send(data)
                waiting[0] += sum(daemon.counts.values()) - before
                waiting[1] += taken
                most[:] = [max(a, b) for a, b in zip(most, waiting, strict=True)]
                return taken

            def recv(self) -> bytes | None:
                waiting[:] = [0, 0]
                return super().recv()

        store = StoreClient(lambda: Watching(daemon, 0))
        with store.batch() as batch:
            for number in range(1000):
                batch.write(f"/tool/n/{number}", "x" * (number % 2000))
        assert len(store.list("/tool/n")) == 1000
        assert most[0] <= WINDOW
        assert most[1] <= WINDOW_BYTES + 4096


class TestGuests:
    """What the in-memory daemon enforces for other domains, as the real one does."""

    @pytest.fixture
    def guest(self, daemon: FakeStoreDaemon, store: StoreClient) -> StoreClient:
        store.mkdir(paths.domain(5), perms=owned_by(0, read=[5]))
        store.mkdir(paths.domain(5) + "/data", perms=("n5",))
        store.write("/tool/secret", "s", perms=("n0",))
        return StoreClient(lambda: daemon.connect(5))

    def test_reading_and_writing(self, guest: StoreClient) -> None:
        assert guest.list(paths.domain(5)) == ("data",)
        guest.write(paths.domain(5) + "/data/x", "1")
        assert guest.get_perms(paths.domain(5) + "/data/x") == ("n5",)
        for attempt in (
            lambda: guest.read("/tool/secret"),
            lambda: guest.write(paths.domain(5) + "/name", "x"),
            lambda: guest.write(paths.domain(5) + "/data", "x") or guest.read("/tool/secret"),
            lambda: guest.rm(paths.domain(5)),
            lambda: guest.introduce(6, 1, 1),
            lambda: guest.set_perms("/tool/secret", ("n5",)),
            lambda: guest.read("/tool/not-there"),
        ):
            with pytest.raises(StoreError, match="EACCES"):
                attempt()

    def test_the_owner_stays(self, guest: StoreClient) -> None:
        path = paths.domain(5) + "/data"
        guest.set_perms(path, ("n5", "r0"))
        with pytest.raises(StoreError, match="EPERM"):
            guest.set_perms(path, ("n0",))

    def test_watches(self, guest: StoreClient, store: StoreClient) -> None:
        with guest.watch("/tool/secret") as hidden, guest.watch(paths.domain(5)) as own:
            hidden.wait(5), own.wait(5)
            store.write("/tool/secret", "t")
            store.write(paths.domain(5) + "/name", "web")
            assert own.wait(5) == (paths.domain(5) + "/name",)
            assert hidden.pending() == ()

    def test_introduce_release_and_death(self, daemon: FakeStoreDaemon, store: StoreClient) -> None:
        with store.watch(paths.INTRODUCE_DOMAIN) as came, store.watch(paths.RELEASE_DOMAIN) as went:
            came.wait(5), went.wait(5)
            store.introduce(5, 0xFEFF, 3)
            assert daemon.introduced == {5: (0xFEFF, 3)}
            assert store.is_introduced(5)
            assert came.wait(5) == (paths.INTRODUCE_DOMAIN,)
            store.release(5)
            assert went.wait(5) == (paths.RELEASE_DOMAIN,)
            store.introduce(6, 1, 1)
            daemon.domain_gone(6)
            assert went.wait(5) == (paths.RELEASE_DOMAIN,)
            assert not store.is_introduced(6)


class TestOpening:
    def test_no_xen(self, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
        monkeypatch.setattr(transport, "SOCKETS", (f"{tmp_path}/socket",))
        monkeypatch.setattr(transport, "DEVICE", f"{tmp_path}/xenbus")
        with pytest.raises(NoXenError) as caught:
            open_store()
        assert "-H lab" in (caught.value.hint or "")

    def test_nobody_listens(self, tmp_path: object) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"{tmp_path}/socket")
            with pytest.raises(StoreGoneError, match="ECONNREFUSED"):
                open_store(f"{tmp_path}/socket")

    def test_no_permission(self) -> None:
        assert isinstance(transport._explain("/x", PermissionError(13, "no")), PrivilegeError)


def test_paths() -> None:
    assert paths.join("/a", "b", 3) == "/a/b/3"
    assert paths.join("/") == "/"
    assert paths.join("/", "a") == "/a"
    assert [paths.parent(p) for p in ("/a/b", "/a", "/")] == ["/a", "/", "/"]
    assert paths.is_below("/a/b", "/a") and paths.is_below("/a", "/a") and paths.is_below("/a", "/")
    assert not paths.is_below("/ab", "/a")
    assert paths.backend(0, "vbd", 5, 51712) == "/local/domain/0/backend/vbd/5/51712"
    assert paths.frontend(5, "vif", 0) == "/local/domain/5/device/vif/0"


def test_fileno_of_the_fake_is_quiet_when_nothing_waits(store: StoreClient) -> None:
    with store.watch("/tool/w") as watch:
        watch.wait(5)
        assert select.select([store.fileno()], [], [], 0)[0] == []
