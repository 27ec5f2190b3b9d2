"""Which instant `pitfs drill` takes: any that can be reached, by the time for which it was the state."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from pitfs.cli.drill import random_state
from pitfs.errors import NoSuchInstantError
from pitfs.model.transfer import VolumeInfo
from pitfs.store.ingest import Ingest
from pitfs.store.store import Store
from tests.helpers.stores import ingest_transfer
from tests.helpers.transfers import History


def test_each_is_drawn_as_often_as_it_was_long(tmp_path: Path) -> None:
    history = History(1, (VolumeInfo("root", 64 << 10, 4096),))
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, history.close_interval())
    for granularity_ns in (0, None, 10**8):  # every write, snapshots only, a rung
        for _ in range(20):
            history.write()
        ingest_transfer(ingest, history.close_interval(granularity_ns))
    for _ in range(20):
        history.write()
    ingest_transfer(ingest, history.close_interval(full=True))  # a gap lies before it
    history.protected_ns += 10**8  # nothing has been written since
    ingest_transfer(ingest, history.close_interval())
    ingest.close()
    store = Store.open(str(tmp_path / history.group))
    drawn = Counter(random_state(store, random.Random(seed).randint).seq for seed in range(4000))
    (gap,) = store.gaps()
    first, end = history.times_ns[0], store.protected_through_ns()
    store.close()
    assert set(drawn) <= history.reachable and {0, 20, 80} <= set(drawn) and len(set(drawn)) > 20
    reachable_ns = end - first - (gap.to_time_ns - gap.from_time_ns)
    ends = [*sorted(history.reachable), None]
    for seq, following in pairwise(ends):
        length_ns = (end if following is None else history.times_ns[following]) - history.times_ns[seq]
        if seq == 60:  # the gap begins with it
            continue
        assert abs(drawn[seq] - 4000 * length_ns / reachable_ns) <= 5 * (4000 * length_ns / reachable_ns) ** 0.5 + 5


def test_an_empty_store_has_none(tmp_path: Path) -> None:
    history = History(1, (VolumeInfo("root", 64 << 10, 4096),))
    Ingest(str(tmp_path), history.hello).close()
    store = Store.open(str(tmp_path / history.group))
    with pytest.raises(NoSuchInstantError, match="nothing has arrived yet"):
        random_state(store, random.Random(1).randint)
    store.close()
