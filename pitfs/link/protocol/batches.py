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
from pitfs.model import transfer


class BatchCutter:
    """Cuts the batches of one connection into frames."""

    def __init__(self) -> None:
        self._contents_bytes = 0

    def cut(self, writes: transfer.Writes) -> Iterator[transfer.Data]:
        """The frames of a batch, without its Flush."""
        yield transfer.Data(transfer.Section.WRITES, writes.first_seq, writes.rows.tobytes())
        view = memoryview(writes.contents)
        for start in range(0, len(view), transfer.MAX_PAYLOAD_BYTES):
            part = view[start : start + transfer.MAX_PAYLOAD_BYTES]
            yield transfer.Data(transfer.Section.WRITE_BLOCKS, self._contents_bytes, part)
            self._contents_bytes += len(part)


class BatchJoiner:
    """Joins the frames of one connection to batches; holds one batch at most, within its limits."""

    def __init__(self) -> None:
        self._first_seq = 0
        self._rows = b""
        self._contents = bytearray()
        self._contents_bytes = 0  # that the connection has carried

    def take(self, data: transfer.Data) -> None:
        """Takes the next frame of a batch.

        Raises:
            RemoteProtocolError: it doesn't belong there, or the batch becomes too large.
        """
        payload = data.payload
        if data.section is transfer.Section.WRITES:
            if self._rows or len(payload) % transfer.WRITE.itemsize or not len(payload):
                raise RemoteProtocolError("WRITES within a batch, or not whole rows")
            if len(payload) > transfer.MAX_BATCH_ROWS * transfer.WRITE.itemsize:
                raise RemoteProtocolError(f"a batch of more than {transfer.MAX_BATCH_ROWS} writes")
            self._first_seq, self._rows = data.offset, bytes(payload)
            return
        if not self._rows or data.offset != self._contents_bytes:
            raise RemoteProtocolError("WRITE_BLOCKS without their WRITES, or other than the next")
        if len(self._contents) + len(payload) > transfer.MAX_BATCH_BYTES:
            raise RemoteProtocolError(f"a batch of more than {transfer.MAX_BATCH_BYTES} bytes")
        self._contents += payload
        self._contents_bytes += len(payload)

    def finish(self, flush: transfer.Flush) -> transfer.Writes | None:
        """The batch that this ends, None where it has no writes.

        Raises:
            RemoteProtocolError: it isn't the batch that came.
        """
        if not self._rows:
            return None
        rows = np.frombuffer(self._rows, transfer.WRITE)
        writes = transfer.Writes(self._first_seq, rows, self._contents, flush.digest)
        last_seq = self._first_seq + len(rows) - 1
        if flush.seq != last_seq:
            raise RemoteProtocolError(f"FLUSH names seq {flush.seq}, the batch ends with {last_seq}")
        self._rows, self._contents = b"", bytearray()
        return writes

    @property
    def is_open(self) -> bool:
        """Whether a batch has begun and not ended."""
        return bool(self._rows)
