"""Places in the journal are found by a search over its segments: each one that is there, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pitfs.errors import CorruptionError
from pitfs.journal.reader import JournalReader
from pitfs.journal.search import Found, Key, key_of, last_seq_before
from pitfs.journal.writer import Location
from pitfs.splitter.startup import journal_directory
from pitfs.storage.segment import list_segments, segment_path
from tests.helpers.pipeline import Pipeline

SIZES, BLOCK_SIZES = [70_000, 33_000], [4096, 512]


class Journal:
    """A journal of many small segments, and what a reader of all of it finds: the place behind each key."""

    def __init__(self, tmp: Path, seed: int) -> None:
        self.pipeline = pipeline = Pipeline(tmp, SIZES, BLOCK_SIZES, seed=seed)
        splitter, random = pipeline.splitter, pipeline.random
        splitter.journal.limit_count = 100
        for _ in range(25):
            for _ in range(int(random.integers(0, 6))):
                pipeline.random_write()
            for _ in range(int(random.integers(0, 3))):
                splitter.mark()
            if random.random() < 0.1:
                splitter.start_copy("to try it")
            splitter.journal.begin_new_segment()
        self.directory, self.tail = journal_directory(pipeline.state), splitter.journal.tail
        reader = self.reader()
        self.places: dict[Key, tuple[Location, Location]] = {}
        for place, record in reader.records(self.tail):
            key = key_of(record)
            if key is not None:
                assert not self.places or key > max(self.places)
                self.places[key] = place, reader.location
        reader.close()

    def reader(self) -> JournalReader:
        reader = JournalReader(self.directory, BLOCK_SIZES)
        reader.seek(Location(1, 4096), (0, 0))
        return reader

    def seek(self, key: Key) -> tuple[Found, Location]:
        reader = self.reader()
        try:
            seq, mark = key
            found = reader.seek_mark(mark, seq, self.tail) if mark else reader.seek_write(seq, self.tail)
            assert found is not Found.THERE or reader.position[0] == seq
            return found, reader.location
        finally:
            reader.close()


@pytest.fixture(params=range(6))
def journal(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    made = Journal(tmp_path, request.param)
    yield made
    made.pipeline.close()


def test_every_place_is_found_whatever_was_given_back(journal: Journal) -> None:
    for first in (1, 2, 9, 20):
        journal.pipeline.splitter.journal.release(first)
        for key, (place, behind) in journal.places.items():
            wanted = (Found.THERE, behind) if place.segment >= first else (Found.ERASED, Location(1, 4096))
            assert journal.seek(key)[0] is wanted[0], (first, key)
            assert place.segment < first or journal.seek(key) == wanted
        before = [key[0] for key, (place, _) in journal.places.items() if place.segment < first]
        assert last_seq_before(journal.directory, first, journal.tail) in (0, *before[-1:])


def test_what_was_never_there_is_told_from_what_was_erased(journal: Journal) -> None:
    journal.pipeline.splitter.journal.release(5)
    kept = [key for key, (place, _) in journal.places.items() if place.segment >= 5]
    for seq, mark in kept[1:]:
        for other in ((seq, mark + 1000), (seq + 1, mark + 7)):
            if mark and other not in journal.places:
                assert journal.seek(other)[0] is Found.NEVER, other


def test_a_damaged_segment_hides_what_is_in_it_alone(journal: Journal) -> None:
    for number in list_segments(journal.directory):
        path = Path(segment_path(journal.directory, number))
        content = path.read_bytes()
        if not [key for key, (place, _) in journal.places.items() if place.segment == number]:
            continue
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * 64)
        for key, (place, behind) in journal.places.items():
            if place.segment == number:
                with pytest.raises(CorruptionError):
                    journal.seek(key)
            else:
                assert journal.seek(key) == (Found.THERE, behind), (number, key)
        path.write_bytes(content)
