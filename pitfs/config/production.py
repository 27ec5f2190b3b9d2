"""The configuration of a production host: TOML -> frozen values, validated once, read by cli and supervision.

    config = load_config("/etc/pitfs/db1.toml")

A `Config` that exists is valid in itself. Who uses it finds out what depends on the machine: whether the backing
exists, whether the replica answers. Every error is a `ConfigError` of one line with the file, the line where it is
cheap to find, the key, and what to write instead.

Paths must be absolute: a service manager, a person and tools read the same file in different working directories.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from pitfs.config.quantities import CAPACITY, INTERVAL, RATE, WINDOW
from pitfs.config.table import Table, parse_table, read_text
from pitfs.model.endpoint import is_loopback, parse_endpoint
from pitfs.model.group import BLOCK_SIZES, MAX_VOLUMES
from pitfs.model.window import DEFAULT_WINDOW_BYTES


@dataclass(frozen=True, slots=True)
class GroupConfig:
    name: str
    state: str  # directory of the local journal and the progress, absolute


@dataclass(frozen=True, slots=True)
class VolumeConfig:
    name: str
    backing: str  # regular file or block device, absolute
    block_size: int  # bytes


@dataclass(frozen=True, slots=True)
class SplitterConfig:
    mountpoint: str  # absolute


@dataclass(frozen=True, slots=True)
class ReplicationConfig:
    host: str  # name or address, an IPv6 address without its brackets
    port: int
    mode: str  # sync | async | snapshot | dynamic
    interval_ns: int
    rate_bytes_per_s: int | None  # None: no cap, the measured rate
    on_disconnect: str  # of mode sync: degrade | block
    window_bytes: int  # how far back the codec may refer; memory on both sides


@dataclass(frozen=True, slots=True)
class JournalConfig:
    capacity_bytes: int
    on_full: str  # degrade | block


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
        ConfigError: it can't be read, isn't TOML, or has an invalid value.
    """
    return parse_config(read_text(path), path)


def parse_config(text: str, path: str) -> Config:
    """As load_config, from the text; `path` is for messages."""
    top = parse_table(text, path)
    top.only(("group", "volumes", "splitter", "replication", "journal", "tls"))
    replication = _read_replication(top)
    group = top.table("group", ("name", "state"))
    name = group.checked_name("name", group.text("name"))
    splitter = top.table("splitter", ("mountpoint",))
    journal = top.table("journal", ("capacity", "on_full"), optional=True)
    capacity = journal.quantity("capacity", CAPACITY, 10 << 30)
    config = Config(
        path=path,
        group=GroupConfig(name, group.absolute_path("state")),
        volumes=_read_volumes(top.table("volumes")),
        splitter=SplitterConfig(splitter.absolute_path("mountpoint")),
        replication=replication,
        journal=JournalConfig(capacity, journal.choice("on_full", ("degrade", "block"), "degrade")),
        tls=_read_tls(top, replication.host),
    )
    _check_places(top, config)
    return config


def _read_volumes(tables: Table) -> tuple[VolumeConfig, ...]:
    if not tables.values:
        tables.fail("", "needs at least one volume: a table [volumes.NAME] with its backing")
    if len(tables.values) > MAX_VOLUMES:
        tables.fail("", f"has {len(tables.values)} volumes; a group has at most {MAX_VOLUMES}")
    volumes = []
    for name in tables.values:
        tables.checked_name(name, name)
        table = tables.table(name, ("backing", "block_size"))
        block_size = table.get("block_size", int, 4096)
        if block_size not in BLOCK_SIZES:
            words = f"{block_size} isn't a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}"
            table.fail("block_size", words)
        volumes.append(VolumeConfig(name, table.absolute_path("backing"), block_size))
    return tuple(volumes)


def _read_replication(top: Table) -> ReplicationConfig:
    table = top.table("replication", ("replica", "mode", "interval", "rate", "on_disconnect", "window"))
    try:
        host, port = parse_endpoint(table.text("replica"))
    except ValueError as error:
        table.fail("replica", str(error))
    mode = table.choice("mode", ("dynamic", "snapshot", "sync", "async"), "dynamic")
    on_disconnect = table.choice("on_disconnect", ("degrade", "block"), "degrade")
    if "on_disconnect" in table.values and mode != "sync":
        table.fail("on_disconnect", f"is of mode 'sync', not of '{mode}': leave it out, or set mode = \"sync\"")
    interval_ns = table.quantity("interval", INTERVAL, 60 * 10**9)
    rate = table.quantity("rate", RATE) if "rate" in table.values else None
    window = table.quantity("window", WINDOW, DEFAULT_WINDOW_BYTES)
    return ReplicationConfig(host, port, mode, interval_ns, rate, on_disconnect, window)


def _read_tls(top: Table, host: str) -> TlsConfig:
    files = ("certificate", "key", "authority")
    table = top.table("tls", (*files, "insecure"))
    given = [name for name in files if name in table.values]
    if table.get("insecure", bool, False):
        if given:
            words = f"contradicts {given[0]}: give the three PEM files, or insecure = true alone"
            table.fail("insecure", words)
        if not is_loopback(host):
            words = f"only for a replica on loopback, not '{host}': give certificate, key and authority"
            table.fail("insecure", words)
        return TlsConfig(insecure=True)
    if not given:
        table.fail("", "needs certificate, key and authority (or insecure = true for a replica on loopback)")
    certificate, key, authority = map(table.absolute_path, files)
    return TlsConfig(certificate, key, authority)


def _check_places(top: Table, config: Config) -> None:
    """Checks that no two volumes share a backing, and that nothing the splitter needs is under its own mount."""
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
            words = f"lies under splitter.mountpoint {config.splitter.mountpoint}, which the mount hides"
            table.fail(key, words)


def _identities(path: str) -> Iterable[object]:
    """What makes two paths the same file: the resolved path, and device and inode where it exists."""
    yield os.path.realpath(path)
    try:
        status = os.stat(path)
    except OSError:  # it may not exist yet; who opens it reports that
        return
    yield (status.st_dev, status.st_ino)
