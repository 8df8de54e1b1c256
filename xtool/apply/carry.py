"""One planned change, carried out by the toolstack's verbs.

Each step leaves what the next apply can go on from: a create that is killed is rolled back, a live change
is in the definition as soon as it is made, and what was destroyed is created by the next apply.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from uuid import UUID

from xtool.apply.compare import numbered
from xtool.apply.described import Described
from xtool.apply.records import (
    CONFLICT,
    CREATE,
    DESTROY,
    DONE,
    ENDED,
    FAILED,
    RECREATE,
    UNCHANGED,
    DomainChange,
    Failure,
    KeyChange,
)
from xtool.config.devices import VifConfig
from xtool.errors import DeadlineError, DomainError, DomainNotFoundError, XtoolError
from xtool.progress import Progress
from xtool.toolstack.api import Client, CreateOptions

_RATES = {"rate": "rate", "rate-in": "rate_in"}
_LIMITS = {"bytes-per-second": "bytes_per_second", "ops-per-second": "ops_per_second"}


@dataclass(frozen=True)
class Manner:
    """``deadline``: how long a guest may take to shut down (s); ``force``: end it when it does not."""

    deadline: float = 60.0
    force: bool = False
    healthy: bool = False


@dataclass(frozen=True)
class Step:
    """What is to be done about one domain. ``wanted`` is None for one to be destroyed; ``needed``: others
    that are changed depend on it."""

    one: DomainChange
    wanted: Described | None
    needed: bool


def attempt(client: Client, step: Step, manner: Manner, progress: Progress) -> DomainChange:
    """Carry it out; the change with its ``result``, and its ``error`` if it failed."""
    one, wanted = step.one, step.wanted
    try:
        if one.action != UNCHANGED:
            one = replace(_do(client, one, wanted, manner, progress), result=DONE)
        else:
            one = replace(one, result=UNCHANGED)
        if wanted is not None and (step.needed or (manner.healthy and one.action != UNCHANGED)):
            client.wait_ready(one.name, progress=progress)
    except XtoolError as error:
        return replace(one, result=FAILED, error=failure(error))
    return one


def failure(error: BaseException) -> Failure:
    """What is told of an error; anything but an ``XtoolError`` is a bug."""
    if isinstance(error, XtoolError):
        return Failure(error.kind, error.message, error.hint, error.exit_code)
    text = f"this is a bug in xtool: {type(error).__name__}: {error}"
    return Failure("Bug", text, "its traceback is on standard error", 70)


def _do(
    client: Client, one: DomainChange, wanted: Described | None, manner: Manner, progress: Progress
) -> DomainChange:
    if one.action == CONFLICT:
        raise DomainError(f"{one.name}: {one.why}", hint="end it with the toolstack that made it")
    if one.action == DESTROY:
        end(client, one, manner, progress)
        return one
    assert wanted is not None
    if one.action == CREATE:
        return _create(client, one, wanted, progress)
    if one.action == RECREATE:
        end(client, one, manner, progress)
        # The same uuid, so the same MAC addresses; but another seed is for another instance.
        fresh = any(change.key in ("cloud_init", "uuid") for change in one.changes)
        if not fresh:
            config = wanted.config.model_copy(update={"uuid": UUID(one.uuid)})
            wanted = replace(wanted, config=config)
        return _create(client, one, wanted, progress)
    for change in one.changes:
        if change.when == "live":
            _live(client, one, wanted, change)
    waits = tuple(dict.fromkeys(c.key.partition("[")[0] for c in one.changes if c.when == "reboot"))
    client.define(one.uuid, wanted.config, waits)
    return one


def _create(client: Client, one: DomainChange, wanted: Described, progress: Progress) -> DomainChange:
    options = CreateOptions(source=wanted.source)
    try:
        made = client.create(wanted.config, options, progress)
    except XtoolError as error:
        from xtool.errors import ConfigError

        raise wanted.loaded.place(error) if isinstance(error, ConfigError) else error from None
    return replace(one, domid=made.domid, uuid=made.uuid)


def end(client: Client, one: DomainChange, manner: Manner, progress: Progress) -> None:
    """Shut a domain down and see that it is gone, whatever its on_poweroff says."""
    progress.step(f"shutting {one.name} down")
    try:
        if client.list(one.uuid)[0].state in ENDED:
            client.destroy(one.uuid)  # it hears nothing any more
            return
        info = client.config(one.uuid)
        if info and info[0].config is not None:
            client.set_config(one.uuid, ["on_poweroff=destroy"])
        try:
            client.shutdown(one.uuid, wait=True, deadline=manner.deadline)
        except (DeadlineError, DomainError) as error:
            if isinstance(error, DomainNotFoundError):
                return
            if not manner.force:
                raise type(error)(
                    error.message, hint="--force ends it when it does not shut down in time"
                ) from None
        client.destroy(one.uuid)
    except DomainNotFoundError:
        return


def _live(client: Client, one: DomainChange, wanted: Described, change: KeyChange) -> None:
    """One key of a running domain. Those that only the definition has need nothing here."""
    config, domain, key = wanted.config, one.uuid, change.key
    if key == "memory":
        client.mem_set(domain, config.memory)
    elif key == "vcpus":
        client.vcpu_set(domain, config.vcpus, ignore_host=True)
    elif key in ("cpus", "cpus_soft"):
        value = getattr(config, key) or "all"
        for number, text in enumerate((value,) if isinstance(value, str) else value):
            vcpu = None if isinstance(value, str) else number
            hard, soft = (text, None) if key == "cpus" else (None, text)
            client.vcpu_pin(domain, vcpu, hard, soft)
    elif key == "pool":
        client.cpupool_migrate(domain, config.pool or "Pool-0")
    elif key in ("cpu_weight", "cap"):
        scheduler = client.targets(domain)[0].scheduler
        weight, cap = (config.cpu_weight or 256, None) if key == "cpu_weight" else (None, config.cap)
        client.sched_credit_set(scheduler, domain, weight=weight, cap=cap)
    elif key in ("period", "budget", "extratime"):
        period = 10000 if config.period is None else config.period
        budget = 4000 if config.budget is None else config.budget
        client.sched_rtds_set(domain, period=period, budget=budget, extratime=bool(config.extratime))
    elif key.startswith("disk["):
        _disk(client, domain, wanted, change)
    elif key.startswith("vif["):
        _vif(client, domain, wanted, change)


def _disk(client: Client, domain: str, wanted: Described, change: KeyChange) -> None:
    vdev, _, sub = change.key.removeprefix("disk[").partition("]")
    disk = next((d for d in wanted.config.disks if d.vdev == vdev), None)
    name = sub.removeprefix(".")
    if disk is None:
        client.block_detach(domain, vdev)
    elif not name:
        client.block_attach(domain, disk)
    elif name == "target" and disk.target is None:
        client.cd_eject(domain, vdev)
    elif name == "target":
        client.cd_insert(domain, vdev, disk.target or "")
    else:
        client.block_limit(domain, vdev, **{_LIMITS[name]: getattr(disk, _LIMITS[name]) or 0})


def _vif(client: Client, domain: str, wanted: Described, change: KeyChange) -> None:
    devid, _, sub = change.key.removeprefix("vif[").partition("]")
    vif = numbered(wanted.config).get(int(devid))
    name = sub.removeprefix(".")
    if vif is None:
        client.network_detach(domain, devid)
    elif not name:
        client.network_attach(domain, VifConfig.model_validate({**vif, "devid": int(devid)}))
    else:
        client.network_limit(domain, devid, **{_RATES[name]: str(vif.get(name) or "")})
