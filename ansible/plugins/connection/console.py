"""Connection plugin: a shell behind a guest's console."""

from __future__ import annotations

DOCUMENTATION = r"""
name: console
short_description: A shell behind a guest's console
description:
  - For guests that no network reaches. Commands are carried out, and files go to and fro, by a shell on the guest's
    console.
  - It wants a shell there, or a login (O(remote_user), O(password)), and C(sh), C(stty), C(base64) and C(sha256sum),
    which coreutils and busybox have. Modules other than M(ansible.builtin.raw) and M(ansible.builtin.script) want
    Python, as anywhere.
  - Every task opens the console anew and logs in, which takes about a second. Files go as text, far slower than over a
    network; 16 MiB are the most for one.
  - Nobody else can use the console meanwhile, unless xtool serves it (C(console_backend=xtool) in the guest's
    configuration). Two tasks at a time for one guest cannot be.
version_added: 0.1.0
author:
  - The xtool authors
options:
  guest:
    description: The guest, by name, id or uuid.
    type: str
    default: inventory_hostname
    vars:
      - name: inventory_hostname
      - name: xtool_guest
  host:
    description:
      - Where the guest is, as xtool's C(-H) takes it. Without it, on the controller. The inventory plugin
        P(xtool.xen.guests#inventory) sets it.
    type: str
    vars:
      - name: xtool_target
  executable:
    description: The xtool to run on the controller; a name that is looked for in E(PATH), or a path.
    type: str
    default: xtool
    vars:
      - name: xtool_executable
  remote_user:
    description: Who to log in as, where the console asks for it. The login ends with the task.
    type: str
    vars:
      - name: ansible_user
    keyword:
      - name: remote_user
  password:
    description: That user's password.
    type: str
    vars:
      - name: ansible_password
  timeout:
    description: How long the console may take for one answer, in seconds; a guest that is still booting, too.
    type: float
    default: 60
    vars:
      - name: xtool_console_timeout
  command_timeout:
    description: How long a command may take, in seconds. It is interrupted then, as by Ctrl-C.
    type: float
    default: 3600
    vars:
      - name: xtool_command_timeout
  number:
    description: Which of the guest's consoles; V(0), or a channel.
    type: int
    default: 0
    vars:
      - name: xtool_console_number
requirements:
  - xtool on the controller
"""

EXAMPLES = r"""
# group_vars/isolated.yml
ansible_connection: xtool.xen.console
xtool_target: ssh://root@alpha
ansible_user: root
ansible_password: "{{ console_password }}"
ansible_remote_tmp: /tmp
"""

import os
from typing import Any

from ansible.errors import AnsibleConnectionFailure, AnsibleError, AnsibleFileNotFound
from ansible.plugins.connection import ConnectionBase, ensure_connect
from ansible_collections.xtool.xen.plugins.module_utils.console import Console, ConsoleError
from ansible_collections.xtool.xen.plugins.module_utils.shell import SIZE_MAX, Shell
from ansible_collections.xtool.xen.plugins.module_utils.xtool import Xtool, console_argv


class Connection(ConnectionBase):
    transport = "xtool.xen.console"
    has_pipelining = True
    has_tty = False
    _shell_on_it: Shell | None = None

    def _connect(self) -> Connection:
        if self._shell_on_it is None:
            xtool = Xtool(self.get_option("host"), self.get_option("executable"))
            argv = console_argv(xtool, self.get_option("guest"), self.get_option("number"))
            self._display.vvv(f"CONSOLE {argv}", host=self.get_option("guest"))
            try:
                shell = Shell(
                    Console(argv, self.get_option("timeout")),
                    self.get_option("remote_user"),
                    self.get_option("password"),
                )
                shell.__enter__()
            except ConsoleError as error:
                raise AnsibleConnectionFailure(str(error)) from None
            self._shell_on_it = shell
            self._connected = True
        return self

    @ensure_connect
    def exec_command(
        self, cmd: str, in_data: bytes | None = None, sudoable: bool = True
    ) -> tuple[int, bytes, bytes]:
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        self._display.vvv(f"EXEC {cmd}", host=self.get_option("guest"))
        try:
            done = self._there().run(cmd, in_data or b"", self.get_option("command_timeout"))
        except ConsoleError as error:
            raise self._lost(error) from None
        return done.rc, done.stdout, done.stderr

    @ensure_connect
    def put_file(self, in_path: str, out_path: str) -> None:
        super().put_file(in_path, out_path)
        self._display.vvv(f"PUT {in_path} TO {out_path}", host=self.get_option("guest"))
        if not os.path.exists(in_path):
            raise AnsibleFileNotFound(f"there is no file {in_path}")
        if os.path.getsize(in_path) > SIZE_MAX:
            raise AnsibleError(f"{in_path} is larger than the {SIZE_MAX} bytes that go over a console")
        with open(in_path, "rb") as file:
            data = file.read()
        try:
            self._there().put(data, out_path)
        except ConsoleError as error:
            raise self._lost(error) from None

    @ensure_connect
    def fetch_file(self, in_path: str, out_path: str) -> None:
        super().fetch_file(in_path, out_path)
        self._display.vvv(f"FETCH {in_path} TO {out_path}", host=self.get_option("guest"))
        try:
            data = self._there().get(in_path)
        except ConsoleError as error:
            raise self._lost(error) from None
        with open(out_path, "wb") as file:
            file.write(data)

    def reset(self) -> None:
        self.close()
        self._connect()

    def close(self) -> None:
        shell, self._shell_on_it = self._shell_on_it, None
        self._connected = False
        if shell is not None:
            shell.close()

    def _there(self) -> Shell:
        assert self._shell_on_it is not None
        return self._shell_on_it

    def _lost(self, error: ConsoleError) -> Any:
        """What is in the console now, nobody knows: the next command begins with a new one."""
        self.close()
        return AnsibleConnectionFailure(str(error))
