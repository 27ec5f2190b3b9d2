"""Random but valid transfers, made the naive way, and the states that a store must give back for them.

`History` writes to volumes held whole in memory, remembers every state, and cuts its writes into transfers as
production would: sorted rows, contents where no other place has them. Deterministic: all comes from one seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from xxhash import xxh3_64_intdigest

from pitfs.model.ladder import RUNGS_NS
from pitfs.model.transfer import (
    DIFF_ENTRY,
    JOURNAL_ENTRY,
    POSITION,
    TRANSFER_SECTIONS,
    UNIT_BYTES,
    Begin,
    Bookmark,
    Checkpoint,
    Data,
    End,
    Gap,
    Hello,
    Manifest,
    Section,
    Source,
    TransferFrame,
    TransferKind,
    VolumeInfo,
)

START_NS = 1_763_855_640_000_000_000


@dataclass
class Write:
    """One write: whole blocks of one volume."""

    seq: int
    time_ns: int
    volume: int
    block: int
    contents: list[bytes]


@dataclass
class Transfer:
    """A manifest and the whole of each section; `frames` cuts it into frames of random sizes.

    layers: transfers of the interval's difference journal, coarse to fine, to come after it.
    """

    manifest: Manifest
    sections: dict[Section, bytes]
    block_sizes: dict[Section, list[int]]  # of contents, in order
    layers: list[Transfer] = field(default_factory=list)
    shared: list[bytes] = field(default_factory=list)  # contents that rows share, in order

    @property
    def end(self) -> End:
        one, two, three, four, five = (len(self.sections[section]) for section in TRANSFER_SECTIONS)
        checksums = []
        shares = Section.JOURNAL_BLOCKS if self.manifest.kind is TransferKind.LAYERS else Section.DIFF_BLOCKS
        for section in (Section.DIFF_BLOCKS, Section.JOURNAL_BLOCKS):
            ends = np.cumsum(self.block_sizes[section]).tolist()
            blocks = [self.sections[section][a:b] for a, b in itertools.pairwise([0, *ends])]
            blocks += self.shared if section is shares else []
            found = b"".join(xxh3_64_intdigest(block).to_bytes(8, "little") for block in blocks)
            checksums.append(xxh3_64_intdigest(found))
        return End((one, two, three, four, five), (checksums[0], checksums[1]))

    def frames(
        self, random: np.random.Generator, lengths: Sequence[int] = (0, 0, 0, 0, 0), interleave: bool = True
    ) -> Iterator[TransferFrame]:
        """Begin, data from `lengths` on, checkpoints with the lengths as cursor, End."""
        yield Begin(self.manifest)
        at = dict(zip(TRANSFER_SECTIONS, lengths, strict=True))
        order = (
            [Section.DIFF, Section.DIFF_BLOCKS, Section.POSITIONS, Section.JOURNAL, Section.JOURNAL_BLOCKS]
            if interleave
            else [Section.DIFF, Section.JOURNAL, Section.POSITIONS, Section.JOURNAL_BLOCKS, Section.DIFF_BLOCKS]
        )
        for section in order:
            while at[section] < len(self.sections[section]):
                start = at[section]
                stop = self._stop(section, start, int(random.integers(1, 9)))
                yield Data(section, start, self.sections[section][start:stop])
                at[section] = stop
                if random.random() < 0.3:
                    yield Checkpoint(tuple(at[each] for each in TRANSFER_SECTIONS))
        yield self.end

    def _stop(self, section: Section, start: int, count: int) -> int:
        size = {Section.DIFF: 24, Section.POSITIONS: 16, Section.JOURNAL: 32}.get(section)
        if size is not None:
            return min(start + count * size, len(self.sections[section]))
        ends = np.cumsum(self.block_sizes[section]).tolist()
        first = int(np.searchsorted(ends, start, "right"))
        return int(ends[min(first + count, len(ends)) - 1])


@dataclass
class History:
    """Volumes with all their states.

    Attributes:
        states: by seq, the images of all volumes, each of the volume's exact size.
        times_ns: by seq.
        reachable: seq of every state that the transfers made so far give.
        granules: (from_time_ns, to_time_ns, granularity_ns) of intervals that have one other than every write.
    """

    seed: int
    volumes: tuple[VolumeInfo, ...]
    group: str = "db1"
    step_ns: int = 40_000_000
    states: list[list[bytes]] = field(default_factory=list)
    times_ns: list[int] = field(default_factory=list)
    reachable: set[int] = field(default_factory=set)
    granules: list[tuple[int, int, int]] = field(default_factory=list)
    mark: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.hello = Hello(self.group, f"{self.seed:032x}", self.volumes)
        self.images = [bytearray(volume.block_count * volume.block_size) for volume in self.volumes]
        for volume in range(len(self.volumes)):
            for block in range(self.volumes[volume].block_count):
                if self.random.random() < 0.6:
                    self._put(volume, block, self._content(volume))
        self.open: list[Write] = []
        self.at = (0, START_NS)  # position of the last mark
        self.base = [bytes(image) for image in self.images]
        self.protected_ns = START_NS
        self.times_ns.append(START_NS)
        self._keep_state()

    def _content(self, volume: int) -> bytes:
        size = self.volumes[volume].block_size
        choice = self.random.random()
        if choice < 0.15:
            return bytes(size)
        if choice < 0.4:  # few different ones, so that contents come again
            return bytes([int(self.random.integers(1, 4))]) * size
        return self.random.bytes(size)

    def _put(self, volume: int, block: int, content: bytes) -> bytes:
        """Writes a block; what lies behind the volume's end is zeros. Returns what was kept."""
        info = self.volumes[volume]
        start = block * info.block_size
        used = min(info.block_size, info.size_bytes - start)
        kept = content[:used].ljust(info.block_size, b"\0")
        self.images[volume][start : start + info.block_size] = kept
        return kept

    def _keep_state(self) -> None:
        self.states.append(
            [bytes(image[: info.size_bytes]) for image, info in zip(self.images, self.volumes, strict=True)]
        )

    def write(self) -> Write:
        """One random write of 1 to 4 blocks."""
        volume = int(self.random.integers(len(self.volumes)))
        count = self.volumes[volume].block_count
        block = int(
            self.random.integers(count) if self.random.random() < 0.5 else self.random.integers(min(count, 5))
        )
        length = int(self.random.integers(1, min(4, count - block) + 1))
        return self.write_blocks(volume, block, [self._content(volume) for _ in range(length)])

    def write_blocks(self, volume: int, block: int, contents: Sequence[bytes]) -> Write:
        """A write of these blocks, some time after the one before."""
        contents = [self._put(volume, block + i, content) for i, content in enumerate(contents)]
        time_ns = max(self.times_ns[-1], self.protected_ns) + int(self.random.integers(1, self.step_ns))
        write = Write(len(self.times_ns), time_ns, volume, block, contents)
        self.times_ns.append(time_ns)
        self._keep_state()
        self.open.append(write)
        return write

    def close_interval(
        self,
        granularity_ns: int | None = 0,
        bookmarks: Sequence[str] = (),
        full: bool = False,
        before_ns: Sequence[int] = (),
    ) -> Transfer:
        """The transfer for all writes since the last mark; the first one is the full sync at seq 0.

        Args:
            granularity_ns: of the difference journal, None without one; before_ns: coarser ones that come before it.
            full: a rescan: the complete state again, with a gap.
        """
        self.mark += 1
        first = self.mark == 1
        writes, self.open = ([], self.open) if first else (self.open, [])
        seq, time_ns = (writes[-1].seq, writes[-1].time_ns) if writes else self.at
        self.protected_ns = max(self.times_ns[-1], time_ns, self.protected_ns) + 1_000
        protected_ns = time_ns if first and self.open else self.protected_ns
        positions: list[Write] = []
        if granularity_ns is not None and not full:
            positions = ends_of_granules(writes, time_ns, granularity_ns)
        granularity_ns = granularity_ns if positions else None
        builder = _Sections(self)
        full = first or (full and bool(writes))
        last = self._last_blocks(writes)
        builder.diff(self._all_blocks() if full else last, zeros=not full)
        gaps = (Gap(*self.at, seq, time_ns, "rescan"),) if full and not first else ()
        manifest = Manifest(
            mark=self.mark,
            kind=TransferKind.FULL if full else TransferKind.INTERVAL,
            from_seq=self.at[0],
            from_time_ns=self.at[1],
            to_seq=seq,
            to_time_ns=time_ns,
            first_time_ns=writes[0].time_ns if writes and not full else None,
            protected_through_ns=protected_ns,
            granularity_ns=None,
            cause="the link was too slow",
            diff_count=None if full else len(builder.diff_rows),
            journal_count=0,
            position_count=0,
            identity=f"{self.seed}-{self.mark}",
            bookmarks=tuple(Bookmark(name, seq, time_ns) for name in bookmarks),
            gaps=gaps,
        )
        transfer = builder.transfer(manifest)
        if granularity_ns is not None:
            rungs = [*(each for each in before_ns if each > granularity_ns), granularity_ns]
            transfer.layers = builder.layers(manifest, writes, last, rungs)
        self.reachable |= {seq, *(write.seq for write in positions)}
        if granularity_ns:
            self.granules.append((self.at[1], time_ns, granularity_ns))
        self.at = (seq, time_ns)
        self.base = [bytes(image) for image in self.images]
        return transfer

    def _all_blocks(self) -> dict[tuple[int, int], bytes]:
        images = self.base if self.mark == 1 else self.images
        return {
            (volume, block): bytes(images[volume][block * info.block_size : (block + 1) * info.block_size])
            for volume, info in enumerate(self.volumes)
            for block in range(info.block_count)
        }

    def _last_blocks(self, writes: Sequence[Write]) -> dict[tuple[int, int], bytes]:
        last: dict[tuple[int, int], bytes] = {}
        for write in writes:
            for i, content in enumerate(write.contents):
                last[write.volume, write.block + i] = content
        return last


def ends_of_granules(writes: Sequence[Write], to_time_ns: int, granularity_ns: int) -> list[Write]:
    """The last write of each granule but that in which the interval ends; all of them for every write."""
    if not granularity_ns:
        return list(writes)
    last = {write.time_ns // granularity_ns: write for write in writes}
    return [write for granule, write in last.items() if granule < to_time_ns // granularity_ns]


def last_of_granules(
    writes: Sequence[Write], to_time_ns: int, granularity_ns: int
) -> dict[tuple[int, int, int], int]:
    """seq of the last write to (volume, block) in each granule but that in which the interval ends."""
    last: dict[tuple[int, int, int], int] = {}
    for write in writes if granularity_ns else ():
        granule = write.time_ns // granularity_ns
        if granule < to_time_ns // granularity_ns:
            for i in range(len(write.contents)):
                last[write.volume, write.block + i, granule] = write.seq
    return last


class _Sections:
    """Collects rows and contents of an interval's transfers."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.diff_rows: list[tuple[int, int, int, int, int]] = []
        self.diff_contents: list[bytes] = []
        self.shared: list[bytes] = []
        self.places: dict[bytes, tuple[Source, int]] = {}

    def diff(self, blocks: dict[tuple[int, int], bytes], zeros: bool) -> None:
        unit = 0
        for (volume, block), content in sorted(blocks.items()):
            if not any(content):
                if zeros:
                    self.diff_rows.append((block, 0, volume, Source.ZERO, 0))
                continue
            if not zeros or content not in self.places:  # a full sync carries each content
                self.diff_rows.append((block, 0, volume, Source.SNAPSHOT, 0))
                self.diff_contents.append(content)
                self.places.setdefault(content, (Source.SHARED_SNAPSHOT, unit))
                unit += len(content) // UNIT_BYTES
                continue
            source, place = self.places[content]
            self.diff_rows.append((block, place, volume, source, 0))
            self.shared.append(content)

    def layers(
        self, diff: Manifest, writes: Sequence[Write], last: dict[tuple[int, int], bytes], rungs: Sequence[int]
    ) -> list[Transfer]:
        """One transfer for each of these rungs that adds a position."""
        entries = self._entries(diff, writes)
        transfers: list[Transfer] = []
        base, base_bytes, base_seqs = -1, 0, set[int]()
        for rung_ns in rungs:
            layer = RUNGS_NS.index(rung_ns)
            ends = ends_of_granules(writes, diff.to_time_ns, rung_ns)
            positions = [write for write in ends if write.seq not in base_seqs]
            if not positions:
                continue
            rows, contents, shared = [], [], []
            for _, volume, block, seq, content, is_last in (e for e in entries if base < e[0] <= layer):
                unit = 0
                if not any(content):
                    source = Source.ZERO
                elif is_last:
                    source = Source.SNAPSHOT
                elif content in self.places:
                    source, unit = self.places[content]
                    shared.append(content)
                else:
                    source = Source.JOURNAL
                    place = base_bytes + sum(map(len, contents))
                    self.places[content] = (Source.SHARED_JOURNAL, place // UNIT_BYTES)
                    contents.append(content)
                rows.append((block, seq, unit, volume, source, 0))
            manifest = msgspec.structs.replace(
                diff, kind=TransferKind.LAYERS, granularity_ns=rung_ns, cause="every write" if rung_ns == 0 else "slow",
                base_granularity_ns=None if base < 0 else RUNGS_NS[base], base_bytes=base_bytes,
                diff_count=0, journal_count=len(rows), position_count=len(positions),
                identity=f"{diff.identity}-{base}-{layer}", bookmarks=(), gaps=(),
            )  # fmt: skip
            transfers.append(_transfer(manifest, [], [], positions, rows, contents))
            transfers[-1].shared = shared
            base, base_bytes, base_seqs = layer, base_bytes + sum(map(len, contents)), {w.seq for w in ends}
        return transfers

    def _entries(
        self, diff: Manifest, writes: Sequence[Write]
    ) -> list[tuple[int, int, int, int, bytes, bool]]:
        """(layer, volume, block, seq, content, is the block's last) of every block written, in the order of JOURNAL."""
        needed = [last_of_granules(writes, diff.to_time_ns, rung_ns) for rung_ns in RUNGS_NS[:-1]]
        last = {(write.volume, write.block + i): write.seq for write in writes for i in range(len(write.contents))}
        entries = []
        for write in writes:
            for i, content in enumerate(write.contents):
                block = write.block + i
                layer = len(RUNGS_NS) - 1
                for each in range(len(needed) - 1, -1, -1):
                    granule = write.time_ns // RUNGS_NS[each]
                    if needed[each].get((write.volume, block, granule)) != write.seq:
                        break
                    layer = each
                is_last = last[write.volume, block] == write.seq
                entries.append((layer, write.volume, block, write.seq, content, is_last))
        return sorted(entries)

    def transfer(self, manifest: Manifest) -> Transfer:
        transfer = _transfer(manifest, self.diff_rows, self.diff_contents, [], [], [])
        transfer.shared = self.shared
        return transfer


def _transfer(
    manifest: Manifest,
    diff_rows: Sequence[tuple[int, ...]],
    diff_contents: Sequence[bytes],
    positions: Sequence[Write],
    journal_rows: Sequence[tuple[int, ...]],
    journal_contents: Sequence[bytes],
) -> Transfer:
    return Transfer(
        manifest,
        {
            Section.DIFF: np.array(list(diff_rows), DIFF_ENTRY).tobytes(),
            Section.DIFF_BLOCKS: b"".join(diff_contents),
            Section.POSITIONS: np.array([(w.seq, w.time_ns) for w in positions], POSITION).tobytes(),
            Section.JOURNAL: np.array(list(journal_rows), JOURNAL_ENTRY).tobytes(),
            Section.JOURNAL_BLOCKS: b"".join(journal_contents),
        },
        {
            Section.DIFF_BLOCKS: [len(content) for content in diff_contents],
            Section.JOURNAL_BLOCKS: [len(content) for content in journal_contents],
        },
    )


def random_history(seed: int, max_block_count: int = 40) -> History:
    """1 to 3 volumes, block sizes 512 B to 64 KiB, sizes that are mostly no multiple of it."""
    random = np.random.default_rng([seed, 7])
    volumes = []
    for number in range(int(random.integers(1, 4))):
        block_size = 512 << int(random.integers(0, 8))
        blocks = int(random.integers(1, max(2, min(max_block_count, (1 << 20) // block_size))))
        size_bytes = max(1, blocks * block_size - int(random.integers(0, block_size)))
        volumes.append(VolumeInfo(f"v{number}", size_bytes, block_size))
    return History(seed, tuple(volumes))


def random_transfers(history: History, count: int, max_writes: int = 20) -> Iterator[Transfer]:
    """The full sync, then intervals: empty ones, snapshots-only ones, now and then a rescan."""
    random = np.random.default_rng([history.seed, 11])
    for number in range(count):
        if number or random.random() < 0.5:
            for _ in range(int(random.integers(0, max_writes)) if random.random() < 0.85 else 0):
                history.write()
        yield history.close_interval(
            granularity_ns=(0, 0, 0, 10_000_000, 50_000_000, 100_000_000, None)[int(random.integers(7))],
            bookmarks=(f"mark-{number}",) if random.random() < 0.3 else (),
            full=bool(number and random.random() < 0.1),
            before_ns=(500_000_000, 100_000_000, 50_000_000, 10_000_000)[int(random.integers(5)) :],
        )
