"""Compression of DATA payloads: zstd level 1 where it pays, raw where it doesn't. No I/O, no threads.

An object of each kind lives as long as a connection and sees its payloads in order, so that one long-distance
stream for the connection can come behind the same two methods (`Encoding` 2 is kept for it).
"""

from __future__ import annotations

import sys
from typing import Final

from pitfs.errors import RemoteProtocolError
from pitfs.link.frames import Buffer, Encoding, WireData
from pitfs.model.transfer import Data, Section

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LEVEL: Final = 1
MAX_WINDOW_LOG: Final = 20  # of what we decode: no payload is longer than 1 MiB, so no larger window helps
MIN_BYTES: Final = 256  # below, frame and call cost more than they save
SAMPLE_BYTES: Final = 4096  # a probe is SAMPLE_COUNT samples: 14 µs, against 1 to 2 ms for a whole payload
SAMPLE_COUNT: Final = 4
MAX_SKIP_COUNT: Final = 32  # payloads of a section that go raw unprobed while its data doesn't shrink

_OPTIONS: Final[dict[int, int]] = {
    zstd.CompressionParameter.compression_level: LEVEL,
    zstd.CompressionParameter.window_log: MAX_WINDOW_LOG,
}


def _pays(compressed_bytes: int, raw_bytes: int) -> bool:
    """Whether a tenth at least is saved."""
    return compressed_bytes * 10 <= raw_bytes * 9


class PayloadEncoder:
    """Decides and compresses, for one connection.

    `wants` is cheap and belongs beside the event loop; `encode` of a payload it wants takes some 1 ms for
    each MiB with the interpreter released, and belongs in a thread. Both are called in the order of sending.
    """

    def __init__(self) -> None:
        self._skip = dict.fromkeys(Section, 0)  # payloads still to go raw
        self._failures = dict.fromkeys(Section, 0)  # probes in a row that didn't pay

    def wants(self, data: Data) -> bool:
        """Probes whether compressing this payload will pay."""
        length = len(data.payload)
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
        pays = _pays(len(zstd.compress(sample, options=_OPTIONS)), len(sample))
        self._remember(data.section, pays)
        return pays

    def encode(self, data: Data, compress: bool) -> WireData:
        """Encodes a payload; `compress` is what `wants` said."""
        length = len(data.payload)
        if compress:
            payload = zstd.compress(data.payload, options=_OPTIONS)
            if _pays(len(payload), length):
                return WireData(data.section, data.offset, length, Encoding.ZSTD, payload)
            self._remember(data.section, False)
        return WireData(data.section, data.offset, length, Encoding.RAW, data.payload)

    def _remember(self, section: Section, pays: bool) -> None:
        self._failures[section] = 0 if pays else self._failures[section] + 1
        doubled = 1 << min(self._failures[section], MAX_SKIP_COUNT.bit_length())
        self._skip[section] = 0 if pays else min(MAX_SKIP_COUNT, doubled // 2)


class PayloadDecoder:
    """Decodes payloads of one connection, in the order they came."""

    def decode(self, wire: WireData) -> Data:
        """Gives the payload back; memory is bounded by `raw_length`, which the protocol has bounded.

        Raises:
            RemoteProtocolError: not zstd, or not the length that it says.
        """
        if wire.encoding is Encoding.RAW:
            return Data(wire.section, wire.offset, wire.payload)
        where = f"DATA at byte {wire.offset} of {wire.section.name}"
        decompressor = zstd.ZstdDecompressor(
            options={zstd.DecompressionParameter.window_log_max: MAX_WINDOW_LOG}
        )
        try:
            payload = decompressor.decompress(wire.payload, wire.raw_length)
        except zstd.ZstdError as error:
            raise RemoteProtocolError(f"{where}: {error}") from None
        if len(payload) != wire.raw_length or not decompressor.eof or decompressor.unused_data:
            raise RemoteProtocolError(f"{where}: doesn't decompress to the {wire.raw_length} bytes it says")
        return Data(wire.section, wire.offset, payload)
