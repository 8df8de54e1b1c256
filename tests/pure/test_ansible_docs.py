"""The Ansible collection: what its plugins take and what their documentation says are the same; examples and
the playbooks name modules and options that are there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from docblocks import blocks

ROOT = Path(__file__).parents[2]
COLLECTION = ROOT / "ansible"
MODULES = sorted(path.stem for path in (COLLECTION / "plugins/modules").glob("*.py"))
PLAYBOOKS = sorted(COLLECTION.glob("playbooks/*.yml"))
pytest.importorskip("ansible")


@cache
def texts(path: Path) -> dict[str, str]:
    """The texts a plugin has at its top: DOCUMENTATION, EXAMPLES, RETURN."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            [target] = node.targets
            if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                found[target.id] = node.value.value
    return found


def module(name: str) -> Path:
    return COLLECTION / "plugins/modules" / f"{name}.py"


def documented(name: str) -> dict[str, dict[str, Any]]:
    """A module's options, with those of the fragments it names."""
    said = yaml.safe_load(texts(module(name))["DOCUMENTATION"])
    options = dict(said["options"])
    for fragment in said.get("extends_documentation_fragment", ()):
        path = COLLECTION / "plugins/doc_fragments" / f"{fragment.removeprefix('xtool.xen.')}.py"
        options |= yaml.safe_load(texts(path)["DOCUMENTATION"])["options"]
    return options


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The collection under the name ansible gives it."""
    (tmp_path / "ansible_collections/xtool").mkdir(parents=True)
    (tmp_path / "ansible_collections/xtool/xen").symlink_to(COLLECTION)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith("ansible_collections")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", MODULES)
def test_options_are_those_of_the_documentation(name: str, importable: None) -> None:
    spec = importlib.import_module(f"ansible_collections.xtool.xen.plugins.modules.{name}").ARGUMENT_SPEC
    options = documented(name)
    assert set(spec) == set(options)
    for option, wanted in spec.items():
        said = options[option]
        assert said["description"], option
        for field in ("type", "elements", "choices", "default", "required"):
            assert said.get(field) == wanted.get(field), f"{option}: {field}"


def check_tasks(tasks: list[dict[str, Any]], where: str) -> int:
    """Each of our modules in them is there and has these options: how many were seen."""
    seen = 0
    for task in tasks:
        seen += check_tasks(task.get("block", []), where)
        for key, given in task.items():
            if key.startswith("xtool.xen."):
                name = key.removeprefix("xtool.xen.")
                assert name in MODULES, f"{where}: {key}"
                options = documented(name)
                for option, value in (given or {}).items():
                    assert option in options, f"{where}: {key} has no option {option}"
                    choices = options[option].get("choices")
                    assert choices is None or value in choices, f"{where}: {option}: {value}"
                needed = {option for option, said in options.items() if said.get("required")}
                assert needed <= set(given or {}), f"{where}: {key}"
                seen += 1
    return seen


def check_plays(plays: list[dict[str, Any]], where: str) -> int:
    return sum(
        check_tasks(play.get(part, []), where)
        for play in plays
        for part in ("tasks", "pre_tasks", "post_tasks", "handlers")
    )


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_tasks(name: str) -> None:
    tasks = yaml.safe_load(texts(module(name))["EXAMPLES"])
    assert check_tasks(tasks, name)
    assert any(f"xtool.xen.{name}" in task for task in tasks)
    assert yaml.safe_load(texts(module(name))["RETURN"])


def test_every_module_is_in_the_action_group() -> None:
    """But for those that run no xtool."""
    group = yaml.safe_load((COLLECTION / "meta/runtime.yml").read_text())["action_groups"]["guests"]
    assert sorted(group) == [name for name in MODULES if "host" in documented(name)]


def test_inventory_documentation() -> None:
    said = texts(COLLECTION / "plugins/inventory/guests.py")
    options = yaml.safe_load(said["DOCUMENTATION"])["options"]
    example = yaml.safe_load(said["EXAMPLES"])
    # The rest is of Ansible's own fragment "constructed".
    assert set(example) <= set(options) | {"compose", "groups", "keyed_groups", "strict"}
    assert example["plugin"] in options["plugin"]["choices"]


def test_connection_documentation() -> None:
    """Every option that is read is there, and each is read; the example's variables are some option's."""
    path = COLLECTION / "plugins/connection/console.py"
    options = yaml.safe_load(texts(path)["DOCUMENTATION"])["options"]
    assert set(re.findall(r'get_option\("(\w+)"\)', path.read_text())) == set(options)
    variables = {each["name"] for said in options.values() for each in said.get("vars", ())}
    example = yaml.safe_load(texts(path)["EXAMPLES"])
    assert set(example) <= variables | {"ansible_connection", "ansible_remote_tmp"}
    inventory = (COLLECTION / "plugins/inventory/guests.py").read_text()
    assert all(f"C({name})" in inventory for name in ("xtool_guest", "xtool_target")) and variables >= {
        "xtool_guest",
        "xtool_target",
    }


@pytest.mark.parametrize("path", PLAYBOOKS, ids=lambda path: path.name)
def test_playbooks(path: Path) -> None:
    assert check_plays(yaml.safe_load(path.read_text()), path.name)


def test_blocks_of_the_page() -> None:
    seen = 0
    for block in blocks(ROOT / "docs/ansible.md"):
        if block.language == "yaml":
            found = yaml.safe_load(block.text)
            if isinstance(found, list):
                seen += check_plays(found, block.where) + check_tasks(found, block.where)
    assert seen
