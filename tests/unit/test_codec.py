"""The codec of the link: one stream for a connection, only where it pays, and nothing trusted on the way back."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest
from backports import zstd

from pitfs.errors import RemoteProtocolError
from pitfs.link.codec.payloads import DOUBT_BYTES, MAX_SKIP_BYTES, PayloadDecoder, PayloadEncoder
from pitfs.link.protocol.frames import Encoding, WireData, encode
from pitfs.model.transfer import MAX_PAYLOAD_BYTES, WRITE, Data, Section
from pitfs.model.window import MAX_WINDOW_BYTES, MIN_WINDOW_BYTES

MIB = 1 << 20
NOISE = random.Random(1).randbytes(MAX_PAYLOAD_BYTES)
TEXT = b"".join(b"row %d of a table that compresses well\n" % i for i in range(30_000))[:MAX_PAYLOAD_BYTES]
BLOCKS = Section.JOURNAL_BLOCKS
P = zstd.CompressionParameter


def pages(seed: int, count: int = 128) -> bytes:
    """Pages of 8 KiB: noise in hexadecimal, so each for itself shrinks to a half."""
    return random.Random(seed).randbytes(count * 4096).hex().encode()


@pytest.mark.parametrize("size", [256, 1000, 4096, 16384, 16385, 65536, MAX_PAYLOAD_BYTES])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_shrinks_is_compressed_and_comes_back(size: int, kind: type) -> None:
    wire = PayloadEncoder().encode(Data(BLOCKS, 4096, kind(TEXT[:size])))
    assert wire.encoding is Encoding.STREAM and len(wire.payload) < size * 0.9 and wire.raw_length == size
    assert PayloadDecoder().decode(wire) == Data(BLOCKS, 4096, TEXT[:size])


@pytest.mark.parametrize("payload", [b"", b"short", TEXT[:255]])
def test_what_is_too_little_goes_raw_and_uncopied(payload: bytes) -> None:
    wire = PayloadEncoder().encode(Data(BLOCKS, 0, payload))
    assert wire.encoding is Encoding.RAW and wire.payload is payload
    assert PayloadDecoder().decode(wire).payload is payload


def doubting(section: Section = BLOCKS) -> PayloadEncoder:
    """An encoder that has seen enough that doesn't shrink."""
    encoder = PayloadEncoder(MIB)
    for seed in range(DOUBT_BYTES // MIB):
        assert encoder.encode(Data(section, 0, random.Random(seed).randbytes(MIB))).encoding is Encoding.STREAM
    return encoder


@pytest.mark.parametrize("size", [256, 5000, MIB])
def test_when_much_did_not_shrink_what_does_not_goes_raw_and_uncopied(size: int) -> None:
    payload = NOISE[:size]
    wire = doubting().encode(Data(BLOCKS, 0, payload))
    assert wire.encoding is Encoding.RAW and wire.payload is payload


def test_less_than_a_tenth_saved_is_not_enough_then() -> None:
    payload = b"".join(NOISE[start : start + 1000] + bytes(60) for start in range(0, 60_000, 1000))
    assert not doubting().wants(Data(BLOCKS, 0, payload))


@pytest.mark.parametrize("size", [4096, MIB])
def test_what_shrinks_again_is_compressed_soon_and_ends_the_doubts(size: int) -> None:
    encoder = doubting()
    for _ in range(100):
        assert not encoder.wants(Data(BLOCKS, 0, NOISE[:size]))
    text = Data(BLOCKS, 0, TEXT[:size])
    choices = [encoder.encode(text).encoding is Encoding.STREAM for _ in range(2 * MAX_SKIP_BYTES // 4096)]
    first = choices.index(True)
    assert first * size <= MAX_SKIP_BYTES and all(choices[first:])
    assert encoder.wants(Data(BLOCKS, 0, NOISE))


def test_sections_are_judged_apart() -> None:
    encoder = doubting(Section.DIFF_BLOCKS)
    assert not encoder.wants(Data(Section.DIFF_BLOCKS, 0, NOISE)) and encoder.wants(Data(BLOCKS, 0, NOISE))


def test_noise_that_comes_twice_within_the_window_costs_once() -> None:
    encoder, decoder = PayloadEncoder(), PayloadDecoder()
    first, again = (encoder.encode(Data(BLOCKS, 0, NOISE)) for _ in range(2))
    assert len(first.payload) > MIB and len(again.payload) < 0.01 * MIB
    assert [decoder.decode(wire).payload for wire in (first, again)] == [NOISE] * 2


def test_what_is_in_the_stream_already_costs_next_to_nothing_again_whatever_the_section() -> None:
    encoder, decoder = PayloadEncoder(), PayloadDecoder()
    first = encoder.encode(Data(Section.WRITE_BLOCKS, 0, pages(1)))
    again = encoder.encode(Data(BLOCKS, 0, pages(1)))
    assert len(first.payload) > 0.5 * MIB and len(again.payload) < 0.01 * MIB
    assert [bytes(decoder.decode(wire).payload) for wire in (first, again)] == [pages(1)] * 2


def test_the_stream_reaches_back_as_far_as_its_window_and_no_further() -> None:
    sizes = {}
    for window_bytes in (2 * MIB, 8 * MIB):
        encoder = PayloadEncoder(window_bytes)
        wires = [encoder.encode(Data(BLOCKS, 0, pages(seed))) for seed in (1, 2, 3, 4, 1)]
        sizes[window_bytes] = len(wires[-1].payload)
        decoder = PayloadDecoder(window_bytes)
        assert [bytes(decoder.decode(wire).payload) for wire in wires][-1] == pages(1)
    assert sizes[8 * MIB] < 0.01 * MIB and sizes[2 * MIB] > 0.5 * MIB


def test_raw_payloads_between_leave_the_stream_as_it_is() -> None:
    encoder, decoder = PayloadEncoder(), PayloadDecoder()
    for payload, compress in [(TEXT, True), (NOISE, False), (TEXT, False), (pages(1), True), (TEXT, None)]:
        wire = encoder.encode(Data(BLOCKS, 0, payload), compress)
        assert wire.encoding is (Encoding.RAW if compress is False else Encoding.STREAM)
        assert decoder.decode(wire).payload == payload


def test_a_payload_that_turns_out_not_to_shrink_still_fits_into_its_frame() -> None:
    encoder, decoder = PayloadEncoder(), PayloadDecoder()
    for payload in (TEXT, NOISE, NOISE[::-1], NOISE[:1]):
        wire = encoder.encode(Data(BLOCKS, 0, payload), True)
        assert encode(wire)
        assert decoder.decode(wire).payload == payload


def test_a_connection_begins_its_stream_anew() -> None:
    wires = [
        (encoder := PayloadEncoder()).encode(Data(BLOCKS, 0, TEXT)),
        encoder.encode(Data(BLOCKS, 0, TEXT)),
    ]
    with pytest.raises(RemoteProtocolError):
        PayloadDecoder().decode(wires[1])
    again = PayloadEncoder().encode(Data(BLOCKS, 0, TEXT))
    assert again.payload == wires[0].payload
    assert PayloadDecoder().decode(again).payload == TEXT


def test_rows_go_as_columns_and_what_is_no_whole_row_goes_raw() -> None:
    rows = np.zeros(1000, WRITE)
    rows["time_ns"], rows["block"] = np.arange(1000) * 100_000 + 10**18, np.arange(1000)
    encoder, decoder = PayloadEncoder(), PayloadDecoder()
    wire = encoder.encode(Data(Section.WRITES, 7, rows.tobytes()))
    assert wire.encoding is Encoding.COLUMNS and len(wire.payload) < 100
    assert decoder.decode(wire) == Data(Section.WRITES, 7, rows.tobytes())
    for payload in (b"", rows.tobytes()[:-1]):
        assert encoder.encode(Data(Section.WRITES, 7, payload)).encoding is Encoding.RAW


def wire(payload: bytes, raw_length: int, section: Section = BLOCKS) -> WireData:
    encoding = Encoding.COLUMNS if section is Section.WRITES else Encoding.STREAM
    return WireData(section, 0, raw_length, encoding, payload)


def stream(*payloads: bytes, window_bytes: int = MIB) -> bytes:
    compressor = zstd.ZstdCompressor(options={P.window_log: window_bytes.bit_length() - 1})
    return b"".join(compressor.compress(payload, compressor.FLUSH_BLOCK) for payload in payloads)


BOMB = stream(*[bytes(1 << 26)] * 4)  # 256 MiB


@pytest.mark.parametrize(
    ("payload", "raw_length"),
    [
        (BOMB, MAX_PAYLOAD_BYTES),
        (BOMB, 0),
        (zstd.compress(bytes(1 << 26)), MAX_PAYLOAD_BYTES),
        (zstd.compress(TEXT), len(TEXT)),  # a stream never ends
        (stream(TEXT), len(TEXT) - 1),
        (stream(TEXT[:999]), 1000),
        (stream(TEXT)[:-1], len(TEXT)),
        (stream(TEXT) + b"xyz", len(TEXT)),
        (b"not zstd at all", 15),
        (b"", 100),
        (stream(TEXT, window_bytes=2 * MIB), len(TEXT)),  # a larger window than agreed on
    ],
)
def test_what_is_not_the_stream_to_the_length_said_is_refused(payload: bytes, raw_length: int) -> None:
    decoder = PayloadDecoder(MIB)
    for _ in range(2):  # also when asked again
        with pytest.raises(RemoteProtocolError, match="DATA at byte 0 of JOURNAL_BLOCKS"):
            decoder.decode(wire(payload, raw_length))


@pytest.mark.parametrize(
    ("columns", "row_count"),
    [
        (bytes(1 << 26), 2),
        (bytes(4), 2),
        (b"\1\0\0\0\0" + bytes(1), 2),
        (b"\1\0\0\0\0" + bytes(3), 2),
        (bytes(5), 0),
    ],
)
def test_columns_that_are_not_those_of_the_rows_are_refused(columns: bytes, row_count: int) -> None:
    with pytest.raises(RemoteProtocolError, match="DATA at byte 0 of WRITES"):
        PayloadDecoder().decode(wire(stream(columns), row_count * WRITE.itemsize, Section.WRITES))


def test_a_bomb_takes_no_more_memory_than_the_frame_says() -> None:
    decoder = PayloadDecoder(MIN_WINDOW_BYTES)
    tracemalloc.start()  # sees what the decoder gives out; its window is bounded by zstd
    try:
        with pytest.raises(RemoteProtocolError):
            decoder.decode(wire(BOMB, 64 << 10))
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("window_bytes", [0, -MIB, MIB - 1, MIB // 2, 3 * MIB, 2 * MAX_WINDOW_BYTES])
@pytest.mark.parametrize("side", [PayloadEncoder, PayloadDecoder])
def test_a_window_beyond_its_limits_is_refused(side: type, window_bytes: int) -> None:
    with pytest.raises(ValueError, match="power of two from 1MiB to 128MiB"):
        side(window_bytes)
