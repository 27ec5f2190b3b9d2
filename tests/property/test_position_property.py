"""Instants and typed times against datetime, and against any text whatever."""

from __future__ import annotations

import datetime
import zoneinfo

from hypothesis import given, settings
from hypothesis import strategies as st

from pitfs.model.position import (
    LATEST,
    AtSeq,
    AtTime,
    NotATimeError,
    format_instant,
    meant_time,
    parse_instant,
    parse_time,
    reads_as_time,
)

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
ZONES = [zoneinfo.ZoneInfo(name) for name in ("UTC", "Europe/Vienna", "America/New_York", "Australia/Lord_Howe")]
times = st.integers(-(1 << 62), (1 << 63) - 1)
moments = st.datetimes(datetime.datetime(1700, 1, 1), datetime.datetime(2260, 1, 1))


def nanoseconds(moment: datetime.datetime) -> int:
    delta = moment - EPOCH
    return (delta.days * 86_400 + delta.seconds) * 10**9 + delta.microseconds * 1000


@settings(derandomize=True, max_examples=500)
@given(times)
def test_an_instant_comes_back_from_its_name(time_ns: int) -> None:
    name = format_instant(time_ns)
    assert len(name) == 30
    assert parse_instant(name) == time_ns
    assert parse_time(name, now_ns=0) == AtTime(time_ns)


@settings(derandomize=True, max_examples=300)
@given(times, times)
def test_names_sort_as_times_do(one: int, other: int) -> None:
    assert (format_instant(one) < format_instant(other)) == (one < other)


@settings(derandomize=True, max_examples=300)
@given(moments)
def test_a_name_is_what_datetime_writes(moment: datetime.datetime) -> None:
    moment = moment.replace(tzinfo=datetime.UTC)
    expected = moment.strftime("%Y-%m-%dT%H-%M-%S.%f") + "000Z"
    assert format_instant(nanoseconds(moment)) == expected


@settings(derandomize=True, max_examples=500)
@given(moments, st.integers(-23 * 60, 23 * 60), st.sampled_from(["T", " "]))
def test_rfc_3339_is_read_as_datetime_reads_it(moment: datetime.datetime, offset: int, separator: str) -> None:
    zone = datetime.timezone(datetime.timedelta(minutes=offset))
    local = moment.replace(tzinfo=zone)
    text = local.isoformat(separator)
    assert parse_time(text, now_ns=0) == AtTime(nanoseconds(local))
    assert parse_time(text.replace(":", "-"), now_ns=0) == AtTime(nanoseconds(local))


@settings(derandomize=True, max_examples=500)
@given(moments, st.sampled_from(ZONES))
def test_local_times_are_read_as_datetime_reads_them(moment: datetime.datetime, zone: zoneinfo.ZoneInfo) -> None:
    moment = moment.replace(microsecond=0)
    local = moment.replace(tzinfo=zone)  # fold 0
    expected = AtTime(nanoseconds(local.astimezone(datetime.UTC)))
    for text in (moment.isoformat(), moment.strftime("%4Y%m%dT%H%M%S")):
        assert parse_time(text, now_ns=0, zone=zone) == expected


@settings(derandomize=True, max_examples=1500)
@given(st.one_of(st.text(), st.text("0123456789-:T.Z+@ _,seqagowmhd", max_size=40)))
def test_any_text_is_a_time_or_cleanly_not(text: str) -> None:
    try:
        found = parse_time(text, now_ns=10**18, zone=ZONES[1])
    except NotATimeError:
        return
    assert isinstance(found, AtTime | AtSeq)
    if isinstance(found, AtTime):
        assert -(1 << 63) <= found.time_ns < 1 << 63


@settings(derandomize=True, max_examples=500)
@given(st.text("0123456789-:TZ.", min_size=28, max_size=31))
def test_canonical_names_are_unique(text: str) -> None:
    time_ns = parse_instant(text)
    assert time_ns is None or format_instant(time_ns) == text


names = st.from_regex(r"[0-9A-Za-z._-]{1,20}|[0-9T:.-]{1,12}|(seq-|@)?[0-9]{1,6}(m-ago)?", fullmatch=True)


@settings(derandomize=True, max_examples=1000)
@given(names)
def test_what_a_command_takes_for_a_time_is_no_name_for_a_bookmark(name: str) -> None:
    try:
        parse_time(name, now_ns=0)
    except NotATimeError:
        return
    assert reads_as_time(name)


@settings(derandomize=True, max_examples=1000)
@given(
    st.text(max_size=300) | names | st.from_regex(r"(today|yesterday|)[ _-]?[0-9]{1,2}:[0-9]{2}(Z|)"),
    times, times, st.sampled_from(ZONES),
)  # fmt: skip
def test_what_is_proposed_for_any_text_is_a_time(
    text: str, now_ns: int, newest_ns: int, zone: datetime.tzinfo
) -> None:
    meant = meant_time(text, now_ns=now_ns, newest_ns=newest_ns, zone=zone)
    assert meant is None or meant == LATEST or parse_time(meant, now_ns=now_ns, zone=zone)
