"""Difference journals that aren't whole on the replica: sent layer by layer while the local journal has them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from pitfs.errors import CorruptionError
from pitfs.journal.reader import BlockSource, Interval, JournalReader, SeenMark, after
from pitfs.journal.writer import Location
from pitfs.model.ladder import LAST_LAYER, NO_LAYER, layer_of
from pitfs.model.schedule import Step, Waiting, layers_left
from pitfs.model.transfer import End, Manifest, VolumeInfo, Welcome
from pitfs.replication.interval import PreparedInterval, layers_frames, pick_layers, prepare
from pitfs.replication.manifests import cause_manifest, layers_manifest, waits_cause
from pitfs.replication.ports import Session
from pitfs.replication.sending import Sender
from pitfs.storage.segment import list_segments

log = logging.getLogger(__name__)

MAX_WAITING: Final = 256  # journals that are remembered; what a welcome names
ERASED: Final = "the local journal needed the room before the link was idle long enough for the rest of it"


@dataclass(slots=True)
class _Journal:
    """One difference journal: where its interval is in the local journal, and what the replica has of it.

    Positions are (seq, time_ns).

    Attributes:
        start, start_position: where the interval begins there.
        base: where it begins for the replica: behind `start_position` if a stream had got further.
        end: where it ends.
        layer: the last one that the replica has. base_bytes: of JOURNAL_BLOCKS that it has.
        rung_bytes, parked: as in Waiting.
    """

    mark: int
    start: Location
    start_position: tuple[int, int]
    base: tuple[int, int]
    end: tuple[int, int]
    layer: int = NO_LAYER
    base_bytes: int = 0
    rung_bytes: tuple[int | None, ...] | None = None
    parked: int | None = None

    def final_manifest(self, cause: str) -> Manifest:
        """It stays as it is on the replica."""
        return cause_manifest(self.mark, self.base, self.end, self.layer, self.base_bytes, cause)


class Backfill:
    """The journals that wait, and the one that was built last, of which alone layers can be sent.

        add      an interval's diff has arrived: its journal waits, and is built already
        restore  a session begins: what waits is what the replica lacks and the local journal still has
        build    reads the interval of a journal again, for the sizes and contents of its layers
        ship     sends layers of the built one; the replica has it whole: it waits no more
        give_up  the local journal has the interval no more: the replica gets the cause why it stays as coarse as it is

    Args:
        directory: of the local journal.
    """

    def __init__(self, directory: str, volumes: tuple[VolumeInfo, ...], sender: Sender) -> None:
        self._directory, self._volumes, self._sender = directory, volumes, sender
        self._block_sizes = [volume.block_size for volume in volumes]
        self._journals: dict[int, _Journal] = {}  # by mark, oldest first
        self._built: PreparedInterval | None = None
        self._lost: list[Manifest] = []  # to be sent for journals that the replica believes will still come

    def close(self) -> None:
        """Releases the one that was built last: where another is about to be, both would take their memory."""
        if self._built is not None:
            self._built.source.close()
            self._built = None

    # -- what waits --------------------------------------------------------------------------------------

    def add(self, prepared: PreparedInterval) -> None:
        """Of an interval whose diff has arrived; takes it over."""
        self.close()
        interval = prepared.interval
        if prepared.journal is None:
            prepared.source.close()
            return
        end = interval.to_seq, interval.to_time_ns
        base = interval.from_seq, interval.from_time_ns
        self._journals[interval.mark] = _Journal(
            interval.mark, interval.start, base, base, end, rung_bytes=prepared.rung_bytes
        )
        self._built = prepared
        self._bound()

    def restore(self, welcome: Welcome, marks: Sequence[SeenMark]) -> None:
        """What a replica says that it lacks, as far as the local journal has it.

        An interval of the replica is found by its end, which is a mark's position here. It lies behind the mark before,
        and begins there, or where a stream had got to.

        Args:
            marks: those that the local journal has, in order.
        """
        lacks = {(each.to_seq, each.to_time_ns): each for each in welcome.coarse}
        known, self._journals = self._journals, {}
        for start, end in itertools.pairwise(marks):
            found = lacks.get(end.position)
            if found is None or end.begins_anew or not start.position[0] <= found.from_seq < end.position[0]:
                continue
            base = found.from_seq, found.from_time_ns
            journal = known.get(end.mark)
            if journal is None or (journal.base, journal.end) != (base, end.position):
                journal = _Journal(end.mark, start.location, start.position, base, end.position)
            layer = layer_of(found.granularity_ns)
            if journal.layer != layer:
                journal.parked = None
            journal.layer, journal.base_bytes = layer, found.journal_bytes
            self._journals[end.mark] = journal
        self._bound()
        here = {journal.end for journal in self._journals.values()}
        self._lost = [
            cause_manifest(welcome.mark, (each.from_seq, each.from_time_ns), end, layer_of(each.granularity_ns),
                           each.journal_bytes, ERASED)
            for end, each in lacks.items() if each.awaits_backfill and end not in here
        ]  # fmt: skip

    def _bound(self) -> None:
        for mark in sorted(self._journals)[:-MAX_WAITING]:
            self._lost.append(self._journals.pop(mark).final_manifest(ERASED))

    @property
    def waiting(self) -> list[Waiting]:
        """Newest first."""
        return [
            Waiting(each.mark, each.layer, each.rung_bytes, each.parked)
            for each in reversed(self._journals.values())
        ]

    def wanted_segment(self, needed: int) -> int:
        """The first segment that holds any of it; `needed` where none does."""
        return min([needed, *(each.start.segment for each in self._journals.values())])

    # -- building and sending ----------------------------------------------------------------------------

    async def build(self, mark: int, until: Location) -> None:
        """Reads a journal's interval again unless that was the last one, to know its layers.

        Raises:
            CorruptionError: the local journal is damaged, or has it no more.
        """
        journal = self._journals[mark]
        if self._built is None or self._built.interval.mark != mark:
            self.close()
            self._built = await trio.to_thread.run_sync(self._read, journal, until)
        journal.rung_bytes = self._built.rung_bytes

    def _read(self, journal: _Journal, until: Location) -> PreparedInterval:
        reader = JournalReader(self._directory, self._block_sizes)
        try:
            reader.seek(journal.start, journal.start_position)
            interval = reader.next(until)
        finally:
            reader.close()
        if not isinstance(interval, Interval) or (interval.to_seq, interval.to_time_ns) != journal.end:
            raise CorruptionError(self._directory, 0, f"another interval is where mark {journal.mark} was")
        interval = after(interval, journal.base)
        source = BlockSource(self._directory, interval, self._block_sizes)
        try:
            return prepare(interval, self._volumes, source, True)
        except BaseException:
            source.close()
            raise

    async def ship(self, session: Session, step: Step, interrupted: Callable[[], Awaitable[bool]]) -> None:
        """Sends the layers of a step, unless they are interrupted: then they are parked.

        Raises:
            CorruptionError: the local journal is damaged, or was recycled meanwhile.
            PitfsError: of the session.
        """
        built, journal, layer = self._built, self._journals[step.mark], step.layer
        assert built is not None and built.interval.mark == step.mark
        left = layers_left(layer, built.rung_bytes)
        cause = waits_cause(left[-1][1]) if left else ""
        picked = await trio.to_thread.run_sync(pick_layers, built, journal.layer, layer, journal.base_bytes)
        resume = await self._sender.begin(session, layers_manifest(picked, cause))
        journal.parked = layer  # until it has arrived: on another connection this very transfer is resumed
        frames = layers_frames(picked, resume, self._sender.bandwidth.payload_bytes)
        try:
            if not await self._sender.send(session, frames, interrupted=interrupted):
                log.debug("layers of mark %d up to %d parked", step.mark, layer)
                return
        except CorruptionError as error:
            if error is not session.failure:  # ours: the session can be used for something else
                await session.park()
            raise
        journal.parked, journal.layer, journal.base_bytes = None, layer, picked.end_bytes
        self._sender.status.last_decision = step.decision
        self._sender.status.got_through()
        if layer == LAST_LAYER:
            self._drop(step.mark)

    async def give_up(self, session: Session, mark: int, error: CorruptionError) -> None:
        """The replica keeps what it has of a journal; the replica learns why there won't be more."""
        journal = self._drop(mark)
        numbers = await trio.to_thread.run_sync(list_segments, self._directory)
        erased = numbers and journal.start.segment < numbers[0]
        await self._send_cause(session, journal.final_manifest(ERASED if erased else str(error)))

    async def report_lost(self, session: Session) -> None:
        """Journals that the replica believes will still come, but the local journal has them no more."""
        while self._lost:
            await self._send_cause(session, self._lost.pop())

    async def _send_cause(self, session: Session, manifest: Manifest) -> None:
        log.info("the interval up to seq %d stays at its granularity: %s", manifest.to_seq, manifest.cause)
        await session.begin(manifest)
        await self._sender.send(session, iter([End((0, 0, 0, 0, 0))]))

    def _drop(self, mark: int) -> _Journal:
        if self._built is not None and self._built.interval.mark == mark:
            self.close()
        return self._journals.pop(mark)
