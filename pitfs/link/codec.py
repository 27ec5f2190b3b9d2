"""The codec of the link: payloads through one zstd stream per connection. No I/O, no threads.

From sender to receiver goes one zstd frame (RFC 8878) of unknown length, which begins with the connection and never
ends. Each payload that is compressed is flushed to the end of a block, so it decodes as soon as it is there, and
refers to what went before, as far back as the window: contents of all sections in the order of sending. It is that
reach that pays (long-distance matching): a database writes a page several times, megabytes apart.

    Encoding.RAW      the payload; the stream doesn't notice it
    Encoding.STREAM   the payload, as the next blocks of the stream
    Encoding.COLUMNS  rows: their columns (see columns.py), as the next blocks of the stream

A new connection begins a new stream on both sides. Each holds its window: for one of 32 MiB the encoder 35 MiB, the
decoder 33; memory comes as data go through.
"""

from __future__ import annotations

import sys
from typing import Final

from pitfs.errors import RemoteProtocolError
from pitfs.link.columns import ROWS, ColumnDecoder, ColumnEncoder, max_columns_bytes
from pitfs.link.frames import Buffer, Encoding, WireData
from pitfs.link.window import DEFAULT_WINDOW_BYTES, check_window
from pitfs.model.transfer import Data, Section

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# Measured on pages of a database rewritten at other places, and on trees of files: finer entries of the
# long-distance table cost up to half of the speed for 1 % of the size, larger hash tables a tenth for 3 %.
LEVEL: Final = 1
LDM_HASH_RATE_LOG: Final = 7  # an entry for each 128 bytes
LDM_MIN_MATCH: Final = 64
LDM_BUCKET_SIZE_LOG: Final = 1
MIN_BYTES: Final = 256  # of contents; below, frame and call cost more than they save
SAMPLE_BYTES: Final = 4096  # a probe is SAMPLE_COUNT samples: 14 µs, against 2 to 3 ms for a whole payload
SAMPLE_COUNT: Final = 4
MAX_SKIP_COUNT: Final = 32  # payloads of a section that go raw unprobed while its data doesn't shrink


class PayloadEncoder:
    """Decides and compresses, for one connection.

    `wants` is cheap and belongs beside the event loop; `encode` of a payload it wants takes some 3 ms for
    each MiB with the interpreter released, and belongs in a thread. Both are called in the order of sending,
    and every result of `encode` must be sent, in that order.
    """

    def __init__(self, window_bytes: int = DEFAULT_WINDOW_BYTES) -> None:
        check_window(window_bytes)
        self._columns = ColumnEncoder()
        self._stream = zstd.ZstdCompressor(
            options={
                zstd.CompressionParameter.compression_level: LEVEL,
                zstd.CompressionParameter.window_log: window_bytes.bit_length() - 1,
                zstd.CompressionParameter.enable_long_distance_matching: 1,
                zstd.CompressionParameter.ldm_hash_rate_log: LDM_HASH_RATE_LOG,
                zstd.CompressionParameter.ldm_min_match: LDM_MIN_MATCH,
                zstd.CompressionParameter.ldm_bucket_size_log: LDM_BUCKET_SIZE_LOG,
            }
        )
        self._skip = dict.fromkeys(Section, 0)  # payloads still to go raw
        self._failures = dict.fromkeys(Section, 0)  # probes in a row that didn't pay

    def wants(self, data: Data) -> bool:
        """Whether compressing this payload will pay: probes contents, knows of rows."""
        length = len(data.payload)
        row = ROWS.get(data.section)
        if row is not None:
            return length > 0 and length % row.itemsize == 0
        if length < MIN_BYTES:
            return False
        if self._skip[data.section]:
            self._skip[data.section] -= 1
            return False
        sample: Buffer = data.payload
        if length > SAMPLE_BYTES * SAMPLE_COUNT:
            step = (length - SAMPLE_BYTES) // (SAMPLE_COUNT - 1)
            view = memoryview(data.payload)
            starts = range(0, step * SAMPLE_COUNT, step)
            sample = b"".join([view[start : start + SAMPLE_BYTES] for start in starts])
        pays = len(zstd.compress(sample, LEVEL)) * 10 <= len(sample) * 9  # a tenth at least is saved
        self._remember(data.section, pays)
        return pays

    def encode(self, data: Data, compress: bool | None = None) -> WireData:
        """Encodes a payload; `compress` is what `wants` said, which is asked here if it is None.

        What is compressed may come out longer by some bytes; it is in the stream then and goes as it is.
        """
        length = len(data.payload)
        if compress is None:
            compress = self.wants(data)
        if not compress:
            return WireData(data.section, data.offset, length, Encoding.RAW, data.payload)
        encoding, source = Encoding.STREAM, data.payload
        if data.section in ROWS:
            encoding, source = Encoding.COLUMNS, self._columns.encode(data.section, data.payload)
        payload = self._stream.compress(source, zstd.ZstdCompressor.FLUSH_BLOCK)
        return WireData(data.section, data.offset, length, encoding, payload)

    def _remember(self, section: Section, pays: bool) -> None:
        self._failures[section] = 0 if pays else self._failures[section] + 1
        doubled = 1 << min(self._failures[section], MAX_SKIP_COUNT.bit_length())
        self._skip[section] = 0 if pays else min(MAX_SKIP_COUNT, doubled // 2)


class PayloadDecoder:
    """Decodes payloads of one connection, in the order they came; after an error it is of no more use."""

    def __init__(self, window_bytes: int = DEFAULT_WINDOW_BYTES) -> None:
        check_window(window_bytes)
        self._columns = ColumnDecoder()
        self._stream = zstd.ZstdDecompressor(
            options={zstd.DecompressionParameter.window_log_max: window_bytes.bit_length() - 1}
        )

    def decode(self, wire: WireData) -> Data:
        """Gives the payload back; memory is bounded by the window and `raw_length`, which the protocol has bounded.

        Raises:
            RemoteProtocolError: not the stream, a larger window than agreed on, or not the length that it says.
        """
        if wire.encoding is Encoding.RAW:
            return Data(wire.section, wire.offset, wire.payload)
        where = f"DATA at byte {wire.offset} of {wire.section.name}"
        is_rows = wire.encoding is Encoding.COLUMNS
        limit = max_columns_bytes(wire.section, wire.raw_length) if is_rows else wire.raw_length
        try:
            payload = self._stream.decompress(wire.payload, limit + 1)
            if self._stream.eof:
                raise ValueError("the stream ends")
            if len(payload) > limit:
                raise ValueError(f"decompresses to more than {limit} bytes")
            if is_rows:
                payload = self._columns.decode(wire.section, payload, wire.raw_length)
            elif len(payload) < wire.raw_length:
                raise ValueError(f"decompresses to {len(payload)} of the {wire.raw_length} bytes it says")
        except (zstd.ZstdError, EOFError, ValueError) as error:
            raise RemoteProtocolError(f"{where}: {error}") from None
        return Data(wire.section, wire.offset, payload)
