"""Difference journals that aren't whole on the replica: sent layer by layer while the local journal has them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from pitfs.errors import CorruptionError
from pitfs.journal.block_source import BlockSource
from pitfs.journal.reader import Interval, JournalReader, SeenMark, after
from pitfs.journal.writer import Location
from pitfs.link.sessions.connect import SenderSession
from pitfs.model.granularity import Decision, megabytes
from pitfs.model.ladder import LAST_LAYER, NO_LAYER, RUNGS_NS, layer_of
from pitfs.model.schedule import Step, Waiting, layers_left
from pitfs.model.transfer import WAITS, Coarse, VolumeInfo
from pitfs.replication import shipment
from pitfs.replication.sending import BATCH_BYTES, payload_bytes_for, send
from pitfs.replication.shipment import Shipment
from pitfs.replication.status import ReplicationStatus
from pitfs.storage.segment import list_segments

log = logging.getLogger(__name__)

MAX_WAITING: Final = 256  # journals that are remembered; what a welcome names
ERASED: Final = "the local journal needed the room before the link was idle long enough for the rest of it"


@dataclass(slots=True)
class _Journal:
    """One of them: where its interval stands in the local journal, and what the replica has."""

    mark: int
    start: Location
    start_position: tuple[int, int]  # that stands there
    position: tuple[int, int]  # that the interval begins at: behind `start_position` where a stream had got further
    to: tuple[int, int]  # that it ends at
    layer: int
    base_bytes: int  # of JOURNAL_BLOCKS that the replica has
    rung_bytes: tuple[int | None, ...] | None = None
    parked: int | None = None


class Backfill:
    """The journals that wait, and the one that was built last.

    Args:
        directory: of the local journal.
    """

    def __init__(self, directory: str, volumes: tuple[VolumeInfo, ...], standing: ReplicationStatus) -> None:
        self._directory, self._volumes, self._standing = directory, volumes, standing
        self._block_sizes = [volume.block_size for volume in volumes]
        self._journals: dict[int, _Journal] = {}  # by mark, oldest first
        self._built: tuple[int, Shipment, BlockSource] | None = None
        self._lost: list[_Journal] = []  # the replica believes that they will still come

    def close(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Lets go of the one that was built last: where another is about to be, both would take their memory."""
        if self._built is not None:
            self._built[2].close()
            self._built = None

    # -- what waits --------------------------------------------------------------------------------------

    def add(self, shipment: Shipment, source: BlockSource) -> None:
        """Of an interval whose diff has arrived; takes the source over."""
        self.forget()
        interval = shipment.interval
        if shipment.journal is None:
            source.close()
            return
        to = interval.to_seq, interval.to_time_ns
        position = interval.from_seq, interval.from_time_ns
        journal = _Journal(interval.mark, interval.start, position, position, to, NO_LAYER, 0, shipment.rung_bytes)
        self._journals[interval.mark] = journal
        self._built = interval.mark, shipment, source
        self._bound()

    def restore(self, coarse: Sequence[Coarse], marks: Sequence[SeenMark], mark: int) -> None:
        """What a replica says that it lacks, as far as the local journal has it.

        Args:
            marks: those that the local journal has, in order.
            mark: the replica's.
        """
        lacks = {(each.to_seq, each.to_time_ns): each for each in coarse}
        before, self._journals = self._journals, {}
        for start, end in itertools.pairwise(marks):
            found = lacks.get(end.position)
            if found is None or end.begins_anew or not start.position[0] <= found.from_seq < end.position[0]:
                continue
            position = found.from_seq, found.from_time_ns
            journal = before.get(end.mark)
            layer = layer_of(found.granularity_ns)
            if journal is None or (journal.position, journal.to) != (position, end.position):
                places = start.location, start.position, position, end.position
                journal = _Journal(end.mark, *places, layer, found.journal_bytes)
            if journal.layer != layer:
                journal.parked = None
            journal.layer, journal.base_bytes = layer, found.journal_bytes
            self._journals[end.mark] = journal
        self._bound()
        here = {journal.to for journal in self._journals.values()}
        self._lost = [
            _Journal(mark, Location(0, 0), (0, 0), (each.from_seq, each.from_time_ns), to,
                     layer_of(each.granularity_ns), each.journal_bytes)
            for to, each in lacks.items() if each.waits and to not in here
        ]  # fmt: skip

    def _bound(self) -> None:
        for mark in sorted(self._journals)[:-MAX_WAITING]:
            self._lost.append(self._journals.pop(mark))

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
        if self._built is None or self._built[0] != mark:
            self.forget()
            self._built = mark, *await trio.to_thread.run_sync(self._read, self._journals[mark], until)
        self._journals[mark].rung_bytes = self._built[1].rung_bytes

    def _read(self, journal: _Journal, until: Location) -> tuple[Shipment, BlockSource]:
        reader = JournalReader(self._directory, self._block_sizes)
        try:
            reader.seek(journal.start, journal.start_position)
            interval = reader.next(until)
        finally:
            reader.close()
        if not isinstance(interval, Interval) or (interval.to_seq, interval.to_time_ns) != journal.to:
            raise CorruptionError(self._directory, 0, f"another interval stands where mark {journal.mark} was")
        interval = after(interval, journal.position)
        source = BlockSource(self._directory, interval, self._block_sizes)
        try:
            return shipment.prepare(interval, self._volumes, source, True), source
        except BaseException:
            source.close()
            raise

    async def ship(
        self,
        session: SenderSession,
        step: Step,
        rate_bytes_per_s: float | None,
        interrupted: Callable[[], Awaitable[bool]],
    ) -> bool:
        """Sends the layers of a step; False where they were put off.

        Raises:
            CorruptionError: the local journal is damaged, or was given up under our eyes.
            PitfsError: of the session.
        """
        assert self._built is not None and self._built[0] == step.mark
        _, built, source = self._built
        journal = self._journals[step.mark]
        base, layer = journal.layer, step.layer
        left = layers_left(layer, built.rung_bytes)
        cause = ""
        if left:
            cause = f"{megabytes(left[-1][1])} MB more of its difference journal wait {WAITS}"
        picked = await trio.to_thread.run_sync(shipment.pick_layers, built, base, layer, journal.base_bytes)
        manifest = shipment.layers_manifest(picked, cause)
        payload_bytes = payload_bytes_for(rate_bytes_per_s)
        resume = await session.begin(manifest)
        self._standing.begun()
        journal.parked = layer  # until it has arrived: on another connection it goes on as it is
        frames = shipment.layers_frames(picked, source, self._volumes, resume, payload_bytes)
        batch_bytes = min(BATCH_BYTES, 4 * payload_bytes)
        try:
            if not await send(session, frames, self._standing, batch_bytes=batch_bytes, interrupted=interrupted):
                log.debug("layers of mark %d up to %d put off", step.mark, layer)
                return False
        except CorruptionError as error:
            if error is not session.failure:  # ours: the session can be used for something else
                await session.park()
            raise
        journal.parked, journal.layer = None, layer
        journal.base_bytes = picked.end_bytes
        self._standing.last_decision = Decision(RUNGS_NS[layer], cause or step.reason)
        self._standing.getting_through()
        if layer == LAST_LAYER:
            self.drop(step.mark)
        return True

    async def give_up(self, session: SenderSession, mark: int, error: CorruptionError) -> None:
        """The replica keeps what it has of a journal; it is told why there won't be more."""
        journal = self._journals[mark]
        self.drop(mark)
        numbers = await trio.to_thread.run_sync(list_segments, self._directory)
        await self._tell(session, journal, ERASED if numbers and journal.start.segment < numbers[0] else str(error))

    async def tell_lost(self, session: SenderSession) -> None:
        """Journals that the replica believes will still come, but the local journal has them no more."""
        while self._lost:
            await self._tell(session, self._lost.pop(), ERASED)

    async def _tell(self, session: SenderSession, journal: _Journal, cause: str) -> None:
        log.info("the interval up to seq %d stays at its granularity: %s", journal.to[0], cause)
        granularity_ns = None if journal.layer == NO_LAYER else RUNGS_NS[journal.layer]
        manifest = shipment.cause_manifest(
            journal.mark, journal.position, journal.to, granularity_ns, journal.base_bytes, cause
        )
        await session.begin(manifest)
        await send(session, iter(shipment.no_frames()), self._standing)

    def drop(self, mark: int) -> None:
        self._journals.pop(mark, None)
        if self._built is not None and self._built[0] == mark:
            self.forget()
