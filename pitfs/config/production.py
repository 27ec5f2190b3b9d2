"""The configuration of a production host: TOML -> frozen values, validated once, read by cli alone.

    config = load_config("/etc/pitfs/db1.toml")

A `Config` that exists is valid in itself; what depends on the machine (does the backing file exist, can
the replica be reached) is found out by those who use it. Every error is a `ConfigError` of one line with
the file, the line where it is cheap to find, the key, and what to write instead.

Units, all SI unless they say "i" (KiB = 1024):

    duration  "500ms" "60s" "5m" "1h" "1d"                         -> nanoseconds
    rate      "100Mbit" "1Gbit" "12.5MB" "4MiB", with or without /s  -> bytes per second
    size      "10GiB" "500MB" or a plain integer of bytes          -> bytes

Paths must be absolute: the same file is read by a service manager, by hand and by tools, each with
another working directory, so a relative path would mean something else to each.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from pitfs.config.table import Table, parse_quantity, parse_table, read_text
from pitfs.model.group import BLOCK_SIZES, MAX_VOLUMES

MIN_INTERVAL_NS: Final = 100 * 10**6  # closing an interval costs some ms and two fsyncs on the replica
MAX_INTERVAL_NS: Final = 24 * 3600 * 10**9  # all of an interval is held in the journal until it is shipped
MIN_RATE_BYTES_PER_S: Final = 8_000  # 64 kbit/s; below, one frame outlives every time-out
MAX_RATE_BYTES_PER_S: Final = 10**15
MIN_CAPACITY_BYTES: Final = 16 << 20  # a few segments: below, every burst overflows
MAX_CAPACITY_BYTES: Final = 1 << 60
MIN_WINDOW_BYTES: Final = 1 << 20  # as link.window, and why
MAX_WINDOW_BYTES: Final = 128 << 20
DEFAULT_WINDOW_BYTES: Final = 32 << 20

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})")
_DURATION_NS = {
    "ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "min": 60 * 10**9, "h": 3600 * 10**9,
    "d": 86400 * 10**9,
}  # fmt: skip
_SIZE_BYTES = {
    "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_BITS = {"bit": 1, "kbit": 10**3, "Kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9, "Tbit": 10**12}
_RATE_BYTES = _SIZE_BYTES | {unit: Fraction(bits, 8) for unit, bits in _BITS.items()}


@dataclass(frozen=True, slots=True)
class GroupConfig:
    name: str
    state: str  # directory of the local journal and the progress, absolute


@dataclass(frozen=True, slots=True)
class VolumeConfig:
    name: str
    backing: str  # regular file or block device, absolute
    block_size: int = 4096  # bytes


@dataclass(frozen=True, slots=True)
class SplitterConfig:
    mountpoint: str  # absolute


@dataclass(frozen=True, slots=True)
class ReplicationConfig:
    host: str  # name or address, an IPv6 address without its brackets
    port: int
    mode: str = "dynamic"  # sync | async | snapshot | dynamic
    interval_ns: int = 60 * 10**9
    rate_bytes_per_s: int | None = None  # None: no cap, the measured rate
    on_disconnect: str = "degrade"  # of mode sync: degrade | block
    window_bytes: int = DEFAULT_WINDOW_BYTES  # how far back the codec may refer; memory on both sides


@dataclass(frozen=True, slots=True)
class JournalConfig:
    capacity_bytes: int = 10 << 30
    on_full: str = "degrade"  # degrade | block


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Either the three PEM files are set, or `insecure` is (and the replica is on loopback)."""

    certificate: str | None = None
    key: str | None = None
    authority: str | None = None
    insecure: bool = False


@dataclass(frozen=True, slots=True)
class Config:
    path: str  # of the file it was read from, as given
    group: GroupConfig
    volumes: tuple[VolumeConfig, ...]  # at least one, in the order of the file
    splitter: SplitterConfig
    replication: ReplicationConfig
    journal: JournalConfig
    tls: TlsConfig


def load_config(path: str) -> Config:
    """Reads and validates the file.

    Raises:
        ConfigError: it can't be read, isn't TOML, or says something that can't be meant.
    """
    return parse_config(read_text(path), path)


def load_grants(path: str) -> dict[str, frozenset[str]]:
    """Reads the file of `pitfs receive --grants`: for each group, whose certificates may write it.

        [groups]
        db1 = ["db1.example.org", "sha256:5f36…"]

    Each is a name in the certificate, or its fingerprint (lower case and without colons in what is returned).

    Raises:
        ConfigError: as `load_config`.
    """
    top = parse_table(read_text(path), path)
    top.only(("groups",))
    groups = top.table("groups")
    found = {}
    for name in groups.values:
        groups.check_name(name, name)
        found[name] = frozenset(_fingerprint(groups, name, each) for each in groups.texts(name))
    return found


def _fingerprint(groups: Table, name: str, text: str) -> str:
    prefix, colon, digits = text.partition(":")
    if prefix.lower() != "sha256" or not colon:
        return text
    digits = digits.replace(":", "").lower()
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        groups.fail(name, "a fingerprint is sha256: and 64 hex digits, as of openssl x509 -fingerprint -sha256")
    return f"sha256:{digits}"


def parse_config(text: str, path: str) -> Config:
    """As load_config, from the text; `path` is for messages."""
    top = parse_table(text, path)
    top.only(("group", "volumes", "splitter", "replication", "journal", "tls"))
    replication = _read_replication(top.table("replication"))
    config = Config(
        path=path,
        group=_read_group(top.table("group")),
        volumes=_read_volumes(top.table("volumes")),
        splitter=_read_splitter(top.table("splitter")),
        replication=replication,
        journal=_read_journal(top.table("journal", optional=True)),
        tls=_read_tls(top.table("tls"), replication.host),
    )
    _check_places(top, config)
    return config


def _read_group(table: Table) -> GroupConfig:
    table.only(("name", "state"))
    name = table.text("name")
    table.check_name("name", name)
    return GroupConfig(name, table.absolute_path("state"))


def _read_volumes(tables: Table) -> tuple[VolumeConfig, ...]:
    if not tables.values:
        tables.fail("", "needs at least one volume: a table [volumes.NAME] with its backing")
    if len(tables.values) > MAX_VOLUMES:
        tables.fail("", f"has {len(tables.values)} volumes; a group has at most {MAX_VOLUMES}")
    volumes = []
    for name in tables.values:
        tables.check_name(name, name)
        table = tables.table(name)
        table.only(("backing", "block_size"))
        block_size = table.integer("block_size", 4096)
        if block_size not in BLOCK_SIZES:
            table.fail(
                "block_size", f"{block_size} isn't a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}"
            )
        volumes.append(VolumeConfig(name, table.absolute_path("backing"), block_size))
    return tuple(volumes)


def _read_splitter(table: Table) -> SplitterConfig:
    table.only(("mountpoint",))
    return SplitterConfig(table.absolute_path("mountpoint"))


def _read_replication(table: Table) -> ReplicationConfig:
    table.only(("replica", "mode", "interval", "rate", "on_disconnect", "window"))
    try:
        host, port = parse_endpoint(table.text("replica"))
    except ValueError as error:
        table.fail("replica", str(error))
    mode = table.choice("mode", ("dynamic", "snapshot", "sync", "async"), "dynamic")
    on_disconnect = table.choice("on_disconnect", ("degrade", "block"), "degrade")
    if "on_disconnect" in table.values and mode != "sync":
        table.fail("on_disconnect", f"is of mode 'sync', not of '{mode}': leave it out, or set mode = \"sync\"")
    interval_ns = table.quantity("interval", _DURATION_NS, '"60s"', 60 * 10**9)
    if interval_ns < MIN_INTERVAL_NS:
        table.fail("interval", f"{table.values['interval']!r} is too short: at least 100ms")
    if interval_ns > MAX_INTERVAL_NS:
        table.fail("interval", f"{table.values['interval']!r} is too long: at most 24h")
    rate = None
    if "rate" in table.values:
        rate = table.quantity("rate", _RATE_BYTES, '"100Mbit" or "12.5MB"', per_second=True)
        if not MIN_RATE_BYTES_PER_S <= rate <= MAX_RATE_BYTES_PER_S:
            table.fail(
                "rate", f"{table.values['rate']!r}: must be 64kbit to 8000Tbit; without rate there is no cap"
            )
    window = table.quantity("window", _SIZE_BYTES, '"32MiB"', DEFAULT_WINDOW_BYTES, plain=True)
    if problem := _window_problem(window):
        table.fail("window", f"{table.values['window']!r}: {problem}")
    return ReplicationConfig(host, port, mode, interval_ns, rate, on_disconnect, window)


def _read_journal(table: Table) -> JournalConfig:
    table.only(("capacity", "on_full"))
    capacity = table.quantity("capacity", _SIZE_BYTES, '"10GiB"', 10 << 30, plain=True)
    if not MIN_CAPACITY_BYTES <= capacity <= MAX_CAPACITY_BYTES:
        table.fail(
            "capacity", f"{table.values['capacity']!r}: must be 16MiB to {MAX_CAPACITY_BYTES >> 40}TiB"
        )
    return JournalConfig(capacity, table.choice("on_full", ("degrade", "block"), "degrade"))


def _read_tls(table: Table, host: str) -> TlsConfig:
    files = ("certificate", "key", "authority")
    table.only((*files, "insecure"))
    insecure = table.boolean("insecure", False)
    if insecure:
        if given := [name for name in files if name in table.values]:
            table.fail(
                "insecure", f"contradicts {given[0]}: give the three PEM files, or insecure = true alone"
            )
        if not is_loopback(host):
            table.fail(
                "insecure",
                f"only for a replica on loopback, not '{host}': give certificate, key and authority",
            )
        return TlsConfig(insecure=True)
    if not any(name in table.values for name in files):
        table.fail("", "needs certificate, key and authority (or insecure = true for a replica on loopback)")
    certificate, key, authority = map(table.absolute_path, files)
    return TlsConfig(certificate, key, authority)


def _check_places(top: Table, config: Config) -> None:
    """No two volumes share a backing, and nothing that the splitter needs lies under its own mount."""
    volumes = top.table("volumes")
    seen: dict[object, str] = {}
    for volume in config.volumes:
        table = volumes.table(volume.name)
        for identity in _identities(volume.backing):
            if (other := seen.setdefault(identity, volume.name)) != volume.name:
                table.fail("backing", f"is also the backing of volume '{other}': each volume needs its own")
    mountpoint = os.path.normpath(config.splitter.mountpoint)
    places = [(volumes.table(volume.name), "backing", volume.backing) for volume in config.volumes]
    places.append((top.table("group"), "state", config.group.state))
    for table, key, path in places:
        if os.path.commonpath((mountpoint, os.path.normpath(path))) == mountpoint:
            table.fail(
                key, f"lies under splitter.mountpoint {config.splitter.mountpoint}, which the mount hides"
            )


def _identities(path: str) -> Iterable[object]:
    """What makes two paths the same file: the resolved path, and device and inode where it exists."""
    yield os.path.realpath(path)
    try:
        status = os.stat(path)
    except OSError:  # not there (yet): whoever opens it says so
        return
    yield (status.st_dev, status.st_ino)


def parse_size(text: str) -> int:
    """A size, as in the configuration or as a plain number of bytes, in bytes.

    Raises:
        ValueError: it isn't one; the message is for the user.
    """
    return int(text) if text.isascii() and text.isdigit() else parse_quantity(text, _SIZE_BYTES, '"10GiB"')


def parse_window(text: str) -> int:
    """A window of the codec, as in the configuration, in bytes.

    Raises:
        ValueError: it isn't one; the message is for the user.
    """
    window = parse_quantity(text, _SIZE_BYTES, '"32MiB"')
    if problem := _window_problem(window):
        raise ValueError(f"{text!r}: {problem}")
    return window


def _window_problem(window_bytes: int) -> str:
    is_power = window_bytes & (window_bytes - 1) == 0
    if is_power and MIN_WINDOW_BYTES <= window_bytes <= MAX_WINDOW_BYTES:
        return ""
    return f"must be a power of two from {MIN_WINDOW_BYTES >> 20}MiB to {MAX_WINDOW_BYTES >> 20}MiB"


def parse_endpoint(text: str) -> tuple[str, int]:
    """ "host:port" or "[address]:port" -> (host, port).

    Raises:
        ValueError: it is neither; the message is for the user.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError(f"{text!r} isn't HOST:PORT with a port from 1 to 65535")
    if host.startswith("[") and host.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(host[1:-1])), int(port)
        except ValueError:
            raise ValueError(f"{host!r} isn't an IPv6 address in brackets") from None
    if ":" in host:
        raise ValueError(f"{text!r}: write an IPv6 address in brackets, as [::1]:7420")
    if not _HOST.fullmatch(host):
        raise ValueError(f"{host!r} isn't a host name or address")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether the name or literal address means this machine, without asking a resolver."""
    if host.lower() in ("localhost", "ip6-localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
