"""Core dumps of domains: memory and registers in an ELF file, as ``xl dump-core`` writes it.

Facts
-----
* The format is Xen's ``docs/misc/dump-core-format.txt``: no program headers, but sections for notes, vCPUs,
  the shared info page, the pages, and a table of their frame numbers in ascending order.
* Which pages are a guest's is asked of Xen, not of the guest: of a PV guest from the machine-to-physical
  table, so that one that died before it told anybody where its own table is can be dumped as well. Looking
  through that table takes some seconds for each 64 GiB of host memory.
* Looking at a page that was promised on demand makes Xen hand it out; one too many ends the guest.
* A mapped page keeps the domain from going away, not from giving the page back: of a live domain some pages
  may be gone before they are read. Those are left out, and the tables padded, as the format foresees.
* Needs a few MiB, and 8 bytes for each page of the guest (PV: 48 while the table is sorted).
"""

from __future__ import annotations

import os
import shutil
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from xtool.abi import coredump as c
from xtool.abi.base import PAGE_SIZE, page_up
from xtool.abi.pv import VcpuGuestContext
from xtool.abi.xen import SHUTDOWN_crash, SHUTDOWN_reboot
from xtool.errors import DomainError, DomainNotFoundError, HostError, HypercallError, UsageError
from xtool.hypercall.port import DomainState, Hypervisor
from xtool.progress import SILENT, Progress
from xtool.toolstack.host import Host
from xtool.toolstack.names import Named, uuid_text
from xtool.toolstack.tuningrecords import CoreDump

#: Pages at a time: 4 MiB.
_CHUNK = 1024
#: Machine frames asked about at a time: what one 2 MiB piece of Xen's table describes.
_FRAMES = 1 << 18
#: A PV guest writes its entries itself; beyond this (16 TiB) they are nonsense.
_MAX_PFN = 1 << 32


class _Frames(NamedTuple):
    """Pages in the order of ``numbers``, what the guest calls them; ``mapped`` is what Xen maps them by."""

    numbers: array[int]
    mapped: array[int]


class _Section(NamedTuple):
    name: bytes
    kind: int
    size: int
    align: int = 0
    entry: int = 0


def dump_and_act(
    host: Host,
    found: Named,
    path: Path,
    *,
    live: bool = False,
    crash: bool = False,
    reset: bool = False,
    progress: Progress = SILENT,
) -> CoreDump:
    """``dump_core``, and then make the domain crash, or start it again. Raises the same."""
    domid = found.state.domid
    if domid == 0:
        raise UsageError("domain 0 cannot be dumped from within", hint="its own kernel does that: kdump")
    if crash and reset:
        raise UsageError("crash or reset: one of the two")
    progress.step(f"dumping {found.name} ({found.state.pages >> 8} MiB) to {path}")
    dump = dump_core(host, domid, path, live=live)
    action = "unchanged"
    if crash or reset:
        host.hv.shutdown_domain(domid, SHUTDOWN_crash if crash else SHUTDOWN_reboot)
        action = "crashed" if crash else "reset"
        from xtool.toolstack.lifecycle import settle

        settle(host, domid, uuid_text(found.state.handle), progress)
    return CoreDump(**{**vars(dump), "name": found.name, "action": action})


def dump_core(host: Host, domid: int, path: Path, *, live: bool = False) -> CoreDump:
    """Write a core file of a domain, which is paused for as long as it takes, unless ``live``.

    The file is there as a whole or not at all, and only root may read it. Raises ``DomainNotFoundError``,
    ``DomainError`` for a guest that looking at would end, ``HostError`` where the file cannot be written.
    """
    hv = host.hv
    state = hv.domain(domid)
    if state is None or state.dying:
        raise DomainNotFoundError(f"there is no domain {domid}", hint="xtool list shows those there are")
    path = Path(path)
    with ExitStack() as stack:
        if not live:
            hv.pause_domain(domid)
            stack.callback(_unpause, hv, domid)
            state = hv.domain(domid) or state
        _check_promised(hv, state)
        frames = _translated(hv, domid) if state.hvm else _paravirtual(hv, state)
        file = stack.enter_context(_whole_file(path, (len(frames.numbers) + 16) * PAGE_SIZE))
        dump = _Dump(hv, state, frames)
        dump.write(file)
        size = file.tell()
    return CoreDump(domid, "", str(path), size, len(frames.numbers), len(dump.contexts), dump.missing)


def _unpause(hv: Hypervisor, domid: int) -> None:
    try:
        hv.unpause_domain(domid)
    except HypercallError:
        if (state := hv.domain(domid)) is not None and not state.dying:
            raise


def _check_promised(hv: Hypervisor, state: DomainState) -> None:
    if not state.hvm or state.shutdown:
        return
    cache, entries = hv.pod_state(state.domid)
    if entries > cache:
        raise DomainError(
            f"domain {state.domid} was promised {entries >> 8} MiB on demand, and {cache >> 8} MiB are "
            "there: reading the rest would end it",
            hint="let its balloon driver settle first, or dump it when it has shut down",
        )


@contextmanager
def _whole_file(path: Path, size: int) -> Iterator[BinaryIO]:
    """A new file that gets its name when all is written, and is gone otherwise."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise HostError(
                f"{path.parent} has {free >> 20} MiB free, and the core file takes {size >> 20}",
                hint="write it elsewhere",
            )
        file = os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}", hint="write it elsewhere") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise HostError(f"cannot write {path}: {error.strerror}", hint="write it elsewhere") from error
        raise


# --- which pages --------------------------------------------------------------------------------------
def _translated(hv: Hypervisor, domid: int) -> _Frames:
    """Of a PVH or HVM guest."""
    found = array("Q")
    last = hv.max_gpfn(domid)
    for first in range(0, last + 1, _FRAMES):
        gfns = range(first, min(first + _FRAMES, last + 1))
        found.extend(gfn for gfn, there in zip(gfns, hv.present(domid, gfns), strict=True) if there)
    return _Frames(found, found)


def _claimed(hv: Hypervisor, state: DomainState, numbers: range) -> array[int]:
    """Its frames that have such a number: that << 32 | machine frame, to be sorted as one."""
    found = array("Q")
    end = hv.ram_end()
    for first in range(0, end, _FRAMES):
        if len(found) >= state.pages:
            break
        entries = hv.machine_to_phys(first, min(_FRAMES, end - first))
        mfns = array("Q", (first + index for index, pfn in enumerate(entries) if pfn in numbers))
        own = hv.present(state.domid, mfns)
        found.extend(entries[mfn - first] << 32 | mfn for mfn, there in zip(mfns, own, strict=True) if there)
    return found


def _paravirtual(hv: Hypervisor, state: DomainState) -> _Frames:
    """Of a PV guest, whose frames are machine frames."""
    # Asking Xen about others' frames makes it log each at its most talkative: first those that the guest's
    # size lets expect, which is nearly always all of them.
    found = _claimed(hv, state, range(state.max_pages))
    if len(found) < state.pages:
        found += _claimed(hv, state, range(state.max_pages, _MAX_PFN))
    numbers, mapped = array("Q"), array("Q")
    for pair in sorted(found):
        if not numbers or numbers[-1] != pair >> 32:  # the guest may claim one twice
            numbers.append(pair >> 32)
            mapped.append(pair & 0xFFFF_FFFF)
    return _Frames(numbers, mapped)


# --- the file -----------------------------------------------------------------------------------------
class _Dump:
    def __init__(self, hv: Hypervisor, state: DomainState, frames: _Frames) -> None:
        self._hv, self._state, self._frames = hv, state, frames
        seen = (hv.vcpu_context(state.domid, vcpu) for vcpu in range(state.max_vcpu_id + 1))
        self.contexts = [context for context in seen if context is not None]
        self._shared = self._shared_info()
        self.missing = 0

    def _shared_info(self) -> bytes | None:
        """None where it is not in the guest's memory."""
        try:
            frame = self._state.shared_info_frame
            with self._hv.map_foreign(self._state.domid, [frame], writable=False) as page:
                return bytes(page.view)
        except HypercallError:
            return None

    def write(self, file: BinaryIO) -> None:
        notes = self._notes()
        entry = 8 if self._state.hvm else 16
        size = VcpuGuestContext.size()
        sections = [
            _Section(b".note.Xen", c.SHT_NOTE, len(notes)),
            _Section(b".xen_prstatus", c.SHT_PROGBITS, size * len(self.contexts), 8, size),
        ]
        if self._shared is not None:
            sections.append(_Section(b".xen_shared_info", c.SHT_PROGBITS, PAGE_SIZE, 8, PAGE_SIZE))
        count = len(self._frames.numbers)
        table = b".xen_pfn" if self._state.hvm else b".xen_p2m"
        sections.append(_Section(b".xen_pages", c.SHT_PROGBITS, count * PAGE_SIZE, PAGE_SIZE, PAGE_SIZE))
        sections.append(_Section(table, c.SHT_PROGBITS, count * entry, 8, entry))
        head, names = headers(sections)
        file.write(head)
        for piece in (notes, *self.contexts, self._shared or b""):
            file.write(piece)
        file.write(bytes(page_up(file.tell()) - file.tell()))
        file.write(self._pages(file).tobytes())
        file.write(names)

    def _notes(self) -> bytes:
        magic = c.MAGIC_HVM if self._state.hvm else c.MAGIC_PV
        version = self._hv.xen_version()
        return b"".join(
            (
                note(c.XEN_ELFNOTE_DUMPCORE_NONE, b""),
                note(
                    c.XEN_ELFNOTE_DUMPCORE_HEADER,
                    c.CORE_HEADER.pack(magic, len(self.contexts), len(self._frames.numbers), PAGE_SIZE),
                ),
                note(c.XEN_ELFNOTE_DUMPCORE_XEN_VERSION, c.XEN_VERSION.pack(*version)),
                note(c.XEN_ELFNOTE_DUMPCORE_FORMAT_VERSION, c.FORMAT_VERSION.to_bytes(8, "little")),
            )
        )

    def _pages(self, file: BinaryIO) -> array[int]:
        """Write the pages; the table of their frame numbers, padded to as many as there should be."""
        numbers, mapped = array("Q"), array("Q")
        for at in range(0, len(self._frames.numbers), _CHUNK):
            some = slice(at, at + _CHUNK)
            part = _Frames(self._frames.numbers[some], self._frames.mapped[some])
            if not self._copy(file, part.mapped):
                kept = [i for i, frame in enumerate(part.mapped) if self._copy(file, array("Q", [frame]))]
                part = _Frames(*(array("Q", (every[i] for i in kept)) for every in part))
            numbers += part.numbers
            mapped += part.mapped
        self.missing = len(self._frames.numbers) - len(numbers)
        for _ in range(self.missing):
            file.write(bytes(PAGE_SIZE))
            numbers.append(c.INVALID_PFN)
            mapped.append(c.INVALID_PFN)
        if self._state.hvm:
            return numbers
        both = array("Q", bytes(16 * len(numbers)))
        both[::2], both[1::2] = numbers, mapped
        return both

    def _copy(self, file: BinaryIO, frames: array[int]) -> bool:
        """False, and nothing written, if one of them is gone."""
        try:
            pages = self._hv.map_foreign(self._state.domid, frames, writable=False)
        except HypercallError:
            return False
        with pages:
            file.write(pages.view)
        return True


def note(kind: int, description: bytes) -> bytes:
    return c.NOTE.pack(4, len(description), kind, b"Xen\0") + description


def headers(sections: list[_Section]) -> tuple[bytes, bytes]:
    """The ELF header and the section headers; and the names, which come last in the file.

    The sections follow in their order, the pages (and what is after them) from a whole page on.
    """
    names = b"\0.shstrtab\0"
    placed = []
    offset = c.ELF_HEADER.size + (len(sections) + 2) * c.SECTION_HEADER.size
    for section in sections:
        if section.align == PAGE_SIZE:
            offset = page_up(offset)
        placed.append(
            c.SECTION_HEADER.pack(
                len(names), section.kind, 0, 0, offset, section.size, 0, 0, section.align, section.entry
            )
        )
        names += section.name + b"\0"
        offset += section.size
    strings = c.SECTION_HEADER.pack(1, c.SHT_STRTAB, 0, 0, offset, len(names), 0, 0, 0, 0)
    elf = c.ELF_HEADER.pack(
        c.IDENT, c.ET_CORE, c.EM_X86_64, 1, 0, 0, c.ELF_HEADER.size, 0, c.ELF_HEADER.size,
        c.PROGRAM_HEADER_SIZE, 0, c.SECTION_HEADER.size, len(sections) + 2, 1,
    )  # fmt: skip
    return b"".join((elf, bytes(c.SECTION_HEADER.size), strings, *placed)), names
