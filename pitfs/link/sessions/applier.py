"""What a session's thread does: it decodes payloads, joins batches, feeds the ingest and makes the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pitfs.errors import RemoteProtocolError
from pitfs.link.codec.payloads import PayloadDecoder
from pitfs.link.protocol.batches import BatchJoiner
from pitfs.link.protocol.frames import Committed, Frame, Parked, Progress, Resume, WireData
from pitfs.model import transfer


class IngestProtocol(Protocol):
    """What takes the transfers and the stream of one session; called from threads, one call at a time.

    `publish` is called where nothing has come for a while: it makes readable what was streamed last.
    """

    def welcome(self) -> transfer.Welcome: ...
    def begin(self, manifest: transfer.Manifest) -> transfer.ResumePoint: ...
    def data(self, frame: transfer.Data) -> None: ...
    def checkpoint(self, cursor: tuple[int, ...]) -> transfer.ResumePoint: ...
    def park(self, cursor: tuple[int, ...]) -> transfer.ResumePoint: ...
    def end(self, end: transfer.End) -> transfer.Welcome: ...
    def write(self, writes: transfer.Writes) -> None: ...
    def flush(self, protected_through_ns: int) -> transfer.Durable: ...
    def mark(self, mark: transfer.StreamMark) -> transfer.Durable: ...
    def publish(self) -> None: ...
    def close(self) -> None: ...


class HealerProtocol(Protocol):
    """What heals the store of one session; called from threads, one call at a time, beside the calls of the ingest.

    `wanted` says which contents are, at most MAX_WANTED; `take` gets the answers, None for what production has no more.
    """

    def wanted(self) -> tuple[transfer.Wanted, ...]: ...
    def take(self, contents: Sequence[bytes | None]) -> None: ...
    def close(self) -> None: ...


class Applier:
    """Feeds one session's frames to its ingest, from threads, one call at a time.

    Args:
        window_bytes: of the codec, as agreed on.
    """

    def __init__(self, ingest: IngestProtocol, window_bytes: int) -> None:
        self.ingest = ingest
        self._decoder = PayloadDecoder(window_bytes)
        self._joiner = BatchJoiner()

    def apply(self, batch: Sequence[Frame]) -> list[Frame]:
        """Decodes and ingests frames, of which all but the last are DATA or FLUSH; returns the replies.

        Batches whose FLUSHes came together become durable with one fsync, and each FLUSH gets its answer (group
        commit). Raises PitfsError.
        """
        flushes: list[transfer.Flush] = []
        for frame in batch:
            match frame:
                case WireData(section=section):
                    take = self.ingest.data if section in transfer.TRANSFER_SECTIONS else self._joiner.take
                    take(self._decoder.decode(frame))
                case transfer.Flush():
                    writes = self._joiner.finish(frame)
                    if writes is not None:
                        self.ingest.write(writes)
                    flushes.append(frame)
                case _:
                    return [*self._flush(flushes), self._answer(frame)]
        return self._flush(flushes)

    def _flush(self, flushes: Sequence[transfer.Flush]) -> list[Frame]:
        if not flushes:
            return []
        return [self.ingest.flush(flushes[-1].protected_through_ns)] * len(flushes)

    def _answer(self, frame: Frame) -> Frame:
        ingest = self.ingest
        match frame:
            case transfer.StreamMark():
                if self._joiner.is_open:
                    raise RemoteProtocolError("MARK within a batch")
                return ingest.mark(frame)
            case transfer.Begin(manifest=manifest):
                return Resume(ingest.begin(manifest))
            case transfer.Checkpoint(cursor=cursor):
                return Progress(ingest.checkpoint(cursor))
            case transfer.Park(cursor=cursor):
                return Parked(ingest.park(cursor))
            case transfer.End():
                return Committed(ingest.end(frame))
            case _:
                raise AssertionError(f"the protocol let {frame} through")
