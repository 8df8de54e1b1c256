#!/usr/bin/python
"""Ansible module: a disk of a running guest."""

from __future__ import annotations

DOCUMENTATION = r"""
module: disk
short_description: A disk of a running guest
description:
  - Attaches a disk to a running guest, takes it away, changes its limits, or changes the medium of a CD drive. A
    restart of the guest keeps what was done.
  - A disk that belongs to the guest from its start is better written into its configuration (M(xtool.xen.guest)).
version_added: 0.1.0
options:
  guest:
    description: The guest, by name, id or uuid. It must be there, but for O(state=absent).
    type: str
    required: true
  vdev:
    description: The device the guest sees, such as V(xvdb).
    type: str
    required: true
  state:
    description:
      - V(present), the guest has the disk as it is described here.
      - V(absent), it has no such disk. The guest is asked to let go of it first.
    type: str
    choices: [present, absent]
    default: present
  target:
    description:
      - Image file, block device or URL, with the full path on the Xen host. Needed to attach a disk.
      - An empty string is a CD drive without a medium.
    type: str
  format:
    description: The image's format, such as V(raw) or V(qcow2).
    type: str
    default: raw
  readonly:
    description: The guest may not write to it. A CD drive is always read-only.
    type: bool
    default: false
  backendtype:
    description: Who serves it; xtool chooses without it.
    type: str
    choices: [phy, qdisk, xtool]
  bytes_per_second:
    description: Limit on reads and writes together; V(0) is no limit. For disks that xtool serves.
    type: int
  ops_per_second:
    description: Limit on requests; V(0) is no limit. For disks that xtool serves.
    type: int
  words:
    description:
      - More words of the disk's description, as in a domain file, such as V(discard) or V(script=block-drbd). They
        count when the disk is attached; a disk that is there is not compared with them.
    type: list
    elements: str
    default: []
  replace:
    description:
      - Where another disk (another O(target), O(format) or O(readonly)) is under that O(vdev), take it away and attach
        this one. Without it, that is a failure. If this one cannot be attached, the other is attached again.
    type: bool
    default: false
  force:
    description: Take a disk away although the guest holds on to it. The guest sees it fail.
    type: bool
    default: false
  timeout:
    description: How long to wait for the disk, in seconds.
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
    description: The disk before and after.
author:
  - The xtool authors
"""

EXAMPLES = r"""
- name: A second disk for the database
  xtool.xen.disk:
    guest: db
    vdev: xvdb
    target: /srv/images/db-data.qcow2
    format: qcow2

- name: No more than 20 MiB/s of it
  xtool.xen.disk:
    guest: db
    vdev: xvdb
    target: /srv/images/db-data.qcow2
    format: qcow2
    backendtype: xtool
    bytes_per_second: "{{ '20M' | human_to_bytes }}"

- name: Another medium in the drive
  xtool.xen.disk:
    guest: windows
    vdev: hdc
    target: /srv/iso/drivers.iso

- name: Take it away
  xtool.xen.disk:
    guest: db
    vdev: xvdb
    state: absent
"""

RETURN = r"""
actions:
  description: What was done, or would be done in check mode, in order.
  returned: success
  type: list
  elements: str
  sample: [detached, attached]
disk:
  description: The disk as C(xtool block-list -o json) has it; null where there is none, and in check mode.
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
    "vdev": {"type": "str", "required": True},
    "target": {"type": "str"},
    "format": {"type": "str", "default": "raw"},
    "readonly": {"type": "bool", "default": False},
    "backendtype": {"type": "str", "choices": ["phy", "qdisk", "xtool"]},
    "bytes_per_second": {"type": "int"},
    "ops_per_second": {"type": "int"},
}
_LIMITS = ("bytes_per_second", "ops_per_second")


class Disk(Device):
    """The disk under one vdev."""

    what = "disk"
    listing, attaching, detaching = "block-list", "block-attach", "block-detach"

    def is_it(self, found: dict[str, Any]) -> bool:
        return self.name in (found["vdev"], str(found["devid"]))

    def words_for(self, state: dict[str, Any]) -> list[str]:
        access = None if state.get("cdrom") else "ro" if state["readonly"] else "rw"
        devtype = "cdrom" if state.get("cdrom") else None
        values = {"vdev": self.name, "format": state["format"], "access": access, "devtype": devtype}
        limits = {name.replace("_", "-"): state[name] for name in _LIMITS if state.get(name)}
        more = {"backendtype": state.get("backend"), **limits, "target": state["target"]}
        return [*state.get("words", ()), *words_of({**values, **more})]

    def change(self, before: dict[str, Any], changed: dict[str, Any]) -> None:
        if "target" in changed:
            words = ["cd-insert", "--", self.guest, self.name, changed["target"]]
            self.xtool.json(*(words if changed["target"] else ["cd-eject", "--", self.guest, self.name]))
        limits = {name: changed[name] for name in _LIMITS if name in changed}
        if limits:
            options = [f"--{name.replace('_', '-')}={value}" for name, value in limits.items()]
            self.xtool.json("block-limit", *options, "--", self.guest, self.name)


def wanted(params: dict[str, Any], found: dict[str, Any] | None) -> Wanted | None:
    """What the disk is to be; None for no disk. Raises ``XtoolError`` for what makes no sense."""
    if params["state"] == "absent":
        return None
    cdrom = found is not None and found["cdrom"]
    if params["target"] is None and found is None:
        raise XtoolError(f"disk {params['vdev']} is not there, and without target it cannot be attached")
    if not cdrom and params["target"] == "":
        raise XtoolError(f"disk {params['vdev']} is no CD drive: target cannot be empty")
    fixed: dict[str, Any] = {}
    live: dict[str, Any] = {name: params[name] for name in _LIMITS if params[name] is not None}
    if cdrom:
        live |= {} if params["target"] is None else {"target": params["target"]}
    else:
        fixed = {name: params[name] for name in ("target", "format", "readonly") if params[name] is not None}
        fixed |= {"backend": params["backendtype"]} if params["backendtype"] else {}
    return Wanted(fixed, live, {"words": params["words"]})


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    params = module.params
    finish(
        module,
        lambda xtool: ensure(
            Disk(xtool, params["vdev"], params),
            params,
            lambda found: wanted(params, found),
            module.check_mode,
        ),
    )


if __name__ == "__main__":
    main()
