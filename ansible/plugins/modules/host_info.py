#!/usr/bin/python
"""Ansible module: what a Xen host is and has."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_info
short_description: What a Xen host is and has
description:
  - The hypervisor, its CPUs and memory, as C(xtool info) knows them; with O(checks), also whether the host is fit to
    run guests, as C(xtool doctor) judges it.
  - Changes nothing.
version_added: 0.1.0
options:
  checks:
    description:
      - Ask C(xtool doctor) as well. It looks at the machine on which xtool runs, so it cannot be had through a
        daemon's socket or a URI of libvirt's.
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
- name: How much memory is free
  xtool.xen.host_info:
  register: xen

- name: Stop before a host that has too little
  ansible.builtin.assert:
    that: xen.info.free_memory >= 4 * 1024 * 1024 * 1024

- name: A host is to be fit before guests come to it
  xtool.xen.host_info:
    host: ssh://root@alpha
    checks: true
  delegate_to: localhost
  register: xen
  failed_when: xen.checks | selectattr('status', 'eq', 'fail') | list | length > 0
"""

RETURN = r"""
info:
  description: The fields of C(xtool info -o json). Memory is in bytes.
  returned: success
  type: dict
  sample: {"xen_version": "4.17.5", "cpus": 8, "total_memory": 34359738368, "free_memory": 30064771072, "domains": 1}
checks:
  description: What C(xtool doctor) looked at; RV(checks[].status) is ok, warn, fail or skip.
  returned: with O(checks)
  type: list
  elements: dict
  sample: [{"name": "xen", "status": "ok", "found": "Xen 4.17.5", "why": "", "do": ""}]
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.xtool.xen.plugins.module_utils.xtool import SHARED_OPTIONS, Xtool, finish

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {**SHARED_OPTIONS, "checks": {"type": "bool", "default": False}}
#: ``xtool doctor`` ends with it when something is not well.
NOT_WELL = 1


def look(xtool: Xtool, checks: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"info": xtool.json("info")}
    if checks:
        found["checks"] = xtool.json("doctor", allowed=(NOT_WELL,))
    return found


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    params = module.params
    finish(module, lambda xtool: {"changed": False, **look(xtool, params["checks"])})


if __name__ == "__main__":
    main()
