"""A copy of what changed behind a gap: what a store takes of that kind, and what it makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from pitfs.cli.main import main
from pitfs.errors import PitfsError, PositionMismatchError
from pitfs.model.position import format_instant
from pitfs.model.transfer import Data, Gap, Hello, Manifest, ResumePoint, Section, TransferKind, VolumeInfo
from pitfs.store.ingest import Ingest
from pitfs.store.store import Store
from tests.helpers.stores import ingest_transfer, read_image
from tests.helpers.transfers import History, Transfer

VOLUMES = (VolumeInfo("a", 9_000, 1024), VolumeInfo("b", 5_000, 512))


def changes(history: History, **values: object) -> Transfer:
    """What was written since the last transfer, as such a copy; marks before it were given up."""
    for _ in range(12):
        history.write()
    transfer = history.close_interval()
    m = transfer.manifest
    gap = Gap(m.from_seq, m.from_time_ns, m.to_seq, m.to_time_ns, "it was full")
    made: dict[str, object] = {
        "kind": TransferKind.CHANGES, "mark": m.mark + 4, "diff_count": None, "first_time_ns": None, "gaps": (gap,),
        "granularity_ns": None, "cause": "it was full",
    }  # fmt: skip
    transfer.manifest = msgspec.structs.replace(m, **(made | values))
    transfer.layers = []
    return transfer


@pytest.fixture
def history() -> History:
    return History(8, VOLUMES)


def store_at_the_first_copy(tmp_path: Path, history: History) -> Ingest:
    made = Ingest(str(tmp_path), history.hello)
    ingest_transfer(made, history.close_interval())
    return made


@pytest.mark.parametrize("seed", range(5))
def test_it_builds_on_the_last_snapshot(tmp_path: Path, seed: int) -> None:
    history = History(seed, VOLUMES)
    made = store_at_the_first_copy(tmp_path, history)
    transfer = changes(history)
    m = transfer.manifest
    assert ingest_transfer(made, transfer).mark == m.mark
    store = Store.open(made.path)
    assert list(store.gaps()) == list(m.gaps)
    (interval,) = store.intervals()
    assert (interval.granularity_ns, interval.cause) == (None, "it was full")
    for volume in range(2):
        assert read_image(store, store.at_seq(m.from_seq), volume) == history.states[m.from_seq][volume]
        assert store.at_seq(m.to_seq - 1).seq == m.from_seq, "what lies in the gap leads to the state before it"
        assert read_image(store, store.at_seq(m.to_seq), volume) == history.states[m.to_seq][volume]
    store.close()
    made.close()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"from_seq": 3}, "the store is at seq 0"),
        ({"from_time_ns": 5}, "the store is at seq 0"),
        ({"mark": 1}, "the store has 1 and takes 2"),
        ({"granularity_ns": 0}, "a journal where only the snapshot is announced"),
    ],
    ids=str,
)
def test_one_that_does_not_lead_on_is_refused(
    tmp_path: Path, history: History, values: dict[str, object], words: str
) -> None:
    made = store_at_the_first_copy(tmp_path, history)
    with pytest.raises(PitfsError, match=words):
        made.begin(changes(history, **values).manifest)
    made.close()


def test_one_that_leads_nowhere_is_refused(tmp_path: Path, history: History) -> None:
    made = store_at_the_first_copy(tmp_path, history)
    manifest: Manifest = changes(history).manifest
    nowhere = msgspec.structs.replace(
        manifest, to_seq=manifest.from_seq, to_time_ns=manifest.from_time_ns, gaps=(), first_time_ns=None
    )
    with pytest.raises(PitfsError, match="changes that lead nowhere"):
        made.begin(nowhere)
    made.close()


def test_an_empty_store_refuses_it(tmp_path: Path, history: History) -> None:
    history.close_interval()
    hello: Hello = history.hello
    made = Ingest(str(tmp_path), hello)
    with pytest.raises(PositionMismatchError, match="full sync first"):
        made.begin(changes(history).manifest)
    made.close()


def test_what_was_staged_of_it_goes_on(tmp_path: Path, history: History) -> None:
    made = store_at_the_first_copy(tmp_path, history)
    transfer = changes(history)
    made.begin(transfer.manifest)
    rows = transfer.sections[Section.DIFF]
    made.data(Data(Section.DIFF, 0, rows))
    assert made.checkpoint((0, 3)).cursor == (0, 3)
    made.close()
    made = Ingest(str(tmp_path), history.hello)
    resumed = made.begin(transfer.manifest)
    assert (resumed.lengths[0], resumed.cursor) == (len(rows), (0, 3))
    ingest_transfer(made, transfer)
    made.close()


def test_what_came_before_its_first_cursor_comes_again(tmp_path: Path, history: History) -> None:
    """Its sender reads backing volumes: it can only go on at a cursor."""
    made = store_at_the_first_copy(tmp_path, history)
    transfer = changes(history)
    made.begin(transfer.manifest)
    made.data(Data(Section.DIFF, 0, transfer.sections[Section.DIFF]))
    made.close()
    made = Ingest(str(tmp_path), history.hello)
    assert made.begin(transfer.manifest) == ResumePoint()
    ingest_transfer(made, transfer)
    made.close()


def test_what_an_earlier_version_kept_without_a_cursor_comes_again(tmp_path: Path, history: History) -> None:
    made = store_at_the_first_copy(tmp_path, history)
    transfer = changes(history)
    made.begin(transfer.manifest)
    made.data(Data(Section.DIFF, 0, transfer.sections[Section.DIFF]))
    assert made.checkpoint(()).lengths[0]
    made.close()
    made = Ingest(str(tmp_path), history.hello)
    assert made.begin(transfer.manifest) == ResumePoint()
    ingest_transfer(made, transfer)
    made.close()


def test_a_time_in_a_gap_leads_to_the_state_before_it_with_a_warning(
    tmp_path: Path, history: History, capsys: pytest.CaptureFixture[str]
) -> None:
    made = store_at_the_first_copy(tmp_path, history)
    transfer = changes(history)
    ingest_transfer(made, transfer)
    made.close()
    m = transfer.manifest
    before, behind = format_instant(m.from_time_ns), format_instant(m.to_time_ns)
    within = format_instant((m.from_time_ns + m.to_time_ns) // 2)
    for command in (["resolve", made.path, within], ["digest", made.path, within, "a"]):
        assert main(command) == 0
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{within} lies in the gap {before} -> {behind} (it was full)" in said
    assert main(["resolve", made.path, within, "--strict"]) == 1
    assert "lies in the gap" not in capsys.readouterr().err
    assert main(["resolve", made.path, behind]) == 0
    assert capsys.readouterr().err == ""
    assert main(["status", made.path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["last_gap"] == {"from": before, "to": behind, "cause": "it was full"}
