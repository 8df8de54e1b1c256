"""Inventory plugin: the guests of Xen hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
name: guests
short_description: The guests of Xen hosts
description:
  - Every guest of one host or several, as C(xtool list) has them, asked from the controller.
  - The file's name ends in C(xtool.yml) or C(xtool.yaml).
  - Each guest is in the groups C(xtool), C(xtool_host_NAME), C(xtool_type_TYPE) and C(xtool_state_STATE).
  - Its variables are C(xtool_host), C(xtool_domid), C(xtool_uuid), C(xtool_type), C(xtool_state), C(xtool_memory) (bytes),
    C(xtool_vcpus) and C(xtool_addresses), and what P(xtool.xen.console#connection) wants to know; C(xtool_guest) and
    C(xtool_target).
  - C(xtool_addresses) are those that the C(ip) of its interfaces has. Where there is one, the first is C(ansible_host).
    What a guest gets from a DHCP server is not known.
version_added: 0.1.0
extends_documentation_fragment:
  - constructed
options:
  plugin:
    description: This plugin.
    required: true
    choices: [xtool.xen.guests]
  hosts:
    description:
      - The hosts, each a name and what xtool's C(-H) takes for it, such as V(ssh://root@alpha). Null is this machine.
    type: dict
    default: {localhost: null}
  executable:
    description: The xtool to run; a name that is looked for in E(PATH), or a path.
    type: str
    default: xtool
  qualified:
    description: Call the guests V(GUEST.HOST). Needed where two hosts have guests of one name.
    type: bool
    default: false
requirements:
  - xtool on the controller
author:
  - The xtool authors
"""

EXAMPLES = r"""
# site.xtool.yml
plugin: xtool.xen.guests
hosts:
  alpha: ssh://root@alpha.example.org
  beta: ssh://root@beta.example.org
compose:
  ansible_user: "'debian'"
groups:
  web: inventory_hostname is match('web')
"""

from typing import Any

from ansible.errors import AnsibleParserError
from ansible.plugins.inventory import BaseInventoryPlugin, Constructable
from ansible.utils.unsafe_proxy import wrap_var
from ansible_collections.xtool.xen.plugins.module_utils.xtool import Xtool, XtoolError


class InventoryModule(BaseInventoryPlugin, Constructable):
    NAME = "xtool.xen.guests"

    def verify_file(self, path: str) -> bool:
        return super().verify_file(path) and path.endswith(("xtool.yml", "xtool.yaml"))

    def parse(self, inventory: Any, loader: Any, path: str, cache: bool = True) -> None:
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        seen: dict[str, str] = {}
        for host, target in self.get_option("hosts").items():
            try:
                found = Xtool(target, self.get_option("executable")).domains()
            except XtoolError as error:
                raise AnsibleParserError(f"the guests of {host}: {error.message}") from None
            for one in found:
                name = f"{one['name']}.{host}" if self.get_option("qualified") else one["name"]
                if name in seen:
                    raise AnsibleParserError(
                        f"{seen[name]} and {host} both have a guest {name}: qualified: true tells them apart"
                    )
                seen[name] = host
                self._add(name, host, target, one)

    def _add(self, name: str, host: str, target: str | None, found: dict[str, Any]) -> None:
        assert self.inventory is not None
        self.inventory.add_host(name)
        for group in (
            "xtool",
            f"xtool_host_{host}",
            f"xtool_type_{found['type']}",
            f"xtool_state_{found['state']}",
        ):
            self.inventory.add_child(self.inventory.add_group(self._sanitize_group_name(group)), name)
        told = addresses(found["config"] or {})
        values = {key: found[key] for key in ("domid", "uuid", "type", "state", "memory", "vcpus")}
        values |= {"host": host, "addresses": told, "guest": found["name"]}
        values |= {"target": target} if target else {}
        # What a host says is no template.
        variables = {f"xtool_{key}": wrap_var(value) for key, value in values.items()}
        if told:
            variables["ansible_host"] = wrap_var(told[0])
        for key, value in variables.items():
            self.inventory.set_variable(name, key, value)
        strict = self.get_option("strict")
        self._set_composite_vars(self.get_option("compose"), variables, name, strict=strict)
        self._add_host_to_composed_groups(self.get_option("groups"), variables, name, strict=strict)
        self._add_host_to_keyed_groups(self.get_option("keyed_groups"), variables, name, strict=strict)


def addresses(config: dict[str, Any]) -> list[str]:
    """Of a configuration's interfaces, without the lengths of their networks. Pure."""
    found: list[str] = []
    for vif in config.get("vif") or ():
        words = vif.get("ip") or ""
        found += words if isinstance(words, list) else str(words).replace(",", " ").split()
    return [one.partition("/")[0] for one in found]
