"""Everything a user may type for a time, form by form."""

from __future__ import annotations

import datetime
import zoneinfo

import pytest

from pitfs.model.position import (
    MAX_SEQ,
    AtSeq,
    AtTime,
    NotATimeError,
    Position,
    format_instant,
    meant_time,
    parse_instant,
    parse_time,
    reads_as_time,
)

NOW_NS = 1_800_000_000_123_456_789
SAME = 1_763_855_640  # 2025-11-22T23:54:00Z


def seconds(text: str, zone: datetime.tzinfo = datetime.UTC) -> float:
    found = parse_time(text, now_ns=NOW_NS, zone=zone)
    assert isinstance(found, AtTime)
    return found.time_ns / 1e9


@pytest.mark.parametrize(
    "text",
    [
        "2025-11-22T23:54:00Z",
        "2025-11-22T23-54-00Z",
        "2025-11-22T23:54:00",
        "2025-11-22T23:54Z",
        "2025-11-22 23:54",
        "2025-11-22t23:54z",
        "2025-11-22_23-54",
        "20251122T235400Z",
        "20251122T2354",
        "20251122T23:54",
        "2025-11-22T235400",
        "2025-11-22T23:54:00.000000000Z",
        "2025-11-22T23:54:00,0Z",
        "2025-11-22T23-54-00.000000000Z",
        "2025-11-23T00:54:00+01:00",
        "2025-11-23T00-54-00+01-00",
        "20251123T005400+0100",
        "2025-11-23T00:54:00+01",
        "2025-11-22T18:54:00-05:00",
        "2025-11-22T18-54-00-05-00",
        "2025-11-22T18:54-05",
        "2025-11-22T18:54:00 -0500",
        "2025-11-22 23:54:00 UTC",
        "2025-11-22T23:54:00-00:00",
        f"@{SAME}",
        f"@{SAME}.0",
    ],
)
def test_all_of_these_are_the_same_time(text: str) -> None:
    assert seconds(text) == SAME


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026", "2026-01-01T00-00-00.000000000Z"),
        ("2026-11", "2026-11-01T00-00-00.000000000Z"),
        ("2026-11-22", "2026-11-22T00-00-00.000000000Z"),
        ("20261122", "2026-11-22T00-00-00.000000000Z"),
        ("2026-11-22Z", "2026-11-22T00-00-00.000000000Z"),
        ("2026-11-22+02:00", "2026-11-21T22-00-00.000000000Z"),
        ("2026-11-22T23", "2026-11-22T23-00-00.000000000Z"),
        ("2026-11-22T23-05", "2026-11-22T23-05-00.000000000Z"),
        ("2026-11-22T23:54:07.1", "2026-11-22T23-54-07.100000000Z"),
        ("2026-11-22T23-54-07.1234567899", "2026-11-22T23-54-07.123456789Z"),
        ("2026-12-31T24:00", "2027-01-01T00-00-00.000000000Z"),
        ("2016-12-31T23:59:60Z", "2017-01-01T00-00-00.000000000Z"),
        ("@1763855640.25", "2025-11-22T23-54-00.250000000Z"),
        ("@-0.5", "1969-12-31T23-59-59.500000000Z"),
    ],
)
def test_a_missing_part_counts_as_zero_and_a_fraction_is_cut(text: str, expected: str) -> None:
    found = parse_time(text, now_ns=NOW_NS)
    assert isinstance(found, AtTime)
    assert format_instant(found.time_ns) == expected


@pytest.mark.parametrize(
    ("text", "ago_s"),
    [("5m-ago", 300), ("0s-ago", 0), ("1h30m-ago", 5400), ("2d-ago", 172_800), ("1w-ago", 604_800)],
)
def test_ago_counts_from_the_given_now(text: str, ago_s: int) -> None:
    assert parse_time(text, now_ns=NOW_NS) == AtTime(NOW_NS - ago_s * 10**9)


def test_seq_names_a_write() -> None:
    assert parse_time("seq-1234", now_ns=NOW_NS) == AtSeq(1234)
    assert parse_time("seq-0", now_ns=NOW_NS) == AtSeq(0)
    assert parse_time("seq-" + "9" * 100, now_ns=NOW_NS) == AtSeq(MAX_SEQ)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ".", "..", "latest", "now", "-ago", "5-ago", "m-ago", "5x-ago", "seq-", "seq--1", "seq-1x", "@", "@.5",
        "@1.", "2026-13", "2026-00-01", "2026-02-30", "2026-11-22T", "2026-11-22T24:01", "2026-11-22T25:00",
        "2026-11-22T23:60", "2026-11-22T23:54:61", "2026-11-22T23:54:60", "2026-11-22T23:54:00.", "0000-01-01",
        "2026-11-22T23:54:00+24:00", "2026-11-22T23:54:00+1:00", "2026-11-22T23:5", "2026-11-22T23:54-00.5",
        "2026-11-22T23:54:00Z ", " 2026-11-22", "2026-11-22\n", "２０２６-11-22", "2026-11-22T23:54:00ZZ", "202611",
        "2026-11-22T23:54:00\x00", "\udcff", "x" * 1000, "9" * 5000,
    ],
)  # fmt: skip
def test_anything_else_is_not_a_time(text: str) -> None:
    with pytest.raises(NotATimeError) as caught:
        parse_time(text, now_ns=NOW_NS)
    assert len(str(caught.value)) < 600


def test_times_beyond_64_bits_are_clamped() -> None:
    assert parse_time("9999-12-31", now_ns=NOW_NS) == AtTime((1 << 63) - 1)
    assert parse_time("0001-01-01", now_ns=NOW_NS) == AtTime(-(1 << 63))
    assert parse_time("@" + "9" * 200, now_ns=NOW_NS) == AtTime((1 << 63) - 1)
    assert parse_time("9" * 200 + "w-ago", now_ns=NOW_NS) == AtTime(-(1 << 63))


def test_a_time_without_zone_is_local() -> None:
    vienna = zoneinfo.ZoneInfo("Europe/Vienna")
    assert seconds("2025-11-23 00:54", vienna) == SAME
    assert seconds("2025-11-22T23:54Z", vienna) == SAME
    assert seconds("2025-11-23", vienna) == seconds("2025-11-22T23:00Z")


def test_a_local_time_that_exists_twice_is_the_earlier_one() -> None:
    vienna = zoneinfo.ZoneInfo("Europe/Vienna")
    assert seconds("2025-10-26T02:30", vienna) == seconds("2025-10-26T00:30Z")
    assert seconds("2025-10-26T02:30+01:00", vienna) == seconds("2025-10-26T01:30Z")


def test_a_local_time_that_never_was_is_read_as_if_the_clock_had_not_been_set() -> None:
    vienna = zoneinfo.ZoneInfo("Europe/Vienna")
    assert seconds("2025-03-30T02:30", vienna) == seconds("2025-03-30T01:30Z")


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-22T23-54-00.123456789", "2026-11-22T23:54:00.123456789Z", "2026-11-22T23-54-00.12345678Z",
        "2026-11-22T24-00-00.000000000Z", "2026-02-30T00-00-00.000000000Z", "2016-12-31T23-59-60.000000000Z",
        "9999-01-01T00-00-00.000000000Z", "2026-11-22T23-54-00.123456789Z\n", "0000-01-01T00-00-00.000000000Z",
    ],
)  # fmt: skip
def test_only_the_exact_form_is_canonical(text: str) -> None:
    assert parse_instant(text) is None


def test_positions_are_ordered_and_named() -> None:
    assert Position(3, 5_000_000_000) < Position(4, 1)
    assert Position(3, 5_000_000_001).instant == "1970-01-01T00-00-05.000000001Z"


@pytest.mark.parametrize(
    "name",
    [
        "latest", "Latest", "seq-12", "SEQ-12", "2026", "2026-11", "2026-11-22", "20261122", "2026-11-22T23-54-00Z",
        "2026-11-22T23-54-00.123456789Z", "5m-ago", "1h30m-ago", "@1763855640", "12-59", "12:59", "23-54-07.5",
        "now", "today", "Yesterday", "tomorrow",
    ],
)  # fmt: skip
def test_a_name_that_a_person_or_a_command_would_read_as_a_time(name: str) -> None:
    assert reads_as_time(name)


@pytest.mark.parametrize(
    "name",
    [
        "before-upgrade", "noon", "seq-", "seq-12-before", "2026-11-22-before", "2026-13-45", "12", "25-00", "1-59",
        "v1.2", "5m", "ago", "latest-good", "202611", "",
    ],
)  # fmt: skip
def test_a_name_that_says_no_time(name: str) -> None:
    assert not reads_as_time(name)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("12:59", "2026-11-22T12:59"),
        ("12-59", "2026-11-22T12-59"),
        ("12:59:07.5", "2026-11-22T12:59:07.5"),
        ("T12:59", "2026-11-22T12:59"),
        ("9:15", "2026-11-22T09:15"),
        ("23:55", "2026-11-21T23:55"),  # that of the newest state's day is to come
        ("23:54Z", "2026-11-22T23:54z"),
        ("yesterday", "2026-11-25"),
        ("today", "2026-11-26"),
        ("Yesterday 12:59", "2026-11-25T12:59"),
        ("yesterday-9:15", "2026-11-25T09:15"),
        ("now", "latest"),
        ("LATEST", "latest"),
        ("Seq-12", "seq-12"),
        (" 2026-11-22 ", "2026-11-22"),
        ("2026/11/22 23:54", "2026-11-22 23:54"),
        ("5 minutes ago", "5m-ago"),
        ("5min-ago", "5m-ago"),
        ("2d", "2d-ago"),
        ("5 months ago", None),
        ("1h 30m ago", "1h30m-ago"),
        ("tomorrow", None),
        ("25:00", None),
        ("12", None),
        ("before-upgrad", None),
        ("", None),
        ("\udcff", None),
        ("9" * 5000 + ":15", None),
    ],
)
def test_what_may_have_been_meant_by_what_is_no_time(text: str, meant: str | None) -> None:
    now_ns, newest_ns = (found(each) for each in ("2026-11-26T08:00Z", "2026-11-22T23:54:07Z"))
    assert meant_time(text, now_ns=now_ns, newest_ns=newest_ns) == meant
    if meant not in (None, "latest"):
        parse_time(str(meant), now_ns=now_ns)


def test_what_was_meant_is_said_in_the_zone_of_the_command() -> None:
    zone = zoneinfo.ZoneInfo("Europe/Vienna")
    times = {"now_ns": found("2026-11-25T23:30Z"), "newest_ns": found("2026-11-22T23:54:07Z")}
    assert meant_time("yesterday", zone=zone, **times) == "2026-11-25"
    assert meant_time("00:30", zone=zone, **times) == "2026-11-23T00:30"
    assert meant_time("12:59", zone=zone, **times) == "2026-11-22T12:59"


def found(text: str) -> int:
    return round(seconds(text) * 10**9)
