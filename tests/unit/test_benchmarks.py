"""What the benchmarks say and how they come to it, without measuring anything."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.helpers.processes import MARK, ROOT, run


@pytest.fixture(autouse=True)
def as_tools_bench_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "benchmarks"))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    measure = module("report").compare("reads", [10, 40, 90], [10, 20, 30], "/s", 2.0, "a peer")
    assert (measure.value, measure.ratio, measure.met) == (40, 2.0, True)
    assert measure.against == "a peer: 20.00 /s"
    assert module("report").compare("reads", [10], [11], "/s", 1.0).met is False
    assert module("report").compare("reads", [10], [11], "/s", None).met is None


def test_what_must_be_small_is_met_at_the_goal_itself() -> None:
    at_most = module("report").at_most
    assert at_most("memory", 200, "MiB", 200).met and at_most("memory", 200.1, "MiB", 200).met is False


def test_the_table_is_one_of_restructuredtext(capsys: pytest.CaptureFixture[str]) -> None:
    report = module("report")
    report.show([report.plain("readahead", 2048, "KiB"), report.compare("reads", [10], [5], "/s", 1.5, "x")])
    lines = capsys.readouterr().out.splitlines()
    line = lines[0]
    assert set(line) == {"=", " "} and [lines[0], lines[2], lines[-1]] == [line] * 3
    # No text stands where the line has its gaps, and each row's first cell says something.
    gaps = [place for place, character in enumerate(line) if character == " "]
    for row in lines[1:2] + lines[3:-1]:
        assert all(row[place : place + 1].strip() == "" for place in gaps) and row[0] != " "


def test_the_json_has_the_keys_of_the_contract(tmp_path: Path) -> None:
    report = module("report")
    report.write_json([report.at_most("memory", 1, "MiB", 2)], tmp_path / "figures")
    (row,) = json.loads((tmp_path / "figures").read_text())
    assert list(row) == ["measure", "value", "unit", "against", "ratio", "goal", "met"]


@pytest.mark.parametrize("size_bytes", [64 << 20, 2 << 30])
def test_a_tenth_of_the_volume_is_rewritten_part_of_it_again_and_again(size_bytes: int) -> None:
    rewriting = module("rewriting")
    whole = rewriting.Rewriting.of(size_bytes, 1)
    assert whole.written_bytes / size_bytes == pytest.approx(0.1, abs=0.005)
    assert int(whole.offsets.max()) + rewriting.WRITE_BYTES <= size_bytes
    _, counts = np.unique(whole.offsets, return_counts=True)
    assert counts.max() > 5
    half = whole.first_half()
    assert len(half.offsets) == len(whole.offsets) // 2
    parts = list(half.parts(64))
    assert len(parts) == 64 and np.array_equal(np.concatenate(parts), whole.offsets[: len(half.offsets)])


def test_a_peer_that_is_not_installed_says_what_to_install() -> None:
    peers = module("peers")
    peer = peers.Peer("x", ("no-such-program",), "a-package", peers.bare)
    assert peer.missing() == "no-such-program isn't installed: apt-get install a-package"
    assert peers.Peer("x", (sys.executable,), "a-package", peers.bare).missing() == ""


def test_every_goal_is_of_a_peer_that_there_is() -> None:
    peers, read = module("peers"), module("read")
    assert {name for load in read.LOADS for name in load.goals} == {peer.name for peer in peers.PEERS}


def test_the_memory_of_all_processes_of_a_mount_counts_and_of_no_other() -> None:
    memory = module("memory").MountMemory()
    assert memory.measures() == []
    script = "held = bytes([1]) * (64 << 20); print(flush=True); input()"
    with memory.watching():
        started = [
            subprocess.Popen(
                [sys.executable, "-c", script, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env=os.environ | {MARK: mark},
            )
            for program, mark in (("mount.pitfs", "one"), ("mount.pitfs", "one"), ("mount.pitfs", "two"), ("x", "one"))
        ]  # fmt: skip
        try:
            for process in started:
                assert process.stdout is not None and process.stdout.readline()
            memory.sample()
        finally:
            for process in started:
                process.communicate(b"\n", timeout=30)
    assert 128 < memory.rss_bytes >> 20 < 180 and 128 < memory.pss_bytes >> 20 < 180
    rss, pss = memory.measures()
    assert rss.met and pss.met is None


def test_a_group_that_there_is_not_is_wrong_use() -> None:
    done = run([sys.executable, ROOT / "tools" / "bench", "nonsense"], accept=(2,))
    assert "no group 'nonsense'" in done.stderr and "histories" in done.stderr
