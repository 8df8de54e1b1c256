#!/usr/bin/python
"""Ansible module: what a guest's console is told, and what it answers."""

from __future__ import annotations

DOCUMENTATION = r"""
module: guest_command
short_description: A command in a guest, or a talk with it, over its console
description:
  - For guests that no network reaches. With O(command), a command is carried out by a shell behind the guest's console.
    With O(talk), lines are typed and what is printed is waited for.
  - Nobody else can use the console meanwhile, unless xtool serves it (C(console_backend=xtool) in the guest's
    configuration).
  - Several tasks in a guest are easier with the connection plugin P(xtool.xen.console#connection).
version_added: 0.1.0
options:
  guest:
    description: The guest, by name, id or uuid.
    type: str
    required: true
  command:
    description:
      - A command line for C(sh). It has no terminal. What it prints is given back whole; V(16) MiB are the most.
      - Exactly one of O(command) and O(talk) is needed.
    type: str
  stdin:
    description: What O(command) is to read.
    type: str
  talk:
    description: What to wait for and what to type, in order.
    type: list
    elements: dict
    suboptions:
      expect:
        description:
          - Words that one line is to have; V(*) stands for anything. A line need not have ended, so a prompt is one.
          - What a console that xtool serves has printed since the boot counts, until something is typed.
        type: str
      send:
        description:
          - A line to type once the words came. An empty one is the Enter key.
          - It is shown in the module's results; where it is a secret, give the task C(no_log).
        type: str
      timeout:
        description: How long the words may take, in seconds. O(timeout) without it.
        type: float
  user:
    description:
      - Who to log in as for O(command), where the console asks for it. The login ends with the module.
      - Without it, a shell must be there already.
    type: str
  password:
    description: That user's password.
    type: str
  timeout:
    description: How long the console may take for one answer, in seconds; a guest that is still booting, too.
    type: float
    default: 60
  command_timeout:
    description: How long O(command) may take, in seconds. It is interrupted then, as by Ctrl-C.
    type: float
    default: 600
  number:
    description: Which of the guest's consoles; V(0), or a channel.
    type: int
    default: 0
extends_documentation_fragment:
  - xtool.xen.xtool
attributes:
  check_mode:
    support: none
    description: It is skipped.
author:
  - The xtool authors
"""

EXAMPLES = r"""
- name: The address it got
  xtool.xen.guest_command:
    host: ssh://root@alpha
    guest: web
    user: root
    password: "{{ console_password }}"
    command: ip -brief address show eth0
  register: address
  changed_when: false

- name: Answer an installer
  xtool.xen.guest_command:
    guest: web
    timeout: 600
    talk:
      - {expect: "Install*[y/n]", send: "y"}
      - {expect: "reboot now?", send: ""}

- name: Wait until it has booted
  xtool.xen.guest_command:
    guest: web
    timeout: 300
    talk:
      - expect: "web login:"
"""

RETURN = r"""
rc:
  description: The exit status of O(command). One that is not 0 is a failure.
  returned: with O(command)
  type: int
stdout:
  description: What it printed.
  returned: with O(command)
  type: str
stdout_lines:
  description: The same in lines.
  returned: with O(command)
  type: list
  elements: str
stderr:
  description: What it printed as errors.
  returned: with O(command)
  type: str
seen:
  description: For each step of O(talk), what was printed up to the words it waited for.
  returned: with O(talk)
  type: list
  elements: str
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.xtool.xen.plugins.module_utils.console import Console, ConsoleError
from ansible_collections.xtool.xen.plugins.module_utils.shell import Shell
from ansible_collections.xtool.xen.plugins.module_utils.xtool import (
    SHARED_OPTIONS,
    console_argv,
    opened,
)

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    **SHARED_OPTIONS,
    "guest": {"type": "str", "required": True},
    "command": {"type": "str"},
    "stdin": {"type": "str"},
    "talk": {
        "type": "list",
        "elements": "dict",
        "options": {"expect": {"type": "str"}, "send": {"type": "str"}, "timeout": {"type": "float"}},
    },
    "user": {"type": "str"},
    "password": {"type": "str", "no_log": True},
    "timeout": {"type": "float", "default": 60.0},
    "command_timeout": {"type": "float", "default": 600.0},
    "number": {"type": "int", "default": 0},
}


def talk(console: Console, steps: list[dict[str, Any]]) -> list[str]:
    """What was printed up to what each step waited for."""
    seen = []
    for step in steps:
        text = b""
        if step["expect"] is not None:
            text = console.wait_for(step["expect"], step["timeout"])
        if step["send"] is not None:
            # What was printed before is not its answer.
            console.settle()
            console.send(f"{step['send']}\n".encode())
        seen.append(text.decode(errors="backslashreplace"))
    return seen


def run(shell: Shell, params: dict[str, Any]) -> dict[str, Any]:
    done = shell.run(params["command"], (params["stdin"] or "").encode(), params["command_timeout"])
    return {
        "rc": done.rc,
        "stdout": done.stdout.decode(errors="backslashreplace"),
        "stderr": done.stderr.decode(errors="backslashreplace"),
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec=ARGUMENT_SPEC,
        supports_check_mode=False,
        mutually_exclusive=[("command", "talk"), ("stdin", "talk")],
        required_one_of=[("command", "talk")],
    )
    params = module.params
    argv = console_argv(opened(params), params["guest"], params["number"])
    try:
        with Console(argv, params["timeout"]) as console:
            if params["talk"] is not None:
                module.exit_json(changed=True, seen=talk(console, params["talk"]))
            with Shell(console, params["user"], params["password"]) as shell:
                done = run(shell, params)
    except ConsoleError as error:
        module.fail_json(msg=str(error))
    if done["rc"]:
        module.fail_json(msg=f"the command ended with status {done['rc']}", changed=True, **done)
    module.exit_json(changed=True, **done)


if __name__ == "__main__":
    main()
