"""A host in memory, and configurations for it; a disk image between a backend and a frontend in memory."""

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from splitdrivers import XVDA, Rig

from xtool.config import DomainConfig, parse_config
from xtool.devices.vbd import Vbd
from xtool.devices.xenbus import DeviceId
from xtool.toolstack import journal
from xtool.toolstack.host import Host, open_host

if TYPE_CHECKING:
    from playbooks import Playbooks

TINY = Path(__file__).resolve().parents[2] / "build" / "guest"


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTOOL_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@contextmanager
def kept(uuid: str) -> Iterator[None]:
    """As if a keeper of this domain lived: this process."""
    with open(journal.keeper_path(uuid), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
    os.unlink(journal.keeper_path(uuid))


@pytest.fixture
def keeper() -> Callable[[str], AbstractContextManager[None]]:
    return kept


@pytest.fixture(scope="session")
def playbooks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playbooks]:
    """The Ansible collection, built and installed once, with a zygote for its command lines."""
    pytest.importorskip("ansible")
    from playbooks import Playbooks

    made = Playbooks(tmp_path_factory.mktemp("ansible"))
    yield made
    made.close()


@pytest.fixture
def host() -> Iterator[Host]:
    fake = open_host("fake:")
    yield fake
    fake.close()


@pytest.fixture
def config() -> Callable[..., DomainConfig]:
    """``config("pv", memory=16)``: a domain that boots our tiny test guest."""

    def make(kind: str = "pv", name: str = "test", **keys: object) -> DomainConfig:
        kernel = TINY / f"tiny-{kind}.elf"
        if not kernel.exists():
            pytest.fail(f"{kernel} is missing: run scripts/build-guests")
        lines = [f"name: {name}", f"type: {kind}", f"kernel: {kernel}"]
        lines += [f"{key}: {value}" for key, value in {"memory": 16, **keys}.items()]
        return parse_config("\n".join(lines), "test.yaml", "/")

    return make


@pytest.fixture
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """As large as the test's module says with ``SIZE``."""
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(8).randbytes(request.module.SIZE))
    return path


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Ends with its process stopped, which asserts that nothing is mapped any more."""
    (tmp_path / "run").mkdir()
    rig = Rig(tmp_path / "run")
    yield rig
    rig.end()


@pytest.fixture
def device(rig: Rig, image: Path) -> DeviceId:
    return rig.add_disk(Vbd("xvda", XVDA, str(image), kind="xtool"))
