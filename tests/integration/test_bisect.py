"""`pitfs bisect`: the write that broke a filesystem or a database, and what stops a search."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from pitfs.cli.main import main
from pitfs.fuse.attach.attachments import scratch_mount
from pitfs.model.position import format_instant
from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from tests.helpers.attaching import attached, nothing_left, pitfs
from tests.helpers.broken_disks import DATABASE_COMMAND, FILESYSTEM_COMMAND, BrokenDisk, broken_disk
from tests.helpers.processes import pitfs_command, run, wait_until
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.loop]

# COMMAND that looks at the instant alone: bad from $0 on, nothing to be told from $1 to before $2.
BY_NAME = r'''test "$PITFS_INSTANT" \< "$1" || test ! "$PITFS_INSTANT" \< "$2" || exit 125
test "$PITFS_INSTANT" \< "$0"'''


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> BrokenDisk:
    return broken_disk(tmp_path_factory.mktemp("broken"), last=3000, filesystem=1333, database=2701)


@pytest.fixture(autouse=True)
def clean(disk: BrokenDisk) -> Iterator[None]:
    with nothing_left(disk.path):
        yield


def bisect(store: Path, command: list[str], code: int = 0) -> tuple[Any, str]:
    """What it found, as JSON, and standard error."""
    words = ["bisect", str(store), "root", "--good", "seq-0", "--bad", "latest", "--json", "--", *command]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        ended = main(words)
    assert ended == code, err.getvalue()
    return json.loads(out.getvalue()) if out.getvalue() else None, err.getvalue()


def test_the_write_that_broke_the_filesystem(disk: BrokenDisk) -> None:
    words = [*pitfs_command(), "bisect", disk.path, "root", "--good", "seq-0", "--bad", "latest"]
    done = run([*words, "--", *FILESYSTEM_COMMAND])
    good, bad = (disk.instant(seq) for seq in (1332, 1333))
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"last good  {good}  seq 1332", f"first bad  {bad}  seq 1333"]
    assert re.fullmatch(r"changed    4096 bytes at \d+", lines[2])
    assert "not just one write" not in done.stdout
    tests = [line for line in done.stderr.splitlines() if line.startswith("pitfs: ")]
    assert len(tests) <= 2 + 12 and "has deleted/unused inode" in done.stderr
    assert tests[0].startswith(f"pitfs: {disk.instant(0)} (seq 0): good (exit code 0, ")
    assert "bad (exit code 4, " in tests[1] and "; 2999 writes left, at most 12 tests" in tests[1]
    for line, instant in zip(lines[3:], (good, bad), strict=True):  # what to do next, as it is said
        command = shlex.split(line.partition(": ")[2])
        assert command == ["pitfs", "attach", str(disk.path), instant, "root"]
        pitfs("detach", pitfs(*command[1:]))


def test_the_write_that_broke_the_database(disk: BrokenDisk) -> None:
    found, _ = bisect(disk.path, DATABASE_COMMAND)
    assert (found["last_good"]["seq"], found["first_bad"]["seq"]) == (2700, 2701)
    assert found["first_bad"]["instant"] == disk.instant(2701)
    assert (found["volume"], found["exact"], found["reason"]) == ("root", True, None)
    ((offset, size),) = (each.values() for each in found["changed"])
    assert size == 4096 and offset % 4096 == 0
    assert len(found["tests"]) <= 14 and {each["verdict"] for each in found["tests"]} == {"good", "bad"}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["filesystem", "database"])
def test_among_a_hundred_thousand_writes_in_a_minute(tmp_path: Path, what: str) -> None:
    disk = broken_disk(tmp_path, last=100_000, filesystem=61_803, database=87_654)
    command = FILESYSTEM_COMMAND if what == "filesystem" else DATABASE_COMMAND
    with nothing_left(disk.path):
        begun_s = time.monotonic()
        found, _ = bisect(disk.path, command)
        took_s = time.monotonic() - begun_s
    print(f"{what}: {len(found['tests'])} tests in {took_s:.1f} s")
    assert found["first_bad"]["seq"] == getattr(disk, what) == found["last_good"]["seq"] + 1
    assert len(found["tests"]) <= 20 and took_s < 60


def test_neighbours_are_tried_where_nothing_can_be_told(disk: BrokenDisk) -> None:
    command = ["sh", "-c", BY_NAME, *map(disk.instant, (1000, 1450, 1550))]
    found, said = bisect(disk.path, command)
    assert found["first_bad"]["seq"] == 1000 and found["exact"]
    assert "can't tell (exit code 125" in said and len(found["tests"]) <= 2 + 12 + 2
    command = ["sh", "-c", BY_NAME, *map(disk.instant, (1003, 1000, 1006))]
    found, _ = bisect(disk.path, command, code=1)
    assert (found["last_good"]["seq"], found["first_bad"]["seq"], found["exact"]) == (999, 1006, False)
    assert found["reason"] == "of 6 instants between COMMAND can't tell"


@pytest.mark.parametrize(("granularity_ns", "said"), [(10**9, "every 1 s"), (None, "snapshots only")])
def test_where_the_history_is_coarse_it_says_so(tmp_path: Path, granularity_ns: int | None, said: str) -> None:
    history = History(1, (VolumeInfo("root", 64 << 10, 4096),), step_ns=400_000_000)
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, history.close_interval())
    for _ in range(4):
        for _ in range(20):
            history.write()
        ingest_transfer(ingest, history.close_interval(granularity_ns))
    ingest.close()
    path = tmp_path / history.group
    with nothing_left(path):
        found, _ = bisect(path, ["sh", "-c", BY_NAME, *[format_instant(history.times_ns[47])] * 3])
    good, bad = found["last_good"]["seq"], found["first_bad"]["seq"]
    states = sorted(history.reachable)
    assert good < 47 <= bad and states[states.index(good) + 1] == bad
    assert bad - good > 1 and not found["exact"]
    assert found["reason"] == f"{bad - good} writes lie between; the store has there: {said}"
    assert found["changed"]


def test_a_gap_can_not_be_narrowed(tmp_path: Path) -> None:
    history = History(1, (VolumeInfo("root", 64 << 10, 4096),))
    ingest = Ingest(str(tmp_path), history.hello)
    for full in (False, True):
        ingest_transfer(ingest, history.close_interval(full=full))
        for _ in range(10):
            history.write()
    ingest_transfer(ingest, history.close_interval())
    ingest.close()
    with nothing_left(tmp_path / history.group):
        found, _ = bisect(tmp_path / history.group, ["sh", "-c", BY_NAME, *[format_instant(history.times_ns[3])] * 3])
    assert (found["last_good"]["seq"], found["first_bad"]["seq"]) == (0, 10)
    assert found["reason"] == "a gap lies between (rescan)" and not found["exact"]


@pytest.mark.parametrize(
    ("command", "how"), [("exit 127", "with 127"), ("exit 200", "with 200"), ("kill -KILL $$", "by SIGKILL")]
)
def test_no_verdict_ends_the_search(disk: BrokenDisk, command: str, how: str) -> None:
    script = f'test "$PITFS_INSTANT" = {disk.instant(0)} || {command}'
    found, said = bisect(disk.path, ["sh", "-c", script], code=1)
    assert found is None and f"sh ended {how} at {disk.instant(3000)}: that is no verdict" in said


def test_ends_that_are_not_what_they_are_said_to_be(disk: BrokenDisk) -> None:
    _, said = bisect(disk.path, ["false"], code=1)
    assert f"--good {disk.instant(0)}: COMMAND exits with 1 there: bad: give an earlier --good" in said
    _, said = bisect(disk.path, ["true"], code=1)
    assert f"--bad {disk.instant(3000)}: COMMAND exits with 0 there: good: give another --bad" in said
    _, said = bisect(disk.path, ["sh", "-c", "exit 125"], code=1)
    assert "can't tell: give an earlier --good" in said


def test_a_signal_leaves_nothing(disk: BrokenDisk, tmp_path: Path) -> None:
    script = f'mount "$0" {tmp_path} && touch {tmp_path}/reached && sleep 96'
    process = subprocess.Popen(
        [*pitfs_command(), "bisect", disk.path, "root", "--good", "seq-0", "--bad", "latest", "--", "sh", "-c", script],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: (tmp_path / "reached").exists(), "COMMAND runs", 20, 0.01)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "") and "Traceback" not in said
    assert attached(disk.path) == [] and not (tmp_path / "reached").exists()


def test_other_attaches_do_not_take_its_mount_for_unused(disk: BrokenDisk) -> None:
    with scratch_mount(str(disk.path), "db1", None) as mountpoint:
        device = run([*pitfs_command(), "attach", disk.path, "seq-7", "root"]).stdout.strip()
        run([*pitfs_command(), "detach", device])
        assert (Path(mountpoint) / disk.instant(7) / "root.img").stat().st_size == 8 << 20
    assert not Path(mountpoint).exists()


def test_what_is_ignored_stays_ignored(disk: BrokenDisk) -> None:
    """As under nohup: a search of the night goes on when the terminal is closed."""
    script = "import os, signal, sys; signal.signal(1, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    words = [*pitfs_command(), "bisect", str(disk.path), "root", "--good", "seq-0", "--bad", "seq-9"]
    command = ["sh", "-c", f'kill -HUP $PPID; test "$PITFS_INSTANT" \\< {disk.instant(4)}']
    done = run([sys.executable, "-c", script, *words, "--", *command])
    assert f"first bad  {disk.instant(4)}" in done.stdout


def test_little_room_is_warned_of(disk: BrokenDisk, tmp_path: Path) -> None:
    """Where a test can't write, it may call good what is bad, or bad what is good."""
    run(["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", tmp_path])
    try:
        words = ["root", "--good", "seq-5", "--bad", "seq-7", "--scratch-dir", tmp_path]
        done = run([*pitfs_command(), "bisect", disk.path, *words, "--", "sh", "-c", BY_NAME, *[disk.instant(6)] * 3])
        assert f"pitfs: {tmp_path}: 8.0 MiB are free: if " in done.stderr and "first bad" in done.stdout
        done = run([*pitfs_command(), "drill", disk.path, "--at", "seq-5", "--scratch-dir", tmp_path])
        assert f"pitfs: {tmp_path}: 8.0 MiB are free: if " in done.stderr and "  ok  " in done.stdout
    finally:
        run(["umount", tmp_path])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["root", "--good", "seq-9", "--bad", "seq-5", "--", "true"], 2, "must be earlier than --bad seq-5 (seq 5)"),
        (["root", "--good", "seq-5", "--bad", "seq-5", "--", "true"], 2, "must be earlier than"),
        (["root", "--good", "seq-5", "--bad", "seq-9"], 2, "COMMAND is missing: pitfs bisect STORE VOLUME"),
        (["root", "--good", "seq-5", "--bad", "seq-9", "true"], 2, "unrecognized arguments: true"),
        (["root", "--good", "seq-5", "--", "true"], 2, "the following arguments are required: --bad"),
        (["swap", "--good", "seq-5", "--bad", "seq-9", "--", "true"], 2, "no volume 'swap'"),
        (["root", "--good", "seq-5", "--bad", "seq-99999", "--", "true"], 1, "no state answers to 'seq-99999'"),
        (["root", "--good", "seq-5", "--bad", "seq-9", "--scratch-dir", "x", "--", "true"], 2, "x: scratch: no such"),
        (["root", "--good", "seq-5", "--bad", "seq-9", "--", "/no/such"], 2, "/no/such: can't be run: No such file"),
    ],
)
def test_wrong_use(disk: BrokenDisk, words: list[str], code: int, message: str) -> None:
    assert message in pitfs("bisect", disk.path, *words, code=code)
