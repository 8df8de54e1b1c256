"""xtool's command line, as the modules and plugins use it: one place that runs it and reads its JSON.

Facts about xtool's command line
--------------------------------
- ``-o json`` prints the same records as the Python client has, on standard output alone.
- The exit status tells what went wrong (docs/exit-codes.md); 9: there is no such domain. What failed stands on
  standard error as ``error: ...`` and, where there is something to do about it, ``hint: ...``.
- What follows ``--`` is never an option, so a name that begins with a dash does no harm.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

#: Options of every module that runs xtool; ``doc_fragments/xtool.py`` documents them.
SHARED_OPTIONS: dict[str, dict[str, Any]] = {
    "host": {"type": "str"},
    "executable": {"type": "str", "default": "xtool"},
}

NO_DOMAIN = 9
#: Beginning of a domain file that is taken as it stands: no template.
PLAIN = "# xtool: plain"
#: States of a domain that has ended, but is still there.
ENDED = ("shutdown", "crashed", "dying")


class Done(NamedTuple):
    argv: list[str]
    rc: int
    stdout: str
    stderr: str


class XtoolError(Exception):
    """xtool refused or failed; ``message`` is all it said."""

    def __init__(self, message: str, done: Done | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.done = done


class Xtool:
    """Runs ``executable -H host``. Every method raises ``XtoolError``."""

    def __init__(self, host: str | None = None, executable: str | None = None) -> None:
        self.host = host or ""
        self._start = [executable or "xtool", *(["-H", host] if host else [])]

    def argv(self, *words: str) -> list[str]:
        return [*self._start, *words]

    def run(self, *words: str) -> Done:
        """Carry a command line out; any exit status is returned."""
        argv = self.argv(*words)
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        except OSError as error:
            raise XtoolError(
                f"cannot run {argv[0]}: {error.strerror}. Is xtool installed where this runs? "
                "The option executable names it, delegate_to another machine."
            ) from None
        text = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        return Done(argv, done.returncode, *text)

    def json(self, *words: str, allowed: Sequence[int] = ()) -> Any:
        """What ``xtool VERB ... -o json`` prints: ``words`` are the verb and its options, and from a "--" on
        arguments. ``allowed``: exit statuses besides 0 that are no error."""
        at = words.index("--") if "--" in words else len(words)
        done = self.run(*words[:at], "-o", "json", *words[at:])
        if done.rc != 0 and done.rc not in allowed:
            raise failure(done)
        try:
            return json.loads(done.stdout)
        except ValueError:
            raise XtoolError(
                f"xtool {words[0]} printed no JSON: {done.stdout[:200]!r}. Is {done.argv[0]} an xtool that fits "
                "this collection?",
                done,
            ) from None

    def domain(self, name: str) -> dict[str, Any] | None:
        """The domain of that name (or id, or uuid) as ``xtool list`` has it; None if there is none."""
        try:
            found: list[dict[str, Any]] = self.json("list", "--", name)
        except XtoolError as error:
            if error.done is not None and error.done.rc == NO_DOMAIN:
                return None
            raise
        return found[0] if found else None

    def domains(self) -> list[dict[str, Any]]:
        """All guests, each with its ``config`` (None for those xtool did not create)."""
        return [one for one in self.json("list", "--long") if one["domid"] != 0]


def failure(done: Done) -> XtoolError:
    """The error for a command line that failed: its own words, without the ``error:`` in front and what it told on
    its way there."""
    lines = [line.rstrip() for line in done.stderr.splitlines() if line.strip()]
    first = next((at for at, line in enumerate(lines) if line.startswith("error: ")), 0)
    lines = lines[first:]
    text = "\n".join(lines) or f"{done.argv[0]} ended with status {done.rc} and said nothing"
    return XtoolError(text.removeprefix("error: "), done)


def console_argv(xtool: Xtool, guest: str, number: int = 0) -> list[str]:
    """The command line that is a guest's console, for ``console.Console``."""
    which = ["-n", str(number)] if number else []
    return xtool.argv("console", *which, "--", guest)


def opened(params: dict[str, Any]) -> Xtool:
    """The command line that a module's parameters ask for."""
    return Xtool(params["host"], params["executable"])


def fail(module: Any, error: XtoolError, **more: Any) -> NoReturn:
    """End the module with what xtool said."""
    if error.done is not None:
        more |= {"cmd": error.done.argv, "rc": error.done.rc, "stderr": error.done.stderr}
    module.fail_json(msg=error.message, **more)
    raise AssertionError("fail_json does not return")


def finish(module: Any, work: Callable[[Xtool], dict[str, Any]]) -> None:
    """End the module with what ``work`` made of the command line, or with what xtool said against it."""
    try:
        result = work(opened(module.params))
    except XtoolError as error:
        fail(module, error)
    module.exit_json(**result)


def written(text: str, folder: str) -> str:
    """A file in ``folder`` that only its owner reads, with ``text``."""
    handle, path = tempfile.mkstemp(prefix="xtool-", suffix=".yaml", dir=folder)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    return path


def domain_file(config: dict[str, Any], folder: str) -> str:
    """A file in ``folder`` with this configuration; JSON is YAML, and is taken as it stands."""
    return written(f"{PLAIN}\n{json.dumps(config, indent=1)}\n", folder)


def words_of(values: dict[str, Any]) -> list[str]:
    """``key=value`` words for block-attach and network-attach; None is left out."""
    shown = {True: "true", False: "false"}
    return [
        f"{key}={shown[value] if isinstance(value, bool) else value}"
        for key, value in values.items()
        if value is not None
    ]
