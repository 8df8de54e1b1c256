"""Creating a domain: plan, build, wire, start. This page tells the story; each line can be followed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from time import time
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from xtool.builder.build import build
from xtool.builder.image import KernelCache
from xtool.builder.spec import BuiltDomain, Timeline
from xtool.devices import declare
from xtool.progress import SILENT, Progress
from xtool.toolstack import journal
from xtool.toolstack.api import CreateOptions, CreateResult, Span
from xtool.toolstack.backends import check_served, stop_backends
from xtool.toolstack.deviceplan import emulated_nics
from xtool.toolstack.names import now_running, reserve
from xtool.toolstack.plan import DomainPlan, plan
from xtool.toolstack.seed import write_seed
from xtool.toolstack.signals import undone_on_failure
from xtool.toolstack.wiring import (
    Wiring,
    backend_folders,
    offline,
    records,
    remove_taps,
    stale_backends,
    wait_let_go,
)
from xtool.xenstore import paths

if TYPE_CHECKING:
    from xtool.builder.domain import DomainBuilder
    from xtool.config import DomainConfig
    from xtool.devicemodel.process import DeviceModel
    from xtool.toolstack.host import Host
    from xtool.xenstore.port import Writer


def create(
    host: Host,
    config: DomainConfig,
    options: CreateOptions,
    progress: Progress = SILENT,
    uuid: UUID | None = None,
) -> CreateResult:
    """Create the domain a configuration describes; it runs afterwards (or is paused, by ``options``).

    Whatever fails or interrupts it, nothing is left: each step's undo is registered before the step.
    """
    wanted = plan(config, host.facts(config), uuid or config.uuid or uuid4())
    with journal.locked(wanted.uuid):
        return carry_out(host, wanted, config, options, progress)


def carry_out(
    host: Host, wanted: DomainPlan, config: DomainConfig, options: CreateOptions, progress: Progress
) -> CreateResult:
    """The same from a plan; the caller holds the domain's lock."""
    timeline = Timeline(host.hv)
    if host.tracer:
        host.tracer.timeline = timeline
    with undone_on_failure() as undo:
        _host_has(host, wanted)
        reserve(host, wanted, config, undo, options.source)
        if wanted.seed:
            write_seed(wanted.seed, undo)
        progress.step(f"building {wanted.name} ({wanted.kind}, {wanted.build.memory >> 20} MiB)")
        qemu = _Qemu(host, wanted, undo)
        # Undone after the domain is gone: xenconsoled writes its nodes as long as it is there.
        undo.callback(qemu.forget_domain)
        built = build(
            host.hv, wanted.build, undo, timeline, cache=KernelCache(), after={"create": qemu.start}
        )
        undo.callback(qemu.forget_devices)
        devices = Wiring(host, built.domid, wanted.kind, wanted.disks, wanted.vifs, wanted.consoles)
        with timeline.span("wire"):
            devices.open(undo)
            _wire(host, wanted, built, devices)
        if wanted.devicemodel:
            progress.step(f"waiting for the device model of {wanted.name}")
            with timeline.span("device_model"):
                qemu.ready(options.deadline)
                if wanted.kind == "hvm":
                    host.hv.claim(built.domid, 0)  # what the device model did not take of the claim
        if devices.devices:
            progress.step(f"waiting for the devices of {wanted.name}")
            with timeline.span("devices"):
                devices.ready(options.devices)
        if host.real:
            devices.plug_taps()
        if not options.paused:
            host.hv.unpause_domain(built.domid)
        now_running(wanted.uuid, built.domid)
        undo.pop_all()
    spans = tuple(Span(s.name, s.start, s.duration, s.hypercalls) for s in timeline.stages)
    total = max((s.start + s.duration for s in spans), default=0.0)
    return CreateResult(wanted.name, built.domid, wanted.uuid, wanted.kind, total, spans)


def _host_has(host: Host, wanted: DomainPlan) -> None:
    """What its devices need of the host, before anything is made."""
    check_served(host, wanted.devices(0))
    for bridge in {vif.bridge for vif in wanted.vifs if not vif.script and vif.network != "user"}:
        host.hotplug.check_bridge(bridge)


def _wire(host: Host, wanted: DomainPlan, built: BuiltDomain, devices: Wiring) -> None:
    """Tell xenstore about the domain and its devices, and introduce it to xenstored."""
    spec = declare.DomainNodes(
        domid=built.domid,
        uuid=wanted.uuid,
        name=wanted.name,
        type=wanted.kind,
        memory=wanted.build.memory,
        maxmem=wanted.build.max_memory,
        vcpus=wanted.build.vcpus,
        maxvcpus=wanted.build.max_vcpus,
        store_port=built.store_port,
        store_gfn=built.store_gfn,
        console_port=built.console_port,
        console_gfn=built.console_gfn,
        start_time=time(),
        videoram=wanted.build.video_memory,
        console_type="xtool" if any(c.devid == 0 for c in wanted.consoles) else "xenconsoled",
        hvm=wanted.hvm,
    )
    nodes = [*declare.domain_nodes(spec), *devices.nodes()]
    stale = [*declare.stale_paths(built.domid), *devices.stale(), *stale_backends(host, built.domid)]
    if not wanted.devicemodel:  # else it is gone already: see there
        stale.append(paths.device_model(built.domid))

    def write(tx: Writer) -> None:
        for path in dict.fromkeys(stale):
            tx.rm(path)
        declare.write(tx, nodes)

    # Only we write below a domain that nobody has been told of yet.
    host.store.atomically(write, plain_fallback=True)
    # xenstored lets go of it by itself when the domain is destroyed; asked to before, oxenstored would
    # leak its event channel.
    host.store.introduce(built.domid, built.store_gfn, built.store_port)


def forget(host: Host, domid: int, uuid: str, folders: Iterable[str] = ()) -> None:
    """Remove every xenstore node of a domain that is gone or going; ``folders`` are its backends'.

    Where there were any, this waits until the kernel has let go of what they held.
    """
    folders = tuple(folders)
    with host.store.batch() as batch:
        for path in (*folders, *declare.leaving_paths(domid, uuid)):
            batch.rm(path)
    if folders:
        wait_let_go(host, domid)


class _Qemu:
    """The device model of the domain being created, if it has one: started early, waited for late."""

    def __init__(self, host: Host, wanted: DomainPlan, undo: ExitStack) -> None:
        self._host, self._wanted, self._undo = host, wanted, undo
        self._model: DeviceModel | None = None
        self._domid = -1

    def start(self, build: DomainBuilder) -> None:
        """Right after the domain exists, so that QEMU comes up while its memory is being filled."""
        self._domid = domid = build.domid
        spec = self._wanted.devicemodel
        if spec or self._wanted.devices(domid):
            # Should we and the domain both be gone, recovery finds by its number what served it.
            journal.update(self._wanted.uuid, domid=domid)
        if spec is None or not self._host.real:
            return
        from xtool.devicemodel.process import spawn
        from xtool.devicemodel.spec import DeviceModelSpec

        if isinstance(spec, DeviceModelSpec):
            spec = replace(spec, nics=emulated_nics(self._wanted.vifs, domid))
            if build.kernel_in_place:
                spec = replace(spec, kernel=_stub(), ramdisk=None, cmdline=None)

        self._host.store.rm(paths.device_model(domid))
        self._undo.callback(self._host.store.rm, paths.device_model(domid))
        self._undo.callback(_stop, domid, self._wanted.uuid)
        with self._host.span("spawn", "qemu"):
            self._model = spawn(spec, domid, binary=self._wanted.devicemodel_binary)

    def forget_domain(self) -> None:
        if self._domid >= 0:
            ids = self._wanted.devices(self._domid)
            folders = backend_folders(self._domid, {(d.backend_domid, d.folder) for d in ids})
            forget(self._host, self._domid, self._wanted.uuid, folders)

    def forget_devices(self) -> None:
        """What must happen to the devices while their nodes are there: their scripts, our processes."""
        if self._domid >= 0 and self._wanted.devices(self._domid):
            devices = records(self._host, self._domid)
            offline(self._host, devices)
            stop_backends(self._host, self._domid)
            remove_taps(self._host, devices)

    def ready(self, deadline: float) -> None:
        if self._model is None:
            return
        with self._host.span("wait until it answers", "qemu"):
            ready = self._model.wait_ready(deadline, vnc_password=self._wanted.vnc_password)
        nodes = declare.device_model_nodes(self._domid, self._model.pid, ttys=ready.serial, vnc=ready.vnc)
        with self._host.store.batch() as batch:
            declare.write(batch, nodes)
        self._model.close()


def _stub() -> str:
    """The file with the little kernel that starts one already in memory; the same for every guest."""
    from xtool import paths as folders
    from xtool.builder.directboot import stub_kernel

    path = folders.run_dir() / "hvm-boot.bin"
    stub = stub_kernel()
    if not path.exists() or path.read_bytes() != stub:
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(stub)
        temporary.replace(path)
    return str(path)


def _stop(domid: int, uuid: str) -> None:
    """Found by what it serves, not by what we remember: nothing we remember survives being interrupted."""
    from xtool.devicemodel.process import find, qmp_path

    model = find(domid, uuid=uuid)
    if model:
        model.stop(grace=0.2)
    qmp_path(domid).unlink(missing_ok=True)  # also of one that died by itself
