"""A walk over an image reads each chunk of an index once or twice, however many leaves the image has."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from pitfs.model.transfer import VolumeInfo
from pitfs.restore.export import export
from pitfs.store.index import format as index_format
from pitfs.store.ingest import Ingest
from pitfs.store.objects.format import ObjectName
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.store import Store
from pitfs.view.differences import Difference
from pitfs.view.view import PointInTimeView
from tests.helpers.stores import ingest_transfer
from tests.helpers.streams import FakeClock, batch_of
from tests.helpers.transfers import History

LEAVES = 40
WRITES = 1200  # of 4 blocks each: 600 chunks of 8 rows, ten times as many as the cache keeps
LEAF_BYTES = 512 * 512


class WideHistory(History):
    """Without its states: they would take 10 MiB for each write."""

    def _keep_state(self) -> None:
        pass


def written_wide() -> WideHistory:
    """The first writes go to the volume's end, far away from a walk's start; all are strewn over it."""
    history = WideHistory(7, (VolumeInfo("root", LEAVES * LEAF_BYTES, 512),))
    for number in range(WRITES):
        block = (WRITES - 1 - number * 601 % WRITES) * (LEAVES * 512 // WRITES)
        history.write_blocks(0, block, [bytes([1 + number % 250]) * 512] * 4)
    return history


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, path: Path, ends: str) -> Iterator[tuple[Store, Counter[int]]]:
    """The store, opened anew, and how often each piece of an object with such a name was read by its offset."""
    reads: Counter[int] = Counter()
    real = ObjectPool.read_verified

    def count(self: ObjectPool, name: ObjectName, size: int, offset: int, checksum: int) -> bytes:
        if name.file.startswith("journal-") and name.file.endswith(ends):
            reads[offset] += 1
        return real(self, name, size, offset, checksum)

    monkeypatch.setattr(ObjectPool, "read_verified", count)
    with contextlib.closing(Store.open(str(path))) as store:
        store.at_seq(3)  # the sparse index is read before the walk
        reads.clear()
        yield store, reads


@pytest.fixture(scope="module", params=["journal", "streamed"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A store in whose last interval all was written, and how the name of the object with its index ends."""
    tmp = tmp_path_factory.mktemp("wide")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_format, "CHUNK_ROWS", 8)
        history = written_wide()
        clock = FakeClock()
        with contextlib.closing(Ingest(str(tmp), history.hello, clock)) as ingest:
            ingest_transfer(ingest, history.close_interval())
            if request.param == "journal":
                ingest_transfer(ingest, history.close_interval())
            else:
                for start in range(0, WRITES, WRITES // 6):
                    ingest.write(batch_of(history.open[start : start + WRITES // 6]))
                    ingest.flush(history.times_ns[start + WRITES // 6])
                    clock.now_s += 1
                    ingest.publish()
    return tmp / history.group, ".index" if request.param == "journal" else ".blocks"


@pytest.mark.parametrize("seq", [0, 3, WRITES // 2, WRITES - 1])
def test_the_data_ranges_of_an_instant(wide: tuple[Path, str], seq: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch, *wide) as (store, reads):
        ranges = list(PointInTimeView(store, store.at_seq(seq), 0).data_ranges())
        assert ranges[-1][1] > (LEAVES - 1) * LEAF_BYTES
        assert max(reads.values(), default=0) <= 2, reads.most_common(3)


def test_block_status_asked_piece_by_piece(wide: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch, *wide) as (store, reads):
        view = PointInTimeView(store, store.at_seq(3), 0)
        for start in range(0, LEAVES * LEAF_BYTES, LEAF_BYTES):
            assert list(view.data_ranges(start, start + LEAF_BYTES))
        assert max(reads.values()) <= 2, reads.most_common(3)


@pytest.mark.parametrize("seqs", [(3, WRITES), (WRITES * 4 // 6 - 2, WRITES)])  # the second at the end of a run
def test_what_differs_between_two_instants(
    wide: tuple[Path, str], seqs: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted(monkeypatch, *wide) as (store, reads):
        assert list(Difference(store, *map(store.at_seq, seqs), 0).leaves())
        assert max(reads.values()) <= 2, reads.most_common(3)


def test_the_export_of_an_early_instant(
    wide: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def progress(title: str, total: int) -> Iterator[object]:
        yield lambda done: None

    with counted(monkeypatch, *wide) as (store, reads):
        view = PointInTimeView(store, store.at_seq(3), 0)
        export(view, str(tmp_path / "image"), replace=False, verify=True, progress=progress)  # type: ignore[arg-type]
        assert max(reads.values()) <= 2, reads.most_common(3)
