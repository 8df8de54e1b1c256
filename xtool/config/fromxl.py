"""An xl.cfg made a domain file: what xl would have done, in xtool's words.

The settings become the same tree a domain file is read into, with marks that point into the xl.cfg, and go
through the same checks. What these refuse is taken out and told, until the rest is a domain; so what
``convert`` carries over is what ``create`` takes, and the reasons are the same.

xl's own defaults that differ from xtool's are written out: a guest without a type is PV, one without memory
has 32 MiB, an HVM guest has a VNC display.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from xtool.config.load import PLAIN, finish, read_text
from xtool.config.model import FIELDS, DomainConfig, about
from xtool.config.nodes import Entry, ListNode, MapNode, Mark, Node, Scalar, ScalarNode, Source
from xtool.config.problems import ConfigErrors, problems_of
from xtool.config.seed import to_yaml
from xtool.config.units import split_listen
from xtool.config.xlcfg import Setting, parse_xlcfg, to_long
from xtool.config.xlkeys import UNSUPPORTED
from xtool.config.xlspecs import Spec, read_channel, read_disk, read_vif
from xtool.errors import ConfigError

#: Keys of a domain file that xl does not know: in an xl.cfg they mean nothing.
OWN = ("cloud_init", "console_backend", "depends_on", "extends", "on_dm_exit", "ready")
_SPECS: dict[str, Callable[[str], Spec]] = {"disk": read_disk, "vif": read_vif, "channel": read_channel}
#: Numbers that xl still takes for words.
_NUMBERED = {
    "tsc_mode": ("default", "always_emulate", "native", "native_paravirt"),
    "timer_mode": (
        "delay_for_missed_ticks",
        "no_delay_for_missed_ticks",
        "no_missed_ticks_pending",
        "one_missed_tick_pending",
    ),
}
_BUILDERS = {"hvm": "hvm", "generic": "pv", "linux": "pv"}
_STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")


class Converted(NamedTuple):
    """``text`` is the domain file, ``notes`` a line for each thing that is not in it; ``config`` is None when
    something every domain needs is missing in the xl.cfg."""

    text: str
    notes: list[str]
    config: DomainConfig | None


def convert_file(path: str) -> Converted:
    """Raises ``ConfigError`` for what is no xl.cfg: what xl would not read either."""
    return convert(read_text(path, "configuration"), path, os.path.dirname(os.path.abspath(path)))


def convert(text: str, name: str = "<text>", base_dir: str | None = None) -> Converted:
    """The same for a text; relative paths are taken to be relative to ``base_dir``."""
    folder = base_dir or os.getcwd()
    source = Source(name, text)
    settings, errors = parse_xlcfg(source, text)
    if errors:
        raise errors[0] if len(errors) == 1 else ConfigErrors(errors)
    maker = _Maker(Mark(source, 1, 1))
    root = maker.tree(settings)
    config, missing = _weed(root, folder, maker.note)
    maker.notes.sort(key=lambda line: int(line.split(":")[0].removeprefix("line ")))
    body = config.to_yaml() if config else to_yaml(root.data())
    return Converted(_headed(body, name, maker.notes, missing), [*maker.notes, *missing], config)


def _headed(body: str, name: str, notes: list[str], missing: list[str]) -> str:
    lines = [f"# Made from {os.path.basename(name)}."]
    if missing:
        lines += ["# It is not whole:", *(f"#   {line}" for line in missing)]
    if notes:
        lines += ["# Not carried over, or changed:", *(f"#   {line}" for line in notes)]
    head = "".join("".join(c if c.isprintable() else "?" for c in line) + "\n" for line in lines)
    whole = f"{head}\n{body}"
    return f"{PLAIN}\n{whole}" if "{{" in whole or "{%" in whole else whole


def _weed(
    root: MapNode, folder: str, note: Callable[[Mark, str], None]
) -> tuple[DomainConfig | None, list[str]]:
    """Take out what is refused, until the rest is a domain; else what is missing for one."""
    while True:
        try:
            return finish(_clone(root), folder).config, []
        except ConfigError as error:
            problems = problems_of(error)
        taken = False
        for problem in _last_first(problems):
            if _remove(root, problem.key):
                taken = True
                note(_place(root, problem), problem.message)
        if not taken:
            return None, list(dict.fromkeys(problem.message for problem in problems))


def _place(root: MapNode, problem: ConfigError) -> Mark:
    return root.mark._replace(line=problem.line, column=problem.column)


def _last_first(problems: Iterable[ConfigError]) -> list[ConfigError]:
    """So that taking out an entry of a list does not move those that are still to be taken out."""
    first = {problem.key: problem for problem in reversed(list(problems))}
    return sorted(
        first.values(), key=lambda p: [int(n) for n in re.findall(r"\[(\d+)\]", p.key)], reverse=True
    )


def _remove(root: MapNode, key: str) -> bool:
    steps: list[str | int] = [int(n) if n else word for n, word in _STEP.findall(key)]
    if not steps:
        return False
    node: Node = root
    for step in steps[:-1]:
        if isinstance(node, MapNode) and step in node.entries:
            node = node.entries[str(step)].value
        elif isinstance(node, ListNode) and isinstance(step, int) and step < len(node.items):
            node = node.items[step]
        else:
            return _remove(root, str(steps[0]))
    if steps == ["cmdline"] and "cmdline" not in root.entries:  # made of these two
        made_of = [key for key in ("root", "extra") if root.entries.pop(key, None)]
        return bool(made_of)
    last = steps[-1]
    if isinstance(node, MapNode) and last in node.entries:
        del node.entries[str(last)]
        return True
    if isinstance(node, ListNode) and isinstance(last, int) and last < len(node.items):
        del node.items[last]
        return True
    return len(steps) > 1 and _remove(root, str(steps[0]))


def _clone(node: MapNode) -> MapNode:
    return MapNode(node.mark, {key: Entry(e.mark, _clone_any(e.value)) for key, e in node.entries.items()})


def _clone_any(node: Node) -> Node:
    if isinstance(node, MapNode):
        return _clone(node)
    return ListNode(node.mark, [_clone_any(n) for n in node.items]) if isinstance(node, ListNode) else node


class _Maker:
    """Settings to a domain file's tree, and notes on what was left out or changed."""

    def __init__(self, start: Mark) -> None:
        self._start = start
        self.notes: list[str] = []
        self._root = MapNode(start, {})
        self._settings: dict[str, Setting] = {}

    def note(self, mark: Mark, text: str) -> None:
        line = f"line {mark.line}: {text}"
        if line not in self.notes:
            self.notes.append(line)

    def tree(self, settings: list[Setting]) -> MapNode:
        self._settings = {setting.name: setting for setting in settings}
        for setting in settings:
            if setting.repeated is not None:
                self.note(setting.repeated, f"{setting.name} is given again later, and xl takes the last one")
        self._put("name", self._settings.get("name"))
        self._type()
        for setting in settings:
            if setting.name not in ("name", "type", "builder"):
                self._one(setting)
        self._defaults()
        return self._root

    def _put(self, key: str, setting: Setting | None, value: Node | None = None) -> None:
        if setting is not None:
            self._root.entries[key] = Entry(setting.mark, value or setting.value)

    def _add(self, key: str, text: str, mark: Mark | None = None) -> None:
        at = mark or self._start
        self._root.entries[key] = Entry(at, ScalarNode(at, Scalar(text)))

    def _text(self, name: str) -> str | None:
        setting = self._settings.get(name)
        value = setting.value if setting else None
        return str(value.value) if isinstance(value, ScalarNode) else None

    def _number(self, name: str) -> int | None:
        return to_long(self._text(name) or "")

    @property
    def _guest(self) -> str | None:
        return self._root.text("type")

    def _type(self) -> None:
        kind, builder = self._settings.get("type"), self._settings.get("builder")
        if kind is not None:
            self._put("type", kind)
        elif builder is not None:
            word = self._text("builder") or ""
            self._add("type", _BUILDERS.get(word, word), builder.mark)
        else:
            self._add("type", "pv")

    def _one(self, setting: Setting) -> None:
        name = setting.name
        special = getattr(self, f"_key_{name}", None)
        if name in OWN:
            self.note(setting.mark, f"xl has no key {name}")
        elif special is not None:
            special(setting)
        elif name in _SPECS:
            self._specs(setting, _SPECS[name])
        elif name in UNSUPPORTED:
            if not self._off(setting):
                self._put(name, setting)
        elif name in FIELDS:
            self._put(name, setting, self._value(setting, about(name, "kind")))
        else:
            self._put(name, setting)

    def _off(self, setting: Setting) -> bool:
        """An unsupported key that switches off what xtool does not have says nothing new."""
        value = setting.value
        if isinstance(value, ListNode):
            return not value.items
        return isinstance(value, ScalarNode) and (to_long(value.value) == 0 or value.value == "")

    def _value(self, setting: Setting, kind: str) -> Node:
        node = setting.value
        if isinstance(node, ScalarNode) and setting.name in _NUMBERED:
            number, words = to_long(node.value), _NUMBERED[setting.name]
            if number is not None and 0 <= number < len(words):
                return ScalarNode(node.mark, Scalar(words[number], True))
        if isinstance(node, ScalarNode) and kind in ("number", "seconds", "size", "switch", "switch or list"):
            number = to_long(node.value)
            if number is None:
                return node
            text = str(int(bool(number))) if kind.startswith("switch") else str(number)
            return ScalarNode(node.mark, Scalar(text))
        if isinstance(node, ScalarNode):
            return ScalarNode(node.mark, Scalar(str(node.value), True), node.verbatim)
        if isinstance(node, ListNode):
            items = [
                ScalarNode(item.mark, Scalar(str(item.value), True)) if isinstance(item, ScalarNode) else item
                for item in node.items
            ]
            return ListNode(node.mark, items)
        return node

    def _specs(self, setting: Setting, read: Callable[[str], Spec]) -> None:
        if not isinstance(setting.value, ListNode):
            self.note(setting.mark, f"{setting.name} is no list: xl ignores it")
            return
        items: list[Node] = []
        for item in setting.value.items:
            if not isinstance(item, ScalarNode):
                self.note(item.mark, f"{setting.name}: a text is wanted in this list")
                continue
            spec = read(str(item.value))
            for text in spec.notes:
                self.note(item.mark, text)
            made = MapNode(item.mark, {})
            for key, value in spec.values.items():
                made.entries[key] = Entry(item.mark, ScalarNode(item.mark, Scalar(value)))
            items.append(made)
        if items:
            self._put(setting.name, setting, ListNode(setting.value.mark, items))

    # --- keys that are others in a domain file --------------------------------------------------------
    def _key_bios(self, setting: Setting) -> None:
        if "firmware" not in self._settings:
            self._put("firmware", setting)

    def _key_stdvga(self, setting: Setting) -> None:
        if self._number("stdvga") and "vga" not in self._settings:
            self._add("vga", "stdvga", setting.mark)

    def _key_nographic(self, setting: Setting) -> None:
        if self._number("nographic") and "vga" not in self._settings:
            self._add("vga", "none", setting.mark)

    def _key_device_model_version(self, setting: Setting) -> None:
        if self._text("device_model_version") != "qemu-xen":
            self._put(setting.name, setting)

    def _key_device_model_args(self, setting: Setting) -> None:
        name = "device_model_args" if self._guest == "hvm" else "device_model_args_pv"
        if name == setting.name or name not in self._settings:
            self._put(name, setting, self._value(setting, "text or list"))

    def _key_kernel(self, setting: Setting) -> None:
        path = self._text("kernel") or ""
        if self._guest == "hvm" and path.rpartition("/")[2] == "hvmloader":
            self.note(setting.mark, "kernel: xl ignores hvmloader here; firmware_override is the key for it")
        else:
            self._put("kernel", setting, self._value(setting, "path"))

    def _key_boot(self, setting: Setting) -> None:
        text = self._text("boot")
        if text is None:
            self._put("boot", setting)
            return
        known = "".join(dict.fromkeys(letter for letter in text if letter in "cdn"))
        if known != text:
            self.note(setting.mark, f"boot: of {text!r} xtool takes {known!r}")
        if known:
            self._put("boot", setting, ScalarNode(setting.value.mark, Scalar(known, True)))

    def _key_vncunused(self, setting: Setting) -> None:
        # With a display number, not looking for another is what xtool does anyway.
        display = split_listen(self._text("vnclisten") or "")[1]
        if self._number("vncunused") != 0 or (self._number("vncdisplay") is None and display is None):
            self._put("vncunused", setting, self._value(setting, "switch"))

    def _key_maxmem(self, setting: Setting) -> None:
        self._put("maxmem", setting, self._value(setting, "size"))
        if "memory" not in self._settings and (size := self._number("maxmem")) is not None:
            self._add("memory", str(size), setting.mark)

    def _merged(self, setting: Setting) -> None:
        if "cmdline" in self._settings:
            self.note(setting.mark, f"{setting.name}: xl ignores it beside cmdline")
        else:
            self._put(setting.name, setting, self._value(setting, "text"))

    _key_root = _key_extra = _merged

    def _defaults(self) -> None:
        """What xl does where nothing is said, and xtool does not."""
        if "memory" not in self._root.entries:
            self._add("memory", "32")
        for key in ("usbversion", "usbdevice"):
            if key in self._root.entries and self._guest == "hvm":
                self._add("usb", "1", self._root.entries[key].mark)
        if self._guest == "hvm" and "vnc" not in self._settings and self._root.text("vga") != "none":
            self._add("vnc", "1")
