"""The configuration file: what it gives, and that every mistake is one line with file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pitfs.config.production import (
    Config,
    GroupConfig,
    JournalConfig,
    ReplicationConfig,
    SplitterConfig,
    TlsConfig,
    VolumeConfig,
    load_config,
    parse_config,
)
from pitfs.errors import ConfigError
from pitfs.model.endpoint import format_endpoint, is_loopback, parse_endpoint

FULL = """\
[group]
name = "db1"                      # a comment
state = "/var/lib/pitfs/db1"

[volumes.root]
backing = "/srv/root.img"
block_size = 512
[volumes.data]
backing = "/srv/data.img"

[splitter]
mountpoint = "/run/pitfs/db1"

[replication]
replica = "replica.example:7420"
mode = "snapshot"
interval = "5m"
rate = "100Mbit"
window = "8MiB"

[journal]
capacity = "500MB"
on_full = "block"

[tls]
certificate = "/etc/pitfs/cert.pem"
key = "/etc/pitfs/key.pem"
authority = "/etc/pitfs/ca.pem"
"""

SHORT = """\
[group]
name = "db1"
state = "/var/lib/pitfs/db1"
[volumes.root]
backing = "/srv/root.img"
[splitter]
mountpoint = "/run/pitfs/db1"
[replication]
replica = "127.0.0.1:7420"
[tls]
insecure = true
"""


def changed(text: str, before: str, after: str) -> str:
    assert text.count(before) == 1, "the test's own text doesn't have the line once"
    return text.replace(before, after)


def error_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "db1.toml")
    message = str(caught.value)
    assert message.startswith("db1.toml: ") and "\n" not in message
    assert caught.value.exit_code == 2
    return message.removeprefix("db1.toml: ")


def test_every_key_of_the_contract_is_read() -> None:
    assert parse_config(FULL, "db1.toml") == Config(
        path="db1.toml",
        group=GroupConfig("db1", "/var/lib/pitfs/db1"),
        volumes=(VolumeConfig("root", "/srv/root.img", 512), VolumeConfig("data", "/srv/data.img", 4096)),
        splitter=SplitterConfig("/run/pitfs/db1"),
        replication=ReplicationConfig(
            "replica.example", 7420, "snapshot", 300 * 10**9, 12_500_000, "degrade", 8 << 20
        ),
        journal=JournalConfig(500_000_000, "block"),
        tls=TlsConfig("/etc/pitfs/cert.pem", "/etc/pitfs/key.pem", "/etc/pitfs/ca.pem", False),
    )


def test_what_is_left_out_has_its_default() -> None:
    config = parse_config(SHORT, "db1.toml")
    assert config.volumes == (VolumeConfig("root", "/srv/root.img", 4096),)
    expected = ReplicationConfig("127.0.0.1", 7420, "dynamic", 60 * 10**9, None, "degrade", 32 << 20)
    assert config.replication == expected
    assert config.journal == JournalConfig(10 * 2**30, "degrade")
    assert config.tls == TlsConfig(None, None, None, True)


@pytest.mark.parametrize(
    ("text", "interval_ns"),
    [("60s", 60_000_000_000), ("500ms", 500_000_000), ("5m", 300_000_000_000), ("1h", 3_600_000_000_000)]
    + [("0.1s", 100_000_000), ("1.5 s", 1_500_000_000), ("1d", 86_400_000_000_000)],
)
def test_durations(text: str, interval_ns: int) -> None:
    config = parse_config(changed(FULL, '"5m"', f'"{text}"'), "")
    assert config.replication.interval_ns == interval_ns


@pytest.mark.parametrize(
    ("text", "rate"),
    [("100Mbit", 12_500_000), ("100Mbit/s", 12_500_000), ("12.5MB", 12_500_000), ("12.5MB/s", 12_500_000)]
    + [("1Gbit", 125_000_000), ("64kbit", 8_000), ("4MiB", 4 << 20), ("8000000bit", 1_000_000)],
)
def test_rates_are_bytes_per_second_and_si(text: str, rate: int) -> None:
    config = parse_config(changed(FULL, '"100Mbit"', f'"{text}"'), "")
    assert config.replication.rate_bytes_per_s == rate


@pytest.mark.parametrize(
    ("text", "capacity"),
    [('"10GiB"', 10 << 30), ('"500MB"', 500_000_000), ("67108864", 64 << 20), ('"64MiB"', 64 << 20)],
)
def test_sizes(text: str, capacity: int) -> None:
    assert parse_config(changed(FULL, '"500MB"', text), "").journal.capacity_bytes == capacity


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('name = "db1" ', 'nmae = "db1" ', "line 2, group.nmae: unknown key; did you mean 'name'?"),
        ("[splitter]", "[spliter]", "line 11, spliter: unknown table; did you mean 'splitter'?"),
        ('state = "/var/lib/pitfs/db1"\n', "", "line 1, group.state: is missing"),
        ('[splitter]\nmountpoint = "/run/pitfs/db1"\n', "", "the table [splitter] is missing"),
        ('name = "db1" ', "name = 1 ", "line 2, group.name: must be text in quotes, not an integer"),
        ('name = "db1" ', 'name = "" ', "line 2, group.name: is empty"),
        ('name = "db1" ', 'name = ".." ', "line 2, group.name: '..' isn't a valid name"),
        ('name = "db1" ', f'name = "{"a" * 65}" ', "isn't a valid name: 1 to 64 of"),
        ("[volumes.root]", '[volumes."ro/ot"]', "volumes.'ro/ot'"),
        ("[volumes.root]", '[volumes."."]', "isn't a valid name"),
        ("512", "1000", "line 7, volumes.root.block_size: 1000 isn't a power of two from 512 to 65536"),
        ("512", "131072", "131072 isn't a power of two"),
        ("512", "true", "block_size: must be an integer, not true or false"),
        ('"/srv/data.img"', '"/srv/root.img"', "line 9, volumes.data.backing: is also the backing of"),
        ('"/srv/data.img"', '"/srv/./root.img"', "is also the backing of volume 'root'"),
        ('"/srv/data.img"', '"data.img"', "'data.img' must be an absolute path"),
        ('"/srv/data.img"', '"/run/pitfs/db1/data"', "volumes.data.backing: lies under splitter.mountpoint"),
        ('"/run/pitfs/db1"', '"/var/lib/pitfs"', "group.state: lies under splitter.mountpoint"),
        ('"replica.example:7420"', '"replica.example"', "line 15, replication.replica: "),
        ('"replica.example:7420"', '"replica.example:0"', "isn't HOST:PORT with a port from 1 to 65535"),
        ('"replica.example:7420"', '"::1:7420"', "write an IPv6 address in brackets"),
        ('"snapshot"', '"async"\non_disconnect = "block"', "on_disconnect: is of mode 'sync', not of 'async'"),
        ('"snapshot"', '"sync"\non_disconnect = "wait"', "'wait' isn't known; it is one of degrade, block"),
        (
            '"snapshot"',
            '"dynamik"',
            "line 16, replication.mode: 'dynamik' isn't known; did you mean 'dynamic'",
        ),
        ('"5m"', '"99ms"', "line 17, replication.interval: '99ms': must be 100ms to 24h"),
        ('"5m"', '"25h"', "'25h': must be 100ms to 24h"),
        ('"5m"', "60", 'needs a unit, as "60s"'),
        ('"5m"', '"-5m"', "'-5m' isn't a number with one of ns, us, ms, s, m"),
        ('"5m"', '"٥m"', "isn't a number"),
        ('"8MiB"', '"48MiB"', "line 19, replication.window: '48MiB': must be a power of two from 1MiB to 128MiB"),
        ('"8MiB"', '"256MiB"', "line 19, replication.window: '256MiB': must be a power of two from 1MiB to 128MiB"),
        ('"8MiB"', "4096", "line 19, replication.window: 4096: must be a power of two from 1MiB to 128MiB"),
        ('"8MiB"', "true", "line 19, replication.window: must be text in quotes, not true or false"),
        ('"100Mbit"', '"0Mbit"', "line 18, replication.rate: '0Mbit': must be 64kbit to"),
        ('"100Mbit"', "0", "needs a unit"),
        ('"100Mbit"', '"100Mbps"', "isn't a number with one of B, kB"),
        ('"500MB"', '"15MiB"', "line 22, journal.capacity: '15MiB': must be 16MiB to"),
        ('"500MB"', "true", "must be text in quotes, not true or false"),
        ('"block"', '"drop"', "'drop' isn't known; it is one of degrade, block"),
        ('key = "/etc/pitfs/key.pem"\n', "", "tls.key: is missing"),
        ('key = "/etc/pitfs/key.pem"', "insecure = true", "tls.insecure: contradicts certificate"),
        ("[volumes.data]", "volumes.data = 1\n[x]", "line 9, x: unknown table; known here: group, volumes"),
        ("[volumes.data]", "[volumes.root.data]", "line 8, volumes.root.data: unknown table"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(before: str, after: str, message: str) -> None:
    assert message in error_of(changed(FULL, before, after))


def test_insecure_is_for_loopback_only() -> None:
    text = changed(SHORT, "127.0.0.1", "replica.example")
    assert "only for a replica on loopback, not 'replica.example'" in error_of(text)


def test_tls_needs_files_or_insecure() -> None:
    text = changed(SHORT, "insecure = true", "insecure = false")
    assert "needs certificate, key and authority" in error_of(text)


def test_a_group_needs_a_volume() -> None:
    text = changed(SHORT, '[volumes.root]\nbacking = "/srv/root.img"', "[volumes]")
    assert "volumes: needs at least one volume" in error_of(text)


def test_two_names_of_one_file_are_one_backing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "hard").hardlink_to(tmp_path / "a")
    (tmp_path / "soft").symlink_to("a")
    for other in ("hard", "soft"):
        text = changed(
            changed(FULL, "/srv/root.img", f"{tmp_path}/a"), "/srv/data.img", f"{tmp_path}/{other}"
        )
        assert "is also the backing of volume 'root'" in error_of(text)


def test_bad_toml_is_reported_with_line_and_column() -> None:
    assert error_of("[group]\nname = x\n").startswith("line 2, column 8: isn't valid TOML: Invalid value")
    assert error_of('[group]\nname = "x').startswith("end of document: isn't valid TOML: Unterminated")
    assert "isn't valid TOML: nested too deeply" in error_of("a = " + "[" * 100_000)
    assert "isn't valid TOML" in error_of("a = " + "1" * 5000)


def test_no_line_is_named_where_it_could_be_the_wrong_one() -> None:
    text = changed(FULL, "512", "1000") + 'x = """\nblock_size = 1\n"""\n'
    assert error_of(text.replace("x = ", "certificat = ")).startswith("volumes.root.block_size: 1000")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "db1.toml"
    with pytest.raises(ConfigError, match=r"db1.toml: can't be read: No such file or directory"):
        load_config(str(path))
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        load_config(str(tmp_path))
    path.write_bytes(b"[group]\n# \xff\n")
    with pytest.raises(ConfigError, match=r"db1.toml: line 2: isn't UTF-8 text"):
        load_config(str(path))
    path.write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_config(str(path))
    path.write_text(SHORT)
    assert load_config(str(path)).path == str(path)


def test_endpoints() -> None:
    assert parse_endpoint("replica.example:7420") == ("replica.example", 7420)
    assert parse_endpoint("10.0.0.1:1") == ("10.0.0.1", 1)
    assert parse_endpoint("[::1]:65535") == ("::1", 65535)
    for bad in ("", ":1", "a:", "a:65536", "a:-1", "a b:1", "[::1]", "[a]:1", "a:1\n", "a:１"):
        with pytest.raises(ValueError, match="isn't"):
            parse_endpoint(bad)


def test_an_endpoint_to_listen_at_may_leave_the_host_empty_and_the_port_to_the_system() -> None:
    assert parse_endpoint(":7420", listening=True) == ("", 7420)
    assert parse_endpoint("[::]:0", listening=True) == ("::", 0)
    assert parse_endpoint("localhost:0", listening=True) == ("localhost", 0)
    for bad in ("", "a", "a:", "a:65536", "a:x", "a b:1", "[::1]", "[a]:1", "a:１"):
        with pytest.raises(ValueError, match="isn't"):
            parse_endpoint(bad, listening=True)


def test_an_endpoint_is_written_as_it_is_read() -> None:
    for text in ("replica.example:7420", "[::1]:1", "0.0.0.0:10809"):
        assert format_endpoint(*parse_endpoint(text)) == text


def test_what_is_loopback() -> None:
    for host in ("localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1", "::1%lo", "::ffff:127.0.0.1"):
        assert is_loopback(host), host
    for host in (
        "0.0.0.0",
        "::",
        "10.0.0.1",
        "localhost.example",
        "127.0.0.1.example",
        "",
        "::ffff:10.0.0.1",
    ):
        assert not is_loopback(host), host
