"""Rows of a section as columns, in which little changes from row to row. Pure; format, encoder and decoder.

A payload of n rows (DIFF, POSITIONS, JOURNAL or WRITES; see model/transfer.py) becomes

    descriptor  u8 for each field of the row, in its order
    column      of each field whose width isn't 0, in its order

    descriptor  bits 0 … 3  width: bytes of each value, 0 … 8; 0: all are zero, nothing follows
                bit 4       DELTA: a value is the difference to the row before, modulo 2^64, zigzag
                bit 5       NEXT, with DELTA: a value is the difference to one more than the row before
                bit 6       SPARSE: the column begins with a mask, and only values that aren't zero follow
                bit 7       HOLES, alone: it begins with a mask of the rows that aren't zero, and of these alone
                            follow the differences, each to the one before it, the first to zero, modulo 2^64, zigzag
    column      mask (SPARSE, HOLES): a bit for each row, lowest first, ceil(n / 8) bytes, spare bits zero
                planes: the lowest byte of all values, then the next one of all, … `width` times

All is little-endian. The row before the first is the last one of the section that came as columns on this connection
(zeros at its beginning): so a batch of one write carries the difference of its time, not the time.

Why: blocks and times mostly grow by little, so their differences have few bytes that aren't zero, and equal bytes of
all rows stand side by side, where zstd finds what they have in common. A difference may be negative. Modulo 2^64 that
would be a number with all high bytes set, so zigzag moves the sign into the lowest bit: 0, -1, 1, -2, 2 … become
0, 1, 2, 3, 4 … Sequential writes differ by exactly one: NEXT makes these zeros, which SPARSE leaves out. HOLES is for
the places of shared contents: most rows have none, and those that have one ascend.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from pitfs.link.protocol.frames import Buffer
from pitfs.model.transfer import ROWS, Section

WIDTH_MASK: Final = 0x0F
DELTA: Final = 0x10
NEXT: Final = 0x20
SPARSE: Final = 0x40
HOLES: Final = 0x80
_FORMS: Final = frozenset({0, SPARSE, DELTA, DELTA | SPARSE, DELTA | NEXT, DELTA | NEXT | SPARSE, HOLES})
VALUE: Final = np.dtype("<u8")
_NAMES: Final = {section: tuple(row.names or ()) for section, row in ROWS.items()}
SAMPLE_ROWS: Final = 2048  # that decide whether differences are shorter than the values

Values = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]


class ColumnEncoder:
    """Turns row payloads of one connection into columns, in the order of sending."""

    def __init__(self) -> None:
        self._before = _no_rows()

    def encode(self, section: Section, payload: Buffer) -> bytes:
        """Gives the columns of n > 0 whole rows: at most `max_columns_bytes`."""
        rows = np.frombuffer(payload, ROWS[section])
        before = self._before[section]
        descriptors, pieces = bytearray(), list[bytes]()
        for index, name in enumerate(_NAMES[section]):
            values = rows[name].astype(VALUE)  # of the signed ones the bits
            descriptor, column = _encode_column(values, before[index])
            before[index] = values[-1]
            descriptors.append(descriptor)
            pieces += column
        return b"".join([descriptors, *pieces])


class ColumnDecoder:
    """The inverse of ColumnEncoder, for payloads in the order in which they came."""

    def __init__(self) -> None:
        self._before = _no_rows()

    def decode(self, section: Section, columns: bytes, raw_length: int) -> bytes:
        """Gives the rows back: `raw_length` bytes, which the caller has bounded.

        Raises:
            ValueError: it isn't the columns of that many rows.
        """
        row, names = ROWS[section], _NAMES[section]
        count, rest = divmod(raw_length, row.itemsize)
        if rest or not count:
            raise ValueError(f"{raw_length} bytes aren't rows of {row.itemsize}")
        if len(columns) < len(names):
            raise ValueError(f"columns of {len(columns)} bytes, {len(names)} fields")
        rows = np.zeros(count, row)
        before = self._before[section]
        rest_of_columns = np.frombuffer(columns, np.uint8)[len(names) :]
        for index, name in enumerate(names):
            values, rest_of_columns = _decode_column(columns[index], rest_of_columns, count, before[index])
            size = row[name].itemsize
            if size < VALUE.itemsize and int(values.max()) >> 8 * size:
                raise ValueError(f"{name} {int(values.max())} has more than {size} bytes")
            before[index] = values[-1]
            rows[name] = values.view(row[name]) if size == VALUE.itemsize else values
        if len(rest_of_columns):
            raise ValueError(f"{len(rest_of_columns)} bytes behind the last column")
        return rows.tobytes()


def max_columns_bytes(section: Section, raw_length: int) -> int:
    """The most bytes that `raw_length` bytes of rows may take as columns."""
    return raw_length + len(_NAMES[section])


def _no_rows() -> dict[Section, Values]:
    return {section: np.zeros(len(names), VALUE) for section, names in _NAMES.items()}


def _encode_column(values: Values, before: np.uint64) -> tuple[int, list[bytes]]:
    """Gives the descriptor and the column in the form whose values have the fewest bits, estimated from a sample."""
    mask = values != 0
    kept = np.count_nonzero(mask)
    if not kept:
        return 0, []
    deltas = np.diff(values, prepend=before)
    forms = {0: values, DELTA: _zigzag(deltas), DELTA | NEXT: _zigzag(deltas - np.uint64(1))}
    if 2 * kept <= len(values):
        forms[HOLES] = _zigzag(np.diff(values[mask], prepend=np.uint64(0)))
    step = -(-len(values) // SAMPLE_ROWS)
    descriptor = min(forms, key=lambda form: _bits(forms[form][::step]))
    values = forms[descriptor]
    width = -(-int(values.max()).bit_length() // 8)
    if not width:
        return descriptor, []
    pieces = []
    if descriptor != HOLES:
        mask = values != 0
        # The mask pays where it takes zeros out of more than one plane.
        if width > 1 and 2 * np.count_nonzero(mask) <= len(values):
            descriptor, values = descriptor | SPARSE, values[mask]
    if descriptor & (SPARSE | HOLES):
        pieces.append(np.packbits(mask, bitorder="little").tobytes())
    planes = values.view(np.uint8).reshape(-1, VALUE.itemsize)[:, :width]
    pieces.append(planes.T.tobytes())
    return descriptor | width, pieces


def _zigzag(values: Values) -> Values:
    """Of differences d modulo 2^64: 2d, or -2d - 1 where d is negative."""
    return (values << np.uint64(1)) ^ -(values >> np.uint64(63))


def _bits(values: Values) -> int:
    """The bits of all values, each as long as it needs to be."""
    return int(np.frexp(values.astype(np.float64))[1].sum())


def _unzigzag(values: Values) -> Values:
    return (values >> np.uint64(1)) ^ -(values & np.uint64(1))


def _decode_column(descriptor: int, data: Bytes, count: int, before: np.uint64) -> tuple[Values, Bytes]:
    """Gives the values and the bytes behind the column."""
    width, form = descriptor & WIDTH_MASK, descriptor & ~WIDTH_MASK
    if width > VALUE.itemsize or form not in _FORMS or (not width and form & (SPARSE | HOLES)):
        raise ValueError(f"descriptor {descriptor:#x}")
    places: npt.NDArray[np.bool_] | slice = slice(None)
    kept = count
    if form & (SPARSE | HOLES):
        mask, data = _split(data, -(-count // 8))
        bits = np.unpackbits(mask, bitorder="little").astype(np.bool_)
        if bits[count:].any():
            raise ValueError("a mask with more rows than there are")
        places = bits[:count]
        kept = int(np.count_nonzero(places))
    planes, data = _split(data, kept * width)
    matrix = np.zeros((kept, VALUE.itemsize), np.uint8)
    matrix[:, :width] = planes.reshape(width, kept).T
    found = matrix.view(VALUE).reshape(-1)
    if form == HOLES:
        found = np.cumsum(_unzigzag(found), dtype=VALUE)
    values = np.zeros(count, VALUE)
    values[places] = found
    if form & DELTA:
        values = _unzigzag(values)
        if form & NEXT:
            values += np.uint64(1)
        values = np.cumsum(values, dtype=VALUE)
        values += before
    return values, data


def _split(data: Bytes, length: int) -> tuple[Bytes, Bytes]:
    if len(data) < length:
        raise ValueError(f"{length} bytes of a column, {len(data)} are there")
    return data[:length], data[length:]
