"""What a store takes, and what it refuses with words that say what is wrong and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pitfs.errors import (
    NoSuchInstantError,
    PitfsError,
    PositionMismatchError,
    RemoteProtocolError,
    StoreError,
)
from pitfs.model.transfer import (
    DIFF_ENTRY,
    JOURNAL_ENTRY,
    MAX_PAYLOAD_BYTES,
    POSITION,
    ROWS,
    TRANSFER_SECTIONS,
    Bookmark,
    Data,
    End,
    Gap,
    Hello,
    Manifest,
    Section,
    Source,
    VolumeInfo,
)
from pitfs.store.ingest import Ingest
from pitfs.store.store import Store
from pitfs.store.transfer.validation import PositionsCheck, PositionsInOrder
from tests.helpers.links import MANIFEST
from tests.helpers.stores import ingest_transfer, object_files, read_image
from tests.helpers.transfers import START_NS, History, Transfer

VOLUMES = (VolumeInfo("a", 9_000, 1024), VolumeInfo("b", 5_000, 512))


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here loses power: that the syncs are made, and when, is what test_store_faults counts."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)


@pytest.fixture
def history() -> History:
    return History(8, VOLUMES)


@pytest.fixture
def ingest(tmp_path: Path, history: History) -> Iterator[Ingest]:
    """A store that has the full sync."""
    made = Ingest(str(tmp_path), history.hello)
    ingest_transfer(made, history.close_interval())
    yield made
    made.close()


@pytest.fixture
def interval(ingest: Ingest, history: History) -> Transfer:
    """The snapshot diff that the store waits for."""
    for _ in range(12):
        history.write()
    return history.close_interval()


@pytest.fixture
def journal(ingest: Ingest, interval: Transfer) -> Transfer:
    """All layers of that interval's journal; the store has its diff."""
    (layers,), interval.layers = interval.layers, []
    ingest_transfer(ingest, interval)
    return layers


def send(ingest: Ingest, transfer: Transfer, end: End | None = None, **sections: bytes) -> None:
    """The whole of a transfer in large frames, with other bytes for some sections, or another end."""
    ingest.begin(transfer.manifest)
    lengths = []
    for section in TRANSFER_SECTIONS:
        data = sections.get(section.name, transfer.sections[section])
        if data:
            ingest.data(Data(section, 0, data))
        lengths.append(len(data))
    one, two, three, four, five = lengths
    ingest.end(end or End((one, two, three, four, five), transfer.end.checksums))


def changed(manifest: Manifest, **values: object) -> Manifest:
    return msgspec.structs.replace(manifest, **values)


# Who may write, and whose store it is


def test_a_second_writer_is_told_who_the_first_is(ingest: Ingest, tmp_path: Path, history: History) -> None:
    with pytest.raises(StoreError, match=f"pid {os.getpid()} on .* is writing this store"):
        Ingest(str(tmp_path), history.hello)


def test_another_history_of_the_same_name_is_refused(
    ingest: Ingest, tmp_path: Path, history: History
) -> None:
    ingest.close()
    with pytest.raises(PositionMismatchError, match=r"state was made anew.*move this store away"):
        Ingest(str(tmp_path), Hello("db1", "f" * 32, VOLUMES))


def test_other_volumes_are_refused(ingest: Ingest, tmp_path: Path, history: History) -> None:
    ingest.close()
    with pytest.raises(PositionMismatchError, match="volumes can't change"):
        Ingest(str(tmp_path), Hello("db1", history.hello.history, VOLUMES[:1]))


def test_a_group_name_cannot_leave_the_root(tmp_path: Path, history: History) -> None:
    with pytest.raises(RemoteProtocolError, match="group name"):
        Ingest(str(tmp_path), Hello("../out", history.hello.history, VOLUMES))
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_not_made_among_other_files(tmp_path: Path, history: History) -> None:
    (tmp_path / "db1").mkdir()
    (tmp_path / "db1" / "holiday.jpg").write_text("x")
    with pytest.raises(StoreError, match=r"not empty either \(holiday.jpg"):
        Ingest(str(tmp_path), history.hello)
    assert [path.name for path in (tmp_path / "db1").iterdir()] == ["holiday.jpg"]


def test_an_empty_store_has_no_instants(tmp_path: Path, history: History) -> None:
    made = Ingest(str(tmp_path), history.hello)
    assert made.welcome().mark == 0
    store = Store.open(made.path)
    assert store.first() is None and store.latest() is None and store.protected_through_ns() == 0
    assert not list(store.snapshots()) and not list(store.days())
    for ask in (store.at_time, store.at_seq):
        with pytest.raises(NoSuchInstantError, match="empty"):
            ask(0)
    store.close()
    made.close()


def test_a_reader_sees_that_something_was_committed(ingest: Ingest, interval: Transfer) -> None:
    store = Store.open(ingest.path)
    before = store.data_version()
    assert store.data_version() == before
    latest = store.latest()
    ingest_transfer(ingest, interval)
    assert store.data_version() != before
    assert latest is not None and store.latest() != latest
    store.close()


# Where it stands


def test_only_the_next_mark_is_taken(ingest: Ingest, interval: Transfer) -> None:
    for mark in (1, 3):
        with pytest.raises(PositionMismatchError, match="the store has 1 and takes 2"):
            ingest.begin(changed(interval.manifest, mark=mark))


def test_an_interval_must_follow_the_last_position(ingest: Ingest, interval: Transfer) -> None:
    with pytest.raises(PositionMismatchError, match="the store is at seq 0"):
        ingest.begin(changed(interval.manifest, from_seq=1))
    with pytest.raises(PositionMismatchError, match="restored from an older"):
        ingest.begin(changed(interval.manifest, from_time_ns=START_NS - 1))


def test_an_empty_store_wants_a_full_copy(tmp_path: Path, history: History) -> None:
    history.close_interval()
    history.write()
    transfer = history.close_interval()
    made = Ingest(str(tmp_path), history.hello)
    with pytest.raises(PositionMismatchError, match="full sync first"):
        made.begin(changed(transfer.manifest, mark=1))
    made.close()


def test_a_hole_is_refused_and_a_repetition_passed_over(ingest: Ingest, interval: Transfer) -> None:
    diff = interval.sections[Section.DIFF]
    ingest.begin(interval.manifest)
    ingest.data(Data(Section.DIFF, 0, diff[:48]))
    ingest.data(Data(Section.DIFF, 0, diff[:72]))
    ingest.data(Data(Section.DIFF, 24, diff[24:48]))
    assert ingest.checkpoint((4, 5)).lengths == (72, 0, 0, 0, 0)
    with pytest.raises(PositionMismatchError, match="bytes 72 to 96 are missing"):
        ingest.data(Data(Section.DIFF, 96, diff[96:120]))
    with pytest.raises(RemoteProtocolError, match="begin first"):
        ingest.data(Data(Section.DIFF, 72, diff[72:96]))
    assert ingest.begin(interval.manifest).cursor == (4, 5)


def test_another_transfer_does_not_go_on_from_the_staged_one(ingest: Ingest, interval: Transfer) -> None:
    ingest.begin(interval.manifest)
    ingest.data(Data(Section.DIFF, 0, interval.sections[Section.DIFF][:48]))
    ingest.checkpoint((1,))
    assert ingest.begin(interval.manifest).lengths[0] == 48
    assert ingest.begin(changed(interval.manifest, identity="another")).lengths == (0, 0, 0, 0, 0)
    assert ingest.begin(interval.manifest).lengths == (0, 0, 0, 0, 0)


def test_an_empty_interval_only_moves_protected_through_on(ingest: Ingest, history: History) -> None:
    transfer = history.close_interval(bookmarks=("quiet",))
    send(ingest, transfer)
    store = Store.open(ingest.path)
    assert len(list(store.snapshots())) == 1 and not list(store.intervals())
    assert store.protected_through_ns() == transfer.manifest.protected_through_ns
    assert store.at_time(transfer.manifest.protected_through_ns) == (store.first(), True)
    bookmark = store.bookmark("quiet")
    assert bookmark is not None and bookmark.seq == 0
    assert store.bookmark("loud") is None
    assert len(object_files(ingest.path)) == 2
    store.close()


def test_a_bookmark_is_never_moved(ingest: Ingest, history: History) -> None:
    send(ingest, history.close_interval(bookmarks=("x",)))
    history.write()
    send(ingest, history.close_interval(bookmarks=("x",)))
    store = Store.open(ingest.path)
    assert [(b.name, b.seq) for b in store.bookmarks()] == [("x", 0)]
    store.close()


# What can't be


@pytest.mark.parametrize(
    "values",
    [
        {"to_seq": 0},
        {"to_time_ns": START_NS},
        {"first_time_ns": START_NS - 5},
        {"protected_through_ns": START_NS + 1},
        {"granularity_ns": 0},
        {"base_granularity_ns": 0},
        {"position_count": 11},
        {"position_count": -1},
        {"diff_count": 1 << 40},
        {"journal_count": -1},
        {"protected_through_ns": 1 << 63},
        {"bookmarks": (Bookmark("../x", 12, 0),)},
        {"bookmarks": (Bookmark("fine", 11, 0),)},
        {"gaps": (Gap(5, 5, 4, 6, "backwards"),)},
    ],
    ids=str,
)
def test_a_manifest_that_cannot_be_is_refused(
    ingest: Ingest, interval: Transfer, values: dict[str, object]
) -> None:
    with pytest.raises(PitfsError, match="manifest"):
        ingest.begin(changed(interval.manifest, **values))


@pytest.mark.parametrize(
    "values",
    [
        {"granularity_ns": 7_000_000}, {"granularity_ns": None}, {"base_granularity_ns": 7}, {"base_bytes": -1},
        {"base_granularity_ns": 0}, {"granularity_ns": 1_000_000, "base_granularity_ns": 0}, {"position_count": 13},
        {"diff_count": 1}, {"bookmarks": (Bookmark("fine", 12, 0),)}, {"protected_through_ns": 0},
    ],
    ids=str,
)  # fmt: skip
def test_layers_that_cannot_be_are_refused(ingest: Ingest, journal: Transfer, values: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError, match="manifest"):
        ingest.begin(changed(journal.manifest, **values))


@pytest.mark.parametrize(
    "values",
    [
        {"from_seq": 1, "position_count": 11}, {"to_seq": 11, "position_count": 11},
        {"from_time_ns": START_NS - 1}, {"base_bytes": 512}, {"base_granularity_ns": 1_000_000},
    ],
    ids=str,
)  # fmt: skip
def test_layers_of_another_interval_or_on_another_base_are_refused(
    ingest: Ingest, journal: Transfer, values: dict[str, object]
) -> None:
    with pytest.raises(PositionMismatchError, match="begin the session anew"):
        ingest.begin(changed(journal.manifest, **values))
    send(ingest, journal)
    with pytest.raises(PositionMismatchError, match="has 0 and"):
        ingest.begin(journal.manifest)


def test_a_cause_alone_changes_nothing_else(ingest: Ingest, journal: Transfer) -> None:
    manifest = changed(
        journal.manifest, granularity_ns=None, journal_count=0, position_count=0, cause="erased"
    )
    ingest.begin(manifest)
    ingest.end(End((0, 0, 0, 0, 0)))
    store = Store.open(ingest.path)
    assert [(i.granularity_ns, i.cause) for i in store.intervals()] == [(None, "erased")]
    send(ingest, journal)
    assert [i.granularity_ns for i in store.intervals()] == [0]
    store.close()


def test_layers_that_were_put_off_too_long_give_way(tmp_path: Path, history: History) -> None:
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, history.close_interval())
    layers = []
    for _ in range(11):
        for _ in range(3):
            history.write()
        transfer = history.close_interval()
        layers += transfer.layers
        transfer.layers = []
        ingest_transfer(ingest, transfer)
    for each in layers:
        ingest.begin(each.manifest)
        ingest.data(Data(Section.JOURNAL, 0, each.sections[Section.JOURNAL][: JOURNAL_ENTRY.itemsize]))
        ingest.park((5,))
    staged = sorted(name for name in os.listdir(os.path.join(ingest.path, "staging")))
    assert staged == [f"layers-{number:016x}" for number in range(5, 13)]
    assert ingest.begin(layers[-1].manifest).lengths == (0, 0, 0, JOURNAL_ENTRY.itemsize, 0)
    assert ingest.begin(layers[0].manifest).lengths == (0, 0, 0, 0, 0)
    ingest.close()


def rows_with(data: bytes, dtype: np.dtype, row: int, field: str, value: int) -> bytes:
    rows = np.frombuffer(data, dtype).copy()
    rows[field][row] = value
    return rows.tobytes()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("volume", 2), ("block", 9), ("block", 0), ("source", 2), ("source", 9), ("reserved", 1),
        ("unit", 1), ("unit", 1 << 40), ("unit", 1 << 63),
    ],
)  # fmt: skip
def test_a_diff_row_that_cannot_be_is_refused(
    ingest: Ingest, interval: Transfer, field: str, value: int
) -> None:
    data = interval.sections[Section.DIFF]
    stored = np.flatnonzero(np.frombuffer(data, DIFF_ENTRY)["source"] == 1)[1]
    with pytest.raises(RemoteProtocolError):
        send(ingest, interval, DIFF=rows_with(data, DIFF_ENTRY, int(stored), field, value))
    send(ingest, interval)


@pytest.fixture
def twice(ingest: Ingest, history: History) -> tuple[Transfer, int]:
    """A snapshot diff in which blocks end with one content, and the first of its rows that share it."""
    for block in (1, 3, 6):
        history.write_blocks(0, block, [b"x" * 1024])
        history.write_blocks(0, block + 1, [bytes([block]) * 1024])
    transfer = history.close_interval()
    rows = np.frombuffer(transfer.sections[Section.DIFF], DIFF_ENTRY)
    return transfer, int(np.flatnonzero(rows["source"] == Source.SHARED_SNAPSHOT)[0])


def test_blocks_that_end_with_one_content_share_it(
    ingest: Ingest, history: History, twice: tuple[Transfer, int], tmp_path: Path
) -> None:
    transfer, _ = twice
    assert len(transfer.sections[Section.DIFF_BLOCKS]) == 4 * 1024, "six blocks, four contents"
    ingest_transfer(ingest, transfer)
    store = Store.open(ingest.path)
    try:
        latest = store.latest()
        assert latest is not None
        assert read_image(store, latest, 0) == history.states[-1][0]
    finally:
        store.close()


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("unit", 4, "no row before"),  # that of the next row
        ("unit", 1 << 20, "no row before"),
        ("unit", 1, "taken at the splitter"),  # between two
        ("unit", 2, "taken at the splitter"),  # another one
    ],
)
def test_a_diff_row_shares_only_what_came_before_it(
    ingest: Ingest, twice: tuple[Transfer, int], field: str, value: int, problem: str
) -> None:
    transfer, row = twice
    data = rows_with(transfer.sections[Section.DIFF], DIFF_ENTRY, row, field, value)
    with pytest.raises(RemoteProtocolError, match=problem):
        send(ingest, transfer, DIFF=data)
    send(ingest, transfer)


@pytest.mark.parametrize("source", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("volume", 2), ("block", 1 << 20), ("seq", 0), ("seq", 13), ("source", 9), ("reserved", 1),
        ("unit", 1 << 40), ("unit", 77),
    ],
)  # fmt: skip
def test_a_journal_row_that_cannot_be_is_refused(
    ingest: Ingest, journal: Transfer, source: int, field: str, value: int
) -> None:
    data = journal.sections[Section.JOURNAL]
    candidates = np.flatnonzero(np.frombuffer(data, JOURNAL_ENTRY)["source"] == source).tolist()
    assert candidates
    with pytest.raises(RemoteProtocolError):
        send(ingest, journal, JOURNAL=rows_with(data, JOURNAL_ENTRY, candidates[-1], field, value))
    send(ingest, journal)


@pytest.fixture
def sharing(ingest: Ingest, history: History) -> Transfer:
    """All layers of a journal: block 3 shares two contents of block 1, and block 6 what block 1 ends with."""
    history.step_ns = 1000  # all in the layer of every write
    for block, letters in ((1, b"xyz"), (3, b"xy"), (6, b"z"), (3, b"b"), (6, b"a")):
        for letter in letters:
            history.write_blocks(0, block, [bytes([letter]) * 1024])
    transfer = history.close_interval()
    (layers,), transfer.layers = transfer.layers, []
    ingest_transfer(ingest, transfer)
    return layers


@pytest.mark.parametrize(
    ("sources", "units", "problem"),
    [
        ((4,), (2,), "taken at the splitter"),  # another one
        ((4,), (1,), "taken at the splitter"),  # between two
        ((4,), (3,), "isn't there"),  # half behind the end
        ((4,), (1 << 20,), "isn't there"),
        ((4, 4), (2, 0), "taken at the splitter"),  # each that of the other
        ((3,), (2,), "taken at the splitter"),
        ((3,), (5,), "isn't there"),
        ((3, 4), (0, 2), "taken at the splitter"),
    ],
)
def test_a_journal_row_shares_only_what_its_block_was_written_with(
    ingest: Ingest, history: History, sharing: Transfer, sources: tuple[int, ...], units: tuple[int, ...], problem: str
) -> None:
    data = sharing.sections[Section.JOURNAL]
    rows = np.frombuffer(data, JOURNAL_ENTRY)
    assert [(row["source"], row["unit"]) for row in rows if row["source"] > 2] == [(4, 0), (4, 2), (3, 0)]
    left = {source: np.flatnonzero(rows["source"] == source).tolist() for source in (3, 4)}
    for source, unit in zip(sources, units, strict=True):
        data = rows_with(data, JOURNAL_ENTRY, left[source].pop(0), "unit", unit)
    with pytest.raises(RemoteProtocolError, match=problem):
        send(ingest, sharing, JOURNAL=data)
    store = Store.open(ingest.path)
    assert [interval.granularity_ns for interval in store.intervals()] == [None]
    store.close()
    send(ingest, sharing)
    store = Store.open(ingest.path)
    for seq in range(1, len(history.states)):
        assert read_image(store, store.at_seq(seq), 0) == history.states[seq][0]
    store.close()


@pytest.mark.parametrize("kind", ["diff", "journal"])
def test_what_is_shared_has_to_be_vouched_for(
    ingest: Ingest, request: pytest.FixtureRequest, kind: str
) -> None:
    transfer = request.getfixturevalue("twice")[0] if kind == "diff" else request.getfixturevalue("sharing")
    with pytest.raises(RemoteProtocolError, match="without the checksums"):
        send(ingest, transfer, end=End(transfer.end.lengths, None))
    send(ingest, transfer)


def test_a_content_that_coarser_layers_brought_is_shared_whole_or_not_at_all(
    ingest: Ingest, history: History
) -> None:
    for _ in range(60):
        history.write()
    transfer = history.close_interval(before_ns=(100_000_000,))
    (coarse, fine), transfer.layers = transfer.layers, []
    ingest_transfer(ingest, transfer)
    send(ingest, coarse)
    rows = np.frombuffer(fine.sections[Section.JOURNAL], JOURNAL_ENTRY)
    base = fine.manifest.base_bytes // 512
    before = (rows["source"] == Source.SHARED_JOURNAL) & (rows["unit"] < base) & (rows["volume"] == 0)
    row = int(np.flatnonzero(before)[0])
    wrong = rows_with(fine.sections[Section.JOURNAL], JOURNAL_ENTRY, row, "unit", base - 1)
    with pytest.raises(RemoteProtocolError, match="isn't there"):
        send(ingest, fine, JOURNAL=wrong)
    send(ingest, fine)


def test_a_row_that_leads_to_a_block_which_was_not_written_is_refused(ingest: Ingest, journal: Transfer) -> None:
    data = journal.sections[Section.JOURNAL]
    rows = np.frombuffer(data, JOURNAL_ENTRY)
    written = {(int(row["volume"]), int(row["block"])) for row in rows}
    own = next(n for n, row in enumerate(rows) if row["source"] == 1)
    volume = int(rows[own]["volume"])
    others = [block for block in range(9 if volume == 0 else 10) if (volume, block) not in written]
    assert others
    with pytest.raises(RemoteProtocolError, match="didn't write"):
        send(ingest, journal, JOURNAL=rows_with(data, JOURNAL_ENTRY, own, "block", others[0]))


@pytest.mark.parametrize("section", [Section.DIFF_BLOCKS, Section.JOURNAL_BLOCKS])
def test_contents_must_be_what_the_splitter_took_in(
    ingest: Ingest, interval: Transfer, request: pytest.FixtureRequest, section: Section
) -> None:
    transfer = interval if section is Section.DIFF_BLOCKS else request.getfixturevalue("journal")
    data = bytearray(transfer.sections[section])
    data[-1] ^= 1
    with pytest.raises(RemoteProtocolError, match=r"taken at the splitter|isn't there"):
        send(ingest, transfer, **{section.name: bytes(data)})
    with pytest.raises(RemoteProtocolError, match="whole blocks"):
        send(ingest, transfer, **{section.name: bytes(data[:-1])})
    with pytest.raises(RemoteProtocolError, match="missing"):
        send(ingest, transfer, **{section.name: b""})
    with pytest.raises(RemoteProtocolError, match="no row named"):
        send(ingest, transfer, **{section.name: transfer.sections[section] + bytes(1024)})
    send(ingest, transfer)


def test_contents_before_their_rows_are_refused(ingest: Ingest, interval: Transfer) -> None:
    ingest.begin(interval.manifest)
    with pytest.raises(RemoteProtocolError, match="no row named"):
        ingest.data(Data(Section.DIFF_BLOCKS, 0, interval.sections[Section.DIFF_BLOCKS]))


@pytest.mark.parametrize("section", [Section.DIFF, Section.POSITIONS, Section.JOURNAL])
def test_missing_repeated_or_broken_rows_are_refused(
    ingest: Ingest, interval: Transfer, request: pytest.FixtureRequest, section: Section
) -> None:
    transfer = interval if section is Section.DIFF else request.getfixturevalue("journal")
    data, size = (
        transfer.sections[section],
        ROWS[section].itemsize,
    )
    wrongs = [data[:-size], data + data[-size:], data[:-1], data[size:] + data[-size:], b""]
    if section is not Section.JOURNAL:  # there another layer may begin
        wrongs.append(data[size:] + data[:size])
    for wrong in wrongs:
        with pytest.raises(RemoteProtocolError):
            send(ingest, transfer, **{section.name: wrong})
    send(ingest, transfer)


def test_the_lengths_at_the_end_must_be_those_that_came(ingest: Ingest, interval: Transfer) -> None:
    ingest.begin(interval.manifest)
    with pytest.raises(RemoteProtocolError, match="have come"):
        ingest.end(interval.end)


def test_a_journal_is_refused_where_only_the_snapshot_was_announced(ingest: Ingest, history: History) -> None:
    history.write()
    transfer = history.close_interval(None)
    ingest.begin(transfer.manifest)
    with pytest.raises(RemoteProtocolError, match="isn't part"):
        ingest.data(Data(Section.POSITIONS, 0, bytes(16)))


def test_a_frame_larger_than_the_limit_is_refused(ingest: Ingest, interval: Transfer) -> None:
    ingest.begin(interval.manifest)
    with pytest.raises(RemoteProtocolError, match="at most"):
        ingest.data(Data(Section.DIFF, 0, bytes(MAX_PAYLOAD_BYTES + 1)))


# Batches of rows


@pytest.mark.parametrize("seed", range(4))
def test_more_rows_than_a_batch_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("pitfs.store.transfer.sections.BATCH_ROWS", 3)
    history = History(seed, (VolumeInfo("a", 100_000, 512), VolumeInfo("b", 90_000, 2048)))
    made = Ingest(str(tmp_path), history.hello)
    for number in range(3):
        for _ in range(60 * number):
            history.write()
        ingest_transfer(made, history.close_interval(before_ns=(100_000_000, 10_000_000)), seed)
    store = Store.open(made.path)
    for seq in range(0, history.at[0] + 1, 7):
        for volume in range(2):
            assert read_image(store, store.at_seq(seq), volume) == history.states[seq][volume]
    store.close()
    made.close()


# Two senders of one group


def sender(history: History, epoch: int, instance: int) -> Hello:
    return msgspec.structs.replace(history.hello, epoch=epoch, instance=instance)


def test_a_sender_that_was_superseded_is_refused(
    ingest: Ingest, tmp_path: Path, history: History, interval: Transfer
) -> None:
    ingest.close()
    for epoch, instance in ((5, 1), (5, 1), (7, 2)):
        made = Ingest(str(tmp_path), sender(history, epoch, instance))
        made.begin(interval.manifest)
        made.close()
    for epoch, instance in ((5, 1), (6, 9), (7, 3), (0, 0)):
        with pytest.raises(PositionMismatchError, match=r"another production host.*stop the one that shouldn't"):
            Ingest(str(tmp_path), sender(history, epoch, instance))
    Ingest(str(tmp_path), sender(history, 8, 3)).close()
    Ingest(str(tmp_path), sender(history, 7, 2)).close()  # it only looked: what it has may not lead on
    made = Ingest(str(tmp_path), sender(history, 8, 3))
    with pytest.raises(PositionMismatchError, match="begin the session anew"):
        made.begin(changed(interval.manifest, mark=9))
    made.close()
    Ingest(str(tmp_path), sender(history, 7, 2)).close()


MS = 1_000_000


@pytest.mark.parametrize(
    ("rung_ns", "batches", "words"),
    [
        (10 * MS, [[(2, 12), (3, 25)], [(5, 31)]], ""),
        (10 * MS, [[(2, 12), (3, 19)]], "ends of granules"),
        (10 * MS, [[(2, 12)], [(3, 19)]], "ends of granules"),
        (10 * MS, [[(2, 12), (5, 41)]], "ends of granules"),
        (10 * MS, [[(2, 25), (3, 12)]], "fit"),
        (10 * MS, [[(3, 12)], [(2, 25)]], "fit"),
        (0, [[(2, 12), (3, 25)], [(4, 31), (5, 32), (6, 33), (7, 45)]], ""),
        (0, [[(2, 12), (4, 31)]], "without its position"),
        (0, [[(2, 12), (3, 25)]], "last one"),
        (0, [[(2, 12), (3, 25), (4, 31), (5, 32), (6, 33), (7, 44)]], "last one"),
    ],
    ids=str,
)
def test_positions_are_all_writes_or_the_ends_of_granules(
    rung_ns: int, batches: list[list[tuple[int, int]]], words: str
) -> None:
    """Writes from 5 ms on, an interval that ends at 45 ms with write 7, granules of 10 ms."""
    manifest = changed(
        MANIFEST, from_seq=1, from_time_ns=2 * MS, to_seq=7, to_time_ns=45 * MS, first_time_ns=5 * MS,
        granularity_ns=rung_ns, position_count=6,
    )  # fmt: skip
    check = PositionsInOrder(manifest)
    with pytest.raises(RemoteProtocolError, match=words) if words else nullcontext():
        for batch in batches:
            check.take(np.array([(seq, at * MS) for seq, at in batch], POSITION))
        check.finish()


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ([(2, 4)], "first time"), ([(9, 25)], "behind"), ([(3, 12), (2, 13)], "ascend"),
        ([(2, 12), (3, 13), (4, 14), (5, 15)], "announced"),
    ],
    ids=str,
)  # fmt: skip
def test_positions_that_cannot_be_are_refused(positions: list[tuple[int, int]], words: str) -> None:
    manifest = changed(
        MANIFEST, from_seq=1, from_time_ns=2 * MS, to_seq=7, to_time_ns=45 * MS, first_time_ns=5 * MS, position_count=3
    )
    with pytest.raises(RemoteProtocolError, match=words):
        PositionsCheck(manifest).take(np.array([(seq, at * MS) for seq, at in positions], POSITION))
