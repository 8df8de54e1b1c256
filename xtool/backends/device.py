"""One device as the backend process keeps it, and what it does when either directory changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xtool.backends.frame import Backend, BackendContext, BackendType, printable, read_many, reason_of
from xtool.devices.xenbus import DeviceId
from xtool.errors import DeadlineError, StoreGoneError, XtoolError
from xtool.proto.xenbus import Action, BackendMachine, XenbusState, parse_state
from xtool.xenstore.paths import domain

if TYPE_CHECKING:
    from xtool.xenstore.port import Store, Transaction, Watch

log = logging.getLogger(__name__)

#: The least time between two looks at what a frontend writes into its state, seconds.
LOOK_GAP = 0.01
#: A frontend that connects again sooner than this is made to wait: longer each time, up to the second number.
FLAP_TIME, FLAP_FIRST, FLAP_MOST = 10.0, 0.02, 2.0
_RINGS_IN_USE = (XenbusState.INITIALISED, XenbusState.CONNECTED, XenbusState.CLOSING)
#: xenstored is away or stuck: no fault of the device, so it is tried again.
STORE_AWAY = (StoreGoneError, DeadlineError)


def remembers(store: Store) -> bool:
    """False if xenstored was started anew and has lost everything: then a missing node means nothing, and
    guests are served on. The folder of backends stays when the last device goes."""
    return store.exists(f"{domain(0)}/backend")


class Device:
    """Made for a directory that was found; ``start`` looks at it. Methods raise ``STORE_AWAY`` alone."""

    def __init__(self, context: BackendContext, make: BackendType, device: DeviceId) -> None:
        self.context = context
        self.id = device
        self.gone = False
        self.own_changed = self.frontend_changed = False
        self.pending_error: Exception | None = None
        self.reason = ""
        self._make = make
        self._nodes: dict[str, str] = {}
        self._ours: set[str] = {"state", "online"}
        self._backend: Backend | None = None
        self._machine = BackendMachine()
        self._frontend = ""
        self._watch: Watch | None = None
        self._told = ""  # the state we wrote last
        self._untold: tuple[XenbusState, Mapping[str, str]] | None = None
        self._look_at = self._connected_at = -FLAP_TIME
        self._penalty = 0.0

    @property
    def state(self) -> XenbusState:
        return self._machine.state

    # --- what the server calls
    def start(self) -> None:
        """Look at the directory, and begin or take over."""
        nodes = self._nodes = read_many(self.context.store, self.id.backend)
        frontend = nodes.get("frontend")
        if frontend is None or nodes.get("frontend-id") != str(self.id.domid):
            self.gone = True
            return
        self._frontend = frontend
        self._watch = self.context.store.watch(f"{frontend}/state")
        self._machine.set_online(nodes.get("online"))
        self._told = nodes.get("state", "")
        state = parse_state(nodes.get("state"))
        text = self.context.store.get(f"{frontend}/state")
        if state is XenbusState.CLOSED and not self._machine.online:
            self._machine.state, self._machine.removed = state, True
        elif state is XenbusState.CLOSED:
            self._machine.state = state
            self._carry_out(self._machine.frontend_changed(text))
        elif state in (XenbusState.CONNECTED, XenbusState.CLOSING):
            self._take_over(state, text)
        else:
            self._begin(text)
        self.own_changed = True

    def _begin(self, text: str | None) -> None:
        if self._open():
            self._machine.frontend_changed(text)  # only remembered
            self._carry_out(self._machine.start())

    def _take_over(self, state: XenbusState, text: str | None) -> None:
        if not self._open():
            return
        self._machine.resume()
        if parse_state(text) in _RINGS_IN_USE:
            try:
                self.backend.resume(self._frontend_nodes())
            except STORE_AWAY:
                raise
            except Exception as error:
                self.fail(error)
                return
        self._machine.state = state
        self._carry_out(self._machine.frontend_changed(text))

    def due_in(self, now: float) -> float | None:
        """Seconds until there is something to do: 0 now, None nothing."""
        if self._watch is not None and self._watch.has_pending():
            self._watch.pending()
            self.frontend_changed = True
        if self.own_changed or self.pending_error is not None or self._untold is not None:
            return 0.0
        return max(0.0, self._look_at - now) if self.frontend_changed else None

    def work(self, now: float) -> None:
        """Do what is due."""
        if self._untold is not None:
            self._tell()
        error, self.pending_error = self.pending_error, None
        if error is not None:
            self.fail(error)
        if self.own_changed:
            self.own_changed = False
            try:
                self._look_at_own()
            except STORE_AWAY:
                self.own_changed = True
                raise
        if self.frontend_changed and self._look_at <= now and not self.gone:
            self.frontend_changed = False
            self._look_at = now + LOOK_GAP
            try:
                text = self.context.store.get(f"{self._frontend}/state")
            except STORE_AWAY:
                self.frontend_changed = True
                raise
            if text is not None or remembers(self.context.store):
                self._carry_out(self._machine.frontend_changed(text))

    def _look_at_own(self) -> None:
        nodes = read_many(self.context.store, self.id.backend)
        if "frontend" not in nodes:
            self.gone = remembers(self.context.store)
            return
        before, self._nodes = self._nodes, nodes
        state = nodes.get("state", "")
        if state == "1" and self._told not in ("", "1"):
            self.gone = True  # removed and made again since we looked: the server finds the new one
            return
        self._carry_out(self._machine.set_online(nodes.get("online")))
        if state == "5" and self._told != "5":
            self._told = state
            self._carry_out(self._machine.close())
        elif self._config(nodes) != self._config(before) and self._backend is not None:
            self._safely(lambda backend: backend.reconfigure(nodes))

    def _config(self, nodes: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in nodes.items() if name not in self._ours}

    def publish(self, nodes: Mapping[str, str]) -> None:
        """Write nodes and our state again, in the next ``work``."""
        state, more = self._untold or (self._machine.state, {})
        self._untold = (state, {**more, **nodes})
        self._ours |= set(nodes)

    def let_go(self, *, successor: bool) -> None:
        """We are leaving, or the device's directory is gone. Never raises."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        backend, self._backend = self._backend, None
        if backend is None:
            return
        for step in (backend.suspend if successor else backend.disconnect, backend.close):
            try:
                step()
            except Exception:
                log.exception("%s: letting go failed", self.id)

    # --- carrying out
    @property
    def backend(self) -> Backend:
        assert self._backend is not None
        return self._backend

    def _open(self) -> bool:
        if self._backend is not None:
            return True
        try:
            self._backend = self._make(self.context, self.id, self._nodes)
        except Exception as error:
            self.fail(error)
            return False
        machine = BackendMachine(connect_on=self._backend.connect_on, online=self._machine.online)
        machine.state, machine.other = self._machine.state, self._machine.other
        self._machine = machine
        return True

    def _safely(self, step: Any) -> None:
        try:
            step(self.backend)
        except STORE_AWAY:
            raise
        except Exception as error:
            self.fail(error)

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            try:
                self._one(action)
            except STORE_AWAY:
                raise
            except Exception as error:
                self.fail(error)
                return

    def _one(self, action: Action) -> None:
        if action is Action.OFFER:
            if self._open():
                self._tell(XenbusState.INIT_WAIT, self.backend.offer())
        elif action is Action.CONNECT:
            self._slow_down()
            nodes = self.backend.connect(self._frontend_nodes())
            self.reason = ""
            self._tell(XenbusState.CONNECTED, nodes)
        elif action is Action.DISCONNECT:
            if self._backend is not None:
                self._backend.disconnect()
        elif action is Action.CLOSE:
            self._tell(XenbusState.CLOSING)
        elif action is Action.CLOSE_DONE:
            self._tell(XenbusState.CLOSED)
        elif action is Action.REMOVE and self._backend is not None:
            backend, self._backend = self._backend, None
            backend.close()

    def _frontend_nodes(self) -> dict[str, str]:
        return read_many(self.context.store, self._frontend, below="queue-")

    def _slow_down(self) -> None:
        now = self.context.loop.clock()
        if now - self._connected_at < FLAP_TIME:
            self._penalty = min(FLAP_MOST, max(FLAP_FIRST, 2 * self._penalty))
        else:
            self._penalty = 0.0
        self._connected_at = now
        self._look_at = now + max(LOOK_GAP, self._penalty)

    def fail(self, error: Exception) -> None:
        """Close the device because of ``error``, and say so."""
        reason = printable(reason_of(error))
        self.reason = reason
        if self._backend is not None:
            self._backend.complain(f"closed: {reason}")
        else:
            log.error("%s: cannot be served: %s", self.id, reason)
        if not isinstance(error, XtoolError):
            log.error("%s: not foreseen", self.id, exc_info=error)
        actions = self._machine.failed()
        try:
            self.context.store.write(f"{self.id.error}/error", reason)
            for action in actions:
                self._one(action)
        except STORE_AWAY:
            raise
        except Exception:
            log.exception("%s: closing it failed as well", self.id)

    def _tell(self, state: XenbusState | None = None, nodes: Mapping[str, str] | None = None) -> None:
        """Write nodes and state; what could not be written stays in ``_untold`` for the next time."""
        if state is not None:
            self._untold = (state, nodes or {})
            self._ours |= set(nodes or ())
        if self._untold is None:
            return
        wanted, values = self._untold
        there = f"{self.id.backend}/frontend"

        def change(tx: Transaction) -> bool:
            if not tx.exists(there):  # removed: writing would bring a part of it back
                return False
            for name, value in values.items():
                tx.write(f"{self.id.backend}/{name}", value)
            tx.write(f"{self.id.backend}/state", str(int(wanted)))
            return True

        self._told = str(int(wanted))
        if not self.context.store.atomically(change, deadline=5.0):
            self.gone = True
        self._untold = None

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "folder": self.id.folder,
            "kind": self.id.kind,
            "domid": self.id.domid,
            "devid": self.id.devid,
            "state": self._machine.state.name.lower().replace("_", "-"),
            "reason": self.reason,
        }
        if self._backend is not None:
            found["complaints"] = self._backend.complain.count
            found["last_complaint"] = self._backend.complain.last
            try:
                found |= self._backend.describe()
            except Exception as error:
                found["error"] = printable(reason_of(error))
        return found
