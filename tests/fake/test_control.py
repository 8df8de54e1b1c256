"""Triggers, sysrq, debug keys and parameters; core dumps, read back by the format's description."""

from __future__ import annotations

import shutil
import subprocess
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import Struct

import pytest
from corefile import Core

from xtool.abi import coredump as c
from xtool.abi import domctl as d
from xtool.abi.base import PAGE_SIZE
from xtool.config import DomainConfig
from xtool.errors import DomainError, DomainNotFoundError, HostError, HypercallError, UsageError, XtoolError
from xtool.fake.hypervisor import FakeHypervisor, FakeMapping
from xtool.toolstack.api import CoreDump, CreateOptions
from xtool.toolstack.dumpcore import dump_core
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

Config = Callable[..., DomainConfig]


@pytest.fixture
def hv(host: Host) -> FakeHypervisor:
    assert isinstance(host.hv, FakeHypervisor)
    return host.hv


@pytest.fixture
def client(host: Host) -> LocalClient:
    return LocalClient(host)


def make(client: LocalClient, config: Config, kind: str = "pv", **keys: object) -> int:
    return client.create(config(kind, "web", **keys), CreateOptions()).domid


def refused(kind: type[XtoolError], what: str, hint: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert what in caught.value.message and hint in (caught.value.hint or ""), caught.value


# --- buttons ----------------------------------------------------------------------------------------
def test_triggers(client: LocalClient, hv: FakeHypervisor, config: Config) -> None:
    domid = make(client, config, "pvh", vcpus=2)
    assert client.trigger("web", "nmi", 1).action == "sent nmi to vCPU 1"
    assert client.trigger("web", "power").action == "sent power"
    assert hv.triggers == [
        (domid, d.XEN_DOMCTL_SENDTRIGGER_NMI, 1),
        (domid, d.XEN_DOMCTL_SENDTRIGGER_POWER, 0),
    ]
    refused(DomainError, "cannot reset a vCPU", "xtool reboot", lambda: client.trigger("web", "reset"))
    refused(DomainError, "only hvm", "", lambda: client.trigger("web", "s3resume"))
    refused(UsageError, "no vCPU 2", "0 to 1", lambda: client.trigger("web", "nmi", 2))
    refused(UsageError, "no trigger 'smi'", "s3resume", lambda: client.trigger("web", "smi"))


def test_a_pv_guest_has_no_buttons(client: LocalClient, config: Config) -> None:
    make(client, config)
    refused(DomainError, "no ACPI buttons", "xtool shutdown", lambda: client.trigger("web", "power"))


def test_sysrq_and_debug_keys(client: LocalClient, host: Host, hv: FakeHypervisor, config: Config) -> None:
    domid = make(client, config)
    assert client.sysrq("web", "h").action == "sent sysrq h"
    assert host.store.get(f"/local/domain/{domid}/control/sysrq") == "h"
    for bad in ("", "ab", "/", "\n"):
        refused(UsageError, "not a SysRq key", "letter", lambda word=bad: client.sysrq("web", word))
    assert client.debug_keys("hq") == "hq" == hv.keys
    for bad in ("", "é", "h" * 2000):
        refused(UsageError, "ASCII", "xtool dmesg", lambda word=bad: client.debug_keys(word))


def test_parameters(client: LocalClient, hv: FakeHypervisor) -> None:
    first, second = client.set_parameters(["gnttab_max_frames=128", "no-global-pages"])
    assert (first.name, first.before, first.value) == ("gnttab_max_frames", "64", "128")
    assert (second.name, second.before, second.value) == ("global-pages", "1", "0")
    assert client.set_parameters(["global-pages"])[0].value == "1"
    assert client.set_parameters(["/params/loglvl=all"])[0].value == "all"


def test_parameters_refused(client: LocalClient, hv: FakeHypervisor) -> None:
    change = client.set_parameters
    refused(UsageError, "no run-time parameter 'dom0_mem'", "command line", lambda: change(["dom0_mem=1G"]))
    refused(UsageError, "does not take 'many'", "'64' now", lambda: change(["gnttab_max_frames=many"]))
    refused(UsageError, "wants a value", "loglvl=warning", lambda: change(["loglvl"]))
    refused(UsageError, "a switch", "1 or 0", lambda: change(["global-pages=maybe"]))
    for nothing in ("=3", "", "../buildinfo/changeset=x"):
        refused(UsageError, "sets nothing", "name=value", lambda word=nothing: change([word]))
    before = dict(hv.parameters)
    refused(UsageError, "'nix'", "", lambda: change(["loglvl=all", "nix=1"]))
    assert hv.parameters == before, "all or none"
    hv.fail["parameter"] = 38
    refused(HostError, "no run-time parameters", "", lambda: change(["loglvl=all"]))


# --- core dumps -------------------------------------------------------------------------------------
@pytest.fixture
def dump(client: LocalClient, tmp_path: Path) -> Iterator[Callable[..., tuple[CoreDump, Core]]]:
    def take(**options: bool) -> tuple[CoreDump, Core]:
        result = client.dump_core("web", tmp_path / "web.core", **options)
        return result, Core(tmp_path / "web.core")

    yield take
    assert not list(tmp_path.glob(".*part"))


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_a_core_holds_every_page(
    kind: str,
    client: LocalClient,
    hv: FakeHypervisor,
    config: Config,
    dump: Callable[..., tuple[CoreDump, Core]],
) -> None:
    domid = make(client, config, kind, vcpus=2)
    domain = hv.all[domid]
    secret = b"a page that nobody else has".ljust(PAGE_SIZE, b".")
    spot = 0x777
    with hv.map_foreign(domid, [domain.p2m[spot] if kind == "pv" else spot]) as page:
        page.view[:] = secret
    result, core = dump()
    assert (result.name, result.vcpus, result.missing, result.action) == ("web", 1, 0, "unchanged")
    assert result.size == len(core.raw) and result.pages == len(domain.p2m)
    notes = core.notes()
    assert list(notes) == [0x2000000, 0x2000001, 0x2000002, 0x2000003]
    magic = 0xF00FEBED if kind == "pv" else 0xF00FEBEE
    assert Struct("<QQQQ").unpack(notes[0x2000001]) == (magic, 1, result.pages, PAGE_SIZE)
    assert Struct("<QQ").unpack_from(notes[0x2000002]) == (4, 17) and notes[0x2000003] == b"\1" + bytes(7)
    assert len(core.section(".xen_prstatus")) == 5168
    pages = core.pages()
    assert list(pages) == sorted(domain.p2m)
    assert pages[spot] == secret
    for pfn, mfn in domain.p2m.items():
        assert pages[pfn] == hv.frames.get(mfn, bytes(PAGE_SIZE))
    if kind == "pv":
        assert dict(zip(*[iter(core.table(".xen_p2m"))] * 2, strict=True)) == domain.p2m
        assert core.section(".xen_prstatus") == domain.contexts[0]
        assert len(core.section(".xen_shared_info")) == PAGE_SIZE
    state = hv.domain(domid)
    assert state is not None and not state.paused, "it goes on"


def test_readelf_reads_it(
    client: LocalClient, config: Config, dump: Callable[..., tuple[CoreDump, Core]]
) -> None:
    if not shutil.which("readelf"):
        pytest.skip("no readelf (Debian: binutils)")
    make(client, config)
    result, _ = dump()
    run = subprocess.run(
        ["readelf", "-W", "-h", "-S", result.path], capture_output=True, text=True, check=True
    )
    assert "CORE (Core file)" in run.stdout and "Warning" not in run.stderr + run.stdout
    for name in (".note.Xen", ".xen_prstatus", ".xen_shared_info", ".xen_pages", ".xen_p2m", ".shstrtab"):
        assert name in run.stdout
    texts = subprocess.run(["readelf", "-p", ".xen_pages", result.path], capture_output=True, check=True)
    assert b"XTOOL-TINY-READY" in texts.stdout, "the guest's kernel is in its memory"


def test_a_paused_domain_stays_paused(
    client: LocalClient, hv: FakeHypervisor, config: Config, dump: Callable[..., tuple[CoreDump, Core]]
) -> None:
    domid = make(client, config)
    client.pause("web")
    dump()
    state = hv.domain(domid)
    assert state is not None and state.paused


def test_live_it_is_not_paused_and_pages_may_go(
    client: LocalClient,
    hv: FakeHypervisor,
    config: Config,
    dump: Callable[..., tuple[CoreDump, Core]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    domid = make(client, config, "pvh")
    gone, paused = 5, []
    real = hv.map_foreign

    def balloon(domid: int, gfns: list[int], *, writable: bool = True) -> FakeMapping:
        paused.append(hv.all[domid].pause_count)
        if gone in gfns:
            raise HypercallError("mapping", 22)
        return real(domid, gfns, writable=writable)

    monkeypatch.setattr(hv, "map_foreign", balloon)
    result, core = dump(live=True)
    assert result.missing == 1 and not any(paused)
    table = core.table(".xen_pfn")
    assert len(table) == result.pages and table[-1] == c.INVALID_PFN and gone not in table
    assert list(table) == sorted(table)
    assert domid == result.domid


def test_the_guest_s_own_nonsense_does_no_harm(
    client: LocalClient,
    hv: FakeHypervisor,
    config: Config,
    dump: Callable[..., tuple[CoreDump, Core]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A PV guest may write what it likes into Xen's table for its own frames."""
    domid = make(client, config)
    real, domain = hv.machine_to_phys, hv.all[domid]
    wild = {domain.p2m[7]: 0x7FFF_FFFF_FFFF_FFFF, domain.p2m[8]: 9, domain.p2m[10]: 1 << 31}

    def lie(first: int, count: int) -> array[int]:
        return array("Q", (wild.get(first + i, pfn) for i, pfn in enumerate(real(first, count))))

    monkeypatch.setattr(hv, "machine_to_phys", lie)
    result, core = dump()
    assert list(core.pages()) == [*sorted(domain.p2m.keys() - {7, 8, 10}), 1 << 31]
    assert result.pages == len(domain.p2m) - 2


def test_afterwards_it_crashes_or_starts_again(
    client: LocalClient, config: Config, dump: Callable[..., tuple[CoreDump, Core]]
) -> None:
    first = make(client, config)
    result, _ = dump(reset=True)
    assert result.action == "reset"
    (again,) = client.list()
    assert again.name == "web" and again.domid != first
    result, _ = dump(crash=True)
    assert result.action == "crashed" and client.list() == []


def test_promised_memory_is_not_touched(
    client: LocalClient, hv: FakeHypervisor, config: Config, tmp_path: Path
) -> None:
    domid = make(client, config, "pvh")
    hv.all[domid].promised.append(range(0x9000, 0x9100))
    refused(DomainError, "on demand", "balloon", lambda: client.dump_core("web", tmp_path / "x"))
    assert list(tmp_path.glob("*x*")) == []
    state = hv.domain(domid)
    assert state is not None and not state.paused
    hv.shutdown_domain(domid, 3)
    dump_core(client.host, domid, tmp_path / "x")


def test_dumps_refused(client: LocalClient, config: Config, tmp_path: Path) -> None:
    make(client, config)
    refused(HostError, "cannot write", "elsewhere", lambda: client.dump_core("web", tmp_path / "no" / "x"))
    refused(
        UsageError,
        "one of the two",
        "",
        lambda: client.dump_core("web", tmp_path / "x", crash=True, reset=True),
    )
    with pytest.raises(DomainNotFoundError):
        dump_core(client.host, 77, tmp_path / "x")


def test_a_failed_dump_leaves_no_file(
    client: LocalClient, hv: FakeHypervisor, config: Config, tmp_path: Path
) -> None:
    domid = make(client, config)
    folder = tmp_path / "cores"
    folder.mkdir()
    hv.fail["machine_to_phys"] = 1
    hv.fail["present"] = 1
    with pytest.raises(HypercallError):
        client.dump_core("web", folder / "x")
    assert list(folder.iterdir()) == []
    state = hv.domain(domid)
    assert state is not None and not state.paused


def test_only_root_may_read_it(client: LocalClient, config: Config, tmp_path: Path) -> None:
    make(client, config)
    (tmp_path / "x").write_text("an older one, replaced as a whole")
    client.dump_core("web", tmp_path / "x")
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600
    Core(tmp_path / "x")
