"""Batches of streamed writes: cut into frames by the sender, joined again by the receiver. No I/O.

    DATA of WRITES        all rows of the batch; offset: seq of the first
    DATA of WRITE_BLOCKS  the next contents, at most MAX_PAYLOAD_BYTES; offset: bytes of contents that the connection
                          carried before. As often as needed
    FLUSH                 the batch is complete

A cut may fall within a write, even within a block. The receiver applies whole batches only, so a connection that ends
in the middle of one leaves nothing half written. Offsets and FLUSH's seq show that no frame is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pitfs.errors import RemoteProtocolError
from pitfs.model.transfer import (
    MAX_BATCH_BYTES,
    MAX_BATCH_ROWS,
    MAX_PAYLOAD_BYTES,
    WRITE,
    Data,
    Flush,
    Section,
    Writes,
)


class BatchCutter:
    """Cuts the batches of one connection into frames."""

    def __init__(self) -> None:
        self._contents_bytes = 0

    def cut(self, writes: Writes) -> Iterator[Data]:
        """The frames of a batch, without its Flush."""
        yield Data(Section.WRITES, writes.first_seq, writes.rows.tobytes())
        view = memoryview(writes.contents)
        for start in range(0, len(view), MAX_PAYLOAD_BYTES):
            part = view[start : start + MAX_PAYLOAD_BYTES]
            yield Data(Section.WRITE_BLOCKS, self._contents_bytes, part)
            self._contents_bytes += len(part)


class BatchJoiner:
    """Joins the frames of one connection to batches; holds one batch at most, within its limits."""

    def __init__(self) -> None:
        self._first_seq = 0
        self._rows = b""
        self._contents = bytearray()
        self._contents_bytes = 0  # that the connection has carried

    def take(self, data: Data) -> None:
        """Takes the next frame of a batch.

        Raises:
            RemoteProtocolError: it doesn't belong there, or the batch becomes too large.
        """
        payload = data.payload
        if data.section is Section.WRITES:
            if self._rows or len(payload) % WRITE.itemsize or not len(payload):
                raise RemoteProtocolError("WRITES within a batch, or not whole rows")
            if len(payload) > MAX_BATCH_ROWS * WRITE.itemsize:
                raise RemoteProtocolError(f"a batch of more than {MAX_BATCH_ROWS} writes")
            self._first_seq, self._rows = data.offset, bytes(payload)
            return
        if not self._rows or data.offset != self._contents_bytes:
            raise RemoteProtocolError("WRITE_BLOCKS without their WRITES, or other than the next")
        if len(self._contents) + len(payload) > MAX_BATCH_BYTES:
            raise RemoteProtocolError(f"a batch of more than {MAX_BATCH_BYTES} bytes")
        self._contents += payload
        self._contents_bytes += len(payload)

    def finish(self, flush: Flush) -> Writes | None:
        """The batch that this ends, None where it has no writes.

        Raises:
            RemoteProtocolError: it isn't the batch that came.
        """
        if not self._rows:
            return None
        rows = np.frombuffer(self._rows, WRITE)
        writes = Writes(self._first_seq, rows, self._contents, flush.digest)
        last_seq = self._first_seq + len(rows) - 1
        if flush.seq != last_seq:
            raise RemoteProtocolError(f"FLUSH names seq {flush.seq}, the batch ends with {last_seq}")
        self._rows, self._contents = b"", bytearray()
        return writes

    @property
    def is_open(self) -> bool:
        """Whether a batch has begun and not ended."""
        return bool(self._rows)
