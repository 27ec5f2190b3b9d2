"""Difference journals that aren't whole on the replica: sent layer by layer while the local journal has them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio
from msgspec.structs import replace

from pitfs.errors import CorruptionError
from pitfs.journal.reader import BlockSource, Interval, JournalReader
from pitfs.journal.search import Found, SegmentSearch
from pitfs.journal.writer import Location
from pitfs.model.difference import Transfer
from pitfs.model.ladder import LAST_LAYER, NO_LAYER, granularity_of, layer_of
from pitfs.model.schedule import Step, Waiting, layers_left
from pitfs.model.transfer import CoarseInterval, End, Manifest, Welcome
from pitfs.replication.interval import PreparedInterval, layers_frames, pick_layers, prepare
from pitfs.replication.manifests import cause_manifest, layers_manifest, waits_cause
from pitfs.replication.ports import Session, ShipperSettings
from pitfs.replication.sending import Sender
from pitfs.splitter.messages import SplitterStatus

log = logging.getLogger(__name__)

MAX_WAITING: Final = 256  # journals that are remembered; what a welcome names
ERASED: Final = "the local journal needed the room before the link was idle long enough for the rest of it"
GONE: Final = "the local journal doesn't have the rest of it any more"
TOO_MANY: Final = f"the difference journals of more than {MAX_WAITING} later intervals waited for the link"


@dataclass(slots=True)
class _Journal:
    """One difference journal: where its interval is in the local journal, and what the replica has of it.

    Attributes:
        mark: of the interval's end; 0 where it isn't known, since another shipper sent the diff.
        segment: that has its first write, or comes shortly before.
        coarse: the interval on the replica.
        rung_bytes, parked: as in Waiting.
        sent: layers that this process sent, (base, layer, base_bytes) of each transfer; what they brought isn't sent
            again. sent_end: layer and bytes of JOURNAL_BLOCKS that the replica had then: else it was another's.
    """

    mark: int
    segment: int
    coarse: CoarseInterval
    rung_bytes: tuple[int | None, ...] | None = None
    parked: int | None = None
    sent: tuple[Transfer, ...] = ()
    sent_end: tuple[int, int] = NO_LAYER, 0

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
        self._journals: dict[int, _Journal] = {}  # by the last seq, oldest first
        self._built: PreparedInterval | None = None
        self._lost: list[Manifest] = []  # to be sent for journals that the replica believes will still come
        # The last seqs of what is coarse for the replica, but no interval of the journal: behind a gap, say.
        self._no_intervals: set[int] = set()

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
        coarse = CoarseInterval(*_bounds(interval), None, 0, awaits_backfill=True)
        self._journals[interval.to_seq] = _Journal(
            interval.mark, interval.start.segment, coarse, prepared.rung_bytes
        )
        self._bound()

    async def restore(self, welcome: Welcome, splitter: SplitterStatus) -> None:
        """What a replica says that it lacks, as far as the local journal has it.

        An interval may begin anywhere between two marks: where a stream had got to. So it is found by its first write.
        """
        known, self._journals, self._lost = self._journals, {}, []
        self._no_intervals &= {each.to_seq for each in welcome.coarse}
        segments = await trio.to_thread.run_sync(self._find, welcome, splitter.tail)
        for coarse, segment in sorted(zip(welcome.coarse, segments, strict=True), key=lambda each: each[0].to_seq):
            if segment is None:
                if coarse.awaits_backfill:
                    # A checkpoint of an older version doesn't say why segments that were wanted are gone.
                    cause = GONE if splitter.given_up_seq <= coarse.from_seq else ERASED
                    self._lost.append(cause_manifest(coarse, cause))
                continue
            if coarse.to_seq in self._no_intervals:
                continue
            journal = known.get(coarse.to_seq)
            if journal is None or _bounds(journal.coarse) != _bounds(coarse):
                journal = _Journal(0, segment, coarse)
            if journal.coarse.granularity_ns != coarse.granularity_ns:
                journal.parked = None
            journal.coarse = coarse
            self._journals[coarse.to_seq] = journal
        self._bound()

    def _find(self, welcome: Welcome, until: Location) -> list[int | None]:
        """Of each coarse interval the segment where its writes begin; None where the local journal has it no more."""
        search = SegmentSearch(self._directory, until)
        return [search.segment_of((each.from_seq + 1, 0)) for each in welcome.coarse]

    def _bound(self) -> None:
        for seq in sorted(self._journals)[:-MAX_WAITING]:
            journal = self._journals.pop(seq)
            self._lost.append(cause_manifest(journal.coarse, TOO_MANY))

    @property
    def waiting(self) -> list[Waiting]:
        """Newest first."""
        return [
            Waiting(seq, each.layer, each.rung_bytes, each.parked)
            for seq, each in reversed(self._journals.items())
        ]

    def wanted_segment(self, needed: int) -> int:
        """The first segment that holds any of it; `needed` where none does."""
        return min([needed, *(each.segment for each in self._journals.values())])

    def mark_of(self, seq: int) -> int:
        """Of the interval's end, 0 where it isn't known."""
        return self._journals[seq].mark

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

    async def build(self, seq: int, until: Location) -> None:
        """Reads a journal's interval again unless that was the last one, to know its layers.

        Raises CorruptionError where the local journal is damaged, or has it no more.
        """
        journal, built = self._journals[seq], self._built
        if built is None or _bounds(built.interval) != _bounds(journal.coarse):
            self.close()
            built = await self.prepare(await trio.to_thread.run_sync(self._read, journal, until), True)
        journal.mark, journal.rung_bytes = built.interval.mark, built.rung_bytes

    def _read(self, journal: _Journal, until: Location) -> Interval:
        from_seq, from_time_ns, *end = _bounds(journal.coarse)
        with contextlib.closing(JournalReader(self._directory, self._block_sizes)) as reader:
            if reader.seek_writes_behind((from_seq, from_time_ns), until) is not Found.THERE:
                raise CorruptionError(self._directory, 0, f"it doesn't have write {from_seq + 1} any more")
            interval = reader.next(until)
        if not isinstance(interval, Interval) or [interval.to_seq, interval.to_time_ns] != end:
            raise CorruptionError(self._directory, 0, f"no interval ends at seq {end[0]} that begins behind {from_seq}")
        return interval

    async def ship(self, session: Session, step: Step, interrupted: Callable[[], Awaitable[bool]]) -> None:
        """Sends the layers of a step, unless they are interrupted: then they are parked.

        Raises:
            CorruptionError: the local journal is damaged, or was recycled meanwhile.
            PitfsError: of the session.
        """
        built, journal, layer = self._built, self._journals[step.seq], step.layer
        assert built is not None and built.interval.to_seq == step.seq
        left = layers_left(layer, built.rung_bytes)
        cause = waits_cause(left[-1][1]) if left else ""
        has_bytes = journal.coarse.journal_bytes
        earlier = journal.sent if journal.sent_end == (journal.layer, has_bytes) else ()
        transfer = journal.layer, layer, has_bytes
        picked = await trio.to_thread.run_sync(pick_layers, built, *transfer, earlier)
        resume = await self._sender.begin(session, layers_manifest(picked, cause))
        journal.parked = layer  # until it has arrived: on another connection this very transfer is resumed
        frames = layers_frames(picked, resume, self._sender.bandwidth.payload_bytes)
        try:
            if not await self._sender.send(session, frames, interrupted=interrupted):
                log.debug("layers of mark %d up to %d parked", journal.mark, layer)
                return
        except CorruptionError as error:
            if error is not session.failure:  # ours: the session can be used for something else
                await session.park()
            raise
        journal.parked = None
        journal.sent, journal.sent_end = (*earlier, transfer), (layer, picked.end_bytes)
        journal.coarse = replace(
            journal.coarse, granularity_ns=granularity_of(layer), journal_bytes=picked.end_bytes
        )
        self._sender.status.last_decision = step.decision
        self._sender.status.got_through()
        if layer == LAST_LAYER:
            self._drop(step.seq)

    async def give_up(self, session: Session, seq: int, error: CorruptionError, splitter: SplitterStatus) -> None:
        """The replica keeps what it has of a journal; where it believes that more will come it learns why not."""
        journal = self._drop(seq)
        if not journal.coarse.awaits_backfill:
            log.debug("nothing more for the interval up to seq %d: %s", seq, error)
            self._no_intervals.add(seq)
            return
        cause = str(error) if splitter.given_up_seq <= journal.coarse.from_seq else ERASED
        await self._send_cause(session, cause_manifest(journal.coarse, cause))

    async def report_lost(self, session: Session) -> None:
        """Journals that the replica believes will still come, but the local journal has them no more."""
        while self._lost:
            await self._send_cause(session, self._lost.pop())

    async def _send_cause(self, session: Session, manifest: Manifest) -> None:
        log.info("the interval up to seq %d stays at its granularity: %s", manifest.to_seq, manifest.cause)
        await session.begin(manifest)
        await session.finish(End((0, 0, 0, 0, 0)))

    def _drop(self, seq: int) -> _Journal:
        if self._built is not None and self._built.interval.to_seq == seq:
            self.close()
        return self._journals.pop(seq)
