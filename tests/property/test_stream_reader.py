"""The journal as a stream: pieces lead from write to write and mark to mark, with what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError
from pitfs.journal.reader import JournalReader
from pitfs.journal.stream_reader import StreamChunk, next_chunk
from pitfs.journal.writer import Location
from pitfs.model.record import block_checksums
from pitfs.model.transfer import StreamMark
from pitfs.splitter.startup import journal_directory
from pitfs.storage.segment import segment_path
from tests.helpers.pipeline import Pipeline

SIZES, BLOCK_SIZES = [70_000, 33_000], [4096, 512]


class Stream:
    """Reads a pipeline's journal as the shipper's stream does; holds what the volumes are by then."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.reader = JournalReader(journal_directory(pipeline.state), BLOCK_SIZES)
        self.reader.seek(Location(1, 4096), (0, 0))
        self.marks: list[StreamMark] = []
        self.images = [bytearray(state.ljust(-(-len(state) // size) * size, b"\0")) for state, size in
                       zip(pipeline.states[0], BLOCK_SIZES, strict=True)]  # fmt: skip
        self.seq = 0

    def next(self, limit_bytes: int) -> StreamChunk | None:
        tail = self.pipeline.splitter.journal.tail
        piece = next_chunk(self.reader, tail, limit_bytes)
        if piece is not None and piece.writes is not None:
            self.apply(piece)
        return piece

    def apply(self, piece: StreamChunk) -> None:
        assert piece.writes is not None and piece.writes.first_seq == self.seq + 1
        contents, at = bytes(piece.writes.contents), 0
        for row in piece.writes.rows:
            size = BLOCK_SIZES[int(row["volume"])]
            length, start = int(row["block_count"]) * size, int(row["block"]) * size
            self.images[int(row["volume"])][start : start + length] = contents[at : at + length]
            at, self.seq = at + length, self.seq + 1
            assert [bytes(image[:end]) for image, end in zip(self.images, SIZES, strict=True)] == (
                self.pipeline.states[self.seq]
            )
        assert at == len(contents)
        assert piece.position[0] == self.seq


@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_any_size_are_the_writes_in_order_up_to_each_mark(tmp_path: Path, seed: int) -> None:
    pipeline = Pipeline(tmp_path / "p", SIZES, BLOCK_SIZES, seed=seed)
    try:
        stream, random = Stream(pipeline), np.random.default_rng(seed)
        first = stream.next(1)
        assert first is not None and first.begins_anew and first.writes is None
        stream.reader.next(pipeline.splitter.journal.tail)  # past the beginning of the first copy
        marks = []
        for _ in range(40):
            for _ in range(int(random.integers(0, 6))):
                pipeline.random_write()
            if random.random() < 0.3:
                pipeline.splitter.mark("name" if random.random() < 0.2 else None)
                state = pipeline.splitter.state
                marks.append((state.mark, state.seq, state.position_time_ns, state.time_ns))
            if random.random() < 0.6:
                limit = int(random.choice([1, 5000, 100_000]))
                while (piece := stream.next(limit)) is not None:
                    if piece.mark is not None:
                        stream.marks.append(piece.mark)
        while (piece := stream.next(1 << 20)) is not None:
            stream.marks += [piece.mark] if piece.mark is not None else []
        assert stream.seq == len(pipeline.states) - 1
        assert [(m.mark, m.seq, m.time_ns, m.protected_through_ns) for m in stream.marks] == marks
        stream.reader.close()
    finally:
        pipeline.close()


def test_the_digest_is_of_the_checksums_taken_at_the_splitter(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path / "p", [70_000], [4096])
    try:
        reader = JournalReader(journal_directory(pipeline.state), [4096])
        reader.seek(Location(1, 4096), (0, 0))
        reader.next(pipeline.splitter.journal.tail)
        pipeline.write(0, 4096, pipeline.random.bytes(12_288))
        piece = next_chunk(reader, pipeline.splitter.journal.tail, 1 << 20)
        assert piece is not None and piece.writes is not None
        checksums = np.array(block_checksums(piece.writes.contents, 4096), "<u8")
        assert piece.writes.digest == xxh3_64_intdigest(checksums.tobytes())
        reader.close()
    finally:
        pipeline.close()


def test_a_flipped_bit_in_the_journal_is_not_streamed(tmp_path: Path) -> None:
    pipeline = Pipeline(tmp_path / "p", [70_000], [4096])
    try:
        reader = JournalReader(journal_directory(pipeline.state), [4096])
        reader.seek(Location(1, 4096), (0, 0))
        reader.next(pipeline.splitter.journal.tail)
        pipeline.write(0, 0, pipeline.random.bytes(4096))
        tail = pipeline.splitter.journal.tail
        path = Path(segment_path(journal_directory(pipeline.state), tail.segment))
        data = bytearray(path.read_bytes())
        data[tail.offset - 1] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptionError, match="a block doesn't match the checksum"):
            next_chunk(reader, tail, 1 << 20)
        reader.close()
    finally:
        pipeline.close()
