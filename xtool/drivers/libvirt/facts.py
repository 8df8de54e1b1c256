"""What the driver that was opened has: read from libvirt's capabilities once per command."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """``kind``: ``qemu``, ``xen`` or ``test``. ``accel``: ``kvm`` or ``tcg``, "" where it is not ours to
    choose. ``emulator``: QEMU's path, None for the driver's own choice. ``embedded``: no libvirtd, so none
    of its networks."""

    kind: str
    name: str
    accel: str = ""
    emulator: str | None = None
    embedded: bool = False

    @property
    def domain_type(self) -> str:
        """libvirt's ``<domain type=...>``."""
        return {"qemu": "kvm" if self.accel == "kvm" else "qemu"}.get(self.kind, self.kind)
