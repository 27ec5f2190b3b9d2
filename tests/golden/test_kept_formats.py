"""Stores and state directories that an earlier version wrote are read, and go on: see tools/golden.

What stands in version-N/ is never made again, so a change of a format shows here, or is converted on the way.
Nearly all of it through the commands. The boot that a state directory names becomes this one, as after a kill.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from pitfs.cli.main import main
from pitfs.model.transfer import Hello, VolumeInfo
from pitfs.store.check.rebuild import rebuild
from pitfs.store.ingest import Ingest
from tests.helpers.hosts import Mount, Production, Replica, ask, digest
from tests.helpers.processes import ROOT, run, wait_until
from tests.helpers.stores import object_files

GOLDEN = Path(__file__).parent
VERSIONS = sorted(path.name for path in GOLDEN.glob("version-*"))
VOLUMES = ("v0", "v1")
OFFSETS = (700, 50_000, 100_001)  # of new writes, in each volume
NEW_WRITES = len(OFFSETS) * len(VOLUMES)
SLOT_BYTES = 16384
SLOT = struct.Struct("<IQ")  # length and xxh3_64 of what follows


@dataclass
class Kept:
    """A scene: a store, and the state and backing volumes of its production host."""

    path: Path
    listing: dict[str, Any]
    reads: dict[str, tuple[str, int, int | None]]  # how a time is said -> instant, seq, granularity
    marks: list[int]
    acknowledged: int  # seq of the last write that the replica had durably of a stream
    mtimes_ns: list[int]
    final: list[str]  # digests of the volumes when the host has started again
    states: list[list[str]]  # digests after each write
    block_sizes: dict[str, int] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.path / "g"

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def last_seq(self) -> int:
        """Of the last write that was journalled."""
        return len(self.states) - 1

    def replica(self) -> Replica:
        return Replica(self.path, root=self.path)

    def production(self, replica: Replica, rate: str = "8Gbit") -> Production:
        """At that rate all streams; at a low one what waits goes as intervals."""
        backings = {name: self.path / name for name in VOLUMES}
        return Production(
            self.path, backings, port=replica.port, state=self.state, block_sizes=self.block_sizes, capacity="16MiB",
            interval="60s", rate=rate,
        )  # fmt: skip


Unpack = Callable[[str], Kept]


@pytest.fixture(params=VERSIONS)
def unpack(request: pytest.FixtureRequest, tmp_path: Path) -> Unpack:
    def unpack(scene: str) -> Kept:
        directory = GOLDEN / request.param
        with tarfile.open(directory / f"{scene}.tar.xz") as archive:
            # Python 3.11.2 has no filters yet, 3.12 wants one.
            archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
            archive.extractall(tmp_path)
        kept = Kept(tmp_path / scene, **json.loads((directory / f"{scene}.json").read_text()))
        for volume in json.loads((kept.store / "store.json").read_text())["volumes"]:
            kept.block_sizes[volume["name"]] = volume["block_size"]
        for name, mtime_ns in zip(VOLUMES, kept.mtimes_ns, strict=True):
            os.utime(kept.path / name, ns=(mtime_ns, mtime_ns))
        return kept

    return unpack


def bring_into_this_boot(state: Path) -> None:
    """As if the host had been killed a moment ago: in another boot, what wasn't synced may be lost."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    path = state / "progress"
    content = bytearray(path.read_bytes())
    for at in range(0, len(content), SLOT_BYTES):
        size, checksum = SLOT.unpack_from(content, at)
        message = bytes(content[at + SLOT.size : at + SLOT.size + size])
        if size:
            assert xxh3_64_intdigest(message) == checksum
            message = msgspec.msgpack.encode(msgspec.msgpack.decode(message) | {"boot_id": boot_id})
            slot = SLOT.pack(len(message), xxh3_64_intdigest(message)) + message
            content[at : at + SLOT_BYTES] = slot.ljust(SLOT_BYTES, b"\0")
    path.write_bytes(content)


def exit_code(*arguments: str | Path) -> tuple[int, str]:
    """Of `pitfs ARGUMENTS` in this process, for there are many, and what it printed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        code = main([*map(str, arguments)])
    return code, output.getvalue()


def pitfs(*arguments: str | Path) -> str:
    """What it printed, when it succeeded."""
    code, printed = exit_code(*arguments)
    assert code == 0, arguments
    return printed


def said(*arguments: str | Path) -> Any:
    """The same with --json, decoded."""
    return json.loads(pitfs(*arguments, "--json"))


def digests_at(store: Path, time: str) -> tuple[int, list[str]]:
    """The seq that a time leads to, and the digests there."""
    found = [said("digest", store, time, name) for name in VOLUMES]
    return found[0]["seq"], [each["digest"] for each in found]


def check_states(kept: Kept, seqs: Iterable[int]) -> None:
    """Each of these states can be given, and is what it was."""
    for seq in seqs:
        assert digests_at(kept.store, f"seq-{seq}") == (seq, kept.states[seq]), seq


def check_reads(kept: Kept, ways: Iterable[str]) -> None:
    """Each way to say a time leads to what it led to."""
    for way in ways:
        instant, seq, _ = kept.reads[way]
        for name, expected in zip(VOLUMES, kept.states[seq], strict=True):
            found = said("digest", kept.store, way, name)
            assert (found["instant"], found["seq"], found["digest"]) == (instant, seq, expected), (way, name)


@contextlib.contextmanager
def resumed(kept: Kept, staged: str) -> Iterator[None]:
    """What was staged, the one file like that in staging/, becomes an object as it is: it doesn't begin anew."""
    (path,) = (kept.store / "staging").glob(staged)
    held = kept.path / "held"  # else the file's number may be given again
    os.link(path, held)
    yield
    (made,) = object_files(kept.store, path.name)
    assert held.samefile(made)


def seqs_of(rows: Iterable[dict[str, Any]]) -> set[int]:
    return {each["seq"] for each in rows}


def wait_for_every_write(kept: Kept, first_seq: int = 0) -> None:
    """Until no interval from that write on is coarser."""

    def is_there() -> bool:
        intervals = said("list", kept.store)["intervals"]
        return all(each["granularity_ns"] == 0 for each in intervals if each["from_seq"] >= first_seq)

    wait_until(is_there, "the layers that waited are there")


def wait_for_shipper(production: Production) -> None:
    wait_until(lambda: exit_code("status", production.config)[0] == 0, "status answers")


def go_on(production: Production, kept: Kept) -> list[str]:
    """New writes, with a snapshot behind them; the digests then."""
    found = []
    for name, expected in zip(VOLUMES, kept.final, strict=True):
        path = production.volume(name)
        content = bytearray(path.read_bytes())
        assert xxh3_128_hexdigest(content) == expected, f"{name} isn't as it was"
        with path.open("r+b", buffering=0) as file:
            for at in OFFSETS:
                content[at : at + 9000] = os.urandom(9000)
                os.pwrite(file.fileno(), content[at : at + 9000], at)
        found.append(xxh3_128_hexdigest(content))
    wait_for_shipper(production)
    pitfs("snapshot", production.config)
    return found


# -- reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", ["streamed", "bypassed", "changes"])
def test_a_kept_store_is_read(unpack: Unpack, scene: str) -> None:
    """Every instant, of every kind of interval, as the model of its writes has it."""
    kept = unpack(scene)
    assert said("list", kept.store) == kept.listing
    check_reads(kept, kept.reads)
    for way, (instant, seq, granularity_ns) in list(kept.reads.items())[::10]:
        found = said("resolve", kept.store, way)
        assert (found["instant"], found["seq"], found["granularity_ns"]) == (instant, seq, granularity_ns)
    assert said("status", kept.store)["holders"] == []  # whoever held something is gone


def test_the_commands_read_a_kept_store(unpack: Unpack) -> None:
    kept = unpack("streamed")
    assert ask("list", kept.store, "--json") == kept.listing
    instant, seq, _ = kept.reads["latest"]
    assert [digest(kept.store, instant, name) for name in VOLUMES] == kept.states[seq]


@pytest.mark.parametrize("scene", ["streamed", "bypassed", "changes"])
def test_the_catalog_of_a_kept_store_is_made_again(unpack: Unpack, scene: str) -> None:
    """Of the objects alone: their version wrote no log of its catalog."""
    kept, said_lines = unpack(scene), list[str]()
    for path in kept.store.glob("catalog.sqlite*"):
        path.unlink()
    assert rebuild(str(kept.store), said_lines.append, lambda number: None).missing == 0
    assert len(said_lines) == 1
    found = said("list", kept.store)
    for name in ("snapshots", "gaps"):
        assert found[name] == kept.listing[name]
    # All that was durable is readable; it was made readable some times a second.
    for one, other in zip(found["open_intervals"], kept.listing["open_intervals"], strict=True):
        assert one["from"] == other["from"] and one["to"] >= other["to"]
    keys = ("from", "to", "granularity_ns")
    intervals = [[{key: each[key] for key in keys} for each in which["intervals"]] for which in (found, kept.listing)]
    assert intervals[0] == intervals[1]
    check_reads(kept, [way for way in kept.reads if way.startswith("seq-")])


@pytest.mark.fuse
def test_a_kept_store_is_mounted(unpack: Unpack, tmp_path: Path) -> None:
    kept = unpack("streamed")
    with Mount(kept.store, tmp_path) as mount:
        assert mount.instants() == [each["instant"] for each in kept.listing["snapshots"]]
        for way in ("bookmarks/first", kept.reads["seq-60"][0], kept.reads["seq-150"][0], "latest"):
            seq = int(os.getxattr(mount.image(way, "v0"), "user.pitfs.seq"))
            images = [mount.image(way, name).read_bytes() for name in VOLUMES]
            assert list(map(xxh3_128_hexdigest, images)) == kept.states[seq]


def test_there_can_be_more_versions(tmp_path: Path) -> None:
    """What makes them works with this one as well."""
    run([ROOT / "tools" / "golden", "99", "first-copy", "--into", tmp_path])
    assert {path.name for path in (tmp_path / "version-99").iterdir()} == {"first-copy.json", "first-copy.tar.xz"}


# -- going on --------------------------------------------------------------------------------------------------


@pytest.mark.fuse
def test_a_kept_store_and_a_kept_state_go_on(unpack: Unpack) -> None:
    """The open interval is closed where production had closed it; what waited comes; old instants stay."""
    kept = unpack("streamed")
    old = kept.listing
    waited = old["bookmarks"][-1]["seq"]  # where the intervals begin whose layers are to come
    there = [each for each in old["intervals"] if each["to_seq"] <= waited]
    unshipped = min(seq for seq in kept.marks if seq > old["open_intervals"][0]["to_seq"])
    bring_into_this_boot(kept.state)
    with kept.replica() as replica, kept.production(replica) as production:
        with resumed(kept, "layers-*/journal-*.blocks"):
            final = go_on(production, kept)
            after = pitfs("bookmark", production.config, "after").strip()
            assert exit_code("bookmark", production.config, "first")[0] == 2  # it was given long ago
            pitfs("snapshot", production.config)
            wait_for_every_write(kept, waited)
        production.terminate()
        replica.terminate()
    listing = said("list", kept.store)
    assert listing["snapshots"][: len(old["snapshots"])] == old["snapshots"]
    for before, now in zip(there, listing["intervals"], strict=False):
        if "waits" in before["cause"]:  # the local journal has no more of it
            assert "doesn't have the rest of it any more" in now["cause"]
            now["cause"] = before["cause"]
        assert now == before
    assert listing["gaps"] == old["gaps"] and listing["open_intervals"] == []
    assert set(kept.marks) <= seqs_of(listing["snapshots"])
    bookmarks = {each["name"]: each for each in listing["bookmarks"]}
    assert set(bookmarks) == {"first", "streamed", "unshipped", "after"}
    assert [bookmarks[each["name"]] for each in old["bookmarks"]] == old["bookmarks"]
    assert bookmarks["unshipped"]["seq"] == unshipped and bookmarks["after"]["instant"] == after
    check_reads(kept, [f"seq-{seq}" for seq in range(0, waited, 8)])
    check_states(kept, [*range(waited, kept.last_seq, 2), *kept.marks[kept.marks.index(waited) :], kept.last_seq])
    # The write that was torn is none: its number was given to the first new one.
    assert digests_at(kept.store, "after") == (kept.last_seq + NEW_WRITES, final)


def test_writes_that_only_the_log_has_are_recovered(unpack: Unpack) -> None:
    """Those that were acknowledged; behind them it is torn. Not by the commands: a sender would send them again."""
    kept = unpack("streamed")
    group = json.loads((kept.store / "store.json").read_text())
    epoch = json.loads((kept.state / "epoch").read_text())["epoch"] + 1
    volumes = tuple(VolumeInfo(**volume) for volume in group["volumes"])
    Ingest(str(kept.path), Hello(group["group"], group["history"], volumes, epoch)).close()
    (recovered,) = said("list", kept.store)["open_intervals"]
    assert recovered["to_seq"] == kept.acknowledged > kept.listing["open_intervals"][0]["to_seq"]
    check_states(kept, range(kept.listing["open_intervals"][0]["to_seq"], recovered["to_seq"] + 1))


@pytest.mark.fuse
def test_a_first_copy_half_way_goes_on_where_it_was(unpack: Unpack) -> None:
    """With the before-images that were kept for it. Begun anew it would leave a gap."""
    kept = unpack("first-copy")
    assert said("list", kept.store) == kept.listing
    bring_into_this_boot(kept.state)
    with kept.replica() as replica, kept.production(replica) as production:
        with resumed(kept, "snapshot-*.blocks"):
            final = go_on(production, kept)
        wait_for_every_write(kept)
        production.terminate()
        replica.terminate()
    listing = said("list", kept.store)
    assert listing["gaps"] == []
    assert set(kept.marks) <= seqs_of(listing["snapshots"])
    check_states(kept, range(len(kept.states)))
    assert digests_at(kept.store, "latest") == (kept.last_seq + NEW_WRITES, final)


@pytest.mark.fuse
def test_a_host_that_was_stopped_while_writes_passed_goes_on(unpack: Unpack) -> None:
    """The staged diff goes on, then come what was journalled, a gap with its cause, and what changed in it."""
    kept = unpack("bypassed")
    with kept.replica() as replica, kept.production(replica, rate="80Mbit") as production:
        with resumed(kept, "snapshot-*.blocks"):
            wait_for_shipper(production)
            wait_until(lambda: not said("status", production.config)["passing"], "writes are journalled again")
        final = go_on(production, kept)
        production.terminate()
        replica.terminate()
    listing = said("list", kept.store)
    (gap,) = listing["gaps"]
    assert gap["from_seq"] == kept.last_seq and gap["to_seq"] == kept.last_seq + 1 and "used up" in gap["cause"]
    check_reads(kept, [way for way in kept.reads if way != "latest"])
    assert set(kept.marks) <= seqs_of(listing["snapshots"])
    check_states(kept, kept.marks)
    assert digests_at(kept.store, f"seq-{gap['to_seq']}") == (gap["to_seq"], kept.final)
    assert digests_at(kept.store, "latest") == (gap["to_seq"] + NEW_WRITES, final)


@pytest.mark.fuse
def test_a_copy_of_changes_half_way_goes_on_where_it_was(unpack: Unpack) -> None:
    kept = unpack("changes")
    bring_into_this_boot(kept.state)
    with kept.replica() as replica, kept.production(replica) as production:
        with resumed(kept, "snapshot-*.blocks"):
            final = go_on(production, kept)
        production.terminate()
        replica.terminate()
    listing = said("list", kept.store)
    (gap,) = listing["gaps"]
    check_reads(kept, [f"seq-{seq}" for seq in range(0, gap["from_seq"], 5)])
    assert set(kept.marks) <= seqs_of(listing["snapshots"])
    check_states(kept, range(gap["to_seq"], len(kept.states)))
    assert digests_at(kept.store, "latest") == (kept.last_seq + NEW_WRITES, final)


@pytest.mark.fuse
def test_a_kept_state_is_recovered_for_a_new_store(unpack: Unpack) -> None:
    """All that it had journalled is there, without what was torn; the new store begins with it."""
    kept = unpack("streamed")
    shutil.rmtree(kept.store)
    bring_into_this_boot(kept.state)
    with kept.replica() as replica, kept.production(replica) as production:
        wait_for_shipper(production)
        # Before, a snapshot would lie in what the new store can't have.
        wait_until(lambda: said("status", production.config)["protected_through"], "the copy is there")
        final = go_on(production, kept)
        production.terminate()
        replica.terminate()
    first = said("list", kept.store)["snapshots"][0]["seq"]
    assert digests_at(kept.store, f"seq-{first}") == (first, kept.final)
    assert digests_at(kept.store, "latest") == (first + NEW_WRITES, final)


@pytest.mark.fuse
def test_a_kept_state_of_another_boot_leaves_a_gap(unpack: Unpack) -> None:
    """What is in the journal is exact all the same; behind it a full sync begins."""
    kept = unpack("streamed")
    with kept.replica() as replica, kept.production(replica) as production:
        final = go_on(production, kept)
        production.terminate()
        replica.terminate()
    *old, gap = said("list", kept.store)["gaps"]
    assert old == kept.listing["gaps"]
    assert gap["from_seq"] == kept.last_seq and "power was lost" in gap["cause"]
    check_states(kept, range(kept.listing["open_intervals"][0]["from_seq"], len(kept.states), 8))
    assert digests_at(kept.store, f"seq-{gap['to_seq']}") == (gap["to_seq"], kept.final)
    assert digests_at(kept.store, "latest") == (gap["to_seq"] + NEW_WRITES, final)
