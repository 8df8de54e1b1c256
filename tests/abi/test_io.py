"""Slots of the split drivers against the real headers: a value put where C says is read as that field."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from struct import Struct

import oracle
import pytest

from xtool.proto import blkif, consolering, netif, ring
from xtool.proto.xenbus import XenbusState

#: (our layout, C type, its members in the order our layout has them)
STRUCTS: list[tuple[Struct, str, list[str]]] = [
    (blkif.X86_64.transfers[0], "struct blkif_request",
     ["operation", "nr_segments", "handle", "id", "sector_number"]),
    (blkif.X86_64.transfers[1], "struct blkif_request",
     ["operation", "nr_segments", "handle", "id", "sector_number", "seg[0].gref", "seg[0].first_sect",
      "seg[0].last_sect"]),
    (blkif.X86_64.transfers[11], "struct blkif_request",
     ["operation", "nr_segments", "handle", "id", "sector_number",
      *(f"seg[{i}].{m}" for i in range(11) for m in ("gref", "first_sect", "last_sect"))]),
    (blkif.X86_64.discard, "struct blkif_request_discard",
     ["operation", "flag", "handle", "id", "sector_number", "nr_sectors"]),
    (blkif.X86_64.indirect, "struct blkif_request_indirect",
     ["operation", "indirect_op", "nr_segments", "id", "sector_number", "handle",
      *(f"indirect_grefs[{i}]" for i in range(8))]),
    (blkif.X86_64.response, "struct blkif_response", ["id", "operation", "status"]),
    (netif.TX_REQUEST, "struct netif_tx_request", ["gref", "offset", "flags", "id", "size"]),
    (netif.TX_RESPONSE, "struct netif_tx_response", ["id", "status"]),
    (netif.RX_REQUEST, "struct netif_rx_request", ["id", "gref"]),
    (netif.RX_RESPONSE, "struct netif_rx_response", ["id", "offset", "flags", "status"]),
    (netif.EXTRA, "struct netif_extra_info", ["type", "flags", "u.gso.size", "u.gso.type", "u.gso.features"]),
]  # fmt: skip

#: The same block layouts as a 32-bit x86 guest has them, where only the place of fields differs.
I386: dict[str, Struct] = {
    "struct blkif_request": blkif.X86_32.transfers[11],
    "struct blkif_request_discard": blkif.X86_32.discard,
    "struct blkif_request_indirect": blkif.X86_32.indirect,
    "struct blkif_response": blkif.X86_32.response,
}

#: C expression -> what we say it is.
NUMBERS = {
    "sizeof(union blkif_sring_entry)": blkif.X86_64.slot_size,
    "sizeof(union netif_tx_sring_entry)": netif.TX_SLOT_SIZE,
    "sizeof(union netif_rx_sring_entry)": netif.RX_SLOT_SIZE,
    "sizeof(struct blkif_request_segment)": blkif.SEGMENT_SIZE,
    "sizeof(struct blkif_response)": blkif.X86_64.response.size,
    "offsetof(struct blkif_sring, req_prod)": 0,
    "offsetof(struct blkif_sring, req_event)": 4,
    "offsetof(struct blkif_sring, rsp_prod)": 8,
    "offsetof(struct blkif_sring, rsp_event)": 12,
    "offsetof(struct blkif_sring, ring)": ring.HEADER_SIZE,
    "offsetof(struct netif_rx_sring, ring)": ring.HEADER_SIZE,
    "offsetof(struct xencons_interface, in)": consolering.IN_AT,
    "offsetof(struct xencons_interface, out)": consolering.OUT_AT,
    "sizeof(((struct xencons_interface *)0)->in)": consolering.IN_SIZE,
    "sizeof(((struct xencons_interface *)0)->out)": consolering.OUT_SIZE,
    "offsetof(struct xencons_interface, in_cons)": consolering.INDEXES_AT,
    "offsetof(struct xencons_interface, in_prod)": consolering.INDEXES_AT + 4,
    "offsetof(struct xencons_interface, out_cons)": consolering.INDEXES_AT + 8,
    "offsetof(struct xencons_interface, out_prod)": consolering.INDEXES_AT + 12,
    **{
        f"__RING_SIZE((struct {kind}_sring *)0, {pages} * 4096)": ring.ring_slots(pages * 4096, size)
        for kind, size in (("blkif", 112), ("netif_tx", 12), ("netif_rx", 8))
        for pages in (1, 2, 4, 8, 16)
    },
    **{
        "XenbusState" + "".join(word.title() for word in state.name.split("_")): int(state)
        for state in XenbusState
    },
}


def missing_headers() -> bool:
    return not shutil.which("gcc") or not (oracle.SYSTEM_HEADERS / "io/blkif.h").exists()


pytestmark = pytest.mark.skipif(missing_headers(), reason="no gcc or no Xen headers (Debian: libxen-dev)")


@pytest.fixture(scope="module")
def answers() -> dict[str, int]:
    questions = list(NUMBERS)
    for _, name, members in STRUCTS:
        for member in members:
            questions += [oracle.offset_of(name, member), oracle.member_size(name, member)]
    return oracle.evaluate(questions)


def test_numbers(answers: dict[str, int]) -> None:
    assert {question: answers.get(question) for question in NUMBERS} == NUMBERS


def offsets(layout: Struct, count: int) -> list[tuple[int, int]]:
    """(offset, size) of each field, found by packing all ones into one at a time."""
    found = []
    for field in range(count):
        for ones in (0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF, 0xFFFF, -1, 0xFF):
            try:
                raw = layout.pack(*(ones if i == field else 0 for i in range(count)))
            except Exception:  # too large for this field
                continue
            at = [i for i, byte in enumerate(raw) if byte]
            found.append((at[0], len(at)))
            break
    return found


@pytest.mark.parametrize(("layout", "name", "members"), STRUCTS, ids=[f"{s[1]}-{s[0].size}" for s in STRUCTS])
def test_layout(layout: Struct, name: str, members: list[str], answers: dict[str, int]) -> None:
    truth = [(answers[oracle.offset_of(name, m)], answers[oracle.member_size(name, m)]) for m in members]
    assert offsets(layout, len(members)) == truth


def test_layout_of_a_32_bit_guest(tmp_path: Path) -> None:
    """Asked by assertions at compile time: a 32-bit program could not be linked here."""
    (tmp_path / "xen").symlink_to(oracle.SYSTEM_HEADERS)
    lines = [
        "#include <stddef.h>",
        "#include <stdint.h>",
        "#include <xen/xen.h>",
        "#include <xen/io/blkif.h>",
    ]
    for _, name, members in STRUCTS[2:6]:
        layout = I386[name]
        for member, (at, size) in zip(members, offsets(layout, len(members)), strict=True):
            lines.append(f'_Static_assert(offsetof({name}, {member}) == {at}, "{member}");')
            lines.append(f'_Static_assert(sizeof((({name} *)0)->{member}) == {size}, "{member}");')
    lines.append(f'_Static_assert(sizeof(union blkif_sring_entry) == {blkif.X86_32.slot_size}, "slot");')
    source = tmp_path / "ask.c"
    command = ["gcc", "-m32", "-ffreestanding", "-w", "-fsyntax-only", f"-I{tmp_path}", str(source)]
    source.write_text("#include <stdint.h>\n")
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this gcc has no -m32")
    source.write_text("\n".join(lines) + "\n")
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    source.write_text("\n".join([*lines, '_Static_assert(sizeof(union blkif_sring_entry) == 112, "");']))
    assert subprocess.run(command, capture_output=True).returncode, "the assertions assert nothing"
