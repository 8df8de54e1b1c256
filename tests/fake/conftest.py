"""A host in memory, and configurations for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xtool.config import DomainConfig, parse_config
from xtool.toolstack.host import Host, open_host

TINY = Path(__file__).resolve().parents[2] / "build" / "guest"


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTOOL_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
