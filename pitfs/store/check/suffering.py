"""Which instants can't be read wholly because of each damaged place: the history is walked once more.

A snapshot suffers from a node that is damaged if its map has it, and from a content if its map leads there. Both are
counted: up where a map leads to the place and the one before doesn't, down where it is the reverse. A state of a
journal suffers as the snapshot below it, until all blocks that lead there have been written over; from a row, from its
write to the block's next one; and from the parts of the index that are needed to read it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from pitfs.errors import CorruptionError, NoSuchInstantError
from pitfs.model.blockmap import NODE_BYTES, I64Array, MapEntry, U64Array
from pitfs.store.catalog.records import Resolution, Snapshot
from pitfs.store.check.walk import IN_CATALOG, Journal, Part, Walk
from pitfs.store.index.format import INDEX_ROW, POSITIONS_VOLUME
from pitfs.store.index.maps import look_up
from pitfs.store.objects.damage import Damage
from pitfs.store.objects.format import HEADER_BYTES, MAX_SEQ, ObjectKind, ObjectName

Stretch = tuple[int, int]  # time_ns of the first and the last instant
SeqRanges = defaultdict[int, list[tuple[int, int]]]  # by number of the damage: [start, end)

MAX_STRETCHES: Final = 1000  # of a place: the last one is widened then
_END: Final = 1 << 62
EVERYTHING: Final = 0, _END


def extent(damage: Damage) -> tuple[int, int]:
    """The bytes of the object that can't be read because of it."""
    is_whole = damage.kind == "header" or not damage.offset
    return (0, _END) if is_whole else (damage.offset, damage.offset + damage.size)


def uncovered(damages: Iterable[Damage]) -> list[Damage]:
    """Without those in bytes that are missing anyway, or in an object that can't be opened."""
    rows = list(damages)
    cuts = {each.object: each for each in rows if each.kind in ("missing", "header")}
    return [each for each in rows if (cut := cuts.get(each.object, each)) is each or extent(each)[1] <= cut.offset]


class _Ranges:
    """Numbers of damage by ranges of pointers: (start, end, number)."""

    def __init__(self, ranges: Iterable[tuple[int, int, int]]) -> None:
        rows = sorted(ranges)
        self._starts, self._ends = (np.array([0, *(row[i] for row in rows)], "<u8") for i in range(2))
        self._numbers = np.array([-1, *(row[2] for row in rows)], "<i8")

    def of(self, pointers: U64Array, units: U64Array) -> I64Array:
        """Of these contents, or nodes; -1 of those that are whole."""
        places = self._starts.searchsorted(pointers + units, "left") - 1  # the last that begins before their end
        return np.where(self._ends[places] > pointers, self._numbers[places], -1)


class Suffering(Walk):
    """Finds the instants; `damages` and `stretches` go together."""

    def prepare(self) -> None:
        self.damages = uncovered(self.found.places.values())
        self.stretches: list[list[Stretch]] = [[] for _ in self.damages]
        self._in_stretch = set[int]()  # numbers of those from which the instant before suffers
        self._of_object = defaultdict[str, list[int]](list)
        layout = self.objects.layout
        self._units = np.array([each.block_size // layout.unit_bytes for each in self.volumes], "<u8")
        contents, nodes = list[tuple[int, int, int]](), list[tuple[int, int, int]]()
        for number, each in enumerate(self.damages):
            self._of_object[each.object].append(number)
            name, (start, end) = ObjectName.of_file(each.object), extent(each)
            if name is None or name.kind is ObjectKind.JOURNAL_INDEX:
                continue
            is_map = name.kind is ObjectKind.MAP
            size = NODE_BYTES if is_map else layout.unit_bytes
            first = layout.node_pointer(name.snapshot_id, 0) if is_map else layout.pointer(name)
            places = (max(start - HEADER_BYTES, 0) // size, min(-(-(end - HEADER_BYTES) // size), layout.max_units - 1))
            (nodes if is_map else contents).append((first + places[0], first + places[1], number))
        self._contents, self._nodes = _Ranges(contents), _Ranges(nodes)
        self._concerned = {name.snapshot_id for name in map(ObjectName.of_file, self._of_object) if name is not None}

    def run(self, at_time: Callable[[int], tuple[Resolution, bool]]) -> list[tuple[Damage, list[Stretch]]]:
        """Each damage with its stretches, ascending; as one where neighbours in an object have the same.

        Args:
            at_time: of the store: the catalog's damage is seen by what it answers.
        """
        self.prepare()
        self._at_time = at_time
        before: Snapshot | None = None
        roots, counts = self.roots(None), np.zeros((2, len(self.damages)), "<i8")  # of contents, of nodes
        try:
            while (snapshot := self.after(before)) is not None:
                below, counts = counts, counts.copy()
                roots_below, roots = roots, self._step(snapshot, roots, counts)
                if before is None:
                    self._ask_unlisted(snapshot)
                else:
                    self._take_interval(before, snapshot, roots_below, below, bool(counts.any()))
                self._take(np.array([snapshot.time_ns]), {n: np.ones(1, np.bool_) for n in _numbers(counts)})
                self._ask(snapshot.time_ns, snapshot.time_ns)
                before = snapshot
            if before is not None:
                behind = self.catalog.interval_from(before.id)  # to a snapshot that can't be listed
                opened = [each for each in self.catalog.open_intervals() if each.to_seq > before.seq]
                if behind is not None or opened:
                    self._ask(behind.to_time_ns if behind is not None else before.time_ns + 1, _END)
                self._take_journal(self.open_journal(opened), roots, counts)
        except CorruptionError:
            self._add(IN_CATALOG, before.time_ns + 1 if before else 0, _END)
        rows = zip(map(self._or_missing, self.damages), map(_joined, self.stretches), strict=True)
        joined = list[tuple[Damage, list[Stretch]]]()
        for damage, stretches in sorted(rows, key=lambda row: row[0].place):
            last, of_last = joined[-1] if joined else (damage, None)
            if (last.object, last.kind, last.offset + last.size) == (damage.object, damage.kind, damage.offset) and (
                stretches == of_last
            ):
                joined[-1] = replace(last, size=last.size + damage.size), stretches
            else:
                joined.append((damage, stretches))
        return joined

    def _or_missing(self, damage: Damage) -> Damage:
        """A content in a hole was never written there: its file is one that was made again."""
        name = ObjectName.of_file(damage.object) if damage.kind == "content" else None
        if name is not None and (fd := self.tried(lambda: self.objects.fd_of(name))) is not None:
            at = fd.base + damage.offset
            if at >= os.fstat(fd).st_size or os.lseek(fd, at, os.SEEK_HOLE) == at:
                return replace(damage, kind="missing")
        return damage

    def _ask(self, first_ns: int, last_ns: int) -> None:
        """Adds a stretch to what suffers from the catalog's damage, if the state at its start isn't found."""
        if self._of_object[IN_CATALOG.object]:
            try:
                state, _ = self._at_time(first_ns)
                self.catalog.roots(state.base_snapshot_id)
            except NoSuchInstantError:
                self._add(IN_CATALOG, first_ns, last_ns)
            except CorruptionError as error:
                if error.what == self.catalog.path:
                    self._add(IN_CATALOG, first_ns, last_ns)

    def _ask_unlisted(self, snapshot: Snapshot) -> None:
        """As `_ask`, of a snapshot before this one that can't be listed, and what follows it."""
        with suppress(CorruptionError):
            if (found := self.catalog.interval_to(snapshot.id)) is not None:
                self._ask(found.from_time_ns, snapshot.time_ns - 1)

    def _step(self, snapshot: Snapshot, before: Sequence[MapEntry], counts: I64Array) -> list[MapEntry]:
        """Brings the counts from the map before to the snapshot's; returns its roots."""
        try:
            roots = self.roots(snapshot)
        except CorruptionError:
            roots = self.roots(None)
        for one, other, units in zip(self.maps(before), self.maps(roots), self._units, strict=True):
            for sign, nodes in (1, one.new_nodes(other)), (-1, other.new_nodes(one)):
                for level, pointer, pointers in nodes:
                    _count(counts[1], self._nodes.of(np.array([pointer], "<u8"), np.ones(1, "<u8")), sign)
                    if not level:
                        _count(counts[0], self._contents.of(pointers, units), sign)
        return roots

    def _take_interval(
        self, before: Snapshot, snapshot: Snapshot, roots: Sequence[MapEntry], counts: I64Array, is_concerned: bool
    ) -> None:
        """The states between two snapshots. `roots`, `counts`: of the earlier one."""
        last_ns = snapshot.time_ns - 1
        try:
            journal = self.journal(self.interval(before, snapshot))
        except CorruptionError:
            self._ask(before.time_ns + 1, last_ns)
            self._ask_unlisted(snapshot)
            return
        if journal is not None and self._of_object[IN_CATALOG.object]:
            firsts = (int(rows["time_ns"][0]) for rows in journal.positions() if len(rows))
            self._ask(next(firsts, before.time_ns + 1), last_ns)
        if is_concerned or counts.any() or snapshot.id in self._concerned:
            self._take_journal(journal, roots, counts)
        elif journal is not None:
            self._in_stretch.clear()

    def _take_journal(self, journal: Journal | None, roots: Sequence[MapEntry], counts: I64Array) -> None:
        if journal is None:
            return
        ranges: SeqRanges = defaultdict(list)
        ends = [*(part.from_ns - 1 for part in journal.parts[1:]), journal.to_ns]
        for part, end_ns in zip(journal.parts, ends, strict=True):
            self._take_index(part, journal.to_ns, end_ns, ranges)
        for number in _numbers(counts[1:]):
            ranges[number].append((0, MAX_SEQ))
        self._take_rows(journal, roots, counts[0], ranges)
        bounds = {n: [np.sort(column) for column in np.array(found, "<i8").T] for n, found in ranges.items()}
        for rows in journal.positions():
            seqs = rows["seq"].astype("<i8")
            masks = {n: starts.searchsorted(seqs, "right") > ends.searchsorted(seqs, "right")
                     for n, (starts, ends) in bounds.items()}  # fmt: skip
            self._take(rows["time_ns"], masks)

    def _take_index(self, part: Part, last_ns: int, part_end_ns: int, ranges: SeqRanges) -> None:
        """What suffers from damage of an index: of a chunk of positions these, of other chunks those that read them."""
        for number in self._of_object[part.name.file]:
            start, end = extent(self.damages[number])
            if part.index is None:
                if start < part.offset + part.size and end > part.offset:
                    self._stretch(number, part.from_ns, last_ns)
                continue
            chunks = part.index.sparse_index
            sizes = chunks["rows"] * np.where(chunks["volume"] == POSITIONS_VOLUME, 16, 32)
            for place in np.flatnonzero((chunks["offset"] < end) & (chunks["offset"] + sizes > start)).tolist():
                chunk, following = chunks[place], chunks[place + 1 : place + 2]
                following = following[following["volume"] == chunk["volume"]]
                if chunk["volume"] == POSITIONS_VOLUME:
                    end_ns = int(following["first"][0]) - 1 if len(following) else part_end_ns
                    self._stretch(number, int(chunk["first"]), end_ns)
                elif (following["first"] == chunk["first"]).any():  # of one block: see `RowIndex`
                    ranges[number].append((int(chunk["first_seq"]), int(following["first_seq"][0])))
                else:
                    ranges[number].append((part.from_seq, MAX_SEQ))

    def _take_rows(self, journal: Journal, roots: Sequence[MapEntry], counts: I64Array, ranges: SeqRanges) -> None:
        """What suffers from contents: those below, and those of the journal's rows."""
        maps, written, healthy_from = self.maps(roots), np.zeros_like(counts), np.zeros_like(counts)
        end = np.zeros(1, INDEX_ROW)
        end["volume"] = POSITIONS_VOLUME
        held, goes_on = end[:0], False
        for batch in chain(journal.rows(), (end,)):
            rows = np.concatenate([held, batch])
            same = (rows["volume"][1:] == rows["volume"][:-1]) & (rows["block"][1:] == rows["block"][:-1])
            next_seqs = np.where(same, rows["seq"][1:], MAX_SEQ)
            begins = ~np.concatenate([[goes_on], same[:-1]]) if len(same) else same
            rows, held, goes_on = rows[:-1], rows[-1:], bool(same[-1:].any())
            found = self._contents.of(rows["pointer"], self._units[rows["volume"]])
            for place in np.flatnonzero(found >= 0).tolist():
                ranges[int(found[place])].append((int(rows["seq"][place]), int(next_seqs[place])))
            if counts.any():
                firsts = rows[begins]
                below, _ = look_up(maps, firsts["volume"], firsts["block"])
                found = self._contents.of(below, self._units[firsts["volume"]])
                _count(written, found, 1)
                np.maximum.at(healthy_from, found[found >= 0], firsts["seq"][found >= 0])
        for number in np.flatnonzero(counts).tolist():
            all_written = written[number] == counts[number]
            ranges[number].append((0, int(healthy_from[number]) if all_written else MAX_SEQ))

    def _take(self, times_ns: I64Array, masks: dict[int, npt.NDArray[np.bool_]]) -> None:
        """The next instants, and which of them suffer from what."""
        for number, mask in masks.items():
            for start, end in np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2).tolist():
                goes_on = not start and number in self._in_stretch
                first_ns = self.stretches[number].pop()[0] if goes_on else int(times_ns[start])
                self._stretch(number, first_ns, int(times_ns[end - 1]))
        if len(times_ns):
            self._in_stretch = {number for number, mask in masks.items() if mask[-1]}

    def _add(self, damage: Damage, first_ns: int, last_ns: int) -> None:
        for number in self._of_object[damage.object]:
            self._stretch(number, first_ns, last_ns)

    def _stretch(self, number: int, first_ns: int, last_ns: int) -> None:
        found = self.stretches[number]
        found.append((first_ns if len(found) < MAX_STRETCHES else found.pop()[0], last_ns))


def _count(counts: I64Array, found: I64Array, sign: int) -> None:
    np.add.at(counts, found[found >= 0], sign)


def _numbers(counts: I64Array) -> list[int]:
    return [int(number) for number in np.flatnonzero(counts.any(axis=0))]


def _joined(stretches: list[Stretch]) -> list[Stretch]:
    """Ascending, those that overlap or follow each other at once as one."""
    found: list[Stretch] = []
    for first, last in sorted(stretches):
        if found and first <= found[-1][1] + 1:
            first, last = found[-1][0], max(last, found.pop()[1])
        found.append((first, last))
    return found
