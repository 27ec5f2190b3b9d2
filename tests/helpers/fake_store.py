"""A store in memory, as far as the tree and the view ask one: times of writes, some of them snapshots."""

from __future__ import annotations

import bisect
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from pitfs.errors import NoSuchInstantError
from pitfs.model.transfer import Bookmark, Gap, VolumeInfo
from pitfs.store.catalog.catalog import Snapshot
from pitfs.store.objects.damage import DamageLog
from pitfs.store.objects.format import VERSION_1, ObjectName
from pitfs.store.objects.pool import Descriptor
from pitfs.store.store import Resolution

MINUTE_S = 60
DAY_MINUTES = 1440


class FakeStore:
    """Write `seq` was at times_ns[seq]; seq 0 and those in `snapshots` are snapshots.

    Args:
        coarse: ends (seq) of intervals that have snapshots only.
    """

    path = "/fake"
    group = "g"

    def __init__(
        self,
        times_ns: Sequence[int],
        snapshots: Sequence[int],
        volumes: Sequence[VolumeInfo] = (VolumeInfo("root", 1 << 20, 4096),),
        bookmarks: Sequence[tuple[str, int]] = (),
        coarse: Sequence[int] = (),
        protected_through_ns: int | None = None,
    ) -> None:
        self.volumes = tuple(volumes)
        self.times_ns = list(times_ns)
        self.ends = [0, *snapshots]
        self.marked = [Bookmark(name, seq, self.times_ns[seq]) for name, seq in bookmarks]
        self.coarse = set(coarse)
        self.protected_ns = times_ns[-1] if protected_through_ns is None else protected_through_ns
        self.version = 1
        self.gap_list: list[Gap] = []

    def data_version(self) -> int:
        return self.version

    def _reachable(self, seq: int) -> int:
        index = bisect.bisect_right(self.ends, seq) - 1
        if self.ends[index] == seq or self.ends[index + 1] not in self.coarse:
            return seq
        return self.ends[index]

    def _resolution(self, seq: int) -> Resolution:
        if seq in self.ends:
            return Resolution(
                seq, self.times_ns[seq], None if seq in self.coarse else 0, seq + 1, None
            )
        base = self.ends[bisect.bisect_right(self.ends, seq) - 1]
        return Resolution(seq, self.times_ns[seq], 0, base + 1, base + 2)

    def first(self) -> Resolution | None:
        return self._resolution(0)

    def latest(self) -> Resolution | None:
        return self._resolution(self.ends[-1])

    def protected_through_ns(self) -> int:
        return self.protected_ns

    def at_time(self, time_ns: int) -> tuple[Resolution, bool]:
        if time_ns < self.times_ns[0] or time_ns > self.protected_ns:
            raise NoSuchInstantError(str(time_ns))
        wanted = min(bisect.bisect_right(self.times_ns, time_ns) - 1, self.ends[-1])
        seq = self._reachable(wanted)
        return self._resolution(seq), seq == wanted

    def at_seq(self, seq: int) -> Resolution:
        if not 0 <= seq <= self.ends[-1]:
            raise NoSuchInstantError(str(seq))
        return self._resolution(self._reachable(seq))

    def at_instant(self, time_ns: int) -> Resolution | None:
        try:
            found, _ = self.at_time(time_ns)
        except NoSuchInstantError:
            return None
        return found if found.time_ns == time_ns else None

    def snapshots(self, from_ns: int | None = None, to_ns: int | None = None) -> Iterator[Snapshot]:
        for seq in self.ends:
            time_ns = self.times_ns[seq]
            if (from_ns is None or time_ns >= from_ns) and (to_ns is None or time_ns < to_ns):
                yield Snapshot(seq + 1, seq, time_ns, seq + 1)

    def bookmarks(self) -> Iterator[Bookmark]:
        yield from sorted(self.marked, key=lambda each: (each.time_ns, each.name))

    def bookmark(self, name: str) -> Bookmark | None:
        return next((each for each in self.marked if each.name == name), None)

    def gaps(self, from_ns: int | None = None, to_ns: int | None = None) -> Iterator[Gap]:
        for gap in self.gap_list:
            if (from_ns is None or gap.to_time_ns >= from_ns) and (to_ns is None or gap.from_time_ns < to_ns):
                yield gap

    def _seconds(self) -> list[int]:
        seqs = {self._reachable(seq) for seq in range(self.ends[-1] + 1)}
        return sorted({self.times_ns[seq] // 10**9 for seq in seqs})

    def days(self) -> Iterator[int]:
        yield from sorted({second // 86_400 for second in self._seconds()})

    def minutes(self, day: int) -> Iterator[int]:
        minutes = {second // MINUTE_S for second in self._seconds()}
        yield from sorted(minute for minute in minutes if minute // DAY_MINUTES == day)

    def seconds(self, minute: int) -> Iterator[Resolution]:
        for second in self._seconds():
            if second // MINUTE_S == minute:
                yield self.at_time(min((second + 1) * 10**9 - 1, self.protected_ns))[0]


class FakeObjects:
    """Objects that are files: number -> contents behind a header of 4096 bytes."""

    layout = VERSION_1
    damage = DamageLog("/fake")

    def __init__(self) -> None:
        self._fds: dict[int, Descriptor] = {}

    def add(self, number: int, contents: bytes) -> None:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(4096) + contents)
            file.flush()
            self._fds[number] = Descriptor(os.dup(file.fileno()))

    def fd(self, number: int) -> Descriptor:
        return self._fds[number]

    def opened(self, number: int) -> Descriptor | None:
        return self._fds.get(number)

    def place(self, name: ObjectName, offset: int) -> tuple[str, int]:
        return self.path_of(name), offset

    def path_of(self, name: ObjectName) -> str:
        return f"/fake/objects/{name.file}"

    def overwrite(self, number: int, offset: int, data: bytes) -> None:
        os.pwrite(self._fds[number], data, 4096 + offset)


class FakeImageStore:
    """One volume at one instant, its blocks strewn over objects as the seed says.

    Attributes:
        image: what the volume must read as.
        loads: how often a table was resolved.
    """

    path = "/fake"

    def __init__(
        self, size_bytes: int, block_size: int, seed: int, zeros: float = 0.3, neighbours: float = 0.7
    ) -> None:
        random = np.random.default_rng(seed)
        volume = VolumeInfo("root", size_bytes, block_size)
        self.volumes = (volume,)
        self.objects = FakeObjects()
        self.loads = 0
        count = volume.block_count
        leaves = -(-count // 512)
        self.pointers = np.zeros(leaves * 512, np.uint64)
        self.checksums = np.zeros(leaves * 512, np.uint64)
        contents: dict[int, list[bytes]] = {number: [] for number in range(2, 6)}
        number, parts = 2, []
        for block in range(count):
            if random.random() > neighbours:
                number = int(random.integers(2, 6))
            length = min(block_size, size_bytes - block * block_size)
            if random.random() < zeros:
                parts.append(bytes(length))
                continue
            data = random.bytes(length).ljust(block_size, b"\0")
            self.pointers[block] = number << 36 | len(contents[number]) * block_size // 512
            self.checksums[block] = xxh3_64_intdigest(data)
            contents[number].append(data)
            parts.append(data[:length])
        self.image = b"".join(parts)
        for number, blocks in contents.items():
            self.objects.add(number, b"".join(blocks))
        self.resolution = Resolution(1, 1, 0, 1, None)

    def leaf(self, resolution: Resolution, volume: int, leaf: int) -> tuple[Any, Any]:
        self.loads += 1
        part = slice(leaf * 512, (leaf + 1) * 512)
        return self.pointers[part].copy(), self.checksums[part].copy()

    def next_leaf(self, resolution: Resolution, volume: int, first: int, end: int) -> int | None:
        return first if first < min(end, len(self.pointers) // 512) else None
