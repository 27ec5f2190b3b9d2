"""What `pitfs status` and `pitfs list` say of a store to people, and production of what it streams."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pitfs.cli.common.output import SILENT_S
from pitfs.cli.main import main
from pitfs.model.transfer import VolumeInfo
from pitfs.replication.control.server import ShipperControl
from pitfs.replication.phases import Phase
from pitfs.store.ingest import Ingest
from pitfs.store.store import Store
from tests.helpers.shipper import Parts
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History


@pytest.fixture
def store(tmp_path: Path) -> str:
    history = History(5, (VolumeInfo("root", 40_000, 4096),))
    with contextlib.closing(Ingest(str(tmp_path), history.hello)) as ingest:
        ingest_transfer(ingest, history.close_interval())
        history.write()
        ingest_transfer(ingest, history.close_interval(0))
    return str(tmp_path / "db1")


@pytest.mark.parametrize("command", ["status", "list"])
def test_a_replica_says_when_nothing_has_arrived_for_long(
    store: str, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(Store.open(store)) as opened:
        through_ns = opened.protected_through_ns()
    for silent_s, note in ((14 * 60, "nothing has arrived for 14 min: "), (SILENT_S, "")):
        monkeypatch.setattr("time.time_ns", lambda silent_s=silent_s: through_ns + int(silent_s * 1e9))
        assert main([command, store]) == 0
        said = capsys.readouterr().out
        assert (note in said) if note else ("nothing has arrived" not in said)


def test_quantities_have_units_in_the_text(store: str, capsys: pytest.CaptureFixture[str],
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    values: dict[str, Any] = {"rate_bytes_per_s": 1_234_567, "lag_bytes": 12_288, "lag_seconds": 0.334}
    monkeypatch.setattr("pitfs.cli.status._replica", lambda path: {"role": "replica", **values})
    assert main(["status", store]) == 0
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert lines == {"role replica", "rate 1.23 MB/s", "lag bytes 12.3 kB", "lag seconds 0.3 s"}


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    made = Parts(tmp_path)
    yield made
    made.close()


async def test_the_decision_while_it_streams_is_to_send_every_write(parts: Parts) -> None:
    control, status = ShipperControl(parts.shipper, parts.pipeline.state, "g"), parts.shipper.status
    parts.shipper.bandwidth.measured(2_469_135, 2.0, 20.0)
    for phase in (Phase.CONNECTING, Phase.LOCATING, Phase.WAITING):
        status.enter(phase)
    assert (await control.status(0))["last_decision"] is None
    status.enter(Phase.STREAMING)
    shown = await control.status(0)
    assert shown["last_decision"].granularity_ns == 0 and shown["last_decision"].reason.startswith("streaming: ")
    assert (shown["shipping"], shown["rate_bytes_per_s"]) == ("streaming", 1_234_568)
    assert shown["intake_bytes_per_s"] == 123_457
