"""Domain files and what they name, on the way to another host.

Where a file is looked for: a relative path is relative to the domain file and so of this machine; an
absolute one is the other host's if that host has it, else this machine's. A file of this machine is sent
by content: it is there under ``sent/SHA256`` of the cache, whole and verified, or not at all, and is not
sent twice. A disk the guest may write gets a copy of its own there, one per domain, which is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from xtool import paths
from xtool.apply.described import with_files
from xtool.config.layers import defaults_of
from xtool.config.load import PLAIN, Inputs, load_all
from xtool.errors import ConfigError, HostError

if TYPE_CHECKING:
    from xtool.apply.described import Described
    from xtool.cli.remote import Remote
    from xtool.config.load import Loaded
    from xtool.progress import Progress

_CHUNK = 1 << 18
#: The cache there, for a shell.
_SENT = '"${XDG_CACHE_HOME:-$HOME/.cache}/xtool/sent"'
#: Prints the host's defaults, if it has any.
_DEFAULTS = 'at="${XTOOL_ETC_DIR:-/etc/xtool}/defaults.yaml"; [ ! -e "$at" ] || cat "$at"'


class Wanted(NamedTuple):
    """A file of this machine that the other host shall have."""

    path: str
    digest: str
    size: int
    #: The path of the copy (below ``sent``) that the guest may write, "" if it only reads.
    own_copy: str


def send_domain(
    remote: Remote,
    file: str,
    inputs: Inputs | list[str],
    progress: Progress,
    *,
    files: bool,
    only: str | None = None,
) -> str:
    """Read the domain file here, send what the other host lacks, return the path of its file there.

    ``inputs`` may be the ``--set`` arguments alone; ``only`` is the one domain of the file to send. Without
    ``files`` they are looked for but not sent. Raises ``ConfigError``, ``HostError``.
    """
    if not isinstance(inputs, Inputs):
        inputs = Inputs(inputs)
    there, defaults = _first_look(remote, file, inputs)
    with defaults_of(remote.name, defaults):
        loaded = load_all(file, inputs, only)
    absolute, relative = _references(loaded)
    there |= _which(remote, absolute - there.keys())
    wanted = _missing(remote, [(file, one) for one in loaded], there, relative)
    mapping = send_files(remote, _hashed(wanted, loaded, progress), progress) if files else {}
    # Rendered and merged here: there it is taken as it stands.
    documents = "---\n".join(one.config.with_files(mapping).to_yaml() for one in loaded)
    text = f"{PLAIN}\n{documents}".encode()
    name = f"{loaded[0].config.name}-{hashlib.sha256(text).hexdigest()[:12]}.yaml"
    return _put(remote, f"domains/{name}", 'umask 077 && cat >"$t"', text)


def place(remote: Remote, described: Sequence[Described], progress: Progress, send: bool) -> list[Described]:
    """The same domains with the files that only this machine has at their places there, where ``send`` brings
    what is missing. Raises ``ConfigError``, ``HostError``."""
    loaded = [one.loaded for one in described]
    absolute, relative = _references(loaded)
    wanted = _missing(
        remote, [(one.file, one.loaded) for one in described], _which(remote, absolute), relative
    )
    mapping = send_files(remote, _hashed(wanted, loaded, progress), progress, send=send)
    return [with_files(one, mapping) for one in described]


def _references(loaded: Iterable[Loaded]) -> tuple[set[str], set[str]]:
    """The files they name that may be the other host's, and those that are this machine's."""
    paths = {ref.path for one in loaded for ref in one.config.file_references()}
    relative = {path for one in loaded for path in one.relative_files()}
    return paths - relative, relative


def _missing(
    remote: Remote, loaded: Sequence[tuple[str, Loaded]], there: Mapping[str, bool], relative: set[str]
) -> list[str]:
    """Of what the domains of these files name, what the host has not and this machine has. Raises
    ``ConfigError``."""
    found: dict[str, None] = {}
    for file, one in loaded:
        for ref in one.config.file_references():
            if there.get(ref.path):
                continue
            if not os.path.isfile(ref.path):
                raise ConfigError(
                    f"{ref.key}: no file {ref.path} on this machine"
                    + ("" if ref.path in relative else f", nor on {remote.name}"),
                    file=file,
                    hint="relative paths are relative to the domain file"
                    if ref.path in relative
                    else "give a file that one of the two has",
                )
            found[ref.path] = None
    return list(found)


def _hashed(paths_here: Iterable[str], loaded: Sequence[Loaded], progress: Progress) -> list[Wanted]:
    hashes = FileHashes()
    wanted = []
    for path in paths_here:
        digest = hashes.digest(path, progress)
        writers = (
            one.config.name
            for one in loaded
            for disk in one.config.disks
            if disk.target == path and not disk.readonly
        )
        owner = next(writers, None)
        own = f"disks/{owner}-{digest[:12]}-{os.path.basename(path)}" if owner else ""
        wanted.append(Wanted(path, digest, os.path.getsize(path), own))
    hashes.save()
    return wanted


def host_defaults(remote: Remote) -> str:
    """That host's ``/etc/xtool/defaults.yaml``, or "". Raises ``HostError``."""
    return _ask(remote, _DEFAULTS)


def _first_look(remote: Remote, file: str, inputs: Inputs) -> tuple[dict[str, bool], str]:
    """Which absolute paths of the domain file the host has, and its defaults, in one session. These may name
    more files."""
    try:
        absolute, _ = _references(load_all(file, inputs))
    except ConfigError:
        return {}, host_defaults(remote)  # they may have what is missing
    return _look(remote, absolute, _DEFAULTS)


def _which(remote: Remote, paths_there: Iterable[str]) -> dict[str, bool]:
    """Whether the host has each of the paths."""
    return _look(remote, paths_there, "true")[0] if paths_there else {}


def _look(remote: Remote, paths_there: Iterable[str], more: str) -> tuple[dict[str, bool], str]:
    """Whether the host has each of the paths, and what a shell there prints for ``more``."""
    each = list(paths_there)
    tests = "".join(f"[ -e {shlex.quote(path)} ] && echo {index}\n" for index, path in enumerate(each))
    found, _, said = _ask(remote, f"{tests}echo =\n{more}").partition("=\n")
    indexes = {int(index) for index in found.split()}
    return {path: index in indexes for index, path in enumerate(each)}, said


def send_files(
    remote: Remote, wanted: list[Wanted], progress: Progress, *, send: bool = True
) -> dict[str, str]:
    """Make the host have each file, unless not to ``send``; returns path here -> path there."""
    if all(file.digest in remote.held and not file.own_copy for file in wanted):
        return {file.path: remote.held[file.digest] for file in wanted}
    tests = "".join(
        f'[ -e "$sent"/{file.digest} ] && echo {index}\n'
        + (f'[ -e "$sent"/{shlex.quote(file.own_copy)} ] && echo own {index}\n' if file.own_copy else "")
        for index, file in enumerate(wanted)
    )
    folder, *lines = _ask(remote, f'sent={_SENT}\necho "$sent"\n{tests}true').splitlines()
    _check_folder(remote, folder)
    quoted = shlex.quote(folder)
    mapping: dict[str, str] = {}
    sent: set[str] = set()
    for index, file in enumerate(wanted):
        copy = f"{folder}/{file.own_copy}" if file.own_copy else ""
        source = remote.held.get(file.digest) or f"{folder}/{file.digest}"
        mapping[file.path] = copy or source
        if f"own {index}" in lines or not send:
            continue
        if file.digest not in remote.held and str(index) not in lines and file.digest not in sent:
            _send(remote, file, progress)
            sent.add(file.digest)
        if copy:
            progress.step(f"copying {os.path.basename(file.path)} on {remote.name}")
            _ask(
                remote,
                f"mkdir -p {quoted}/disks && cp --sparse=always --reflink=auto {shlex.quote(source)} "
                f"{shlex.quote(copy)}.new && chmod u+w {shlex.quote(copy)}.new && "
                f"mv {shlex.quote(copy)}.new {shlex.quote(copy)}",
            )
    return mapping


def _check_folder(remote: Remote, folder: str) -> None:
    if not folder.startswith("/"):
        raise HostError(
            f"{remote.name} does not say where its cache is", hint="does its shell start quietly?"
        )


def _send(remote: Remote, file: Wanted, progress: Progress) -> None:
    progress.step(f"sending {os.path.basename(file.path)} ({file.size / (1 << 20):.1f} MiB) to {remote.name}")
    script = f'cat >"$t" && echo "{file.digest}  $t" | sha256sum --check --status && chmod 444 "$t"'
    _put(remote, file.digest, script, Path(file.path), progress, file.size)


def _put(
    remote: Remote,
    name: str,
    script: str,
    content: bytes | Path,
    progress: Progress | None = None,
    total: int = 0,
) -> str:
    """Make ``name``, which says what is in it, below the cache there, and return its path: ``script`` makes
    ``$t`` beside it from ``content``, its input."""
    line = (
        f'sent={_SENT}; target="$sent"/{shlex.quote(name)}; t="$target".$$; '
        f'[ -e "$target" ] && echo "$target" && exit; [ -d "${{t%/*}}" ] || mkdir -p "${{t%/*}}" && '
        f'{{ {script}; }} && mv -f "$t" "$target" && echo "$target" || '
        '{ status=$?; rm -f "$t"; exit $status; }'
    )
    process = subprocess.Popen(
        remote.argv(line, "-T"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    try:
        if isinstance(content, bytes):
            process.stdin.write(content)
        else:
            done = 0
            with open(content, "rb") as handle:
                while chunk := handle.read(_CHUNK):
                    process.stdin.write(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress.advance(done, total)
        process.stdin.close()
    except BrokenPipeError:
        pass  # its message says why
    except BaseException:
        process.kill()
        process.wait()
        raise
    said = process.stderr.read().decode(errors="replace").strip()
    path = process.stdout.read().decode(errors="replace").rstrip("\n")
    process.stdout.close()
    process.stderr.close()
    if process.wait() != 0:
        why = said or "what arrived is not what was sent (did the file change meanwhile?)"
        raise HostError(
            f"cannot send a file to {remote.name} (its cache's {name}): {why}",
            hint="is there space, and is it writable?",
        )
    _check_folder(remote, path)
    return path


def _ask(remote: Remote, script: str) -> str:
    done = subprocess.run(remote.argv(script, "-T", "-n"), capture_output=True, check=False)
    if done.returncode != 0:
        why = done.stderr.decode(errors="replace").strip() or f"status {done.returncode}"
        raise HostError(f"{remote.name} does not answer: {why}")
    return done.stdout.decode(errors="replace")


class FileHashes:
    """SHA-256 of files, remembered by device, inode, size and mtime. ``save`` when done."""

    def __init__(self) -> None:
        self._store = paths.cache_dir() / "sent-hashes.json"
        self._changed = False
        self._known: dict[str, str] = {}
        try:
            loaded = json.loads(self._store.read_text())
            if isinstance(loaded, dict):
                self._known = loaded
        except (OSError, ValueError):
            pass

    def digest(self, path: str, progress: Progress) -> str:
        with open(path, "rb") as handle:
            status = os.fstat(handle.fileno())
            mark = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
            known = self._known.get(mark)
            if known is not None:
                return known
            if status.st_size > 64 << 20:
                progress.step(f"hashing {os.path.basename(path)}")
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        self._known[mark] = digest
        self._changed = True
        return digest

    def save(self) -> None:
        if not self._changed:
            return
        self._store.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._store.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(self._known))
        os.replace(temporary, self._store)
