"""The machine below a fake host: domains, their event channels and grant tables, and real shared pages.

Event channels follow Xen's ``event_channel.c`` and Linux's ``evtchn.c``, grants Xen's ``grant_table.c``, as
far as two domains can see it. Pages live in one memory file, so what one side writes the other reads, through
different mappings, as on a real machine.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import RLock
from typing import TYPE_CHECKING

from xtool.abi.base import PAGE_SIZE
from xtool.abi.grant import (
    ENTRIES_PER_FRAME,
    GNTST_bad_domain,
    GNTST_bad_gntref,
    GNTST_general_error,
    GNTST_okay,
    GTF_permit_access,
    GTF_reading,
    GTF_readonly,
)
from xtool.abi.xen import DOMID_FIRST_RESERVED, DOMID_SELF, GrantEntryV1
from xtool.errors import EventChannelError, GrantError

if TYPE_CHECKING:
    from xtool.fake.events import FakeEventChannels
    from xtool.fake.grants import FakeAllocator, FakeGrants

#: Ports of a domain, as many as Xen's 2-level ABI has.
PORTS = 4096
#: Grant table frames a domain may have (Xen's default).
GRANT_FRAMES = 64
#: A guest's own grants start here: the first ones are reserved (console, xenstore, others).
FIRST_REF = 8
#: In a guest's grant table, pages of the memory file have numbers from here on: no other frame does.
SHARED_FRAMES = 0x4000_0000


@dataclass
class Channel:
    """One end. ``enabled`` is Linux's mask, ``owner`` the open device that has bound it."""

    state: str  # unbound, interdomain or virq
    remote_domid: int | None = None
    remote_port: int | None = None
    virq: int | None = None
    pending: bool = False
    enabled: bool = True
    owner: FakeEventChannels | None = None


@dataclass
class Grant:
    """``users`` counts mappings. An ``ended`` one goes with the last of them: nobody can force a peer."""

    domid: int
    frame: int
    readonly: bool
    valid: bool = True
    ended: bool = False
    users: int = 0


@dataclass
class Guest:
    ports: dict[int, Channel] = field(default_factory=dict)
    virqs: dict[int, int] = field(default_factory=dict)
    grants: dict[int, Grant] = field(default_factory=dict)
    grant_frames: int = 1


class FakeMachine:
    """Domain 0 is there from the start. One lock for everything: any thread may call."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.guests: dict[int, Guest] = {0: Guest()}
        #: Called with (domid, ref) ahead of each granted side of a copy: a test may revoke it there.
        self.before_copy: Callable[[int, int], None] = lambda domid, ref: None
        #: (domid, ref) -> the status Xen gives for it: for grants of kinds the fake does not have.
        self.refused: dict[tuple[int, int], int] = {}
        #: How many granted pages one domain may have mapped (Xen's maptrack).
        self.maptrack = 1 << 20
        self._file = -1
        self._frames = 0
        self._free: list[int] = []
        self._holders: dict[int, int] = {}  # frame -> grant, owner's view and mappings

    def add_domain(self, domid: int) -> None:
        with self.lock:
            self.guests[domid] = Guest()

    def remove_domain(self, domid: int) -> None:
        """The domain dies: its ports close, its grants become void, mapped pages stay until they are
        unmapped."""
        with self.lock:
            guest = self.guests.get(domid)
            if guest is None:
                return
            for port in list(guest.ports):
                self.close_port(domid, port)
            for grant in guest.grants.values():
                self.drop(grant.frame)
            del self.guests[domid]

    def events(self, domid: int) -> FakeEventChannels:
        """A newly opened /dev/xen/evtchn in that domain."""
        from xtool.fake.events import FakeEventChannels

        return FakeEventChannels(self, domid)

    def grants(self, domid: int) -> FakeGrants:
        """A newly opened /dev/xen/gntdev."""
        from xtool.fake.grants import FakeGrants

        return FakeGrants(self, domid)

    def allocator(self, domid: int) -> FakeAllocator:
        """A newly opened /dev/xen/gntalloc."""
        from xtool.fake.grants import FakeAllocator

        return FakeAllocator(self, domid)

    # --- event channels -------------------------------------------------------------------------------
    def _guest(self, operation: str, domid: int) -> Guest:
        guest = self.guests.get(domid)
        if guest is None:
            raise EventChannelError(operation, errno.ESRCH)
        return guest

    def _new_port(self, operation: str, guest: Guest, channel: Channel) -> int:
        for port in range(1, PORTS):
            if port not in guest.ports:
                guest.ports[port] = channel
                return port
        raise EventChannelError(operation, errno.ENOSPC)

    def alloc_unbound(self, domid: int, remote: int, owner: FakeEventChannels | None = None) -> int:
        with self.lock:
            operation = f"a new event channel for domain {remote}"
            guest = self._guest(operation, domid)
            remote = domid if remote == DOMID_SELF else remote
            return self._new_port(operation, guest, Channel("unbound", remote, owner=owner))

    def bind_interdomain(
        self, domid: int, remote: int, remote_port: int, owner: FakeEventChannels | None = None
    ) -> int:
        with self.lock:
            operation = f"binding to event channel {remote_port} of domain {remote}"
            guest = self._guest(operation, domid)
            remote = domid if remote == DOMID_SELF else remote
            other = self._guest(operation, remote).ports.get(remote_port)
            if other is None or other.state != "unbound" or other.remote_domid != domid:
                raise EventChannelError(operation, errno.EINVAL)
            channel = Channel("interdomain", remote, remote_port, owner=owner)
            port = self._new_port(operation, guest, channel)
            other.state, other.remote_port = "interdomain", port
            self._raise(port, channel)
            return port

    def bind_virq(self, domid: int, virq: int, owner: FakeEventChannels | None = None) -> int:
        with self.lock:
            operation = f"binding VIRQ {virq}"
            guest = self._guest(operation, domid)
            if not 0 <= virq < 24:
                raise EventChannelError(operation, errno.EINVAL)
            if virq in guest.virqs:
                raise EventChannelError(operation, errno.EEXIST)
            port = self._new_port(operation, guest, Channel("virq", virq=virq, owner=owner))
            guest.virqs[virq] = port
            return port

    def close_port(self, domid: int, port: int) -> None:
        with self.lock:
            guest = self.guests.get(domid)
            channel = guest.ports.pop(port, None) if guest else None
            if guest is None or channel is None:
                return
            if channel.virq is not None:
                del guest.virqs[channel.virq]
            if channel.state == "interdomain":
                assert channel.remote_domid is not None and channel.remote_port is not None
                other = self.guests[channel.remote_domid].ports[channel.remote_port]
                other.state, other.remote_domid, other.remote_port = "unbound", domid, None

    def send(self, domid: int, port: int) -> None:
        """Without another end nothing happens, as with Xen."""
        with self.lock:
            channel = self.guests[domid].ports[port]
            if channel.state == "interdomain":
                assert channel.remote_domid is not None and channel.remote_port is not None
                other = self.guests[channel.remote_domid].ports[channel.remote_port]
                self._raise(channel.remote_port, other)

    def raise_virq(self, domid: int, virq: int) -> None:
        with self.lock:
            guest = self.guests[domid]
            if virq in guest.virqs:
                self._raise(guest.virqs[virq], guest.ports[guest.virqs[virq]])

    def _raise(self, port: int, channel: Channel) -> None:
        channel.pending = True
        self.deliver(port, channel)

    def deliver(self, port: int, channel: Channel) -> None:
        """Hand a pending event to the device that has the port, unless it is masked."""
        if channel.pending and channel.enabled and channel.owner is not None:
            channel.pending = channel.enabled = False
            channel.owner.push(port)

    # --- pages ----------------------------------------------------------------------------------------
    @property
    def file(self) -> int:
        """The memory file's descriptor: frame N is at N * 4096."""
        if self._file < 0:
            self._file = os.memfd_create("xtool-fake-machine", os.MFD_CLOEXEC)
            weakref.finalize(self, os.close, self._file)
        return self._file

    def new_frame(self) -> int:
        """A page of zeroes with one holder."""
        with self.lock:
            if self._free:
                frame = self._free.pop()
                os.pwrite(self.file, bytes(PAGE_SIZE), frame * PAGE_SIZE)
            else:
                frame, self._frames = self._frames, self._frames + 1
                os.ftruncate(self.file, self._frames * PAGE_SIZE)
            self._holders[frame] = 1
            return frame

    def page(self, number: int) -> bytes:
        """What stands in a page now; ``number`` is the one in the grant table."""
        return os.pread(self.file, PAGE_SIZE, (number - SHARED_FRAMES) * PAGE_SIZE)

    def shared_frames(self, domid: int) -> set[int]:
        """The numbers of the pages a guest has granted."""
        with self.lock:
            return {SHARED_FRAMES + grant.frame for grant in self.guests[domid].grants.values()}

    def hold(self, frame: int) -> None:
        with self.lock:
            self._holders[frame] += 1

    def drop(self, frame: int) -> None:
        with self.lock:
            self._holders[frame] -= 1
            if not self._holders[frame]:
                del self._holders[frame]
                self._free.append(frame)

    @property
    def frames_used(self) -> int:
        """For tests: pages somebody still holds."""
        return len(self._holders)

    # --- grants ---------------------------------------------------------------------------------------
    def grant(
        self, domid: int, to: int, frame: int, *, readonly: bool = False, ref: int | None = None
    ) -> int:
        """Enter a page of ``domid`` into its table; the reference."""
        with self.lock:
            guest = self.guests[domid]
            if ref is None:
                ref = next(
                    n for n in range(FIRST_REF, len(guest.grants) + FIRST_REF + 1) if n not in guest.grants
                )
            if ref >= GRANT_FRAMES * ENTRIES_PER_FRAME[1]:
                raise GrantError("a new grant", errno.ENOSPC)
            guest.grant_frames = max(guest.grant_frames, ref // ENTRIES_PER_FRAME[1] + 1)
            guest.grants[ref] = Grant(to, frame, readonly)
            self.hold(frame)
            return ref

    def revoke(self, domid: int, ref: int) -> None:
        """The guest clears its entry, in use or not: new mappings and copies fail, what is mapped stays."""
        with self.lock:
            self.guests[domid].grants[ref].valid = False

    def end_grant(self, domid: int, ref: int) -> None:
        """Take the grant back; while the peer has it mapped it stays as it is."""
        with self.lock:
            guest = self.guests.get(domid)
            if guest is not None and ref in guest.grants:
                guest.grants[ref].ended = True
                self._collect(domid, ref, guest.grants[ref])

    def _collect(self, domid: int, ref: int, grant: Grant) -> None:
        guest = self.guests.get(domid)
        if guest and guest.grants.get(ref) is grant and grant.ended and not grant.users:
            del guest.grants[ref]
            self.drop(grant.frame)

    def check(self, user: int, domid: int, ref: int, writable: bool) -> tuple[int, Grant | None]:
        """Xen's status for ``user`` asking for a grant, and the grant if it is 0."""
        guest = self.guests.get(user if domid == DOMID_SELF else domid)
        if guest is None or domid > DOMID_FIRST_RESERVED:
            return GNTST_bad_domain, None
        if (domid, ref) in self.refused:
            return self.refused[domid, ref], None
        if not 0 <= ref < guest.grant_frames * ENTRIES_PER_FRAME[1]:
            return GNTST_bad_gntref, None
        grant = guest.grants.get(ref)
        if grant is None or not grant.valid or grant.domid != user or (writable and grant.readonly):
            return GNTST_general_error, None
        return GNTST_okay, grant

    def show_grants(self, domid: int, table: memoryview) -> None:
        """Write the domain's grants into its (version 1) table, as far as ``table`` goes."""
        size = GrantEntryV1.size()
        # The reserved ones below are the builder's; of ours, those that ended are gone.
        table[FIRST_REF * size :] = bytes(len(table) - FIRST_REF * size)
        with self.lock:
            for ref, grant in self.guests[domid].grants.items():
                if (ref + 1) * size <= len(table):
                    flags = GTF_permit_access if grant.valid else 0
                    flags |= GTF_readonly if grant.readonly else 0
                    flags |= GTF_reading if grant.users else 0
                    entry = GrantEntryV1(flags=flags, domid=grant.domid, frame=SHARED_FRAMES + grant.frame)
                    table[ref * size : (ref + 1) * size] = bytes(entry)

    def mapped(self, grant: Grant) -> None:
        """One mapping more."""
        with self.lock:
            grant.users += 1
            self.hold(grant.frame)

    def unmapped(self, domid: int, ref: int, grant: Grant) -> None:
        """One mapping less."""
        with self.lock:
            grant.users -= 1
            self._collect(domid, ref, grant)
            self.drop(grant.frame)
