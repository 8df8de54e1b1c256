"""``create --dry-run``: the real builder, on the in-memory hypervisor, on any machine."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING
from uuid import uuid4

from xtool.abi.memory import E820_NAMES
from xtool.builder.build import build
from xtool.builder.image import KernelCache
from xtool.builder.spec import Timeline
from xtool.toolstack.api import DryRun, LayoutRegion, Span
from xtool.toolstack.host import open_host
from xtool.toolstack.plan import DomainPlan, plan

if TYPE_CHECKING:
    from xtool.config import DomainConfig


def dry_run(config: DomainConfig) -> DryRun:
    """Build the domain's memory image and throw it away; what it looked like."""
    host = open_host("fake:")
    wanted = plan(config, host.facts(config), config.uuid or uuid4())
    timeline = Timeline(host.hv)
    with ExitStack() as undo:
        built = build(host.hv, wanted.build, undo, timeline, cache=KernelCache())
        state = host.hv.domain(built.domid)
        populated = state.pages if state else 0
    argv: tuple[str, ...] = ()
    notes = {"kernel": wanted.build.kernel}
    if wanted.devicemodel:
        argv, notes["device model"] = _argv(wanted)
        notes["firmware"] = wanted.build.firmware or "none"
    return DryRun(
        name=wanted.name,
        type=wanted.kind,
        memory=wanted.build.memory,
        entry=built.entry,
        regions=tuple(LayoutRegion(r.name, r.start, r.size, r.virtual, r.note) for r in built.regions),
        e820=tuple((start, size, E820_NAMES[kind]) for start, size, kind in built.memory_map),
        page_table_pages=built.page_table_pages,
        pages_populated=populated,
        timings=tuple(Span(s.name, s.start, s.duration, s.hypercalls) for s in timeline.stages),
        devicemodel_argv=argv,
        notes=notes,
    )


def _argv(wanted: DomainPlan) -> tuple[tuple[str, ...], str]:
    """QEMU's command line, and what is known of QEMU itself."""
    from xtool.devicemodel.argv import build_argv, find_device_model
    from xtool.devicemodel.qdisk import QdiskSpec, build_qdisk_argv
    from xtool.errors import DeviceModelError

    assert wanted.devicemodel is not None
    try:
        program, note = find_device_model(wanted.devicemodel_binary), "found"
    except DeviceModelError as error:
        program, note = wanted.devicemodel_binary or "qemu-system-i386", f"not on this machine: {error}"
    if isinstance(wanted.devicemodel, QdiskSpec):
        return tuple(build_qdisk_argv(wanted.devicemodel, 1, program, 3)), note
    return tuple(build_argv(wanted.devicemodel, 1, program, 3)), note
