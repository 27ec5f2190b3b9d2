"""`pitfs retention` and `pitfs prune` on real stores, the ages that they count, and the room that they make."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pitfs.cli import receive
from pitfs.cli.main import main
from pitfs.model.position import DAY_NS, SECOND_NS, format_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.model.units import format_bytes
from pitfs.store.ingest import Ingest
from pitfs.store.pins.pins import Pins
from pitfs.store.retention import pruner
from pitfs.store.retention.levels import NOTHING, Policy, parse_steps
from pitfs.store.retention.plan import Retention, used_bytes
from pitfs.store.retention.policy import load_policy, save_policy
from pitfs.store.retention.stretches import Rule
from pitfs.store.store import Store
from tests.helpers.commands import said
from tests.helpers.histories import unsynced
from tests.helpers.retention import assert_tidy, model_of
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import START_NS, History

MINUTE_NS = 60 * SECOND_NS
HOUR_NS = 60 * MINUTE_NS
POLICY = "every-write 2h, 1s 6h, snapshots 12h, hourly 3d, daily 9d"


@pytest.fixture(autouse=True)
def disk_that_needs_no_sync(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here loses power."""
    monkeypatch.setattr(pruner, "sync_file_system", lambda path: None)
    with unsynced():
        yield


class Replica:
    """A store that intervals arrive in, 20 minutes after each other by default."""

    def __init__(self, root: Path, seed: int = 3) -> None:
        self.history = History(seed, (VolumeInfo("root", 40_960, 4096),))
        self.path = str(root / "db1")
        self.root = root
        self.receive(0)

    def receive(self, count: int, every_ns: int = 20 * MINUTE_NS, bookmarks: tuple[str, ...] = ()) -> None:
        history = self.history
        with contextlib.closing(Ingest(str(self.root), history.hello)) as ingest:
            if not history.mark:
                ingest_transfer(ingest, history.close_interval())
            for _ in range(count):
                history.protected_ns += every_ns
                for _ in range(5):
                    history.write()
                ingest_transfer(ingest, history.close_interval(0, bookmarks))

    def states(self) -> dict[str, list[Any]]:
        with contextlib.closing(Store.open(self.path)) as store:
            return {
                "snapshots": [each.time_ns for each in store.snapshots()],
                "granularities": [each.granularity_ns for each in store.intervals()],
            }

    def apply(self, clock_ns: int | None = None) -> int:
        """Prunes; returns the number of snapshots that are left."""
        newest_ns = self.states()["snapshots"][-1]
        with Retention(self.path, True, lambda: newest_ns if clock_ns is None else clock_ns) as retention:
            retention.apply()
        return len(self.states()["snapshots"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Replica]:
    """Replicas by the number of their intervals; only to be copied."""
    return {count: Replica(tmp_path_factory.mktemp(f"made-{count}")) for count in (0, 30, 80)}


@pytest.fixture
def replica_of(made: dict[int, Replica], tmp_path: Path) -> Callable[[int], Replica]:
    def copied(count: int) -> Replica:
        original = made[count]
        original.receive(count - original.history.mark + 1)
        found = copy.deepcopy(original)
        found.root, found.path = tmp_path, str(tmp_path / "db1")
        shutil.copytree(original.path, found.path)
        return found

    return copied


@pytest.fixture
def replica(replica_of: Callable[[int], Replica]) -> Replica:
    return replica_of(0)


@pytest.fixture
def replica30(replica_of: Callable[[int], Replica]) -> Replica:
    return replica_of(30)


def dry_run(replica: Replica, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said(capsys, "prune", replica.path, "--dry-run", "--json"))
    return found


def test_a_new_store_keeps_everything(replica: Replica, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "retention", replica.path) == "Keeps everything.\n"
    assert "no policy is set, it keeps everything" in said(capsys, "prune", replica.path, code=2)


def test_a_policy_is_set_in_parts_and_shown_in_words(replica: Replica, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "retention", replica.path, "--set", POLICY, "--bookmarks", "2y")
    shown = said(capsys, "retention", replica.path, "--max-size", "2TB", "--min-free", "10GiB")
    assert shown.splitlines()[:4] == [
        "Keeps every write up to an age of 2h, a state every 1s up to an age of 6h, "
        "all snapshots up to an age of 12h, the last snapshot of each hour up to an age of 3d, "
        "the last snapshot of each day up to an age of 9d; of what is older nothing but bookmarks.",
        "Keeps bookmarks up to an age of 2y.",
        "Coarsens the oldest first where the store takes more than 2 TB.",
        "Coarsens the oldest first where less than 10.7 GB is left on its file system.",
    ]
    assert json.loads(said(capsys, "retention", replica.path, "--json")) == {
        "set": POLICY, "bookmarks_ns": 730 * DAY_NS, "max_size_bytes": 2 * 10**12, "min_free_bytes": 10 << 30,
        "words": said(capsys, "retention", replica.path).splitlines(),
    }  # fmt: skip
    said(capsys, "retention", replica.path, "--set", "everything", "--bookmarks", "none", "--max-size", "none")
    assert load_policy(replica.path) == Policy(min_free_bytes=10 << 30)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--set", "1s 3d, every-write 14d"], "--set: 'every-write 14d': isn't coarser than 1s before it"),
        (["--set", "every-write 3d, 1s 3d"], "--set: '1s 3d': isn't more than 3d before it: ages have to grow"),
        (["--set", "every-write 0d"], "--set: '0d': an age of 0 keeps nothing: write 1s"),
        (["--set", "dayly 3d"], "--set: 'dayly 3d': unknown granularity: there are every-write, 1ms"),
        (["--set", "2s 3d"], "--set: '2s 3d': unknown granularity: there are every-write, 1ms, 5ms"),
        (["--set", ""], "--set: '': a step is missing: write a granularity and an age for each step"),
        (["--set", "every-write 3d,"], "--set: '': a step is missing"),
        (["--set", "every-write"], "--set: 'every-write': its age is missing: write"),
        (["--set", "every-write 3 d"], "--set: 'every-write 3 d': too many words"),
        (["--set", "hourly 3"], "--set: '3': an age is a whole number with one of y, w, d, h, m (or min), s"),
        (["--bookmarks", "0s"], "--bookmarks: '0s': an age of 0"),
        (["--max-size", "0"], "--max-size: 0 keeps nothing"),
        (["--min-free", "many"], "--min-free: 'many' isn't a number"),
    ],
)
def test_wrong_use_is_one_line(
    replica: Replica, capsys: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    assert line in said(capsys, "retention", replica.path, *options, code=2)
    assert load_policy(replica.path) is None


def test_a_dry_run_tells_each_stretch_and_pruning_does_that(
    replica_of: Callable[[int], Replica], capsys: pytest.CaptureFixture[str]
) -> None:
    replica = replica_of(80)
    said(capsys, "retention", replica.path, "--set", POLICY)
    before, used = replica.states(), used_bytes(os.path.join(replica.path, "objects"))
    foretold = dry_run(replica, capsys)
    assert replica.states() == before
    rows = foretold["stretches"]
    assert [(row["then"], row["reason"]) for row in rows] == [
        ("hourly", "hourly from 12h on"), ("snapshots only", "snapshots from 6h on"), ("every 1 s", "1s from 2h on"),
        ("every write", "every-write"),
    ]  # fmt: skip
    assert [row["to"] for row in rows[:-1]] == [row["from"] for row in rows[1:]]
    assert foretold["snapshots"] == sum(row["snapshots"] for row in rows) > 3
    assert len(said(capsys, "prune", replica.path, "--dry-run").splitlines()) == len(rows) + 1

    done = json.loads(said(capsys, "prune", replica.path, "--json"))
    freed = used - used_bytes(os.path.join(replica.path, "objects"))
    assert abs(done["freed_bytes"] - foretold["freed_bytes"]) <= 0.01 * done["freed_bytes"]
    assert abs(done["freed_bytes"] - freed) <= 0.01 * freed
    left = replica.states()
    assert len(left["snapshots"]) == len(before["snapshots"]) - foretold["snapshots"]
    assert {None, 0} <= set(left["granularities"]) <= {None, SECOND_NS, 0}
    assert said(capsys, "prune", replica.path) == "there was nothing to prune\n"
    status = json.loads(said(capsys, "status", replica.path, "--json"))
    assert status["pruned_before"] is None  # the first snapshot is the last one of its hour
    assert status["any_instant_from"] == rows[-1]["from"]


def test_pins_and_bookmarks_keep_what_they_name_and_are_the_reason(
    replica: Replica, capsys: pytest.CaptureFixture[str]
) -> None:
    replica.receive(3)
    replica.receive(1, bookmarks=("before-upgrade",))
    replica.receive(60)
    said(capsys, "retention", replica.path, "--set", "every-write 2h")
    times_ns = replica.states()["snapshots"]
    with contextlib.closing(Store.open(replica.path)) as store, Pins(replica.path, "mount /mnt/x") as pins:
        within = store.at_seq(store.at_time(times_ns[30])[0].seq + 2)
        pins.pin(within.seq, within.time_ns)
        rows = dry_run(replica, capsys)["stretches"]
        reasons = [row["reason"] for row in rows]
        kept = f"pinned by mount /mnt/x (pid {os.getpid()})"
        gone = "older than 2h"
        assert reasons == [gone, "bookmark before-upgrade", gone, kept, kept, gone, "every-write"]
        assert [row["then"] for row in rows[:3]] == ["nothing", "snapshots only", "nothing"]
        assert all(row["freed_bytes"] == 0 for row in rows if not row["snapshots"])  # the bytes are where snapshots go
        assert rows[0]["freed_bytes"] > 0 and rows[2]["freed_bytes"] > 0
        said(capsys, "prune", replica.path)
        left = replica.states()
        assert left["snapshots"][:3] == [times_ns[4], times_ns[30], times_ns[31]]
        assert left["granularities"][:3] == [None, 0, None]
        assert store.at_seq(within.seq).time_ns == within.time_ns
    said(capsys, "prune", replica.path)
    assert replica.states()["snapshots"][:2] == [times_ns[4], left["snapshots"][3]]
    said(capsys, "retention", replica.path, "--bookmarks", "3h")
    said(capsys, "prune", replica.path)
    assert replica.states()["snapshots"][0] == left["snapshots"][3]
    assert json.loads(said(capsys, "list", replica.path, "--json"))["bookmarks"] == []


def test_removing_all_but_the_newest_needs_yes(replica: Replica, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "retention", replica.path, "--set", "yearly 1y")
    assert said(capsys, "prune", replica.path) == "there was nothing to prune\n"  # the only state
    replica.receive(4)
    newest_ns = replica.states()["snapshots"][-1]
    line = said(capsys, "prune", replica.path, code=2)
    assert f"nothing but the newest snapshot, {format_instant(newest_ns)}, and what bookmarks and pins keep" in line
    said(capsys, "prune", replica.path, "--yes")
    assert replica.states()["snapshots"] == [newest_ns]


def test_bookmarks_alone_need_yes_and_are_asked_for_once(
    replica: Replica, capsys: pytest.CaptureFixture[str]
) -> None:
    replica.receive(3)
    replica.receive(1, bookmarks=("before-upgrade",))
    replica.receive(3)
    said(capsys, "retention", replica.path, "--set", "snapshots 1s")
    assert "and what bookmarks and pins keep would be left: look at --dry-run" in said(
        capsys, "prune", replica.path, code=2
    )
    said(capsys, "prune", replica.path, "--yes")
    assert len(replica.states()["snapshots"]) == 2
    assert said(capsys, "prune", replica.path) == "there was nothing to prune\n"


def test_a_size_that_takes_most_snapshots_needs_yes_and_is_told_when_it_is_set(
    replica: Replica, capsys: pytest.CaptureFixture[str]
) -> None:
    replica.receive(60)
    size = used_bytes(replica.path)
    set_ = said(capsys, "retention", replica.path, "--max-size", str(size - 8192))
    sums = dry_run(replica, capsys)
    assert set_.splitlines()[:2] == [
        "Keeps everything, as long as there is room.",
        f"Coarsens the oldest first where the store takes more than {format_bytes(size - 8192)}.",
    ]
    told = f"frees {format_bytes(sums['freed_bytes'])}"
    assert f"minute after pitfs receive starts; it asks nobody) {told}: see pitfs prune" in set_.splitlines()[2]
    said(capsys, "prune", replica.path)  # granularity goes: nobody is asked
    set_ = said(capsys, "retention", replica.path, "--max-size", str(int(size * 0.3)))
    sums = dry_run(replica, capsys)
    assert sums["snapshots"] > 31 and f"loses {sums['snapshots']} snapshots and" in set_
    count = len(replica.states()["snapshots"])
    line = said(capsys, "prune", replica.path, code=2)
    assert f"{sums['snapshots']} of {count} snapshots would go to make room: look at --dry-run" in line
    said(capsys, "prune", replica.path, "--yes")
    assert len(replica.states()["snapshots"]) == count - sums["snapshots"]


@pytest.mark.parametrize("seed", range(8))
def test_what_a_policy_leaves_is_exact(tmp_path: Path, seed: int) -> None:
    """Random histories and policies: the instants that the plan leaves, byte for byte, and no others."""
    model = model_of(tmp_path, seed, count=14)
    times_ns = model.history.times_ns
    random = np.random.default_rng(seed)
    levels = sorted(random.choice(range(1, NOTHING + 1), 3, replace=False).tolist(), reverse=True)
    ends_ns = sorted(random.integers(times_ns[0], times_ns[-1], 3).tolist())
    save_policy(model.path, Policy())
    with Retention(model.path, True) as retention:
        retention._rule = Rule(Policy(), times_ns[-1], tuple(zip(ends_ns, levels, strict=True)))
        model.take([stretch.action for stretch in retention._plan(retention._rule) if stretch.action])
        foretold = sum(row.freed_bytes for row in retention.foretold())
        done = retention.apply()
    assert done.skipped == 0 and abs(done.freed_bytes - foretold) <= max(4096, 0.01 * foretold)
    model.check()
    assert_tidy(model.path)


# Ages


def test_a_stalled_store_is_not_emptied(replica30: Replica) -> None:
    replica = replica30
    save_policy(replica.path, Policy(parse_steps("every-write 2h")))
    count = replica.apply()
    assert count == 7
    for years in (1, 2, 10):
        assert replica.apply(START_NS + years * 365 * DAY_NS) == count
    newest_ns = replica.states()["snapshots"][-1]
    replica.history.protected_ns += 365 * DAY_NS  # it goes on, and so do the ages: the replica's clock went on, too
    replica.receive(30)
    assert replica.apply(newest_ns + 366 * DAY_NS) == 7


def test_an_empty_store_has_no_age(tmp_path: Path) -> None:
    history = History(3, (VolumeInfo("root", 40_960, 4096),))
    Ingest(str(tmp_path), history.hello).close()
    save_policy(str(tmp_path / "db1"), Policy(parse_steps("snapshots 2h")))
    with Retention(str(tmp_path / "db1"), True) as retention:
        assert retention.apply().done == 0
    replica = Replica(tmp_path)
    replica.receive(30)
    assert replica.apply() == 6


def test_a_sender_years_ahead_displaces_nothing(replica30: Replica) -> None:
    replica = replica30
    save_policy(replica.path, Policy(parse_steps("every-write 2h, snapshots 2d")))
    now_ns = replica.states()["snapshots"][-1]
    assert replica.apply(now_ns) == 31
    replica.history.protected_ns += 3650 * DAY_NS
    replica.receive(3)
    assert replica.apply(now_ns + HOUR_NS) == 34
    assert replica.apply(now_ns + DAY_NS) == 34
    assert replica.apply(now_ns + 3 * DAY_NS) == 4  # what the replica has seen getting old, and what bounds it


def test_at_first_a_sender_ahead_of_the_replica_makes_nothing_old(replica30: Replica) -> None:
    replica = replica30
    save_policy(replica.path, Policy(parse_steps("snapshots 2d")))
    now_ns = replica.states()["snapshots"][-1]
    replica.history.protected_ns += 3650 * DAY_NS
    replica.receive(3)
    assert replica.apply(now_ns) == 34


def test_a_sender_whose_clock_was_years_behind_makes_nothing_old(replica30: Replica) -> None:
    replica = replica30
    save_policy(replica.path, Policy(parse_steps("snapshots 2d")))
    now_ns = replica.states()["snapshots"][-1] + 3650 * DAY_NS
    assert replica.apply(now_ns) == 31
    replica.history.protected_ns = now_ns
    replica.receive(3)
    assert replica.apply(now_ns + HOUR_NS) == 34


def test_a_replica_whose_clock_goes_back_goes_on_from_there(replica30: Replica) -> None:
    replica = replica30
    save_policy(replica.path, Policy(parse_steps("snapshots 11h")))
    now_ns = replica.states()["snapshots"][-1]
    assert replica.apply(now_ns) == 31
    replica.receive(30)
    assert replica.apply(now_ns - 365 * DAY_NS) == 61
    replica.receive(1)
    young = [each for each in replica.states()["snapshots"] if now_ns + 5 * HOUR_NS - each <= 11 * HOUR_NS]
    assert replica.apply(now_ns - 365 * DAY_NS + 5 * HOUR_NS) == len(young) < 62


# Room


def test_a_size_gives_up_granularity_before_states_the_oldest_first(
    replica: Replica, capsys: pytest.CaptureFixture[str]
) -> None:
    replica.receive(60)
    count, sizes, whole = 61, [], used_bytes(os.path.join(replica.path, "objects"))
    for share in (0.05, 0.1, 0.2, 0.2, 0.2):
        size = used_bytes(replica.path) - int(whole * share)
        said(capsys, "retention", replica.path, "--max-size", str(size))
        foretold = dry_run(replica, capsys)
        said(capsys, "prune", replica.path, "--yes")
        states = replica.states()
        assert foretold["snapshots"] == count - len(states["snapshots"])
        count = len(states["snapshots"])
        kept = [each == 0 for each in states["granularities"]]
        assert kept == sorted(kept)  # the oldest went first
        sizes.append(used_bytes(replica.path))
        assert sizes[-1] <= size + 64_000  # what the catalog takes changes, too
        status = json.loads(said(capsys, "status", replica.path, "--json"))
        assert (status["pruned_before"] is not None) == (states["snapshots"][0] != replica.history.times_ns[0])
    assert sizes == sorted(sizes, reverse=True)


def test_what_cannot_fit_is_said_and_the_newest_stays(replica: Replica, capsys: pytest.CaptureFixture[str]) -> None:
    replica.receive(10)
    newest_ns = replica.states()["snapshots"][-1]
    said(capsys, "retention", replica.path, "--max-size", "1")
    assert main(["prune", replica.path, "--yes"]) == 0
    assert "more than the policy allows" in capsys.readouterr().err
    assert replica.states()["snapshots"] == [newest_ns]


# What it leaves


def test_a_time_where_the_history_was_thinned_is_answered_with_a_warning(
    replica: Replica, capsys: pytest.CaptureFixture[str]
) -> None:
    replica.receive(6, 3 * MINUTE_NS)
    times_ns = replica.states()["snapshots"]
    between = format_instant(times_ns[2] - 1)

    def warning(time: str, command: str = "resolve", *more: str) -> str:
        assert main([command, replica.path, time, *more]) == 0
        return capsys.readouterr().err

    assert warning(between) == ""
    said(capsys, "retention", replica.path, "--set", "snapshots 1y")
    said(capsys, "prune", replica.path)
    bounds = f"{format_instant(times_ns[1])} -> {format_instant(times_ns[2])}"
    why = f"the interval {bounds} (snapshots only; retention: snapshots): this is the last state before it, "
    assert warning(between) == f"pitfs: {between} lies in {why}3 min older\n"
    assert warning(between, "digest", "root") == f"pitfs: {between} lies in {why}3 min older\n"
    with contextlib.closing(Store.open(replica.path)) as store:
        seq = store.at_time(times_ns[2])[0].seq - 1
    assert warning(f"seq-{seq}") == f"pitfs: seq-{seq} lies in {why}4 writes older\n"
    assert warning(format_instant(times_ns[2])) == ""


# By itself


def test_the_receiver_prunes_each_store_that_has_a_policy(
    replica30: Replica, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = replica30
    assert receive.FIRST_PRUNE_S == 60 and receive.PRUNE_EVERY_S == 3600
    assert "A minute after its start, and then each hour, it prunes" in receive.DESCRIPTION
    import trio
    import trio.testing

    monkeypatch.setattr(receive, "FIRST_PRUNE_S", 0.0)

    async def run() -> None:
        with trio.move_on_after(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive._prune_hourly, str(replica.root))
                while len(replica.states()["snapshots"]) == 31:
                    await trio.sleep(0.05)
                nursery.cancel_scope.cancel()

    broken = replica.root / "a"
    broken.mkdir()
    (broken / "retention.json").write_text("{")
    save_policy(replica.path, Policy(parse_steps("snapshots 2h")))
    trio.run(run)
    assert len(replica.states()["snapshots"]) < 10
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith(f"not pruned: {broken}: not a store") and "\n" not in line


