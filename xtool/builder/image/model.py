"""What a loaded kernel or ramdisk is. Nothing here reads a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xtool.builder.image.elf import Segment
from xtool.builder.image.notes import FEATURES, XenNotes, feature_names
from xtool.errors import ImageError

GuestKind = Literal["pv", "pvh"]

# A PV guest manages its own machine frames and runs below the hypervisor: it cannot have these.
_NOT_FOR_PV = sum(
    1 << FEATURES.index(f) for f in ("auto_translated_physmap", "supervisor_mode_kernel", "dom0")
)


def content_digest(data: memoryview) -> str:
    import hashlib

    return hashlib.blake2b(data, digest_size=32).hexdigest()


@dataclass(frozen=True)
class KernelImage:
    """A kernel, ready to be copied into a guest. ``data`` is the ELF file, a read-only mapping of the file
    itself or of its decompressed copy; ``segments`` and ``notes`` describe it.

    ``close`` (or leaving a ``with``) gives the mapping back; views taken from ``data`` must be gone then.
    """

    path: str
    #: ``elf`` or ``bzimage``: what the file on disk is.
    format: str
    #: ``none``, ``gzip``, ``bzip2``, ``lzma``, ``xz``, ``lzo``, ``lz4`` or ``zstd``.
    compression: str
    data: memoryview = field(repr=False)
    #: Whether the decompressed copy came from the cache.
    cached: bool
    #: 32 or 64 bits.
    machine: int
    #: The ELF header's entry point.
    entry: int
    segments: tuple[Segment, ...]
    notes: XenNotes
    source_digest: str | None = None

    @property
    def digest(self) -> str:
        """BLAKE2b of the file on disk, in hex. Computed on first use for an uncompressed kernel."""
        if self.source_digest is None:
            object.__setattr__(self, "source_digest", content_digest(self.data))
        assert self.source_digest is not None
        return self.source_digest

    # -- Guest-physical extent, in bytes.

    @property
    def phys_start(self) -> int:
        return min(s.paddr for s in self.segments)

    @property
    def phys_end(self) -> int:
        """The first byte after the last segment."""
        return max(s.paddr + s.memsz for s in self.segments)

    # -- PV: guest-physical addresses are offsets from ``paddr_offset``, mapped from ``virt_base`` on.

    @property
    def virt_base(self) -> int:
        return self.notes.virt_base or 0

    @property
    def paddr_offset(self) -> int:
        if self.notes.paddr_offset is not None:
            return self.notes.paddr_offset
        return self.virt_base if self.notes.origin == "legacy" else 0

    @property
    def virt_start(self) -> int:
        return self.to_virtual(self.phys_start)

    @property
    def virt_end(self) -> int:
        return self.to_virtual(self.phys_end)

    @property
    def pv_entry(self) -> int:
        """The virtual address a PV guest starts at."""
        return self.entry if self.notes.entry is None else self.notes.entry

    def to_virtual(self, paddr: int) -> int:
        """Where a PV guest sees what the ELF file puts at ``paddr``."""
        return paddr - self.paddr_offset + self.virt_base

    def to_pfn_address(self, paddr: int) -> int:
        """The pseudo-physical address of ``paddr`` in a PV guest: pfn 0 lies at ``virt_base``."""
        return paddr - self.paddr_offset

    # -- PVH

    @property
    def pvh_entry(self) -> int:
        """The guest-physical address a PVH guest starts at; ``require("pvh")`` first."""
        assert self.notes.phys32_entry is not None
        return self.notes.phys32_entry

    def require(self, kind: GuestKind) -> None:
        """Raise ``ImageError`` saying what is missing, unless this kernel can boot as ``kind``."""
        if kind == "pvh":
            self._require_pvh()
        else:
            self._require_pv()

    def _require_pvh(self) -> None:
        if self.notes.phys32_entry is None:
            raise ImageError(
                f"{self.path} has no Xen PVH entry note (XEN_ELFNOTE_PHYS32_ENTRY); "
                "the guest kernel needs CONFIG_PVH",
                hint=self._other_kind("pv"),
            )
        if self.phys_end > 1 << 32:
            raise ImageError(f"{self.path} wants to be loaded at {self.phys_end:#x}, above 4 GiB; PVH cannot")
        if not self.phys_start <= self.pvh_entry < self.phys_end:
            raise ImageError(
                f"{self.path}: the PVH entry point {self.pvh_entry:#x} lies outside of the kernel"
            )

    def _require_pv(self) -> None:
        notes = self.notes
        if notes.origin == "none":
            raise ImageError(
                f"{self.path} has no Xen notes (XEN_ELFNOTE_*); a PV guest kernel needs CONFIG_XEN_PV",
                hint="use a kernel built for Xen PV (Debian's linux-image-amd64 is), or type: hvm",
            )
        if not notes.loader.startswith("generic") and not notes.guest_os.startswith("linux"):
            raise ImageError(
                f"{self.path} has no Xen PV entry: its notes name loader {notes.loader!r} and guest system "
                f"{notes.guest_os!r}, expected loader 'generic' or system 'linux'",
                hint=self._other_kind("pvh"),
            )
        if not notes.xen_version.startswith("xen-3.0"):
            raise ImageError(
                f"{self.path} was built for {notes.xen_version or 'an unnamed version of Xen'!r}; "
                "PV kernels say 'xen-3.0'",
                hint=self._other_kind("pvh"),
            )
        if self.machine != 64:
            raise ImageError(
                f"{self.path} is a 32-bit kernel; PV guests must be 64-bit",
                hint="use a 64-bit kernel, or type: pvh",
            )
        if refused := notes.required_features & _NOT_FOR_PV:
            names = ", ".join(feature_names(refused))
            raise ImageError(f"{self.path} requires {names}, which a PV guest cannot have")
        if notes.paddr_offset is not None and notes.virt_base is None:
            raise ImageError(f"{self.path} has the note PADDR_OFFSET but not VIRT_BASE; it needs both")
        self._require_pv_addresses()

    def _require_pv_addresses(self) -> None:
        start, end = self.virt_start, self.virt_end
        if not self.virt_base <= start < end <= 1 << 64 or not start <= self.pv_entry < end:
            raise ImageError(
                f"{self.path}: its notes contradict its headers: virtual base {self.virt_base:#x}, "
                f"kernel {start:#x} to {end:#x}, entry {self.pv_entry:#x}"
            )
        p2m = self.notes.init_p2m
        if p2m is not None and start <= p2m < end:
            raise ImageError(f"{self.path}: the note INIT_P2M puts the p2m at {p2m:#x}, inside of the kernel")
        page = self.notes.hypercall_page
        if page is not None and (page % 4096 or not start <= page < end):
            raise ImageError(
                f"{self.path}: the note HYPERCALL_PAGE gives {page:#x}, not a page of the kernel"
            )

    def _other_kind(self, kind: GuestKind) -> str:
        able = self.notes.phys32_entry is not None if kind == "pvh" else self.notes.virt_base is not None
        if able:
            return f"this kernel can boot with type: {kind}"
        return "use another kernel (Debian's linux-image-amd64 has both PV and PVH), or type: hvm"

    def close(self) -> None:
        self.data.release()

    def __enter__(self) -> KernelImage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Ramdisk:
    """A ramdisk, as it is on disk: the guest unpacks it."""

    path: str
    data: memoryview = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data)

    def close(self) -> None:
        self.data.release()
