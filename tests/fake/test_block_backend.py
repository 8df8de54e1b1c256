"""Our block backend against our block frontend, on a host in memory."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from splitdrivers import GUEST, XVDA, Rig

from xtool.devices.vbd import Vbd
from xtool.proto.blkif import X86_32, X86_64, Layout

SIZE = 8 << 20


def disk(image: Path | None, **keys: object) -> Vbd:
    given: dict[str, object] = {"vdev": "xvda", "devid": XVDA, "kind": "xtool"}
    return Vbd(target=str(image) if image else None, **given | keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(
    ("layout", "order", "queues", "segments", "start"),
    [
        (X86_64, 0, 1, 11, 0),
        (X86_64, 0, 1, 256, 0xFFFF_FFF0),
        (X86_64, 4, 1, 32, 0xFFFF_FF00),
        (X86_64, 2, 4, 64, 0xFFFF_FFFE),
        (X86_32, 1, 2, 11, 0x7FFF_FFFF),
    ],
)
def test_what_is_written_is_read(
    rig: Rig,
    image: Path,
    layout: Layout,
    order: int,
    queues: int,
    segments: int,
    start: int,
    persistent: bool,
) -> None:
    """Random sizes and offsets against a copy in memory, with ring indexes that wrap."""
    device = rig.add_disk(disk(image))
    rng = random.Random(order * 7 + segments)
    model = bytearray(image.read_bytes())
    with rig.frontend(
        device,
        layout=layout,
        ring_order=order,
        queues=queues,
        segments=segments,
        start=start,
        persistent=persistent,
    ) as front:
        assert front.persistent == persistent
        assert front.size == SIZE and front.offer.max_indirect == 256
        for _ in range(150):
            length = rng.choice((1, 511, 512, 4096, 65536, rng.randrange(1, 600_000)))
            offset = rng.randrange(0, SIZE - length)
            if rng.random() < 0.5:
                data = rng.randbytes(length)
                front.pwrite(data, offset)
                model[offset : offset + length] = data
            else:
                assert front.pread(length, offset) == model[offset : offset + length]
        front.flush()
        front.discard(1 << 20, 1 << 20)
        model[1 << 20 : 2 << 20] = bytes(1 << 20)
        assert hashlib.sha256(front.pread(SIZE, 0)).digest() == hashlib.sha256(model).digest()
        [told] = rig.describe()
        assert told["state"] == "connected" and len(told["queues"]) == queues  # type: ignore[arg-type]
        assert (told["persistent"] is not None) == persistent
        assert bool(rig.grants.copies) != persistent
    assert image.read_bytes() == model
    rig.turns()
    assert rig.state(device) == "6" and not rig.grants.live and not list(rig.folder.iterdir())
    rig.remove(device)
    rig.turns()
    assert not rig.machine.guests[0].ports
    assert rig.machine.guests[GUEST].grants == {}
