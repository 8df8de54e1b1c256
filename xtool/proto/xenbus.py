"""The states both ends of a split driver go through (``public/io/xenbus.h``), as literal tables.

``BackendMachine`` and ``FrontendMachine`` take what the other end wrote into its ``state`` node and return
what to do, in order. They do nothing themselves and accept anything, at any time: text that is no state is
not looked at, a state that does not fit is ignored.

::

    machine = BackendMachine()
    for action in machine.start(): ...                      # OFFER: write features, state InitWait
    for action in machine.frontend_changed("3"): ...        # CONNECT: map the rings, state Connected
    for action in machine.failed(): ...                     # DISCONNECT, CLOSE: whatever went wrong

An action ends with writing the state it names. DISCONNECT comes once for every CONNECT, and only then.

Facts about the peers
---------------------
* blkfront goes 1, 3, 4; netfront goes from 1 to 4 at once, its backend's rings are ready by then.
* A state node that is gone means the peer is gone. An unreadable one means a guest that plays.
* States are read when a watch fires, so some in between are never seen.
* Whether a closed backend waits for its frontend to come back is said by ``online`` in its own directory,
  which the toolstack sets to 0 before it removes the device.
"""

from __future__ import annotations

from enum import Enum, IntEnum


class XenbusState(IntEnum):
    """``enum xenbus_state``."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8

    @property
    def word(self) -> str:
        """As people are told: ``init-wait``."""
        return self.name.lower().replace("_", "-")


_STATES = {str(int(state)): state for state in XenbusState}


def parse_state(text: str | None) -> XenbusState | None:
    """The state in a node's text. A missing node is ``UNKNOWN``; text that is no state is None."""
    return XenbusState.UNKNOWN if text is None else _STATES.get(text)


class Action(Enum):
    """What the driver has to do; the state it then writes is in brackets."""

    OFFER = "write features"  # [2]
    CONNECT = "read the other's nodes, map the rings"  # [4]
    DISCONNECT = "stop, unmap the rings, unbind the ports"
    CLOSE = "begin closing"  # [5]
    CLOSE_DONE = "closed"  # [6]
    REMOVE = "forget the device"
    PUBLISH = "allocate and grant rings, write nodes"  # [3], or [4] where the rings need no answer


_S = XenbusState
_A = Action
#: (own state, the other's state) -> (own next state, what to do). What is not there is ignored.
Table = dict[tuple[XenbusState, XenbusState], tuple[XenbusState, tuple[Action, ...]]]

_GONE = (_S.CLOSED, (_A.DISCONNECT, _A.CLOSE_DONE))
_AGAIN = (_S.INIT_WAIT, (_A.DISCONNECT, _A.OFFER))
_UP = (_S.CONNECTED, (_A.CONNECT,))

BACKEND: Table = {
    (_S.INIT_WAIT, _S.INITIALISED): _UP,
    (_S.INIT_WAIT, _S.CONNECTED): _UP,
    (_S.INIT_WAIT, _S.CLOSING): (_S.CLOSING, (_A.CLOSE,)),
    (_S.INIT_WAIT, _S.CLOSED): _GONE,
    (_S.INIT_WAIT, _S.UNKNOWN): _GONE,
    # A frontend that starts anew without having closed has no rings any more.
    (_S.CONNECTED, _S.INITIALISING): _AGAIN,
    (_S.CONNECTED, _S.CLOSING): (_S.CLOSING, (_A.CLOSE,)),
    (_S.CONNECTED, _S.CLOSED): _GONE,
    (_S.CONNECTED, _S.UNKNOWN): _GONE,
    (_S.CLOSING, _S.INITIALISING): _AGAIN,
    (_S.CLOSING, _S.CLOSED): _GONE,
    (_S.CLOSING, _S.UNKNOWN): _GONE,
    (_S.CLOSED, _S.INITIALISING): (_S.INIT_WAIT, (_A.OFFER,)),
    # Its Initialising was not seen, two changes having come as one.
    (_S.CLOSED, _S.INITIALISED): (_S.CONNECTED, (_A.OFFER, _A.CONNECT)),
}

#: The frontend's own state after PUBLISH depends on the kind of device: see ``FrontendMachine``.
_OPEN = (_S.INITIALISED, (_A.PUBLISH,))
_SHUT = (_S.CLOSING, (_A.CLOSE,))

FRONTEND: Table = {
    (_S.INITIALISING, _S.INIT_WAIT): _OPEN,
    (_S.INITIALISING, _S.INITIALISED): _OPEN,
    (_S.INITIALISING, _S.CLOSING): _GONE,
    (_S.INITIALISED, _S.CONNECTED): _UP,
    (_S.INITIALISED, _S.CLOSING): _SHUT,
    (_S.INITIALISED, _S.CLOSED): _GONE,
    (_S.INITIALISED, _S.UNKNOWN): _GONE,
    (_S.CONNECTED, _S.CLOSING): _SHUT,
    (_S.CONNECTED, _S.CLOSED): _GONE,
    (_S.CONNECTED, _S.UNKNOWN): _GONE,
    (_S.CLOSING, _S.CLOSED): _GONE,
    (_S.CLOSING, _S.UNKNOWN): _GONE,
}


class _Machine:
    """One end of one device: its own state, and whether it holds anything of the other's."""

    table: Table = {}
    #: The action after which there is something to disconnect.
    attaches = _A.CONNECT

    def __init__(self) -> None:
        self.state = _S.INITIALISING
        self.other = _S.UNKNOWN
        self.attached = False
        self.removed = False

    def _changed(self, text: str | None) -> list[Action]:
        state = parse_state(text)
        if state is None or self.removed:
            return []
        self.other = state
        row = self.table.get((self.state, state))
        return [] if row is None else self._go(*row)

    def _go(self, state: XenbusState, actions: tuple[Action, ...]) -> list[Action]:
        self.state = state
        done = []
        for action in actions:
            if action is _A.DISCONNECT:
                if not self.attached:
                    continue
                self.attached = False
            elif action is self.attaches:
                self.attached = True
            done.append(action)
        return done


class BackendMachine(_Machine):
    """The backend of one device.

    ``connect_on``: in which states of the frontend its rings are there to be mapped; a vif's backend waits
    for Connected alone.
    """

    table = BACKEND

    def __init__(self, *, connect_on: frozenset[XenbusState] | None = None, online: bool = True) -> None:
        super().__init__()
        self.connect_on = connect_on or frozenset({_S.INITIALISED, _S.CONNECTED})
        self.online = online

    def start(self) -> list[Action]:
        """The device's own resources are ready. Continues with what the frontend did meanwhile."""
        if self.state is not _S.INITIALISING or self.removed:
            return []
        actions = self._go(_S.INIT_WAIT, (_A.OFFER,))
        if self.other in self.connect_on:
            actions += self._go(*_UP)
        return actions

    def resume(self) -> None:
        """Our state node says Connected and we have just started: the rings are to be recovered."""
        self.state, self.attached = _S.CONNECTED, True

    def frontend_changed(self, text: str | None) -> list[Action]:
        """``text`` stands in the frontend's state node now; None: the node is gone."""
        state = parse_state(text)
        if state in (_S.INITIALISED, _S.CONNECTED) and state not in self.connect_on:
            self.other = state
            return []
        return self._changed(text) + self._removal()

    def close(self) -> list[Action]:
        """The toolstack wants the device closed; at once if no frontend is connected."""
        if self.removed or self.state is _S.CLOSED:
            return self._removal()
        if self.attached and self.other not in (_S.UNKNOWN, _S.CLOSED):
            return [] if self.state is _S.CLOSING else self._go(_S.CLOSING, (_A.CLOSE,))
        return self._go(*_GONE) + self._removal()

    def failed(self) -> list[Action]:
        """It cannot go on, by the frontend's fault or ours: an action failed, the ring is broken."""
        if self.removed or self.state is _S.CLOSED:
            return []
        if self.other in (_S.UNKNOWN, _S.CLOSED) and self.state is not _S.INITIALISING:
            return self._go(*_GONE) + self._removal()  # nobody is left to close with
        closing = () if self.state is _S.CLOSING else (_A.CLOSE,)
        return self._go(_S.CLOSING, (_A.DISCONNECT, *closing))

    def set_online(self, text: str | None) -> list[Action]:
        """``text`` stands in our ``online`` node now; anything but "0" is taken for online."""
        self.online = text is not None and text.strip() != "0"
        return self._removal()

    def _removal(self) -> list[Action]:
        if self.online or self.removed or self.state is not _S.CLOSED:
            return []
        self.removed = True
        return [_A.REMOVE]


class FrontendMachine(_Machine):
    """The frontend of one device. ``at_once``: PUBLISH ends in Connected, as a vif's does."""

    table = FRONTEND
    attaches = _A.PUBLISH

    def __init__(self, *, at_once: bool = False) -> None:
        super().__init__()
        self.at_once = at_once

    def backend_changed(self, text: str | None) -> list[Action]:
        """``text`` stands in the backend's state node now; None: the node is gone."""
        actions = self._changed(text)
        if self.at_once and actions == [_A.PUBLISH]:
            self.state = _S.CONNECTED
        return actions

    def close(self) -> list[Action]:
        """We want to stop; also after CLOSE, once nothing is in flight any more."""
        if self.state is _S.CLOSED:
            return []
        return self._go(*_GONE)

    def reopen(self) -> bool:
        """Begin again after Closed: True if the state Initialising is to be written."""
        if self.state is not _S.CLOSED:
            return False
        self.state = _S.INITIALISING
        return True
