"""Joins production and link: what the local journal holds goes to the replica, mark by mark."""

from __future__ import annotations

import logging
import math
import os
from typing import Any, Final

import trio

from pitfs.config.production import Config
from pitfs.errors import CorruptionError, LinkError, PitfsError, PositionMismatchError
from pitfs.journal.block_source import BlockSource
from pitfs.journal.durability import Durability
from pitfs.journal.reader import Copy, Interval
from pitfs.journal.writer import Location
from pitfs.link.sessions.connect import SenderSession, connect
from pitfs.link.transport.streams import address_text
from pitfs.link.transport.tls import LinkContext
from pitfs.model import schedule
from pitfs.model.granularity import EVERY_WRITE
from pitfs.model.position import format_instant
from pitfs.model.record import CopyProgress
from pitfs.model.schedule import ShippingMode, behind_limit_s, choose_shipping_mode, next_step
from pitfs.model.transfer import WAITS, Hello, ResumePoint, VolumeInfo
from pitfs.replication import full_sync as copying
from pitfs.replication import shipment
from pitfs.replication.backfill import Backfill
from pitfs.replication.bandwidth import Budget
from pitfs.replication.cursor import JournalCursor
from pitfs.replication.sending import check_committed, payload_bytes_for, queue_bytes_for, send
from pitfs.replication.status import ReplicationStatus
from pitfs.replication.stream import TURN_S, AckReporter, Stream
from pitfs.splitter.client import SplitterClient
from pitfs.splitter.messages import SplitterStatus
from pitfs.storage.files import storage_error

log = logging.getLogger(__name__)

MAX_INTERVAL_ROWS: Final = 1 << 19  # blocks written: building the difference takes some 240 B of RAM for each
MAX_INTERVAL_PART: Final = 4  # of the journal's capacity: the largest part that an interval may take
WATCH_S: Final = 2.0  # how often that is looked at: seldom for the splitter, often for what may be written


class Shipper:
    """Ships a group.

    Args:
        config: of the group.
        hello: who we are.
        splitter, follower: of the splitter's control socket; the second waits for writes.
        tls: for the link, None on loopback without TLS.
    """

    def __init__(
        self,
        config: Config,
        hello: Hello,
        splitter: SplitterClient,
        follower: SplitterClient,
        tls: LinkContext | None,
    ) -> None:
        self._config = config
        self._hello = hello
        self._volumes: tuple[VolumeInfo, ...] = hello.volumes
        self._splitter, self._follower = splitter, follower
        self._tls = tls
        self._needed_segment = 0  # what stands before it has been shipped, but for what is wanted for backfill
        self._last_mark, self._marked_at = -1, Location(0, 0)  # as `watch` saw it
        self._early: set[int] = set()  # marks to be shipped that `watch` set; as few as fit into the journal
        self.standing = ReplicationStatus(address_text(config.replication.host, config.replication.port))
        self._budget = Budget(config.replication, self.standing)
        self._following = following = JournalCursor(config, hello, splitter, self.standing, self._give_back)
        self._directory = following.directory
        self._backfill = Backfill(self._directory, self._volumes, self.standing)
        self._durability = Durability(self._directory)
        parts = self.standing, self._budget, self._durability
        self._stream = Stream(following.reader, self._volumes, *parts, splitter.status, self._give_back)
        self._fitted = True  # every write of the last interval into the link's rate
        self._turn_at = 0.0  # the last turn of the stream
        self.telling = AckReporter(splitter)  # the splitter, in mode sync
        self._stream.on_durable = self._durable_there

    # -- marks -------------------------------------------------------------------------------------------

    async def mark(self, bookmark: str | None = None) -> SplitterStatus:
        """Closes the interval now. Raises CapacityError while writes pass unjournalled."""
        status = await self._splitter.mark(bookmark)
        self._following.wake.set()
        return status

    async def tick(self) -> None:
        """Closes an interval each `interval`, for ever."""
        while True:
            interval_s = self._config.replication.interval_ns / 1e9
            self._budget.tick_at = trio.current_time() + interval_s
            await trio.sleep(interval_s)
            try:
                await self.mark()
            except PitfsError as error:
                log.debug("no mark: %s", error)

    async def watch(self) -> None:
        """Closes an interval early that would take too much memory to ship, for ever."""
        while True:
            try:
                await self._close_large()
            except PitfsError as error:
                log.debug("no mark: %s", error)
            await trio.sleep(WATCH_S)

    async def _close_large(self) -> None:
        """Closes the interval where it may have more than MAX_INTERVAL_ROWS, or may not fit into the journal.

        Told by the journal's bytes (each row has its block there), not by what the reader has seen: that one
        stands still while something is sent or the link is down, just when an interval grows. What was written
        while the shipper was away can't be split any more: a mark only ever stands at the tail.
        """
        status = await self._splitter.status()
        smallest = min(volume.block_size for volume in self._volumes)
        if status.mark != self._last_mark:  # whoever set it
            self._last_mark, self._marked_at = status.mark, status.tail
            self._following.wake.set()
            return
        # In time to be sent, and its room given back, while the next one fills the rest.
        limit_bytes = min(MAX_INTERVAL_ROWS * smallest, self._config.journal.capacity_bytes // MAX_INTERVAL_PART)
        if self._following.bytes_between(self._marked_at, status.tail) > limit_bytes:
            self._early.add((await self.mark()).mark)

    # -- the link ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Ships for ever; reconnects with backoff."""
        while True:
            try:
                await self._connect()
            except PitfsError as error:
                self.standing.link_down(error)
            except OSError as error:  # where no complete copy would help: it reads the same
                where = error.filename or f"{self._hello.group}: a backing volume or the journal"
                self.standing.link_down(storage_error(error, where, "reading"))
            await self.standing.back_off()

    async def _connect(self) -> None:
        replication = self._config.replication
        async with connect(
            replication.host,
            replication.port,
            tls=self._tls,
            hello=self._hello,
            rate_bytes_per_s=replication.rate_bytes_per_s,
            queue_bytes=queue_bytes_for(self._budget.rate),
            window_bytes=replication.window_bytes,
        ) as session:
            log.debug("connected to %s, which has mark %d", session.peer, session.welcome.mark)
            self.standing.connected = True
            session.on_progress = self.standing.getting_through
            self.standing.arrived(session.welcome, None)
            await self._meet(session)
            try:
                while True:
                    await self._go_on(session)
            finally:
                self._stream.end()
                self._out_of_step("the link to the replica is down")

    async def _meet(self, session: SenderSession) -> None:
        """Finds out where the replica stands in the journal, and what it lacks of intervals that it has."""
        welcome = session.welcome
        self._stream.end()
        await self._following.locate(welcome)
        if self._config.replication.mode != "snapshot":
            self._backfill.restore(welcome.coarse, list(self._following.reader.seen), welcome.mark)
        await self._give_back(self._following.reader.start.segment)  # a splitter that was restarted doesn't know

    async def _go_on(self, session: SenderSession) -> None:
        """One turn: of the stream; or the next diff or copy, else layers that wait; else it is waited for something."""
        if session.failure is not None:  # nothing else would tell while there is nothing to send
            raise session.failure
        await self._backfill.tell_lost(session)
        if not self._stream.active and session.welcome.mark and not self._following.copy_ahead:
            tail = (await self._splitter.status()).tail
            if self._way(self._following.bytes_between(self._following.reader.start, tail)).streams:
                log.info("streaming behind mark %d: %s", session.welcome.mark, self.standing.way)
                self._stream.begin(session, session.welcome.mark)
        if self._stream.active:
            await self._go_on_streaming(session)
            return
        item = await self._following.next_item(session, wait=not self._backfill.waiting)
        if isinstance(item, Copy):
            await self._ship_copy(session, item)
        elif isinstance(item, Interval):
            await self._ship_interval(session, item)
        else:
            await self._ship_layers(session)

    def _way(self, backlog_bytes: int) -> ShippingMode:
        replication = self._config.replication
        way = choose_shipping_mode(
            mode=replication.mode,
            streaming=self._stream.active,
            behind_s=self._stream.behind_s() if self._stream.active else 0.0,
            backlog_bytes=backlog_bytes,
            interval_s=replication.interval_ns / 1e9,
            rate_bytes_per_s=self._budget.rate,
            fitted=self._fitted,
        )
        self.standing.way = way.reason
        return way

    async def _go_on_streaming(self, session: SenderSession) -> None:
        """What was written; then layers of a journal that waits, or it is waited for more."""
        self._following.wake = trio.Event()
        if await self._stream_turn(session):
            return
        await self._stream.give_back()
        if self._backfill.waiting:
            await self._ship_layers(session)
        elif self._config.replication.mode == "sync":
            await self._follower.wait_for_writes(self._stream.journalled_lsn)
        else:
            with trio.move_on_at(self._turn_at + TURN_S):
                await self._following.wake.wait()

    async def _stream_turn(self, session: SenderSession) -> bool:
        """One turn of the stream; True where it ended: the replica was behind, or can't be led on that way."""
        replication, stream = self._config.replication, self._stream
        dynamic = replication.mode == "dynamic"
        limit_s = behind_limit_s(replication.interval_ns / 1e9) if dynamic else math.inf
        damage = None
        self._turn_at = trio.current_time()
        try:
            self._following.copy_ahead = await stream.turn(limit_s)
        except CorruptionError as error:
            if error is session.failure:
                raise
            damage = error
        if damage is None and not self._following.copy_ahead and self._way(0).streams:
            return False
        cause = "a copy goes first" if self._following.copy_ahead else str(damage or self.standing.way)
        log.info("no longer streaming: %s", cause)
        self._out_of_step(cause)
        self._fitted = damage is not None or self._following.copy_ahead
        await stream.leave()
        if damage is not None:
            await self._following.rescan(str(damage))
        return True

    def _durable_there(self) -> None:
        if self._config.replication.mode == "sync":
            self.telling.tell(self._stream.durable_seq, self.telling.in_step or self._stream.caught_up)

    def _out_of_step(self, cause: str) -> None:
        if self._config.replication.mode == "sync":
            self.telling.tell(self._stream.durable_seq, False, cause)

    async def _between(self, session: SenderSession) -> bool:
        """Between two frames of layers: whether something else goes first. What was written is streamed at once."""
        if not self._stream.active:
            return self._following.wake.is_set()
        if self._config.replication.mode != "sync" and trio.current_time() - self._turn_at < TURN_S:
            return False
        return await self._stream_turn(session)

    # -- transfers ---------------------------------------------------------------------------------------

    async def _ship_copy(self, session: SenderSession, copy: Copy) -> None:
        before = session.welcome.mark
        if not shipment.leads_on(copy, session.welcome):
            await self._following.abandon("the replica hasn't the state that the changed blocks build on")
        manifest = shipment.copy_manifest(copy, self._hello.history, session.welcome)
        resume = await session.begin(manifest)
        self.standing.begun()
        # Now, not when the word of the commit comes: that may be lost, and the marks before are so in any case.
        self.standing.lost = (before, copy.start.mark, copy.start.cause)
        behind = f" behind {resume.lengths[1]} bytes" if resume.cursor else ""
        log.info("%s begins, mark %d%s", copy.what, copy.start.mark, behind)
        fds = [os.open(volume.backing, os.O_RDONLY | os.O_CLOEXEC) for volume in self._config.volumes]

        def tail() -> Location:
            status = trio.from_thread.run(self._splitter.status)
            if status.copy is None or status.copy.mark != copy.start.mark:
                raise LinkError("the copy under way was given up: writes passed unjournalled meanwhile")
            return status.tail

        try:
            iterator = copying.frames(
                self._directory, self._volumes, fds, copy.location, copy.start.mark, resume, tail
            )

            async def on_durable(point: ResumePoint) -> None:
                if len(point.cursor) == 2:
                    volume, block = point.cursor
                    await self._splitter.copied(CopyProgress(copy.start.mark, volume, block))

            await send(session, iterator, self.standing, on_durable=on_durable)
        except (CorruptionError, PositionMismatchError) as error:
            # Only what we see for ourselves makes all be copied again: damage here, or a replica that resumes
            # before what it had acknowledged. A peer's word needs no copy to get on: the next session's resume
            # point says where it stands.
            if error is session.failure:
                raise
            await self._following.abandon(str(error))
        finally:
            for fd in fds:
                os.close(fd)
        await self._splitter.copied(CopyProgress(copy.start.mark, len(self._volumes), 0))
        self.standing.getting_through()
        self.standing.arrived(session.welcome, copy.location)
        self.standing.settle(copy.start.mark)
        self._following.copy_ahead = False
        log.info("%s committed, mark %d", copy.what, copy.start.mark)

    async def _ship_interval(self, session: SenderSession, interval: Interval) -> None:
        """The interval's snapshot diff; its difference journal waits then."""
        sizes = [volume.block_size for volume in self._volumes]
        source = BlockSource(self._directory, interval, sizes)
        wants_journal = self._config.replication.mode != "snapshot"
        try:
            segments = interval.start.segment, interval.end.segment
            await trio.to_thread.run_sync(self._durability.make, *segments)
            self._backfill.forget()
            prepared = await trio.to_thread.run_sync(
                shipment.prepare, interval, self._volumes, source, wants_journal
            )
            decision = self._budget.decide(prepared, interval.mark in self._early)
            cause = decision.reason if decision.granularity_ns is None else f"its difference journal waits {WAITS}"
            resume = await session.begin(shipment.diff_manifest(prepared, cause))
            self.standing.begun()
            payload_bytes = payload_bytes_for(self._budget.rate)
            iterator = shipment.diff_frames(prepared, source, self._volumes, resume, payload_bytes)
            await send(session, iterator, self.standing)
            check_committed(session, interval.mark, (interval.to_seq, interval.to_time_ns))
        except CorruptionError as error:
            source.close()
            # On the next connection the replica wants this one again: then it's passed over for the copy.
            self._following.damaged = interval.mark, str(error)
            await self._following.rescan(str(error))
            raise LinkError(f"{error}: connecting anew for a complete copy") from error
        except BaseException:
            source.close()
            raise
        self.standing.last_decision = decision
        self._backfill.add(prepared, source)
        await self._give_back(interval.end.segment)
        self.standing.getting_through()
        self.standing.arrived(session.welcome, interval.end)
        if decision.granularity_ns is None or prepared.journal is None:
            self.standing.settle(interval.mark)
        self._early = {mark for mark in self._early if mark > interval.mark}
        self._fitted = decision.granularity_ns == EVERY_WRITE
        log.debug("interval committed, mark %d, %d writes", interval.mark, len(interval.times))

    async def _ship_layers(self, session: SenderSession) -> None:
        """What goes next of the journals that wait; puts it off where a diff is due."""
        step = next_step(
            diff_due=self._following.wake.is_set() and not self._stream.active,
            waiting=self._backfill.waiting,
            room_bytes=self._budget.room_bytes(),
        )
        if step.kind in (schedule.StepKind.DIFF, schedule.StepKind.WAIT):
            return
        log.debug("next: %s", step)
        try:
            await self._backfill.build(step.mark, (await self._splitter.status()).tail)
            if step.kind is schedule.StepKind.LAYERS:
                await self._backfill.ship(session, step, self._budget.rate, lambda: self._between(session))
                self.standing.settle(step.mark)
        except CorruptionError as error:
            if error is session.failure:
                raise
            await self._backfill.give_up(session, step.mark, error)
            self.standing.settle(step.mark)
        await self._give_back(self._needed_segment)

    async def _give_back(self, segment: int) -> None:
        """Segments before that one aren't needed for shipping any more; some are wanted for backfill."""
        self._needed_segment = max(self._needed_segment, segment)
        wanted = self._backfill.wanted_segment(self._needed_segment)
        await self._splitter.release(self._needed_segment, wanted)

    # -- for people --------------------------------------------------------------------------------------

    async def status(self, now_ns: int) -> dict[str, Any]:
        """The keys of INTERFACE: status --json, and more."""
        standing, splitter = self.standing, await self._splitter.status()
        committed, location = standing.committed, standing.committed_location
        protected = committed.protected_through_ns if committed and committed.mark else None
        lag_bytes = splitter.used_bytes
        if location is not None:
            lag_bytes = self._following.bytes_between(location, splitter.tail)
        decision, rate = standing.last_decision, self._config.replication.rate_bytes_per_s
        connected = standing.link == "connected"
        return {
            "role": "production",
            "group": self._hello.group,
            "protected_through": format_instant(protected) if protected else None,
            "lag_bytes": lag_bytes,
            "lag_seconds": round(max(0, now_ns - protected) / 1e9, 3) if protected else None,
            "backfill_intervals": len(self._backfill.waiting),
            "lag_intervals": splitter.mark - (committed.mark if committed else 0),
            "journal_bytes": splitter.used_bytes,
            "journal_capacity_bytes": splitter.capacity_bytes,
            "rate_bytes_per_s": rate if rate is not None else self.standing.measured_rate,
            "last_decision": decision
            and {"granularity_ns": decision.granularity_ns, "reason": decision.reason},
            "holders": [],
            "seq": splitter.seq,
            "link": standing.link,
            "mode": self._config.replication.mode,
            "shipping": "streaming" if self._stream.active else standing.way if connected else "waits for the link",
            "sync": splitter.sync,
            "passing": splitter.bypass_cause or None,
            "writes_waiting": splitter.waiting_count or None,
            "changed_bytes": splitter.changed_bytes,
            "copying": splitter.copy is not None,
            "copying_bytes": splitter.copy.changed_bytes if splitter.copy is not None else None,
        }
