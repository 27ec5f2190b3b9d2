"""Limits on the values that control frames carry, checked on both sides of the wire. No I/O.

msgspec checks the types; here are ranges, lengths and the grammar of names: what the replica makes paths and
tables from. Every check raises ValueError with one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from pitfs.link.protocol.window import check_window
from pitfs.model.group import NAME_RULE, identity_problem, is_name
from pitfs.model.transfer import (
    Begin,
    Bookmark,
    Checkpoint,
    End,
    Flush,
    Gap,
    Hello,
    Manifest,
    Park,
    ResumePoint,
    StreamMark,
    Welcome,
)

MAX_NUMBER: Final = (1 << 63) - 1  # the store's catalog and numpy columns are int64
MAX_VERSIONS: Final = 64
MAX_BOOKMARKS: Final = 4096  # for each transfer; with gaps they fit into BEGIN's limit of 4 MiB
MAX_GAPS: Final = 512
MAX_CURSOR: Final = 64
MAX_COARSE: Final = 1024
MAX_TEXT_LENGTH: Final = 1000  # causes, identities
MAX_MESSAGE_LENGTH: Final = 4000

_CODE: Final = re.compile(r"[a-z-]{1,32}")


def check(frame: object) -> None:
    """Checks the values of a control frame.

    Raises:
        ValueError: something is out of its limits; says what.
    """
    match frame:
        case Begin(manifest=manifest):
            _check_manifest(manifest)
        case Checkpoint(cursor=cursor) | Park(cursor=cursor):
            _check_cursor(cursor)
        case End(lengths=lengths, checksums=checksums):
            _check_numbers("lengths", lengths)
            if any(not 0 <= each < 1 << 64 for each in checksums or ()):
                raise ValueError("checksums that aren't 64 bits")
        case Flush(seq=seq, digest=digest, protected_through_ns=time_ns):
            _check_numbers("flush", (seq, time_ns))
            if not 0 <= digest < 1 << 64:
                raise ValueError("digest that isn't 64 bits")
        case StreamMark(bookmark=bookmark):
            _check_numbers("mark", (frame.mark - 1, frame.seq, frame.time_ns, frame.protected_through_ns))
            if bookmark is not None:
                _check_bookmark(Bookmark(bookmark, frame.seq, frame.time_ns))
        case _:
            _check_parts(frame)


def _check_parts(frame: object) -> None:
    """Checks the fields of the frames that `frames` defines, by what they are."""
    for name in getattr(frame, "__struct_fields__", ()):
        value = getattr(frame, name)
        match value:
            case Hello():
                _check_hello(value)
            case Welcome():
                numbers = value.mark, value.seq, value.time_ns, value.protected_through_ns
                _check_numbers("welcome", (*numbers, value.tail_seq, value.tail_time_ns))
                if len(value.coarse) > MAX_COARSE:
                    raise ValueError(f"{len(value.coarse)} intervals, limit {MAX_COARSE}")
                for each in value.coarse:
                    positions = each.from_seq, each.from_time_ns, each.to_seq, each.to_time_ns
                    _check_numbers("interval", (*positions, each.granularity_ns or 0, each.journal_bytes))
            case ResumePoint():
                _check_numbers("lengths", value.lengths)
                _check_cursor(value.cursor)
            case tuple():
                if not 1 <= len(value) <= MAX_VERSIONS:
                    raise ValueError(f"{len(value)} {name}, limit {MAX_VERSIONS}")
                _check_numbers(name, value)
            case bool() | None:
                pass
            case int() if name == "window_bytes":
                check_window(value)
            case int():
                _check_numbers(name, (value,))
            case str() if name == "code":
                if not _CODE.fullmatch(value):
                    raise ValueError(f"code {value[:40]!r}")
            case str():
                _check_text(name, value, MAX_MESSAGE_LENGTH)


def _check_hello(hello: Hello) -> None:
    if problem := identity_problem(hello.group, hello.history, hello.volumes):
        raise ValueError(problem)
    _check_numbers("epoch", (hello.epoch, hello.instance))


def _check_manifest(manifest: Manifest) -> None:
    _check_numbers("mark", (manifest.mark - 1,))
    _check_numbers("seq", (manifest.from_seq, manifest.to_seq))
    times = (manifest.from_time_ns, manifest.to_time_ns, manifest.protected_through_ns)
    optional = (
        manifest.first_time_ns, manifest.granularity_ns, manifest.base_granularity_ns, manifest.diff_count
    )  # fmt: skip
    _check_numbers("time", times)
    _check_numbers("number", tuple(value for value in optional if value is not None))
    _check_numbers("number of rows", (manifest.journal_count, manifest.position_count, manifest.base_bytes))
    if manifest.to_seq < manifest.from_seq or manifest.to_time_ns < manifest.from_time_ns:
        raise ValueError("manifest goes back")
    _check_text("cause", manifest.cause, MAX_TEXT_LENGTH)
    _check_text("identity", manifest.identity, MAX_TEXT_LENGTH)
    if len(manifest.bookmarks) > MAX_BOOKMARKS or len(manifest.gaps) > MAX_GAPS:
        raise ValueError(
            f"{len(manifest.bookmarks)} bookmarks and {len(manifest.gaps)} gaps,"
            f" limits {MAX_BOOKMARKS} and {MAX_GAPS}"
        )
    for bookmark in manifest.bookmarks:
        _check_bookmark(bookmark)
    for gap in manifest.gaps:
        _check_gap(gap)


def _check_bookmark(bookmark: Bookmark) -> None:
    if not is_name(bookmark.name):
        raise ValueError(f"bookmark {bookmark.name[:40]!r}: must be {NAME_RULE}")
    _check_numbers("bookmark", (bookmark.seq, bookmark.time_ns))


def _check_gap(gap: Gap) -> None:
    _check_numbers("gap", (gap.from_seq, gap.from_time_ns, gap.to_seq, gap.to_time_ns))
    _check_text("cause", gap.cause, MAX_TEXT_LENGTH)


def _check_cursor(cursor: tuple[int, ...]) -> None:
    if len(cursor) > MAX_CURSOR:
        raise ValueError(f"cursor of {len(cursor)} numbers, limit {MAX_CURSOR}")
    _check_numbers("cursor", cursor)


def _check_numbers(what: str, values: Iterable[int]) -> None:
    for value in values:
        if not 0 <= value <= MAX_NUMBER:
            raise ValueError(f"{what} {value} is out of range")


def _check_text(what: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise ValueError(f"{what} of {len(text)} characters, limit {limit}")
