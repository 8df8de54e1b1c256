"""An in-memory xenstored: the wire protocol's other half, for fast tests and dry runs.

The real client runs against it unchanged, over a transport that is a pair of byte queues::

    daemon = FakeStoreDaemon()
    store = StoreClient(daemon.connect)                # the control domain
    guest = StoreClient(lambda: daemon.connect(5))     # domain 5: permissions are enforced

Semantics follow the C ``xenstored`` of Xen 4.17, and ``tests/contract`` holds both to the same tests:
permissions are inherited from the parent; a transaction conflicts when any node it read or changed was
changed by somebody else (a new child changes its parent); removing a tree fires the watches on its nodes.
There are no quotas, and no depth argument for watches.

``introduced`` holds what INTRODUCE said: domid -> (gfn, port). A fake hypervisor calls ``domain_gone``.
``crash`` and ``hung`` are for fault tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from xtool.errors import LocalProtocolError, RemoteProtocolError
from xtool.fake.store_link import FakeLink
from xtool.proto.xenstore import (
    PAYLOAD_MAX,
    Op,
    Packet,
    check_path,
    check_perm,
    encode,
    strings,
)
from xtool.proto.xsperms import Perms, may_read, may_write


class Refusal(Exception):
    """The daemon's way to say no: an errno name."""


class Node(NamedTuple):
    value: bytes
    perms: Perms
    children: tuple[str, ...]
    generation: int


class View:
    """The tree as one transaction (or nobody) sees it: changes on top, and what was looked at below."""

    def __init__(self, tree: dict[str, Node]) -> None:
        self.tree = tree
        self.changes: dict[str, Node | None] = {}
        self.seen: dict[str, int] = {}
        self.fired: list[tuple[str, bool]] = []

    def get(self, path: str) -> Node | None:
        if path in self.changes:
            return self.changes[path]
        node = self.tree.get(path)
        self.seen.setdefault(path, node.generation if node else 0)
        return node

    def conflicts(self) -> bool:
        return any((self.tree[p].generation if p in self.tree else 0) != g for p, g in self.seen.items())


class FakeStoreDaemon:
    """``directory_part`` false plays a daemon without that request (and with E2BIG, as over a ring)."""

    def __init__(self, *, directory_part: bool = True) -> None:
        self.tree: dict[str, Node] = {"/": Node(b"", ("n0",), (), 1)}
        self.introduced: dict[int, tuple[int, int]] = {}
        #: While true, requests are taken and not answered.
        self.hung = False
        self.links: list[FakeLink] = []
        #: How many requests were handled, by name: tests count round trips and operations.
        self.counts: dict[str, int] = {}
        self._directory_part = directory_part
        self._generation = 1
        self._last_tx = 0
        self.listeners: list[Callable[[str], None]] = []  # told of each changed path, once it has changed
        for path in ("/tool", "/local/domain/0", "/vm", "/libxl"):
            self._write(View(self.tree), path, b"", 0, commit=True)

    # --- for tests and fakes

    def connect(self, domid: int = 0) -> FakeLink:
        """A new connection's client end."""
        link = FakeLink(self, domid)
        self.links.append(link)
        return link

    def crash(self) -> None:
        """Drop every connection and forget everything, as a restarted daemon does."""
        for link in self.links:
            link.hang_up()
        self.links.clear()
        self.tree = {path: node for path, node in self.tree.items() if path == "/"}
        self.tree["/"] = self.tree["/"]._replace(children=())
        self.introduced.clear()

    def domain_gone(self, domid: int) -> None:
        """The hypervisor says this domain shut down or was destroyed."""
        self.introduced.pop(domid, None)
        self._fire("@releaseDomain", exact=False)

    def dump(self) -> dict[str, tuple[str, Perms]]:
        """path -> (value as text, permissions), sorted: for golden files."""
        return {p: (n.value.decode(errors="backslashreplace"), n.perms) for p, n in sorted(self.tree.items())}

    # --- requests

    def handle(self, link: FakeLink, packet: Packet) -> None:
        """Carry out one request; queues the reply, then the watch events it causes."""
        name = packet.op.name.lower()
        self.counts[name] = self.counts.get(name, 0) + 1
        events: Iterator[tuple[str, bool]] = iter(())
        try:
            handler = _HANDLERS.get(packet.op)
            if handler is None or (packet.op is Op.DIRECTORY_PART and not self._directory_part):
                raise Refusal("ENOSYS")
            view = link.transactions.get(packet.tx_id) if packet.tx_id else View(self.tree)
            if view is None:
                raise Refusal("ENOENT")
            reply = handler(self, link, view, packet)
            if len(reply) > PAYLOAD_MAX:
                raise Refusal("E2BIG")
            if not packet.tx_id:
                self._commit(view)
            if not packet.tx_id or packet.op is Op.TRANSACTION_END:
                events = iter(view.fired)
            link.push(encode(packet.op, packet.req_id, reply, packet.tx_id))
        except Refusal as refusal:
            link.push(encode(Op.ERROR, packet.req_id, strings(str(refusal)), packet.tx_id))
        except (LocalProtocolError, RemoteProtocolError, ValueError):
            link.push(encode(Op.ERROR, packet.req_id, strings("EINVAL"), packet.tx_id))
        for path, exact in events:
            self._fire(path, exact=exact)
        if packet.op is Op.WATCH and link.fresh_watch:
            watch, link.fresh_watch = link.fresh_watch, None
            link.push_event(watch[0], watch[1])

    def _path(self, link: FakeLink, text: str) -> str:
        return check_path(text if text.startswith("/") else f"/local/domain/{link.domid}/{text}")

    def _node(self, link: FakeLink, view: View, path: str, allowed: Callable[[Perms, int], bool]) -> Node:
        node = view.get(path)
        if node is None:
            raise Refusal("ENOENT" if may_read(self._nearest(view, path).perms, link.domid) else "EACCES")
        if not allowed(node.perms, link.domid):
            raise Refusal("EACCES")
        return node

    def _nearest(self, view: View, path: str) -> Node:
        """The deepest ancestor that exists."""
        while True:
            path = path.rpartition("/")[0] or "/"
            node = view.get(path)
            if node is not None:
                return node

    def _read(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        return self._node(link, view, self._path(link, _one(packet)), may_read).value

    def _directory(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        return strings(*self._node(link, view, self._path(link, _one(packet)), may_read).children)

    def _part(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        path, offset = _split(packet, 2)
        node = self._node(link, view, self._path(link, path), may_read)
        head, names = strings(str(node.generation)), strings(*node.children)
        room = PAYLOAD_MAX - len(head) - 1
        piece = names[int(offset) :]
        if len(piece) <= room:
            return head + piece + b"\0"
        return head + piece[: piece.rindex(b"\0", 0, room) + 1]

    def _get_perms(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        return strings(*self._node(link, view, self._path(link, _one(packet)), may_read).perms)

    def _write_request(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        name, found, value = packet.payload.partition(b"\0")
        if not found:
            raise Refusal("EINVAL")
        self._write(view, self._path(link, name.decode()), value, link.domid)
        return b"OK\0"

    def _mkdir(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        path = self._path(link, _one(packet))
        if view.get(path) is None:
            self._write(view, path, b"", link.domid)
        return b"OK\0"

    def _write(self, view: View, path: str, value: bytes, domid: int, *, commit: bool = False) -> None:
        node = view.get(path)
        if node is None:
            above = self._nearest(view, path)
            if not may_write(above.perms, domid):
                raise Refusal("EACCES")
            perms = above.perms if domid == 0 else (f"{above.perms[0][0]}{domid}", *above.perms[1:])
            missing = [path]
            while view.get(parent := missing[-1].rpartition("/")[0] or "/") is None:
                missing.append(parent)
            for new in reversed(missing):
                self._link(view, new)
                view.changes[new] = Node(b"", perms, (), 0)
            node = view.changes[path]
            assert node is not None
        elif not may_write(node.perms, domid):
            raise Refusal("EACCES")
        view.changes[path] = node._replace(value=value)
        view.fired.append((path, False))
        if commit:
            self._commit(view)

    def _link(self, view: View, path: str, *, remove: bool = False) -> None:
        """Add ``path`` to its parent's children, or take it out."""
        parent, _, leaf = path.rpartition("/")
        node = view.get(parent or "/")
        assert node is not None
        kept = tuple(name for name in node.children if name != leaf)
        view.changes[parent or "/"] = node._replace(children=kept if remove else (*kept, leaf))

    def _rm(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        path = self._path(link, _one(packet))
        node = view.get(path)
        if node is None:
            if view.get(path.rpartition("/")[0] or "/") is None:
                raise Refusal("ENOENT")
            return b"OK\0"
        if path == "/":
            raise Refusal("EINVAL")
        self._node(link, view, path, may_write)
        self._link(view, path, remove=True)
        view.fired.append((path, False))
        below = [path]
        while below:
            name = below.pop()
            gone = view.get(name)
            assert gone is not None
            below.extend(f"{name}/{child}" for child in gone.children)
            if name != path:
                view.fired.append((name, True))
            view.changes[name] = None
        return b"OK\0"

    def _set_perms(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        name, *perms = _split(packet, 2)
        if name.startswith("@"):
            if link.domid:
                raise Refusal("EACCES")
            return b"OK\0"
        path = self._path(link, name)
        node = self._node(link, view, path, may_write)
        if link.domid and (node.perms[0][1:] != str(link.domid) or perms[0][1:] != str(link.domid)):
            raise Refusal("EACCES" if node.perms[0][1:] != str(link.domid) else "EPERM")
        view.changes[path] = node._replace(perms=tuple(check_perm(perm) for perm in perms))
        view.fired.append((path, False))
        return b"OK\0"

    # --- transactions

    def _start(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        if packet.tx_id:
            raise Refusal("EBUSY")
        self._last_tx += 1
        link.transactions[self._last_tx] = View(self.tree)
        return strings(str(self._last_tx))

    def _end(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        if not packet.tx_id:
            raise Refusal("ENOENT")
        del link.transactions[packet.tx_id]
        if _one(packet) != "T":
            view.fired.clear()
            return b"OK\0"
        if view.conflicts():
            raise Refusal("EAGAIN")
        self._commit(view)
        return b"OK\0"

    def _commit(self, view: View) -> None:
        for path, node in view.changes.items():
            self._generation += 1
            if node is None:
                self.tree.pop(path, None)
            else:
                self.tree[path] = node._replace(generation=self._generation)
        view.changes = {}

    # --- watches

    def _watch(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        path, token = _split(packet, 2)[:2]
        watch = (check_path(path, special=True) if path.startswith("@") else path, token)
        self._path(link, path) if not path.startswith("@") else None
        if watch in link.watches:
            raise Refusal("EEXIST")
        link.watches.append(watch)
        link.fresh_watch = watch
        return b"OK\0"

    def _unwatch(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        path, token = _split(packet, 2)[:2]
        if (path, token) not in link.watches:
            raise Refusal("ENOENT")
        link.watches.remove((path, token))
        return b"OK\0"

    def _reset(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        link.watches.clear()
        link.transactions.clear()
        return b"OK\0"

    def _fire(self, path: str, *, exact: bool) -> None:
        for listener in self.listeners:
            listener(path)
        for link in list(self.links):
            if link.domid and path.startswith("@"):
                continue
            node = self.tree.get(path)
            if link.domid and node is not None and not may_read(node.perms, link.domid):
                continue
            base = f"/local/domain/{link.domid}/"
            for name, token in list(link.watches):
                absolute = name if name[:1] in "/@" else base + name
                below = (absolute == "/" and path[:1] == "/") or path.startswith(absolute + "/")
                if path == absolute or (below and not exact):
                    link.push_event(path if absolute == name else path.removeprefix(base), token)

    # --- domains

    def _introduce(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        domid, gfn, port = (int(text) for text in _split(packet, 3)[:3])
        if link.domid:
            raise Refusal("EACCES")
        if port <= 0 or domid <= 0:
            raise Refusal("EINVAL")
        new = domid not in self.introduced
        self.introduced[domid] = (gfn, port)
        if new:
            view.fired.append(("@introduceDomain", False))
        return b"OK\0"

    def _release(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        domid = int(_one(packet))
        if link.domid:
            raise Refusal("EACCES")
        if domid == 0:
            raise Refusal("EINVAL")
        if self.introduced.pop(domid, None) is None:
            raise Refusal("ENOENT")
        view.fired.append(("@releaseDomain", False))
        return b"OK\0"

    def _is_introduced(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        domid = int(_one(packet))
        return strings("T" if domid == 0 or domid in self.introduced else "F")

    def _domain_path(self, link: FakeLink, view: View, packet: Packet) -> bytes:
        return strings(f"/local/domain/{int(_one(packet))}")


def _split(packet: Packet, least: int) -> tuple[str, ...]:
    if not packet.payload.endswith(b"\0"):
        raise Refusal("EINVAL")
    parts = tuple(packet.payload[:-1].decode().split("\0"))
    if len(parts) < least:
        raise Refusal("EINVAL")
    return parts


def _one(packet: Packet) -> str:
    return _split(packet, 1)[0]


_Handler = Callable[[FakeStoreDaemon, FakeLink, View, Packet], bytes]
_HANDLERS: dict[Op, _Handler] = {
    Op.READ: FakeStoreDaemon._read,
    Op.DIRECTORY: FakeStoreDaemon._directory,
    Op.DIRECTORY_PART: FakeStoreDaemon._part,
    Op.GET_PERMS: FakeStoreDaemon._get_perms,
    Op.WRITE: FakeStoreDaemon._write_request,
    Op.MKDIR: FakeStoreDaemon._mkdir,
    Op.RM: FakeStoreDaemon._rm,
    Op.SET_PERMS: FakeStoreDaemon._set_perms,
    Op.TRANSACTION_START: FakeStoreDaemon._start,
    Op.TRANSACTION_END: FakeStoreDaemon._end,
    Op.WATCH: FakeStoreDaemon._watch,
    Op.UNWATCH: FakeStoreDaemon._unwatch,
    Op.RESET_WATCHES: FakeStoreDaemon._reset,
    Op.INTRODUCE: FakeStoreDaemon._introduce,
    Op.RELEASE: FakeStoreDaemon._release,
    Op.IS_DOMAIN_INTRODUCED: FakeStoreDaemon._is_introduced,
    Op.GET_DOMAIN_PATH: FakeStoreDaemon._domain_path,
}
