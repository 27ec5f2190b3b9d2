"""`pitfs status STORE` names who holds what, and the loop devices over a mount's images."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pitfs.cli.common.pins import pin_rows, pin_text
from pitfs.model.position import format_instant
from pitfs.store.ingest import Ingest
from pitfs.store.pins.pin_file import MAX_LISTED
from pitfs.store.pins.pins import Pins
from tests.helpers.hosts import Mount
from tests.helpers.loops import LoopDevice
from tests.helpers.processes import pitfs_command, run
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import random_history, random_transfers


@pytest.fixture
def store(tmp_path: Path) -> str:
    history = random_history(1)
    ingest = Ingest(str(tmp_path), history.hello)
    for transfer in random_transfers(history, 2):
        ingest_transfer(ingest, transfer)
    ingest.close()
    return ingest.path


def test_status_names_the_holders(store: str) -> None:
    command = [*pitfs_command(), "status", store]
    assert json.loads(run([*command, "--json"]).stdout)["holders"] == []
    assert "holder" not in run(command).stdout
    with Pins(store, "export /srv/x.img") as holder:
        holder.pin(5, 1_700_000_000_000_000_000)
        (row,) = json.loads(run([*command, "--json"]).stdout)["holders"]
        assert format_instant(0) < row.pop("since") < "2100"
        assert row == {
            "pid": os.getpid(),
            "what": "export /srv/x.img",
            "instants": ["2023-11-14T22-13-20.000000000Z"],
            "unlisted": None,
            "devices": [],
        }
        lines = [line for line in run(command).stdout.splitlines() if line.startswith("holder")]
        assert lines == [
            f"holder                    export /srv/x.img (pid {os.getpid()}): 2023-11-14T22-13-20.000000000Z"
        ]


def test_a_line_about_a_holder_stays_short(store: str) -> None:
    with Pins(store, "mount /nowhere") as holder:
        assert pin_text(pin_rows(store)[0]) == f"mount /nowhere (pid {os.getpid()}): no instant now"
        for seq in range(MAX_LISTED + 1):
            holder.pin(seq, seq * 10**9)
        text = pin_text(pin_rows(store)[0])
        assert "1970-01-01T00-00-00.000000000Z, 1970-01-01T00-00-01.000000000Z, " in text
        assert "more; everything from 1970-01-01T" in text
        assert len(text) < 300


@pytest.mark.fuse
@pytest.mark.loop
def test_the_loop_devices_over_a_mounts_images_are_named(store: str, tmp_path: Path) -> None:
    with Mount(Path(store), tmp_path) as mount, Pins(store, f"mount {mount.path}"):
        instant = mount.instants()[0]
        with LoopDevice(mount.image(instant, "v0"), read_only=True) as device:
            (row,) = (row for row in pin_rows(store) if row["pid"] == os.getpid())
            assert row["devices"] == [{"device": str(device), "instant": instant, "volume": "v0"}]
            assert pin_text(row).endswith(f"{device} over {instant}/v0")
        assert not any(row["devices"] for row in pin_rows(store))
