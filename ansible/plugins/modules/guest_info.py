#!/usr/bin/python
"""Ansible module: what the guests of a Xen host are and have."""

from __future__ import annotations

DOCUMENTATION = r"""
module: guest_info
short_description: What the guests of a Xen host are and have
description:
  - State, configuration, disks and interfaces of one guest or of all.
  - Changes nothing. Passwords of the configuration are left out.
version_added: 0.1.0
options:
  name:
    description:
      - The guest, by name, id or uuid; without it all guests. A guest that is not there is no failure; the list is
        empty.
    type: str
  devices:
    description:
      - List the disks and interfaces of each guest as well. Costs two more calls for each.
    type: bool
    default: false
extends_documentation_fragment:
  - xtool.xen.xtool
attributes:
  check_mode:
    support: full
    description: It only looks.
author:
  - The xtool authors
"""

EXAMPLES = r"""
- name: All guests of a host
  xtool.xen.guest_info:
  register: found

- name: Their names
  ansible.builtin.debug:
    msg: "{{ found.guests | map(attribute='name') | list }}"

- name: The disks of one, seen from a controller
  xtool.xen.guest_info:
    host: ssh://root@alpha
    name: web
    devices: true
  delegate_to: localhost
  register: web
"""

RETURN = r"""
guests:
  description: The guests that were found, domain 0 left out. Sizes are bytes, times seconds.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: Its name.
      type: str
    domid:
      description: Xen's number for it; a restart gives another.
      type: int
    uuid:
      description: Its uuid.
      type: str
    type:
      description: pv, pvh or hvm.
      type: str
    state:
      description: running, blocked, paused, shutdown, crashed or dying.
      type: str
    memory:
      description: What it has now.
      type: int
    managed:
      description: Whether xtool created it.
      type: bool
    config:
      description: The keys of its domain file; null for a guest xtool did not create.
      type: dict
    disks:
      description: As C(xtool block-list -o json) has them.
      returned: with O(devices)
      type: list
      elements: dict
    interfaces:
      description: As C(xtool network-list -o json) has them.
      returned: with O(devices)
      type: list
      elements: dict
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.xtool.xen.plugins.module_utils.xtool import SHARED_OPTIONS, Xtool, finish

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **SHARED_OPTIONS,
    "name": {"type": "str"},
    "devices": {"type": "bool", "default": False},
}


def look(xtool: Xtool, name: str | None, devices: bool) -> list[dict[str, Any]]:
    found = xtool.domains()
    if name is not None:
        found = [one for one in found if name in (one["name"], one["uuid"], str(one["domid"]))]
    for one in found if devices else ():
        one["disks"] = xtool.json("block-list", "--", one["uuid"])
        one["interfaces"] = xtool.json("network-list", "--", one["uuid"])
    return found


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    params = module.params
    finish(module, lambda xtool: {"changed": False, "guests": look(xtool, params["name"], params["devices"])})


if __name__ == "__main__":
    main()
