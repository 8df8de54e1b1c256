"""Every layout and constant of ``xtool.abi`` against the real headers (Debian: libxen-dev, gcc)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import oracle
import pytest

from xtool.abi import base, domctl, sysctl

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "reference.json").read_text())

#: Constants that are ours, or stand in no installed header: nothing to compare them with.
OWN = {
    "domctl.HEADER_SIZE", "sysctl.HEADER_SIZE",
}  # fmt: skip


@pytest.fixture(scope="module")
def answers() -> dict[str, int]:
    if not shutil.which("gcc") or not (oracle.SYSTEM_HEADERS / "domctl.h").exists():
        pytest.skip("gcc or Xen's headers (Debian: libxen-dev) are not installed")
    questions = [expression for expression, _ in oracle.constants().values()]
    for cls in oracle.layouts():
        name = cls.C_NAME  # type: ignore[attr-defined]
        questions.append(oracle.size_of(name))
        for member in oracle.members(cls).values():
            questions += [oracle.offset_of(name, member), oracle.member_size(name, member)]
    return oracle.evaluate(questions)


def test_there_is_something_to_check() -> None:
    assert len(oracle.layouts()) >= 30
    assert len(oracle.constants()) >= 100


@pytest.mark.parametrize("cls", oracle.layouts(), ids=lambda cls: cls.__name__)
def test_layout(cls: Any, answers: dict[str, int]) -> None:
    size = oracle.size_of(cls.C_NAME)
    assert size in answers, f"{cls.C_NAME} is in no header"
    assert base.Abi.size.__func__(cls) == answers[size]  # type: ignore[attr-defined]
    for field, member in oracle.members(cls).items():
        offset = oracle.offset_of(cls.C_NAME, member)
        assert offset in answers, f"{cls.C_NAME} has no member {member}; C_MEMBERS can rename it"
        ours = getattr(cls, field)
        assert ours.offset == answers[offset], f"offset of {cls.C_NAME}.{member}"
        assert ours.size == answers[oracle.member_size(cls.C_NAME, member)], f"size of {cls.C_NAME}.{member}"


@pytest.mark.parametrize(
    ("name", "expression", "value"), [(n, e, v) for n, (e, v) in oracle.constants().items()]
)
def test_constant(name: str, expression: str, value: int, answers: dict[str, int]) -> None:
    if expression in answers:
        assert value == answers[expression]
    else:
        short = name.rsplit(".", 1)[1]
        spelled_by_xen = short.startswith(
            ("XEN", "HVM", "IOCTL", "DOMCTL", "EVTCHNOP", "SCHEDOP", "SHUTDOWN", "GNT", "MMUEXT")
        )
        assert name in OWN or not spelled_by_xen, f"{name} ({expression}) is in no header"


def test_the_headers_are_of_the_oldest_version_we_know(answers: dict[str, int]) -> None:
    versions = oracle.evaluate(["XEN_DOMCTL_INTERFACE_VERSION", "XEN_SYSCTL_INTERFACE_VERSION"])
    assert versions["XEN_DOMCTL_INTERFACE_VERSION"] == domctl.DOMCTL_VERSIONS[0]
    assert versions["XEN_SYSCTL_INTERFACE_VERSION"] == sysctl.SYSCTL_VERSIONS[0]


def test_the_oracle_leaves_out_what_is_not_there(answers: dict[str, int]) -> None:
    asked = [
        "sizeof(struct start_info)",
        "sizeof(struct no_such_thing)",
        "offsetof(struct start_info, nowhere)",
    ]
    assert oracle.evaluate(asked) == {"sizeof(struct start_info)": 1168}


# -- other releases, from ``reference.json`` (made by scripts/abi-reference)


#: Members that a later release split or renamed, while the same zero bytes mean the same.
RENAMED = {("struct xen_domctl_createdomain", "altp2m_opts", release) for release in ("4.21", "4.22")}


def layout_for(c_name: str, release: dict[str, Any]) -> Any:
    """The layout xtool uses for a C type on that release."""
    if c_name == "struct xen_domctl_createdomain":
        return domctl.CREATEDOMAIN[release["domctl"]]
    return next(cls for cls in oracle.layouts() if c_name == cls.C_NAME)  # type: ignore[attr-defined]


@pytest.mark.parametrize("release", REFERENCE)
def test_every_release_has_a_known_interface(release: str) -> None:
    assert REFERENCE[release]["domctl"] in domctl.DOMCTL_VERSIONS
    assert REFERENCE[release]["domctl"] in domctl.CREATEDOMAIN
    assert REFERENCE[release]["sysctl"] in sysctl.SYSCTL_VERSIONS


def test_the_releases_are_those_we_claim() -> None:
    assert list(REFERENCE) == ["4.17", "4.18", "4.19", "4.20", "4.21", "4.22"]
    assert {r["domctl"] for r in REFERENCE.values()} == set(domctl.DOMCTL_VERSIONS)
    assert {r["sysctl"] for r in REFERENCE.values()} == set(sysctl.SYSCTL_VERSIONS)


@pytest.mark.parametrize(
    ("release", "c_name"), [(r, c) for r, table in REFERENCE.items() for c in table["structs"]]
)
def test_layout_on_release(release: str, c_name: str) -> None:
    cls = layout_for(c_name, REFERENCE[release])
    truth = REFERENCE[release]["structs"][c_name]
    assert base.Abi.size.__func__(cls) == truth["size"]  # type: ignore[attr-defined]
    for field, member in oracle.members(cls).items():
        if member in truth["members"]:
            ours = getattr(cls, field)
            assert [ours.offset, ours.size] == truth["members"][member], f"{c_name}.{member}"
        else:
            assert (c_name, member, release) in RENAMED, f"Xen {release} has no {c_name}.{member}"
