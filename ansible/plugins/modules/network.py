#!/usr/bin/python
"""Ansible module: a network interface of a running guest."""

from __future__ import annotations

DOCUMENTATION = r"""
module: network
short_description: A network interface of a running guest
description:
  - Attaches an interface to a running guest, takes it away, or changes its rates. A restart of the guest keeps what
    was done.
  - An interface that belongs to the guest from its start is better written into its configuration
    (M(xtool.xen.guest)).
version_added: 0.1.0
options:
  guest:
    description: The guest, by name, id or uuid. It must be there, but for O(state=absent).
    type: str
    required: true
  mac:
    description:
      - The interface's address in the guest, by which it is known. One of your own within 00:16:3e, the range that is
        Xen's.
    type: str
    required: true
  state:
    description:
      - V(present), the guest has the interface as it is described here.
      - V(absent), it has no such interface. The guest is asked to let go of it first.
    type: str
    choices: [present, absent]
    default: present
  bridge:
    description: The host's bridge; the host's default without it.
    type: str
  backendtype:
    description: Who serves it, V(vif) the kernel or V(xtool); xtool chooses without it.
    type: str
    choices: [vif, xtool]
  rate:
    description: Limit on what the guest sends, such as V(10Mb/s); an empty string is no limit.
    type: str
  rate_in:
    description: Limit on what the guest is sent, for interfaces that xtool serves; an empty string is no limit.
    type: str
  words:
    description:
      - More words of the interface's description, as in a domain file, such as V(model=e1000) or V(ip=10.0.0.2). They
        count when it is attached; an interface that is there is not compared with them.
    type: list
    elements: str
    default: []
  replace:
    description:
      - Where the interface is on another O(bridge) or O(backendtype), take it away and attach this one. Without it,
        that is a failure. If this one cannot be attached, the other is attached again.
    type: bool
    default: false
  force:
    description: Take an interface away although the guest holds on to it.
    type: bool
    default: false
  timeout:
    description: How long to wait for the interface, in seconds.
    type: float
    default: 40
extends_documentation_fragment:
  - xtool.xen.xtool
attributes:
  check_mode:
    support: full
    description: It says what would be done.
  diff_mode:
    support: full
    description: The interface before and after.
author:
  - The xtool authors
"""

EXAMPLES = r"""
- name: An interface in the back network
  xtool.xen.network:
    guest: web
    mac: 00:16:3e:00:01:02
    bridge: back

- name: Let it send 10 Mbit/s
  xtool.xen.network:
    guest: web
    mac: 00:16:3e:00:01:02
    bridge: back
    rate: 10Mb/s

- name: Take it away
  xtool.xen.network:
    guest: web
    mac: 00:16:3e:00:01:02
    state: absent
"""

RETURN = r"""
actions:
  description: What was done, or would be done in check mode, in order.
  returned: success
  type: list
  elements: str
  sample: [attached]
interface:
  description: The interface as C(xtool network-list -o json) has it; null where there is none, and in check mode.
  returned: success
  type: dict
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.xtool.xen.plugins.module_utils.device import (
    DEVICE_OPTIONS,
    Device,
    Wanted,
    ensure,
)
from ansible_collections.xtool.xen.plugins.module_utils.xtool import XtoolError, finish, words_of

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **DEVICE_OPTIONS,
    "mac": {"type": "str", "required": True},
    "bridge": {"type": "str"},
    "backendtype": {"type": "str", "choices": ["vif", "xtool"]},
    "rate": {"type": "str"},
    "rate_in": {"type": "str"},
}
_RATES = ("rate", "rate_in")


class Interface(Device):
    """The interface with one MAC address."""

    what = "interface"
    listing, attaching, detaching = "network-list", "network-attach", "network-detach"

    def is_it(self, found: dict[str, Any]) -> bool:
        return bool(found["mac"].lower() == self.name)

    def words_for(self, state: dict[str, Any]) -> list[str]:
        rates = {name.replace("_", "-"): state[name] for name in _RATES if state.get(name)}
        values = {
            "mac": self.name,
            "bridge": state.get("bridge") or None,
            "backendtype": state.get("backend"),
        }
        return [*words_of({**values, **rates}), *state.get("words", ())]

    def change(self, before: dict[str, Any], changed: dict[str, Any]) -> None:
        options = [f"--{name.replace('_', '-')}={value or 'none'}" for name, value in changed.items()]
        self.xtool.json("network-limit", *options, "--", self.guest, str(before["devid"]))

    def find(self, *, may_be_gone: bool) -> dict[str, Any] | None:
        """The rates as the configuration has them: 10Mb/s, where the running interface has bytes and
        microseconds."""
        found = super().find(may_be_gone=may_be_gone)
        if found is None or not (found["rate"] or found["rate_in"]):
            return found
        try:
            config = self.xtool.json("config-show", "--", self.guest)["config"]
        except XtoolError:  # not one of xtool's
            return found
        for vif in config.get("vif", ()):
            if str(vif.get("mac", "")).lower() == self.name:
                written = {"rate": vif.get("rate"), "rate_in": vif.get("rate-in")}
                found |= {name: text for name, text in written.items() if text and found[name]}
        return found


def wanted(params: dict[str, Any]) -> Wanted | None:
    """What the interface is to be; None for no interface."""
    if params["state"] == "absent":
        return None
    fixed = {"bridge": params["bridge"], "backend": params["backendtype"]}
    live = {name: params[name] for name in _RATES}
    return Wanted(
        {name: value for name, value in fixed.items() if value},
        {name: value for name, value in live.items() if value is not None},
        {"words": params["words"]},
    )


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    params = module.params
    finish(
        module,
        lambda xtool: ensure(
            Interface(xtool, params["mac"].lower(), params),
            params,
            lambda found: wanted(params),
            module.check_mode,
        ),
    )


if __name__ == "__main__":
    main()
