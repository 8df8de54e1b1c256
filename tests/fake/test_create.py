"""Creating and ending domains on the host in memory: what is built, and that failures leave nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from struct import unpack_from

import pytest

from xtool import paths
from xtool.abi import hvm as h
from xtool.abi import pv
from xtool.builder.build import BUILDERS
from xtool.builder.spec import STAGES
from xtool.config import DomainConfig
from xtool.errors import (
    DomainExistsError,
    DomainNotFoundError,
    HostMemoryError,
    HypercallError,
    ImageError,
    UsageError,
)
from xtool.fake.hypervisor import FakeHypervisor
from xtool.toolstack import create as create_module
from xtool.toolstack import journal, names
from xtool.toolstack import rename as rename_module
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.create import create
from xtool.toolstack.destroy import destroy, recover
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient
from xtool.toolstack.names import find
from xtool.toolstack.signals import Terminated

Config = Callable[..., DomainConfig]
RUN = CreateOptions()


def fake(host: Host) -> FakeHypervisor:
    assert isinstance(host.hv, FakeHypervisor)
    return host.hv


def tree(host: Host, path: str = "/") -> set[str]:
    found = {path}
    for child in host.store.list(path):
        found |= tree(host, f"{path.rstrip('/')}/{child}")
    return found


def assert_empty(host: Host, nodes: set[str], free: int) -> None:
    assert fake(host).all == {}
    assert fake(host).mapped == 0
    assert fake(host).host().free_pages == free
    # Parents that the first domain ever made may stay.
    assert tree(host) - nodes <= {"/local", "/local/domain", "/vm", "/libxl"}
    left = [name for name in os.listdir(paths.run_dir() / "domains") if name != "names.lock"]
    assert left == []


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_create_and_destroy(host: Host, config: Config, kind: str) -> None:
    nodes, free = tree(host), fake(host).host().free_pages
    result = create(host, config(kind, vcpus=2), RUN)
    state = host.hv.domain(result.domid)
    assert state is not None and not state.paused
    assert host.store.read_text(f"/local/domain/{result.domid}/name") == "test"
    assert host.store.is_introduced(result.domid)
    assert [span.name for span in result.timings] == [*STAGES, "wire"]
    entry = journal.read(result.uuid)
    assert entry is not None and entry.state == "running" and entry.domid == result.domid
    destroy(host, find(host, "test"))
    assert_empty(host, nodes, free)


def test_what_a_pv_guest_finds(host: Host, config: Config, tmp_path: Path) -> None:
    ramdisk = tmp_path / "rd"
    ramdisk.write_bytes(os.urandom(10000))
    domid = create(host, config("pv", ramdisk=ramdisk, cmdline="a=b c"), CreateOptions(paused=True)).domid
    domain = fake(host).all[domid]
    context = pv.VcpuGuestContext.from_buffer_copy(domain.contexts[0])
    assert context.ctrlreg[3] >> 12 == domain.pinned[0]
    base = 0xFFFFFFFF80000000
    pfn = (context.user_regs.rsi - base) >> 12
    info = pv.StartInfo.from_buffer_copy(host.hv.read(domid, domain.p2m[pfn]))  # type: ignore[attr-defined]
    assert bytes(info.cmd_line).rstrip(b"\0") == b"a=b c" and info.nr_pages == 4096
    assert info.shared_info >> 12 == domain.shared_info
    # The p2m list in the guest is the truth.
    first = (info.mfn_list - base) >> 12
    listed = b"".join(fake(host).read(domid, domain.p2m[first + n]) for n in range(8))
    assert list(unpack_from("<4096Q", listed)) == [domain.p2m[n] for n in range(4096)]
    module = info.mod_start if info.flags & 8 else (info.mod_start - base) >> 12
    pages = b"".join(fake(host).read(domid, domain.p2m[module + n]) for n in range(3))
    assert info.mod_len == 10000 and pages[:10000] == ramdisk.read_bytes() and not any(pages[10000:])
    assert domain.paging_pool == 0 and fake(host).frames.get(domain.shared_info, b"")[1] == 1


def test_what_a_pvh_guest_finds(host: Host, config: Config) -> None:
    domid = create(host, config("pvh", memory=5000, vcpus=3, cmdline="x"), RUN).domid
    domain = fake(host).all[domid]
    records = domain.hvm_records[-1]
    cpu = h.HvmHwCpu.from_buffer_copy(records, len(records) - 8 - h.HvmHwCpu.size())
    raw = fake(host).read(domid, cpu.rbx >> 12)
    info = h.HvmStartInfo.from_buffer_copy(raw)
    assert info.magic == h.XEN_HVM_START_MAGIC_VALUE and info.memmap_entries == len(domain.memory_map)
    ram = [e for e in domain.memory_map if e.type == 1]
    assert sum(e.size for e in ram) == 5000 << 20
    assert ram[0].size == 0xFC000000 and ram[1].address == 1 << 32
    assert fake(host).read(domid, info.rsdp_paddr >> 12)[:8] == b"RSD PTR "
    assert domain.params[h.HVM_PARAM_STORE_PFN] == 0xFEFFC and domain.paging_pool
    entries = {e.address >> 12: e for e in ram}
    assert all(gfn in domain.p2m for gfn in (0, (0xFC000000 >> 12) - 1, 1 << 20, *entries))


@pytest.mark.parametrize("kind", ["pv", "pvh"])
@pytest.mark.parametrize("stage", [*STAGES, "wire", "commit"])
@pytest.mark.parametrize("error", [RuntimeError("injected"), KeyboardInterrupt(), Terminated(15)])
def test_a_failure_at_any_stage_leaves_nothing(
    host: Host,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    stage: str,
    error: BaseException,
) -> None:
    nodes, free = tree(host), fake(host).host().free_pages

    def fail(*_: object, **__: object) -> None:
        raise error

    if stage == "wire":
        monkeypatch.setattr(host.store, "introduce", fail)
    elif stage == "commit":
        monkeypatch.setattr(create_module.journal, "update", fail)
    else:
        original = getattr(BUILDERS[kind], stage)  # type: ignore[index]

        def half(builder: object) -> None:
            original(builder)
            fail()

        monkeypatch.setattr(BUILDERS[kind], stage, half)  # type: ignore[index]
    with pytest.raises(type(error)):
        create(host, config(kind), RUN)
    assert_empty(host, nodes, free)


def test_every_hypercall_may_fail(host: Host, config: Config) -> None:
    """Fail each method of the hypervisor in turn: always a clear error, never a leftover (fault list 4)."""
    nodes, free = tree(host), fake(host).host().free_pages
    used = ("create_domain", "set_max_vcpus", "set_max_memory", "alloc_unbound", "default_cpu_policy")
    used += ("set_cpu_policy", "set_memory_map", "claim", "populate", "map_foreign", "pin_l4_table")
    used += ("set_vcpu_context", "init_hypercall_page", "map_grant_table", "unpause_domain")
    for name in used:
        for number in (1, 12, 16, 11):
            fake(host).fail = {name: number}
            with pytest.raises(HypercallError):
                create(host, config("pv"), RUN)
            fake(host).fail = {}
            assert_empty(host, nodes, free)


def test_sigterm_in_the_middle(host: Host, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, free = tree(host), fake(host).host().free_pages
    original = BUILDERS["pv"].image

    def hit(builder: object) -> None:
        original(builder)  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(BUILDERS["pv"], "image", hit)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as caught:
        create(host, config(), RUN)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert_empty(host, nodes, free)


def test_names_and_uuids_are_unique(host: Host, config: Config) -> None:
    first = create(host, config(), RUN)
    with pytest.raises(DomainExistsError, match="already named 'test'"):
        create(host, config(), RUN)
    with pytest.raises(DomainExistsError, match="already has the uuid"):
        create(host, config(name="other", uuid=first.uuid), RUN)
    assert len(fake(host).all) == 1


def test_a_name_being_created_is_taken(host: Host, config: Config) -> None:
    journal.write(journal.Entry("11111111-2222-3333-4444-555555555555", "test", "pv", "creating"))
    with pytest.raises(DomainExistsError, match="is being created"):
        create(host, config(), RUN)


@pytest.mark.parametrize("wanted_by", ["create", "rename"])
@pytest.mark.parametrize("moment", ["entries", "domains"])
def test_one_that_is_created_while_a_name_is_looked_for(
    host: Host, config: Config, monkeypatch: pytest.MonkeyPatch, wanted_by: str, moment: str
) -> None:
    """It is finished between the two looks, at the journal and at xenstore: it is in one of them."""
    second = create(host, config(name="second"), RUN)
    first = create(host, config(), RUN)
    node = f"/local/domain/{first.domid}/name"
    journal.update(first.uuid, state="creating")
    host.store.write(node, "")

    def finish() -> None:
        host.store.write(node, "test")
        journal.update(first.uuid, state="running")

    entries, domains = journal.entries, names.named_domains

    def then_finished(look: Callable[..., object]) -> Callable[..., object]:
        def looked(*args: object) -> object:
            found = look(*args)
            finish()
            return found

        return looked

    if moment == "entries":
        monkeypatch.setattr(journal, "entries", then_finished(entries))
    else:
        for module in (names, rename_module):
            monkeypatch.setattr(module, "named_domains", then_finished(domains))
    found = find(host, str(second.domid))
    with pytest.raises(DomainExistsError):
        if wanted_by == "create":
            create(host, config(), RUN)
        else:
            rename_module.rename(host, found, "test")


def test_recover_rolls_back_what_nobody_holds(host: Host, config: Config) -> None:
    done = create(host, config(), RUN)
    journal.update(done.uuid, state="creating")
    with journal.locked(done.uuid):
        assert recover(host) == []  # somebody is at work on it
    assert [r.action for r in recover(host)] == ["rolled-back"]
    assert fake(host).all == {} and journal.entries() == []
    assert not host.store.exists(f"/local/domain/{done.domid}")


def test_recover_leaves_the_running_alone(host: Host, config: Config) -> None:
    done = create(host, config(), RUN)
    assert recover(host) == []
    assert done.domid in fake(host).all


def test_not_enough_memory_says_how_much(host: Host, config: Config) -> None:
    with pytest.raises(HostMemoryError, match=r"needs 20000 MiB, the host has 16384 MiB free"):
        create(host, config("pvh", memory=20000), RUN)
    assert fake(host).all == {}


def test_more_memory_later(host: Host, config: Config) -> None:
    """The guest sees maxmem, and the host pays for memory."""
    done = create(host, config("pvh", memory=64, maxmem=1024), RUN)
    domain = fake(host).all[done.domid]
    assert sum(len(run) for run in domain.promised) == 1024 << 8
    assert 64 << 8 <= len(domain.owned) < (64 << 8) + 64
    assert host.store.get(f"/local/domain/{done.domid}/memory/static-max") == str(1024 << 10)
    assert host.store.get(f"/local/domain/{done.domid}/memory/target") == str(64 << 10)


def test_an_image_larger_than_memory(host: Host, config: Config, tmp_path: Path) -> None:
    big = tmp_path / "rd"
    big.write_bytes(bytes(20 << 20))
    for kind in ("pv", "pvh"):
        with pytest.raises(ImageError, match="MiB"):
            create(host, config(kind, ramdisk=big), RUN)


def test_finding_domains(host: Host, config: Config) -> None:
    done = create(host, config(), RUN)
    for text in ("test", str(done.domid), done.uuid, done.uuid.upper()):
        assert find(host, text).state.domid == done.domid
    with pytest.raises(DomainNotFoundError):
        find(host, "nobody")
    with pytest.raises(UsageError):
        client = LocalClient(host)
        monkey = find(host, "test")
        destroy(host, monkey._replace(state=monkey.state._replace(domid=0)))
        client.close()


@pytest.mark.parametrize(
    ("reason", "keys", "action"),
    [
        (0, {}, "destroyed"),
        (1, {}, "restarted"),
        (3, {}, "destroyed"),
        (3, {"on_crash": "preserve"}, "preserved"),
        (3, {"on_crash": "rename-restart"}, "restarted"),
        (1, {"on_reboot": "destroy"}, "destroyed"),
        (4, {"on_watchdog": "restart"}, "restarted"),
    ],
)
def test_what_happens_when_it_ends(
    host: Host, config: Config, reason: int, keys: dict[str, str], action: str
) -> None:
    client = LocalClient(host)
    done = client.create(config(**keys), RUN)
    assert client.settle(done.domid, done.uuid) is None
    host.hv.shutdown_domain(done.domid, reason)
    settled = client.settle(done.domid, done.uuid)
    assert settled is not None and settled.action == action
    if action == "restarted":
        again = client.list("test")[0]
        assert again.domid == settled.new_domid != done.domid
        if keys.get("on_crash") != "rename-restart":
            assert again.uuid == done.uuid
            # Whoever comes second is told the same.
            second = client.settle(done.domid, done.uuid)
            assert second is not None and second.new_domid == settled.new_domid
        else:
            assert client.list(f"test-{done.domid}")[0].state == "crashed"
    else:
        assert len(client.list()) == (1 if action == "preserved" else 0)
