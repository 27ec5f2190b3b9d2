"""The `progress` file of a state directory: room for the largest group, two slots in turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from pitfs.errors import CorruptionError
from pitfs.model.group import MAX_VOLUMES
from pitfs.splitter.state import SLOT_BYTES, BackingState, Progress, ProgressFile

LARGE = 2**63 - 1


def progress(generation: int) -> Progress:
    """Of a group as large as can be, in which every number takes its most bytes."""
    return Progress(
        generation=generation,
        clean=False,
        boot_id="0" * 36,
        bypass_cause="/" + "p" * 4094 + ": a write failed: Input/output error",
        checkpoint_segment=LARGE,
        checkpoint_lsn=LARGE,
        seq=LARGE,
        position_time_ns=LARGE,
        time_ns=LARGE,
        mark=LARGE,
        copy_segment=LARGE,
        backings=(BackingState(LARGE, LARGE),) * MAX_VOLUMES,
    )


def test_the_largest_group_s_progress_is_read_back_from_either_slot(tmp_path: Path) -> None:
    file = ProgressFile(str(tmp_path))
    for generation in (1, 2, 3):
        file.write(progress(generation))
        assert file.read() == progress(generation)
    file.close()


@pytest.mark.parametrize("size", [1, SLOT_BYTES, 2 * SLOT_BYTES - 1])
def test_one_cut_short_is_damage_and_not_a_new_one(tmp_path: Path, size: int) -> None:
    file = ProgressFile(str(tmp_path))
    for generation in (1, 2):
        file.write(progress(generation))
    file.close()
    path = tmp_path / "progress"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptionError, match="neither slot"):
        ProgressFile(str(tmp_path))
    assert path.stat().st_size == size


def test_one_whose_making_was_interrupted_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "progress").write_bytes(bytes(100))
    assert ProgressFile(str(tmp_path)).read() is None


def test_one_that_is_missing_beside_a_journal_is_damage(tmp_path: Path) -> None:
    with pytest.raises(CorruptionError, match="missing"):
        ProgressFile(str(tmp_path), begins=False)
    assert not (tmp_path / "progress").exists()
