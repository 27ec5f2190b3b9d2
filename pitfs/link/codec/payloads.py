"""The codec of the link: payloads through one zstd stream per connection. No I/O, no threads.

From sender to receiver goes one zstd frame (RFC 8878) of unknown length, which begins with the connection and never
ends. Each compressed payload is flushed to the end of a block, so that it decodes as soon as it arrives. It may refer
to all that went before, as far back as the window: contents of all sections in the order of sending. That reach
(long-distance matching) saves the most: a database writes a page several times, megabytes apart.

    Encoding.RAW      the payload; the stream doesn't notice it
    Encoding.STREAM   the payload, as the next blocks of the stream
    Encoding.COLUMNS  rows: their columns (see columns.py), as the next blocks of the stream

A new connection begins a new stream on both sides. With a window of 32 MiB the encoder takes 35 MiB of memory and the
decoder 33, once that much has gone through.
"""

from __future__ import annotations

import sys
from typing import Final

from pitfs.errors import RemoteProtocolError
from pitfs.link.codec.columns import ColumnDecoder, ColumnEncoder, max_columns_bytes
from pitfs.link.protocol.frames import Buffer, Encoding, WireData
from pitfs.model.transfer import ROWS, Data, Section
from pitfs.model.window import DEFAULT_WINDOW_BYTES, check_window

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
DOUBT_BYTES: Final = 4 << 20  # of a section's contents in a row that didn't shrink: then each payload is probed
SAMPLE_BYTES: Final = 2048  # a probe is SAMPLE_COUNT samples: 30 µs, against 2 to 3 ms for a whole payload
SAMPLE_COUNT: Final = 8
MAX_SKIP_BYTES: Final = 256 << 10  # of a section that go raw without a probe after one that didn't shrink


def _pays(compressed_bytes: int, raw_bytes: int) -> bool:
    """Whether a tenth at least is saved."""
    return compressed_bytes * 10 <= raw_bytes * 9


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
        self._doubted = dict.fromkeys(Section, 0)  # bytes in a row that didn't shrink, or aren't compressed yet
        self._skip = dict.fromkeys(Section, 0)  # bytes that still go raw without a probe

    def wants(self, data: Data) -> bool:
        """Whether to compress this payload.

        Rows always. Contents until DOUBT_BYTES in a row didn't shrink; then only those whose probe shrinks, since
        contents that don't shrink by themselves may still come again within the window. Not each payload is probed:
        that cost more than compressing everything.
        """
        length, section = len(data.payload), data.section
        if section in ROWS:
            return length > 0 and length % ROWS[section].itemsize == 0
        if length < MIN_BYTES:
            return False
        if self._doubted[section] >= DOUBT_BYTES:
            if length <= self._skip[section]:
                self._skip[section] -= length
                return False
            if not self._probe(data.payload):
                self._skip[section] = MAX_SKIP_BYTES
                return False
        self._doubted[section] += length
        return True

    def _probe(self, payload: Buffer) -> bool:
        """Whether samples of this payload shrink."""
        sample = payload
        if len(payload) > SAMPLE_BYTES * SAMPLE_COUNT:
            step = (len(payload) - SAMPLE_BYTES) // (SAMPLE_COUNT - 1)
            view = memoryview(payload)
            starts = range(0, step * SAMPLE_COUNT, step)
            sample = b"".join([view[start : start + SAMPLE_BYTES] for start in starts])
        return _pays(len(zstd.compress(sample, LEVEL)), len(sample))

    def encode(self, data: Data, compress: bool | None = None) -> WireData:
        """Encodes a payload; `compress` is what `wants` said, which is asked here if it is None.

        A compressed payload may be longer by some bytes; it is in the stream then and must be sent all the same.
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
        if _pays(len(payload), length):
            self._doubted[data.section] = 0
        return WireData(data.section, data.offset, length, encoding, payload)


class PayloadDecoder:
    """Decodes payloads of one connection, in the order in which they came; it can't be used after an error."""

    def __init__(self, window_bytes: int = DEFAULT_WINDOW_BYTES) -> None:
        check_window(window_bytes)
        self._columns = ColumnDecoder()
        self._stream = zstd.ZstdDecompressor(
            options={zstd.DecompressionParameter.window_log_max: window_bytes.bit_length() - 1}
        )

    def decode(self, wire: WireData) -> Data:
        """Gives the payload back; the window and `raw_length`, which the protocol has checked, bound the memory.

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
