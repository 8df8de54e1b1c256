"""The states of both ends: total, never stuck with rings in hand, whatever the other one writes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtool.proto.xenbus import (
    BACKEND,
    FRONTEND,
    Action,
    BackendMachine,
    FrontendMachine,
    XenbusState,
    parse_state,
)

A, S = Action, XenbusState
GARBAGE = ["", "99", "9", "-1", "4 ", "04", "٤", "4\0", "x" * 4096, "\x1b[2J", "4.0"]
TEXTS = st.sampled_from([None, *"012345678", *GARBAGE])


def opened() -> BackendMachine:
    machine = BackendMachine()
    assert machine.frontend_changed("1") == []
    assert machine.start() == [A.OFFER]
    return machine


def test_a_disk_s_life() -> None:
    machine = opened()
    assert machine.frontend_changed("3") == [A.CONNECT]
    assert machine.frontend_changed("4") == []
    assert machine.close() == [A.CLOSE] and machine.close() == []
    assert machine.frontend_changed("5") == []
    assert machine.frontend_changed("6") == [A.DISCONNECT, A.CLOSE_DONE]
    assert machine.set_online("0") == [A.REMOVE]
    assert machine.frontend_changed("1") == machine.close() == machine.failed() == machine.start() == []


def test_a_guest_reboots_its_driver() -> None:
    machine = opened()
    machine.frontend_changed("4")
    assert machine.frontend_changed("5") == [A.CLOSE]
    assert machine.frontend_changed("6") == [A.DISCONNECT, A.CLOSE_DONE]
    assert machine.frontend_changed("1") == [A.OFFER]
    assert machine.frontend_changed("3") == [A.CONNECT]
    assert machine.frontend_changed("1") == [A.DISCONNECT, A.OFFER]  # crashed without closing
    machine.frontend_changed("6")
    assert machine.frontend_changed("3") == [A.OFFER, A.CONNECT]  # two changes seen as one


def test_the_frontend_was_first() -> None:
    machine = BackendMachine()
    assert machine.frontend_changed("3") == []
    assert machine.start() == [A.OFFER, A.CONNECT]


def test_a_vif_connects_when_connected() -> None:
    machine = BackendMachine(connect_on=frozenset({S.CONNECTED}))
    machine.start()
    assert machine.frontend_changed("3") == []
    assert machine.frontend_changed("4") == [A.CONNECT]


def test_our_own_failure() -> None:
    machine = opened()
    machine.frontend_changed("4")
    assert machine.failed() == [A.DISCONNECT, A.CLOSE] and machine.failed() == []
    assert machine.frontend_changed("4") == []
    assert machine.frontend_changed("6") == [A.CLOSE_DONE]
    fresh = BackendMachine()
    assert fresh.failed() == [A.CLOSE]  # could not even open the disk
    assert fresh.close() == [A.CLOSE_DONE]


def test_the_frontend_s_directory_is_gone() -> None:
    machine = opened()
    machine.frontend_changed("4")
    machine.set_online("0")
    assert machine.frontend_changed(None) == [A.DISCONNECT, A.CLOSE_DONE, A.REMOVE]


def test_a_backend_that_starts_again_keeps_its_rings() -> None:
    machine = BackendMachine()
    machine.resume()
    assert machine.frontend_changed("4") == []
    assert machine.frontend_changed("6") == [A.DISCONNECT, A.CLOSE_DONE]


@pytest.mark.parametrize("text", GARBAGE)
def test_hf_29_garbage_is_not_looked_at(text: str) -> None:
    assert parse_state(text) is None
    machine = opened()
    machine.frontend_changed("4")
    assert machine.frontend_changed(text) == []
    assert machine.state is S.CONNECTED


EVENTS = st.one_of(
    st.tuples(st.just("frontend_changed"), TEXTS),
    st.tuples(st.just("set_online"), st.sampled_from([None, "0", "1", "junk"])),
    st.tuples(st.sampled_from(["start", "close", "failed"]), st.none()),
)


@settings(max_examples=500)
@given(st.lists(EVENTS, max_size=40), st.booleans())
def test_hf_29_any_order_of_events(events: list[tuple[str, str | None]], net: bool) -> None:
    """Rings are taken and given back in turn, states follow the actions, and it can always be ended."""
    machine = BackendMachine(connect_on=frozenset({S.CONNECTED}) if net else None)
    held = False
    removed = 0

    def do(actions: list[Action]) -> None:
        nonlocal held, removed
        for action in actions:
            if action is A.CONNECT:
                assert not held
                held = True
            elif action is A.DISCONNECT:
                assert held
                held = False
            elif action is A.REMOVE:
                removed += 1
        assert held == machine.attached
        assert not held or machine.state in (S.CONNECTED, S.CLOSING)
        assert removed == machine.removed

    for name, text in events:
        method = getattr(machine, name)
        do(method(text) if name in ("frontend_changed", "set_online") else method())
    do(machine.close())
    do(machine.frontend_changed("6"))
    do(machine.close())
    do(machine.set_online("0"))
    assert not held and removed == 1


@settings(max_examples=300)
@given(st.lists(TEXTS | st.just("close") | st.just("reopen"), max_size=40), st.booleans())
def test_the_frontend_in_any_order(events: list[str | None], at_once: bool) -> None:
    machine = FrontendMachine(at_once=at_once)
    held = False
    for event in [*events, "close"]:
        if event == "reopen":
            machine.reopen()
            continue
        for action in machine.close() if event == "close" else machine.backend_changed(event):
            if action in (A.PUBLISH, A.DISCONNECT):
                assert held == (action is A.DISCONNECT)
                held = not held
        assert held == machine.attached
    assert not held and machine.state is S.CLOSED


@pytest.mark.parametrize("at_once", [False, True])
def test_both_ends_meet_and_part(at_once: bool) -> None:
    """Each writes its state after its actions; the other sees some of the changes, late, in any order."""
    writes = {
        A.OFFER: "2",
        A.CONNECT: "4",
        A.CLOSE: "5",
        A.CLOSE_DONE: "6",
        A.PUBLISH: "4" if at_once else "3",
    }
    for order in itertools.product((0, 1), repeat=6):
        back = BackendMachine(connect_on=frozenset({S.CONNECTED}) if at_once else None)
        front = FrontendMachine(at_once=at_once)
        nodes = {"back": "1", "front": "1"}

        def do(who: str, actions: list[Action], nodes: dict[str, str] = nodes) -> None:
            for action in actions:
                nodes[who] = writes.get(action, nodes[who])

        do("back", back.start())
        for turn in (*order, 0, 1, 0, 1, 0, 1):
            if turn:
                do("back", back.frontend_changed(nodes["front"]))
            else:
                do("front", front.backend_changed(nodes["back"]))
        assert nodes == {"back": "4", "front": "4"}
        do("back", back.close())
        do("front", front.backend_changed(nodes["back"]))
        do("front", front.close())
        do("back", back.frontend_changed(nodes["front"]))
        assert nodes == {"back": "6", "front": "6"}
        assert not back.attached and not front.attached


def test_the_tables_name_reachable_states() -> None:
    for table in (BACKEND, FRONTEND):
        reached = {S.INIT_WAIT, S.INITIALISING} | {state for state, _ in table.values()}
        assert {own for own, _ in table} <= reached
