"""The `progress` file of a state directory: room for the largest group, two slots in turn."""

from __future__ import annotations

from pathlib import Path

from pitfs.config import MAX_VOLUMES
from pitfs.production.state import BackingState, Progress, ProgressFile

LARGE = 2**63 - 1


def progress(generation: int) -> Progress:
    """Of a group as large as can be, in which every number takes its most bytes."""
    return Progress(
        generation=generation,
        clean=False,
        boot_id="0" * 36,
        passing="/" + "p" * 4094 + ": a write failed: Input/output error",
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
