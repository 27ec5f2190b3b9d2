"""pitfs check: whatever is damaged in a store is noticed or harmless, and the instants named are those that suffer."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from pitfs.cli.main import main
from pitfs.errors import PitfsError
from pitfs.model.transfer import VolumeInfo
from pitfs.store.check import check as check_module
from pitfs.store.check import progress as progress_module
from pitfs.store.check.check import Report, check
from pitfs.store.check.progress import at_rate
from pitfs.store.index import format
from pitfs.store.ingest import Ingest
from pitfs.store.objects.damage import DamageLog
from pitfs.store.objects.format import HEADER_BYTES, ObjectName
from pitfs.store.store import Store
from pitfs.supervision import scrub
from pitfs.view.view import PointInTimeView, ReadBuffer
from tests.helpers.stores import ingest_transfer, object_files
from tests.helpers.streams import batch_of, mark_of
from tests.helpers.transfers import History
from tests.property.test_removal import made as filled
from tests.property.test_removal import opened, remove

VOLUMES = (VolumeInfo("a", 9_000, 1024), VolumeInfo("b", 530 * 512, 512))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, History]:
    """A store of all there is: layers, a coarse interval, snapshots only, streamed ones, one that is open."""
    history = History(11, VOLUMES)
    history.images[1][10 * 512 : 520 * 512] = bytes(510 * 512)  # two leaves, but few blocks
    history.base = [bytes(image) for image in history.images]
    history.states.clear()
    history._keep_state()
    ingest = Ingest(str(tmp_path_factory.mktemp("made")), history.hello)

    def write(count: int) -> None:
        for _ in range(count):
            history.write()

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda fd: None)
        patch.setattr(format, "CHUNK_ROWS", 2)  # so that indexes have many chunks, some of them of one block
        patch.setattr(format, "CHUNK_POSITIONS", 3)
        ingest_transfer(ingest, history.close_interval())
        write(8)
        ingest_transfer(ingest, history.close_interval(0, ("one",), before_ns=(100_000_000,)))
        write(7)
        ingest_transfer(ingest, history.close_interval(100_000_000))
        write(3)
        ingest_transfer(ingest, history.close_interval(None, ("two",)))
        for _ in range(2):
            write(4)
            ingest.write(batch_of(history.open))
            ingest.mark(mark_of(history))
            ingest.stream.wait_for_closing()
        for _ in range(3):
            start = len(history.open)
            write(2)
            ingest.write(batch_of(history.open[start:]))
            ingest.publish()
        ingest.close()
    return Path(ingest.path), history


@pytest.fixture
def store(made: tuple[Path, History], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)
    shutil.copytree(made[0], tmp_path / "store")
    return tmp_path / "store"


def instants(path: Path) -> list[tuple[int, int]]:
    """(seq, time_ns) of all that can be reached in a store that is whole."""
    opened = Store.open(str(path))
    found = {each.seq: each.time_ns for each in opened.snapshots()}
    for interval in [*opened.intervals(), *opened.open_intervals()]:
        for seq in range(interval.from_seq + 1, interval.to_seq + 1):
            state = opened.at_seq(seq)
            found[state.seq] = state.time_ns
    opened.close()
    return sorted(found.items())


def unreadable(path: Path, history: History, states: list[tuple[int, int]]) -> set[int]:
    """time_ns of the instants that can't be read. None of the others is wrong."""
    found, buffer = set[int](), ReadBuffer()
    try:
        opened = Store.open(str(path))
    except PitfsError:
        return {time_ns for _, time_ns in states}
    for seq, time_ns in states:
        try:
            state = opened.at_instant(time_ns)
            if state is None:
                found.add(time_ns)
                continue
            for volume in range(len(VOLUMES)):
                view = PointInTimeView(opened, state, volume)
                assert view.read(0, view.size_bytes, buffer) == history.states[seq][volume], "wrong bytes"
        except PitfsError:
            found.add(time_ns)
    opened.close()
    return found


def named(report: Report, states: list[tuple[int, int]]) -> set[int]:
    stretches = [each for _, found in report.damaged for each in found]
    return {time_ns for _, time_ns in states if any(first <= time_ns <= last for first, last in stretches)}


def run(path: Path, has_data: bool = True, paced: Callable[[int], None] = lambda count: None) -> Report:
    return check(str(path), has_data, paced)


def expect(
    path: Path, history: History, states: list[tuple[int, int]], what: str, seen: set[str] | None = None
) -> Report | None:
    """Noticed, with exactly the instants that suffer, or harmless. `seen`: reports that have been compared."""
    Path(path, "damaged").unlink(missing_ok=True)
    try:
        report = run(path)
        if seen is not None and report.damaged and str(report.damaged) in seen:
            return report
        suffering = unreadable(path, history, states)
    except PitfsError as error:
        assert "catalog.sqlite" in str(error) or "store.json" in str(error), what
        return None
    if seen is not None:
        seen.add(str(report.damaged))
    assert report.damaged or not suffering, f"{what}: not noticed"
    if any(damage.kind == "catalog" for damage, _ in report.damaged):
        assert named(report, states) >= suffering, f"{what}: {report.damaged}"  # of what it can't look at, all
    else:
        assert named(report, states) == suffering, f"{what}: {report.damaged}"
        assert {each.place for each in DamageLog(str(path)).known()} >= {each.place for each, _ in report.damaged}
    return report


def places(path: Path, step: Callable[[int], Iterator[int]]) -> Iterator[tuple[Path, int]]:
    for file in [*object_files(path), path / "catalog.sqlite"]:
        for offset in step(file.stat().st_size):
            yield file, offset


def flip_each(
    store: Path, history: History, step: Callable[[int], Iterator[int]], seen: set[str] | None = None
) -> tuple[int, int]:
    states, noticed, count = instants(store), 0, 0
    for file, offset in places(store, step):
        whole = file.read_bytes()
        bit = 1 << (offset * 7 + 3) % 8
        file.write_bytes(whole[:offset] + bytes([whole[offset] ^ bit]) + whole[offset + 1 :])
        report = expect(store, history, states, f"{file.name} at byte {offset}", seen)
        noticed, count = noticed + bool(report is None or report.damaged), count + 1
        for each in store.glob("catalog.sqlite-*"):
            each.unlink()
        file.write_bytes(whole)
    return noticed, count


def test_a_store_that_is_whole_has_no_damage(store: Path) -> None:
    for has_data in (False, True):
        report = run(store, has_data)
        assert report.damaged == [] and report.objects == len(object_files(store)) - 1
    assert report.bytes > 40_000
    assert not (store / "damaged").exists()


def test_a_bit_flipped_anywhere_is_noticed_or_harmless(store: Path, made: tuple[Path, History]) -> None:
    random = np.random.default_rng(3)
    noticed, count = flip_each(store, made[1], lambda size: iter(sorted(random.integers(0, size, 3).tolist())))
    assert noticed > count / 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("start", range(64))
def test_each_byte_flipped_is_noticed_or_harmless(store: Path, made: tuple[Path, History], start: int) -> None:
    flip_each(store, made[1], lambda size: iter(range(start, size, 64)), set())


def test_objects_that_are_removed_cut_or_swapped_are_noticed(store: Path, made: tuple[Path, History]) -> None:
    states, files = instants(store), object_files(store)
    for number, file in enumerate(files):
        whole = file.read_bytes()
        file.unlink()
        report = expect(store, made[1], states, f"{file.name} removed")
        assert report is not None and report.damaged
        for cut in (40, len(whole) - 1, (len(whole) + 4096) // 2):
            file.write_bytes(whole[:cut])
            report = expect(store, made[1], states, f"{file.name} cut at {cut}")
            assert report is not None and report.damaged
        other = files[number - 1]
        others = other.read_bytes()
        file.write_bytes(others)
        other.write_bytes(whole)
        report = expect(store, made[1], states, f"{file.name} and {other.name} swapped")
        assert report is not None and report.damaged
        file.write_bytes(whole)
        other.write_bytes(others)
    (store / "objects" / "other").write_bytes(b"?")
    report = expect(store, made[1], states, "an unknown file")
    assert report is not None and not report.damaged


@pytest.mark.parametrize("version", [1, 2])
def test_stores_of_earlier_versions_are_checked(tmp_path: Path, version: int) -> None:
    golden = Path(__file__).parents[1] / "golden" / f"version-{version}" / "streamed.tar.xz"
    with tarfile.open(golden) as archive:
        archive.extractall(tmp_path)
    report = run(tmp_path / "streamed" / "g")
    assert report.damaged == [] and report.objects > 20 and report.bytes > 1_000_000


class Stopped(Exception):
    """The check is stopped here."""


def test_a_check_that_is_stopped_goes_on(
    store: Path, made: tuple[Path, History], monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = object_files(store, "snapshot-*1.blocks")
    whole = file.read_bytes()
    file.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    expected = expect(store, made[1], instants(store), "once")
    for name in ("check-data.progress", "damaged"):
        (store / name).unlink()
    monkeypatch.setattr(check_module, "BATCH_BYTES", 6_000)
    monkeypatch.setattr(check_module, "SAVE_S", 0.0)
    counts: list[int] = []
    left = [1, 30_000]  # that may be read of the first time, the second

    def paced(count: int) -> None:
        counts.append(count)
        if left and sum(counts) > left[0]:
            raise Stopped

    read = []
    while left:
        counts.clear()
        with pytest.raises(Stopped):
            run(store, paced=paced)
        read.append(check_module.Progress.read(str(store), True).bytes)
        left.pop(0)
    assert read[0] < read[1] > 0
    assert [each.object for each in DamageLog(str(store)).known()] == [file.name]
    counts.clear()
    report = run(store, paced=paced)
    assert expected is not None and report.damaged == expected.damaged != []
    assert 0 <= read[1] + sum(counts) - expected.bytes <= 4096  # what two blocks share may come in two batches


def test_at_a_small_rate_it_is_saved_in_time(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(check_module.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(check_module, "FIRST_BYTES", 1000)
    total = run(store).bytes
    counts: list[int] = []

    def paced(count: int) -> None:
        counts.append(count)
        now_s[0] += count / 1000
        if sum(counts) > total // 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(store, paced=paced)  # though one that is finished has left its record
    progress = check_module.Progress.read(str(store), True)
    assert progress.is_under_way and total // 2 - 25_000 < progress.bytes > 0
    counts.clear()
    read = []
    assert run(store, paced=read.append).bytes == progress.bytes + sum(read)
    assert progress.bytes + sum(read) - total <= 4096


def test_a_journal_is_gone_on_with_where_it_was_left(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "BATCH_BYTES", 1)
    monkeypatch.setattr(check_module, "SAVE_S", 0.0)
    monkeypatch.setattr(format, "CHUNK_ROWS", 2)
    kept = []
    save = check_module.Progress.save
    monkeypatch.setattr(
        check_module.Progress, "save",
        lambda self, path: (save(self, path), kept.append((store / "check-data.progress").read_bytes())),
    )  # fmt: skip
    total = run(store).bytes
    within = [each for each in map(json.loads, kept) if each["rows"] and not each["leaf"] + each["volume"]]
    assert len({each["rows"] for each in within}) > 2
    for each in within:
        (store / "check-data.progress").write_text(json.dumps(each))
        read: list[int] = []
        assert run(store, paced=read.append).bytes <= total + 4096
        assert sum(read) < total - each["bytes"] + 4096


def test_the_rate_is_held(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(check_module.time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(check_module.time, "sleep", lambda delay_s: now_s.append(now_s.pop() + delay_s))
    report = run(store, paced=at_rate(1000))
    assert report.bytes / 1000 - 2 <= now_s[0] - 100 <= report.bytes / 1000


def test_the_command_names_what_is_damaged_and_a_store_that_cannot_be_written_is_checked(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["check", str(store), "--data"]) == 0
    assert "no damaged places" in capsys.readouterr().out
    (file,) = object_files(store, "snapshot-*2.blocks")
    file.unlink()
    real = os.open

    def refusing(path: str, flags: int, *more: int, **named: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(store)):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refusing)
    assert main(["check", str(store), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"objects", "bytes", "damaged", "healed"}
    (row,) = printed["damaged"]
    assert (row["object"], row["from"], row["to"], row["kind"]) == (file.name, 0, None, "missing")
    assert [set(each) for each in row["instants"]] == [{"from", "to"}]
    assert main(["check", str(store)]) == 1
    printed_text = capsys.readouterr()
    assert file.name in printed_text.out and row["instants"][0]["from"] in printed_text.out
    assert "--data tells" in printed_text.err and "--heal" in printed_text.err
    assert "--rebuild" not in printed_text.err and "copy of the store" not in printed_text.err
    assert not (store / "damaged").exists()


@pytest.mark.parametrize("args", [["--rate", "1x", "--data"], ["--rate", "0", "--data"], ["--rate", "1MB"]])
def test_a_rate_that_cannot_be_meant_is_refused(
    store: Path, capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    assert main(["check", str(store), *args]) == 2
    assert "--rate" in capsys.readouterr().err


def test_the_receiver_checks_a_store_once_a_month(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    month_s = 31 * 86_400
    now_s = time.time()
    for after_s, count in ((0, 0), (month_s, 1), (month_s + 60, 1), (2 * month_s + 60, 2)):
        monkeypatch.setattr(scrub.time, "time_ns", lambda after_s=after_s: int((now_s + after_s) * 1e9))
        scrub.scrub_if_due(str(store))
        assert len(caplog.records) == count, after_s
    monkeypatch.setattr(scrub.time, "time_ns", lambda: int((now_s + 9 * month_s) * 1e9))
    (store / "store.json").write_text("?")
    scrub.scrub_if_due(str(store))
    assert "tried again" in caplog.records[-1].message


@pytest.mark.parametrize("seed", range(2))
def test_what_a_removal_leaves_is_whole_and_its_damage_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)
    history = History(seed + 40, (VolumeInfo("a", 9_000, 1024), VolumeInfo("b", 5_000, 512)))
    path = Path(filled(tmp_path, history, 8))
    with opened(str(path)) as writable:
        ids = [each.id for each in writable.catalog.snapshots()]
        for after_id, before_id in ((None, ids[1]), (ids[2], ids[5]), (ids[5], ids[7])):
            remove(writable, after_id, before_id)
    for has_data in (False, True):
        assert run(path, has_data).damaged == []
    states, random = instants(path), np.random.default_rng(seed)
    monkeypatch.setattr("tests.property.test_check.VOLUMES", history.volumes)
    for file in object_files(path):
        whole = file.read_bytes()
        data = [place for place in range(4096, len(whole)) if whole[place]]
        for offset in random.choice(data, 2).tolist() if data else ():
            file.write_bytes(whole[:offset] + bytes([whole[offset] ^ 4]) + whole[offset + 1 :])
            expect(path, history, states, f"{file.name} at byte {offset}")
        file.unlink()
        expect(path, history, states, f"{file.name} removed")
        file.write_bytes(whole)


def test_a_removal_while_it_is_checked_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)
    monkeypatch.setattr(check_module, "BATCH_BYTES", 1)
    history = History(51, (VolumeInfo("a", 9_000, 1024), VolumeInfo("b", 5_000, 512)))
    path = filled(tmp_path, history, 12)
    with opened(path) as writable:
        ids = [each.id for each in writable.catalog.snapshots()]
        left, calls = [(ids[7], ids[11]), (ids[3], ids[6]), (None, ids[2])], 0

        def paced(count: int) -> None:
            nonlocal calls
            calls += 1
            if calls % 3 == 0 and left:
                remove(writable, *left.pop())

        assert run(Path(path), paced=paced).damaged == [] == left
    assert not Path(path, "damaged").exists()


def test_it_goes_on_beside_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are closed, their logs are removed, while the check reads them."""
    monkeypatch.setattr(check_module, "BATCH_BYTES", 1)
    monkeypatch.setattr(check_module, "PART_BYTES", 1024)
    history = History(52, (VolumeInfo("a", 9_000, 1024),))
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, history.close_interval())
    calls = 0

    def stream(close: bool) -> None:
        start = len(history.open)
        for _ in range(3):
            history.write()
        ingest.write(batch_of(history.open[start:]))
        ingest.publish()
        if close:
            ingest.mark(mark_of(history))
            ingest.stream.wait_for_closing()

    def paced(count: int) -> None:
        nonlocal calls
        calls += 1
        if calls < 40:
            stream(calls % 4 == 0)

    stream(False)
    assert run(Path(ingest.path), paced=paced).damaged == []
    assert calls >= 20
    ingest.close()


def test_damage_that_is_known_is_looked_at_again_without_its_object_being_read(
    store: Path, made: tuple[Path, History]
) -> None:
    (file,) = object_files(store, "snapshot-*1.blocks")
    whole = file.read_bytes()
    file.write_bytes(whole[:4100] + bytes([whole[4100] ^ 1]) + whole[4101:])
    assert run(store, has_data=False).damaged == []
    states = instants(store)
    suffering = unreadable(store, made[1], states)
    for has_data in (False, True, False):
        assert named(run(store, has_data), states) == suffering
        assert [each.object for each in DamageLog(str(store)).known()] == [file.name]
    file.write_bytes(whole)
    assert run(store, has_data=False).damaged == [] == DamageLog(str(store)).known()


def test_a_catalog_that_is_lost_is_made_again_and_checked(
    store: Path, made: tuple[Path, History], capsys: pytest.CaptureFixture[str]
) -> None:
    states = instants(store)
    (store / "catalog.sqlite").write_bytes(b"?" * 8192)
    assert main(["check", str(store)]) == 1
    printed = capsys.readouterr()
    assert "--rebuild" in printed.err and "--heal" not in printed.err
    assert main(["check", str(store), "--rebuild", "--data"]) == 0
    assert "nothing is missing" in capsys.readouterr().out
    assert unreadable(store, made[1], states) == set()


def test_healing_without_production_says_so_and_lists_the_damage(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = object_files(store, "snapshot-*2.blocks")
    whole = file.read_bytes()
    file.write_bytes(whole[:4100] + bytes([whole[4100] ^ 1]) + whole[4101:])
    assert main(["check", str(store), "--data", "--heal"]) == 1
    printed = capsys.readouterr()
    assert file.name in printed.out and "pitfs protect" in printed.err


@pytest.mark.parametrize("part_bytes", [2048, 4096, 8192])
def test_what_is_missing_in_one_part_makes_no_damage_of_the_next(
    store: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    """Contents of a part that can't be read are read one after the other, while the next part is being read."""
    monkeypatch.setattr(check_module, "PART_BYTES", part_bytes)
    read = check_module.ContentReader.parts

    def slowly(self: object, pointers: np.ndarray, *rest: object) -> Iterator[object]:
        if len(pointers) == 1:
            time.sleep(0.001)  # so that the next part is there
        return read(self, pointers, *rest)

    monkeypatch.setattr(check_module.ContentReader, "parts", slowly)
    for path in object_files(str(store), "*.blocks"):
        whole = path.read_bytes()
        os.truncate(path, HEADER_BYTES + (len(whole) - HEADER_BYTES) // 2)
        assert {damage.object for damage, _ in run(store).damaged} == {path.name}
        path.write_bytes(whole)
        assert run(store).damaged == []


def test_files_that_are_no_text_are_damage_like_any_other(store: Path) -> None:
    found = b'{"has_data":true,"seq":1,"found":[{"object":"\xff","offset":1,"size":1,"kind":"node"}]}'
    (store / progress_module.PROGRESS[True]).write_bytes(found)
    assert run(store).damaged == []
    (store / "store.json").write_bytes(b'{"\xe2":1}')
    with pytest.raises(PitfsError, match=r"store\.json"):
        run(store)


def test_a_file_that_is_made_again_is_missing_in_one_line_as_long_as_its_contents_are(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = object_files(store, "snapshot-*1.blocks")
    file.unlink()
    assert main(["check", str(store), "--heal"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert all(line.endswith(": missing") for line in printed[1:] if file.name in line)
    places = len(DamageLog(str(store)).known())
    assert main(["check", str(store), "--data", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["damaged"]
    assert len(rows) < places and {row["kind"] for row in rows} == {"missing"}
    for one, other in itertools.pairwise(rows):
        assert one["to"] <= other["from"] and (one["to"], one["instants"]) != (other["from"], other["instants"])


def test_of_an_object_that_was_moved_the_file_is_named_in_which_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)
    path = Path(filled(tmp_path, History(43, (VolumeInfo("a", 9_000, 1024),)), 8))
    with opened(str(path)) as writable:
        ids = [each.id for each in writable.catalog.snapshots()]
        remove(writable, ids[2], ids[5])
    with closing(Store.open(str(path))) as reading:
        found = read_moved(reading, ids[5])
    assert found is not None
    name, file, start = found
    data = bytearray(Path(file).read_bytes())
    data[start] ^= 1
    Path(file).write_bytes(data)
    assert main(["check", str(path), "--data", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["damaged"]
    assert row["object"] == name and not object_files(path, name)
    assert path / row["file"] == Path(file) and row["file_offset"] == start
    assert main(["check", str(path), "--data"]) == 1
    printed = capsys.readouterr().out
    assert f"{row['file']}, bytes {start} to " in printed and name not in printed
    assert main(["digest", str(path), row["instants"][0]["from"], "a"]) == 1
    assert f"{file}: damaged at byte {start}: block " in capsys.readouterr().err


def read_moved(store: Store, snapshot_id: int) -> tuple[str, str, int] | None:
    """A moved object whose contents the snapshot has: its name, the file, and the byte there of one of them."""
    layout, (state,) = store.objects.layout, [each for each in store.snapshots() if each.id == snapshot_id]
    for pointer in map(int, store.leaf(store.at_seq(state.seq), 0, 0)[0]):
        name = ObjectName.of_number(layout.object_of(pointer)) if pointer else None
        if name is not None and store.objects.fd_of(name).base:
            return name.file, *store.objects.place(name, layout.offset_of(pointer))
    return None
