"""Faults of a host and of the toolstack's own processes, on the machine in memory. ``docs/faults.md`` lists
them all; each test here names its number of that list (FI) or of the requirements (R)."""

from __future__ import annotations

import errno
import os
import random
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from daemons import Running, running
from test_churn import Machine
from test_create import assert_empty, fake, tree

from xtool import paths
from xtool.cli import app as cli
from xtool.client.socketclient import SocketClient
from xtool.config import DomainConfig
from xtool.devicemodel.argv import build_argv
from xtool.devicemodel.spec import MIB, DeviceModelSpec
from xtool.devices.hotplug.fake import FakeKernel
from xtool.errors import (
    DeadlineError,
    DomainExistsError,
    DomainNotFoundError,
    HostError,
    HostMemoryError,
    HypercallError,
    StoreError,
    XtoolError,
)
from xtool.fake.domain import refuse
from xtool.fake.hypervisor import FakeHypervisor
from xtool.fake.store import FakeStoreDaemon, Refusal
from xtool.proto.xsperms import may_read, may_write
from xtool.toolstack import create as create_module
from xtool.toolstack import journal, lifecycle
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.create import create
from xtool.toolstack.destroy import destroy, recover
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient
from xtool.toolstack.names import find
from xtool.xenstore import paths as nodes
from xtool.xenstore.client import StoreClient

Config = Callable[..., DomainConfig]
RUN, PAUSED = CreateOptions(), CreateOptions(paused=True)
MANY = 50
#: Nodes that stay by custom.
CUSTOM = {"/local", "/local/domain", "/local/domain/0", "/vm", "/libxl", "/tool"}


@pytest.fixture
def daemon(host: Host, tmp_path: Path) -> Iterator[Running]:
    paths.run_dir().mkdir()
    with running(host, tmp_path) as found:
        yield found


def store_of(host: Host) -> FakeStoreDaemon:
    assert isinstance(host.store, StoreClient)
    daemon: FakeStoreDaemon = host.store.connector.__self__  # type: ignore[attr-defined]
    return daemon


def guest_store(host: Host, domid: int) -> StoreClient:
    """As the guest sees it: permissions are enforced."""
    daemon = store_of(host)
    return StoreClient(lambda: daemon.connect(domid))


def at_once(number: int, work: Callable[[int], object]) -> list[Any]:
    """What ``work(n)`` gave or raised, of each n, all at the same time."""
    outcome: list[Any] = [None] * number

    def run(n: int) -> None:
        try:
            outcome[n] = work(n)
        except BaseException as error:
            outcome[n] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


# --- memory and hypercalls ------------------------------------------------------------------------------
def test_fi_3_two_creates_for_the_last_memory(daemon: Running, config: Config) -> None:
    """FI 3: one of them gets it, the other is told how much is missing, and nothing stays claimed."""
    hv = fake(daemon.host)
    free = hv.host().free_pages
    hv._free = hv._total = (24 << 20) >> 12
    found = at_once(2, lambda n: daemon.client().create(config("pvh", name=f"g{n}"), PAUSED))
    lost = [one for one in found if isinstance(one, BaseException)]
    assert len(lost) == 1 and isinstance(lost[0], HostMemoryError | HypercallError), found
    assert "ENOMEM" in str(lost[0]) or "MiB" in str(lost[0])
    assert [domain.claimed for domain in hv.all.values()] == [0]
    daemon.client().destroy(next(one.name for one in found if one is not lost[0]))
    assert hv.host().free_pages == (24 << 20) >> 12 < free


@pytest.mark.parametrize("kind", ["pv", "pvh"])
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EPERM])
def test_fi_4_each_call_of_a_create_may_fail(
    host: Host, config: Config, monkeypatch: pytest.MonkeyPatch, kind: str, number: int
) -> None:
    """FI 4: the k-th hypercall of a create fails, for all k; then the k-th of a destroy, which is begun
    again. The error names the call; nothing is left."""
    before, free = tree(host), fake(host).host().free_pages
    original, left = FakeHypervisor._op, [0]

    def op(hv: FakeHypervisor, name: str) -> None:
        left[0] -= 1
        original(hv, name)
        if left[0] == 0:
            raise refuse(name, number)

    monkeypatch.setattr(FakeHypervisor, "_op", op)
    (paths.run_dir() / "domains").mkdir(parents=True)
    wanted = config(kind, memory=4)
    for nth in count(1):
        left[0] = nth
        try:
            create(host, wanted, RUN)
        except HypercallError as error:
            assert error.operation and error.errno == number
            left[0] = 0
            recover(host)
            assert_empty(host, before, free)
        else:
            break
    assert nth > 15
    destroyed = 0
    for nth in count(1):
        left[0] = nth
        try:
            destroy(host, find(host, "test"))
        except DomainNotFoundError:  # the call that failed came after the domain's end
            destroyed += 1
        except HypercallError:
            pass
        left[0] = 0
        recover(host)
        if not fake(host).all:
            break
    assert_empty(host, before, free)


# --- xenstored -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("verb", ["create", "destroy"])
@pytest.mark.parametrize("nth", range(1, 14, 2))
def test_fi_6_xenstored_dies_and_comes_back_empty(
    host: Host, config: Config, monkeypatch: pytest.MonkeyPatch, verb: str, nth: int
) -> None:
    """FI 6: at the nth request of a verb. The verb fails or gets through; a guest beside it runs on, and
    after ``gc`` the domain is there or not, and can be destroyed."""
    other = create(host, config("pv", name="other", memory=4), RUN)
    if verb == "destroy":
        create(host, config("pv", memory=4), RUN)
    daemon, left = store_of(host), [nth]
    handle = FakeStoreDaemon.handle

    def handled(self: FakeStoreDaemon, link: Any, packet: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            self.crash()
            return
        handle(self, link, packet)

    monkeypatch.setattr(FakeStoreDaemon, "handle", handled)
    with suppress(XtoolError):
        if verb == "create":
            create(host, config("pv", memory=4), RUN)
        else:
            destroy(host, find(host, "test"))
    left[0] = 0
    recover(host)
    state = host.hv.domain(other.domid)
    assert state is not None and not state.paused and not state.shutdown
    for found in fake(host).domains():
        destroy(host, find(host, str(found.domid)))
    recover(host)
    assert fake(host).all == {} and journal.entries() == []
    assert {"/local/domain/0", *daemon.tree} - {"/"} <= CUSTOM


@pytest.mark.parametrize("word", ["ENOSPC", "E2BIG", "EAGAIN", "EQUOTA"])
def test_r14_each_request_may_be_refused(
    host: Host, config: Config, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """R14: xenstored refuses the nth request of a create, for all n: an error that names it, and nothing is
    left, no transaction either. (EAGAIN of a commit alone is tried again.)"""
    before, free = tree(host), fake(host).host().free_pages
    handle, left = FakeStoreDaemon.handle, [0]

    def handled(self: FakeStoreDaemon, link: Any, packet: Any) -> None:
        left[0] -= 1
        if left[0] != 0:
            return handle(self, link, packet)
        packet = packet._replace(op=_Refused(packet.op, word))
        return handle(self, link, packet)

    class _Refused:
        """An operation nobody knows, whose refusal has this word."""

        def __init__(self, op: Any, word: str) -> None:
            self.op, self.name, self.word = op, op.name, word

        def __index__(self) -> int:
            return int(self.op)

    def refused(get: Any) -> Any:
        def of(op: Any, default: Any = None) -> Any:
            if isinstance(op, _Refused):

                def say_no(daemon: Any, link: Any, view: Any, packet: Any) -> bytes:
                    if op.name == "TRANSACTION_END":  # it is over, whatever it was told
                        link.transactions.pop(packet.tx_id, None)
                    raise Refusal(op.word)

                return say_no
            return get(op, default)

        return of

    from xtool.fake import store as store_module

    handlers = store_module._HANDLERS

    class Handlers:
        get = staticmethod(refused(handlers.get))

    monkeypatch.setattr(store_module, "_HANDLERS", Handlers)
    monkeypatch.setattr(FakeStoreDaemon, "handle", handled)
    wanted = config("pv", memory=4)
    failed = 0
    for nth in count(1):
        left[0] = nth
        try:
            create(host, wanted, RUN)
        except XtoolError as error:
            assert isinstance(error, StoreError | HostError), error
            failed += 1
            left[0] = 0
            recover(host)
            assert_empty(host, before, free)
            assert not any(link.transactions for link in store_of(host).links)
        else:
            # A commit that is tried again, or a request whose answer nobody needs: go on behind it.
            reached = left[0] <= 0
            left[0] = 0
            destroy(host, find(host, "test"))
            if not reached:
                break
    assert failed > 10


def test_r15_a_create_completes_while_commits_conflict(
    host: Host, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R15: a guest changes what each transaction has read, so that none ever commits: the create does its
    work without one, within a bounded number of attempts."""
    from xtool.fake import store as store_module

    end = store_module._HANDLERS[store_module.Op.TRANSACTION_END]
    ended = [0]

    def refusing(daemon: Any, link: Any, view: Any, packet: Any) -> bytes:
        if packet.payload[:1] == b"T":
            ended[0] += 1
            link.transactions.pop(packet.tx_id, None)
            raise Refusal("EAGAIN")
        return end(daemon, link, view, packet)

    monkeypatch.setitem(store_module._HANDLERS, store_module.Op.TRANSACTION_END, refusing)
    began = time.monotonic()
    made = create(host, config("pv", memory=4), RUN)
    assert time.monotonic() - began < 12 and 1 < ended[0] < 200
    assert host.store.read_text(f"{nodes.domain(made.domid)}/name") == "test"


# --- what a guest may read and write ----------------------------------------------------------------------
def test_r11_no_secret_where_a_guest_can_read(host: Host, config: Config, tmp_path: Path) -> None:
    """R11: of all nodes that a guest may read, none has its neighbour's name or uuid. (That a display's
    password is in none: ``xen/test_devicemodel.py``.)"""
    image = tmp_path / "web.img"
    image.write_bytes(bytes(4096))
    hvm = config("pvh", name="web", disk=f"['{image},raw,xvda']", vif="['bridge=xenbr0']")
    made = [create(host, hvm, RUN), create(host, config("pv", name="neighbour-of-web"), RUN)]
    for mine, theirs in (made, reversed(made)):
        seen = 0
        for path, (value, perms) in store_of(host).dump().items():
            if not may_read(perms, mine.domid):
                continue
            seen += 1
            assert theirs.uuid not in path + value, path
            assert theirs.name != value, path
        assert seen > 10


def test_r17_a_guest_cannot_change_its_console(host: Host, config: Config) -> None:
    """R17: nor any node of its own that domain 0 follows: its name, its store ring, its uuid."""
    for kind in ("pv", "pvh"):
        domid = create(host, config(kind, name=kind), RUN).domid
        dump = store_of(host).dump()
        mine = {
            path: perms
            for path, (_, perms) in dump.items()
            if f"{path}/".startswith(f"{nodes.domain(domid)}/")
        }
        trusted = [
            path for path in mine if "/console" in path or "/store" in path or path.endswith(("/name", "/vm"))
        ]
        assert len(trusted) > 6
        guest = guest_store(host, domid)
        for path in trusted:
            assert not may_write(mine[path], domid), path
            with pytest.raises(StoreError, match="EACCES"):
                guest.write(path, "/etc/shadow")
        with pytest.raises(StoreError, match="EACCES"):
            guest.rm(f"{nodes.domain(domid)}/console")


def test_r18_the_toolstacks_own_record_counts(host: Host, config: Config, tmp_path: Path) -> None:
    """R18: a guest deletes and rewrites whatever it may of its devices, to point at its neighbour's: listing,
    detaching and destroying act on its own device, and the neighbour's stays."""
    kernel = host.hotplug
    assert isinstance(kernel, FakeKernel)
    images = []
    for name in ("bad", "good"):
        image = tmp_path / f"{name}.img"
        image.write_bytes(bytes(4096))
        images.append(image)
        create(host, config("pv", name=name, disk=f"['{image},raw,xvda']"), RUN)
    bad, good = find(host, "bad").state.domid, find(host, "good").state.domid
    guest = guest_store(host, bad)
    front = f"{nodes.domain(bad)}/device/vbd/51712"
    lies = {
        "backend": f"/local/domain/0/backend/vbd/{good}/51712",
        "backend-id": str(good),
        "state": "6",
        "frontend-id": str(good),
    }
    changed = 0
    for name, value in lies.items():
        with suppress(StoreError):
            guest.write(f"{front}/{name}", value)
            changed += 1
    assert changed >= 2
    client = LocalClient(host)
    (disk,) = client.block_list("bad")
    assert disk.vdev == "xvda"
    with suppress(StoreError):
        guest.rm(front)
    client.block_detach("bad", "xvda", force=True, deadline=0.2)
    assert [d.vdev for d in client.block_list("good")] == ["xvda"]
    client.destroy("bad")
    assert [str(device.domid) for device in kernel.served] == [str(good)] and len(kernel.loops) == 1


def test_fi_17_r12_r24_a_number_that_is_used_again(host: Host, config: Config, tmp_path: Path) -> None:
    """FI 17, R12, R24: what was left under a number is gone before its next owner is introduced, that one's
    kinds of backends included, and it owns no page of the last one's."""
    first = create(host, config("pv", name="first", memory=4), RUN)
    guest_store(host, first.domid).write(f"{nodes.domain(first.domid)}/data/secret", "of the first")
    # Somebody else's tool destroys it, and removes nothing.
    fake(host).destroy_domain(first.domid)
    image = tmp_path / "a.img"
    image.write_bytes(bytes(4096))
    # Of kinds that the next one has, and of others, whoever's they are.
    for stale in ("backend/vbd", "backend/vif", "backend/qdisk", "backend/vkbd", "error/backend/vkbd"):
        host.store.write(f"/local/domain/0/{stale}/{first.domid}/0/frontend", "stale")
    host.store.write(f"{nodes.device_model(first.domid)}/state", "stale")
    host.store.write("/local/domain/0/backend/vkbd/999/0/frontend", "another's")
    fake(host)._next_domid = first.domid
    introduced: list[list[str]] = []
    introduce = host.store.introduce

    def look(domid: int, *rest: Any) -> None:
        introduced.append([p for p, (v, _) in store_of(host).dump().items() if "secret" in p or v == "stale"])
        introduce(domid, *rest)

    host.store.introduce = look  # type: ignore[method-assign]
    devices = {"disk": f"['{image},raw,xvda']", "vif": "['bridge=xenbr0']"}
    second = create(host, config("pv", name="second", memory=4, **devices), RUN)
    assert second.domid == first.domid and introduced[0] == []
    assert host.store.read_text("/local/domain/0/backend/vkbd/999/0/frontend") == "another's"
    recover(host)  # finds the first one's entry, and its number under another owner
    assert all(first.uuid not in path for path in store_of(host).dump())
    assert host.store.read_text(f"{nodes.domain(second.domid)}/name") == "second"
    assert [d.vdev for d in LocalClient(host).block_list("second")] == ["xvda"]
    claimed = fake(host).all[second.domid]
    assert claimed.claimed == 0 and len(claimed.owned) == 4 << 8


def test_fi_17_many_owners_of_one_number(host: Host, config: Config) -> None:
    """FI 17: 50 domains in turn under the same number leave nothing."""
    before, free = tree(host), fake(host).host().free_pages
    for number in range(50):
        fake(host)._next_domid = 7
        made = create(host, config("pv", name=f"n{number}", memory=4), PAUSED)
        assert made.domid == 7
        destroy(host, find(host, "7"))
    assert_empty(host, before, free)


def test_r21_a_device_model_listens_nowhere_unless_asked() -> None:
    """R21: QEMU without its defaults, without a display, without a network port."""
    spec = DeviceModelSpec(name="web", uuid="6b1c1b9e-7c3c-4f6a-9b55-0d4c5f1f2a10", memory=512 * MIB)
    argv = build_argv(spec, 7, "/usr/bin/qemu", 5)
    text = " ".join(argv)
    assert "-nodefaults" in argv and "-no-user-config" in argv
    for word in ("tcp:", "-vnc 0", "vnc=", "-spice", "-gdb", "-monitor tcp", "telnet:", "websocket"):
        assert word not in text, word
    assert "-display none" in text


# --- names, locks, time -----------------------------------------------------------------------------------
def test_fi_16_fifty_creates_at_once(daemon: Running, config: Config) -> None:
    """FI 16: all of them are there, each under its own number; then all go at once."""
    found = at_once(
        MANY, lambda n: daemon.client().create(config("pv", name=f"g{n}", memory=4), PAUSED).domid
    )
    assert len(set(found)) == MANY and all(isinstance(one, int) for one in found), found
    assert {d.name for d in daemon.client().list()} == {f"g{n}" for n in range(MANY)}
    gone = at_once(MANY, lambda n: daemon.client().destroy(f"g{n}").action)
    assert gone == ["destroyed"] * MANY and daemon.client().list() == []


def test_fi_16_one_uuid_from_many_sides(daemon: Running, config: Config) -> None:
    """FI 16: one create with a uuid wins, the others are told that it is taken."""
    uuid = "5a1f9d0e-7a0c-4c58-9a7e-3a8f6f0c1d2e"
    found = at_once(8, lambda n: daemon.client().create(config("pv", name=f"g{n}", memory=4, uuid=uuid), RUN))
    lost = [one for one in found if isinstance(one, BaseException)]
    assert len(lost) == 7 and all(isinstance(error, DomainExistsError) for error in lost), lost


def test_fi_16_create_destroy_and_rename_of_one_name(daemon: Running, config: Config) -> None:
    """FI 16: whatever their order, a name is never held twice, and no verb hangs."""
    end = time.monotonic() + 2

    def work(number: int) -> int:
        dice, done = random.Random(number), 0
        with daemon.client() as client:
            while time.monotonic() < end or done < 3:
                with suppress(DomainExistsError, DomainNotFoundError):
                    if (roll := dice.random()) < 0.5:
                        client.create(config("pv", name="one", memory=4), PAUSED)
                    elif roll < 0.8:
                        client.destroy("one")
                    else:
                        client.rename("one", f"other-{number}-{done}")
                done += 1
                names = [domain.name for domain in client.list()]
                assert names.count("one") <= 1, names
        return done

    found = at_once(6, work)
    assert all(isinstance(one, int) and one > 2 for one in found), found
    for domain in daemon.client().list():
        daemon.client().destroy(str(domain.domid))
    assert fake(daemon.host).all == {} and journal.entries() == []


def test_fi_23_r25_a_shutdown_that_is_ignored_delays_nobody(
    daemon: Running, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FI 23, R25: a guest ignores the request for its deadline; meanwhile every other verb on another guest
    takes no longer than before; ``--force`` ends it."""
    client = daemon.client()
    for name in ("deaf", "other"):
        client.create(config("pv", name=name, memory=4), RUN)
    alone = latencies(client, config)
    waiting = threading.Thread(
        target=lambda: waited.append(_error(lambda: daemon.client().shutdown("deaf", wait=True, deadline=3)))
    )
    waited: list[BaseException | None] = []
    waiting.start()
    end = time.monotonic() + 10
    while not any(o.method == "shutdown" and o.state == "running" for o in client.operations()):
        assert time.monotonic() < end
    meanwhile = latencies(client, config)
    assert not waited, "too slow a machine: the deadline was over first"
    for verb, taken in meanwhile.items():
        assert taken < 3 * alone[verb] + 0.1, (verb, alone, meanwhile)
    waiting.join()
    assert isinstance(waited[0], DeadlineError) and {d.name for d in client.list()} == {"deaf", "other"}
    argv = ["-H", f"unix:{daemon.path}", "shutdown", "deaf", "--force", "--timeout", "0.2"]
    assert cli.main(argv) == 0
    assert [d.name for d in client.list()] == ["other"]


def _error(work: Callable[[], object]) -> BaseException | None:
    try:
        work()
    except BaseException as error:
        return error
    return None


def latencies(client: SocketClient, config: Config) -> dict[str, float]:
    taken: dict[str, list[float]] = {}
    for _ in range(5):
        for verb, arguments in (
            ("list", ()),
            ("pause", ("other",)),
            ("unpause", ("other",)),
            ("create", (config("pv", name="further", memory=4), PAUSED)),
            ("destroy", ("further",)),
        ):
            began = time.monotonic()
            getattr(client, verb)(*arguments)
            taken.setdefault(verb, []).append(time.monotonic() - began)
    return {verb: median(times) for verb, times in taken.items()}


def test_fi_18_the_clock_is_set(host: Host, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """FI 18: by a day, forth and back, while we wait: deadlines and pauses are measured by clocks that nobody
    sets."""
    dice, real = random.Random(3), time.time
    monkeypatch.setattr(time, "time", lambda: real() + dice.choice([-86400, 0, 86400]))
    for module in (create_module, lifecycle):
        monkeypatch.setattr(module, "time", time.time)
    create(host, config("pv", memory=4), RUN)
    client = LocalClient(host)
    began = time.monotonic()
    with pytest.raises(DeadlineError):
        client.shutdown("test", wait=True, deadline=0.5)
    assert 0.5 <= time.monotonic() - began < 3
    domid = find(host, "test").state.domid
    fake(host).shutdown_domain(domid, 1)
    found = client.settle(domid, journal.entries()[0].uuid)
    assert found is not None and found.action == "restarted" and time.monotonic() - began < 5


def test_r13_an_end_that_nobody_announced(
    host: Host, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R13: xenstored's word on the end of a domain did not come: whoever waits looks for itself."""
    monkeypatch.setattr(lifecycle, "_RESCAN", 0.1)
    made = create(host, config("pv", memory=4), RUN)
    timer = threading.Timer(0.3, lambda: fake(host).shutdown_domain(made.domid, 0))  # fires no watch
    timer.start()
    began = time.monotonic()
    lifecycle.wait_shutdown(host, find(host, "test"), 20)
    assert time.monotonic() - began < 5
    timer.join()


# --- files and limits ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_fi_8_no_room_for_the_journal(
    host: Host, config: Config, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """FI 8: a create is refused before anything is made, with the place and what to do."""
    before, free, calls = tree(host), fake(host).host().free_pages, []
    monkeypatch.setattr(FakeHypervisor, "create_domain", lambda *_: calls.append(1))

    def refuse_it(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    paths.run_dir().mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "fsync", refuse_it)
        with pytest.raises(HostError, match="cannot write") as caught:
            create(host, config(), RUN)
    assert caught.value.hint and os.strerror(number) in caught.value.message and not calls
    assert_empty(host, before, free)


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "newer", "flipped", "another's"])
def test_fi_19_a_damaged_entry_costs_nothing_but_itself(host: Host, config: Config, damage: str) -> None:
    """FI 19: the domain runs on, is listed and can be destroyed; the others keep their entries."""
    made = create(host, config("pv", name="hurt", memory=4), RUN)
    create(host, config("pv", name="well", memory=4), RUN)
    file = paths.run_dir() / "domains" / f"{made.uuid}.json"
    text = file.read_text()
    other = next(e.uuid for e in journal.entries() if e.name == "well")
    file.write_text(
        {
            "empty": "",
            "cut": text[: len(text) // 2],
            "garbage": "\x00\x01]",
            "newer": text.replace('"version": 1', '"version": 99'),
            "flipped": text.replace('"', "!", 3),
            "another's": text.replace(made.uuid, other),
        }[damage]
    )
    client = LocalClient(host)
    client.gc()
    assert {d.name for d in client.list()} == {"hurt", "well"}
    assert [entry.name for entry in journal.entries()] == ["well"]
    assert client.destroy("hurt").action == "destroyed"
    client.gc()
    assert [d.name for d in client.list()] == ["well"]
    assert not file.exists()


@pytest.fixture
def machine(tmp_path: Path, config: Config) -> Iterator[Machine]:
    paths.run_dir().mkdir()
    (tmp_path / "log").mkdir()
    found = Machine(tmp_path, config)
    yield found
    found.close()


def test_fi_14_a_daemon_without_descriptors(machine: Machine) -> None:
    """FI 14: more connections than it may have open files: a guest runs on, and when they are gone the daemon
    does what it is asked."""
    path = str(machine.folder / "xtoold.sock")
    client = SocketClient(path)
    machine.by_daemon("create", "before", kind="pv", paused=False)
    pid = machine.daemon.pid
    used = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 8, used + 8))
    links = []
    for _ in range(40):
        link = socket.socket(socket.AF_UNIX)
        link.settimeout(1)
        with suppress(OSError):
            link.connect(path)
            link.sendall(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
        links.append(link)
    time.sleep(0.5)
    ticks = _ticks(pid)
    time.sleep(1.0)
    assert _ticks(pid) - ticks < 50, "it spins while it can accept nobody"
    assert machine.daemon.poll() is None and machine.look()["before"].state == "up"
    for link in links:
        link.close()
    end = time.monotonic() + 20
    while True:
        try:
            with SocketClient(path) as again:
                names = [d.name for d in again.list()]
            break
        except XtoolError:
            assert time.monotonic() < end, "it does not recover"
            time.sleep(0.2)
    assert names == ["before"] and machine.daemon.poll() is None
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 8, used + 8))
    client.close()


def _ticks(pid: int) -> int:
    """CPU time of a process, in hundredths of a second."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


def test_r24_nothing_but_what_is_meant_in_a_start_page(host: Host, config: Config) -> None:
    """R24: behind the record that tells a PV guest how it was started, its page is zero; the command line
    leaves nothing behind its end."""
    from xtool.abi import pv

    made = create(host, config("pv", memory=4, cmdline="a=b"), PAUSED)
    domain = fake(host).all[made.domid]
    context = pv.VcpuGuestContext.from_buffer_copy(domain.contexts[0])
    page = fake(host).read(made.domid, domain.p2m[(context.user_regs.rsi - 0xFFFFFFFF80000000) >> 12])
    info = pv.StartInfo.from_buffer_copy(page)
    assert bytes(info.cmd_line).rstrip(b"\0") == b"a=b"
    assert not any(bytes(page)[pv.StartInfo.size() :])
