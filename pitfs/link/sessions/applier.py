"""What a session's thread does: payloads decoded, batches put together, the ingest fed; and the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pitfs.errors import RemoteProtocolError
from pitfs.link.codec.payloads import PayloadDecoder
from pitfs.link.protocol.batches import BatchJoiner
from pitfs.link.protocol.frames import Committed, Frame, Parked, Progress, Resume, WireData
from pitfs.model.transfer import (
    TRANSFER_SECTIONS,
    Begin,
    Checkpoint,
    Data,
    Durable,
    End,
    Flush,
    Manifest,
    Park,
    ResumePoint,
    StreamMark,
    Welcome,
    Writes,
)


class IngestProtocol(Protocol):
    """What takes the transfers of one session; called from threads, one call at a time."""

    def welcome(self) -> Welcome: ...
    def begin(self, manifest: Manifest) -> ResumePoint: ...
    def data(self, frame: Data) -> None: ...
    def checkpoint(self, cursor: tuple[int, ...]) -> ResumePoint: ...
    def park(self, cursor: tuple[int, ...]) -> ResumePoint: ...
    def end(self, end: End) -> Welcome: ...
    def write(self, writes: Writes) -> None: ...
    def flush(self, protected_through_ns: int) -> Durable: ...
    def mark(self, mark: StreamMark) -> Durable: ...
    def publish(self) -> None: ...
    def close(self) -> None: ...


class Applier:
    """Feeds one session's frames to its ingest, from threads, one call at a time.

    Args:
        window_bytes: of the codec, as agreed on.
    """

    def __init__(self, ingest: IngestProtocol, window_bytes: int) -> None:
        self._ingest = ingest
        self._decoder = PayloadDecoder(window_bytes)
        self._joiner = BatchJoiner()

    def apply(self, batch: Sequence[Frame]) -> list[Frame]:
        """Decodes and ingests frames, of which all but the last are data or FLUSH; the replies. Raises PitfsError.

        FLUSHes that came together are made durable together, once, and answered each (group commit).
        """
        flushes: list[Flush] = []
        for frame in batch:
            match frame:
                case WireData(section=section):
                    take = self._ingest.data if section in TRANSFER_SECTIONS else self._joiner.take
                    take(self._decoder.decode(frame))
                case Flush():
                    writes = self._joiner.finish(frame)
                    if writes is not None:
                        self._ingest.write(writes)
                    flushes.append(frame)
                case _:
                    return [*self._flush(flushes), self._answer(frame)]
        return self._flush(flushes)

    def _flush(self, flushes: Sequence[Flush]) -> list[Frame]:
        if not flushes:
            return []
        return [self._ingest.flush(flushes[-1].protected_through_ns)] * len(flushes)

    def _answer(self, frame: Frame) -> Frame:
        ingest = self._ingest
        match frame:
            case StreamMark():
                if self._joiner.is_open:
                    raise RemoteProtocolError("MARK within a batch")
                return ingest.mark(frame)
            case Begin(manifest=manifest):
                return Resume(ingest.begin(manifest))
            case Checkpoint(cursor=cursor):
                return Progress(ingest.checkpoint(cursor))
            case Park(cursor=cursor):
                return Parked(ingest.park(cursor))
            case End():
                return Committed(ingest.end(frame))
            case _:
                raise AssertionError(f"the protocol let {frame} through")

    def publish(self) -> None:
        """Nothing has come for a while: what was streamed last is made readable all the same."""
        self._ingest.publish()

    def close(self) -> None:
        """Closes the ingest."""
        self._ingest.close()
