"""Difference journals that aren't whole on the replica: sent layer by layer while the local journal has them."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio
from msgspec.structs import replace

from pitfs.errors import CorruptionError
from pitfs.journal.reader import BlockSource, Interval, JournalReader, SeenMark, after
from pitfs.journal.writer import Location
from pitfs.model.ladder import LAST_LAYER, granularity_of, layer_of
from pitfs.model.schedule import Step, Waiting, layers_left
from pitfs.model.transfer import CoarseInterval, End, Manifest, Welcome
from pitfs.replication.interval import PreparedInterval, layers_frames, pick_layers, prepare
from pitfs.replication.manifests import cause_manifest, layers_manifest, waits_cause
from pitfs.replication.ports import Session, ShipperSettings
from pitfs.replication.sending import Sender
from pitfs.storage.segment import list_segments

log = logging.getLogger(__name__)

MAX_WAITING: Final = 256  # journals that are remembered; what a welcome names
ERASED: Final = "the local journal needed the room before the link was idle long enough for the rest of it"


@dataclass(slots=True)
class _Journal:
    """One difference journal: where its interval is in the local journal, and what the replica has of it.

    Attributes:
        start: where the interval begins there; start_position: (seq, time_ns) of that.
        coarse: the interval on the replica, where it begins later if a stream had got further.
        rung_bytes, parked: as in Waiting.
    """

    mark: int
    start: Location
    start_position: tuple[int, int]
    coarse: CoarseInterval
    rung_bytes: tuple[int | None, ...] | None = None
    parked: int | None = None

    @property
    def layer(self) -> int:
        """The last one that the replica has."""
        return layer_of(self.coarse.granularity_ns)


def _bounds(of: Interval | CoarseInterval) -> tuple[int, int, int, int]:
    return of.from_seq, of.from_time_ns, of.to_seq, of.to_time_ns


class Backfill:
    """The journals that wait, and the one that was built last, of which alone layers can be sent.

        prepare  builds an interval, for its diff
        add      that diff has arrived: the journal waits, and is built already
        restore  a session begins: what waits is what the replica lacks and the local journal still has
        build    reads the interval of a journal again, for the sizes and contents of its layers
        ship     sends layers of the built one; the replica has it whole: it waits no more
        give_up  the local journal has the interval no more: the replica gets the cause why it stays as coarse as it is
    """

    def __init__(self, settings: ShipperSettings, sender: Sender) -> None:
        self._directory, self._sender = settings.journal_directory, sender
        self._volumes, self._block_sizes = settings.hello.volumes, settings.block_sizes
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
        """Of the interval prepared last: its diff has arrived."""
        interval = prepared.interval
        if prepared.journal is None:
            self.close()
            return
        bounds, mark = _bounds(interval), interval.mark
        coarse = CoarseInterval(*bounds, None, 0)
        self._journals[mark] = _Journal(mark, interval.start, bounds[:2], coarse, prepared.rung_bytes)
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
            del lacks[end.position]
            journal = known.get(end.mark)
            if journal is None or _bounds(journal.coarse) != _bounds(found):
                journal = _Journal(end.mark, start.location, start.position, found)
            if journal.coarse.granularity_ns != found.granularity_ns:
                journal.parked = None
            journal.coarse = found
            self._journals[end.mark] = journal
        lost = [each for each in lacks.values() if each.awaits_backfill]
        self._lost = [cause_manifest(welcome.mark, each, ERASED) for each in lost]
        self._bound()

    def _bound(self) -> None:
        for mark in sorted(self._journals)[:-MAX_WAITING]:
            self._lost.append(cause_manifest(mark, self._journals.pop(mark).coarse, ERASED))

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

    async def prepare(self, interval: Interval, wants_journal: bool) -> PreparedInterval:
        """Builds the difference of an interval, as `interval.prepare`. It is valid until the next one is built."""
        self.close()
        source = BlockSource(self._directory, interval, self._block_sizes)
        with contextlib.ExitStack() as opened:
            opened.callback(source.close)
            self._built = await trio.to_thread.run_sync(prepare, interval, self._volumes, source, wants_journal)
            opened.pop_all()
        return self._built

    async def build(self, mark: int, until: Location) -> None:
        """Reads a journal's interval again unless that was the last one, to know its layers.

        Raises CorruptionError where the local journal is damaged, or has it no more.
        """
        journal, built = self._journals[mark], self._built
        if built is None or (built.interval.mark, _bounds(built.interval)) != (mark, _bounds(journal.coarse)):
            self.close()
            built = await self.prepare(await trio.to_thread.run_sync(self._read, journal, until), True)
        journal.rung_bytes = built.rung_bytes

    def _read(self, journal: _Journal, until: Location) -> Interval:
        with contextlib.closing(JournalReader(self._directory, self._block_sizes)) as reader:
            reader.seek(journal.start, journal.start_position)
            interval = reader.next(until)
        from_seq, from_time_ns, *end = _bounds(journal.coarse)
        if not isinstance(interval, Interval) or [interval.to_seq, interval.to_time_ns] != end:
            raise CorruptionError(self._directory, 0, f"another interval is where mark {journal.mark} was")
        return after(interval, (from_seq, from_time_ns))

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
        picked = await trio.to_thread.run_sync(pick_layers, built, journal.layer, layer, journal.coarse.journal_bytes)
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
        journal.parked = None
        journal.coarse = replace(
            journal.coarse, granularity_ns=granularity_of(layer), journal_bytes=picked.end_bytes
        )
        self._sender.status.last_decision = step.decision
        self._sender.status.got_through()
        if layer == LAST_LAYER:
            self._drop(step.mark)

    async def give_up(self, session: Session, mark: int, error: CorruptionError) -> None:
        """The replica keeps what it has of a journal; the replica learns why there won't be more."""
        journal = self._drop(mark)
        numbers = await trio.to_thread.run_sync(list_segments, self._directory)
        erased = numbers and journal.start.segment < numbers[0]
        await self._send_cause(session, cause_manifest(mark, journal.coarse, ERASED if erased else str(error)))

    async def report_lost(self, session: Session) -> None:
        """Journals that the replica believes will still come, but the local journal has them no more."""
        while self._lost:
            await self._send_cause(session, self._lost.pop())

    async def _send_cause(self, session: Session, manifest: Manifest) -> None:
        log.info("the interval up to seq %d stays at its granularity: %s", manifest.to_seq, manifest.cause)
        await session.begin(manifest)
        await session.finish(End((0, 0, 0, 0, 0)))

    def _drop(self, mark: int) -> _Journal:
        if self._built is not None and self._built.interval.mark == mark:
            self.close()
        return self._journals.pop(mark)
