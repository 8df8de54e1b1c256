"""The everyday verbs: their part of ``api.Client``, and ``local.LocalClient``'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from xtool.toolstack.everydayrecords import (
    AssignablePciInfo,
    ChannelInfo,
    DisplayInfo,
    DomainConfigInfo,
    HostSample,
    Leftover,
    PciInfo,
    SettingResult,
    UptimeInfo,
)

if TYPE_CHECKING:
    from xtool.toolstack.api import LifecycleResult
    from xtool.toolstack.host import Host


class Everyday(Protocol):
    """Verbs as in ``api.Client``."""

    def rename(self, domain: str, name: str) -> LifecycleResult:
        """Another name for a running domain. Raises ``DomainExistsError`` when it is taken."""

    def uptime(self, domains: Sequence[str] = ()) -> list[UptimeInfo]:
        """How long domains have run; none named: all of them."""

    def config(self, domain: str | None = None, *, secrets: bool = False) -> list[DomainConfigInfo]:
        """What a domain, or each, was created with and what was changed since."""

    def set_config(self, domain: str, settings: Sequence[str], *, base_dir: str = "/") -> SettingResult:
        """``key=value`` words: changed now where that can be, else kept for the next start. Relative
        paths are relative to ``base_dir``.

        Raises ``ConfigError`` for a value that is wrong, ``UsageError`` for a key that cannot be changed;
        then nothing was changed."""

    def channel_list(self, domain: str) -> list[ChannelInfo]: ...

    def display(self, domain: str, *, password: bool = False) -> DisplayInfo:
        """Where its VNC display is. Raises ``DeviceError`` when it has none."""

    def pci_list(self, domain: str) -> list[PciInfo]: ...

    def pci_assignable_list(self) -> list[AssignablePciInfo]: ...

    def sample(self) -> HostSample:
        """What every domain uses at this moment."""

    def metrics(self) -> str:
        """The same as Prometheus text."""

    def leftovers(self) -> list[Leftover]:
        """What crashed toolstacks left behind. Changes nothing."""

    def remove_leftovers(self) -> list[Leftover]:
        """Remove what is certain to be dead of it, and have all domains of ours looked after; all that was
        found, with what became of it."""


class LocalEveryday:
    """``Everyday`` on a ``Host``."""

    host: Host

    def rename(self, domain: str, name: str) -> LifecycleResult:
        from xtool.toolstack.names import find
        from xtool.toolstack.rename import rename

        return rename(self.host, find(self.host, domain), name)

    def uptime(self, domains: Sequence[str] = ()) -> list[UptimeInfo]:
        from xtool.toolstack.facts import uptimes

        return uptimes(self.host, domains)

    def config(self, domain: str | None = None, *, secrets: bool = False) -> list[DomainConfigInfo]:
        from xtool.toolstack.facts import configs

        return configs(self.host, domain, secrets=secrets)

    def set_config(self, domain: str, settings: Sequence[str], *, base_dir: str = "/") -> SettingResult:
        from xtool.toolstack.names import find
        from xtool.toolstack.settings import change_settings

        return change_settings(self.host, find(self.host, domain), settings, base_dir)

    def channel_list(self, domain: str) -> list[ChannelInfo]:
        from xtool.toolstack.facts import channels
        from xtool.toolstack.names import find

        return channels(self.host, find(self.host, domain))

    def display(self, domain: str, *, password: bool = False) -> DisplayInfo:
        from xtool.toolstack.facts import display
        from xtool.toolstack.names import find

        return display(self.host, find(self.host, domain), password=password)

    def pci_list(self, domain: str) -> list[PciInfo]:
        from xtool.toolstack.names import find
        from xtool.toolstack.pci import of_domain

        return of_domain(self.host, find(self.host, domain))

    def pci_assignable_list(self) -> list[AssignablePciInfo]:
        from xtool.toolstack.pci import assignable

        return assignable(self.host)

    def sample(self) -> HostSample:
        from xtool.toolstack.samples import take

        return take(self.host)

    def metrics(self) -> str:
        from xtool.toolstack.metrics import render

        return render(self.host)

    def leftovers(self) -> list[Leftover]:
        from xtool.toolstack.leftovers import find_leftovers

        return find_leftovers(self.host)

    def remove_leftovers(self) -> list[Leftover]:
        from xtool.toolstack.keeper import ensure_all
        from xtool.toolstack.leftovers import remove_leftovers

        done = remove_leftovers(self.host)
        ensure_all(self.host)
        return done
