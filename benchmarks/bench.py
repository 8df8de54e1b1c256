"""What every measurement of the split drivers gets: the host, a folder in memory, the length of a sample; and
Linux guests with ``load`` in them."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contest import BenchError
from benchmarks.peers import make_ramdisk
from tests.xen.guests import LINUX_READY, Console, linux
from xtool.config import DomainConfig
from xtool.errors import XtoolError
from xtool.toolstack.api import CreateOptions
from xtool.toolstack.host import Host
from xtool.toolstack.local import LocalClient

#: How long a guest may take to its prompt, seconds of the machine's clock.
BOOT = 300.0


@contextmanager
def last_words(console: Console) -> Iterator[None]:
    """An error says what the guest's console showed, whatever it is about."""
    try:
        yield
    except (BenchError, AssertionError, XtoolError) as error:
        if "seen:" in str(error):
            raise
        with suppress(OSError):
            while select.select([console.fd], [], [], 0)[0] and (data := os.read(console.fd, 65536)):
                console.seen += data
        text = f"{type(error).__name__}: {error}; seen: {console.seen[-2000:]!r}"
        raise BenchError(text) from error


@dataclass
class Bench:
    """``span`` is the length of one sample in milliseconds, ``kind`` the guests' type."""

    host: Host
    client: LocalClient
    folder: Path
    span: int
    kind: str

    def config(self, name: str, **keys: object) -> DomainConfig:
        """A Linux guest, with ``load`` in its initramfs."""
        ramdisk = self.folder / "initramfs.cpio"
        if not ramdisk.exists():
            make_ramdisk(ramdisk)
        return linux(self.kind, f"bench-{name}", ramdisk=ramdisk, **keys)

    @contextmanager
    def guest(self, config: DomainConfig) -> Iterator[tuple[Console, int]]:
        """Booted to its shell: its console and number. Destroyed at the end."""
        try:
            self.client.create(config, CreateOptions(paused=True))
            with Console(self.client, config.name, "serial" if self.kind == "hvm" else None) as console:
                self.client.unpause(config.name)
                console.wait_for(LINUX_READY, BOOT)
                with last_words(console):
                    yield console, self.client.list(config.name)[0].domid
        finally:
            self.destroy(config.name)

    def destroy(self, name: str) -> None:
        """If it is there."""
        if any(domain.name == name for domain in self.client.list()):
            self.client.destroy(name)
