"""cloud-init seeds on real Xen: a guest finds the file system and its files by their own names."""

from __future__ import annotations

import json

import pytest

from guests import ask, boot, linux
from xtool import paths
from xtool.toolstack.local import LocalClient

USER_DATA = {"hostname": "seeded", "runcmd": [["touch", "/tmp/x"]]}


@pytest.mark.parametrize("kind", [pytest.param("pv", marks=pytest.mark.long), "pvh"])
def test_a_guest_reads_its_seed(client: LocalClient, kind: str) -> None:
    seed = json.dumps({"user_data": USER_DATA, "network_config": {"version": 2}})
    config = linux(kind, f"seed-{kind}", cloud_init=seed)
    with boot(client, config) as console:
        ask(console, "i=0; while [ ! -b /dev/xvdz ] && [ $i -lt 60 ]; do sleep 1; i=$((i+1)); done")
        # By its label, as NoCloud finds it.
        assert "cidata" in ask(console, "dd if=/dev/xvdz bs=1 skip=32808 count=6 2>/dev/null")
        assert "END=0=" in ask(console, "mkdir -p /mnt/seed; mount -t iso9660 -o ro /dev/xvdz /mnt/seed")
        listed = ask(console, "ls /mnt/seed")
        assert all(name in listed for name in ("user-data", "meta-data", "network-config"))
        user_data = ask(console, "cat /mnt/seed/user-data")
        assert "#cloud-config" in user_data and "hostname: seeded" in user_data.replace('"', "")
        (domain,) = client.list(config.name)
        assert domain.uuid in ask(console, "cat /mnt/seed/meta-data")
        # It cannot be written to.
        assert "END=0=" not in ask(console, "umount /mnt/seed; dd if=/dev/zero of=/dev/xvdz count=1 2>&1")
        path = paths.seed_file(domain.uuid)
        assert path.exists()
    client.destroy(config.name)
    assert not path.exists()
