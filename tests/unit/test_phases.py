"""The shipper's phases: the table is whole, drawn, and checked."""

from __future__ import annotations

import itertools

import pytest

from pitfs.replication.phases import TRANSITIONS, Phase
from pitfs.replication.status import ReplicationStatus


@pytest.mark.parametrize(("phase", "following"), list(itertools.product(Phase, Phase)))
def test_only_what_the_table_has_can_follow(phase: Phase, following: Phase) -> None:
    status = ReplicationStatus("here", phase)
    if following in TRANSITIONS[phase]:
        status.enter(following)
        assert status.phase is following
    else:
        with pytest.raises(AssertionError, match=f"can't go from {phase.name} to {following.name}"):
            status.enter(following)
        assert status.phase is phase


def test_a_connection_may_fail_in_any_phase_that_has_one() -> None:
    for phase in set(Phase) - {Phase.DISCONNECTED}:
        assert Phase.DISCONNECTED in TRANSITIONS[phase]
    assert {phase for phase in Phase if not phase.is_connected} == {Phase.DISCONNECTED, Phase.CONNECTING}


def test_every_phase_is_reached_and_is_explained() -> None:
    assert set().union(*TRANSITIONS.values()) == set(Phase) == set(TRANSITIONS)
    lines = [line.split() for line in (Phase.__doc__ or "").splitlines()]
    assert {phase.name for phase in Phase} <= {words[0] for words in lines if len(words) > 3}
