"""vCPUs, memory, schedulers, CPU pools, triggers and core dumps on real Xen, compared with what xl says.

Needs two CPUs, and credit2 as the host's scheduler, as the lab has them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest
from corefile import Core

from guests import READY, ask, boot, guest, linux, start
from xtool.devicemodel.process import qmp_path
from xtool.devicemodel.qmp import query
from xtool.errors import DomainError, HostError, UsageError
from xtool.toolstack import journal
from xtool.toolstack.api import CreateOptions, PoolRequest
from xtool.toolstack.dumpcore import dump_core
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

PAUSED = CreateOptions(paused=True)
MIB = 1 << 20
needs_xl = pytest.mark.skipif(not shutil.which("xl"), reason="xl is not installed")


def xl(*words: str) -> str:
    run = subprocess.run(["xl", *words], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture
def spare(client: LocalClient, xen_host: Host) -> Iterator[int]:
    """A CPU in no pool; it goes back, and test pools go."""
    pool = client.cpupool_list("Pool-0")[0]
    cpu = max(pool.cpus)
    if cpu == 0:
        pytest.skip("one CPU alone cannot be moved")
    client.cpupool_cpu_remove("Pool-0", str(cpu))
    yield cpu
    for domain in client.list():
        if domain.name.startswith("xtool-test-"):
            client.destroy(str(domain.domid))
    for made in client.cpupool_list():
        if made.name.startswith("xtool-test-"):
            _emptied(client, made.id)
            client.cpupool_destroy(str(made.id))
    client.cpupool_cpu_add("Pool-0", str(cpu))


def _emptied(client: LocalClient, pool: int, deadline: float = 30.0) -> None:
    """A domain that is being torn down counts until it is gone."""
    until = monotonic() + deadline
    while client.cpupool_list(str(pool))[0].domains:
        assert monotonic() < until, "a domain stays in the pool"
        sleep(0.1)


# --- vCPUs ------------------------------------------------------------------------------------------
@needs_xl
def test_xl_sees_the_affinity(client: LocalClient) -> None:
    config = guest("pv", "pin", vcpus=2, cpus="['0', '1']", cpus_soft="1")
    client.create(config, PAUSED)
    rows = client.vcpu_list(config.name)
    assert [(r.hard_affinity, r.soft_affinity) for r in rows] == [("0", "1"), ("1", "1")]
    client.vcpu_pin(config.name, 0, "1", "0")
    client.vcpu_pin(config.name, 1, "all", "-")
    listed = [line.split() for line in xl("vcpu-list", config.name).splitlines()[1:]]
    # Name, ID, VCPU, CPU, state, time, hard / soft
    assert [words[-3:] for words in listed] == [["1", "/", "0"], ["all", "/", "1"]]
    with pytest.raises(UsageError, match="no vCPU 2"):
        client.vcpu_pin(config.name, 2, "0")


@pytest.mark.parametrize("kind", [pytest.param("pv", marks=pytest.mark.long), "pvh"])
def test_a_guest_takes_its_vcpus_down_and_up(client: LocalClient, kind: str) -> None:
    config = linux(kind, "cpus", vcpus=2)
    with boot(client, config) as console:
        assert client.vcpu_set(config.name, 1, wait=60).online == 1
        assert "\n0\r" in ask(console, "cat /sys/devices/system/cpu/online")
        # Linux takes a vCPU up when its udev says so, which this guest has not.
        client.vcpu_set(config.name, 2)
        ask(console, "cd /sys/devices/system/cpu/cpu1; until echo 1 > online; do sleep 0.2; done 2>/dev/null")
        assert client.vcpu_set(config.name, 2, wait=60).online == 2
        assert "0-1" in ask(console, "cat /sys/devices/system/cpu/online")
    with pytest.raises(UsageError, match="at most 2"):
        client.vcpu_set(config.name, 3)


def test_qemu_gets_another_cpu(client: LocalClient) -> None:
    config = guest("hvm", "cpus", vcpus=1, maxvcpus=2)
    domid = client.create(config, CreateOptions()).domid
    client.vcpu_set(config.name, 2)
    slots = query(qmp_path(domid), "query-hotpluggable-cpus")
    assert ["qom-path" in slot for slot in slots] == [True, True]


# --- memory -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["pv", pytest.param("pvh", marks=pytest.mark.long)])
def test_a_guest_gives_memory_up_and_takes_it_back(client: LocalClient, xen_host: Host, kind: str) -> None:
    config = linux(kind, "balloon")
    with boot(client, config) as console:
        free = xen_host.hv.host().free_pages
        done = client.mem_set(config.name, 192 * MIB, wait=120)
        assert abs(done.current - 192 * MIB) <= 4 * MIB and done.limit == 193 * MIB
        assert xen_host.hv.host().free_pages - free > 56 * MIB // 4096
        done = client.mem_set(config.name, 256 * MIB, wait=120)
        assert abs(done.current - 256 * MIB) <= 4 * MIB
        ask(console, "grep MemTotal /proc/meminfo")
    with pytest.raises(UsageError, match="256 MiB at most"):
        client.mem_set(config.name, 300 * MIB)


def test_xen_has_the_limit(client: LocalClient, xen_host: Host) -> None:
    config = guest("pv", "max")
    domid = client.create(config, PAUSED).domid
    assert client.mem_max(config.name, 32 * MIB).maximum == 32 * MIB
    state = xen_host.hv.domain(domid)
    assert state is not None and state.max_pages == 33 * MIB // 4096
    assert client.mem_set(config.name, 24 * MIB).limit == 25 * MIB
    assert xen_host.store.get(f"/local/domain/{domid}/memory/target") == str(24 << 10)


# --- schedulers -------------------------------------------------------------------------------------
@needs_xl
def test_xl_sees_weight_and_cap(client: LocalClient) -> None:
    config = guest("pv", "weight", vcpus=2, cpu_weight=128)
    client.create(config, PAUSED)
    assert client.sched_credit("credit2", config.name)[0].weight == 128
    client.sched_credit_set("credit2", config.name, weight=512, cap=150)
    assert xl("sched-credit2", "-d", config.name).split()[-2:] == ["512", "150"]
    xl("sched-credit2", "-d", config.name, "-w", "300", "-c", "0")
    (row,) = client.sched_credit("credit2", config.name)
    assert (row.weight, row.cap) == (300, 0)
    with pytest.raises(UsageError, match="cap of 201"):
        client.sched_credit_set("credit2", config.name, cap=201)
    with pytest.raises(DomainError, match="credit2, not credit"):
        client.sched_credit_set("credit", config.name, weight=5)


@needs_xl
def test_xl_sees_the_rate_limit(client: LocalClient) -> None:
    before = client.sched_pool("credit2", "Pool-0")[0].ratelimit_us
    try:
        client.sched_pool_set("credit2", "Pool-0", ratelimit_us=5000)
        assert "ratelimit=5000us" in xl("sched-credit2", "-s").replace(" ", "")
    finally:
        client.sched_pool_set("credit2", "Pool-0", ratelimit_us=before)


# --- pools ------------------------------------------------------------------------------------------
@needs_xl
@pytest.mark.long
def test_a_pool_s_life_as_xl_sees_it(client: LocalClient, spare: int) -> None:
    with pytest.raises(HostError, match="CPU 0 is not free"):
        client.cpupool_create(PoolRequest("xtool-test-pool", cpus="0"))
    client.cpupool_create(PoolRequest("xtool-test-pool", "credit", str(spare)))
    listed = [line.split() for line in xl("cpupool-list", "-c").splitlines()[1:]]
    assert ["xtool-test-pool", str(spare)] in listed
    config = guest("pv", "pooled", pool="xtool-test-pool", cpu_weight=100)
    with start(client, config) as console:
        console.wait_for(READY)
    (row,) = client.sched_credit("credit", config.name)
    assert (row.pool, row.weight) == ("xtool-test-pool", 100)
    assert client.vcpu_list(config.name)[0].cpu == spare
    counted = next(line.split() for line in xl("cpupool-list").splitlines() if line.startswith("xtool-test"))
    assert counted[1:] == ["1", "credit", "y", "1"]
    with pytest.raises(DomainError, match="has domains in it: xtool-test-pooled"):
        client.cpupool_destroy("xtool-test-pool")
    with pytest.raises(DomainError, match="last of CPU pool"):
        client.cpupool_cpu_remove("xtool-test-pool", str(spare))
    with pytest.raises(DomainError, match="none of 0"):
        client.vcpu_pin(config.name, 0, "0")
    client.cpupool_migrate(config.name, "Pool-0")
    client.cpupool_rename("xtool-test-pool", "xtool-test-other")
    assert "xtool-test-other" in xl("cpupool-list")
    assert client.cpupool_destroy("xtool-test-other").cpus == (spare,)
    assert "xtool-test" not in xl("cpupool-list")


@needs_xl
@pytest.mark.long
def test_a_pool_that_xl_made(client: LocalClient, spare: int) -> None:
    xl("cpupool-create", 'name="xtool-test-xl"', 'sched="credit2"', f'cpus=["{spare}"]')
    (pool,) = client.cpupool_list("xtool-test-xl")
    assert (pool.scheduler, pool.cpus) == ("credit2", (spare,))
    config = guest("pvh", "moved")
    client.create(config, PAUSED)
    client.cpupool_migrate(config.name, "xtool-test-xl")
    assert client.cpupool_list("xtool-test-xl")[0].domains == 1
    with pytest.raises(UsageError, match="domain 0"):
        client.cpupool_migrate("Domain-0", "xtool-test-xl")


def test_schedulers_this_xen_does_not_have(client: LocalClient, spare: int) -> None:
    """Debian's Xen has credit and credit2; one with rtds runs the contract tests for it."""
    try:
        client.cpupool_create(PoolRequest("xtool-test-rt", "rtds", str(spare)))
    except HostError as error:
        assert "without the scheduler rtds" in error.message
        assert [p.name for p in client.cpupool_list()] == ["Pool-0"]
    else:
        config = guest("pv", "rt", pool="xtool-test-rt", period=20000, budget=10000)
        client.create(config, PAUSED)
        assert client.sched_rtds(config.name)[0].budget == 10000


# --- buttons and parameters -------------------------------------------------------------------------
def test_sysrq_reaches_the_kernel(client: LocalClient) -> None:
    config = linux("pvh", "sysrq", cmdline="console=hvc0 loglevel=8")
    with boot(client, config) as console:
        client.sysrq(config.name, "h")
        console.wait_for("HELP", 60)
    with pytest.raises(DomainError, match="cannot reset"):
        client.trigger(config.name, "reset")


@pytest.mark.parametrize("kind", ["pv", pytest.param("pvh", marks=pytest.mark.long)])
def test_an_nmi_reaches_the_kernel(client: LocalClient, kind: str) -> None:
    config = linux(kind, "nmi", cmdline="console=hvc0 loglevel=8")
    with boot(client, config) as console:
        before = ask(console, "grep NMI: /proc/interrupts")
        client.trigger(config.name, "nmi")
        # A PVH guest has no port that gives a reason, and takes its ones for a bus error.
        assert re.search("NMI received|NMI: PCI system error", console.wait_for("Dazed and confused", 60))
        assert ask(console, "grep NMI: /proc/interrupts") != before


def test_debug_keys_are_answered_in_the_log(client: LocalClient) -> None:
    client.debug_keys("h")
    assert "showing installed handlers" in client.dmesg()


def test_a_parameter_is_set(client: LocalClient) -> None:
    (change,) = client.set_parameters(["gnttab_max_frames=65"])
    try:
        assert change.value == "65"
    finally:
        client.set_parameters([f"gnttab_max_frames={change.before}"])
    with pytest.raises(UsageError, match="no run-time parameter"):
        client.set_parameters(["dom0_mem=1G"])


# --- core dumps -------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["pv", pytest.param("pvh", marks=pytest.mark.long)])
def test_a_core_has_the_guest_s_memory_in_it(
    client: LocalClient, xen_host: Host, tmp_path: Path, kind: str
) -> None:
    secret = os.urandom(4096)
    ramdisk = tmp_path / "ramdisk"
    ramdisk.write_bytes(bytes(4096) + secret + bytes(100))
    config = guest(kind, "core", vcpus=2, ramdisk=ramdisk)
    with start(client, config) as console:
        console.wait_for(READY)
        done = client.dump_core(config.name, tmp_path / "core")
    core = Core(tmp_path / "core")
    state = xen_host.hv.domain(done.domid)
    assert state is not None and not state.paused
    assert 0 <= state.pages - done.pages <= 16, "all but Xen's own"
    assert done.missing == 0
    pages = core.pages()
    assert secret in pages.values()
    assert any(READY.encode() in page for page in pages.values())
    assert len(core.section(".xen_prstatus")) == 5168 * done.vcpus > 0
    if readelf := shutil.which("readelf"):
        listed = subprocess.run([readelf, "-WS", done.path], capture_output=True, text=True, check=True)
        assert ".xen_pages" in listed.stdout and not listed.stderr


def test_a_domain_that_never_ran_and_one_that_crashed(
    client: LocalClient, xen_host: Host, tmp_path: Path
) -> None:
    config = guest("pv", "crashed", on_crash="preserve")
    domid = client.create(config, PAUSED).domid
    dump_core(xen_host, domid, tmp_path / "before")
    assert Core(tmp_path / "before").pages()
    client.unpause(config.name)
    xen_host.hv.shutdown_domain(domid, 3)
    done = dump_core(xen_host, domid, tmp_path / "after")
    assert len(Core(tmp_path / "after").pages()) == done.pages
    state = xen_host.hv.domain(domid)
    assert state is not None and state.shutdown


def test_dumped_then_started_again(client: LocalClient, tmp_path: Path) -> None:
    config = guest("pvh", "again")
    before = client.create(config, CreateOptions()).domid
    assert client.dump_core(config.name, tmp_path / "core", live=True, reset=True).action == "reset"
    until = monotonic() + 60
    # The keeper may have been the one to do it.
    while not [d for d in client.list() if d.name == config.name and d.domid != before]:
        assert monotonic() < until, journal.entries()
        sleep(0.1)


@needs_xl
@pytest.mark.long
def test_xl_s_core_has_the_same_pages(client: LocalClient, tmp_path: Path) -> None:
    """Of a Linux PV guest: xl finds its pages by the table the guest keeps, we by Xen's."""
    config = linux("pv", "twice", memory=128)
    with boot(client, config):
        client.pause(config.name)
        client.dump_core(config.name, tmp_path / "ours")
        xl("dump-core", config.name, str(tmp_path / "theirs"))
        client.unpause(config.name)
    ours, theirs = Core(tmp_path / "ours"), Core(tmp_path / "theirs")
    assert ours.notes().keys() == theirs.notes().keys()
    assert ours.notes()[0x2000002] == theirs.notes()[0x2000002], "Xen's version, to the byte"
    assert ours.section(".xen_prstatus") == theirs.section(".xen_prstatus")
    mine, others = ours.digests(), theirs.digests()
    shared = mine.keys() & others.keys()
    assert len(shared) >= 0.99 * max(len(mine), len(others))
    different = [pfn for pfn in shared if mine[pfn] != others[pfn]]
    assert len(different) <= 4, different  # its console and xenstore rings may have moved
