"""Contents that a replica wants are found in the volumes and in what the journal still has, and nowhere else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from xxhash import xxh3_64_intdigest

from pitfs.model.transfer import MAX_NUMBER, Wanted
from pitfs.replication import heal
from pitfs.replication.heal import ContentFinder
from pitfs.splitter.messages import Backings
from pitfs.splitter.startup import journal_directory
from pitfs.storage.segment import list_segments, segment_path
from tests.helpers.shipper import VOLUME_BYTES, Parts, settings_of

BLOCK = 4096
WRITES = 90


@pytest.fixture
async def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Parts]:
    """With writes of which many are in segments that are closed."""
    monkeypatch.setattr(heal, "STEP_BLOCKS", 10)
    monkeypatch.setattr(heal, "PAUSE_S", 0)
    parts = Parts(tmp_path)
    for _ in range(WRITES):
        parts.write(80_000)
    yield parts
    parts.close()


def finder(parts: Parts) -> ContentFinder:
    settings = settings_of(parts.pipeline)
    return ContentFinder(settings, parts.client, Backings(parts.client, settings.hello.volumes, settings.configured))


def block_at(parts: Parts, seq: int, block: int) -> bytes:
    return parts.pipeline.states[seq][0][block * BLOCK : (block + 1) * BLOCK].ljust(BLOCK, b"\0")


def written(parts: Parts) -> list[tuple[int, int]]:
    """(seq, block) of all that any write changed."""
    blocks = range(-(-VOLUME_BYTES // BLOCK))
    return [
        (seq, block) for seq in range(1, WRITES + 1) for block in blocks
        if block_at(parts, seq, block) != block_at(parts, seq - 1, block)
    ]  # fmt: skip


def wanted(parts: Parts, seq: int, block: int, after: int | None = None, through: int | None = None) -> Wanted:
    checksum = xxh3_64_intdigest(block_at(parts, seq, block))
    return Wanted(0, block, checksum, seq - 1 if after is None else after, seq if through is None else through)


async def test_every_content_that_was_journalled_is_found(parts: Parts) -> None:
    assert len(list_segments(journal_directory(parts.pipeline.state))) > 1
    places = written(parts)
    found = await finder(parts).find([wanted(parts, *place) for place in places])
    assert found == [block_at(parts, *place) for place in places]
    wide = [wanted(parts, *place, after=0, through=MAX_NUMBER) for place in places[::50]]
    assert await finder(parts).find(wide) == [block_at(parts, *place) for place in places[::50]]


async def test_what_is_not_there_is_not_given(parts: Parts) -> None:
    seq, block = written(parts)[0]
    right = wanted(parts, seq, block)
    others = [
        Wanted(0, block, right.checksum + 1, 0, MAX_NUMBER),  # another content
        Wanted(1, block, right.checksum, 0, MAX_NUMBER),  # no such volume
        Wanted(0, 1 << 62, right.checksum, 0, MAX_NUMBER),  # behind its end
    ]
    assert await finder(parts).find(others) == [None] * 3


async def test_a_journal_that_lost_its_beginning_or_is_damaged_gives_what_it_has(parts: Parts) -> None:
    """What is in the volume is found in any case."""
    directory = journal_directory(parts.pipeline.state)
    numbers = list_segments(directory)
    Path(segment_path(directory, numbers[0])).unlink()
    with Path(segment_path(directory, numbers[-1])).open("r+b") as file:
        file.seek(20_000)
        file.write(bytes(100))
    places = written(parts)
    found = await finder(parts).find([wanted(parts, *place) for place in places])
    assert all(content in (None, block_at(parts, *place)) for content, place in zip(found, places, strict=True))
    assert None in found
    there = [place for content, place in zip(found, places, strict=True) if content is not None]
    newest = {block: seq for seq, block in places}
    assert {(seq, block) for block, seq in newest.items()} < set(there)


async def test_where_this_host_cannot_look_it_tries_again(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heal, "RETRY_S", 0.01)
    look, calls = ContentFinder._look_in_volumes, list[int]()

    def refuses_at_first(self: ContentFinder, *arguments: object) -> None:
        calls.append(1)
        if len(calls) < 3:
            raise OSError(24, "Too many open files")
        look(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ContentFinder, "_look_in_volumes", refuses_at_first)
    seq, block = written(parts)[-1]
    with trio.fail_after(5):
        assert await finder(parts).find([wanted(parts, seq, block)]) == [block_at(parts, seq, block)]
    assert len(calls) == 3
