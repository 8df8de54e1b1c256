"""The verbs that tune vCPUs, memory, schedulers and CPU pools, on the host in memory: what they do, what they
refuse and what they say then."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xtool.abi import domctl as d
from xtool.config import DomainConfig
from xtool.errors import DeadlineError, DeviceModelError, DomainError, HostError, UsageError, XtoolError
from xtool.fake.hypervisor import FakeHypervisor
from xtool.toolstack import journal
from xtool.toolstack.api import CreateOptions, PoolRequest
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient
from xtool.toolstack.vcpus import cpus_to_add

MIB = 1 << 20
Config = Callable[..., DomainConfig]


@pytest.fixture
def hv(host: Host) -> FakeHypervisor:
    assert isinstance(host.hv, FakeHypervisor)
    return host.hv


@pytest.fixture
def client(host: Host) -> LocalClient:
    return LocalClient(host)


@pytest.fixture
def web(client: LocalClient, config: Config) -> int:
    """A PV domain of 2 of 4 vCPUs and 16 of 32 MiB, running."""
    wanted = config("pv", "web", vcpus=2, maxvcpus=4, maxmem=32)
    return client.create(wanted, CreateOptions()).domid


def refused(kind: type[XtoolError], what: str, hint: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert what in caught.value.message, caught.value.message
    assert hint in (caught.value.hint or ""), caught.value.hint


def kept(name: str) -> dict[str, object]:
    """The configuration that a restart takes."""
    (entry,) = [entry for entry in journal.entries() if entry.name == name]
    assert entry.config is not None
    return entry.config


# --- vcpu-pin ---------------------------------------------------------------------------------------
def test_pinning(client: LocalClient, hv: FakeHypervisor, web: int) -> None:
    (row,) = client.vcpu_pin("web", 1, "2-3")
    assert (row.vcpu, row.hard_affinity, row.soft_affinity) == (1, "2-3", "all")
    (row,) = client.vcpu_pin("web", 1, "-", "3")
    assert (row.hard_affinity, row.soft_affinity) == ("2-3", "3")
    rows = client.vcpu_pin("web", None, "all,^0", "node:0")
    assert [(r.hard_affinity, r.soft_affinity) for r in rows] == [("1-3", "all")] * 4
    client.vcpu_pin("web", 0, "1", force=True)
    assert hv.affinity(web, 0)[0] == {1}


def test_pinning_refused(client: LocalClient, web: int) -> None:
    refused(UsageError, "no vCPU 4", "0 to 3", lambda: client.vcpu_pin("web", 4, "0"))
    refused(UsageError, "neither", "vcpu-pin", lambda: client.vcpu_pin("web", 0, "-", "-"))
    refused(UsageError, "not a list of CPUs", "0-3,^1", lambda: client.vcpu_pin("web", 0, "zero"))
    refused(UsageError, "leaves none", "0-3", lambda: client.vcpu_pin("web", 0, "7-9"))
    refused(UsageError, "for all", "name the vCPU", lambda: client.vcpu_pin("web", None, "0", force=True))
    client.cpupool_cpu_remove("Pool-0", "3")
    refused(DomainError, "CPUs 0-2, none of 3", "cpupool-migrate web", lambda: client.vcpu_pin("web", 0, "3"))


# --- vcpu-set ---------------------------------------------------------------------------------------
def test_vcpus_are_asked_for(client: LocalClient, host: Host, web: int) -> None:
    done = client.vcpu_set("web", 3)
    assert (done.wanted, done.most) == (3, 4)
    nodes = [host.store.get(f"/local/domain/{web}/cpu/{n}/availability") for n in range(4)]
    assert nodes == ["online"] * 3 + ["offline"]
    assert kept("web")["vcpus"] == 3 and kept("web")["maxvcpus"] == 4


def test_a_guest_that_does_nothing_about_its_vcpus_is_told_of(client: LocalClient, web: int) -> None:
    with pytest.raises(DeadlineError, match=r"1 vCPUs online .*, not 2"):
        client.vcpu_set("web", 2, wait=0.05)
    assert kept("web")["vcpus"] == 2, "the wish stands"


def test_vcpus_refused(client: LocalClient, config: Config, web: int) -> None:
    refused(UsageError, "at most 4", "1 to 4", lambda: client.vcpu_set("web", 5))
    refused(UsageError, "cannot have 0", "1 to 4", lambda: client.vcpu_set("web", 0))
    client.create(config("pv", "wide", vcpus=1, maxvcpus=8), CreateOptions())
    refused(UsageError, "this host's 4 CPUs", "--ignore-host", lambda: client.vcpu_set("wide", 6))
    assert client.vcpu_set("wide", 6, ignore_host=True).wanted == 6


def slot(number: int, there: bool) -> dict[str, object]:
    props = {"socket-id": number, "core-id": 0, "thread-id": 0}
    return {"type": "qemu32-i386-cpu", "vcpus-count": 1, "props": props} | (
        {"qom-path": "/m"} if there else {}
    )


def test_qemu_gets_the_missing_cpus() -> None:
    answer = [slot(n, n < 1) for n in (3, 1, 0, 2)]
    assert cpus_to_add(answer, 3) == [
        {"driver": "qemu32-i386-cpu", "id": f"cpu-{n}", "socket-id": n, "core-id": 0, "thread-id": 0}
        for n in (1, 2)
    ]
    assert cpus_to_add(answer, 1) == []
    for nonsense in (None, {}, [3], [{}], [{"props": 1, "type": "x"}], [{"props": {}, "type": 2}]):
        if nonsense != []:
            with pytest.raises(DeviceModelError):
                cpus_to_add(nonsense, 1)


# --- memory -----------------------------------------------------------------------------------------
def test_memory_target_and_maximum(client: LocalClient, host: Host, hv: FakeHypervisor, web: int) -> None:
    done = client.mem_set("web", 24 * MIB)
    assert (done.target, done.maximum, done.limit) == (24 * MIB, 32 * MIB, 25 * MIB)
    assert host.store.get(f"/local/domain/{web}/memory/target") == str(24 << 10)
    assert kept("web")["memory"] == 24 and kept("web")["maxmem"] == 32
    refused(UsageError, "32 MiB at most", "mem-max web 48", lambda: client.mem_set("web", 48 * MIB))
    done = client.mem_max("web", 64 * MIB)
    assert done.maximum == 64 * MIB and done.limit == 65 * MIB
    assert client.mem_set("web", 48 * MIB).target == 48 * MIB
    assert kept("web")["memory"] == 48 and kept("web")["maxmem"] == 64
    refused(UsageError, "more than 32", "mem-set web 32", lambda: client.mem_max("web", 32 * MIB))
    refused(UsageError, "too few", "1 at least", lambda: client.mem_set("web", 0))


def test_a_smaller_domain_may_grow_back_after_a_restart(client: LocalClient, config: Config) -> None:
    client.create(config("pv", "db", memory=32), CreateOptions())
    client.mem_set("db", 24 * MIB)
    assert kept("db")["memory"] == 24 and kept("db")["maxmem"] == 32


def test_a_guest_that_keeps_its_memory_is_told_of(client: LocalClient, web: int) -> None:
    with pytest.raises(DeadlineError, match=r"has 1[56] MiB"):
        client.mem_set("web", 8 * MIB, wait=0.05)
    done = client.mem_set("web", 16 * MIB, wait=0.05)
    assert abs(done.current - done.target) < MIB


def test_an_hvm_guest_does_not_see_its_video_memory(client: LocalClient, host: Host, config: Config) -> None:
    domid = client.create(config("pvh", "tv", memory=16, maxmem=32), CreateOptions()).domid
    host.store.write(f"/local/domain/{domid}/memory/videoram", str(4 << 10))
    done = client.mem_set("tv", 20 * MIB)
    assert done.target == 16 * MIB and done.limit == 21 * MIB


# --- schedulers -------------------------------------------------------------------------------------
def test_weights_and_caps(client: LocalClient, hv: FakeHypervisor, web: int) -> None:
    (row,) = client.sched_credit("credit2", "web")
    assert (row.name, row.pool, row.weight, row.cap) == ("web", "Pool-0", 256, 0)
    (row,) = client.sched_credit_set("credit2", "web", weight=512, cap=150)
    assert (row.weight, row.cap) == (512, 150)
    assert hv.credit(web, d.XEN_SCHEDULER_CREDIT2) == (512, 150)
    assert kept("web")["cpu_weight"] == 512 and kept("web")["cap"] == 150
    assert [r.domid for r in client.sched_credit("credit2", pool="Pool-0")] == [web]


def test_weights_and_caps_refused(client: LocalClient, web: int) -> None:
    set_credit = client.sched_credit_set
    for weight in (0, 65536):
        refused(
            UsageError,
            f"weight of {weight}",
            "1 to 65535",
            lambda w=weight: set_credit("credit2", "web", weight=w),
        )
    refused(UsageError, "cap of 401", "0 to 400", lambda: set_credit("credit2", "web", cap=401))
    refused(
        DomainError, "credit2, not credit", "sched-credit2", lambda: set_credit("credit", "web", weight=1)
    )
    refused(UsageError, "no CPU pool", "sched-credit2", lambda: client.sched_credit("credit"))
    refused(DomainError, "Pool-0 is under", "sched-credit2", lambda: client.sched_credit("credit", pool="0"))
    refused(UsageError, "no CPU pool 'x'", "Pool-0", lambda: client.sched_credit("credit2", pool="x"))


def test_what_pools_go_by(client: LocalClient, config: Config) -> None:
    client.cpupool_cpu_remove("Pool-0", "3")
    client.cpupool_create(PoolRequest("one", "credit", "3"))
    (row,) = client.sched_pool("credit")
    assert (row.pool, row.tslice_ms, row.ratelimit_us, row.migration_delay_us) == ("one", 30, 1000, 0)
    (row,) = client.sched_pool_set("credit", "one", tslice_ms=10, ratelimit_us=0)
    assert (row.tslice_ms, row.ratelimit_us) == (10, 0)
    (row,) = client.sched_pool_set("credit2", ratelimit_us=2000)
    assert (row.pool, row.ratelimit_us, row.tslice_ms) == ("Pool-0", 2000, None)
    change = client.sched_pool_set
    refused(UsageError, "rate limit of 99", "100 to 500000", lambda: change("credit", "one", ratelimit_us=99))
    refused(UsageError, "time slice of 1001", "1 to 1000", lambda: change("credit", "one", tslice_ms=1001))
    refused(UsageError, "longer than", "lower", lambda: change("credit", "one", ratelimit_us=20000))
    refused(UsageError, "delay of -1", "0 to 100000", lambda: change("credit", "one", migration_delay_us=-1))


def test_rtds(client: LocalClient, config: Config) -> None:
    client.cpupool_cpu_remove("Pool-0", "2-3")
    client.cpupool_create(PoolRequest("rt", "rtds", "2-3"))
    given = {"pool": "rt", "vcpus": 2, "period": 20000, "budget": 5000, "extratime": "true"}
    client.create(config("pv", "control", **given), CreateOptions())
    rows = client.sched_rtds("control")
    assert [(r.vcpu, r.period, r.budget, r.extratime) for r in rows] == [
        (0, 20000, 5000, True), (1, 20000, 5000, True)
    ]  # fmt: skip
    (row,) = client.sched_rtds_set("control", [1], budget=8000, extratime=False)
    assert (row.vcpu, row.period, row.budget, row.extratime) == (1, 20000, 8000, False)
    assert [r.budget for r in client.sched_rtds(pool="rt")] == [5000, 8000]
    change = client.sched_rtds_set
    refused(UsageError, "budget of 30000 us in a period", "lower", lambda: change("control", budget=30000))
    refused(UsageError, "period of 9", "10 to", lambda: change("control", period=9))
    refused(UsageError, "no vCPU 2", "0 to 1", lambda: change("control", [2], budget=100))
    refused(
        DomainError,
        "rtds, not credit2",
        "sched-rtds",
        lambda: client.sched_credit_set("credit2", "control", cap=1),
    )


# --- pools ------------------------------------------------------------------------------------------
def test_a_pool_s_life(client: LocalClient, host: Host, config: Config, web: int) -> None:
    left = client.cpupool_cpu_remove("Pool-0", "2-3")
    assert left.cpus == (0, 1)
    made = client.cpupool_create(PoolRequest("batch", "credit", "3"))
    assert (made.name, made.scheduler, made.cpus, made.domains) == ("batch", "credit", (3,), 0)
    assert host.store.get(f"/local/pool/{made.id}/name") == "batch"
    assert client.cpupool_cpu_add("batch", "2").cpus == (2, 3)
    assert client.cpupool_migrate("web", "batch").action == "moved to CPU pool batch"
    assert kept("web")["pool"] == "batch"
    assert [p.domains for p in client.cpupool_list()] == [0, 1]
    assert client.cpupool_rename("batch", "night").name == "night"
    client.cpupool_migrate("web", "Pool-0")
    gone = client.cpupool_destroy("night")
    assert gone.cpus == (2, 3)
    assert not host.store.exists(f"/local/pool/{made.id}")
    assert client.cpupool_cpu_add("0", "node:0").cpus == (0, 1, 2, 3)


def test_pools_refused(client: LocalClient, config: Config, web: int) -> None:
    remove, make, move = client.cpupool_cpu_remove, client.cpupool_create, client.cpupool_migrate
    refused(HostError, "every CPU", "cpupool-cpu-remove", lambda: make(PoolRequest("x")))
    refused(HostError, "CPU 3 is not free: it is in CPU pool Pool-0", "cpupool-cpu-remove Pool-0 3",
            lambda: make(PoolRequest("x", cpus="3")))  # fmt: skip
    refused(UsageError, "no scheduler 'sedf'", "credit2", lambda: make(PoolRequest("x", "sedf")))
    refused(UsageError, "no name", "no number", lambda: make(PoolRequest("7")))
    refused(UsageError, "already", "another", lambda: make(PoolRequest("Pool-0")))
    refused(HostError, "CPU 0 stays in Pool-0", "another", lambda: remove("Pool-0", "0-1"))
    refused(UsageError, "leaves none", "0-3", lambda: remove("Pool-0", "9"))
    remove("Pool-0", "3")
    refused(HostError, "CPU 3 is not in", "0-2", lambda: remove("Pool-0", "3"))
    refused(HostError, "CPU 2 is not free", "Pool-0 2", lambda: make(PoolRequest("y", cpus="2,3")))
    make(PoolRequest("one", cpus="3"))
    move("web", "one")
    refused(
        DomainError,
        "the last of CPU pool one, which has domains: web",
        "cpupool-migrate",
        lambda: remove("one", "3"),
    )
    refused(DomainError, "has domains in it: web", "cpupool-migrate", lambda: client.cpupool_destroy("one"))
    refused(UsageError, "stays", "", lambda: client.cpupool_destroy("Pool-0"))
    refused(UsageError, "no CPU pool 'two'", "Pool-0, one", lambda: client.cpupool_migrate("web", "two"))
    client.cpupool_migrate("web", "Pool-0")
    remove("one", "3")
    refused(
        HostError,
        "no CPUs to run web on",
        "cpupool-cpu-add one",
        lambda: move("web", "one"),
    )


def test_a_pool_that_cannot_be_made_leaves_nothing(client: LocalClient, hv: FakeHypervisor) -> None:
    client.cpupool_cpu_remove("Pool-0", "2-3")
    hv.fail["add_pool_cpu"] = 19
    with pytest.raises(XtoolError):
        client.cpupool_create(PoolRequest("x", cpus="2-3"))
    hv.fail.clear()
    assert [p.name for p in client.cpupool_list()] == ["Pool-0"]
    assert hv.free_cpus() == {2, 3}
    hv.schedulers.remove(d.XEN_SCHEDULER_NULL)
    refused(HostError, "without the scheduler null", "credit2",
            lambda: client.cpupool_create(PoolRequest("x", "null", "2")))  # fmt: skip


def test_a_pool_for_each_node(client: LocalClient, hv: FakeHypervisor, web: int) -> None:
    hv.nodes = [0, 0, 1, 1]
    pools = client.cpupool_numa_split()
    assert [(p.name, p.cpus) for p in pools] == [("Pool-node0", (0, 1)), ("Pool-node1", (2, 3))]
    refused(HostError, "Pool-node0, Pool-node1", "cpupool-destroy", client.cpupool_numa_split)
    client.cpupool_destroy("Pool-node1")
    assert client.cpupool_create(PoolRequest("again", nodes="1")).cpus == (2, 3)


# --- a domain's file --------------------------------------------------------------------------------
def test_a_domain_is_made_where_its_file_says(
    client: LocalClient, hv: FakeHypervisor, config: Config
) -> None:
    client.cpupool_cpu_remove("Pool-0", "2-3")
    pool = client.cpupool_create(PoolRequest("batch", "credit", "2-3"))
    wanted = config(
        "pv", "job", pool="batch", vcpus=2, cpus="['2', '3']", cpus_soft="3", cpu_weight=100, cap=50
    )
    domid = client.create(wanted, CreateOptions()).domid
    state = hv.domain(domid)
    assert state is not None and state.cpupool == pool.id
    assert hv.affinity(domid, 0) == ({2}, {3}) and hv.affinity(domid, 1) == ({3}, {3})
    assert hv.credit(domid, d.XEN_SCHEDULER_CREDIT) == (100, 50)


def test_domains_for_another_host_are_refused(client: LocalClient, config: Config) -> None:
    client.cpupool_cpu_remove("Pool-0", "3")
    client.cpupool_create(PoolRequest("rt", "rtds", "3"))

    def create(**keys: object) -> Callable[[], object]:
        return lambda: client.create(config("pv", "job", **keys), CreateOptions())

    refused(HostError, "no CPU pool 'x'", "Pool-0, rt", create(pool="x"))
    refused(HostError, "leaves none of this host's 4 CPUs", "0 to 3", create(cpus="9"))
    refused(HostError, "leaves none", "0 to 3", create(cpus_soft="9"))
    refused(HostError, "none of the CPUs 3 is in CPU pool Pool-0", "0 to 2", create(cpus="3"))
    refused(
        UsageError,
        "cpu_weight",
        "leave cpu_weight out",
        create(pool="rt", cpu_weight=5),
    )
    refused(UsageError, "period: is for the schedulers rtds", "leave period", create(period=10000))
    refused(UsageError, "a budget of 4000 us", "lower budget", create(pool="rt", period=1000))
    client.cpupool_cpu_remove("rt", "3")
    refused(HostError, "has no CPUs", "cpupool-cpu-add rt", create(pool="rt"))
    assert client.list() == []


def test_what_a_domain_lost_with_its_pool_does_not_come_back(client: LocalClient, config: Config) -> None:
    client.create(config("pv", "job", cpu_weight=100, cpus="0"), CreateOptions())
    client.cpupool_cpu_remove("Pool-0", "3")
    client.cpupool_create(PoolRequest("rt", "rtds", "3"))
    client.cpupool_migrate("job", "rt")
    assert kept("job")["pool"] == "rt" and not {"cpu_weight", "cpus"} & kept("job").keys()


def test_most_domains_cost_no_question_about_pools(
    client: LocalClient, hv: FakeHypervisor, config: Config
) -> None:
    hv.fail = {"pools": 1, "cpu_places": 1}
    client.create(config("pv", "plain"), CreateOptions())
