"""The toolstack's verbs, carried out in this process."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from xtool.progress import SILENT, Progress
from xtool.toolstack.api import (
    Client,
    ConsoleRecord,
    ConsoleTarget,
    CreateOptions,
    CreateResult,
    DeviceResult,
    Disks,
    DomainInfo,
    DryRun,
    HostInfo,
    LifecycleResult,
    Networks,
    ServedDisk,
    ServeOptions,
    VcpuInfo,
    Wirings,
)
from xtool.toolstack.definitions import LocalDefinitions
from xtool.toolstack.everyday import LocalEveryday
from xtool.toolstack.host import Host, open_host
from xtool.toolstack.localtuning import LocalTuning
from xtool.toolstack.names import find, uuid_text

if TYPE_CHECKING:
    from xtool.config import DiskConfig, DomainConfig, VifConfig
    from xtool.toolstack.tracing import Tracer


class LocalClient(LocalEveryday, LocalDefinitions, LocalTuning):
    """``Client`` on a ``Host``. Opening it finishes what a killed xtool left half-done."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def close(self) -> None:
        self.host.close()

    # --- making and ending ------------------------------------------------------------------------
    def create(
        self, config: DomainConfig, options: CreateOptions, progress: Progress = SILENT
    ) -> CreateResult:
        from xtool.toolstack.create import create

        self.gc()
        tracer = self._tracer(options)
        result = create(tracer.wrap(self.host) if tracer else self.host, config, options, progress)
        if self.host.real:
            from xtool.toolstack.keeper import start_keeper

            start_keeper(result.domid, result.uuid, self.host)
        return tracer.finish(self.host, result, options, progress) if tracer else result

    @staticmethod
    def _tracer(options: CreateOptions) -> Tracer | None:
        if options.trace is None:
            return None
        from xtool.toolstack.tracing import Tracer

        return Tracer()

    def dry_run(self, config: DomainConfig) -> DryRun:
        from xtool.toolstack.dryrun import dry_run

        return dry_run(config)

    def destroy(self, domain: str) -> LifecycleResult:
        from xtool.toolstack.destroy import destroy

        return destroy(self.host, find(self.host, domain))

    def gc(self) -> builtins.list[LifecycleResult]:
        from xtool.toolstack import dom0
        from xtool.toolstack.destroy import recover

        gone = [f"{device.kind} {device.devid}" for device in dom0.recover(self.host)]
        done = recover(self.host)
        if self.host.real:
            from xtool.toolstack.keeper import ensure_all

            ensure_all(self.host)
        return [*done, *(LifecycleResult(0, name, "rolled-back") for name in gone)]

    # --- asking -----------------------------------------------------------------------------------
    def list(self, domain: str | None = None) -> list[DomainInfo]:
        from xtool.toolstack.query import domains

        return domains(self.host, domain)

    def info(self) -> HostInfo:
        from xtool.toolstack.query import host_info

        return host_info(self.host)

    def dmesg(self, *, clear: bool = False) -> str:
        return self.host.hv.console_ring(clear=clear).decode("utf-8", "backslashreplace")

    def vcpu_list(self, domain: str | None = None) -> builtins.list[VcpuInfo]:
        from xtool.toolstack.query import vcpus

        return vcpus(self.host, domain)

    def console(
        self, domain: str, kind: str | None = None, *, number: int = 0, deadline: float = 10.0
    ) -> ConsoleTarget:
        from xtool.backends.consolefeed import feed_path
        from xtool.devices.console import wait_for_tty
        from xtool.toolstack.consoles import socket_of
        from xtool.toolstack.query import kind_of
        from xtool.xenstore import paths

        found = find(self.host, domain)
        domid = found.state.domid
        if kind is None:
            serial = kind_of(found.state) == "hvm" and self.host.store.exists(paths.serial(domid))
            kind = "serial" if serial and not number else "pv"
        socket = socket_of(self.host, domid, number) if kind == "pv" else ""
        if socket:
            feed = str(feed_path(domid, number))
            return ConsoleTarget(domid, found.name, kind, "", socket, number, feed)
        return ConsoleTarget(domid, found.name, kind, wait_for_tty(self.host.store, domid, kind, deadline))

    def console_log(self, domain: str, number: int = 0, since: float = 0.0) -> Iterator[ConsoleRecord]:
        from xtool.toolstack.consoles import kept

        return kept(self.host, domain, number, since)

    # --- changing its state -----------------------------------------------------------------------
    def pause(self, domain: str) -> LifecycleResult:
        found = find(self.host, domain)
        self.host.hv.pause_domain(found.state.domid)
        return LifecycleResult(found.state.domid, found.name, "paused")

    def unpause(self, domain: str) -> LifecycleResult:
        found = find(self.host, domain)
        self.host.hv.unpause_domain(found.state.domid)
        return LifecycleResult(found.state.domid, found.name, "unpaused")

    def shutdown(
        self, domain: str, *, wait: bool = False, acpi_fallback: bool = False, deadline: float = 600.0
    ) -> LifecycleResult:
        return self._ask(domain, "poweroff", wait, acpi_fallback, deadline)

    def reboot(
        self, domain: str, *, wait: bool = False, acpi_fallback: bool = False, deadline: float = 600.0
    ) -> LifecycleResult:
        return self._ask(domain, "reboot", wait, acpi_fallback, deadline)

    def _ask(
        self, domain: str, what: str, wait: bool, acpi_fallback: bool, deadline: float
    ) -> LifecycleResult:
        from xtool.toolstack.lifecycle import ask, wait_shutdown

        found = find(self.host, domain)
        ask(self.host, found, what, acpi_fallback=acpi_fallback)
        requested = LifecycleResult(found.state.domid, found.name, "requested")
        if not wait:
            return requested
        wait_shutdown(self.host, found, deadline)
        return self.settle(found.state.domid, uuid_text(found.state.handle)) or requested

    # --- devices ----------------------------------------------------------------------------------
    def block_list(self, domain: str) -> Disks:
        from xtool.toolstack.devices import disks

        return disks(self.host, find(self.host, domain))

    def block_attach(self, domain: str, disk: DiskConfig, *, deadline: float = 40.0) -> DeviceResult:
        from xtool.toolstack.devices import attach_disk

        return attach_disk(self.host, find(self.host, domain), disk, deadline)

    def block_detach(
        self, domain: str, disk: str, *, force: bool = False, deadline: float = 10.0
    ) -> DeviceResult:
        from xtool.toolstack.devices import detach

        return detach(self.host, find(self.host, domain), "vbd", disk, force=force, deadline=deadline)

    def block_limit(
        self,
        domain: str,
        disk: str,
        *,
        bytes_per_second: int | None = None,
        ops_per_second: int | None = None,
    ) -> DeviceResult:
        from xtool.toolstack.limits import limit_disk

        return limit_disk(self.host, find(self.host, domain), disk, bytes_per_second, ops_per_second)

    def block_serve(self, options: ServeOptions, ready: Callable[[ServedDisk], None]) -> None:
        from xtool.toolstack.blockserve import serve

        serve(self.host, options, ready)

    def network_list(self, domain: str) -> Networks:
        from xtool.toolstack.devices import networks

        return networks(self.host, find(self.host, domain))

    def network_attach(self, domain: str, vif: VifConfig, *, deadline: float = 40.0) -> DeviceResult:
        from xtool.toolstack.devices import attach_vif

        return attach_vif(self.host, find(self.host, domain), vif, deadline)

    def network_detach(
        self, domain: str, vif: str, *, force: bool = False, deadline: float = 10.0
    ) -> DeviceResult:
        from xtool.toolstack.devices import detach

        return detach(self.host, find(self.host, domain), "vif", vif, force=force, deadline=deadline)

    def network_limit(
        self, domain: str, vif: str, *, rate: str | None = None, rate_in: str | None = None
    ) -> DeviceResult:
        from xtool.toolstack.limits import limit_vif

        return limit_vif(self.host, find(self.host, domain), vif, rate, rate_in)

    def cd_insert(self, domain: str, drive: str, target: str) -> DeviceResult:
        from xtool.toolstack.media import change_medium

        return change_medium(self.host, find(self.host, domain), drive, target)

    def cd_eject(self, domain: str, drive: str) -> DeviceResult:
        from xtool.toolstack.media import change_medium

        return change_medium(self.host, find(self.host, domain), drive, None)

    def wiring(self, domain: str | None = None) -> Wirings:
        from xtool.toolstack.names import named_domains
        from xtool.toolstack.wiringview import wiring_of

        if domain is not None:
            return wiring_of(self.host, [find(self.host, domain)])
        return wiring_of(self.host, [d for d in named_domains(self.host) if d.state.domid])

    def settle(self, domid: int, uuid: str, progress: Progress = SILENT) -> LifecycleResult | None:
        from xtool.toolstack.lifecycle import settle

        return settle(self.host, domid, uuid, progress)


def open_client(uri: str = "xen:") -> Client:
    """A client for this machine's Xen (``xen:``), or for an empty host in memory (``fake:``)."""
    return LocalClient(open_host(uri))
