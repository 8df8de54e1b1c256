#!/usr/bin/python
"""Ansible module: a guest, as it is described."""

from __future__ import annotations

DOCUMENTATION = r"""
module: guest
short_description: A guest of a Xen host, as it is described
description:
  - Creates a guest, changes it, or ends it. What it is to be is compared with what runs, as C(xtool plan) does it, and
    only what differs is changed, as C(xtool apply) does it.
  - A change is made in the running guest where that can be, is kept for its next reboot where it cannot, and wants
    O(recreate=true) where the guest would have to be created anew.
  - A guest that cannot be created leaves nothing behind.
version_added: 0.1.0
options:
  name:
    description:
      - The guest's name. Needed without O(config) and O(src); with them, it is the name they have or lack.
    type: str
  state:
    description:
      - V(present), it is there as it is described. A guest that is created runs; whether one that is there runs or is
        paused stays as it is.
      - V(running) and V(paused), it is there and runs, or is paused. A guest that is created for V(paused) runs for a
        moment before it is paused.
      - V(stopped), it is asked to shut down, and waited for. Then its C(on_poweroff) counts; unless that keeps the
        domain, nothing is left of it.
      - V(absent), it is asked to shut down, and whatever is left of it then is removed.
      - V(restarted), it is there and is rebooted, so that changes that wait for a reboot count. A guest that was just
        created or re-created is not rebooted. This is always a change.
      - A guest that is not there needs O(config) or O(src); V(absent) and V(stopped) do not look at them.
    type: str
    choices: [present, running, paused, stopped, absent, restarted]
    default: present
  config:
    description:
      - The keys of a domain file, sizes as there; a number of C(memory) is MiB. Paths are full paths on the Xen host.
      - It is taken as it stands; templates of xtool's and defaults of the host count with O(src) alone.
      - A number is to stay one. Before ansible-core 2.19 what a template gives is a text, which C(memory) takes, but not
        C(vcpus) for one; there C(jinja2_native) helps, or O(src) with O(vars).
      - Set C(no_log) on the task where it holds a password.
    type: dict
  src:
    description:
      - A domain file, on the machine the module runs on. It describes one guest.
    type: path
  vars:
    description: Variables for the jinja2 in O(src).
    type: dict
  recreate:
    description:
      - Create the guest anew where a change cannot be had otherwise, and where it has ended and was kept. What runs in it
        is lost. Without it, that is a failure that says what is in the way.
    type: bool
    default: false
  force:
    description: End a guest that does not shut down within O(timeout). Without it, that is a failure.
    type: bool
    default: false
  timeout:
    description: How long a guest may take to shut down or to reboot, in seconds.
    type: float
    default: 60
  wait:
    description:
      - Wait until a guest that was created or changed is ready, as C(ready) in its configuration says.
    type: bool
    default: false
extends_documentation_fragment:
  - xtool.xen.xtool
attributes:
  check_mode:
    support: full
    description: It says what would be done.
  diff_mode:
    support: full
    description: The keys that differ, before and after; no secrets.
author:
  - The xtool authors
"""

EXAMPLES = r"""
- name: A web server
  xtool.xen.guest:
    name: web
    config:
      type: pvh
      memory: 512
      vcpus: 2
      kernel: /boot/vmlinuz
      cmdline: root=/dev/xvda console=hvc0
      disk:
        - /images/web.img,raw,xvda,rw
      vif:
        - bridge=xenbr0

- name: From a domain file, on another host, and wait until it is ready
  xtool.xen.guest:
    host: ssh://root@alpha
    src: "{{ playbook_dir }}/db.yaml"
    vars:
      size: large
    wait: true
  delegate_to: localhost

- name: Another kernel, even if web has to be created anew
  xtool.xen.guest:
    name: web
    src: /srv/site/web.yaml
    recreate: true

- name: A restart
  xtool.xen.guest:
    name: web
    state: restarted

- name: No such guest
  xtool.xen.guest:
    name: web
    state: absent
    force: true
"""

RETURN = r"""
actions:
  description:
    - What was done, or would be done in check mode, in order; of created, updated, recreated, paused, unpaused, stopped,
      destroyed, restarted.
  returned: success
  type: list
  elements: str
  sample: [updated]
changes:
  description:
    - The keys that differed, as C(xtool plan -o json) tells them; RV(changes[].when) is live, reboot or recreate.
  returned: always
  type: list
  elements: dict
  sample: [{"key": "memory", "before": 512, "after": 768, "when": "live", "why": "the guest's balloon driver is asked"}]
waiting:
  description: Keys whose new value is kept until the guest's next reboot.
  returned: success
  type: list
  elements: str
  sample: [kernel]
guest:
  description: The guest as C(xtool list -o json) has it; null where there is none, and where check mode would change it.
  returned: success
  type: dict
"""

import json
import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.xtool.xen.plugins.module_utils.xtool import (
    ENDED,
    NO_DOMAIN,
    SHARED_OPTIONS,
    Xtool,
    XtoolError,
    domain_file,
    fail,
    opened,
    written,
)

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **SHARED_OPTIONS,
    "name": {"type": "str"},
    "state": {
        "type": "str",
        "choices": ["present", "running", "paused", "stopped", "absent", "restarted"],
        "default": "present",
    },
    "config": {"type": "dict"},
    "src": {"type": "path"},
    "vars": {"type": "dict"},
    "recreate": {"type": "bool", "default": False},
    "force": {"type": "bool", "default": False},
    "timeout": {"type": "float", "default": 60.0},
    "wait": {"type": "bool", "default": False},
}
#: ``xtool plan`` ends with it when there is something to do.
TO_DO = 20
_DID = {"create": "created", "update": "updated", "recreate": "recreated"}


class Guest:
    """What the module does with one guest. ``actions`` and ``changes`` grow as it goes; methods raise
    ``XtoolError``."""

    def __init__(self, xtool: Xtool, params: dict[str, Any], check: bool) -> None:
        self.xtool, self.check = xtool, check
        self._state, self._force, self._wait = params["state"], params["force"], params["wait"]
        self._recreate, self._timeout = params["recreate"], f"{params['timeout']:g}"
        self.name: str = params["name"] or ""
        self.actions: list[str] = []
        self.changes: list[dict[str, Any]] = []
        self.waiting: list[str] = []
        self._seen: list[dict[str, Any] | None] = []  # at most one, while nothing was done since

    def found(self) -> dict[str, Any] | None:
        if not self._seen:
            self._seen = [self.xtool.domain(self.name)]
        return self._seen[0]

    # --- as it is described -----------------------------------------------------------------------
    def describe(self, file: str, vars_file: str | None) -> None:
        """Make it what ``file`` says."""
        more = ["--vars-file", vars_file] if vars_file else []
        described = self.xtool.json("plan", *more, "--", file, allowed=(TO_DO,))["domains"]
        names = [one["name"] for one in described]
        if len(names) != 1:
            raise XtoolError(
                f"{file} describes {', '.join(names) or 'no guest'}: this module takes a file with one guest"
            )
        [plan] = described
        if self.name and names != [self.name]:
            raise XtoolError(f"the configuration is that of {plan['name']}, not of {self.name}")
        self.name, self.changes, self.waiting = plan["name"], plan["changes"], plan["waiting"]
        if plan["action"] == "unchanged":
            return
        if plan["action"] == "conflict":
            raise XtoolError(f"{self.name}: {plan['why']}. End it with the toolstack that made it.")
        if plan["action"] == "recreate" and not self._recreate:
            raise XtoolError(
                f"{self.name} would have to be created anew, and what runs in it lost: {_reasons(plan)}. "
                "recreate: true does it."
            )
        self.waiting = [
            *dict.fromkeys(
                [*self.waiting, *(c["key"].partition("[")[0] for c in self.changes if c["when"] == "reboot")]
            )
        ]
        if not self.check:
            self._apply(file, more, recreate=plan["action"] == "recreate")
        self.actions.append(_DID[plan["action"]])

    def _apply(self, file: str, more: list[str], *, recreate: bool) -> None:
        words = [*more, "--deadline", self._timeout]
        # Without --yes, apply refuses to re-create what did not need it a moment ago.
        words += ["--yes"] if recreate else []
        words += ["--force"] if self._force else []
        words += ["--wait", "healthy"] if self._wait else []
        [done] = self.xtool.json("apply", *words, "--", file, allowed=range(1, 256))["domains"]
        if done["error"] is not None:
            error = done["error"]
            hint = f"\nhint: {error['hint']}" if error["hint"] else ""
            raise XtoolError(f"{error['message']}{hint}")

    # --- its state --------------------------------------------------------------------------------
    def bring(self, *, described: bool) -> None:
        """To ``state``, whatever it was before."""
        if self._state == "present" and described:
            return
        found = self.found()
        if self._state in ("absent", "stopped"):
            self._end(found)
            return
        if found is None:
            if self.check and self.actions:  # it would be there
                self._and_then(None)
                return
            raise XtoolError(f"there is no guest {self.name}, and without config or src it cannot be created")
        if found["state"] in ENDED and self._state != "present" and not self.actions:
            raise XtoolError(
                f"{self.name} has ended ({found['reason'] or found['state']}) and was kept. "
                "With its config or src, recreate: true creates it anew; state: absent removes it."
            )
        self._and_then(found)

    def _and_then(self, found: dict[str, Any] | None) -> None:
        paused = found is not None and found["state"] == "paused" and not self._is_new
        if self._state == "paused" and not paused:
            self._do("paused", "pause")
        elif self._state in ("running", "restarted") and paused:
            self._do("unpaused", "unpause")
        if self._state == "restarted" and not self._is_new:
            self._do("restarted", "reboot", "--wait", "--fallback", "--timeout", self._timeout)

    @property
    def _is_new(self) -> bool:
        return "created" in self.actions or "recreated" in self.actions

    def _end(self, found: dict[str, Any] | None) -> None:
        if found is None:
            return
        ended = found["state"] in ENDED
        if not ended:
            if found["state"] == "paused":  # it hears nothing
                self._do("unpaused", "unpause")
            force = ["--force"] if self._force else ["--wait"]
            self._do("stopped", "shutdown", *force, "--fallback", "--timeout", self._timeout)
        if self._state == "absent" and (self.check or self.found() is not None):
            try:
                # Its uuid: another may have been made under the name.
                self._do("destroyed" if ended else "", "destroy", of=found["uuid"])
            except XtoolError as error:
                if error.done is None or error.done.rc != NO_DOMAIN:
                    raise

    def _do(self, did: str, verb: str, *options: str, of: str = "") -> None:
        if not self.check:
            self._seen = []
            self.xtool.json(verb, *options, "--", of or self.name)
        if did:
            self.actions.append(did)


def _reasons(plan: dict[str, Any]) -> str:
    keys = [f"{c['key']} ({c['why']})" for c in plan["changes"] if c["when"] == "recreate"]
    return "; ".join([*([plan["why"]] if plan["why"] else []), *keys])


def ensure(guest: Guest, params: dict[str, Any], folder: str) -> dict[str, Any]:
    """What the module returns. Raises ``XtoolError``."""
    config, src = params["config"], params["src"]
    ending = params["state"] in ("absent", "stopped")
    if not guest.name and config is not None:
        guest.name = config.get("name", "")
    if not guest.name and (ending or src is None):
        raise XtoolError("which guest? name says it")
    described = not ending and (config is not None or src is not None)
    if described:
        file, vars_file = src, None
        try:
            if config is not None:
                file = domain_file({"name": guest.name, **config}, folder)
            if params["vars"] is not None:
                vars_file = written(json.dumps(params["vars"]), folder)
            try:
                guest.describe(file, vars_file)
            except XtoolError as error:
                told = error.message if config is None else error.message.replace(file, "config")
                raise XtoolError(told, error.done) from None
        finally:
            for path in (file if config is not None else None, vars_file):
                if path is not None:
                    os.unlink(path)
    guest.bring(described=described)
    changed = bool(guest.actions)
    return {
        "changed": changed,
        "actions": guest.actions,
        "waiting": [] if "restarted" in guest.actions or guest._is_new else guest.waiting,
        "guest": None if guest.check and changed else guest.found(),
    }


def diff(guest: Guest) -> dict[str, Any]:
    before: dict[str, Any] = {change["key"]: change["before"] for change in guest.changes}
    after: dict[str, Any] = {change["key"]: change["after"] for change in guest.changes}
    if guest.actions and guest.actions != ["updated"]:
        after["actions"] = guest.actions
    return {"before": before, "after": after}


def main() -> None:
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=True,
        mutually_exclusive=[("config", "src")],
        required_by={"vars": "src"},
    )
    guest = Guest(opened(module.params), module.params, module.check_mode)
    try:
        result = ensure(guest, module.params, module.tmpdir)
    except XtoolError as error:
        fail(module, error, changes=guest.changes, actions=guest.actions)
    module.exit_json(**result, changes=guest.changes, diff=diff(guest))


if __name__ == "__main__":
    main()
