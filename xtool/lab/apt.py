"""Debian packages without root: where this machine gets them, and fetching single ones.

Facts about apt used here: ``apt-get indextargets`` prints the configured sources in any wanted format;
``apt-get download --print-uris`` prints ``'URI' FILE SIZE HASH`` and fetches nothing; ``apt-config dump``
prints options one a line in a syntax apt reads back. So proxies, mirrors and certificates that the
machine uses are used here too, and no host is named.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path

from xtool.errors import LabError
from xtool.lab.steps import run
from xtool.progress import Progress

#: Debian 12, the release whose Xen (4.17) the lab runs.
CODENAME = "bookworm"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_PASSED_ON = ("Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries", "Acquire::ForceIPv")


def sources() -> str:
    """The machine's own Debian sources for ``CODENAME`` as sources.list lines; "" if it has none."""
    form = "$(CREATED_BY)|$(REPO_URI)|$(RELEASE)|$(CODENAME)|$(COMPONENT)|$(TRUSTED)"
    lines = []
    for line in run(["apt-get", "indextargets", "--format", form], "listing the apt sources").splitlines():
        fields = line.split("|")
        if len(fields) != 6 or fields[0] != "Packages":
            continue
        _, uri, release, codename, component, trusted = fields
        if codename.split("-")[0] != CODENAME or component != "main":
            continue
        option = "trusted=yes" if trusted == "yes" else f"signed-by={KEYRING}"
        lines.append(f"deb [{option}] {uri} {release} {component}")
    if not any(line.split()[3] == CODENAME for line in lines):
        return ""
    return "\n".join(dict.fromkeys(lines)) + "\n"


def acquire_options() -> str:
    """The machine's download options (proxy, certificates, ...) in apt.conf syntax."""
    dump = run(["apt-config", "dump"], "reading the apt configuration")
    return "".join(
        f"{line}\n" for line in dump.splitlines() if line.startswith(_PASSED_ON) and '""' not in line
    )


def kernel_package(metapackage: str) -> str:
    """``linux-image-amd64`` -> ``linux-image-6.1.0-NN-amd64``, the newest this machine can fetch."""
    output = run(["apt-cache", "depends", metapackage], f"looking up {metapackage}")
    match = re.search(r"Depends: (linux-image-[0-9]\S+)", output)
    if match is None:
        raise LabError(
            f"the package lists do not know {metapackage}",
            hint="run scripts/setup, or as root: apt-get update",
        )
    return match[1]


def fetch(package: str, store: Path, progress: Progress) -> Path:
    """The .deb of ``package`` in ``store``, downloaded unless it is there. Needs no root."""
    store.mkdir(parents=True, exist_ok=True)
    sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    listing = run(["apt-get", *sandbox, "download", "--print-uris", package], f"looking up {package}")
    match = re.search(r"^'[^']+' (\S+\.deb) (\d+)", listing, re.MULTILINE)
    if match is None:
        raise LabError(f"the package lists do not know {package}", hint="as root: apt-get update")
    path, size = store / match[1], int(match[2])
    if path.is_file() and path.stat().st_size == size:
        return path
    progress.step(f"downloading {package} ({size >> 20} MiB)")
    temporary = store / f".fetch-{os.getpid()}"
    temporary.mkdir(exist_ok=True)
    try:
        run(["apt-get", *sandbox, "download", package], f"downloading {package}", cwd=temporary)
        # apt quotes some characters of the version in the name it writes, so the name is not relied on.
        (fetched,) = temporary.glob("*.deb")
        os.rename(fetched, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def unpack(deb: Path, target: Path) -> None:
    """Unpack the files of a .deb (no scripts run) into ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    run(["dpkg-deb", "--extract", deb, target], f"unpacking {deb.name}")
    # dpkg-deb gives the folder the archive's mode; a private temporary folder must stay ours.
    target.chmod(target.stat().st_mode | stat.S_IRWXU)
