"""A disk or an interface of a running guest, made what it is to be: what M(xtool.xen.disk) and
M(xtool.xen.network) have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ansible_collections.xtool.xen.plugins.module_utils.xtool import (
    NO_DOMAIN,
    SHARED_OPTIONS,
    Xtool,
    XtoolError,
)

#: Options of both modules.
DEVICE_OPTIONS: dict[str, dict[str, Any]] = {
    **SHARED_OPTIONS,
    "guest": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "words": {"type": "list", "elements": "str", "default": []},
    "replace": {"type": "bool", "default": False},
    "force": {"type": "bool", "default": False},
    "timeout": {"type": "float", "default": 40.0},
}


class Wanted(NamedTuple):
    """``fixed`` cannot be changed while the device is there, ``live`` can; ``more`` counts at attach alone. The
    names are those of xtool's records."""

    fixed: dict[str, Any]
    live: dict[str, Any]
    more: dict[str, Any]


class Device:
    """One device, called ``name``, of the guest that a module's ``params`` name. Methods raise ``XtoolError``."""

    what = ""
    listing = attaching = detaching = ""

    def __init__(self, xtool: Xtool, name: str, params: dict[str, Any]) -> None:
        self.xtool, self.guest, self.name = xtool, params["guest"], name
        self._timeout, self._force = f"--timeout={params['timeout']:g}", params["force"]

    def is_it(self, found: dict[str, Any]) -> bool:
        raise NotImplementedError

    def words_for(self, state: dict[str, Any]) -> list[str]:
        """``key=value`` words that describe the device."""
        raise NotImplementedError

    def change(self, before: dict[str, Any], changed: dict[str, Any]) -> None:
        """Change what can be changed while it is there."""
        raise NotImplementedError

    def find(self, *, may_be_gone: bool) -> dict[str, Any] | None:
        """The device as it is. ``may_be_gone``: a guest that is not there has none, which is no error."""
        try:
            found = self.xtool.json(self.listing, "--", self.guest)
        except XtoolError as error:
            if may_be_gone and error.done is not None and error.done.rc == NO_DOMAIN:
                return None
            raise
        return next((one for one in found if self.is_it(one)), None)

    def attach(self, state: dict[str, Any]) -> None:
        self.xtool.json(self.attaching, self._timeout, "--", self.guest, *self.words_for(state))

    def detach(self, found: dict[str, Any]) -> None:
        force = ["--force"] if self._force else []
        self.xtool.json(self.detaching, self._timeout, *force, "--", self.guest, str(found["devid"]))


def ensure(
    device: Device,
    params: dict[str, Any],
    wanted: Callable[[dict[str, Any] | None], Wanted | None],
    check: bool,
) -> dict[str, Any]:
    """Make the device what ``wanted`` says of the one that is there; what the module returns."""
    found = device.find(may_be_gone=params["state"] == "absent")
    actions, before, after = carry_out(device, found, wanted(found), params["replace"], check)
    now = found if not actions else None if check else device.find(may_be_gone=True)
    return {
        "changed": bool(actions),
        "actions": actions,
        device.what: now,
        "diff": {"before": before, "after": after},
    }


def carry_out(
    device: Device, found: dict[str, Any] | None, wanted: Wanted | None, replace: bool, check: bool
) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Make ``found`` what is ``wanted``: what was done (``check``: would be), and the values before and after.

    Raises ``XtoolError``; what was there is there then.
    """
    if wanted is None:
        if found is None:
            return [], {}, {}
        if not check:
            device.detach(found)
        return ["detached"], {"state": "present"}, {"state": "absent"}
    state = {**wanted.fixed, **wanted.live}
    if found is None:
        if not check:
            device.attach({**state, **wanted.more})
        return ["attached"], {}, state
    before = {name: found[name] for name in state}
    if any(before[name] != value for name, value in wanted.fixed.items()):
        told = ", ".join(
            f"{name} is {before[name]!r}, not {value!r}"
            for name, value in wanted.fixed.items()
            if before[name] != value
        )
        if not replace:
            raise XtoolError(
                f"{device.what} {device.name} of {device.guest} is another one: {told}. "
                "replace: true takes it away and attaches this one."
            )
        if not check:
            _replace(device, found, {**state, **wanted.more})
        return ["detached", "attached"], before, state
    # No limit is 0, an empty text or nothing.
    changed = {name: value for name, value in wanted.live.items() if (before[name] or 0) != (value or 0)}
    if changed and not check:
        device.change(found, changed)
    return (["changed"] if changed else []), before, {**before, **changed}


def _replace(device: Device, found: dict[str, Any], state: dict[str, Any]) -> None:
    device.detach(found)
    try:
        device.attach(state)
    except XtoolError as error:
        try:
            device.attach(found)
        except XtoolError as again:
            raise XtoolError(
                f"{error.message}\n{device.what} {device.name} was taken away before, and cannot be attached "
                f"again: {again.message}",
                error.done,
            ) from None
        raise XtoolError(
            f"{error.message}\nThe {device.what} that was there is attached again.", error.done
        ) from None
