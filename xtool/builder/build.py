"""One domain, from a spec to a paused guest: the stages in order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from xtool.builder.domain import DomainBuilder
from xtool.builder.image import KernelCache
from xtool.builder.pv import PvBuilder
from xtool.builder.spec import STAGES, BuildSpec, BuiltDomain, Kind, Timeline
from xtool.builder.translated import HvmBuilder, PvhBuilder
from xtool.hypercall.port import Hypervisor

BUILDERS: dict[Kind, type[DomainBuilder]] = {"pv": PvBuilder, "pvh": PvhBuilder, "hvm": HvmBuilder}


def build(
    hv: Hypervisor,
    spec: BuildSpec,
    undo: ExitStack,
    timeline: Timeline,
    *,
    cache: KernelCache | None = None,
    after: dict[str, Callable[[DomainBuilder], None]] | None = None,
) -> BuiltDomain:
    """Build a domain; it exists afterwards, paused.

    What has to be undone if anything later fails is pushed on ``undo`` before it is done. ``after`` names
    stages after which to call something with the build so far: a device model started after ``create``
    comes up while memory is populated.
    """
    builder = BUILDERS[spec.kind](hv, spec, cache, undo)
    with builder.open_images:
        for stage in STAGES:
            with timeline.span(stage):
                getattr(builder, stage)()
            if after and stage in after:
                after[stage](builder)
        return builder.result()
