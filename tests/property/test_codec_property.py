"""The codec for any sequence of payloads, and for anything that a peer might send in their place."""

from __future__ import annotations

import random

import numpy as np
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from pitfs.errors import RemoteProtocolError
from pitfs.link.codec.columns import ColumnDecoder, ColumnEncoder, max_columns_bytes
from pitfs.link.codec.payloads import PayloadDecoder, PayloadEncoder
from pitfs.link.protocol.frames import Encoding, WireData, decode, encode
from pitfs.model.transfer import MAX_PAYLOAD_BYTES, ROWS, Data, Section

FUZZ_ROUNDS = 3000
WINDOWS = st.sampled_from([1 << 20, 1 << 23, 1 << 25])
NUMBERS = st.one_of(st.integers(0, 3), st.integers(0, 1 << 20), st.integers(0, (1 << 64) - 1))


@st.composite
def rows_of(draw: st.DrawFn, section: Section) -> bytes:
    """Rows whose columns are zero, constant, even steps with some noise, or numbers of any kind."""
    row = ROWS[section]
    count = draw(st.integers(1, 60))
    rows = np.zeros(count, row)
    for name in row.names or ():
        bits = 8 * row[name].itemsize
        match draw(st.integers(0, 3)):
            case 0:
                values = [0] * count
            case 1:
                values = [draw(NUMBERS)] * count
            case 2:
                start, step, noise = draw(NUMBERS), draw(NUMBERS), draw(st.integers(0, 1000))
                values = [start + index * step + (noise * index) % 7 for index in range(count)]
            case _:
                values = draw(st.lists(NUMBERS, min_size=count, max_size=count))
        unsigned = np.array([value % (1 << bits) for value in values], f"<u{bits // 8}")
        rows[name] = unsigned.view(row[name])
    return rows.tobytes()


CONTENTS = st.one_of(
    st.binary(max_size=2000),
    st.builds(lambda part, count: part * count, st.binary(min_size=1, max_size=50), st.integers(1, 5000)),
    st.builds(
        lambda seed, size: random.Random(seed).randbytes(size), st.integers(0, 3), st.integers(0, 100_000)
    ),
)


def data_of(section: Section) -> st.SearchStrategy[Data]:
    payloads = st.one_of(rows_of(section), st.binary(max_size=100)) if section in ROWS else CONTENTS
    return st.builds(Data, st.just(section), st.integers(0, 1 << 40), payloads)


DATA = st.sampled_from(Section).flatmap(data_of)


@settings(max_examples=150)
@given(
    frames=st.lists(st.tuples(DATA, st.sampled_from([None, False, "whatever it says"])), max_size=12),
    window=WINDOWS,
)
def test_payloads_come_back_through_encoder_frame_and_decoder(
    frames: list[tuple[Data, bool | str | None]], window: int
) -> None:
    encoder, decoder = PayloadEncoder(window), PayloadDecoder(window)
    for data, compress in frames:
        forced = isinstance(compress, str) and (data.section not in ROWS or encoder.wants(data))
        wire = encoder.encode(data, True if forced else (None if isinstance(compress, str) else compress))
        read = decode(bytearray(b"".join(encode(wire))))
        assert isinstance(read, WireData)
        assert decoder.decode(read) == data


@given(
    payloads=st.sampled_from(list(ROWS)).flatmap(
        lambda section: st.tuples(st.just(section), rows_of(section))
    )
)
def test_columns_are_the_inverse_of_rows_and_bounded(payloads: tuple[Section, bytes]) -> None:
    section, rows = payloads
    columns = ColumnEncoder().encode(section, rows)
    assert len(columns) <= max_columns_bytes(section, len(rows))
    assert ColumnDecoder().decode(section, columns, len(rows)) == rows


@given(section=st.sampled_from(list(ROWS)), columns=st.binary(max_size=200), count=st.integers(0, 40))
def test_any_bytes_as_columns_become_rows_of_that_number_or_a_value_error(
    section: Section, columns: bytes, count: int
) -> None:
    raw_length = count * ROWS[section].itemsize
    try:
        rows = ColumnDecoder().decode(section, columns, raw_length)
    except ValueError:
        return
    assert len(rows) == raw_length > 0


def conversation(draw: random.Random) -> list[WireData]:
    """Payloads of every section as they are on the wire."""
    encoder, wires = PayloadEncoder(1 << 20), []
    text = b"a block of a table, not unlike the others\n" * 100
    for number in range(12):
        section = draw.choice(list(Section))
        payload = text + draw.randbytes(100) + text[number:]
        if section in ROWS:
            rows = np.zeros(50, ROWS[section])
            for name in (rows.dtype.names or ())[:2]:
                rows[name] = np.arange(50) * draw.randrange(1000) + draw.randrange(1 << 40)
            payload = rows.tobytes()
        wires.append(encoder.encode(Data(section, 0, payload), True))
    return wires


def test_mutated_streams_raise_nothing_but_remote_protocol_error_and_keep_their_bounds() -> None:
    """Bytes changed, cut out and put in; lengths, sections and encodings changed; payloads left out or doubled."""
    draw = random.Random(20261124)
    outcomes = {"refused": 0, "accepted": 0}
    wires = conversation(draw)
    for _ in range(FUZZ_ROUNDS):
        decoder, mutated = PayloadDecoder(1 << 20), list(wires)
        place = draw.randrange(len(mutated))
        mutated[place : place + 1] = mutate(mutated[place], draw)
        try:
            for wire in mutated:
                assert len(decoder.decode(wire).payload) == wire.raw_length
        except RemoteProtocolError:
            outcomes["refused"] += 1
        else:
            outcomes["accepted"] += 1
    assert outcomes["refused"] > FUZZ_ROUNDS // 2 and outcomes["accepted"] > 0


def mutate(wire: WireData, draw: random.Random) -> list[WireData]:
    payload = bytearray(wire.payload)
    place = draw.randrange(len(payload))
    match draw.randrange(7):
        case 0:
            payload[place] ^= 1 << draw.randrange(8)
        case 1:
            del payload[place : place + draw.randint(1, 40)]
        case 2:
            payload[place:place] = draw.randbytes(draw.randint(1, 20))
        case 3:
            return [wire._replace(raw_length=draw.choice([0, wire.raw_length + 1, MAX_PAYLOAD_BYTES]))]
        case 4:
            section = draw.choice(list(ROWS))
            encoding = draw.choice([Encoding.STREAM, Encoding.COLUMNS])
            return [wire._replace(section=section, encoding=encoding)]
        case 5:
            return []
        case _:
            return [wire, wire]
    return [wire._replace(payload=bytes(payload))]


@pytest.mark.parametrize("section", Section)
@settings(max_examples=60)
@given(garbage=st.binary(max_size=300), raw_length=st.integers(0, MAX_PAYLOAD_BYTES), begun=st.booleans())
def test_garbage_raises_only_remote_protocol_error(
    section: Section, garbage: bytes, raw_length: int, begun: bool
) -> None:
    decoder = PayloadDecoder(1 << 20)
    if begun:
        decoder.decode(PayloadEncoder(1 << 20).encode(Data(Section.DIFF_BLOCKS, 0, b"abc" * 1000), True))
    encoding = Encoding.COLUMNS if section in ROWS else Encoding.STREAM
    try:
        data = decoder.decode(WireData(section, 0, raw_length, encoding, garbage))
    except RemoteProtocolError:
        return
    assert len(data.payload) == raw_length


@given(lengths=st.lists(st.integers(0, 1 << 18), min_size=1, max_size=8), raw_length=st.integers(0, 1 << 16))
def test_a_stream_that_grows_is_never_decoded_beyond_what_the_frame_says(
    lengths: list[int], raw_length: int
) -> None:
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 20})
    decoder = PayloadDecoder(1 << 20)
    try:
        for length in lengths:
            payload = compressor.compress(bytes(length), compressor.FLUSH_BLOCK)
            wire = WireData(Section.WRITE_BLOCKS, 0, raw_length, Encoding.STREAM, payload)
            assert len(decoder.decode(wire).payload) == raw_length == length
    except RemoteProtocolError:
        return
