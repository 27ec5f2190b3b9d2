"""Compression of payloads: only where it pays, and nothing trusted on the way back."""

from __future__ import annotations

import random

import pytest
from backports import zstd

from pitfs.errors import RemoteProtocolError
from pitfs.link.compression import MAX_SKIP_COUNT, PayloadDecoder, PayloadEncoder
from pitfs.link.frames import Encoding, WireData
from pitfs.model.transfer import MAX_PAYLOAD_BYTES, Data, Section

NOISE = random.Random(1).randbytes(MAX_PAYLOAD_BYTES)
TEXT = b"".join(b"row %d of a table that compresses well\n" % i for i in range(30_000))[:MAX_PAYLOAD_BYTES]


def encoded(encoder: PayloadEncoder, payload: bytes, section: Section = Section.DIFF) -> WireData:
    data = Data(section, 4096, payload)
    return encoder.encode(data, encoder.wants(data))


@pytest.mark.parametrize("size", [256, 1000, 4096, 16384, 16385, 65536, MAX_PAYLOAD_BYTES])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_shrinks_is_compressed_and_comes_back(size: int, kind: type) -> None:
    wire = encoded(PayloadEncoder(), kind(TEXT[:size]))
    assert wire.encoding is Encoding.ZSTD and len(wire.payload) < size * 0.9 and wire.raw_length == size
    assert PayloadDecoder().decode(wire) == Data(Section.DIFF, 4096, TEXT[:size])


@pytest.mark.parametrize("payload", [b"", b"short", NOISE, NOISE[:5000], TEXT[:255]])
def test_what_does_not_shrink_goes_raw_and_uncopied(payload: bytes) -> None:
    wire = encoded(PayloadEncoder(), payload)
    assert wire.encoding is Encoding.RAW and wire.payload is payload
    assert PayloadDecoder().decode(wire).payload is payload


def test_less_than_a_tenth_saved_goes_raw() -> None:
    payload = NOISE[:60_000] + bytes(3000)
    assert encoded(PayloadEncoder(), payload).encoding is Encoding.RAW


def test_while_data_does_not_shrink_probes_become_rare_and_come_back_at_once_when_it_does() -> None:
    encoder = PayloadEncoder()
    noise, text = Data(Section.DIFF_BLOCKS, 0, NOISE), Data(Section.DIFF_BLOCKS, 0, TEXT)
    for _ in range(100):
        assert not encoder.wants(noise)
    wants = [encoder.wants(text) for _ in range(2 * MAX_SKIP_COUNT)]
    first = wants.index(True)
    assert first <= MAX_SKIP_COUNT and all(wants[first:])


def test_sections_are_judged_apart() -> None:
    encoder = PayloadEncoder()
    for _ in range(100):
        encoded(encoder, NOISE, Section.DIFF_BLOCKS)
    assert encoded(encoder, TEXT, Section.DIFF).encoding is Encoding.ZSTD


def wire(payload: bytes, raw_length: int) -> WireData:
    return WireData(Section.DIFF, 0, raw_length, Encoding.ZSTD, payload)


@pytest.mark.parametrize(
    ("payload", "raw_length"),
    [
        (zstd.compress(bytes(1 << 26)), MAX_PAYLOAD_BYTES),  # a bomb
        (zstd.compress(TEXT), len(TEXT) - 1),
        (zstd.compress(TEXT[:999]), 1000),
        (zstd.compress(TEXT)[:-1], len(TEXT)),
        (zstd.compress(TEXT) + b"x", len(TEXT)),
        (zstd.compress(TEXT[:500]) + zstd.compress(TEXT[500:1000]), 1000),
        (b"not zstd at all", 15),
        (b"", 0),
        (b"", 100),
    ],
)
def test_what_is_not_exactly_one_frame_of_the_length_said_is_refused(payload: bytes, raw_length: int) -> None:
    with pytest.raises(RemoteProtocolError, match="DATA at byte 0 of DIFF"):
        PayloadDecoder().decode(wire(payload, raw_length))


def test_a_window_larger_than_any_payload_is_refused_before_its_memory_is_taken() -> None:
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    stream = compressor.compress(TEXT[:1000]) + compressor.flush()  # without a size: the window counts
    with pytest.raises(RemoteProtocolError):
        PayloadDecoder().decode(wire(stream, 1000))
